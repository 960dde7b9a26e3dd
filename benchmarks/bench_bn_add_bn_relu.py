"""bn_add_bn_relu against eager relu(bn(x) + bn(r)), torch.compile of it, and bn_add_relu after a BatchNorm: float32.

    pytest benchmarks/bench_bn_add_bn_relu.py --benchmark-only -s

The shapes are those of ResNet-50's four blocks with a projection, at batch 32. Bytes of the formula: 13 N.
Operations per element: those of two BatchNorms, with one mask of 3 and an addition.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bench_bn_relu import BATCH, FLOPS, ROUNDS, draw, formula
from shapes import RESNET50_ENDS
from sides import LAYOUTS, compare
from torch import nn

from fasttricks.nn import BatchNormAddReLU2d


class Ours(nn.Module):
    """Both BatchNorms in one op; apart: the one of the shortcut by torch."""

    def __init__(self, channels: int, apart: bool = False) -> None:
        super().__init__()
        self.bn, self.shortcut_bn, self.apart = BatchNormAddReLU2d(channels), nn.BatchNorm2d(channels), apart

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if self.apart:
            return self.bn(x, self.shortcut_bn(residual))
        return self.bn(x, residual, self.shortcut_bn)


class Eager(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn, self.shortcut_bn = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y = self.bn(x)
        y += self.shortcut_bn(residual)
        return F.relu(y, inplace=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("c", "size"), RESNET50_ENDS)
def test_bn_add_bn_relu(benchmark, c: int, size: int, layout: str) -> None:
    torch._dynamo.reset()
    peers = {"eager": Eager(c), "compiled": torch.compile(Eager(c)), "apart": Ours(c, apart=True)}
    moved, flops = formula(13, c, size), (2 * FLOPS - 3 + 1) * BATCH * c * size * size
    compare(benchmark, Ours(c), peers, lambda: draw(2, c, size, layout), ROUNDS, moved, flops)
