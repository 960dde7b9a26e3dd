"""fasttricks.fuse: a pool and its 1x1 convolution, in either order, wherever in a block they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from test_patch import hook_on, pair_of, same, taken
from torch import nn

import fasttricks


class PoolFunction(nn.Module):
    """A pool as a function before a container that starts with the convolution, as in GhostNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(6, 5, 1, bias=False), nn.BatchNorm2d(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.avg_pool2d(x, kernel_size=2, stride=2, ceil_mode=True))


def test_a_pool_as_a_function_and_a_convolution_inside_a_container() -> None:
    fused, plain = pair_of(PoolFunction)
    x = torch.randn(3, 6, 7, 7, dtype=torch.float64)
    assert taken(fused, x) == {"avgpool_conv1x1": 1}
    plain(x)
    same(fused, plain, lambda: torch.randn(3, 6, 7, 7, dtype=torch.float64), 1e-10)


class Down(nn.Module):
    """A pool at the end of a module of its own."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool
        self.expand = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.expand(self.pool(x))


class Scale(nn.Module):
    """Its parent calls a method of it, not the module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.power = 1

    def get(self) -> torch.Tensor:
        return self.weight**self.power


class Attention(nn.Module):
    """A convolution that comes after reads of what the pooled value is, and children whose attributes are read."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(6, 8, 1)
        self.scale = Scale()
        self.drop = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, _, h, w = x.shape
        q, k = self.qkv(x).view(b, 2, 4, -1).unbind(1)
        rows = F.softmax(q.transpose(-2, -1) * self.scale.get() @ k, -1).to(x.dtype)
        y = (q @ rows).reshape(b, 4, x.size(2), x.size()[-1]) * (1 - self.drop.p) / (h * w)
        return y * x.dim() / x.ndim


class PooledAttention(nn.Module):
    """As in CoAtNet: the pool ends one child, and the convolution begins another."""

    def __init__(self, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), Down(pool or nn.AvgPool2d(2)))
        self.attention = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(self.down(x))


class AntiAliased(nn.Module):
    """As in CLIP's ResNet: convolution, BatchNorm, ReLU and pool in one child, and the next convolution in another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Down(nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False))
        self.first.expand = nn.Dropout(0.0)
        self.first.pool = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), self.first.pool)
        self.second = nn.Sequential(nn.Conv2d(6, 5, 1, bias=False), nn.BatchNorm2d(5), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("size", [(8, 6), (7, 9)], ids=str)
@pytest.mark.parametrize("make", [PooledAttention, AntiAliased])
def test_a_pool_at_the_end_of_a_child(make: Callable[[], nn.Module], size: tuple[int, int]) -> None:
    fused, plain = pair_of(make)
    x = torch.randn(3, 6, *size, dtype=torch.float64)
    assert taken(copy.deepcopy(fused), x)["avgpool_conv1x1"] == 1
    same(fused, plain, lambda: torch.randn(3, 6, *size, dtype=torch.float64), 1e-10)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for model, given in zip((fused, plain), inputs, strict=True):
        model.train()(given).square().sum().backward()
    assert relative_error(inputs[0].grad, inputs[1].grad) < 1e-10
    assert taken(fasttricks.unfuse(fused), x) == {}


@pytest.mark.parametrize("name", ["down", "down.1", "down.1.pool", "down.1.expand", "attention", "attention.qkv"])
def test_a_hook_between_a_pool_and_its_convolution_fires(name: str) -> None:
    model = fasttricks.fuse(PooledAttention())
    calls = hook_on(name)(model)
    x = torch.randn(2, 6, 8, 8)
    assert taken(model, x) == {}
    assert len(calls) == 1


POOL_CHANGES: dict[str, Callable[[Any], None]] = {
    "an attribute that the parent reads": lambda m: setattr(m.attention.drop, "p", 0.5),
    "an attribute that a method reads": lambda m: setattr(m.attention.scale, "power", 2),
    "another pool": lambda m: setattr(m.down[1], "pool", nn.AvgPool2d(2, padding=1)),
    "a larger window": lambda m: setattr(m.down[1].pool, "kernel_size", 3),
    "a module after the pool": lambda m: setattr(m.down[1], "expand", nn.Tanh()),
    "an overhanging window": lambda m: setattr(m.down[1].pool, "ceil_mode", True),
    "another convolution": lambda m: setattr(m.attention, "qkv", nn.Conv2d(6, 8, 3, padding=1).double()),
}


@pytest.mark.parametrize("change", POOL_CHANGES.values(), ids=list(POOL_CHANGES))
def test_a_change_between_a_pool_and_its_convolution_is_honoured(change: Callable[[Any], None]) -> None:
    fused, plain = pair_of(PooledAttention)
    torch.manual_seed(0)
    change(fused)
    torch.manual_seed(0)
    change(plain)
    same(fused, plain, lambda: torch.randn(3, 6, 9, 8, dtype=torch.float64), 1e-10)


@pytest.mark.parametrize(("size", "count"), [((8, 6), 1), ((7, 6), 0), ((8, 5), 0)], ids=str)
def test_a_pool_that_pads_an_odd_edge(size: tuple[int, int], count: int) -> None:
    same_pool = pytest.importorskip("timm.layers").AvgPool2dSame
    fused, plain = pair_of(lambda: PooledAttention(same_pool(2, 2)))
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    assert taken(fused, x).get("avgpool_conv1x1", 0) == count
    same(fused, plain, lambda: torch.randn(2, 6, *size, dtype=torch.float64), 1e-10)


class PoolReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = Down(nn.AvgPool2d(2))
        self.conv = nn.Conv2d(6, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x)
        return x + self.conv(x)


def test_a_pooled_value_that_something_else_reads_is_left() -> None:
    fused, plain = pair_of(PoolReadTwice)
    assert taken(fused, torch.randn(2, 6, 8, 8, dtype=torch.float64)) == {}
    same(fused, plain, lambda: torch.randn(2, 6, 8, 8, dtype=torch.float64), 1e-10)


class Transition(nn.Module):
    """As in DenseNet: the pool comes after the convolution. Its shape is read, as a decoder would."""

    def __init__(self, pool: nn.Module | None = None, after: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)
        self.pool = pool
        self.after = after or nn.Identity()
        self.classify = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(F.relu(self.norm(x)))
        y = F.avg_pool2d(y, (2, 2), ceil_mode=True) if self.pool is None else self.pool(self.after(y))
        return self.classify(y) * y.shape[-1] * y.size(2)


TRANSITIONS: dict[str, Callable[[], nn.Module]] = {
    "module": lambda: Transition(nn.AvgPool2d(2)),
    "module, overhanging": lambda: Transition(nn.AvgPool2d(2, ceil_mode=True), nn.Dropout(0.0)),
    "function": Transition,
    "Sequential": lambda: nn.Sequential(nn.Conv2d(6, 5, 1, bias=False), nn.AvgPool2d(2, 2), nn.BatchNorm2d(5)),
}


def pools_taken(model: nn.Module, x: torch.Tensor) -> int:
    return taken(model, x).get("avgpool_conv1x1", 0)


@pytest.mark.parametrize("size", [(8, 6), (7, 9)], ids=str)
@pytest.mark.parametrize("make", TRANSITIONS.values(), ids=list(TRANSITIONS))
def test_a_pool_after_its_convolution(make: Callable[[], nn.Module], size: tuple[int, int]) -> None:
    fused, plain = pair_of(make)
    x = torch.randn(3, 6, *size, dtype=torch.float64)
    assert pools_taken(copy.deepcopy(fused), x) == 1
    assert fasttricks.fusions(fused).counts["avgpool_conv1x1"] == 1
    same(fused, plain, lambda: torch.randn(3, 6, *size, dtype=torch.float64), 1e-10)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for model, given in zip((fused, plain), inputs, strict=True):
        model.train()(given).square().sum().backward()
    assert relative_error(inputs[0].grad, inputs[1].grad) < 1e-10
    kept = fasttricks.fuse(copy.deepcopy(plain), avgpool_conv1x1=False)
    assert pools_taken(kept, x) == 0


TRANSITION_CHANGES: dict[str, Callable[[Any], Any]] = {
    "a hook on the convolution": lambda m: m.conv.register_forward_hook(lambda m, args, out: out * 2),
    "a hook on the pool": lambda m: m.pool.register_forward_pre_hook(lambda m, args: args[0] * 2),
    "a module between them": lambda m: setattr(m, "after", nn.Softplus()),
    "another pool": lambda m: setattr(m, "pool", nn.MaxPool2d(2)),
    "a convolution of groups": lambda m: setattr(m, "conv", nn.Conv2d(6, 4, 1, groups=2, bias=False).double()),
    "a stride": lambda m: setattr(m.conv, "stride", (2, 2)),
    "a divisor": lambda m: setattr(m.pool, "divisor_override", 3),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", TRANSITION_CHANGES.values(), ids=list(TRANSITION_CHANGES))
def test_a_change_between_a_convolution_and_its_pool_is_honoured(change: Callable[[Any], Any], when: str) -> None:
    fused, plain = pair_of(lambda: Transition(nn.AvgPool2d(2)))
    for model in (fused, plain):
        torch.manual_seed(0)
        change(model)
    if when == "before":
        fasttricks.fuse(fasttricks.unfuse(fused))
    assert pools_taken(fused, torch.randn(2, 6, 8, 8, dtype=torch.float64)) == 0
    plain.load_state_dict(fused.state_dict())
    same(fused, plain, lambda: torch.randn(3, 6, 8, 8, dtype=torch.float64), 1e-10)


class ConvolutionReadTwice(Transition):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.pool(y) * y.mean()


def test_a_convolution_that_something_else_reads_is_left() -> None:
    fused, plain = pair_of(lambda: ConvolutionReadTwice(nn.AvgPool2d(2)))
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    assert pools_taken(fused, x) == 0
    assert relative_error(fused(x), plain(x)) < 1e-12


class PooledThenChanged(nn.Module):
    """The op saves the input of the pool; the unfused convolution saves the pooled tensor."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.pool, self.relu, self.how = nn.Conv2d(6, 5, 1), nn.AvgPool2d(2), nn.ReLU(inplace=True), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        y = self.conv(self.pool(x)).mean()
        if self.how == "module":
            self.relu(x)
        elif self.how == "view":
            x[:, :1].mul_(2)
        else:
            x += 1
        return y * x


@pytest.mark.parametrize("how", ["module", "view", "assignment"])
def test_a_pool_whose_input_is_changed_later_runs_alone(how: str) -> None:
    """Without a gradient for the input; with one, an unfused pool's backward pass needs its input as well."""
    fused, plain = pair_of(lambda: PooledThenChanged(how))
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    for m in (fused, plain):
        m(x).sum().backward()
    assert relative_error(fused.conv.weight.grad, plain.conv.weight.grad) < 1e-10
    assert taken(fused, x) == {}
    with torch.no_grad():
        assert taken(fused, x) == {"avgpool_conv1x1": 1}
        assert relative_error(fused(x), plain(x)) < 1e-10
    for m in (fused, plain):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            m(x.requires_grad_()).sum().backward()


class BesideOne(nn.Module):
    """A child changes its own values in place, not the input that the pool reads as well (TResNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(6, 5, 1))
        self.main = nn.Sequential(nn.Conv2d(6, 5, 2, 2), nn.LeakyReLU(inplace=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.down(x)
        return self.main(x) + shortcut


def test_a_pool_beside_a_branch_that_works_in_place() -> None:
    fused, plain = pair_of(lambda: nn.Sequential(nn.Conv2d(6, 6, 1), BesideOne()))
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    assert taken(fused, x) == {"avgpool_conv1x1": 1}
    same(fused, plain, lambda: torch.randn(2, 6, 8, 8, dtype=torch.float64), 1e-10)


def test_a_pool_between_two_convolutions_belongs_to_the_second() -> None:
    fused, plain = pair_of(lambda: nn.Sequential(nn.Conv2d(6, 5, 1), nn.AvgPool2d(2), nn.Conv2d(5, 4, 1)))
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    assert taken(fused, x) == {"avgpool_conv1x1": 1}
    assert [row.name for row in fasttricks.fusions(fused).fused] == ["2"]
    same(fused, plain, lambda: torch.randn(2, 6, 8, 8, dtype=torch.float64), 1e-10)
