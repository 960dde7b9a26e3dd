"""Compares every op of one backend with plain torch: python tests/wheel_smoke.py [cpu | cuda | triton].

Run by `make wheel-matrix` under each Python and torch, and by benchmarks/gpu.sh on a card under compute-sanitizer.
"""

from __future__ import annotations

import platform
import sys
import warnings

import torch

import fasttricks

warnings.simplefilter("error")


def run(backend: str) -> list[torch.Tensor]:
    """Outputs and gradients of every op; the inputs are the same on each call."""
    torch.manual_seed(0)
    made: list[torch.Tensor] = []
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        leaves = [torch.randn(4, 6, 7, 9).to(dtype).requires_grad_() for _ in range(2)]
        weight, bias = torch.rand(6, requires_grad=True), torch.randn(6, requires_grad=True)
        if dtype == torch.float64:
            weight, bias = (t.detach().double().requires_grad_() for t in (weight, bias))
        conv = torch.randn(5, 6, 1, 1).to(dtype).requires_grad_()
        mean, var = torch.zeros_like(weight.detach()), torch.ones_like(weight.detach())
        with fasttricks.backend(backend):
            y = fasttricks.bn_relu(leaves[0], weight, bias, mean, var)
            z = fasttricks.bn_add_relu(y, leaves[1], weight, bias, mean, var)
            out = fasttricks.avgpool_conv1x1(z, conv, ceil_mode=True)
            grads = torch.autograd.grad(out.float().square().sum(), [*leaves, weight, bias, conv])
        made += [out, mean, var, *grads]
    parameters = [
        torch.nn.Parameter(torch.randn(33).to(dtype)) for dtype in (torch.float16, torch.bfloat16, torch.float32)
    ]
    optimizer = fasttricks.optim.FusedSGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    with fasttricks.backend(backend):
        for _ in range(3):
            for p in parameters:
                p.grad = torch.randn_like(p)
            optimizer.step()
    return [t.detach().double() for t in made + parameters]


backend = sys.argv[1] if len(sys.argv) > 1 else "cpu"
assert backend in fasttricks.info()["loaded"], fasttricks.info()
with torch.device("cpu" if backend == "cpu" else "cuda"):
    for got, want in zip(run(backend), run("reference"), strict=True):
        error = (got - want).norm() / want.norm().clamp_min(1e-30)
        assert error < 2e-2, error  # bfloat16 has 8 bits of precision
facts = f"python {platform.python_version()}, torch {torch.__version__}, {fasttricks.info()['cpu_isa']}"
print(f"{facts}: the {backend} kernels agree with torch")
