"""fuse, unfuse, unfused and fusions on models of every form, and what they say to arguments that they do not accept."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.ao.quantization as quantization
import torch.nn.functional as F
from cases import relative_error
from census import counted
from networks import timm_net, torchvision_net
from torch import Tensor, nn

import fasttricks
from fasttricks.nn import AvgPoolConv1x1


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1))


def within_unfused(model: Any) -> None:
    with fasttricks.unfused(model):
        pass


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "fuse": fasttricks.fuse,
    "unfuse": fasttricks.unfuse,
    "unfused": within_unfused,
    "fusions": fasttricks.fusions,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_module(name: str) -> None:
    for model, given in [(None, "a NoneType"), ("net", "a str"), ([network()], "a list"), (nn.ReLU, "the class ReLU")]:
        with pytest.raises(TypeError, match=rf"^{name}: model is {given}; accepted: a torch\.nn\.Module$"):
            FUNCTIONS[name](model)
    for scripted in (torch.jit.script(network()), torch.jit.trace(network().eval(), torch.randn(1, 3, 6, 6))):
        with pytest.raises(ValueError, match=rf"^{name}: model is scripted or traced; accepted: the module before"):
            FUNCTIONS[name](scripted)


@pytest.mark.parametrize("name", ["bn_relu", "bn_add_relu", "avgpool_conv1x1", "strict", "recompute"])
def test_flags(name: str) -> None:
    for value, given in [("yes", "str"), (None, "NoneType"), (1, "int"), (torch.tensor(True), "Tensor")]:
        model = network()
        with pytest.raises(TypeError, match=f"^fuse: {name} is a {given}; accepted: True or False$"):
            fasttricks.fuse(model, **{name: value})
        assert type(model) is nn.Sequential


def test_numbers() -> None:
    """Those of NumPy are taken, too."""
    for value, given in [("9", "str"), (1.5, "float"), (True, "bool")]:
        with pytest.raises(TypeError, match=f"^fuse: min_elements is a {given}; accepted: an int or None$"):
            fasttricks.fuse(network(), min_elements=value)
    with pytest.raises(ValueError, match=r"^fuse: min_elements is -1; accepted: 0 or more$"):
        fasttricks.fuse(network(), min_elements=-1)
    x = torch.randn(2, 3, 6, 6)
    assert fasttricks.fuse(network(), min_elements=np.int64(9))(x).shape == (2, 2, 4, 4)
    assert AvgPoolConv1x1(np.int64(3), np.int32(4), stride=np.int64(2))(x).shape == (2, 4, 3, 3)
    with pytest.raises(ValueError, match=r"stride is np.int64\(3\); accepted: 1, 2"):
        AvgPoolConv1x1(3, 4, stride=np.int64(3))
    weight = torch.randn(4, 3, 1, 1)
    assert torch.equal(
        fasttricks.avgpool_conv1x1(x, weight, stride=np.int64(1)), fasttricks.avgpool_conv1x1(x, weight, stride=1)
    )


def test_filter() -> None:
    for value in (3, "1", ["1"]):
        with pytest.raises(TypeError, match=r"^fuse: filter_fn is a \w+; accepted: a function of \(mod"):
            fasttricks.fuse(network(), filter_fn=value)


def test_models_that_are_not_fused() -> None:
    model = network()
    assert fasttricks.unfuse(model) is model
    with fasttricks.unfused(model) as same:
        assert same is model
    assert not fasttricks.fusions(model).fused
    assert type(model) is nn.Sequential
    assert str(fasttricks.fusions(nn.ReLU()))


def group_of_one(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def sharded_2(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fused": fasttricks.fuse,
    "DataParallel": nn.DataParallel,
    "compiled": lambda m: torch.compile(m, backend="aot_eager"),
    "a graph": torch.fx.symbolic_trace,
    "distributed": nn.parallel.DistributedDataParallel,
    "FSDP1": sharded,
    "FSDP2": sharded_2,
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, recompute: bool, tmp_path: Path) -> None:
    if form in ("distributed", "FSDP1", "FSDP2"):
        group_of_one(tmp_path)
    try:
        plain = network().double()
        model = FORMS[form](copy.deepcopy(plain))
        kind = type(model).__name__
        assert fasttricks.fuse(model, recompute=recompute) is model
        assert fasttricks.fusions(model).counts == {"bn_relu": 1}
        x = torch.randn(2, 3, 7, 5, dtype=torch.float64)
        for net in (model, plain):
            net(x).square().mean().backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            assert (grad - q.grad).norm() <= 1e-10 * (1 + q.grad.norm())
        fasttricks.unfuse(model)
        assert type(model).__name__ == kind
        assert not fasttricks.fusions(model).fused
        assert relative_error(model(x), plain(x)) < 1e-10
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        torch._dynamo.reset()


class Shaped(nn.Module):
    """An argument that is a shape, or a tensor of it, is given to functions in C, and asked for its type."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.bn, self.relu, self.how = nn.BatchNorm2d(3), nn.ReLU(), how

    def forward(self, x: torch.Tensor, like: Any) -> torch.Tensor:
        y = self.relu(self.bn(x))
        if self.how == "given":
            return y + torch.ones(like)
        if self.how == "asked":
            return y + (torch.ones_like(like) if isinstance(like, torch.Tensor) else 2 * torch.ones(like))
        match like:
            case torch.Tensor():
                return y + torch.ones_like(like)
            case _:
                return y + 2 * torch.ones(like)


