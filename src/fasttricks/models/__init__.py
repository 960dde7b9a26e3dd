"""Image classifiers by name: ResNet in the variants A to D of He et al. 2018, MobileNet-V1, Inception-V3, Network in
Network, torchvision's and timm's."""

from .blocks import ConvBNReLU
from .inception import InceptionV3
from .init import xavier_
from .mobilenet import MobileNetV1
from .nin import NiN
from .registry import build, names
from .resnet import BasicBlock, Bottleneck, ResNet, resnet18, resnet34, resnet50, resnet101, resnet152

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ConvBNReLU",
    "InceptionV3",
    "MobileNetV1",
    "NiN",
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
