"""Inception-V3 (Szegedy et al. 2015, arXiv:1512.00567, table 1 and section 6) with its auxiliary head.

The keys of the state_dict are torchvision's, the same for ``fused=True`` and ``fused=False``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import ConvBNReLU, Pair, check_sizes
from .init import xavier_

EPS = 1e-3  # of every BatchNorm


class _Step(NamedTuple):
    """A convolution: its name, its channels at the full width, its kernel and its stride. Stride 2 has no padding."""

    name: str
    channels: int
    kernel: Pair
    stride: int = 1


# The convolutions of a module: branches of steps in sequence; a tuple of steps is side by side.
_Branches = tuple[tuple[_Step | tuple[_Step, _Step], ...], ...]


_GRID35: _Branches = (
    (_Step("branch1x1", 64, 1),),
    (_Step("branch5x5_1", 48, 1), _Step("branch5x5_2", 64, 5)),
    (_Step("branch3x3dbl_1", 64, 1), _Step("branch3x3dbl_2", 96, 3), _Step("branch3x3dbl_3", 96, 3)),
)

_TO_GRID17: _Branches = (
    (_Step("branch3x3", 384, 3, 2),),
    (_Step("branch3x3dbl_1", 64, 1), _Step("branch3x3dbl_2", 96, 3), _Step("branch3x3dbl_3", 96, 3, 2)),
)


def _grid17(c: int) -> _Branches:
    return (
        (_Step("branch1x1", 192, 1),),
        (_Step("branch7x7_1", c, 1), _Step("branch7x7_2", c, (1, 7)), _Step("branch7x7_3", 192, (7, 1))),
        (
            _Step("branch7x7dbl_1", c, 1),
            _Step("branch7x7dbl_2", c, (7, 1)),
            _Step("branch7x7dbl_3", c, (1, 7)),
            _Step("branch7x7dbl_4", c, (7, 1)),
            _Step("branch7x7dbl_5", 192, (1, 7)),
        ),
    )


_TO_GRID8: _Branches = (
    (_Step("branch3x3_1", 192, 1), _Step("branch3x3_2", 320, 3, 2)),
    (
        _Step("branch7x7x3_1", 192, 1),
        _Step("branch7x7x3_2", 192, (1, 7)),
        _Step("branch7x7x3_3", 192, (7, 1)),
        _Step("branch7x7x3_4", 192, 3, 2),
    ),
)

_GRID8: _Branches = (
    (_Step("branch1x1", 320, 1),),
    (_Step("branch3x3_1", 384, 1), (_Step("branch3x3_2a", 384, (1, 3)), _Step("branch3x3_2b", 384, (3, 1)))),
    (
        _Step("branch3x3dbl_1", 448, 1),
        _Step("branch3x3dbl_2", 384, 3),
        (_Step("branch3x3dbl_3a", 384, (1, 3)), _Step("branch3x3dbl_3b", 384, (3, 1))),
    ),
)

# Name, branches, and the channels of the 1x1 convolution after the average pool; 0: a max pool that halves the size.
_MODULES: tuple[tuple[str, _Branches, int], ...] = (
    ("Mixed_5b", _GRID35, 32),
    ("Mixed_5c", _GRID35, 64),
    ("Mixed_5d", _GRID35, 64),
    ("Mixed_6a", _TO_GRID17, 0),
    ("Mixed_6b", _grid17(128), 192),
    ("Mixed_6c", _grid17(160), 192),
    ("Mixed_6d", _grid17(160), 192),
    ("Mixed_6e", _grid17(192), 192),
    ("Mixed_7a", _TO_GRID8, 0),
    ("Mixed_7b", _GRID8, 192),
    ("Mixed_7c", _GRID8, 192),
)

_STEM: tuple[tuple[str, int, int, int, int], ...] = (  # name, channels, kernel, stride, padding
    ("Conv2d_1a_3x3", 32, 3, 2, 0),
    ("Conv2d_2a_3x3", 32, 3, 1, 0),
    ("Conv2d_2b_3x3", 64, 3, 1, 1),
    ("maxpool1", 0, 3, 2, 0),
    ("Conv2d_3b_1x1", 80, 1, 1, 0),
    ("Conv2d_4a_3x3", 192, 3, 1, 0),
    ("maxpool2", 0, 3, 2, 0),
)


_ORDER = [name for name, *_ in _STEM] + [name for name, *_ in _MODULES]


class _Mixed(nn.Module):
    """Branches of convolutions and one with a pool, side by side: their outputs are concatenated."""

    def __init__(self, in_channels: int, branches: _Branches, pool_channels: int, width: int, fused: bool):
        super().__init__()
        self.names: list[list[list[str]]] = []
        self.channels = 0
        for branch in branches:
            inputs, names = in_channels, []
            for steps in branch:
                side_by_side = (steps,) if isinstance(steps, _Step) else steps
                outputs = 0
                for step in side_by_side:
                    channels = step.channels * width // 32
                    padding = None if step.stride == 1 else 0
                    conv = ConvBNReLU(
                        inputs, channels, step.kernel, stride=step.stride, padding=padding, eps=EPS, fused=fused
                    )
                    self.add_module(step.name, conv)
                    outputs += channels
                names.append([step.name for step in side_by_side])
                inputs = outputs
            self.names.append(names)
            self.channels += inputs
        self.pool: Literal["avg", "max"] = "avg" if pool_channels else "max"
        if pool_channels:
            channels = pool_channels * width // 32
            self.branch_pool = ConvBNReLU(in_channels, channels, 1, eps=EPS, fused=fused)
            self.channels += channels
        else:
            self.channels += in_channels

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self.names:
            y = x
            for names in branch:
                parts = [self.get_submodule(name)(y) for name in names]
                y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            outputs.append(y)
        if self.pool == "avg":
            outputs.append(self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1)))
        else:
            outputs.append(F.max_pool2d(x, 3, stride=2))
        return torch.cat(outputs, 1)


class _AuxiliaryHead(nn.Module):
    """A classifier on the 17x17 grid, for training."""

    def __init__(self, in_channels: int, num_classes: int, width: int, fused: bool):
        super().__init__()
        self.conv0 = ConvBNReLU(in_channels, 128 * width // 32, 1, eps=EPS, fused=fused)
        self.conv1 = ConvBNReLU(128 * width // 32, 768 * width // 32, 5, padding=0, eps=EPS, fused=fused)
        self.fc = nn.Linear(768 * width // 32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 5, stride=3)
        if min(x.shape[-2:]) < 5:
            raise ValueError(
                "the auxiliary head of inception_v3 needs images of at least 299x299 pixels; "
                "build the model with aux_logits=False for smaller ones"
            )
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.conv1(self.conv0(x)), 1), 1))


class InceptionV3(nn.Module):
    """Inception-V3, with BatchNorm and ReLU after every convolution.

    Args:
        num_classes: outputs of the last linear layer.
        width: channels of the first convolution (32 in the paper); those of the other layers are in proportion. Even.
        in_channels: channels of the images.
        fused: build from ``fasttricks.nn`` modules (True) or from eager ``torch.nn`` modules (False).
        aux_logits: with the auxiliary head, for images of at least 299x299 pixels.

    forward: images (N, in_channels, H, W), at least 75x75 -> logits (N, num_classes); in training with ``aux_logits``
    the tuple (logits, auxiliary logits). Weights start as in He et al. 2018.

    Raises:
        ValueError: an argument outside what is listed above.

    Examples:
        >>> model = fasttricks.models.InceptionV3(num_classes=10, width=2)
        >>> model(torch.randn(2, 3, 96, 96)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        width: int = 32,
        in_channels: int = 3,
        fused: bool = True,
        aux_logits: bool = False,
    ):
        super().__init__()
        check_sizes(width, num_classes, in_channels)
        self.width, self.fused, self.aux_logits = width, fused, aux_logits
        channels = in_channels
        for name, full, kernel, stride, padding in _STEM:
            if full == 0:
                self.add_module(name, nn.MaxPool2d(kernel, stride=stride))
                continue
            outputs = full * width // 32
            conv = ConvBNReLU(channels, outputs, kernel, stride=stride, padding=padding, eps=EPS, fused=fused)
            self.add_module(name, conv)
            channels = outputs
        for name, branches, pool_channels in _MODULES:
            mixed = _Mixed(channels, branches, pool_channels, width, fused)
            self.add_module(name, mixed)
            channels = mixed.channels
            if name == "Mixed_6e":
                self.AuxLogits = _AuxiliaryHead(channels, num_classes, width, fused) if aux_logits else None
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(channels, num_classes)
        xavier_(self)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        auxiliary = None
        for name in _ORDER:
            x = self.get_submodule(name)(x)
            if name == "Mixed_6e" and self.AuxLogits is not None and self.training:
                auxiliary = self.AuxLogits(x)
        logits = self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))
        return logits if auxiliary is None else (logits, auxiliary)
