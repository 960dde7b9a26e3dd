"""Sharded parameters in the optimizers: local parts, and sums and flags combined over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# no DTensors, by their type alone
PLAIN = (Tensor, torch.nn.Parameter)


def is_sharded_type(t: Tensor) -> bool:
    """Whether t is a DTensor (FSDP2, tensor parallel)."""
    return type(t) not in PLAIN and hasattr(t, "_local_tensor") and hasattr(t, "device_mesh")


def local(t: Tensor) -> Tensor:
    """The part of t on this rank: t itself, or a DTensor's local tensor."""
    return t.to_local() if is_sharded_type(t) else t  # type: ignore[attr-defined]


def full(t: Tensor) -> Tensor:
    """The whole of t: t itself, or a DTensor gathered from its ranks."""
    return t.full_tensor() if is_sharded_type(t) else t  # type: ignore[attr-defined]


def local_grad(grad: Tensor, param: Tensor) -> Tensor:
    """The part of grad for local(param); redistributed first if its placements differ from the parameter's."""
    if is_sharded_type(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return local(grad)


def _meshes(params: list[Tensor]) -> list[Any]:
    meshes: list[Any] = []
    if set(map(type, params)).issubset(PLAIN):  # hundreds of parameters in every step
        return meshes
    for p in params:
        if is_sharded_type(p) and p.device_mesh not in meshes:  # type: ignore[attr-defined]
            meshes.append(p.device_mesh)  # type: ignore[attr-defined]
    return meshes


def _split(p: Any, mesh: Any, dim: int) -> bool:
    """Whether p is a DTensor that is sharded along this dimension of the mesh."""
    return is_sharded_type(p) and p.device_mesh == mesh and not p.placements[dim].is_replicate()


def agree_on_found_inf(found_inf: Tensor, params: list[Tensor], groups: list[Any]) -> None:
    """found_inf becomes the largest of all ranks that hold parts of these parameters, and of `groups`; no host sync."""
    import torch.distributed as dist

    of_meshes = [mesh.get_group(d) for mesh in _meshes(params) for d in range(mesh.ndim)]
    for group in [*of_meshes, *groups]:
        dist.all_reduce(found_inf, op=dist.ReduceOp.MAX, group=group)


def sum_over_shards(squares: Tensor, params: list[Tensor]) -> None:
    """squares[i], this rank's sum of squares of params[i], becomes that of the whole parameter; no host sync."""
    import torch.distributed as dist

    for mesh in _meshes(params):
        for d in range(mesh.ndim):
            split = [_split(p, mesh, d) for p in params]
            if any(split):
                mask = torch.tensor(split, device=squares.device)
                part = torch.where(mask, squares, 0)
                dist.all_reduce(part, group=mesh.get_group(d))
                squares.copy_(torch.where(mask, part, squares))


def sum_of_other_ranks(square: Tensor, group: Any) -> Tensor:
    """The sum of the tensors that the other ranks of `group` pass; no host sync."""
    import torch.distributed as dist

    total = square.clone()
    dist.all_reduce(total, group=group)
    return total - square
