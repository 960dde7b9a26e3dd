"""One training step of whole networks: fused modules and FusedSGD against eager modules and torch.optim.SGD.

    pytest benchmarks/bench_train_step.py --benchmark-only -s -m "not more"

ResNet-50-D at BATCH and 224 pixels in float32; with this BATCH a step takes some seconds on two cores. Marked `more`:
other networks, smaller images and bfloat16 by autocast, NHWC, and torch.compile, in its default mode and in
max-autotune, of the eager and of the fused network. All sides start from the same weights.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from sides import LAYOUTS, Run, measure
from torch import nn

from fasttricks.models import build
from fasttricks.optim import FusedSGD

BATCH, ROUNDS = 32, 3
SMALL_BATCH, SMALL_IMAGE, SMALL_ROUNDS = 8, 96, 7
NETWORKS = (
    "torchvision/resnet50",
    "resnet50d",
    "mobilenet_v1",
    "torchvision/mobilenet_v2",
    "inception_v3",
    "torchvision/densenet121",
)
# name of a side: whether it is fused, and the mode of torch.compile
SIDES = {
    "eager": (False, None),
    "compiled": (False, "default"),
    "max_autotune": (False, "max-autotune"),
    "fused_compiled": (True, "default"),
}


class Side:
    """A network, its optimizer and one step of both."""

    def __init__(
        self,
        fused: bool,
        layout: torch.memory_format,
        state: dict | None,
        name: str = "resnet50d",
        mode: str | None = None,
        sgd: type[torch.optim.Optimizer] | None = None,
    ) -> None:
        self.model: nn.Module = build(name, 1000, fused=fused)
        if state is not None:
            self.model.load_state_dict(state)
        self.model.to(memory_format=layout)
        if mode is not None:
            self.model.compile(mode=mode)
        kind = sgd or (FusedSGD if fused else torch.optim.SGD)
        self.optimizer = kind(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)

    def step(self, images: torch.Tensor, labels: torch.Tensor, half: torch.dtype | None = None) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.forward(images, half), labels).backward()
        self.optimizer.step()

    def forward(self, images: torch.Tensor, half: torch.dtype | None) -> torch.Tensor:
        with contextlib.nullcontext() if half is None else torch.autocast(images.device.type, half):
            return self.model(images).float()

    def run(self, images: torch.Tensor, labels: torch.Tensor, half: torch.dtype | None = None) -> Run:
        parameters = tuple(self.model.parameters())
        return Run(lambda: self.step(images, labels, half), lambda: self.forward(images, half), parameters)


def batch_of(count: int, pixels: int, layout: torch.memory_format) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(count, 3, pixels, pixels).contiguous(memory_format=layout)
    return images, torch.randint(0, 1000, (count,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_step(benchmark, layout: str) -> None:
    batch = batch_of(BATCH, 224, LAYOUTS[layout])
    eager = Side(False, LAYOUTS[layout], None)
    fused = Side(True, LAYOUTS[layout], eager.model.state_dict())
    measure(benchmark, fused.run(*batch), {"eager": eager.run(*batch)}, ROUNDS, warm=False)


@pytest.mark.more
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_network(benchmark, name: str, dtype: str) -> None:
    torch._dynamo.reset()
    layout, half = torch.channels_last, None if dtype == "float32" else torch.bfloat16
    batch = batch_of(SMALL_BATCH, SMALL_IMAGE, layout)
    ours = Side(True, layout, None, name)
    state = ours.model.state_dict()
    peers = {side: Side(fused, layout, state, name, mode) for side, (fused, mode) in SIDES.items()}
    runs = {side: peer.run(*batch, half) for side, peer in peers.items()}
    measure(benchmark, ours.run(*batch, half), runs, SMALL_ROUNDS, warm=False)
