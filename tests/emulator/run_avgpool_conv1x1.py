"""avgpool_conv1x1's emulated kernels on small inputs, in a process of its own: exits with what is wrong.

run_avgpool_conv1x1.py KIND CSRC OP...     # as emulated.run() starts it
"""

from __future__ import annotations

import itertools

import emulated
import torch
from cases import LAYOUTS, allowed, avgpool_conv1x1_exact, poisoned_memory, relative_error

import fasttricks

# (N, C, H, W, Cout), stride, ceil_mode: one tile of channels and several; 16-byte, pairwise and single accesses
CASES = (((2, 40, 16, 16, 136), 2, False), ((1, 37, 9, 13, 70), 2, True), ((9, 8, 14, 14, 265), 1, False))


def gradients(op, tensors, dy, options):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = op(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def wrong(library: emulated.Library, schedule: dict, dtype: torch.dtype) -> str:
    for ((n, c, h, w, o), stride, ceil_mode), layout in itertools.product(CASES, LAYOUTS):
        options = {"stride": stride, "ceil_mode": ceil_mode}
        x = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=layout)
        tensors = [x, torch.randn(o, c, 1, 1).to(dtype), torch.randn(o).to(dtype)]
        with fasttricks.backend("reference"):
            dy = torch.randn_like(fasttricks.avgpool_conv1x1(*tensors, **options))
            theirs = gradients(fasttricks.avgpool_conv1x1, tensors, dy, options)
        with fasttricks.backend("cuda"), poisoned_memory(), library.schedule(**schedule):
            ours = gradients(fasttricks.avgpool_conv1x1, tensors, dy, options)
        exact = avgpool_conv1x1_exact(*tensors, dy, stride, ceil_mode)
        for name, got, torchs, want in zip(("y", "dx", "dweight", "dbias"), ours, theirs, exact, strict=True):
            error, limit = relative_error(got, want), allowed(relative_error(torchs, want), dtype)
            if not error <= limit:
                return (
                    f"wrong {name}: error {error}, allowed {limit} ({n, c, h, w, o}, {options}, {layout}, {schedule})"
                )
    return ""


if __name__ == "__main__":
    emulated.judge_dtypes(wrong)
