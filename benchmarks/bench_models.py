"""A training step of models of torchvision and timm: after fasttricks.fuse against as they are, float32, NCHW.

    pytest benchmarks/bench_models.py --benchmark-only -s

The optimizer of both is torch.optim.SGD. The goal: no model is more than 2% slower.
"""

from __future__ import annotations

import pytest
import torch
from bench_train_step import Side, batch_of
from sides import measure

NCHW = torch.contiguous_format
BATCH, ROUNDS = 2, 15
PIXELS = (96, 224)
TORCHVISION = (
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "densenet121",
    "googlenet",
    "inception_v3",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mnasnet1_0",
    "shufflenet_v2_x1_0",
    "regnet_y_400mf",
    "vgg11_bn",
)
TIMM = (
    "resnet50d",
    "seresnet50",
    "dla34",
    "hrnet_w18_small",
    "ghostnet_100",
    "ese_vovnet19b_dw",
    "repvgg_a0",
    "dpn68",
)
MODELS = (*(f"torchvision/{name}" for name in TORCHVISION), *(f"timm/{name}" for name in TIMM))


@pytest.mark.more
@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("name", MODELS)
def test_model(benchmark, name: str, pixels: int) -> None:
    batch = batch_of(BATCH, pixels, NCHW)
    unfused = Side(False, NCHW, None, name, sgd=torch.optim.SGD)
    fused = Side(True, NCHW, unfused.model.state_dict(), name, sgd=torch.optim.SGD)
    measure(benchmark, fused.run(*batch), {"eager": unfused.run(*batch)}, ROUNDS, warm=False)
