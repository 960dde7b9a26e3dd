"""The optimizers on two gloo processes: DDP, ZeroRedundancyOptimizer, FSDP2, DTensors, agreement on overflow."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn

from fasttricks.optim import FusedLARS, FusedSGD, LossScaler

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.xdist_group("ranks"),
]

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))


class Images(nn.Module):
    """Channels-last convolutions, one of them 1x1: in DDP's buckets their gradients have other strides."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Flatten()
        self.layers = nn.Sequential(nn.Unflatten(1, (2, 3, 1)), *layers).to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def inputs(seed: int) -> list[torch.Tensor]:
    """One batch for each of the two ranks."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(2, 4, 6, generator=generator))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a.detach().float(), b.detach().float(), rtol=1e-5, atol=1e-6)


def alone(model: nn.Module, steps: int, max_norm: float | None = None, lars: bool = False) -> nn.Module:
    """The model trained by one process on both batches, with torch.optim.SGD or FusedLARS."""
    model = copy.deepcopy(model)
    kind: Any = FusedLARS if lars else torch.optim.SGD
    optimizer = kind(model.parameters(), **OPTIONS)
    for i in range(steps):
        optimizer.zero_grad()
        (sum(loss_of(model, x) for x in inputs(i)) / 2).backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return model


def with_ddp(rank: int, model: nn.Module) -> None:
    for net, view in ((model, False), (Images(), False), (Images(), True)):
        replica = nn.parallel.DistributedDataParallel(copy.deepcopy(net), gradient_as_bucket_view=view)
        want = alone(replica.module, 3)  # DDP starts from the weights of rank 0
        optimizer, scaler = FusedSGD(replica.parameters(), **OPTIONS), LossScaler(256.0)
        for i in range(4):
            optimizer.zero_grad()
            factor = math.inf if i == 3 and rank == 1 else 1.0  # the all-reduce spreads the overflow of one rank
            scaler.scale(loss_of(replica, inputs(i)[rank]) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 128
        for a, b in zip(replica.parameters(), want.parameters(), strict=True):
            close(a, b)


def with_zero(rank: int, model: nn.Module) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    want = alone(model, 3)
    for dtype in (torch.float32, torch.float16):
        replica = nn.parallel.DistributedDataParallel(copy.deepcopy(model).to(dtype))
        optimizer = ZeroRedundancyOptimizer(replica.parameters(), optimizer_class=FusedSGD, **OPTIONS)
        scaler = LossScaler(256.0)
        for i in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(replica, inputs(i)[rank].to(dtype)).float()).backward()
            if i == 3:  # NaN in a parameter that only one rank steps
                next(replica.parameters()).grad.fill_(math.nan)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 128
        for a, b in zip(replica.parameters(), want.parameters(), strict=True):
            assert a.isfinite().all()
            tolerance = 1e-5 if dtype is torch.float32 else 1e-2
            torch.testing.assert_close(a.detach().float(), b.detach(), rtol=tolerance, atol=tolerance)
        optimizer.consolidate_state_dict(to=0)
        if rank == 0:
            full = optimizer.state_dict()["state"]
            assert len(full) == 4
            masters = [s["master"] for s in full.values() if "master" in s]
            assert len(masters) == (0 if dtype is torch.float32 else 4)
            assert all(m.dtype == torch.float32 for m in masters)


def with_zero_clipping(rank: int, model: nn.Module) -> None:
    """The norm is over the parameters of all ranks, with and without a scaler; a rank may have no parameters."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    options = {**OPTIONS, "max_grad_norm": 0.05, "shard_group": dist.group.WORLD}
    for net in (model, nn.Linear(6, 5, bias=False)):
        want = alone(net, 3, 0.05)
        for scaler in (None, LossScaler(256.0)):
            replica = nn.parallel.DistributedDataParallel(copy.deepcopy(net))
            optimizer = ZeroRedundancyOptimizer(replica.parameters(), optimizer_class=FusedSGD, **options)
            for i in range(4):
                optimizer.zero_grad()
                loss = loss_of(replica, inputs(i)[rank])
                (loss if scaler is None else scaler.scale(loss)).backward()
                if i == 3:  # NaN in a parameter that only one rank steps
                    next(replica.parameters()).grad.fill_(math.nan)
                if scaler is None:
                    optimizer.step()
                else:
                    scaler.step(optimizer)
                    scaler.update()
            assert scaler is None or scaler.get_scale() == 128
            for a, b in zip(replica.parameters(), want.parameters(), strict=True):
                close(a, b)


