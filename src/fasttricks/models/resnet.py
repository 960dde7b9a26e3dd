"""ResNet-18/34/50/101/152 in the variants A, B, C and D of He et al. 2018 ("Bag of Tricks for Image Classification
with Convolutional Neural Networks", arXiv:1812.01187, section 4), built from fused or from eager modules.

    A   the original residual network: a bottleneck halves the resolution in its first 1x1 convolution
    B   ... in its 3x3 convolution, so that the 1x1 does not ignore three quarters of its input
    C   B, and the 7x7 stem becomes three 3x3 convolutions (32, 32 and 64 channels, the first with stride 2)
    D   C, and the shortcut of a halving block averages 2x2 windows before a 1x1 convolution of stride 1

Basic blocks (depth 18 and 34) halve in their first 3x3 convolution, so A and B are one network there.

The keys of the state_dict are torchvision's for A and B and timm's (resnet50d and its kin) for C and D, the same for
``fused=True`` and ``fused=False``: weights move freely between all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product
from typing import Literal

import torch
from torch import Tensor, nn

from ..nn import AvgPoolConv1x1, BatchNormAddReLU2d, BatchNormReLU2d
from ..nn.run import untouched
from .blocks import check_sizes
from .init import xavier_

Variant = Literal["a", "b", "c", "d"]

# Blocks per stage, and whether they are bottlenecks (He et al. 2016, arXiv:1512.03385, table 1).
STAGES: dict[int, tuple[tuple[int, int, int, int], bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}


def _bn_relu(channels: int, fused: bool) -> nn.Module:
    return BatchNormReLU2d(channels) if fused else nn.BatchNorm2d(channels)


def _bn_add_relu(channels: int, fused: bool) -> nn.Module:
    return BatchNormAddReLU2d(channels) if fused else nn.BatchNorm2d(channels)


def _relu(fused: bool) -> nn.Module:
    """The module after a normalisation: the identity if the normalisation includes the ReLU."""
    return nn.Identity() if fused else nn.ReLU(inplace=True)


def _add_shortcut(bn: nn.Module, out: Tensor, shortcut: nn.Module | None, x: Tensor) -> Tensor:
    """relu(bn(out) + shortcut(x)); the BatchNorm at the end of a projection is part of the same op."""
    if shortcut is None:
        return bn(out, x)
    if not isinstance(shortcut, nn.Sequential) or not untouched(shortcut):
        return bn(out, shortcut(x))
    *projection, shortcut_bn = shortcut
    for module in projection:
        x = module(x)
    return bn(out, x, shortcut_bn)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut:
    x (N, in_channels, H, W) -> (N, channels, ceil(H/stride), ceil(W/stride)).

    Examples:
        >>> block = fasttricks.models.BasicBlock(8, 8, stride=1, shortcut=None, variant="d", fused=True)
        >>> block(torch.randn(2, 8, 6, 6)).shape
        torch.Size([2, 8, 6, 6])
    """

    expansion = 1

    def __init__(
        self, in_channels: int, channels: int, stride: int, shortcut: nn.Module | None, variant: Variant, fused: bool
    ):
        super().__init__()
        self.fused = fused
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = _bn_relu(channels, fused)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = _bn_add_relu(channels, fused)
        self.relu = _relu(fused)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.conv2(out)
        if self.fused:
            return _add_shortcut(self.bn2, out, self.downsample, x)
        out = self.bn2(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut:
    x (N, in_channels, H, W) -> (N, 4 channels, ceil(H/stride), ceil(W/stride)).

    Examples:
        >>> block = fasttricks.models.Bottleneck(32, 8, stride=1, shortcut=None, variant="d", fused=True)
        >>> block(torch.randn(2, 32, 6, 6)).shape
        torch.Size([2, 32, 6, 6])
    """

    expansion = 4

    def __init__(
        self, in_channels: int, channels: int, stride: int, shortcut: nn.Module | None, variant: Variant, fused: bool
    ):
        super().__init__()
        self.fused = fused
        stride1, stride2 = (stride, 1) if variant == "a" else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, stride=stride1, bias=False)
        self.bn1 = _bn_relu(channels, fused)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride2, padding=1, bias=False)
        self.bn2 = _bn_relu(channels, fused)
        self.conv3 = nn.Conv2d(channels, channels * self.expansion, 1, bias=False)
        self.bn3 = _bn_add_relu(channels * self.expansion, fused)
        self.relu = _relu(fused)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.conv3(out)
        if self.fused:
            return _add_shortcut(self.bn3, out, self.downsample, x)
        out = self.bn3(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def _shortcut(in_channels: int, out_channels: int, stride: int, variant: Variant, fused: bool) -> nn.Module:
    """The projection of a block whose input and output differ in shape."""
    if variant != "d":
        conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(out_channels))
    # ceil_mode keeps odd sizes in step with the padded 3x3 convolution of the main branch: ceil(H/2).
    if fused and stride == 2:
        shortcut = AvgPoolConv1x1(in_channels, out_channels, stride=2, bias=False, ceil_mode=True)
        return nn.Sequential(nn.Identity(), shortcut, nn.BatchNorm2d(out_channels))
    pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
    return nn.Sequential(pool, nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))


def _pool_ahead(block: nn.Module, following: nn.Module) -> None:
    """Lets block average its output where the shortcut of the block that follows pools it."""
    for bn, shortcut in product(block.modules(), following.modules()):
        if isinstance(bn, BatchNormAddReLU2d) and isinstance(shortcut, AvgPoolConv1x1):
            bn.ceil_mode_of_reader = shortcut.ceil_mode


class ResNet(nn.Module):
    """A residual network of He et al. 2018.

    Args:
        depth: 18, 34, 50, 101 or 152.
        variant: "a", "b", "c" or "d", see the head of this file.
        num_classes: outputs of the last linear layer.
        width: channels of the stem and of the first stage (64 in the paper); the later stages have 2, 4 and 8 times as
            many, and bottlenecks put out 4 times that. Even, as the deep stem of C and D starts with half of it.
        in_channels: channels of the images.
        fused: build from ``fasttricks.nn`` modules (True) or from eager ``torch.nn`` modules (False).

    forward: images (N, in_channels, H, W), floating -> logits (N, num_classes). Weights start as in section 2.1 of the
    paper: Xavier-uniform convolutions and linear layer, zero bias, gamma 1 and beta 0.

    Raises:
        ValueError: an argument outside what is listed above.

    Examples:
        >>> model = fasttricks.models.ResNet(50, "d", num_classes=10, width=8)
        >>> model(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int,
        variant: Variant = "d",
        *,
        num_classes: int = 1000,
        width: int = 64,
        in_channels: int = 3,
        fused: bool = True,
    ):
        super().__init__()
        if depth not in STAGES:
            raise ValueError(f"depth must be one of {sorted(STAGES)}, got {depth!r}")
        if variant not in ("a", "b", "c", "d"):
            raise ValueError(f"variant must be 'a', 'b', 'c' or 'd', got {variant!r}")
        check_sizes(width, num_classes, in_channels)
        blocks = STAGES[depth][0]
        self.depth, self.variant, self.width, self.fused = depth, variant, width, fused

        if variant in ("c", "d"):
            half = width // 2
            self.conv1: nn.Module = nn.Sequential(
                nn.Conv2d(in_channels, half, 3, stride=2, padding=1, bias=False),
                _bn_relu(half, fused),
                _relu(fused),
                nn.Conv2d(half, half, 3, padding=1, bias=False),
                _bn_relu(half, fused),
                _relu(fused),
                nn.Conv2d(half, width, 3, padding=1, bias=False),
            )
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = _bn_relu(width, fused)
        self.relu = _relu(fused)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        self.layer1, channels_in = self._stage(width, width, blocks[0], 1)
        self.layer2, channels_in = self._stage(channels_in, 2 * width, blocks[1], 2)
        self.layer3, channels_in = self._stage(channels_in, 4 * width, blocks[2], 2)
        self.layer4, channels_in = self._stage(channels_in, 8 * width, blocks[3], 2)
        for stage, following in pairwise((self.layer1, self.layer2, self.layer3, self.layer4)):
            _pool_ahead(stage[-1], following[0])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels_in, num_classes)
        self.reset_parameters()

    def _stage(self, channels_in: int, channels: int, blocks: int, stride: int) -> tuple[nn.Sequential, int]:
        """``blocks`` blocks, the first with ``stride`` and the projection it needs; and their output channels."""
        block = Bottleneck if STAGES[self.depth][1] else BasicBlock
        channels_out, layers = channels * block.expansion, []
        for i in range(blocks):
            step = stride if i == 0 else 1
            shortcut = None
            if step != 1 or channels_in != channels_out:
                shortcut = _shortcut(channels_in, channels_out, step, self.variant, self.fused)
            layers.append(block(channels_in, channels, step, shortcut, self.variant, self.fused))
            channels_in = channels_out
        return nn.Sequential(*layers), channels_out

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases, gamma 1 and beta 0 (section 2.1 of the paper)."""
        xavier_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _constructor(depth: int) -> Callable[..., ResNet]:
    def resnet(variant: Variant = "d", **kwargs: object) -> ResNet:
        return ResNet(depth, variant, **kwargs)  # type: ignore[arg-type]

    resnet.__name__ = resnet.__qualname__ = f"resnet{depth}"
    resnet.__doc__ = f"""ResNet-{depth}, variant a, b, c or d; keywords as in :class:`ResNet`.

    Examples:
        >>> model = fasttricks.models.resnet{depth}("d", num_classes=10, width=8)
        >>> model(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """
    return resnet


resnet18 = _constructor(18)
resnet34 = _constructor(34)
resnet50 = _constructor(50)
resnet101 = _constructor(101)
resnet152 = _constructor(152)
