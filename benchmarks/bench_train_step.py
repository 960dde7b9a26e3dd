"""One training step of ResNet-50-D: fused modules and FusedSGD against eager modules and torch.optim.SGD, float32.

    pytest benchmarks/bench_train_step.py --benchmark-only -s

Both networks start from the same weights and run in turn in one process. Prints the best round and the ratio. With
this BATCH a step takes some seconds on two cores.
"""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from sides import LAYOUTS, THREADS
from torch import nn

from fasttricks.models import build
from fasttricks.optim import FusedSGD

BATCH, ROUNDS = 32, 3


class Side:
    """A network, its optimizer and one step of both."""

    def __init__(self, fused: bool, layout: torch.memory_format, state: dict | None) -> None:
        self.model: nn.Module = build("resnet50d", 1000, fused=fused)
        if state is not None:
            self.model.load_state_dict(state)
        self.model.to(memory_format=layout)
        kind = FusedSGD if fused else torch.optim.SGD
        self.optimizer = kind(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_step(benchmark, layout: str) -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    images = torch.randn(BATCH, 3, 224, 224).contiguous(memory_format=LAYOUTS[layout])
    labels = torch.randint(0, 1000, (BATCH,))
    eager = Side(False, LAYOUTS[layout], None)
    fused = Side(True, LAYOUTS[layout], eager.model.state_dict())
    eager_times: list[float] = []

    def eager_round() -> tuple[tuple, dict]:
        start = time.perf_counter()
        eager.step(images, labels)
        eager_times.append(time.perf_counter() - start)
        return (images, labels), {}

    benchmark.pedantic(fused.step, setup=eager_round, rounds=ROUNDS, warmup_rounds=1, iterations=1)
    ours, theirs = min(benchmark.stats.stats.data), min(eager_times[1:])
    benchmark.extra_info |= {"eager_s": theirs, "ratio": theirs / ours}
    print(f"\nResNet-50-D, batch {BATCH}, {layout}: {ours:.2f} s, eager {theirs:.2f} s: {theirs / ours:.2f}x")
