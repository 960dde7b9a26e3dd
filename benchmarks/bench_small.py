"""A training step of one residual block, fused and unfused, on small tensors, where the cost of calls dominates.

    pytest benchmarks/bench_small.py --benchmark-only -s

The block is torchvision's BasicBlock in float32, with one thread. Both sides run in turn in one process. Prints the
median over the rounds of fused / unfused: below 1, fusing is faster.
"""

from __future__ import annotations

import copy
import statistics
import time

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

import fasttricks

ROUNDS, STEPS = 60, 20
SHAPES = ((2, 8, 2, 2), (4, 8, 4, 4), (2, 64, 2, 2), (4, 16, 8, 8), (8, 32, 8, 8), (16, 32, 16, 16), (16, 64, 16, 16))


def steps(block: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> float:
    start = time.perf_counter()
    for _ in range(STEPS):
        block(x).backward(dy)
    return time.perf_counter() - start


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block(benchmark, shape: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    plain = BasicBlock(shape[1], shape[1])
    fused = fasttricks.fuse(copy.deepcopy(plain))
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    for block in (plain, fused):
        steps(block, x, dy)
    ratios = []

    def unfused_round() -> tuple[tuple, dict]:
        ratios.append(steps(plain, x, dy))
        return (fused, x, dy), {}

    benchmark.pedantic(steps, setup=unfused_round, rounds=ROUNDS, iterations=1)
    ours = benchmark.stats.stats.data
    ratio = statistics.median(a / b for a, b in zip(ours, ratios, strict=True))
    benchmark.extra_info["ratio"] = ratio
    print(f"\n{'x'.join(map(str, shape))}: {min(ours) / STEPS * 1e6:.0f} us, fused/unfused {ratio:.3f}")
