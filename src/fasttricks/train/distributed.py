"""The ranks of a run: one process, or as many as torchrun started."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class World(NamedTuple):
    """This process among the others."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, on all ranks."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Give every rank the tensors of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def start(device: str) -> World:
    """Join the ranks that torchrun announced in the environment (nccl on CUDA, gloo on the CPU), or be alone.

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
    """Leave the ranks."""
    if world.size > 1:
        dist.destroy_process_group()
