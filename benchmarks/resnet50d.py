"""ResNet-50-D's layers around its convolutions, and what eager torch moves for them under autocast in float16.

N: the bytes of an activation. Each kernel of eager torch reads its inputs and writes its outputs; BatchNorm, cuDNN's or
torch's own, reads x twice, and in the backward pass dy as well.

    layer          forward                                    backward
    bn_relu        BatchNorm 3 N, ReLU 2 N                    ReLU 3 N (dy, y, dz), BatchNorm 5 N
    bn_add_relu    BatchNorm 3 N, addition 3 N, ReLU 2 N      ReLU 3 N, BatchNorm 5 N
    bn             BatchNorm 3 N, of a shortcut               BatchNorm 5 N
    pool           N + N/4, before a shortcut's convolution   N/4 + N
    fork                                                      3 N: autograd adds the two gradients of a block's input

Launches: one a kernel, and one for num_batches_tracked. Max pool, head and loss are left out: no op of ours is in them.

The optimizer: GradScaler and torch.optim.SGD on float32 parameters, in torch's default for CUDA (foreach). Bytes per
value: unscale and check 4 + 4, weight decay 4 + 4 + 4, momentum 4 + 4 and 4 + 4 + 4, parameter 4 + 4 + 4.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn

from fasttricks.models import Bottleneck, resnet50

ELEMENT = 2  # bytes


@dataclass(frozen=True)
class Layer:
    """shape: (N, C, H, W) of its input. Of a bn_add_relu, whether its residual has a BatchNorm of its own (projection),
    whether its output goes into a block (forked), and whether that block pools it (pooled)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    projection: bool = False
    forked: bool = False
    pooled: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return ELEMENT * self.elements


@dataclass(frozen=True)
class Cost:
    bytes: float = 0.0
    launches: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.launches + other.launches)


def parameter_sizes() -> list[int]:
    with torch.device("meta"):
        return [p.numel() for p in resnet50("d").parameters()]


def layers(batch: int, image: int = 224) -> list[Layer]:
    """In the order of the forward pass."""
    with torch.device("meta"):
        model = resnet50("d", fused=False)
        images = torch.empty(batch, 3, image, image)
    names = {module: name for name, module in model.named_modules()}
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        shapes[module] = tuple(inputs[0].shape)

    for module in names:
        module.register_forward_pre_hook(note)
    model(images)

    blocks = [module for module in names if isinstance(module, Bottleneck)]
    following = dict(itertools.pairwise(blocks))
    adding = {block.bn3: block for block in blocks}
    projections = {block.downsample[2] for block in blocks if block.downsample is not None}

    def layer(module: nn.Module, kind: str, **what: bool) -> Layer:
        return Layer(names[module], kind, shapes[module], **what)

    found = []
    for module in shapes:
        if isinstance(module, Bottleneck):
            found.append(layer(module, "fork"))
        elif isinstance(module, nn.AvgPool2d):
            found.append(layer(module, "pool"))
        elif module in adding:
            after = following.get(adding[module])
            pooled = after is not None and after.downsample is not None
            projection = adding[module].downsample is not None
            found.append(layer(module, "bn_add_relu", projection=projection, forked=after is not None, pooled=pooled))
        elif isinstance(module, nn.BatchNorm2d):
            found.append(layer(module, "bn" if module in projections else "bn_relu"))
    return found


def eager(layer: Layer) -> tuple[Cost, Cost]:
    """Forward and backward."""
    n = layer.bytes
    costs = {
        "bn_relu": (Cost(5 * n, 3), Cost(8 * n, 2)),
        "bn_add_relu": (Cost(8 * n, 4), Cost(8 * n, 2)),
        "bn": (Cost(3 * n, 2), Cost(5 * n, 1)),
        "pool": (Cost(1.25 * n, 1), Cost(1.25 * n, 1)),
        "fork": (Cost(), Cost(3 * n, 1)),
    }
    return costs[layer.kind]


def eager_optimizer(sizes: list[int]) -> Cost:
    """Launches: one for as many tensors, and as many chunks of 65536 values, as the parameters of a kernel hold
    (depth_to_max_tensors and depth_to_max_blocks of ATen/native/cuda/MultiTensorApply.cuh, by the number of lists)."""
    chunks = sum(math.ceil(size / 65536) for size in sizes)

    def launches(lists: int) -> int:
        tensors = {1: 110, 2: 64, 3: 48}[lists]
        return max(math.ceil(len(sizes) / tensors), math.ceil(chunks / 320))

    kernels = {"unscale": (8, 1), "decay": (12, 3), "momentum *": (8, 1), "momentum +": (12, 2), "parameter": (12, 2)}
    return Cost(
        sum(each for each, _ in kernels.values()) * sum(sizes), sum(launches(lists) for _, lists in kernels.values())
    )
