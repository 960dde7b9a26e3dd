"""Small networks of the blocks of torchvision and timm, which `fasttricks.fuse` changes, and their unfused twins."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fasttricks


def torchvision_net() -> nn.Module:
    """Blocks with and without a shortcut of their own."""
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
    # output_stride: images of a few pixels keep several at the end
    options = {"stem_type": "deep", "stem_width": 6, "avg_down": True, "channels": (6, 6, 10, 10), "output_stride": 8}
    return resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), num_classes=5, zero_init_last=False, **options)


def synchronised_net() -> nn.Module:
    """Every BatchNorm has its ReLU: torch's nn.SyncBatchNorm does not run on the CPU, the fused ops do."""
    resnet = pytest.importorskip("torchvision.models.resnet")
    layers = pytest.importorskip("timm.layers")
    return nn.Sequential(
        *(layers.ConvNormAct(3, 6, 3, act_layer=nn.ReLU), nn.Conv2d(6, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(resnet.BasicBlock(6, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    )


def randomised(model: nn.Module) -> nn.Module:
    """No BatchNorm is as it starts, so that one that is left out is noticed."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return model


def twins(model: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """The model fused, and as it was."""
    plain = randomised(model).to(dtype)
    return fasttricks.fuse(copy.deepcopy(plain)), plain
