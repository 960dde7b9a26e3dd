"""bn_relu against eager relu(bn(x)) and torch.compile of it, bn_add_relu against relu(bn(x) + r): float32, batch 32.

    pytest benchmarks/bench_bn_relu.py --benchmark-only -s

The shapes are those of ResNet-50's BatchNorms. All sides run in turn in one process, so that ratios compare equal
conditions. Prints the best round, the ratios, and the bytes of the formula (forward 3N or 4N, backward 5N or 6N) per
second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasttricks.nn import BatchNormAddReLU2d, BatchNormReLU2d

THREADS, BATCH, ROUNDS = 2, 32, 7
RELU_SHAPES = ((64, 112), (64, 56), (128, 56), (128, 28), (256, 28), (256, 14), (512, 14), (512, 7))
ADD_SHAPES = ((256, 56), (512, 28), (1024, 14), (2048, 7))
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
ratios: dict[str, dict[str, float]] = {"eager": {}, "compiled": {}, "eager, add": {}, "compiled, add": {}}


class Eager(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = super().forward(x)
        return F.relu(y if residual is None else y + residual, inplace=True)


def step(module: Callable[..., torch.Tensor], inputs: list[torch.Tensor], dy: torch.Tensor) -> None:
    y = module(*inputs)
    torch.autograd.grad(y, inputs, dy)


def compare(
    benchmark,
    ours: nn.Module,
    peers: dict[str, nn.Module],
    arguments: int,
    c: int,
    size: int,
    layout: str,
    tensors: int,
) -> dict[str, float]:
    """How many times as long each peer takes; tensors: how many activations the formula of bytes moves."""
    torch.set_num_threads(THREADS)

    def dense() -> torch.Tensor:
        return torch.randn(BATCH, c, size, size).contiguous(memory_format=LAYOUTS[layout])

    inputs = [dense().requires_grad_() for _ in range(arguments)]
    dy = dense()
    for module in (ours, *peers.values()):
        step(module, inputs, dy)
    times: dict[str, list[float]] = {name: [] for name in peers}

    def peers_round() -> tuple[tuple, dict]:
        for name, module in peers.items():
            step(module, inputs, dy)  # not timed: each timed step then finds the caches as its own side left them
            start = time.perf_counter()
            step(module, inputs, dy)
            times[name].append(time.perf_counter() - start)
        step(ours, inputs, dy)
        return (ours, inputs, dy), {}

    benchmark.pedantic(step, setup=peers_round, rounds=ROUNDS, iterations=1)
    best = min(benchmark.stats.stats.data)
    speed = tensors * dy.numel() * dy.element_size() / best / 1e9
    text = (
        f"\n{len(inputs)} x {c}x{size}x{size} {layout}: {best * 1e3:.2f} ms ({speed:.1f} GB/s of the formula's bytes)"
    )
    found = {name: min(seen) / best for name, seen in times.items()}
    for name, ratio in found.items():
        benchmark.extra_info[name] = ratio
        text += f", {name} {min(times[name]) * 1e3:.2f} ms: {ratio:.2f}x"
    print(text)
    return found


def measure(benchmark, c: int, size: int, layout: str, add: bool) -> None:
    torch._dynamo.reset()
    ours = BatchNormAddReLU2d(c) if add else BatchNormReLU2d(c)
    peers = {"eager": Eager(c), "compiled": torch.compile(Eager(c))}
    found = compare(benchmark, ours, peers, 1 + add, c, size, layout, 10 if add else 8)
    for name, ratio in found.items():
        ratios[f"{name}, add" if add else name][f"{c}x{size}x{size} {layout}"] = ratio


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("c", "size"), RELU_SHAPES)
def test_bn_relu(benchmark, c: int, size: int, layout: str) -> None:
    measure(benchmark, c, size, layout, add=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("c", "size"), ADD_SHAPES)
def test_bn_add_relu(benchmark, c: int, size: int, layout: str) -> None:
    measure(benchmark, c, size, layout, add=True)


@pytest.mark.parametrize("peer", ratios)
def test_geometric_mean(benchmark, peer: str) -> None:
    """Records the mean of the ratios above; the time is that of computing it."""
    seen = ratios[peer]
    mean = benchmark(lambda: math.exp(sum(map(math.log, seen.values())) / len(seen)))
    benchmark.extra_info["geometric_mean"] = mean
    print(f"\ngeometric mean over {len(seen)} cases: {mean:.2f}x {peer}")
