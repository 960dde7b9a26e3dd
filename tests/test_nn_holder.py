"""The modules under tools that look for BatchNorms and convolutions: values and names are kept."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fasttricks import avgpool_conv1x1, bn_add_relu, bn_relu
from fasttricks.nn import AvgPoolConv1x1, BatchNormAddReLU2d, BatchNormReLU2d


class Net(nn.Module):
    """A network with all three modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = BatchNormReLU2d(6)
        self.down = AvgPoolConv1x1(6, 8)
        self.bn2 = BatchNormAddReLU2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(self.bn1(self.conv(x)))
        return self.bn2(y, y * 0.5)


class Plain(nn.Module):
    """The same network with torch's modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.down = nn.Conv2d(6, 8, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(F.avg_pool2d(F.relu(self.bn1(self.conv(x))), 2))
        return F.relu(self.bn2(y) + y * 0.5)


def nets() -> tuple[Net, Plain]:
    plain = Plain()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(t)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    ours = Net()
    ours.load_state_dict(plain.state_dict())
    return ours, plain


def test_names_are_those_of_torch() -> None:
    ours, plain = nets()
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in plain.named_buffers()]
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert len(list(ours.parameters())) == len(list(plain.parameters()))
    assert ours.state_dict()._metadata["bn1"] == plain.state_dict()._metadata["bn1"]
    assert sum(isinstance(m, _BatchNorm) for m in ours.modules()) == 2
    assert sum(isinstance(m, nn.Conv2d) for m in ours.modules()) == 2


def test_state_dicts_load_strictly_and_errors_name_torchs_keys() -> None:
    ours, plain = nets()
    plain.load_state_dict(ours.state_dict())
    state = OrderedDict(plain.state_dict())
    del state["bn1.weight"]
    state["bn2.scale"] = torch.zeros(1)
    result = ours.load_state_dict(state, strict=False)
    assert result.missing_keys == ["bn1.weight"]
    assert result.unexpected_keys == ["bn2.scale"]
    state = plain.state_dict()
    state["down.weight"] = torch.zeros(8, 7, 1, 1)
    with pytest.raises(RuntimeError, match=r"size mismatch for down\.weight"):
        ours.load_state_dict(state)
    assert not [key for key in state if "norm" in key]
    single = BatchNormReLU2d(6)
    single.load_state_dict(plain.bn1.state_dict(), assign=True)
    assert torch.equal(single.weight, plain.bn1.weight)
    assert single.weight is single.norm.weight


MOVES: dict[str, Callable[[nn.Module], Any]] = {
    "double": lambda m: m.double(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "to_empty": lambda m: copy.deepcopy(m).to("meta").to_empty(device="cpu"),
    "requires_grad_": lambda m: m.requires_grad_(False),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=list(MOVES))
def test_holder_and_child_keep_the_same_tensors(move: Callable[[nn.Module], Any]) -> None:
    moved = move(Net())
    for module, child in ((moved.bn1, moved.bn1.norm), (moved.bn2, moved.bn2.norm), (moved.down, moved.down.conv)):
        assert module._parameters is child._parameters
        assert module._buffers is child._buffers
        assert module.weight is child.weight


class Frozen(nn.Module):
    """A BatchNorm with fixed statistics, like those of detection libraries."""

    def __init__(self, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(bn, name).detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def replaced(module: nn.Module, make: Callable[[nn.Module], nn.Module], assign: str) -> nn.Module:
    """Replaces every BatchNorm in place, found by its class, as Apex and detection libraries do."""
    if isinstance(module, _BatchNorm):
        return make(module)
    for name, child in module.named_children():
        new = replaced(child, make, assign)
        if new is not child:
            setattr(module, name, new) if assign == "setattr" else module.add_module(name, new)
    return module


@pytest.mark.parametrize("assign", ["setattr", "add_module"])
def test_a_replaced_batchnorm_keeps_its_relu(assign: str) -> None:
    ours, plain = (replaced(net, Frozen, assign) for net in nets())
    x = torch.randn(2, 3, 8, 8)
    assert (ours(x) >= 0).all()
    assert relative_error(ours(x), plain(x)) < 1e-5
    assert set(ours.state_dict()) == set(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
    ours.load_state_dict(plain.state_dict())


def test_torchs_conversion_keeps_the_relu() -> None:
    ours, plain = nets()
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert type(ours.bn1) is BatchNormReLU2d
    assert type(ours.bn1.norm) is nn.SyncBatchNorm
    x = torch.randn(4, 3, 8, 8)
    assert relative_error(ours(x), plain(x)) < 1e-5
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert relative_error(ours.eval()(x), plain.eval()(x)) < 1e-5
    single = nn.SyncBatchNorm.convert_sync_batchnorm(BatchNormReLU2d(3))
    assert type(single) is BatchNormReLU2d


def test_timms_tools_keep_the_relu() -> None:
    layers = pytest.importorskip("timm.layers")
    x = torch.randn(2, 3, 8, 8)
    for convert in (layers.freeze_batch_norm_2d, layers.convert_sync_batchnorm):
        ours, plain = (net.eval() for net in nets())
        ours = convert(ours)
        assert type(ours.bn1) is BatchNormReLU2d
        assert relative_error(ours.eval()(x), plain(x)) < 1e-5


def test_update_bn_and_weight_decay_groups_find_the_batchnorms() -> None:
    ours, plain = nets()
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    for net in (ours, plain):
        torch.optim.swa_utils.update_bn(batches, net)
    for (name, got), want in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        assert relative_error(got.double(), want.double()) < 1e-5, name
    assert ours.bn1.momentum == 0.1
    # as torchvision's references split them: parameters of normalisation layers by the class of the module
    norms = [p for m in ours.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)]
    others = [p for m in ours.modules() if not isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)]
    assert sorted(map(len, (norms, others))) == [3, 4]
    torch.optim.SGD([{"params": norms, "weight_decay": 0.0}, {"params": others}], lr=0.1)


def test_mode_options_and_hooks_of_the_child_apply() -> None:
    ours, plain = nets()
    x = torch.randn(4, 3, 8, 8)
    for net in (ours, plain):
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                module.eps = 0.1
    assert relative_error(ours(x), plain(x)) < 1e-5
    ours.bn1.eps = 0.2
    assert ours.bn1.norm.eps == 0.2
    calls: list[int] = []
    ours.bn1.norm.register_forward_hook(lambda m, a, out: calls.append(1))
    ours(x)
    assert calls == [1]


def test_functional_call_swaps_parameters() -> None:
    ours, plain = nets()
    other = {name: torch.randn_like(p) for name, p in plain.named_parameters()}
    x = torch.randn(2, 3, 8, 8)
    got, want = (torch.func.functional_call(net.eval(), other, (x,)) for net in (ours, plain))
    assert relative_error(got, want) < 1e-5


def test_modules_are_leaves_of_torch_fx() -> None:
    ours, _ = nets()
    graph = fx.symbolic_trace(ours)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["conv", "bn1", "down", "bn2"]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(graph.eval()(x), ours.eval()(x))
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    assert "bn1" in extraction.create_feature_extractor(ours, ["bn1", "bn2"])(x)


class Functional(nn.Module):
    """A model that calls the ops as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.norm
        y = bn_relu(x, norm.weight, norm.bias, norm.running_mean, norm.running_var, training=False)
        y = bn_add_relu(y, x, norm.weight, norm.bias, eps=1e-3)
        return avgpool_conv1x1(y, self.conv.weight, self.conv.bias, ceil_mode=True)