def with_unscale_and_no_parameters(rank: int, model: nn.Module) -> None:
    """unscale_() and step() under ZeroRedundancyOptimizer if one rank has no parameters."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = nn.Linear(6, 5, bias=False)
    want = alone(net, 2)
    replica = nn.parallel.DistributedDataParallel(copy.deepcopy(net))
    optimizer = ZeroRedundancyOptimizer(replica.parameters(), optimizer_class=FusedSGD, **OPTIONS)
    scaler = LossScaler(256.0)
    for i in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(replica, inputs(i)[rank]) * (math.inf if i == 2 else 1.0)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 128
    close(replica.module.weight, want.weight)


def with_fsdp(rank: int, model: nn.Module) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(*model, nn.ReLU(), nn.Linear(5, 1))

    def shard(dtype: torch.dtype = torch.float32) -> nn.Module:
        sharded = copy.deepcopy(model).to(dtype)
        for layer in (sharded[0], sharded[2], sharded[4]):  # five rows on two ranks; of one row, rank 1 has none
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        return sharded

    for max_norm, lars in ((None, False), (0.05, False), (None, True)):
        want = alone(model, 3, max_norm, lars)
        sharded = shard()
        kind: Any = FusedLARS if lars else FusedSGD
        optimizer = kind(sharded.parameters(), **OPTIONS, max_grad_norm=max_norm)
        scaler = LossScaler(256.0)
        for i in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(sharded, inputs(i)[rank])).backward()
            if i == 3 and rank == 1:  # only this rank sees it
                sharded[2].weight.grad.to_local().fill_(math.inf)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 128
        for a, b in zip(sharded.parameters(), want.parameters(), strict=True):
            close(a.full_tensor(), b)

    # fp16 shards: masters and momentum are sharded, and survive a distributed state_dict
    sharded = shard(torch.float16)
    optimizer = FusedSGD(sharded.parameters(), **OPTIONS)

    def step(i: int) -> None:
        optimizer.zero_grad()
        loss_of(sharded, inputs(i)[rank].half()).float().backward()
        optimizer.step()

    for i in range(2):
        step(i)
    saved = copy.deepcopy(get_optimizer_state_dict(sharded, optimizer))
    weights = [p.to_local().clone() for p in sharded.parameters()]
    step(2)
    after = [p.full_tensor().clone() for p in sharded.parameters()]
    masters = [m.to_local().clone() for m in optimizer.master_params()]
    assert all(m.dtype == torch.float32 for m in masters)
    with torch.no_grad():
        for p, w in zip(sharded.parameters(), weights, strict=True):
            p.to_local().copy_(w)
    optimizer = FusedSGD(sharded.parameters(), **OPTIONS)
    set_optimizer_state_dict(sharded, optimizer, saved)
    step(2)
    for a, b in zip(sharded.parameters(), after, strict=True):
        assert torch.equal(a.full_tensor(), b)
    for a, b in zip(optimizer.master_params(), masters, strict=True):
        assert torch.equal(a.to_local(), b)


def with_partial_gradients(rank: int, model: nn.Module) -> None:
    """A DTensor gradient with other placements than its parameter: partial or replicated."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    start, parts = torch.randn(4, 3), torch.randn(2, 4, 3)
    for placement in (Replicate(), Shard(0)):
        for kind, given in ((Partial(), parts[rank]), (Replicate(), parts.sum(0))):
            p = nn.Parameter(distribute_tensor(start.clone(), mesh, [placement]))
            p.grad = DTensor.from_local(given, mesh, [kind])
            FusedSGD([p], lr=0.5).step()
            close(p.full_tensor(), start - 0.5 * parts.sum(0))


def with_own_group(rank: int, model: nn.Module) -> None:
    """Ranks that share no gradients agree on found_inf if LossScaler has a process group."""
    p = nn.Parameter(torch.ones(3))
    optimizer, scaler = FusedSGD([p], lr=0.1), LossScaler(8.0, process_group=dist.group.WORLD)
    for unscale in (False, True):
        optimizer.zero_grad()
        scaler.scale((p * (math.inf if rank == 0 else 1.0)).sum()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert (p == 1).all()
    assert scaler.get_scale() == 2


ALL = (with_ddp, with_zero, with_zero_clipping, with_unscale_and_no_parameters, with_fsdp, with_partial_gradients)


def on_a_model(check: Callable[[int, nn.Module], None]) -> None:
    check(dist.get_rank(), make_model())


@pytest.mark.parametrize("check", [*ALL, with_own_group], ids=lambda check: check.__name__)
def test_two_processes(check: Callable[[int, nn.Module], None], ranks: Ranks) -> None:
    ranks.run(on_a_model, check)
