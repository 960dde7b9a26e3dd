"""Small networks of torchvision's and timm's blocks, fused and unfused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fasttricks


def torchvision_net() -> nn.Module:
    """Blocks with identity shortcuts and with convolutional ones."""
    resnet = pytest.importorskip("torchvision.models.resnet")
    shortcut = nn.Sequential(nn.Conv2d(6, 10, 1, 2, bias=False), nn.BatchNorm2d(10))
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        *(resnet.BasicBlock(6, 6), resnet.BasicBlock(6, 10, 2, shortcut)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 5)),
    )


def timm_net() -> nn.Module:
    """All three kinds of pairs, with the 2x2 pools of ResNet-D."""
    resnet = pytest.importorskip("timm.models.resnet")
    # output_stride: small images keep several pixels up to the last stage
    options = {"stem_type": "deep", "stem_width": 6, "avg_down": True, "channels": (6, 6, 10, 10), "output_stride": 8}
    return resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), num_classes=5, zero_init_last=False, **options)


def synchronised_net() -> nn.Module:
    """Each BatchNorm is followed by a ReLU: unlike the fused ops, nn.SyncBatchNorm does not run on the CPU."""
    resnet = pytest.importorskip("torchvision.models.resnet")
    layers = pytest.importorskip("timm.layers")
    return nn.Sequential(
        *(layers.ConvNormAct(3, 6, 3, act_layer=nn.ReLU), nn.Conv2d(6, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(resnet.BasicBlock(6, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    )


def randomised(model: nn.Module) -> nn.Module:
    """Randomises the affine parameters of every BatchNorm, so that leaving one out changes the output."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return model


def twins(model: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """(a fused copy of the randomised model, the model)."""
    plain = randomised(model).to(dtype)
    return fasttricks.fuse(copy.deepcopy(plain)), plain
