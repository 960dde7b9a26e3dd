"""A training step of one residual block, fused and unfused, on small tensors, where the cost of calls dominates.

    pytest benchmarks/bench_small.py --benchmark-only -s

The block is torchvision's BasicBlock in float32, with one thread, and a call is STEPS steps of it. Above 1, fusing is
faster; where it is not, fuse's default of min_elements lets the modules run.
"""

from __future__ import annotations

import copy

import pytest
import torch
from sides import Run, measure
from torch import nn
from torchvision.models.resnet import BasicBlock

import fasttricks

ROUNDS, STEPS = 60, 20
SHAPES = ((2, 8, 2, 2), (4, 8, 4, 4), (2, 64, 2, 2), (4, 16, 8, 8), (8, 32, 8, 8), (16, 32, 16, 16), (16, 64, 16, 16))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block(benchmark, shape: tuple[int, ...]) -> None:
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)

    def run(block: nn.Module) -> Run:
        def steps() -> None:
            for _ in range(STEPS):
                block(x).backward(dy)

        return Run(steps)

    plain = BasicBlock(shape[1], shape[1])
    fused = fasttricks.fuse(copy.deepcopy(plain), min_elements=0)
    measure(benchmark, run(fused), {"unfused": run(plain)}, ROUNDS, threads=1)
