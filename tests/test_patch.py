"""fasttricks.fuse: the same numbers, the same modules, and the original forward whenever something has changed."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from census import census, counted
from torch import nn

import fasttricks
from fasttricks.nn import BatchNormReLU2d


class Block(nn.Module):
    """A residual block with every kind of pair: modules, functions and methods."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))
        self.scale = 1.0
        self.extra = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)[:, :, ::2, ::2])
        out += self.shortcut(x) * self.scale
        out = F.relu(out)
        return out if self.extra is None else self.extra(out)


def pair_of(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A model that is fused, and the same model as it was."""
    plain = make().to(dtype)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    fused = copy.deepcopy(plain)
    assert fasttricks.fuse(fused) is fused
    return fused, plain


def same(fused: nn.Module, plain: nn.Module, inputs: Callable[[], torch.Tensor], tolerance: float) -> None:
    """Outputs, gradients and statistics after three steps of training, and evaluation."""
    for _ in range(3):
        x = inputs()
        for p, q in zip(fused.parameters(), plain.parameters(), strict=True):
            p.grad = q.grad = None
        got, want = fused(x), plain(x)
        assert relative_error(got, want) < tolerance
        weight = torch.randn_like(want)
        (got * weight).sum().backward()
        (want * weight).sum().backward()
    largest = max(q.grad.norm() for q in plain.parameters() if q.grad is not None)
    for (name, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            assert (p.grad - q.grad).norm() < tolerance * 100 * q.grad.norm().clamp_min(largest * 1e-3), name
    state = plain.state_dict()
    assert list(fused.state_dict()) == list(state)
    for name, value in fused.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=tolerance * 100, atol=tolerance * 100, msg=name)
    assert relative_error(fused.eval()(x), plain.eval()(x)) < tolerance * 100


def taken(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    with counted() as counts:
        model(x)
    return {kind: count for kind, count in counts.items() if count}


X = (4, 6, 8, 8)
WHOLE = {"bn_relu": 1, "bn_add_relu": 1, "avgpool_conv1x1": 1}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)], ids=str)
def test_a_block_trains_as_it_did(dtype: torch.dtype, tolerance: float) -> None:
    fused, plain = pair_of(Block, dtype)
    assert taken(copy.deepcopy(fused), torch.randn(X, dtype=dtype)) == {
        "bn_relu": 1,
        "bn_add_relu": 1,
        "avgpool_conv1x1": 1,
    }
    same(fused, plain, lambda: torch.randn(X, dtype=dtype), tolerance)


def test_the_modules_stay_what_they_are() -> None:
    model = Block()
    before = {name: (id(m), type(m)) for name, m in model.named_modules()}
    fasttricks.fuse(model)
    after = {name: (id(m), type(m)) for name, m in model.named_modules()}
    assert isinstance(model, Block)
    assert type(model).__name__ == "Block"
    assert {name: v for name, v in before.items() if name} == {
        name: v for name, v in after.items() if name and name != "shortcut"
    } | {"shortcut": before["shortcut"]}
    fasttricks.unfuse(model)
    assert {name: (id(m), type(m)) for name, m in model.named_modules()} == before


def test_the_report_says_what_and_why() -> None:
    model = fasttricks.fuse(Block())
    rows = {row.name: row for row in fasttricks.fusions(model)}
    assert rows["bn1"].kind == "bn_relu"
    assert rows["bn2"].kind == "bn_add_relu"
    assert rows["shortcut.1"].kind == "avgpool_conv1x1"
    assert all(rows[name].fused for name in ("bn1", "bn2", "shortcut.1"))
    assert not rows["shortcut.2"].fused
    text = str(fasttricks.fusions(model))
    assert "fused: 1 avgpool_conv1x1, 1 bn_add_relu, 1 bn_relu" in text
    assert fasttricks.fusions(Block()).counts == {}
    assert "not fused yet" in str(fasttricks.fusions(Block()))


class Scaled(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def test_the_report_has_every_batchnorm() -> None:
    """Also those of other classes, and those that a module of fasttricks holds."""
    model = nn.Sequential(BatchNormReLU2d(3), Scaled(3), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU())
    rows = {row.name: row for row in fasttricks.fusions(fasttricks.fuse(model, strict=True))}
    assert rows["0.norm"].reason == "BatchNormReLU2d runs it and what follows already"
    assert rows["1"].reason == "its class, Scaled, may compute something else than its base"
    assert rows["3"].fused
    assert len(rows) == 3


def test_fuse_is_idempotent_and_the_last_call_counts() -> None:
    model = fasttricks.fuse(fasttricks.fuse(Block()))
    x = torch.randn(X)
    assert taken(model, x) == WHOLE
    assert taken(fasttricks.fuse(model, bn_add_relu=False), x) == {"bn_relu": 1, "avgpool_conv1x1": 1}
    assert taken(fasttricks.fuse(model, bn_relu=False, avgpool_conv1x1=False), x) == {"bn_add_relu": 1}
    assert taken(fasttricks.fuse(model, filter_fn=lambda module, name: name != "bn1"), x) == {
        "bn_add_relu": 1,
        "avgpool_conv1x1": 1,
    }
    assert taken(fasttricks.unfuse(model), x) == {}
    assert taken(fasttricks.unfuse(model), x) == {}


def test_strict_names_what_is_left() -> None:
    model = Block()
    model.bn1.register_forward_hook(lambda m, a, out: None)
    with pytest.raises(ValueError, match=r"strict(.|\n)*bn1 .* hook"):
        fasttricks.fuse(model, strict=True)
    assert type(model) is Block
    assert fasttricks.fuse(Block(), strict=True) is not None


# ---- what is changed after fusing is honoured ----


def hook_on(name: str) -> Callable[[nn.Module], list[int]]:
    def change(model: nn.Module) -> list[int]:
        calls: list[int] = []
        model.get_submodule(name).register_forward_hook(lambda m, a, out: calls.append(1))
        return calls

    return change


@pytest.mark.parametrize("name", ["bn1", "relu", "bn2", "shortcut.0", "shortcut.1", "shortcut", "conv1"])
def test_a_hook_added_later_fires(name: str) -> None:
    model = fasttricks.fuse(Block())
    calls = hook_on(name)(model)
    model(torch.randn(X))
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["bn1", "relu", "shortcut.1"])
def test_hooks_on_every_module_fire(name: str) -> None:
    model = fasttricks.fuse(Block())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, out: seen.append(m))
    try:
        model(torch.randn(X))
    finally:
        handle.remove()
    assert model.get_submodule(name) in seen


CHANGES: dict[str, Callable[[Any], None]] = {
    "another activation": lambda m: setattr(m, "relu", nn.SiLU()),
    "another norm": lambda m: setattr(m, "bn1", nn.GroupNorm(2, 6).double()),
    "a norm as an identity": lambda m: setattr(m, "bn2", nn.Identity()),
    "an attribute": lambda m: setattr(m, "scale", 0.25),
    "a child where none was": lambda m: setattr(m, "extra", nn.Tanh()),
    "a child of a container": lambda m: m.shortcut.append(nn.Tanh()),
    "a pool of another size": lambda m: m.shortcut.__setitem__(0, nn.MaxPool2d(2)),
    "a forward of one module": lambda m: setattr(m.bn1, "forward", lambda x: x * 2),
    "the modes of one norm": lambda m: m.bn1.eval(),
    "the statistics of one norm": lambda m: setattr(m.bn2, "track_running_stats", False),
    "a frozen weight": lambda m: m.bn1.weight.requires_grad_(False),
    "a new weight": lambda m: setattr(m.bn1, "weight", nn.Parameter(torch.full((6,), 3.0, dtype=torch.float64))),
    "momentum": lambda m: setattr(m.bn1, "momentum", None),
    "eps": lambda m: setattr(m.bn2, "eps", 0.1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_change_after_fusing_is_honoured(change: Callable[[Any], None]) -> None:
    fused, plain = pair_of(Block)
    change(fused)
    change(plain)
    same(fused, plain, lambda: torch.randn(X, dtype=torch.float64), 1e-10)


# ---- what is changed in place ----


def seen_by_another_name(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    same = y
    same += x
    return m.relu(m.bn(y)) * y


def seen_through_a_view(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    rows = y.squeeze(0).data
    rows *= 2
    return F.relu(m.bn(y))


def of_the_caller(m: Any, x: torch.Tensor) -> torch.Tensor:
    x += m.bn(m.conv(x))
    return m.relu(x)


def before_the_addition(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    z = m.bn(y)
    y /= 2
    return F.relu(z + y)


def of_numbers(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.relu(m.bn(m.conv(x)))
    height = x.shape[2]
    more = height
    more *= 2
    more -= 1
    return y[:, :, : height // 2] * more


def of_the_shortcut(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.gate(m.conv(x)) * x
    y += m.bn(x)
    return m.relu(y)


class Assigned(nn.Module):
    def __init__(self, body: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU()
        self.gate = nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU(inplace=True))
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


@pytest.mark.parametrize(
    ("body", "pairs"),
    [
        (seen_by_another_name, {"bn_relu": 1}),
        (seen_through_a_view, {"bn_relu": 1}),
        (of_the_caller, {}),
        (before_the_addition, {}),
        (of_numbers, {"bn_relu": 1}),
        (of_the_shortcut, {"bn_add_relu": 1}),
    ],
)
def test_augmented_assignments_change_what_they_changed(
    body: Callable[[Any, torch.Tensor], torch.Tensor], pairs: dict[str, int]
) -> None:
    """torch.fx records them as plain operations, so that other names of the tensor would keep the old value."""
    fused, plain = pair_of(lambda: Assigned(body))
    assert taken(copy.deepcopy(fused), torch.randn(1, *X[1:], dtype=torch.float64)) == pairs
    for mode in (True, False):
        x = torch.randn(X, dtype=torch.float64)
        theirs = x.clone()
        with torch.no_grad():  # autograd refuses to differentiate some of these
            assert relative_error(fused.train(mode)(x), plain.train(mode)(theirs)) < 1e-10
        assert torch.allclose(x, theirs, rtol=1e-10, atol=1e-10)  # what the caller sees
        torch.testing.assert_close(fused.state_dict(), plain.state_dict())


class Configured(nn.Module):
    """Its forward reads a dictionary and a list, and may add to the list."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(6), nn.ReLU()
        self.options, self.seen, self.counts = {"scale": [2.0, 3.0]}, [1], counts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.counts:
            self.seen.append(1)
        return self.relu(self.bn(x)) * self.options["scale"][0] * len(self.seen)


@pytest.mark.parametrize("counts", [False, True])
def test_lists_and_dictionaries_of_a_module(counts: bool) -> None:
    fused, plain = pair_of(lambda: Configured(counts))
    assert fused.seen == plain.seen == [1]  # also while its forward is traced
    x = torch.randn(X, dtype=torch.float64)
    assert taken(copy.deepcopy(fused), x) == ({} if counts else {"bn_relu": 1})
    for change in (lambda m: None, lambda m: m.options["scale"].__setitem__(0, 0.5), lambda m: m.seen.append(4)):
        change(fused)
        change(plain)
        assert relative_error(fused(x), plain(x)) < 1e-10


# ---- copies ----


def test_copies_and_pickles() -> None:
    fused, plain = pair_of(Block)
    x = torch.randn(X, dtype=torch.float64)
    twin = copy.deepcopy(fused)
    assert taken(twin, x) == WHOLE
    with torch.no_grad():  # the copy has weights of its own
        twin.bn1.weight.zero_()
    assert (fused.bn1.weight != 0).all()
    for load in (lambda m: pickle.loads(pickle.dumps(m)), _saved_and_loaded):
        loaded = load(fused.eval())
        assert type(loaded) is Block
        assert relative_error(loaded(x), fused(x)) < 1e-10
    plain.load_state_dict(fused.state_dict())


def _saved_and_loaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_unfused_within_a_context() -> None:
    model = fasttricks.fuse(Block())
    x = torch.randn(X)
    with fasttricks.unfused(model) as same_model:
        assert same_model is model
        assert type(model) is Block
        assert taken(model, x) == {}
    assert taken(model, x) == WHOLE


# ---- whole models ----

TORCHVISION = ["resnet18", "densenet121", "googlenet", "mnasnet0_5", "regnet_y_400mf", "shufflenet_v2_x0_5", "vgg11_bn"]
TIMM = [
    "resnet26d",
    "dla34",
    "densenet121",
    "seresnet50",
    "repvgg_a0",
    "xception41",
    "res2net50_14w_8s",
    "hardcorenas_a",
    "tresnet_m",
    "vit_small_resnet26d_224",
]
FEATURES = ["vgg11_bn", "resnet26d", "resnest14d"]


def torchvision_model(name: str) -> nn.Module:
    options: dict[str, Any] = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return pytest.importorskip("torchvision").models.get_model(name, weights=None, num_classes=5, **options)


def timm_model(name: str) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, num_classes=5, drop_rate=0.0)


def timm_features(name: str) -> nn.Module:
    """As detectors and segmentation models use it: the forward asks for the type of what every stage returns."""
    return pytest.importorskip("timm").create_model(name, features_only=True)


MODELS = [(torchvision_model, name) for name in TORCHVISION] + [(timm_model, name) for name in TIMM]
MODELS += [(timm_features, name) for name in FEATURES]


@pytest.mark.parametrize(("make", "name"), MODELS, ids=[f"{make.__name__}-{name}" for make, name in MODELS])
def test_every_pair_of_a_model_is_fused_and_taken(make: Callable[[str], nn.Module], name: str) -> None:
    model = make(name).train().to("meta")
    x = torch.empty(2, 3, 224, 224, device="meta")
    want = census(model, x)
    fusions = fasttricks.fusions(fasttricks.fuse(model))
    got = {row.name for row in fusions.fused}
    assert sum(map(len, want.values())) > 0
    assert all(alternatives & got for pairs in want.values() for alternatives in pairs)
    with counted() as counts:
        model(x)
    assert counts == {kind: len(modules) for kind, modules in want.items()}
