"""fasttricks.fuse on every model of torchvision and timm with a BatchNorm.

The pairs are counted on the meta device, at full size. Then each model trains on small images, fused and not.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cases import relative_error
from census import census, counted
from courses import (
    Case,
    assert_close_in_float32,
    assert_same,
    assert_survives_copies,
    batches_of,
    distance,
    taken,
    total_error,
    train,
    twins,
)
from torch import nn

import fasttricks
from fasttricks.models import build

pytestmark = pytest.mark.zoo

# BN + ReLU, BN + add + ReLU, 2x2 pool and 1x1 convolution of torchvision's 45 models, and of timm 1.0.31's 464; the
# convolution comes before the pool in DenseNets: 12 and 18 times
TORCHVISION = {"bn_relu": 2285, "bn_add_relu": 563, "avgpool_conv1x1": 12}
TIMM = {"bn_relu": 19255, "bn_add_relu": 5035, "avgpool_conv1x1": 659}


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


# ---- each model's numbers ----

# of two models with more parameters the training does not fit into 12 GB
MOST_IN_FLOAT64 = 100_000_000
# batch and edge of the images
BATCHES = ((4, 64), (4, 96), (16, 64), (4, 128), (16, 96))


def edges() -> dict[str, int]:
    """Every model's name, and the edge of the images that it is made for."""
    of_torchvision = {f"torchvision/{name}": edge for name, _, edge in torchvision_models()}
    return of_torchvision | {f"timm/{name}": edge for name, _, edge in timm_models()}


def least_values(model: nn.Module, batch: int, edge: int) -> int:
    """The least number of values that a BatchNorm's statistics are of; 0 if the model cannot take such images."""
    counts = []
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [m.register_forward_pre_hook(lambda m, a: counts.append(a[0].numel() // a[0].shape[1])) for m in norms]
    try:
        model(torch.empty(batch, 3, edge, edge, device="meta"))
    except (RuntimeError, ValueError, AssertionError):
        return 0
    finally:
        for handle in handles:
            handle.remove()
    return min(counts)


def smallest_batch(model: nn.Module, edge: int) -> tuple[int, int]:
    """Batch and edge on which all statistics are of 16 values or more, or of as many as can be."""
    found: dict[tuple[int, int], int] = {}
    for size in (*BATCHES, (4, edge)):
        found[size] = least_values(model, *size)
        if found[size] >= 16:
            return size
    return max(found, key=lambda size: found[size])


@pytest.mark.parametrize(("name", "full_edge"), edges().items())
def test_every_model_trains_as_it_did(name: str, full_edge: int) -> None:
    def make() -> nn.Module:
        return build(name, 5, fused=False)

    model = on_meta(make)
    if not fasttricks.fusions(fasttricks.fuse(model)).fused:
        pytest.skip("no pairs")
    if sum(p.numel() for p in model.parameters()) > MOST_IN_FLOAT64:
        check_large(make, *smallest_batch(model, full_edge))
        return
    check(make, *smallest_batch(model, full_edge))


@pytest.mark.parametrize(("name", "edge"), edges().items())
def test_every_model_is_exported_as_it_was(name: str, edge: int) -> None:
    """torch.export, from which torch.onnx.export(dynamo=True) starts, records the operations of the unfused model."""
    model = on_meta(lambda: build(name, 5, fused=False)).eval()
    if not fasttricks.fusions(fasttricks.fuse(model)).fused:
        pytest.skip("no pairs")
    images = torch.empty(2, 3, edge, edge, device="meta")
    with fasttricks.unfused(model):
        try:
            plain = torch.export.export(model, (images,))
        except Exception as error:
            pytest.skip(f"torch.export refuses the unfused model: {type(error).__name__}")
    fused = torch.export.export(model, (images,))
    assert fused.graph_module.code == plain.graph_module.code
    assert fused.graph_signature == plain.graph_signature


OF_TIMM = (
    *("resnet26d", "seresnext26t_32x4d", "res2net50_14w_8s", "regnety_002", "dla46_c", "densenet121", "resnest14d"),
    *("skresnet18", "hrnet_w18_small", "ese_vovnet19b_dw", "legacy_xception", "ghostnet_050", "repvgg_a0", "dpn48b"),
    *("hgnetv2_b0", "mobileone_s0", "levit_128s", "cspresnet50", "inception_v4", "selecsls42b", "resnetv2_18"),
)


@pytest.mark.parametrize(
    ("name", "edge"), [case for case in edges().items() if case[0].startswith("torchvision/") or case[0][5:] in OF_TIMM]
)
def test_every_model_gives_the_same_in_onnxruntime(name: str, edge: int, tmp_path: Path) -> None:
    """Every model of torchvision, and one of each family of timm, that torch.onnx exports unfused."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = build(name, 5, fused=False)
    on_device = copy.deepcopy(model).to("meta")
    batch, edge = next(size for size in ((2, 64), (2, 96), (2, 128), (2, edge)) if least_values(on_device, *size))
    x = torch.randn(batch, 3, edge, edge)
    with torch.no_grad():
        model.train()(x)  # statistics of images: evaluation stays in range
    model.eval()

    def run() -> torch.Tensor:
        torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])

    if not fasttricks.fusions(fasttricks.fuse(model)).fused:
        pytest.skip("no pairs")
    with fasttricks.unfused(model):
        try:
            want = run()
        except Exception as error:
            pytest.skip(f"the unfused model is not exported or does not run: {type(error).__name__}")
    got = run()
    with torch.no_grad():
        in_torch = model(x)
    assert relative_error(got, want) < 1e-5
    assert relative_error(got, in_torch) < 1e-3


def check(make: Callable[[], nn.Module], batch: int, edge: int) -> None:
    """In float64 and float32, and after copies: the fused model and the other one give the same."""
    batches = batches_of(Case(make, edge, batch), 3)
    fused, plain = twins(make)
    pairs = len(fasttricks.fusions(fused).fused)
    singles = copy.deepcopy(fused).float(), copy.deepcopy(plain).float()
    moved = copy.deepcopy(plain)
    got, want = train(fused, batches), train(plain, batches)
    if (
        distance(got, want) > 1e-10
    ):  # statistics of few values enlarge rounding from layer to layer: that of images, too
        nearby = [x * (1 + 1e-15 * torch.randn_like(x)) for x in batches]
        assert_same(got, want, min(1e-4, 10 * distance(train(moved, nearby), want)))
    assert_close_in_float32(*singles, batches)
    assert taken(fused.train(), batches[0]) >= pairs
    assert_survives_copies(fused.eval(), batches[0])


def check_large(make: Callable[[], nn.Module], batch: int, edge: int) -> None:
    """In float32, and for the parameters of one dimension: one model, before and after it is fused."""
    model = make().train()
    for p in model.parameters():
        p.requires_grad_(p.dim() == 1)
    x = torch.randn(batch, 3, edge, edge)
    start = {name: b.clone() for name, b in model.named_buffers()}

    def results() -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        torch.manual_seed(0)
        out = model(x)
        gradients = torch.autograd.grad(out.square().sum(), [p for p in model.parameters() if p.requires_grad])
        buffers = [b.clone() for b in model.buffers()]
        for name, b in model.named_buffers():
            b.copy_(start[name])
        return [out.detach()], list(gradients), buffers

    want = results()
    fasttricks.fuse(model)
    assert taken(model, x) >= len(fasttricks.fusions(model).fused)
    for name, b in model.named_buffers():
        b.copy_(start[name])
    for got, expected, tolerance in zip(results(), want, (1e-2, 0.1, 1e-3), strict=True):
        assert total_error(got, expected) < tolerance
