"""Fused models on two gloo processes: DDP, SyncBatchNorm and FSDP2 equal unfused models or one process."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import relative_error
from networks import randomised, synchronised_net, timm_net, torchvision_net, twins
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fasttricks
from fasttricks.optim import FusedSGD

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.xdist_group("ranks"),
]


def inputs(*sizes: int) -> Tensor:
    """The part of a random batch for this rank; both ranks draw the same batch."""
    whole = torch.randn(sum(sizes), 3, 18, 18, dtype=torch.float64)
    return whole.split(sizes)[dist.get_rank()] if len(sizes) > 1 else whole


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def train(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """The state and the last gradients after a step for each batch."""
    optimizer = FusedSGD(model.parameters(), lr=1e-3, momentum=0.9)
    for x in batches:
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
    inner: Any = getattr(model, "module", model)
    gradients = {f"gradient of {name}": p.grad for name, p in inner.named_parameters() if p.grad is not None}
    return {**inner.state_dict(), **gradients}


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, value in got.items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        assert relative_error(whole, want[name]) < 1e-8, name


class Branches(nn.Module):
    """Skips a block on every other step, so that its parameters get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.always, self.sometimes, self.head = 0, *torchvision_net()[:4:3], torchvision_net()[5:]
        self.head[-1] = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        x = self.always(x)
        return self.head(self.sometimes(x) if self.steps % 2 else x)


OPTIONS: dict[str, dict[str, Any]] = {
    "static_graph": {"static_graph": True},
    "bucket_view": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001},
    "no_buffers": {"broadcast_buffers": False},
}


def ddp_options() -> None:
    for options in OPTIONS.values():
        for make in (torchvision_net, timm_net):
            fused, plain = twins(make())
            batches = [inputs(3, 2) for _ in range(3)]
            want = train(DistributedDataParallel(plain, **options), batches)
            same(train(DistributedDataParallel(fused, **options), batches), want)


def ddp_with_unused_parameters() -> None:
    fused, plain = twins(Branches())
    batches = [inputs(3, 2) for _ in range(4)]
    want = train(DistributedDataParallel(plain, find_unused_parameters=True), batches)
    same(train(DistributedDataParallel(fused, find_unused_parameters=True), batches), want)


def ddp_fused_inside() -> None:
    """A wrapped model can be fused, also with recompute."""
    _, plain = twins(torchvision_net())
    wrapped = [DistributedDataParallel(copy.deepcopy(plain)) for _ in range(2)]
    assert fasttricks.fuse(wrapped[0]) is wrapped[0]
    assert fasttricks.fusions(wrapped[0]).counts == {"bn_relu": 3, "bn_add_relu": 2}
    fasttricks.fuse(wrapped[1], recompute=True)
    batches = [inputs(3, 2) for _ in range(3)]
    want = train(DistributedDataParallel(plain), batches)
    for model in wrapped:
        same(train(model, batches), want)


def ddp_join() -> None:
    fused, plain = twins(torchvision_net())
    batches = [inputs(3, 2) for _ in range(4)][: 4 - 2 * dist.get_rank()]
    results = []
    for model in (fused, plain):
        model = DistributedDataParallel(model, broadcast_buffers=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with model.join():
            for x in batches:
                optimizer.zero_grad()
                loss_of(model, x).backward()
                optimizer.step()
        results.append(dict(model.module.named_parameters()))
    same(*results)


def synchronised_statistics() -> None:
    """Models converted before or after fuse, by torch or timm, equal one process on the whole batch."""
    from timm.layers import convert_sync_batchnorm

    plain = randomised(synchronised_net()).double()
    batches = [torch.randn(7, 3, 18, 18, dtype=torch.float64) for _ in range(3)]
    part = slice(0, 5) if dist.get_rank() == 0 else slice(5, 7)
    want = train(copy.deepcopy(plain), batches)

    def converted_first(model: nn.Module) -> nn.Module:
        return fasttricks.fuse(convert_sync_batchnorm(model))

    def fused_first(model: nn.Module) -> nn.Module:
        return fasttricks.fuse(convert_sync_batchnorm(fasttricks.fuse(model)))  # timm makes a new BatchNormAct2d

    def by_torch(model: nn.Module) -> nn.Module:
        model[0] = torchvision_like(model[0])
        return nn.SyncBatchNorm.convert_sync_batchnorm(fasttricks.fuse(model))

    def rebuilt(model: nn.Module) -> nn.Module:
        return fasttricks.fuse(convert_sync_batchnorm(model), recompute=True)

    for convert in (converted_first, fused_first, by_torch, rebuilt):
        model = convert(copy.deepcopy(plain))
        assert sum(fasttricks.fusions(model).counts.values()) == 4, (convert.__name__, fasttricks.fusions(model))
        optimizer = FusedSGD(model.parameters(), lr=1e-3, momentum=0.9)
        for x in batches:
            optimizer.zero_grad()
            loss_of(model, x[part]).backward()
            for p in model.parameters():  # instead of DDP, which refuses nn.SyncBatchNorm on the CPU
                dist.all_reduce(p.grad)
            optimizer.step()
        got = {**model.state_dict(), **{f"gradient of {name}": p.grad for name, p in model.named_parameters()}}
        same(dict(zip(want, got.values(), strict=True)), want)
        x = batches[0]
        torch.testing.assert_close(model.eval()(x), fasttricks.unfuse(model)(x))


def torchvision_like(layer: Any) -> nn.Module:
    """timm's ConvNormAct as modules of torch."""
    bn = nn.BatchNorm2d(layer.bn.num_features).double()
    bn.load_state_dict(layer.bn.state_dict())
    return nn.Sequential(layer.conv, bn, nn.ReLU())


def fsdp2() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for make in (torchvision_net, timm_net):
        fused, plain = twins(make())
        batches = [inputs(3, 2) for _ in range(3)]
        want = train(DistributedDataParallel(plain, broadcast_buffers=False), batches)
        for block in fused.modules():
            if type(block).__name__ == "BasicBlock":
                fully_shard(block, mesh=mesh)
        fully_shard(fused, mesh=mesh)
        assert len(fasttricks.fusions(fused).fused) > 4
        same(train(fused, batches), want)
        counts = fasttricks.fusions(fused).counts
        fasttricks.unfuse(fused)
        assert not fasttricks.fusions(fused).fused
        assert fasttricks.fusions(fasttricks.fuse(fused)).counts == counts


ALL = (
    ddp_options,
    ddp_with_unused_parameters,
    ddp_fused_inside,
    ddp_join,
    synchronised_statistics,
    fsdp2,
)


def quietly(check: Callable[[], None]) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has a new name in some versions
    check()


@pytest.mark.parametrize("check", ALL, ids=lambda check: check.__name__)
def test_two_processes(check: Callable[[], None], ranks: Ranks) -> None:
    ranks.run(quietly, check)