@pytest.mark.parametrize("how", ["given", "asked", "matched"])
def test_arguments_that_are_no_tensors(how: str) -> None:
    plain = Shaped(how).double()
    fused = fasttricks.fuse(nn.Sequential(copy.deepcopy(plain)))[0]
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    for like in ([2, 3, 5, 4], [1, 1, 5, 4], x):
        if how == "given" and like is x:
            continue
        assert relative_error(fused(x, like), plain(x, like)) < 1e-10
    assert not isinstance(3, torch.Tensor)
    assert isinstance.__module__ == "builtins"


class Looking(nn.Module):
    """A forward that looks at the type of its argument in one of many ways, and computes something else for each."""

    def __init__(self, look: Callable[[nn.Module, Any], torch.Tensor]) -> None:
        super().__init__()
        self.bn, self.relu, self.look, self.split = nn.BatchNorm2d(3), nn.ReLU(), look, Split()
        self.same = nn.Identity()

    def forward(self, x: Any) -> torch.Tensor:
        return self.relu(self.bn(self.look(self, x)))


class Split(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.square(), x


def by_attribute(_: nn.Module, x: Any) -> torch.Tensor:
    return sum(x.values()) if hasattr(x, "values") and not hasattr(x, "dtype") else x.square()


def by_key(_: nn.Module, x: Any) -> torch.Tensor:
    try:
        return x["a"].square()
    except (IndexError, TypeError):
        return x


def by_a_module_that_returns_two(block: nn.Module, x: Any) -> torch.Tensor:
    y = block.split(x)
    return y[0] if isinstance(y, tuple) else y


class Twice(torch.Tensor):
    pass


def by_an_identity(block: nn.Module, x: Any) -> torch.Tensor:
    y = block.same(x)
    return y[0] if isinstance(y, tuple) else y.square()


LOOKS = {
    "tuple": lambda _, x: torch.cat(x).square() if isinstance(x, tuple) else x,
    "list": lambda _, x: sum(x) if isinstance(x, list) else x.square(),
    "list or tuple": lambda _, x: sum(x) if isinstance(x, (list, tuple)) else x.square(),
    "sequence": lambda _, x: sum(x) if isinstance(x, Sequence) else x.square(),
    "dict": lambda _, x: sum(x.values()) if isinstance(x, dict) else x.square(),
    "mapping": lambda _, x: x["a"].square() if isinstance(x, Mapping) else x,
    "tensor": lambda _, x: x.square() if torch.is_tensor(x) else x[0],
    "subclass": lambda _, x: x.square() if isinstance(x, Twice) else x,
    "union": lambda _, x: sum(x) if isinstance(x, list | tuple) else x.square(),
    "union with a subclass": lambda _, x: x.square() if isinstance(x, Twice | None) else x,
    "type": lambda _, x: x.square() if type(x) is torch.Tensor else sum(x),
    "__class__": lambda _, x: x.square() if x.__class__.__name__ == "Tensor" else sum(x),
    "attribute": by_attribute,
    "key": by_key,
    "computed": by_a_module_that_returns_two,
    "unchanged": by_an_identity,
}


@pytest.mark.parametrize("look", LOOKS)
def test_forwards_that_look_at_the_type_of_their_argument(look: str) -> None:
    plain = Looking(LOOKS[look]).double()
    fused = fasttricks.fuse(copy.deepcopy(plain))
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    for given in (x, (x, x + 1), [x, x + 1], {"a": x, "b": x + 1}, x.as_subclass(Twice), OrderedDict(a=x)):
        outcomes = []
        for model in (plain, fused):
            try:
                outcomes.append(model(given))
            except (TypeError, AttributeError, LookupError, ValueError, RuntimeError):
                outcomes.append(None)
        want, got = outcomes
        assert (want is None) == (got is None), given
        if want is not None:
            assert relative_error(got, want) < 1e-10


def by_a_convolution(block: nn.Module, x: Any) -> torch.Tensor:
    y = block.split(x)
    return y if isinstance(y, torch.Tensor) else y[0]


def taken_and_compiled(plain: nn.Module, x: torch.Tensor) -> nn.Module:
    """A fused copy, whose pair has run as one op, and compiled as one graph with the same result."""
    fused = fasttricks.fuse(copy.deepcopy(plain))
    with counted() as calls:
        fused(x)
    assert calls["bn_relu"] == 1
    assert relative_error(torch.compile(fused, backend="eager", fullgraph=True)(x), plain(x)) < 1e-5
    return fused


def test_a_module_of_torch_that_is_replaced_by_one_that_returns_two() -> None:
    plain = Looking(by_a_convolution)
    plain.split = nn.Sequential(nn.Identity(), nn.Conv2d(3, 3, 1))
    x = torch.randn(2, 3, 5, 4)
    fused = taken_and_compiled(plain, x)
    plain.split = fused.split = Split()
    assert relative_error(fused(x), plain(x)) < 1e-6


class Annotated(nn.Module):
    """A user's module whose forward is annotated with a tensor, rightly unless told otherwise."""

    def __init__(self, right: bool = True) -> None:
        super().__init__()
        self.right = right

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if self.right else (x, x)  # type: ignore[return-value]


def test_an_annotation_says_what_a_module_of_the_user_returns() -> None:
    """As timm's FeatureListNet needs it. A wrong one is an error, and a module without one is asked."""
    plain = Looking(by_a_convolution)
    plain.split = nn.Sequential(Annotated(), Annotated())
    x = torch.randn(2, 3, 5, 4)
    fused = taken_and_compiled(plain, x)
    fused.split[1].right = False
    with pytest.raises(TypeError, match="split returned a tuple; accepted: a tensor, as its forward or the annotation"):
        fused(x)
    plain.split = fused.split = Split()
    assert relative_error(fused(x), plain(x)) < 1e-6


class Residual(nn.Module):
    """Says nothing of what it returns."""

    def __init__(self, end: str) -> None:
        super().__init__()
        self.conv, self.relu, self.end = nn.Conv2d(3, 3, 1), nn.ReLU(), end

    def forward(self, x):  # type: ignore[no-untyped-def]
        y = self.conv(x)
        if self.end == "module":
            return self.relu(y)
        if self.end == "sum":
            return x + y
        if self.end == "augmented":
            y += x
            return y
        if self.end == "function":
            return F.relu(y)
        if self.end == "two":
            return y, x
        return [y, x] if self.end == "list" else x


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("end", "known"),
    [("module", 1), ("sum", 1), ("augmented", 1), ("function", 1), ("two", 0), ("list", 0), ("argument", 0)],
)
def test_the_end_of_a_forward_says_what_a_module_of_the_user_returns(end: str, known: int, nested: bool) -> None:
    plain = Looking(by_a_convolution)
    plain.split = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(Residual(end)) if nested else Residual(end))
    fused = fasttricks.fuse(copy.deepcopy(plain))
    x = torch.randn(2, 3, 5, 4)
    with counted() as calls:
        assert relative_error(fused(x), plain(x)) < 1e-5
    assert calls["bn_relu"] == known
    fused.split[1] = plain.split[1] = Split()
    assert relative_error(fused(x), plain(x)) < 1e-5


