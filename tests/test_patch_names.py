"""What fused blocks do when something that their forwards read by name is replaced after fusing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from torch import nn

import fasttricks

SCALE = 1.0
FLAG = False
OPTIONS = {"power": 1, "more": [1, 2]}


def inner(x: torch.Tensor) -> torch.Tensor:
    return x + OPTIONS["power"]


def helper(x: torch.Tensor) -> torch.Tensor:
    return inner(x) * SCALE


class Child(nn.Module):
    sign = 1

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x * self.sign))


class Named(nn.Module):
    """A block with a child that ends in its BatchNorm, so that the child is part of the graph."""

    shift = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.child, self.relu = Child(), nn.ReLU()

    def last(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.shift

    @staticmethod
    def before(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @classmethod
    def after(cls, x: torch.Tensor) -> torch.Tensor:
        return x / 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        if FLAG:
            x = -x
        y = helper(self.relu(self.child(x)))
        return self.after(self.last(y))


THIS = sys.modules[__name__]
Replaced = tuple[Any, str, Any]
REPLACED: dict[str, Replaced] = {
    "a flag": (THIS, "FLAG", True),
    "a number": (THIS, "SCALE", 3.0),
    "a dictionary": (THIS, "OPTIONS", {"power": 2}),
    "a function": (THIS, "helper", torch.neg),
    "a function that a function calls": (THIS, "inner", torch.neg),
    "an attribute of the class": (Named, "shift", 0.5),
    "an attribute of a child's class": (Child, "sign", -2),
    "a method": (Named, "last", lambda self, x: x * 5),
    "a static method": (Named, "before", staticmethod(torch.neg)),
    "the forward": (Named, "forward", lambda self, x: self.child(x)),
    "a child's forward": (Child, "forward", lambda self, x: x),
    "every BatchNorm": (nn.BatchNorm2d, "forward", lambda self, x: x * 3),
    "every norm": (nn.modules.batchnorm._BatchNorm, "forward", lambda self, x: x * 3),
    "every ReLU": (nn.ReLU, "forward", lambda self, x: F.silu(x)),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("what", REPLACED.values(), ids=list(REPLACED))
def test_what_is_replaced_is_honoured(what: Replaced, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fasttricks.fuse(Named().double(), recompute=recompute)
    assert fasttricks.fusions(model).counts == {"bn_relu": 1}
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    before = model(x)
    monkeypatch.setattr(*what)
    got = model(x)
    with fasttricks.unfused(model):
        want = model(x)
    assert relative_error(got, want) < 1e-12
    assert relative_error(got, before) > 1e-3


def test_a_dictionary_that_changes_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = fasttricks.fuse(Named()), torch.randn(4, 3, 5, 5)
    before = model(x)
    monkeypatch.setitem(OPTIONS, "power", 3)
    assert relative_error(model(x), before + 1) < 1e-5


def test_timms_norm_with_another_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = pytest.importorskip("timm.layers")
    norm, x = fasttricks.fuse(layers.BatchNormAct2d(3)), torch.randn(4, 3, 5, 5)
    monkeypatch.setattr(layers.BatchNormAct2d, "forward", lambda self, x: x * 2)
    assert torch.equal(norm(x), x * 2)


@pytest.mark.parametrize("what", [REPLACED[name] for name in ("a flag", "a function", "an attribute of the class")])
def test_compiled_blocks_honour_it_too(what: Replaced, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model, x = fasttricks.fuse(Named()), torch.randn(4, 3, 5, 5)
    compiled: Callable[..., torch.Tensor] = torch.compile(model, fullgraph=True, backend="eager")
    compiled(x)
    monkeypatch.setattr(*what)
    assert relative_error(compiled(x), fasttricks.unfuse(model)(x)) < 1e-5
