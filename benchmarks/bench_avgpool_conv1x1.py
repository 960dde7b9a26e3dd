"""avgpool_conv1x1 against F.avg_pool2d + F.conv2d: forward and backward at ResNet-50-D's shortcuts, float32, batch 32.

    pytest benchmarks/bench_avgpool_conv1x1.py --benchmark-only -s

FLOP of the three products: 2 N H' W' C Cout each. Bytes: x, y and weight, or their gradients, once in each product.
"""

from __future__ import annotations

import math

import pytest
import torch
from shapes import SHORTCUTS
from sides import LAYOUTS, Inputs, compare

from fasttricks.ops.avgpool_conv1x1 import avgpool_conv1x1
from fasttricks.reference.avgpool_conv1x1 import avgpool_conv1x1 as eager

BATCH, ROUNDS = 32, 5
ratios: dict[str, float] = {}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("c", "o", "size"), SHORTCUTS)
def test_forward_backward(benchmark, c: int, o: int, size: int, layout: str) -> None:
    def draw() -> Inputs:
        x, weight = torch.randn(BATCH, c, size, size), torch.randn(o, c, 1, 1)
        inputs = [t.contiguous(memory_format=LAYOUTS[layout]).requires_grad_() for t in (x, weight)]
        return inputs, torch.randn_like(eager(*inputs))

    pixels = BATCH * (size // 2) ** 2
    moved, flops = 3 * 4 * (4 * pixels * c + pixels * o + c * o), 3 * 2 * pixels * c * o
    found = compare(benchmark, avgpool_conv1x1, {"eager": eager}, draw, ROUNDS, moved, flops)
    ratios[f"{c}->{o} {size}x{size} {layout}"] = found["eager"]


def test_geometric_mean(benchmark) -> None:
    """Records the mean of the ratios above; the time is that of computing it."""
    mean = benchmark(lambda: math.exp(sum(map(math.log, ratios.values())) / len(ratios)))
    benchmark.extra_info["geometric_mean"] = mean
    print(f"\ngeometric mean over {len(ratios)} cases: {mean:.2f}x eager")
