"""Fused models of torchvision's and timm's blocks equal unfused ones under common tools."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import relative_error
from networks import timm_net, torchvision_net, twins
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

import fasttricks

NETS = [torchvision_net, timm_net]
Make = Callable[[], nn.Module]
nets = pytest.mark.parametrize("make", NETS)


def images(n: int = 4, size: int = 18, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, size, size, dtype=dtype)


def step(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one step."""
    model.zero_grad()
    y = run(x)
    y.float().square().sum().backward()
    grads = {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), **grads, **{name: b.clone() for name, b in model.named_buffers()}}


def same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.dtype == want[name].dtype, name
        assert relative_error(value, want[name]) <= tolerance, name


# ---- torch.compile ----


def graphs_of(model: nn.Module, batches: list[Tensor], **options: Any) -> int:
    """How many graphs torch.compile makes for these batches."""
    torch._dynamo.reset()
    made: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        made.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True, **options)
    for x in batches:
        compiled(x).sum().backward()
    return len(made)


def test_a_new_batch_size_compiles_once_more_at_most() -> None:
    fused, _ = twins(torchvision_net())
    assert graphs_of(fused, [images(n) for n in (4, 4, 2, 3, 5)]) == 2  # the second graph has a dynamic size
    assert graphs_of(fused, [images(n) for n in (4, 2, 3)], dynamic=True) == 1
    assert graphs_of(fused.eval(), [images() for _ in range(3)]) == 1


def test_training_steps_do_not_recompile() -> None:
    assert graphs_of(twins(timm_net())[0], [images() for _ in range(3)]) == 1


def test_blocks_that_are_compiled_one_by_one_do_not_share_a_limit() -> None:
    """torch.compile limits how often it compiles one forward: blocks of other classes do not count."""
    torch._dynamo.reset()
    blocks = fasttricks.fuse(nn.ModuleList([nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), torchvision_net()[3]]))
    with torch._dynamo.config.patch(recompile_limit=1):
        for block, channels in zip(blocks, (3, 6), strict=True):
            x = torch.randn(2, channels, 8, 8)
            compiled = torch.compile(block.float(), backend="eager", fullgraph=True)
            assert relative_error(compiled(x), block(x)) < 1e-5


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_inductor_equals_unfused(mode: str) -> None:
    torch._dynamo.reset()
    fused, plain = twins(torchvision_net()[1:4], torch.float32)  # BN, ReLU and a block
    compiled = torch.compile(fused, mode=mode, fullgraph=True)
    for _ in range(2):
        x = torch.randn(4, 6, 8, 8)
        same(step(fused, compiled, x), step(plain, plain, x), 1e-4)


# ---- dtypes and layouts ----


@nets
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_exact_as_unfused(make: Make, dtype: torch.dtype) -> None:
    fused, plain = twins(make(), torch.float32)
    x = images(dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        got, want = fused(x), plain(x)
    assert got.dtype == want.dtype == dtype
    exact = plain(x)
    assert relative_error(got, exact) < 2 * relative_error(want, exact) + torch.finfo(dtype).eps
    got.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in fused.parameters())


@nets
def test_channels_last_is_kept(make: Make) -> None:
    fused, plain = (model.to(memory_format=torch.channels_last) for model in twins(make()))
    seen: list[Tensor] = []
    for module in fused.modules():
        if isinstance(module, nn.Conv2d):  # its input is the batch or the output of a fused pair
            module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x = images().contiguous(memory_format=torch.channels_last)
    same(step(fused, fused, x), step(plain, plain, x), 1e-10)
    assert len(seen) > 4
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in seen)


# ---- default dtypes and devices, devices without float64 ----


class WithoutFloat64(TorchDispatchMode):
    """A device that has no float64: making such a tensor raises, as on MPS."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        if any(isinstance(t, Tensor) and t.dtype is torch.float64 for t in made):
            raise TypeError(f"{func}: this device has no float64")
        return result


@nets
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_device_without_float64(make: Make, momentum: float | None, recompute: bool) -> None:
    """There the ops run as plain torch."""
    fused, plain = twins(make(), torch.float32)
    for model in (fused, plain):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
    fasttricks.fuse(fused, recompute=recompute)
    x = images(dtype=torch.float32)
    with fasttricks.backend("reference"), WithoutFloat64():
        got = step(fused, fused, x)
        checkpoint(fused, x.clone().requires_grad_(), use_reentrant=False).sum().backward()
    same(got, step(plain, plain, x), 1e-3)


@nets
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(make: Make, dtype: torch.dtype) -> None:
    fused, plain = twins(make(), torch.float32)
    x = images(dtype=torch.float32)
    torch.set_default_dtype(dtype)
    try:
        got = step(fused, fused, x)
        with torch.device("meta"):  # and neither does a default device
            again = step(fused, fused, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(t.dtype != dtype for t in got.values())
    assert torch.equal(got["output"], again["output"])
    same(got, step(plain, plain, x), 1e-3)


# ---- checkpoints of activations ----


@nets
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_equals_unfused(make: Make, reentrant: bool) -> None:
    fused, plain = twins(make())
    x = images().requires_grad_()
    got, want = (
        step(model, lambda x, model=model: checkpoint(model, x, use_reentrant=reentrant), x) for model in (fused, plain)
    )
    same(got, want, 1e-10)  # in both, the recomputation changes the running statistics again


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_sequential_equals_unfused(reentrant: bool) -> None:
    fused, plain = twins(torchvision_net())
    x = images().requires_grad_()
    got, want = (
        step(model, lambda x, model=model: checkpoint_sequential(model, 2, x, use_reentrant=reentrant), x)
        for model in (fused, plain)
    )
    same(got, want, 1e-10)


# ---- averages of weights ----


@nets
def test_averaged_models_and_update_bn_equal_unfused(make: Make) -> None:
    averages = []
    fused, plain = twins(make())
    batches = [images() for _ in range(3)]
    for model in (fused, plain):
        average = AveragedModel(model)
        for _ in range(2):
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.1)
            average.update_parameters(model)
        update_bn(batches, average)
        averages.append(average.eval())
    x = images()
    assert relative_error(averages[0](x), averages[1](x)) < 1e-10
    same(averages[0].state_dict(), averages[1].state_dict(), 1e-10)


@nets
def test_timm_ema_equals_unfused(make: Make) -> None:
    utils = pytest.importorskip("timm.utils")
    fused, plain = twins(make())
    emas = []
    x = images()
    for model in (fused, plain):
        ema = utils.ModelEmaV3(model, decay=0.5)
        model(x)  # changes the running statistics
        ema.update(model)
        emas.append(ema.module.eval())
    assert relative_error(emas[0](x), emas[1](x)) < 1e-10


# ---- counters ----


@nets
def test_flops_are_those_of_the_unfused_model(make: Make) -> None:
    counts = []
    for model in twins(make()):
        with FlopCounterMode(display=False) as counter:
            model(images()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@nets
def test_torchinfo_and_fvcore_count_as_unfused(make: Make) -> None:
    torchinfo, fvcore = pytest.importorskip("torchinfo"), pytest.importorskip("fvcore.nn")
    fused, plain = twins(make())
    x = images()
    counts = []
    for model in (fused.eval(), plain.eval()):
        info = torchinfo.summary(copy.deepcopy(model), input_data=x, verbose=0)
        flops = fvcore.FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counts.append((info.total_params, info.total_mult_adds, flops.total(), dict(flops.by_module())))
    assert counts[0] == counts[1]