def cautiously(block: nn.Module, x: Any) -> torch.Tensor:
    y = block.split(x)
    try:
        return y[0] if isinstance(y, tuple) else y
    except Exception:
        return x


def cautiously_by_value(_: nn.Module, x: Any) -> torch.Tensor:
    try:
        return x.square() if x.sum() > -1e9 else x
    except Exception:
        return x


def cautiously_by_length(_: nn.Module, x: Any) -> torch.Tensor:
    try:
        return x.square() if len(x) > 1 else x
    except Exception:
        return x


def cautiously_by_item(_: nn.Module, x: Any) -> torch.Tensor:
    try:
        return torch.stack([row.square() for row in x])
    except Exception:
        return x


@pytest.mark.parametrize("look", [cautiously, cautiously_by_value, cautiously_by_length, cautiously_by_item])
@pytest.mark.parametrize("end", ["two", "module"])
def test_a_forward_that_catches_every_exception(look: Callable[[nn.Module, Any], torch.Tensor], end: str) -> None:
    plain = Looking(look)
    plain.split = Residual(end)
    fused = fasttricks.fuse(copy.deepcopy(plain))
    x = torch.randn(2, 3, 5, 4)
    assert relative_error(fused(x), plain(x)) < 1e-6


def test_a_maximum_pool_returns_a_tensor_or_two() -> None:
    for indices, known in ((False, 1), (True, 0)):
        plain = Looking(by_a_convolution)
        plain.split = nn.MaxPool2d(2, return_indices=indices)
        fused = fasttricks.fuse(copy.deepcopy(plain))
        x = torch.randn(2, 3, 6, 4)
        with counted() as calls:
            assert relative_error(fused(x), plain(x)) < 1e-5
        assert calls["bn_relu"] == known


