"""A stage's last block that hands the means of its output on, against bn_add_relu and avgpool_conv1x1 apart.

    pytest benchmarks/bench_bn_add_relu_pool.py --benchmark-only -s

What `fasttricks.backends.MEANS_HANDED_ON` rests on: forward and backward at the stage changes of ResNet-50-D, where the
next block's first convolution reads the output as well. The ratio to `apart` is above 1 where handing on is faster.
"""

from __future__ import annotations

import pytest
import torch
from shapes import SHORTCUTS
from sides import LAYOUTS, Run, measure

from fasttricks.backends import MEANS_HANDED_ON
from fasttricks.nn import AvgPoolConv1x1, BatchNormAddReLU2d

BATCH, ROUNDS = 8, 5


class StageChange:
    def __init__(self, c: int, o: int, size: int, layout: str, dtype: torch.dtype) -> None:
        def tensor(n: int, pixels: int) -> torch.Tensor:
            return torch.randn(BATCH, n, pixels, pixels).to(dtype).contiguous(memory_format=LAYOUTS[layout])

        self.bn, self.shortcut = BatchNormAddReLU2d(c), AvgPoolConv1x1(c, o, ceil_mode=True, dtype=dtype)
        self.bn.ceil_mode_of_reader = True
        self.x, self.residual = (tensor(c, size).requires_grad_() for _ in range(2))
        self.gradients = [tensor(c, size), tensor(o, size // 2)]

    def step(self) -> None:
        for t in (self.x, self.residual, *self.bn.parameters(), *self.shortcut.parameters()):
            t.grad = None
        y = self.bn(self.x, self.residual)
        torch.autograd.backward([y, self.shortcut(y)], self.gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("c", "o", "size"), SHORTCUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_stage_change(
    benchmark, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, c: int, o: int, size: int, layout: str
) -> None:
    change = StageChange(c, o, size, layout, dtype)

    def run(*handed_on: torch.dtype) -> Run:
        def step() -> None:
            monkeypatch.setitem(MEANS_HANDED_ON, "cpu", handed_on)
            change.step()

        return Run(step)

    measure(benchmark, run(dtype), {"apart": run()}, ROUNDS)
