"""The ranks of a run: one process, or those that torchrun started."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class World(NamedTuple):
    """This process and its position among the ranks."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Copies the tensors of rank 0 to all ranks."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def start(device: str) -> World:
    """Joins the ranks that torchrun announces in the environment, by nccl on CUDA and gloo on the CPU.

    Args:
        device: "cpu" or "cuda".
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        torch.cuda.set_device(local)
    place = torch.device("cuda", local) if device == "cuda" else torch.device("cpu")
    if size == 1:
        return World(0, 1, place)
    # torchrun keeps its store over restarts: addresses of the processes before must not be read again (pytorch#135712)
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart-{restarts()}", store)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    return World(rank, size, place)


def restarts() -> int:
    """How often torchrun has restarted this run after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def stop(world: World) -> None:
    """Leaves the process group."""
    if world.size > 1:
        dist.destroy_process_group()


def lost_peer(error: RuntimeError) -> bool:
    """Whether the error is that of a collective whose other ranks are gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)


class _Sum(torch.autograd.Function):
    """The sum over all ranks, whose gradient is the sum of the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


class _SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d on the CPU with batch statistics over all ranks. torch.nn.SyncBatchNorm is for devices only."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes, shape = (0, 2, 3), (1, -1, 1, 1)
        total = x.numel() // x.shape[1] * dist.get_world_size()  # all ranks have as many images
        mean = _Sum.apply(x.sum(axes)) / total
        centred = x - mean.view(shape)
        var = _Sum.apply(centred.square().sum(axes)) / total
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach(), momentum)
            self.running_var.lerp_(var.detach() * (total / (total - 1)), momentum)
        y = centred * (var + self.eps).rsqrt().view(shape)
        return y * self.weight.view(shape) + self.bias.view(shape) if self.affine else y


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch statistics over all ranks."""
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _SyncBatchNorm
    return model
