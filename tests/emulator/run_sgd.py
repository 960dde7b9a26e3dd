"""sgd's emulated kernels on small inputs, in a process of its own: exits with what is wrong.

run_sgd.py KIND CSRC OP...     # as emulated.run() starts it
"""

from __future__ import annotations

import emulated
import torch
from cases import relative_error

from fasttricks.reference import sgd as reference

# several blocks of 8192 values, whole ones and not; none; one
SHAPES = ((20000,), (33,), (0,), (1,), (64, 128))
TYPES = ((torch.float16, torch.float16), (torch.float32, torch.float32), (torch.bfloat16, torch.float32))


def state() -> dict:
    kinds = [(shape, *types) for shape in SHAPES for types in TYPES]
    params = [torch.randn(shape).to(p) for shape, p, _ in kinds]
    return {
        "params": params,
        "grads": [torch.randn(shape).to(g) for shape, _, g in kinds],
        "buffers": [torch.full(shape, torch.nan) for shape, *_ in kinds],  # the first step reads none
        "steps": [torch.zeros(()) for _ in kinds],
        "masters": [p.float() for p in params if p.dtype != torch.float32],
    }


def copy(given: dict) -> dict:
    return {name: [t.clone() for t in tensors] for name, tensors in given.items()}


def run(ops: object, s: dict, rounds: int = 2) -> list[torch.Tensor]:
    """Checks with norms and LARS steps with clipping; everything that they write."""
    grad_sq, weight_sq = (torch.full((len(s["params"]),), torch.nan, dtype=torch.float64) for _ in range(2))
    found_inf, scale, lr = torch.zeros(()), torch.full((), 4.0), torch.full((), 0.1)
    half = len(s["params"]) // 2
    for _ in range(rounds):
        ops.sgd_check(s["grads"], s["params"], s["masters"], found_inf, grad_sq, weight_sq)
        ops.sgd_step(
            *(s["params"], s["grads"], s["buffers"], s["steps"], s["masters"]),
            *([half, len(s["params"]) - half], [lr, lr.double()], [0.9, 0.5], [0.0, 0.1], [1e-4, 0.0]),
            *([True, False], [False, True], [0.0, 0.01], 0.0, False, 5.0),
            *(scale, found_inf, grad_sq, weight_sq),
        )
    return [t for name in ("params", "buffers", "steps", "masters") for t in s[name]] + [found_inf, grad_sq, weight_sq]


def wrong(library: emulated.Library, schedule: dict) -> str:
    given = state()
    want = run(reference, copy(given))
    with library.schedule(**schedule):
        got = run(torch.ops.fasttricks_emulated, copy(given))
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        limit = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(a.dtype, 1e-5)
        error = relative_error(a, b)
        if a.numel() and not error <= limit:
            return f"wrong output {i}: error {error}, allowed {limit} ({tuple(a.shape)}, {a.dtype}, {schedule})"
    return ""


if __name__ == "__main__":
    emulated.judge(lambda library, kind, schedule: wrong(library, schedule))