def test_functions_are_nodes_of_torch_fx() -> None:
    model, x = Functional(), torch.randn(2, 3, 5, 7)
    graph = fx.symbolic_trace(model)
    called = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert called == [bn_relu, bn_add_relu, avgpool_conv1x1]
    for traced in (graph, pickle.loads(pickle.dumps(graph)), fx.symbolic_trace(graph)):
        assert torch.equal(traced(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dynamo", [True, False])
def test_functions_are_exported_as_plain_operations(dynamo: bool) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = Functional().eval(), torch.randn(2, 3, 5, 7)
    nn.init.normal_(model.norm.running_mean)
    exported = torch.export.export(model, (x,))
    assert not [n for n in exported.graph.nodes if "fasttricks" in str(n.target)]
    torch.testing.assert_close(exported.module()(x), model(x))
    file = io.BytesIO()
    if dynamo:
        torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(file)
    else:
        torch.onnx.export(model, (x,), file, dynamo=False)
    session = runtime.InferenceSession(file.getvalue())
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative_error(torch.from_numpy(got), model(x)) < 1e-4


def test_modules_can_wrap_existing_ones() -> None:
    bn = nn.BatchNorm2d(6, eps=0.1).eval()
    module = BatchNormReLU2d.from_bn(bn)
    assert module.norm is bn
    assert module.weight is bn.weight
    assert not module.training
    x = torch.randn(2, 6, 4, 4)
    assert relative_error(module(x), F.relu(bn(x))) < 1e-6
    with pytest.raises(TypeError, match=r"bn is a GroupNorm; accepted: nn\.BatchNorm2d"):
        BatchNormAddReLU2d.from_bn(nn.GroupNorm(2, 6))
    pool, conv = nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(6, 4, 1)
    shortcut = AvgPoolConv1x1.from_pool_conv(pool, conv)
    x = torch.randn(2, 6, 5, 5)
    assert shortcut.bias is conv.bias
    assert relative_error(shortcut(x), conv(pool(x))) < 1e-5
    with pytest.raises(ValueError, match="accepted: a 2x2 pool"):
        AvgPoolConv1x1.from_pool_conv(nn.AvgPool2d(3), conv)


def test_use_as_norm_layer_of_a_model_zoo_is_refused() -> None:
    models = pytest.importorskip("torchvision.models")
    for name in ("resnet18", "mobilenet_v2"):
        with pytest.raises(TypeError, match=r"norm_layer=BatchNormReLU2d.*fasttricks\.fuse\(model\)"):
            models.get_model(name, norm_layer=BatchNormReLU2d)
    timm = pytest.importorskip("timm")

    def made(channels: int, **options: Any) -> nn.Module:
        return BatchNormReLU2d(channels)

    for layer in (BatchNormReLU2d, functools.partial(BatchNormReLU2d, eps=1e-3), lambda *a, **k: made(*a, **k), made):
        for build, name in (
            (models.get_model, "resnet34"),
            (timm.create_model, "resnet26"),
            (timm.create_model, "seresnet18"),
        ):
            with pytest.raises(TypeError, match=r"^norm_layer=.*fasttricks\.fuse\(model\)"):
                build(name, norm_layer=layer)

    class Block(models.resnet.BasicBlock):
        """A block of one's own may hold one."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.bn1, self.relu = BatchNormReLU2d(self.bn1.num_features), nn.ReLU()

    model = models.ResNet(Block, [1, 1, 1, 1], num_classes=3)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_scripting_is_refused_and_tracing_works() -> None:
    with pytest.raises(NotImplementedError, match=r"torch\.export and torch\.jit\.trace can"):
        torch.jit.script(Net())
    ours, plain = (net.eval() for net in nets())
    x = torch.randn(2, 3, 8, 8)
    assert relative_error(torch.jit.trace(ours, x)(x), plain(x)) < 1e-5


def test_exported_programs_hold_plain_operations() -> None:
    ours, plain = (net.eval() for net in nets())
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(ours, (x,))
    assert not [n for n in program.graph.nodes if "fasttricks" in str(n.target)]
    assert relative_error(program.module()(x), plain(x)) < 1e-5


def test_onnx_agrees_with_onnxruntime() -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    ours, plain = (net.eval() for net in nets())
    x = torch.randn(2, 3, 8, 8)
    file = io.BytesIO()
    torch.onnx.export(ours, (x,), dynamo=True, verbose=False).save(file)
    session = runtime.InferenceSession(file.getvalue())
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative_error(torch.from_numpy(got), plain(x)) < 1e-5


def test_functional_call_leaves_the_module_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormReLU2d(4), AvgPoolConv1x1(4, 2)).eval()
    x, before = torch.randn(2, 3, 6, 6), dict(model.named_parameters())
    other = {name: torch.randn_like(p) for name, p in before.items()}
    got = torch.func.functional_call(model, other, (x,))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    model.load_state_dict(other, strict=False)
    torch.testing.assert_close(got, model(x))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_functionalize_changes_running_statistics(mode: bool) -> None:
    """Running statistics change whether or not they are arguments of the function."""
    ours, plain = (net.double().train(mode) for net in nets())
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    assert relative_error(torch.func.functionalize(ours)(x), plain(x)) < 1e-10
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())

    def results(net: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        state = {name: t.clone() for name, t in net.state_dict().items()}

        def loss(x: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(net, state, (x,)).square().sum()

        return torch.func.functionalize(torch.func.grad(loss))(x, state), state

    torch.testing.assert_close(results(ours), results(plain))


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_statistics_of_several_ranks_have_no_transforms(one_rank: None) -> None:
    """Of collectives there are no derivatives under torch.func; a converted model can be evaluated there."""
    from torch import func
    from torch.autograd import forward_ad

    group, x = torch.distributed.group.WORLD, torch.randn(3, 4, 2, 2)
    apply: Callable[[torch.Tensor], torch.Tensor] = lambda x: bn_relu(x, group=group)  # noqa: E731
    for transformed in (func.grad(lambda x: apply(x).sum()), func.vmap(apply), lambda x: func.jvp(apply, (x,), (x,))):
        with pytest.raises(RuntimeError, match=r"bn_relu: group is given within torch\.func or .*accepted"):
            transformed(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no rules for collectives"):
        bn_add_relu(forward_ad.make_dual(x, x), x, group=group)
    module = BatchNormReLU2d(4, process_group=group).eval()
    torch.testing.assert_close(
        func.jacrev(lambda x: module(x).sum((1, 2, 3)))(x).sum(0), func.grad(lambda x: module(x).sum())(x)
    )


def fully_sharded(net: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for module in net.children():
        fully_shard(module)
    return fully_shard(net)


def flat(use_orig_params: bool) -> Callable[[nn.Module], nn.Module]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return lambda net: FullyShardedDataParallel(net, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


SHARDED = {"FSDP2": fully_sharded, "FSDP1": flat(False), "FSDP1 with the original parameters": flat(True)}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("shard", SHARDED.values(), ids=list(SHARDED))
def test_sharded_parameters_reach_the_child(shard: Callable[[nn.Module], nn.Module], one_rank: None) -> None:
    from torch.distributed.checkpoint import state_dict as checkpoints

    ours, plain = (net.double() for net in nets())
    names = list(plain.state_dict())
    ours = shard(ours)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (ours, plain)]
    for _ in range(3):
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        for net, optimizer in zip((ours, plain), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    state = ours.state_dict()
    assert list(state) == names
    for name, want in plain.state_dict().items():
        got = state[name].full_tensor() if hasattr(state[name], "full_tensor") else state[name]
        assert relative_error(got, want) < 1e-10, name
    # torch.distributed.checkpoint uses the same names
    saved, moments = checkpoints.get_state_dict(ours, optimizers[0])
    assert set(saved) == set(names)
    assert set(moments["state"]) == {name for name, _ in plain.named_parameters()}
    checkpoints.set_state_dict(ours, optimizers[0], model_state_dict=saved, optim_state_dict=moments)


def test_pruning_and_plain_attributes_reach_the_child() -> None:
    from torch.nn.utils import prune

    ours, plain = (net.eval() for net in nets())
    x = torch.randn(2, 3, 8, 8)
    for module in (ours.down, ours.bn1, plain.down, plain.bn1):
        prune.l1_unstructured(module, "weight", 0.5)
    assert relative_error(ours(x), plain(x)) < 1e-5
    for module in (ours.down, ours.bn1, plain.down, plain.bn1):
        prune.remove(module, "weight")
    assert relative_error(ours(x), plain(x)) < 1e-5
    assert list(ours.state_dict()) == list(plain.state_dict())
    del ours.bn1.weight
    assert not hasattr(ours.bn1.norm, "weight")
    ours.bn1.weight = nn.Parameter(torch.ones(6))
    assert ours.bn1.norm.weight is ours.bn1.weight is ours.bn1._parameters["weight"]
