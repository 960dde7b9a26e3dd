"""fuse on blocks whose both branches end in a BatchNorm: both run in one op, wherever that changes no result."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from torch import nn

import fasttricks
from fasttricks.nn import run


@pytest.fixture
def calls() -> Iterator[dict[str, int]]:
    """How often each op was called."""
    counts = {"two": 0, "one": 0}
    two, one = run.call_of_two, run.call

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            counts[name] += 1
            return function(*args)

        return counted

    with (
        mock.patch.object(run, "call_of_two", counting("two", two)),
        mock.patch.object(run, "call", counting("one", one)),
    ):
        yield counts


class Block(nn.Module):
    """Two branches that end in a BatchNorm each."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.between = between or nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn(self.conv(x))
        out += self.between(self.shortcut(x))
        return self.relu(out)


class ShortcutFirst(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = self.shortcut(x)
        return F.relu(torch.add(other, self.bn(self.conv(x))))


class Swapped(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn(self.conv(x))
        other = self.between(self.shortcut(x))
        other += out
        return other.relu_()


class SharedNorm(Block):
    """The BatchNorm of the shortcut is called a second time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn(self.conv(x)) + self.shortcut(x)
        return F.relu(out) + self.shortcut[1](self.conv(x))


class ReadTwice(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = self.shortcut(x)
        return F.relu(self.bn(self.conv(x)) + other) * other.mean()


class ChangedInput(Block):
    """What the BatchNorm of the shortcut reads is changed before the addition."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.shortcut[0](x)
        other = self.shortcut[1](z)
        z.detach().mul_(2)
        return F.relu(self.bn(self.conv(x)) + other) + z.mean()


TOGETHER = (Block, ShortcutFirst, Swapped)
APART = (SharedNorm, ReadTwice)


def pair_of(made: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A model in float64 with random statistics, fused and not."""
    made = made.double()
    for norm in made.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.normal_(norm.running_mean)
    plain = copy.deepcopy(made)
    return fasttricks.fuse(made), plain


def assert_same(fused: nn.Module, plain: nn.Module, steps: int = 2) -> None:
    """Outputs, gradients and statistics over some calls."""
    x = torch.randn(3, 4, 5, 4, dtype=torch.float64)
    for _ in range(steps):
        results = []
        for model in (fused, plain):
            given = x.clone().requires_grad_()
            y = model(given * 1.0)
            model.zero_grad()
            (y * y.detach().cos()).sum().backward()
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            buffers = {name: b.double() for name, b in model.named_buffers()}
            results.append({"y": y, "x": given.grad, **grads, **buffers})
        assert results[0].keys() == results[1].keys()
        for name, want in results[1].items():
            assert relative_error(results[0][name], want) < 1e-10, name


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("block", TOGETHER, ids=lambda c: c.__name__)
def test_both_run_in_one_op(block: type[Block], training: bool, calls: dict[str, int]) -> None:
    fused, plain = pair_of(block().train(training))
    assert_same(fused, plain)
    assert calls == {"two": 2, "one": 0}
    report = fasttricks.fusions(fused)
    assert report.counts == {"bn_add_relu": 1}
    assert sorted(row.reason for row in report if row.name in ("bn", "shortcut.1"))[0] == ""
    assert any("computes it" in row.reason for row in report)


@pytest.mark.parametrize("block", APART, ids=lambda c: c.__name__)
def test_left_apart_where_a_result_could_change(block: type[Block], calls: dict[str, int]) -> None:
    fused, plain = pair_of(block())
    assert_same(fused, plain)
    assert calls["two"] == 0


def test_an_input_that_is_changed_before_the_addition(calls: dict[str, int]) -> None:
    fused, plain = pair_of(ChangedInput())
    x = torch.randn(3, 4, 5, 4, dtype=torch.float64)
    with torch.no_grad():  # autograd refuses such a change
        assert relative_error(fused(x), plain(x)) < 1e-12
    assert calls == {"two": 0, "one": 1}


@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout(0.0)], ids=["identity", "dropout of 0"])
def test_what_returns_its_input_may_stand_between(between: nn.Module, calls: dict[str, int]) -> None:
    fused, plain = pair_of(Block(between))
    assert_same(fused, plain)
    assert calls["two"] == 2


def test_something_else_between(calls: dict[str, int]) -> None:
    fused, plain = pair_of(Block(nn.Hardtanh()))
    assert_same(fused, plain)
    assert calls == {"two": 0, "one": 2}


@pytest.mark.parametrize("where", ["shortcut", "shortcut.1", "bn", "between"])
def test_a_hook_is_called(where: str, calls: dict[str, int]) -> None:
    fused, plain = pair_of(Block(nn.Identity()))
    seen = []
    for model in (fused, plain):
        model.get_submodule(where).register_forward_hook(lambda m, x, y: seen.append(y.sum().item()))
    assert_same(fused, plain, steps=1)
    assert len(seen) == 2
    assert calls["two"] == 0


def test_one_norm_is_frozen(calls: dict[str, int]) -> None:
    fused, plain = pair_of(Block())
    for model in (fused, plain):
        model.shortcut[1].eval()
    assert_same(fused, plain)
    assert calls["two"] == 0


def test_norms_of_other_kinds(calls: dict[str, int]) -> None:
    """Cumulative average, no statistics, no parameters: each BatchNorm keeps its own options."""
    block = Block()
    block.bn = nn.BatchNorm2d(6, momentum=None, eps=1e-3)
    block.shortcut[1] = nn.BatchNorm2d(6, track_running_stats=False)
    plain = copy.deepcopy(block).double()
    fused = fasttricks.fuse(block.double())
    assert_same(fused, plain, steps=3)
    block = Block()
    block.bn, block.shortcut[1] = nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(6, affine=False, momentum=0.7)
    plain = copy.deepcopy(block).double()
    assert_same(fasttricks.fuse(block.double()), plain)
    assert calls["two"] == 5


def test_a_synchronised_norm(calls: dict[str, int]) -> None:
    """One process needs no collectives."""
    fused, plain = pair_of(Block())
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    x = torch.randn(3, 4, 5, 4, dtype=torch.float64)
    assert relative_error(fused.eval()(x), plain.eval()(x)) < 1e-10


@pytest.mark.parametrize("refused", ["bn", "shortcut.1"])
def test_filter_fn_sees_both_norms(refused: str, calls: dict[str, int]) -> None:
    block = Block()
    block = fasttricks.fuse(block, filter_fn=lambda module, name: name != refused)
    block(torch.randn(2, 4, 5, 5))
    assert calls == {"two": 0, "one": 1}


def test_replaced_modules_are_honoured(calls: dict[str, int]) -> None:
    fused, plain = pair_of(Block())
    for model in (fused, plain):
        model.shortcut[1] = nn.Identity()
    assert_same(fused, plain)
    assert calls["two"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype, calls: dict[str, int]) -> None:
    torch.manual_seed(0)
    plain = Block()
    fused = fasttricks.fuse(copy.deepcopy(plain))
    x = torch.randn(3, 4, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        got, want = fused(x), plain(x)
    assert got.dtype == want.dtype
    assert relative_error(got, want) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert calls["two"] == 1


def test_compiled_as_one_graph() -> None:
    fused, plain = pair_of(Block())
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, 5, 4, dtype=torch.float64)
    compiled(x).square().sum().backward()
    plain(x).square().sum().backward()
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-10
    for a, b in zip(fused.buffers(), plain.buffers(), strict=True):
        assert relative_error(a, b.double()) < 1e-10


def test_the_modules_op() -> None:
    """BatchNormAddReLU2d with the BatchNorm of the shortcut as its third argument, and what hooks make of it."""
    module = fasttricks.nn.BatchNormAddReLU2d(4, zero_init=True).double()
    norm, x, z = nn.BatchNorm2d(4).double(), *torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    want = F.relu(F.batch_norm(z, None, None, norm.weight, norm.bias, training=True))
    assert relative_error(module(x, z, norm), want) < 1e-12
    norm.register_forward_hook(lambda m, x, y: y + 1)
    assert relative_error(module(x, z, norm), F.relu(norm(z))) < 1e-12
    graph = torch.fx.symbolic_trace(Holding(module, nn.BatchNorm2d(4).double()))
    assert relative_error(graph(x, z), want) < 1e-12


class Holding(nn.Module):
    def __init__(self, module: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.module, self.norm = module, norm

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.module(x, z, self.norm)
