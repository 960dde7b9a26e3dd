"""MobileNet-V1 (Howard et al. 2017, arXiv:1704.04861, table 1), built from fused or from eager modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import ConvBNReLU, check_sizes
from .init import xavier_

# (output channels over those of the stem, stride) of the depthwise separable convolutions
_BLOCKS = ((2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2), *((16, 1),) * 5, (32, 2), (32, 1))


class MobileNetV1(nn.Module):
    """A stem of stride 2 and 13 pairs of a depthwise 3x3 and a 1x1 convolution, each with BatchNorm and ReLU.

    Args:
        num_classes: outputs of the last linear layer.
        width: channels of the stem (32 in the paper); those of the other layers are in proportion. Even.
        in_channels: channels of the images.
        fused: build from ``fasttricks.nn`` modules (True) or from eager ``torch.nn`` modules (False).

    forward: images (N, in_channels, H, W) -> logits (N, num_classes). Weights start as in He et al. 2018.

    Raises:
        ValueError: an argument outside what is listed above.

    Examples:
        >>> model = fasttricks.models.MobileNetV1(num_classes=10, width=4)
        >>> model(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(self, *, num_classes: int = 1000, width: int = 32, in_channels: int = 3, fused: bool = True):
        super().__init__()
        check_sizes(width, num_classes, in_channels)
        self.width, self.fused = width, fused
        layers: list[nn.Module] = [ConvBNReLU(in_channels, width, 3, stride=2, fused=fused)]
        channels = width
        for times, stride in _BLOCKS:
            layers.append(ConvBNReLU(channels, channels, 3, stride=stride, groups=channels, fused=fused))
            layers.append(ConvBNReLU(channels, times * width, 1, fused=fused))
            channels = times * width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        xavier_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(self.features(x)), 1))
