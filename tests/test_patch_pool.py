"""A block of a ResNet-D hands the 2x2 means of its output to the shortcut of the next stage; nothing else changes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fasttricks
from fasttricks import backends
from fasttricks.models import ResNet
from fasttricks.nn import AvgPoolConv1x1, BatchNormAddReLU2d
from fasttricks.ops import pooled_output, second_gradient

Taken = list[Tensor]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    """The means that shortcuts took, on the CPU in every dtype."""
    found: Taken = []
    original = pooled_output.taken

    def counted(*given: Any) -> Tensor | None:
        means = original(*given)
        if means is not None:
            found.append(means)
        return means

    monkeypatch.setitem(backends.MEANS_HANDED_ON, "cpu", DTYPES)
    monkeypatch.setattr(pooled_output, "taken", counted)
    return found


def own(depth: int = 18) -> tuple[nn.Module, nn.Module]:
    """A fused model and one of torch's modules with the same weights."""
    fused = ResNet(depth, "d", num_classes=3, width=4).double()
    plain = ResNet(depth, "d", num_classes=3, width=4, fused=False).double()
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def of_timm(name: str = "resnet18d") -> tuple[nn.Module, nn.Module]:
    options = {"resnet18d": {"channels": (8, 16, 24, 32)}, "resnet26d": {"channels": (4, 8, 12, 16)}}[name]
    plain = timm.create_model(name, num_classes=3, **options).double()
    return fasttricks.fuse(copy.deepcopy(plain)), plain


MODELS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "own 18": own,
    "own 50": lambda: own(50),
    "timm 18": of_timm,
    "timm 26": lambda: of_timm("resnet26d"),
}
every_model = pytest.mark.parametrize("name", MODELS)
two_models = pytest.mark.parametrize("name", ["own 18", "timm 18"])


def images(height: int = 33, width: int = 45) -> Tensor:
    """Of a size whose stages have odd ones. The last statistics are of 16 values: those of fewer enlarge rounding."""
    return torch.randn(4, 3, height, width).double()


