"""Image classifiers: ResNet in the variants A to D of He et al. 2018, torchvision's and timm's, all by name."""

from .init import xavier_
from .registry import build, names
from .resnet import BasicBlock, Bottleneck, ResNet, resnet18, resnet34, resnet50, resnet101, resnet152

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "build",
    "names",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "xavier_",
]
