"""How the time of each op grows: with batch, channels, height = width and threads; with the number of parameters.

    pytest benchmarks/bench_scaling.py --benchmark-only -s

Forward and backward in float32 and NCHW, and FusedSGD.step on float32 parameters in 100 tensors. One of these varies,
the others are those of BASE. Eager torch is measured in the same rounds.
"""

from __future__ import annotations

import os

import pytest
import torch
from bench_bn_relu import Eager, draw
from sides import THREADS, Inputs, Run, cold, compare, measure

from fasttricks.nn import BatchNormAddReLU2d, BatchNormReLU2d
from fasttricks.ops.avgpool_conv1x1 import avgpool_conv1x1
from fasttricks.optim import FusedSGD
from fasttricks.reference.avgpool_conv1x1 import avgpool_conv1x1 as eager_avgpool_conv1x1

ROUNDS, TENSORS = 5, 100
BASE = {"batch": 16, "channels": 128, "size": 28, "parameters": 10**7, "threads": THREADS}
THREAD_COUNTS = tuple(2**k for k in range((2 * (os.cpu_count() or 1)).bit_length()))  # up to twice the cores
AXES = {
    "batch": (1, 4, 16, 64),
    "channels": (16, 64, 256, 1024),
    "size": (7, 14, 28, 56, 112),
    "threads": THREAD_COUNTS,
}
SGD_AXES = {"parameters": (10**4, 10**5, 10**6, 10**7), "threads": THREAD_COUNTS}
CASES = [
    (op, axis, value)
    for op, axes in {
        **dict.fromkeys(("bn_relu", "bn_add_relu", "avgpool_conv1x1"), AXES),
        "FusedSGD.step": SGD_AXES,
    }.items()
    for axis, values in axes.items()
    for value in values
]


def compare_bn(benchmark, add: bool, at: dict[str, int]) -> None:
    c = at["channels"]
    ours = BatchNormAddReLU2d(c) if add else BatchNormReLU2d(c)

    def inputs() -> Inputs:
        return draw(1 + add, c, at["size"], "NCHW", at["batch"])

    compare(benchmark, ours, {"eager": Eager(c)}, inputs, ROUNDS, threads=at["threads"])


def compare_avgpool_conv1x1(benchmark, at: dict[str, int]) -> None:
    """To twice as many channels, as in the shortcuts of ResNets."""
    batch, c, size = at["batch"], at["channels"], at["size"]

    def inputs() -> Inputs:
        x, weight = torch.randn(batch, c, size, size, requires_grad=True), torch.randn(2 * c, c, 1, 1)
        return [x, weight.requires_grad_()], torch.randn(batch, 2 * c, size // 2, size // 2)

    peers = {"eager": eager_avgpool_conv1x1}
    compare(benchmark, avgpool_conv1x1, peers, inputs, ROUNDS, threads=at["threads"])


def compare_sgd(benchmark, at: dict[str, int]) -> None:
    """Every step is that of the next optimizer; parameters, gradients and momentum: 12 bytes per value."""

    def run(kind: type[torch.optim.Optimizer]) -> Run:
        def optimizer() -> torch.optim.Optimizer:
            made = [torch.randn(at["parameters"] // TENSORS, requires_grad=True) for _ in range(TENSORS)]
            for p in made:
                p.grad = torch.randn_like(p)
            optimizer = kind(made, lr=1e-4, momentum=0.9, weight_decay=1e-4)  # type: ignore[call-arg]
            optimizer.step()
            return optimizer

        next_one = cold(optimizer, 12 * at["parameters"])
        return Run(lambda: next_one().step())

    measure(benchmark, run(FusedSGD), {"eager": run(torch.optim.SGD)}, ROUNDS, threads=at["threads"])


@pytest.mark.more
@pytest.mark.parametrize(("op", "axis", "value"), CASES)
def test_scaling(benchmark, op: str, axis: str, value: int) -> None:
    at = {**BASE, axis: value}
    if op == "FusedSGD.step":
        compare_sgd(benchmark, at)
    elif op == "avgpool_conv1x1":
        compare_avgpool_conv1x1(benchmark, at)
    else:
        compare_bn(benchmark, op == "bn_add_relu", at)
