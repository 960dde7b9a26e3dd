"""Host time per call: ours against eager on tiny tensors, whose kernels take next to no time, with one thread.

    python benchmarks/bench_host.py [--rounds 300]

Ours and the peer run in turn in one process, a few calls each per round. Prints the smallest and the median time per
call over the rounds, and the ratios ours / peer, which should be at most 1.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

import fasttricks
from fasttricks.nn import AvgPoolConv1x1, BatchNormAddReLU2d, BatchNormReLU2d
from fasttricks.optim import FusedSGD, LossScaler

CALLS = 10  # per side and round
Call = Callable[[], object]


class BnRelu(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(channels), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.bn(x))


class BnAddRelu(BnRelu):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.relu(self.bn(x) + residual)


def module_cases() -> Iterator[tuple[str, Call, Call]]:
    pairs = {
        "bn_relu": (BatchNormReLU2d(8), BnRelu(8)),
        "bn_add_relu": (BatchNormAddReLU2d(8), BnAddRelu(8)),
        "avgpool_conv1x1": (AvgPoolConv1x1(8, 8), nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 8, 1, bias=False))),
        "fused block": (fasttricks.fuse(BnRelu(8)), BnRelu(8)),
    }
    for name, (ours, eager) in pairs.items():
        inputs = [torch.randn(2, 8, 2, 2, requires_grad=True) for _ in range(1 + (name == "bn_add_relu"))]

        def train(module: nn.Module, inputs: list[torch.Tensor] = inputs) -> None:
            y = module(*inputs)
            y.backward(y.detach())

        def infer(module: nn.Module, inputs: list[torch.Tensor] = inputs) -> None:
            with torch.no_grad():
                module(*inputs)

        yield f"{name}, forward + backward", lambda m=ours, f=train: f(m), lambda m=eager, f=train: f(m)
        a, b = copy.deepcopy(ours).eval(), copy.deepcopy(eager).eval()
        yield f"{name}, inference", lambda m=a, f=infer: f(m), lambda m=b, f=infer: f(m)


def parameters(count: int = 161) -> list[torch.Tensor]:
    made = [torch.randn(8, requires_grad=True) for _ in range(count)]
    for p in made:
        p.grad = torch.randn(8)
    return made


def optimizer_cases() -> Iterator[tuple[str, Call, Call]]:
    options = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4}
    yield (
        "SGD step, 161 tensors",
        FusedSGD(parameters(), **options).step,
        torch.optim.SGD(parameters(), fused=True, **options).step,
    )
    ours, eager = FusedSGD(parameters(), **options), torch.optim.SGD(parameters(), fused=True, **options)
    scaler, grad_scaler = LossScaler(), torch.amp.GradScaler("cpu")
    one = torch.ones(())  # a scaler takes its device from the first loss
    scaler.scale(one), grad_scaler.scale(one)

    def scaled() -> None:
        scaler.step(ours)
        scaler.update()

    def grad_scaled() -> None:
        grad_scaler.step(eager)
        grad_scaler.update()

    yield "scaled SGD step, 161 tensors", scaled, grad_scaled


def per_call(call: Call) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


def main() -> None:
    parser = argparse.ArgumentParser(description="Host time per call, ours against eager.")
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{'':38}{'ours us':>16}{'peer us':>16}{'ratio':>14}\n{'':38}{'min median':>16}{'min median':>16}")
    for name, ours, peer in (*module_cases(), *optimizer_cases()):
        per_call(ours), per_call(peer)
        times = [(per_call(ours) * 1e6, per_call(peer) * 1e6) for _ in range(rounds)]
        a, b = zip(*times, strict=True)
        low, middle = (min(a), min(b)), (statistics.median(a), statistics.median(b))
        print(
            f"{name:38}{low[0]:8.1f}{middle[0]:8.1f}{low[1]:8.1f}{middle[1]:8.1f}"
            f"{low[0] / low[1]:7.2f}{middle[0] / middle[1]:7.2f}"
        )


if __name__ == "__main__":
    main()
