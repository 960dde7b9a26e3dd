"""recompute: the backward pass recomputes outputs instead of keeping them; gradients are equal bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import Ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fasttricks
from fasttricks.nn import BatchNormAddReLU2d, BatchNormReLU2d


class Block(nn.Module):
    def __init__(self, channels: int, shortcut: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.bn1 = BatchNormReLU2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = BatchNormAddReLU2d(channels)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x)
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), residual)


def network(channels: int = 4) -> nn.Sequential:
    """Several blocks, so that outputs are recomputed from recomputed outputs."""
    blocks = [Block(channels, shortcut=True), Block(channels), Block(channels)]
    return nn.Sequential(nn.Conv2d(3, channels, 3), BatchNormReLU2d(channels), nn.MaxPool2d(2), *blocks)


def gradients(model: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    (forward or model)(x).float().square().mean().backward()
    return [x.grad, *[p.grad for p in model.parameters()]]


def within(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        with fasttricks.recompute():
            return model(x)

    return forward


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def live_bytes(run: Callable[[], object]) -> int:
    """Bytes that `run` allocates and that are not freed while its result is alive."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    del kept
    return sum(event.self_cpu_memory_usage for event in profile.events())


def synchronised(model: nn.Module) -> nn.Module:
    """Converts the fused BatchNorms only: the one in a shortcut could not run on the CPU."""
    for module in [m for m in model.modules() if isinstance(m, BatchNormReLU2d | BatchNormAddReLU2d)]:
        nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return model


