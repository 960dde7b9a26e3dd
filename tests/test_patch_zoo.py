"""fasttricks.fuse on every model of torchvision and timm with a BatchNorm: all counts, on the meta device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from census import census, counted
from torch import nn

import fasttricks

pytestmark = pytest.mark.zoo

# BN + ReLU, BN + add + ReLU, 2x2 pool + 1x1 convolution of torchvision's 45 models, and of timm 1.0.31's 464
TORCHVISION = {"bn_relu": 2285, "bn_add_relu": 563, "avgpool_conv1x1": 0}
TIMM = {"bn_relu": 19255, "bn_add_relu": 5035, "avgpool_conv1x1": 641}


def torchvision_models() -> Iterator[tuple[str, Callable[[], nn.Module], int]]:
    models = pytest.importorskip("torchvision").models
    for name in models.list_models(module=models):
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        edge = 299 if name == "inception_v3" else 224
        yield name, lambda name=name, options=options: models.get_model(name, weights=None, **options), edge


def timm_models() -> Iterator[tuple[str, Callable[[], nn.Module], int]]:
    timm = pytest.importorskip("timm")
    for name in timm.list_models():
        edge = timm.get_pretrained_cfg(name).input_size[-1]
        yield name, lambda name=name: timm.create_model(name), edge


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """The model on the meta device; some draw numbers from tensors while they are built."""
    try:
        with torch.device("meta"):
            return make().train()
    except (NotImplementedError, RuntimeError):
        return make().train().to("meta")


def totals(
    models: Iterator[tuple[str, Callable[[], nn.Module], int]],
) -> tuple[Counter[str], Counter[str], Counter[str], list[str]]:
    """Pairs that there are, that are fused, that are taken in a forward; and the models in which some are not."""
    there: Counter[str] = Counter()
    fused: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    partly = []
    for name, make, edge in models:
        model = on_meta(make)
        if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            continue
        images = torch.empty(2, 3, edge, edge, device="meta")
        pairs = census(model, images)
        if not any(pairs.values()):
            continue
        found = {row.name for row in fasttricks.fusions(fasttricks.fuse(model)).fused}
        with counted() as counts:
            model(images)
        for kind, modules in pairs.items():
            there[kind] += len(modules)
            fused[kind] += sum(bool(alternatives & found) for alternatives in modules)
            taken[kind] += counts[kind]
        if any(counts[kind] < len(modules) for kind, modules in pairs.items()):
            partly.append(name)
    return there, fused, taken, partly


def test_all_of_torchvision() -> None:
    there, fused, taken, partly = totals(torchvision_models())
    assert there == TORCHVISION
    assert fused == TORCHVISION
    assert taken == TORCHVISION
    assert partly == []


def test_all_of_timm() -> None:
    timm = pytest.importorskip("timm")
    there, fused, taken, partly = totals(timm_models())
    if timm.__version__ == "1.0.31":
        assert there == TIMM
    shares = {kind: fused[kind] / there[kind] for kind in there}
    assert shares["bn_relu"] == 1.0, partly
    assert shares["bn_add_relu"] > 0.995, partly
    assert shares["avgpool_conv1x1"] >= 0.90, partly
    assert taken == fused
