"""Network in Network (Lin et al. 2013, arXiv:1312.4400) for ImageNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import check_sizes
from .init import xavier_

# Channels over those of the first layer, in 96ths; kernel, stride and padding of the first convolution of each block.
# The sizes are those of the authors' network for ImageNet, which the paper leaves out.
_BLOCKS = ((96, 11, 4, 0), (256, 5, 1, 2), (384, 3, 1, 1), (1024, 3, 1, 1))


class NiN(nn.Module):
    """Four blocks of a convolution and two 1x1 convolutions, each with a ReLU; the last layer has one channel
    per class, whose mean is the logit.

    Args:
        num_classes: channels of the last layer.
        width: channels of the first layer (96 in the paper); those of the other layers are in proportion. Even.
        in_channels: channels of the images.
        fused: accepted as by the other models; there is no BatchNorm, and so nothing to fuse.

    forward: images (N, in_channels, H, W), at least 67x67 -> logits (N, num_classes). Weights start as in He et al.
    2018.

    Raises:
        ValueError: an argument outside what is listed above.

    Examples:
        >>> model = fasttricks.models.NiN(num_classes=10, width=6)
        >>> model(torch.randn(2, 3, 96, 96)).shape
        torch.Size([2, 10])
    """

    def __init__(self, *, num_classes: int = 1000, width: int = 96, in_channels: int = 3, fused: bool = True):
        super().__init__()
        check_sizes(width, num_classes, in_channels)
        self.width, self.fused = width, fused
        layers: list[nn.Module] = []
        inputs = in_channels
        for i, (share, kernel, stride, padding) in enumerate(_BLOCKS):
            last = i == len(_BLOCKS) - 1
            channels = share * width // 96
            layers += [
                nn.Conv2d(inputs, channels, kernel, stride=stride, padding=padding),
                nn.ReLU(inplace=True),
                nn.Conv2d(channels, channels, 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(channels, num_classes if last else channels, 1),
                nn.ReLU(inplace=True),
            ]
            if not last:
                layers.append(nn.MaxPool2d(3, stride=2, ceil_mode=True))
            if i == len(_BLOCKS) - 2:
                layers.append(nn.Dropout(0.5))
            inputs = channels
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        xavier_(self)

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.avgpool(self.features(x)), 1)
