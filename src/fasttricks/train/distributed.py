"""The ranks of a run: one process, or those that torchrun started."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


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