def results(model: nn.Module, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> list[Tensor]:
    """The output, the gradients of a loss and the running statistics."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x) if call is None else call(model, x)
    y.square().sum().backward()
    assert x.grad is not None
    return [y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


def assert_equal(got: list[Tensor], want: list[Tensor], bound: float = 1e-10) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b.double()) < bound


def blocks(model: nn.Module) -> tuple[Any, Any]:
    """The last block of the first stage, and the first one of the second, which pools its input."""
    return model.layer1[-1], model.layer2[0]


@every_model
def test_equal_to_unfused(name: str, taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three stages take means, and hand their gradients over in their size."""
    handed: list[Tensor] = []
    give = second_gradient.give
    monkeypatch.setattr(second_gradient, "give", lambda node, g: (handed.append(g), give(node, g)))
    fused, plain = MODELS[name]()
    x = images()
    for _ in range(2):
        taken.clear(), handed.clear()
        assert_equal(results(fused, x), results(plain, x))
        assert len(taken) == 3
        assert {t.shape for t in taken} <= {g.shape for g in handed}
    fused.eval(), plain.eval()
    taken.clear()
    assert_equal(results(fused, x), results(plain, x))
    assert len(taken) == 3
    want = fused(x)
    with torch.no_grad():
        assert torch.equal(fused(x), want)


@pytest.mark.usefixtures("raw_ops")
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_modules_on_every_backend(layout: torch.memory_format, ceil_mode: bool, taken: Taken) -> None:
    """The end of a block, whose output a convolution and a shortcut read."""
    x, residual = (torch.randn(2, 3, 5, 4).double().contiguous(memory_format=layout) for _ in range(2))
    norm, shortcut = BatchNormAddReLU2d(3).double(), AvgPoolConv1x1(3, 4, ceil_mode=ceil_mode).double()
    conv = nn.Conv2d(3, 2, 1).double()
    found = []
    for norm.ceil_mode_of_reader in (ceil_mode, None):
        given = [t.clone().requires_grad_() for t in (x, residual)]
        y = norm(*given)
        outputs = [conv(y), shortcut(y)]
        sum(t.square().sum() for t in outputs).backward()
        found.append([*outputs, *(t.grad for t in given)])
    assert len(taken) == 1
    assert_equal(*found)


@two_models
def test_only_where_it_is_faster(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.MEANS_HANDED_ON, "cpu", ())
    attached: Taken = []
    monkeypatch.setattr(pooled_output, "attach", lambda y, *rest: attached.append(y))
    fused, plain = MODELS[name]()
    x = images()
    assert_equal(results(fused, x), results(plain, x))
    assert not attached


@two_models
def test_a_second_pass_has_the_same_bits(name: str, taken: Taken) -> None:
    """What earlier calls did plays no role."""
    fused, _ = MODELS[name]()
    again, x = copy.deepcopy(fused), images()
    for call in (lambda: fused(x).sum().backward(), lambda: fused.eval()(x), lambda: fused(x[:1, :, :30])):
        call()
    fused.train().load_state_dict(again.state_dict())
    for a, b in zip(results(fused, x), results(again, x), strict=True):
        assert torch.equal(a, b)


@two_models
def test_copies_pickles_and_state_dicts(name: str, taken: Taken) -> None:
    fused, plain = MODELS[name]()
    assert list(fused.state_dict()) == list(plain.state_dict())
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    x = images()
    want = results(plain, x)
    for model, count in ((copy.deepcopy(fused), 3), (torch.load(buffer, weights_only=False), 3 * (name == "own 18"))):
        taken.clear()
        assert_equal(results(model, x), want)
        assert len(taken) == count


def test_unfuse_restores_the_classes(taken: Taken) -> None:
    fused, plain = of_timm()
    before = [type(m) for m in plain.modules()]
    with fasttricks.unfused(fused):
        assert [type(m) for m in fused.modules()] == before
    fasttricks.fuse(fused)
    results(fused, images())
    assert len(taken) == 3
    fasttricks.unfuse(fused)
    assert [type(m) for m in fused.modules()] == before
    x = images()
    plain.load_state_dict(fused.state_dict())
    assert_equal(results(fused, x), results(plain, x))
    assert len(taken) == 3


def test_pairs_that_are_not_wanted_hand_nothing_on(taken: Taken) -> None:
    _, plain = of_timm()
    for options in (
        {"bn_add_relu": False},
        {"avgpool_conv1x1": False},
        {"filter_fn": lambda module, name: not (name.startswith("layer1") or name.startswith(("layer3", "layer4")))},
    ):
        x = images()
        assert_equal(results(fasttricks.fuse(copy.deepcopy(plain), **options), x), results(copy.deepcopy(plain), x))
    assert not taken


# ---- whoever comes between the two blocks is honoured ----


def returns_another(module: nn.Module, given: Any, y: Tensor) -> Tensor:
    return 2 * y


def changes_in_place(module: nn.Module, given: Any, y: Tensor) -> None:
    with torch.no_grad():
        y.mul_(2)


def puts_other_memory(module: nn.Module, given: Any, y: Tensor) -> None:
    y.data = 2 * y.data


@pytest.mark.parametrize("hook", [returns_another, changes_in_place, puts_other_memory])
@pytest.mark.parametrize("where", ["block", "stage"])
@two_models
def test_hooks_that_change_the_output(name: str, where: str, hook: Callable[..., Any], taken: Taken) -> None:
    fused, plain = MODELS[name]()
    for model in (fused, plain):
        (model.layer1[-1] if where == "block" else model.layer1).register_forward_hook(hook)
    x = images()
    with torch.no_grad():
        assert_equal([fused(x)], [plain(x)])
    assert len(taken) == 2


@pytest.mark.parametrize("look", ["hook", "retain", "grad"])
@two_models
def test_whoever_looks_at_the_gradient_sees_the_whole_of_it(name: str, look: str, taken: Taken) -> None:
    seen: list[list[Tensor]] = []
    x = images()
    for model in MODELS[name]():
        found: list[Tensor] = []
        outputs: list[Tensor] = []

        def keep(module: nn.Module, given: Any, y: Tensor, outputs: list[Tensor] = outputs) -> None:
            outputs.append(y)

        blocks(model)[0].register_forward_hook(keep)
        loss = model(x).square().sum()
        if look == "grad":
            found += torch.autograd.grad(loss, outputs)
        elif look == "hook":
            outputs[0].register_hook(found.append)
            loss.backward()
        else:
            outputs[0].retain_grad()
            loss.backward()
            found.append(outputs[0].grad)
        seen.append(found)
    assert len(taken) == 3
    assert_equal(*seen)


def replaced_shortcut(model: nn.Module) -> None:
    conv, norm = list(blocks(model)[1].downsample)[-2:]
    kernel = torch.linspace(-1, 1, conv.weight.numel()).double().view(conv.out_channels, conv.in_channels, 1, 1)
    other = nn.Conv2d(conv.in_channels, conv.out_channels, 1, stride=2, bias=False).double()
    other.weight.data = kernel
    blocks(model)[1].downsample = nn.Sequential(other, norm)


def replaced_block(model: nn.Module) -> None:
    model.layer1[-1] = nn.Identity()


def frozen_shortcut(model: nn.Module) -> None:
    for parameter in blocks(model)[1].downsample.parameters():
        parameter.requires_grad = False


def frozen_stage(model: nn.Module) -> None:
    for parameter in model.layer1.parameters():
        parameter.requires_grad = False


def other_activation(model: nn.Module) -> None:
    blocks(model)[0].register_forward_hook(lambda module, given, y: F.silu(y))


def evaluated_stage(model: nn.Module) -> None:
    model.layer1.eval()


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (replaced_shortcut, 2),
        (replaced_block, 2),
        (frozen_shortcut, 3),
        (frozen_stage, 3),
        (other_activation, 2),
        (evaluated_stage, 3),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@two_models
def test_models_that_are_changed_later(
    name: str, change: Callable[[nn.Module], None], count: int, taken: Taken
) -> None:
    fused, plain = MODELS[name]()
    change(fused), change(plain)
    x = images()
    assert_equal(results(fused, x), results(plain, x))
    assert len(taken) == count


def test_another_ceil_mode_than_at_fusion(taken: Taken) -> None:
    fused, plain = of_timm()
    for model in (fused, plain):
        blocks(model)[1].downsample[0].ceil_mode = False
    x = images(64, 64)
    assert_equal(results(fused, x), results(plain, x))
    assert len(taken) == 2


# ---- under other tools ----


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("parts", ["stages", "blocks"])
@two_models
def test_checkpointing(name: str, parts: str, reentrant: bool, taken: Taken) -> None:
    def call(model: nn.Module, x: Tensor) -> Tensor:
        stages = (model.layer1, model.layer2, model.layer3, model.layer4)
        x = model.maxpool(F.relu(model.bn1(model.conv1(x))))
        for part in stages if parts == "stages" else [block for stage in stages for block in stage]:
            x = checkpoint(part, x, use_reentrant=reentrant)
        return model.fc(x.mean((2, 3)))

    fused, plain = MODELS[name]()
    x = images()
    got, want = (results(model, x, call)[:-1] for model in (fused, plain))
    got, want = ([t for t in group if t.is_floating_point()] for group in (got, want))
    assert_equal(got, want)
    assert len(taken) >= 3


@two_models
def test_second_derivatives(name: str, taken: Taken) -> None:
    x, seen = images(), []
    for model in MODELS[name]():
        model.eval()
        given = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(model(given).square().sum(), given, create_graph=True)
        parameters = list(model.parameters())
        grads = torch.autograd.grad(dx.square().sum(), parameters, allow_unused=True)
        seen.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)])
    assert_equal(*seen, bound=1e-8)
    assert len(taken) == 3


