"""Modules and fused models with tensors computed by torch.nn.utils: weight norm, spectral norm, pruning."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import relative_error
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

import fasttricks
from fasttricks.nn import AvgPoolConv1x1, BatchNormAddReLU2d, BatchNormReLU2d


class Held(nn.Module):
    """A network with the modules of fasttricks."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.down, self.bn2 = BatchNormReLU2d(6), AvgPoolConv1x1(6, 8, bias=True), BatchNormAddReLU2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(self.bn1(x))
        return self.bn2(y, y * 0.5)


class Plain(nn.Module):
    """The same network with torch's modules."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.down, self.bn2 = nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)
        self.pool, self.relu = nn.AvgPool2d(2), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(self.pool(self.relu(self.bn1(x))))
        return self.relu(self.bn2(y) + y * 0.5)


class Squared(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def several(net: Any) -> None:
    parametrize.register_parametrization(net.bn2, "bias", Doubled())
    parametrize.register_parametrization(net.bn2, "bias", Squared())
    parametrize.register_parametrization(net.bn1, "weight", Squared())
    parametrize.register_parametrization(net.bn1, "running_var", Doubled())
    parametrizations.weight_norm(net.down)


TOOLS: dict[str, Callable[[Any], Any]] = {
    "weight norm": lambda net: parametrizations.weight_norm(net.down),
    "spectral norm": lambda net: parametrizations.spectral_norm(net.down),
    "orthogonal": lambda net: parametrizations.orthogonal(net.down),
    "weight norm of a BatchNorm": lambda net: parametrizations.weight_norm(net.bn1, dim=None),
    "several": several,
    "weight norm, before torch 2.0": lambda net: utils.weight_norm(net.down),
    "spectral norm, before torch 2.0": lambda net: utils.spectral_norm(net.down),
    "pruned": lambda net: (prune.l1_unstructured(net.down, "weight", 0.5), prune.l1_unstructured(net.bn2, "bias", 3)),
    "structured": lambda net: prune.ln_structured(net.down, "weight", 2, 2, 0),
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def nets(tool: Callable[[Any], Any]) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Networks with equal weights: with the modules of fasttricks, fused, and plain."""
    plain = Plain().double()
    for bn in (plain.bn1, plain.bn2):
        for t in (bn.weight, bn.bias, bn.running_mean):
            nn.init.normal_(t)
    held = Held().double()
    held.load_state_dict(plain.state_dict())
    made = held, fasttricks.fuse(copy.deepcopy(plain)), plain
    for net in made:
        torch.manual_seed(3)  # spectral_norm starts from random vectors
        tool(net)
    return made


def step(net: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    net.zero_grad()
    y = net(x)
    y.square().sum().backward()
    return {"y": y.detach(), **{n: p.grad for n, p in net.named_parameters()}, **dict(net.named_buffers())}


@pytest.mark.parametrize("tool", TOOLS.values(), ids=list(TOOLS))
def test_values_names_copies_and_state_dicts_equal_torch(tool: Callable[[Any], Any]) -> None:
    *ours, plain = nets(tool)
    x = torch.randn(4, 6, 8, 8, dtype=torch.float64)
    for mode in (True, False):
        want = step(plain.train(mode), x)
        for net in ours:
            got = step(net.train(mode), x)
            assert list(got) == list(want)
            for name, value in got.items():
                if want[name] is None:
                    assert value is None, name
                else:
                    assert (value - want[name]).double().norm() <= 1e-9 * (1 + want[name].double().norm()), name
    for net in ours:
        assert list(net.state_dict()) == list(plain.state_dict())
        net.load_state_dict(plain.state_dict())
        plain.load_state_dict(net.state_dict())
        with torch.no_grad():  # the older tools store what they compute, and deepcopy takes only leaves of a graph
            net(x)
        assert relative_error(copy.deepcopy(net)(x), plain(x)) < 1e-10


@pytest.mark.parametrize("name", ["weight norm", "several", "pruned"])
def test_compiled_and_exported_models_equal_torch(name: str) -> None:
    *ours, plain = nets(TOOLS[name])
    x = torch.randn(4, 6, 8, 8, dtype=torch.float64)
    want = plain.eval()(x)
    for net in ours:
        torch._dynamo.reset()
        compiled = torch.compile(net.eval(), backend="aot_eager", fullgraph=True)
        assert relative_error(compiled(x), want) < 1e-10
        assert relative_error(torch.export.export(net, (x,)).module()(x), want) < 1e-10


def test_parametrizations_can_be_removed() -> None:
    held, fused, plain = nets(several)
    x = torch.randn(4, 6, 8, 8, dtype=torch.float64)
    for net in (held, fused, plain):
        for module in (net.down, net.bn1, net.bn2):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name)
    assert list(held.state_dict()) == list(fused.state_dict()) == list(plain.state_dict())
    assert set(held.state_dict()) == set(Plain().state_dict())
    assert held.down.conv.weight is held.down.weight
    for net in (held, fused):
        assert relative_error(net(x), plain(x)) < 1e-10


def test_children_can_be_parametrized() -> None:
    """A loop over the convolutions and BatchNorms of a model finds the children, not the holders."""
    made = nets(lambda net: None)
    x = torch.randn(4, 6, 8, 8, dtype=torch.float64)
    for net in made:
        for module in list(net.modules()):
            if isinstance(module, nn.Conv2d):
                parametrizations.weight_norm(module)
            elif isinstance(module, nn.BatchNorm2d):
                parametrize.register_parametrization(module, "weight", Squared())
    for net in made[:2]:
        assert relative_error(net(x), made[2](x)) < 1e-10
        other = copy.deepcopy(net)
        for p in other.parameters():
            nn.init.normal_(p)
        other.load_state_dict(net.state_dict())
        assert relative_error(other.eval()(x), net.eval()(x)) < 1e-10
        state = net.state_dict()
        state["down.parametrization"] = torch.zeros(1)
        with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "down\.parametrization"'):
            net.load_state_dict(state)


class Scaled(nn.Sequential):
    """A block with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(6), nn.ReLU())
        self.scale = nn.Parameter(torch.rand(6, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[1](self[0](x)) * self.scale


def test_a_fused_block_with_a_parametrization_is_copied() -> None:
    x = torch.randn(4, 6, 8, 8)
    plain = Scaled()
    fused = fasttricks.fuse(copy.deepcopy(plain))
    for net in (plain, fused):
        parametrize.register_parametrization(net, "scale", Doubled())
        net(x)
    twin = copy.deepcopy(fused)
    with torch.no_grad():
        twin.parametrizations.scale.original.zero_()
    assert relative_error(fused.eval()(x), plain.eval()(x)) < 1e-5
    assert not twin.eval()(x).any()
    with pytest.raises(
        RuntimeError, match="Serialization of parametrized modules is only supported through state_dict"
    ):
        pickle.dumps(fused)
    assert type(fasttricks.unfuse(fused)).__mro__[1] is Scaled
