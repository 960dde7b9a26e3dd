"""sgd_step on ResNet-50's parameters, against torch's optimizers and the copy bandwidth of the machine.

pytest benchmarks/bench_sgd.py                        times each case with pytest-benchmark
pytest benchmarks/bench_sgd.py -s -k ratios           prints ratios from rounds in which all cases run in turn
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fasttricks.optim import FusedSGD, LossScaler

LR, MOMENTUM, DECAY, SCALE = 0.1, 0.9, 1e-4, 1024.0
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


def torch_fused_fp32() -> Callable[[], None]:
    """torch.optim.SGD(fused=True) on fp32 parameters."""
    return torch.optim.SGD(parameters(torch.float32), lr=LR, momentum=MOMENTUM, weight_decay=DECAY, fused=True).step


def copy() -> Callable[[], None]:
    """A copy that moves as many bytes as fused_fp16: half of them read, half written."""
    source, target = torch.ones(COUNT * BYTES // 8), torch.empty(COUNT * BYTES // 8)
    return lambda: target.copy_(source)


CASES = {f.__name__: f for f in (fused_fp16, eager_fp16, in_place_fp16, fused_fp32, torch_fused_fp32, copy)}


@pytest.mark.parametrize("case", CASES)
def test_case(benchmark: Callable[..., None], case: str) -> None:
    torch.set_num_threads(2)
    run = CASES[case]()
    run()
    benchmark.extra_info["parameters"] = COUNT  # type: ignore[attr-defined]
    benchmark.pedantic(run, rounds=9, warmup_rounds=1)  # type: ignore[attr-defined]


def ratios(rounds: int = 9) -> dict[str, float]:
    """Median seconds of every case, over rounds in which the cases run in turn."""
    torch.set_num_threads(2)
    runs = {name: make() for name, make in CASES.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if k:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def test_ratios() -> None:
    seconds = ratios()
    ours = seconds["fused_fp16"]
    for name, t in seconds.items():
        print(f"{name:18} {t * 1e3:8.2f} ms   {t / ours:5.2f} x fused_fp16")
    moved, copied = COUNT * BYTES / ours / 1e9, COUNT * BYTES / seconds["copy"] / 1e9
    print(f"fused_fp16 moves {moved:.1f} GB/s, copy {copied:.1f} GB/s: {moved / copied:.0%} at {BYTES} bytes per value")
