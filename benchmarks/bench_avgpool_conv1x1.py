"""avgpool_conv1x1 against F.avg_pool2d + F.conv2d: forward and backward at ResNet-50-D's shortcuts, float32, batch 32.

    pytest benchmarks/bench_avgpool_conv1x1.py --benchmark-only -s

Both sides run in turn in one process, so that ratios compare equal conditions. Prints the best round, the ratio, and
GFLOP/s over the three products (2 N H' W' C Cout each).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch

from fasttricks.ops.avgpool_conv1x1 import avgpool_conv1x1
from fasttricks.reference.avgpool_conv1x1 import avgpool_conv1x1 as eager

THREADS, BATCH, ROUNDS = 2, 32, 5
SHAPES = ((256, 512, 56), (512, 1024, 28), (1024, 2048, 14))
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
ratios: dict[str, float] = {}


def step(op: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> None:
    torch.autograd.grad(op(x, weight), (x, weight), dy)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("c", "o", "size"), SHAPES)
def test_forward_backward(benchmark, c: int, o: int, size: int, layout: str) -> None:
    torch.set_num_threads(THREADS)
    x = torch.randn(BATCH, c, size, size).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    weight = torch.randn(o, c, 1, 1).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    dy = torch.randn_like(eager(x, weight))
    step(avgpool_conv1x1, x, weight, dy)
    eager_times: list[float] = []

    def eager_round() -> tuple[tuple, dict]:
        start = time.perf_counter()
        step(eager, x, weight, dy)
        eager_times.append(time.perf_counter() - start)
        return (avgpool_conv1x1, x, weight, dy), {}

    benchmark.pedantic(step, setup=eager_round, rounds=ROUNDS, iterations=1)
    ours, theirs = min(benchmark.stats.stats.data), min(eager_times)
    name = f"{c}->{o} {size}x{size} {layout}"
    ratios[name] = theirs / ours
    gflops = 3 * 2 * BATCH * (size // 2) ** 2 * c * o / ours / 1e9
    benchmark.extra_info |= {"eager_ms": theirs * 1e3, "ratio": theirs / ours, "gflops": gflops}
    print(f"\n{name}: {ours * 1e3:.1f} ms ({gflops:.0f} GFLOP/s), eager {theirs * 1e3:.1f} ms: {theirs / ours:.2f}x")


def test_geometric_mean(benchmark) -> None:
    """Records the mean of the ratios above; the time is that of computing it."""
    mean = benchmark(lambda: math.exp(sum(map(math.log, ratios.values())) / len(ratios)))
    benchmark.extra_info["geometric_mean"] = mean
    print(f"\ngeometric mean over {len(ratios)} cases: {mean:.2f}x eager")