def fsdp1(model: nn.Module) -> nn.Module:
    """Shards each block: when its output is recomputed, the next block has its weights and this one has not."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy({Block}), device_id=torch.device("cpu"), use_orig_params=True
    )


def fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for child in model:
        fully_shard(child)
    return fully_shard(model)


def local_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    for _ in range(2):
        model(x).square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [getattr(g, "_local_tensor", g) for g in grads]


WRAPPED = (nn.parallel.DistributedDataParallel, synchronised, fsdp1, fsdp2)


def wrapped_models() -> None:
    for wrap in WRAPPED:
        model, x = network(), torch.randn(2, 3, 3, 17, 15)[dist.get_rank()]
        twin = wrap(fasttricks.fuse(copy.deepcopy(model), recompute=True))
        model = wrap(model)
        want = local_gradients(model, x)
        assert want, wrap
        assert equal(local_gradients(twin, x), want), wrap
        if wrap is synchronised:  # outputs with statistics of all ranks are recomputed, too
            assert live_bytes(lambda m=twin, x=x: m(x).sum()) < 0.8 * live_bytes(lambda m=model, x=x: m(x).sum())


@pytest.mark.xdist_group("ranks")
def test_two_processes(ranks: Ranks) -> None:
    ranks.run(wrapped_models)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_are_equal_to_the_last_bit(dtype: torch.dtype, layout: torch.memory_format) -> None:
    model = network().to(dtype=dtype, memory_format=layout)
    twin = copy.deepcopy(model)
    x = torch.randn(3, 3, 17, 15, dtype=dtype).to(memory_format=layout)
    assert equal(gradients(twin, x, within(twin)), gradients(model, x))
    assert equal(list(twin.buffers()), list(model.buffers()))


@pytest.mark.parametrize("mode", ["zero weight", "frozen", "eval"])
def test_gradients_are_equal_in_other_modes(mode: str) -> None:
    model = network()
    for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
        if mode == "zero weight":
            nn.init.zeros_(norm.weight)
        if mode == "frozen":
            norm.bias.requires_grad_(False)
    model.train(mode != "eval")
    x = torch.randn(3, 3, 17, 15)

    def run(forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        forward(x).square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert equal(run(within(model)), run(model))


def test_no_output_read_by_a_convolution_is_kept() -> None:
    """The input of the op is still kept."""
    x = torch.randn(4, 8, 32, 32)
    conv = nn.Conv2d(8, 8, 1, bias=False)
    model = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), BatchNormReLU2d(8), conv)
    size = x.numel() * x.element_size()

    def mean(forward: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: forward(x).mean()

    mean(model)()  # the first call allocates more
    plain, rebuilt = live_bytes(mean(model)), live_bytes(mean(within(model)))
    assert plain == pytest.approx(2 * size, rel=0.05)
    assert rebuilt == pytest.approx(size, rel=0.05)


def test_an_output_that_was_changed_in_place_is_kept() -> None:
    norm, conv = BatchNormReLU2d(4), nn.Conv2d(4, 4, 1)

    def run(x: Tensor) -> Tensor:
        y = norm(x)
        y.mul_(2)
        return conv(y)

    x = torch.randn(2, 4, 5, 5)
    want = gradients(conv, x, run)

    def rebuilt(x: Tensor) -> Tensor:
        with fasttricks.recompute():
            return run(x)

    assert equal(gradients(conv, x, rebuilt), want)


def test_tensors_changed_in_place_are_errors() -> None:
    norm, conv = BatchNormReLU2d(4), nn.Conv2d(4, 4, 1)
    for changed in (lambda x: x, lambda x: norm.weight):
        x = torch.randn(2, 4, 5, 5).requires_grad_() * 1
        with fasttricks.recompute():
            y = conv(norm(x))
        with torch.no_grad():
            changed(x).mul_(2)
        with pytest.raises(RuntimeError, match="changed in place"):
            y.sum().backward()


def test_a_graph_can_be_used_twice() -> None:
    model, x = network(), torch.randn(3, 3, 17, 15)
    with fasttricks.recompute():
        loss = model(x).square().mean()
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert equal(list(torch.autograd.grad(loss, parameters)), list(first))


def test_double_backward_equals_the_plain_one() -> None:
    model, x = network().double(), torch.randn(2, 3, 9, 9, dtype=torch.float64, requires_grad=True)

    def second(forward: Callable[[Tensor], Tensor]) -> Tensor:
        (first,) = torch.autograd.grad(forward(x).square().mean(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(second(within(model)), second(model))


def test_gradients_are_equal_in_checkpoints_and_autocast() -> None:
    model = network()

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    x = torch.randn(3, 3, 17, 15)
    for forward in (checkpointed, autocast):

        def rebuilt(x: Tensor, forward: Callable[[Tensor], Tensor] = forward) -> Tensor:
            with fasttricks.recompute():
                return forward(x)

        assert equal(gradients(model, x, rebuilt), gradients(model, x, forward))


def test_compiled_gradients_are_equal() -> None:
    model, x = network(), torch.randn(3, 3, 17, 15)
    torch._dynamo.reset()
    compiled = torch.compile(within(model), backend="aot_eager", fullgraph=True)
    want = gradients(model, x)
    for a, b in zip(gradients(model, x, compiled), want, strict=True):
        torch.testing.assert_close(a, b)


def test_fuse_with_recompute_gives_equal_gradients() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=5)
    fused = fasttricks.fuse(copy.deepcopy(model))
    rebuilt = fasttricks.fuse(copy.deepcopy(model), recompute=True)
    x = torch.randn(2, 3, 64, 64)
    want = gradients(fused, x)
    assert equal(gradients(rebuilt, x), want)
    assert equal(gradients(copy.deepcopy(rebuilt), x)[1:], gradients(copy.deepcopy(fused), x)[1:])
    assert type(fasttricks.unfuse(rebuilt)) is type(model)


@pytest.mark.parametrize("name", ["torchvision/resnet50", "resnet50d", "torchvision/densenet121"])
def test_whole_models_keep_at_most_60_percent(name: str) -> None:
    """Compared with eager torch, whose ReLUs are in place."""
    from fasttricks.models import build

    model = build(name, fused=False)
    x = torch.randn(2, 3, 96, 96)
    eager = live_bytes(lambda: model(x).sum())
    rebuilt = fasttricks.fuse(build(name), recompute=True)
    assert live_bytes(lambda: rebuilt(x).sum()) <= 0.6 * eager


def test_nested_contexts_without_fused_modules_change_nothing() -> None:
    with fasttricks.recompute(), fasttricks.recompute():  # the inner context joins the outer one
        y = F.relu(torch.randn(3, requires_grad=True))
    y.sum().backward()
