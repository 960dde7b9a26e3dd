"""Channels and sizes of the BatchNorms of networks, each once; ENDS: of those before the addition of a shortcut."""

from __future__ import annotations

Shapes = tuple[tuple[int, int], ...]

RESNET50: Shapes = ((64, 112), (64, 56), (128, 56), (128, 28), (256, 28), (256, 14), (512, 14), (512, 7))
RESNET50_ENDS: Shapes = ((256, 56), (512, 28), (1024, 14), (2048, 7))

OTHERS: dict[str, Shapes] = {
    "MobileNet": ((32, 112), (64, 112), (64, 56), (128, 28), (256, 14), (512, 14), (512, 7), (1024, 7)),
    "Inception-V3": ((32, 149), (64, 147), (80, 73), (192, 71), (96, 35), (288, 35), (192, 17), (448, 8), (320, 8)),
    "DenseNet-121": ((64, 56), (224, 56), (128, 28), (480, 28), (256, 14), (992, 14), (512, 7), (992, 7)),
}

# input channels, output channels and size of ResNet-50-D's shortcuts that pool
SHORTCUTS = ((256, 512, 56), (512, 1024, 28), (1024, 2048, 14))
