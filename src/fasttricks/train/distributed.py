"""The ranks of a run: one process, or those that torchrun started."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor, nn

from ..nn.holder import Holder


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
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return World(dist.get_rank(), size, place)


def stop(world: World) -> None:
    """Leaves the process group."""
    if world.size > 1:
        dist.destroy_process_group()


class _SyncBatchNorm(nn.SyncBatchNorm):
    """torch.nn.SyncBatchNorm on the CPU, where torch has none."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = x.new_tensor(x.numel() // x.shape[1], dtype=torch.float64)
        dist.all_reduce(count)
        total = int(count)
        mean = differentiable.all_reduce(x.sum(axes)) / total
        centred = x - mean.view(shape)
        var = differentiable.all_reduce(centred.square().sum(axes)) / total
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach(), momentum)
            self.running_var.lerp_(var.detach() * (total / (total - 1)), momentum)
        y = centred * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y


def synchronised(model: nn.Module) -> nn.Module:
    """The model with batch statistics over all ranks."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if any(p.device.type == "cpu" for p in model.parameters()):
        held = {id(module.held) for module in model.modules() if isinstance(module, Holder)}
        for module in model.modules():
            # the fused operators have statistics over ranks on the CPU, too
            if type(module) is nn.SyncBatchNorm and id(module) not in held:
                module.__class__ = _SyncBatchNorm
    return model