def test_a_block_that_takes_a_tensor_or_a_tuple_is_fused() -> None:
    fused = fasttricks.fuse(Looking(LOOKS["tuple"]))
    x = torch.randn(2, 3, 5, 4)
    for given in (x, (x, x)):
        with counted() as calls:
            fused(given)
        assert calls["bn_relu"] == 1


def test_graphs_that_are_edited_after_fusing() -> None:
    """recompile() makes the module of the graph that it has now; the next fuse sees that graph. Pickles are its own."""
    x = torch.randn(2, 3, 7, 5)
    fused, plain = (torch.fx.symbolic_trace(network()) for _ in range(2))
    plain.load_state_dict(fused.state_dict())
    assert fasttricks.fuse(fused).recompile() is not None
    assert not any(row.fused for row in fasttricks.fusions(fused))
    fasttricks.fuse(fused)
    for model in (fused, plain):
        node = next(n for n in model.graph.nodes if n.target == "1")
        with model.graph.inserting_after(node):
            doubled = model.graph.call_function(torch.mul, (node, 2.0))
        node.replace_all_uses_with(doubled, lambda user, doubled=doubled: user is not doubled)
        model.recompile()
    assert relative_error(fused(x), plain(x)) < 1e-6
    assert not fasttricks.fusions(fasttricks.fuse(fused)).fused
    loaded = pickle.loads(pickle.dumps(fasttricks.fuse(torch.fx.symbolic_trace(network()))))
    assert fasttricks.fusions(fasttricks.fuse(loaded)).counts == {"bn_relu": 1}


