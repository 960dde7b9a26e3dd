"""Whole models after fasttricks.fuse train, evaluate, copy, load, export and compile as they did before."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import relative_error
from courses import (
    Case,
    assert_close_in_float32,
    assert_same,
    assert_survives_copies,
    batches_of,
    saved_and_loaded,
    taken,
    train,
    twins,
)
from torch import nn

import fasttricks

models = pytest.importorskip("torchvision").models
timm = pytest.importorskip("timm")


def of_torchvision(name: str, edge: int = 32, batch: int = 4, **options: Any) -> Case:
    return Case(lambda: models.get_model(name, weights=None, num_classes=5, **options), edge, batch)


def of_timm(name: str, edge: int = 32, batch: int = 4, **options: Any) -> Case:
    return Case(lambda: timm.create_model(name, num_classes=5, **options), edge, batch)


def resnext() -> nn.Module:
    return models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, groups=8, width_per_group=4)


def densenet() -> nn.Module:
    return models.DenseNet(8, (2, 2, 2), 16, num_classes=5)


def vgg() -> nn.Module:
    features = models.vgg.make_layers([16, "M", 32, "M", 64, 64, "M"], batch_norm=True)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))


def xception() -> nn.Module:
    blocks = [
        {"in_chs": 64, "out_chs": 96, "stride": 2},
        {"in_chs": 96, "out_chs": 96, "stride": 1},
        {"in_chs": 96, "out_chs": (96, 96, 128), "stride": 1, "no_skip": True, "start_with_relu": False},
    ]
    return timm.models.xception_aligned.XceptionAligned(blocks, num_classes=5)


# the smallest images whose last statistics are of 16 values or more: those of fewer enlarge rounding a thousandfold
CASES = {
    "resnet18": of_torchvision("resnet18"),
    "resnext": Case(resnext),
    "densenet": Case(densenet),
    "googlenet": of_torchvision("googlenet", 64, init_weights=False),
    "shufflenet_v2_x0_5": of_torchvision("shufflenet_v2_x0_5", 64),
    "regnet_y_400mf": of_torchvision("regnet_y_400mf", 64, 8),
    "vgg": Case(vgg),
    "dla46_c": of_timm("dla46_c", 64, 8),
    "legacy_seresnet18": of_timm("legacy_seresnet18"),
    "xception": Case(xception),
    "repvgg_a0": of_timm("repvgg_a0"),
    "resnetv2_18": of_timm("resnetv2_18"),
    "resnet26d": of_timm("resnet26d", batch=8, layers=(1, 1, 1, 1)),
    "res2net": of_timm("res2net50_14w_8s", layers=(1, 1, 1, 1)),
    "hrnet_w18_small": of_timm("hrnet_w18_small", 64),
    "ese_vovnet19b_slim": of_timm("ese_vovnet19b_slim"),
    "ghostnet_050": of_timm("ghostnet_050", 64),
}


# ---- training and evaluation ----

# five seconds and more
LONG = ("googlenet", "regnet_y_400mf", "legacy_seresnet18", "repvgg_a0", "resnet26d", "hrnet_w18_small", "ghostnet_050")


def long(name: str, names: Iterable[str]) -> Any:
    """The name as a parameter of a test, marked long if it is one of `names`."""
    return pytest.param(name, marks=pytest.mark.long) if name in names else name


@pytest.mark.parametrize("name", [long(name, LONG) for name in CASES])
def test_a_model_trains_as_it_did(name: str) -> None:
    fused, plain = twins(CASES[name].make)
    fused32, plain32 = copy.deepcopy(fused).float(), copy.deepcopy(plain).float()
    batches = batches_of(CASES[name], 3)
    pairs = len(fasttricks.fusions(fused).fused)
    assert pairs > 0
    assert taken(copy.deepcopy(fused), batches[0]) >= pairs  # a module may be called more than once
    assert_same(train(fused, batches), train(plain, batches), 1e-10)
    assert_close_in_float32(fused32, plain32, batches)
    x = batches[-1].float()
    assert relative_error(fused.float()(x), plain.float()(x)) < 1e-3


def test_a_model_without_pairs_stays_as_it_is() -> None:
    model = models.mobilenet_v2(num_classes=5)  # its ReLUs are ReLU6
    classes = [type(module) for module in model.modules()]
    assert not fasttricks.fusions(fasttricks.fuse(model)).fused
    assert [type(module) for module in model.modules()] == classes


# ---- copies, files, exports, compilation ----

TOOLS = ("vgg", "densenet", "xception", "resnet26d")


@pytest.mark.parametrize("name", [long(name, ("resnet26d", "xception")) for name in TOOLS])
def test_a_model_is_copied_and_saved(name: str) -> None:
    fused, plain = twins(CASES[name].make)
    batches = batches_of(CASES[name], 2)
    train(fused, batches)
    train(plain, batches)
    x = batches[0]
    assert_survives_copies(fused, x)
    for source in (fused, plain):
        state = saved_and_loaded(source.state_dict())
        for target in (fasttricks.fuse(CASES[name].make().double()), CASES[name].make().double()):
            target.load_state_dict(state, strict=True)
            assert relative_error(target.eval()(x), source(x)) < 1e-10


@pytest.mark.parametrize("name", TOOLS)
def test_an_evaluated_model_is_exported(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    fused, plain = (model.float() for model in twins(CASES[name].make))
    x = batches_of(CASES[name], 1)[0].float()
    with torch.no_grad():
        for model in (fused, plain):
            torch.manual_seed(0)
            model(x)  # statistics of images: evaluation stays in range
            model.eval()
        want = plain(x)
        exported = torch.export.export(fused, (x,))
        assert not any("fasttricks" in str(node.target) for node in exported.graph.nodes)
        assert relative_error(exported.module()(x), want) < 1e-4
        torch.onnx.export(fused, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative_error(torch.from_numpy(got), want) < 1e-4
    assert taken(fused.train(), x) > 0


@pytest.mark.parametrize("name", [long(name, ("resnet26d", "xception")) for name in TOOLS])
def test_a_model_is_compiled_as_one_graph(name: str) -> None:
    fused, plain = twins(CASES[name].make)
    batches = batches_of(CASES[name], 1)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    course = train(compiled, batches)
    renamed = {name.removeprefix("_orig_mod."): g for name, g in course.gradients.items()}
    state = {name.removeprefix("_orig_mod."): t for name, t in course.state.items()}
    assert_same(course._replace(gradients=renamed, state=state), train(plain, batches), 1e-10)