@two_models
def test_recomputation_gives_the_same_bits(name: str, taken: Taken) -> None:
    fused, _ = MODELS[name]()
    again, x = copy.deepcopy(fused), images()
    got = results(fused, x)

    def call(model: nn.Module, x: Tensor) -> Tensor:
        with fasttricks.recompute():
            return model(x)

    for a, b in zip(results(again, x, call), got, strict=True):
        assert torch.equal(a, b)
    assert len(taken) == 6


@two_models
def test_autocast(name: str, taken: Taken) -> None:
    fused, plain = (model.float() for model in MODELS[name]())
    x = images().float()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = fused(x), plain(x)
    assert {t.dtype for t in taken} == {torch.bfloat16}
    assert relative_error(got, want.double()) < 0.1
    got.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fused.parameters())


def test_compiled_models_take_the_usual_road(taken: Taken) -> None:
    fused, plain = own()
    x = images()
    torch._dynamo.reset()
    assert_equal([torch.compile(fused, fullgraph=True, backend="aot_eager")(x)], [plain(x)])
    assert not taken


@two_models
def test_inference_mode_export_and_traces(name: str, taken: Taken) -> None:
    fused, plain = (model.eval() for model in MODELS[name]())
    x = images()
    with torch.inference_mode():
        assert_equal([fused(x)], [plain(x)])
    with torch.no_grad():
        assert_equal([torch.jit.trace(fused, x, check_trace=False)(x)], [plain(x)])
        assert_equal([torch.export.export(fused, (x,)).module()(x)], [plain(x)])
    assert not taken


@pytest.fixture
def reader() -> tuple[Tensor, Tensor]:
    """The output of a block, and a weight of a convolution that reads its means."""
    y = torch.relu(torch.randn(2, 3, 5, 5, requires_grad=True))
    return y, torch.randn(4, 3, 1, 1, requires_grad=True)


def test_the_means_are_those_of_this_tensor(reader: tuple[Tensor, Tensor]) -> None:
    y, weight = reader
    means = F.avg_pool2d(y.detach(), 2, ceil_mode=True)
    pooled_output.attach(y, means, True)
    found = pooled_output.taken(y, True, weight)
    assert found is not None
    assert torch.equal(found, means)
    assert pooled_output.taken(y, False, weight) is None
    assert pooled_output.taken(y, True, weight.double()) is None
    for other in (y.detach(), y * 1, y.view_as(y), copy.copy(y.detach())):
        assert pooled_output.taken(other, True, weight) is None
    y.mul_(2)
    assert pooled_output.taken(y, True, weight) is None


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_the_gradient_of_means_that_no_node_receives(size: tuple[int, int], ceil_mode: bool) -> None:
    """It is spread, and can be differentiated."""
    x = torch.randn(2, 3, *size).double().requires_grad_()
    weight = torch.randn(4, 3, 1, 1).double().requires_grad_()

    def f(x: Tensor, weight: Tensor) -> Tensor:
        y = x.sin()
        pooled_output.attach(y, F.avg_pool2d(y, 2, ceil_mode=ceil_mode), ceil_mode)
        means = pooled_output.taken(y, ceil_mode, weight)
        assert means is not None
        return F.conv2d(means, weight)

    assert torch.autograd.gradcheck(f, (x, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, weight), fast_mode=True)
