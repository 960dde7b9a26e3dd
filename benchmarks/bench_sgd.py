"""sgd_step on ResNet-50's parameters, against torch's optimizers.

pytest benchmarks/bench_sgd.py --benchmark-only -s
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from sides import Run, measure
from torch import Tensor

from fasttricks.optim import FusedSGD, LossScaler

LR, MOMENTUM, DECAY, SCALE, ROUNDS = 0.1, 0.9, 1e-4, 1024.0, 9
BYTES = 22  # bytes per parameter: check 2; gradient 2, master 4 + 4, momentum 4 + 4, fp16 parameter 2


def resnet50_shapes() -> list[tuple[int, ...]]:
    """The 161 parameters of ResNet-50 (He et al. 2016, table 1): 25,557,032 values."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    before = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for out, into, k in ((width, before, 1), (width, width, 3), (4 * width, width, 1)):
                shapes += [(out, into, k, k), (out,), (out,)]
            if block == 0:
                shapes += [(4 * width, before, 1, 1), (4 * width,), (4 * width,)]
            before = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


SHAPES = resnet50_shapes()
COUNT = sum(math.prod(s) for s in SHAPES)


def parameters(dtype: torch.dtype) -> list[Tensor]:
    made = [(torch.randn(s) * 0.02).to(dtype).requires_grad_() for s in SHAPES]
    for p in made:
        p.grad = (torch.randn_like(p, dtype=torch.float32) * 0.01 * (SCALE if dtype is torch.float16 else 1)).to(dtype)
    return made


def fused_fp16() -> Callable[[], None]:
    """Ours: check and step on fp16 parameters with fp32 masters."""
    optimizer = FusedSGD(parameters(torch.float16), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    scaler = LossScaler(SCALE)

    def run() -> None:
        scaler.step(optimizer)
        scaler.update()

    return run


def fused_fp32() -> Callable[[], None]:
    """Ours: step on fp32 parameters, no check."""
    return FusedSGD(parameters(torch.float32), lr=LR, momentum=MOMENTUM, weight_decay=DECAY).step


def eager_fp16() -> Callable[[], None]:
    """As fused_fp16, with torch.optim.SGD(foreach=True) on fp32 masters, like Apex's FP16_Optimizer."""
    params = parameters(torch.float16)
    masters = [p.detach().float().requires_grad_() for p in params]
    optimizer = torch.optim.SGD(masters, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, foreach=True)
    inv_scale, found_inf = torch.tensor(1 / SCALE), torch.zeros(())

    @torch.no_grad()
    def run() -> None:
        grads = [p.grad.float() for p in params]
        found_inf.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inv_scale)
        if found_inf.item():
            return
        for m, g in zip(masters, grads, strict=True):
            m.grad = g
        optimizer.step()
        torch._foreach_copy_(params, masters)

    return run


def in_place_fp16() -> Callable[[], None]:
    """As fused_fp16, with foreach operations in place in persistent buffers: about 70 bytes per parameter."""
    params = parameters(torch.float16)
    masters = [p.detach().float() for p in params]
    buffers = [torch.zeros_like(m) for m in masters]
    grads = [torch.empty_like(m) for m in masters]
    inv_scale, found_inf = torch.tensor(1 / SCALE), torch.zeros(())

    @torch.no_grad()
    def run() -> None:
        torch._foreach_copy_(grads, [p.grad for p in params])
        found_inf.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inv_scale)
        if found_inf.item():
            return
        torch._foreach_add_(grads, masters, alpha=DECAY)
        torch._foreach_mul_(buffers, MOMENTUM)
        torch._foreach_add_(buffers, grads)
        torch._foreach_add_(masters, buffers, alpha=-LR)
        torch._foreach_copy_(params, masters)

    return run


def torch_fp32(fused: bool) -> Callable[[], None]:
    """torch.optim.SGD on fp32 parameters."""
    params = parameters(torch.float32)
    return torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, fused=fused).step


Steps = dict[str, Callable[[], None]]


def measure_steps(benchmark, ours: Callable[[], None], peers: Steps, moved: int, flops: int) -> None:
    """moved, flops: per value."""
    runs = {name: Run(step) for name, step in peers.items()}
    measure(benchmark, Run(ours), runs, ROUNDS, COUNT * moved, COUNT * flops)


def test_fp16(benchmark) -> None:
    """Operations per value: 1 for the scale, 2 each for weight decay, momentum and step."""
    measure_steps(benchmark, fused_fp16(), {"eager": eager_fp16(), "in_place": in_place_fp16()}, BYTES, 7)


def test_fp32(benchmark) -> None:
    peers = {"eager": torch_fp32(fused=False), "torch_fused": torch_fp32(fused=True)}
    measure_steps(benchmark, fused_fp32(), peers, 20, 6)