def test_meta() -> None:
    model = fasttricks.fuse(network().to("meta"), recompute=True)
    y = model(torch.empty(2, 3, 7, 5, device="meta", requires_grad=True))
    y.sum().backward()
    assert y.shape == (2, 2, 5, 3)


class Activated(nn.Module):
    """Its forward uses names of this file."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x)) if x.dim() == 4 else self.relu(x)


@pytest.mark.parametrize("make", [network, lambda: nn.Sequential(Activated()), timm_net, torchvision_net])
def test_scripting_a_fused_model_gives_the_plain_one(make: Callable[[], nn.Module]) -> None:
    plain = make().double()
    x = torch.randn(2, 3, 18, 18, dtype=torch.float64)
    for options in ({}, {"recompute": True}):
        fused = fasttricks.fuse(copy.deepcopy(plain), **options)
        with fasttricks.unfused(fused):
            within = torch.jit.script(fused)
        assert relative_error(within(x), copy.deepcopy(plain)(x)) < 1e-10
        fused.load_state_dict(plain.state_dict())  # the scripted module has the same buffers
        scripted = torch.jit.script(fused)
        for mode in (True, False):
            twin = copy.deepcopy(plain).train(mode)
            assert relative_error(scripted.train(mode)(x), twin(x)) < 1e-10
            scripted.load_state_dict(plain.state_dict())
        assert relative_error(torch.jit.trace(fused.eval(), x)(x), copy.deepcopy(plain).eval()(x)) < 1e-10


def quantised(model: nn.Module, x: torch.Tensor, fused: str) -> torch.Tensor:
    """The output after static quantisation, with `fuse` called before, between or after its steps, or never."""
    steps = nn.Sequential(quantization.QuantStub(), *copy.deepcopy(model), quantization.DeQuantStub()).eval()
    steps.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    if fused == "before":
        fasttricks.fuse(steps)
    quantization.prepare(steps, inplace=True)
    if fused == "between":
        fasttricks.fuse(steps)
        assert not fasttricks.fusions(steps).fused
    steps(x)
    steps = quantization.convert(steps)
    if fused == "after":
        fasttricks.fuse(steps)
    return steps(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("fused", ["before", "between", "after"])
def test_quantisation_is_as_without(fused: str) -> None:
    model, x = network(), torch.randn(2, 3, 9, 9)
    assert torch.equal(quantised(model, x, fused), quantised(model, x, "never"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_models_made_for_quantisation_are_left() -> None:
    models = pytest.importorskip("torchvision.models.quantization")
    model = models.resnet18(quantize=False, num_classes=3)
    before = [type(m) for m in model.modules()]
    reasons = {row.name: row.reason for row in fasttricks.fusions(fasttricks.fuse(model))}
    assert reasons["bn1"] == reasons["layer1.0.bn2"] == "its block is made for quantisation"
    assert [type(m) for m in model.modules()] == before
    with pytest.raises(ValueError, match=r"strict is True(.|\n)*layer1\.0\.bn1 .*made for quantisation"):
        fasttricks.fuse(model, strict=True)
    model.train()
    model.fuse_model(is_qat=True)  # torchvision's own, which tests for exact classes
    model.qconfig = quantization.get_default_qat_qconfig(torch.backends.quantized.engine)
    fasttricks.fuse(quantization.prepare_qat(model))(torch.randn(2, 3, 32, 32)).sum().backward()
