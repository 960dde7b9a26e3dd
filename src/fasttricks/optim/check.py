"""The check pass of a step: whether all gradients are finite, and their norms, combined over devices and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops.sgd import run_check
from ..ops.sgd_call import CheckCall, StepCall, widest_dtype
from .distributed import agree_on_found_inf, local, sum_of_other_ranks, sum_over_shards


@dataclass
class Batch:
    """The step of all parameters on one device."""

    call: StepCall
    # as the optimizer has them: for DTensors, call holds their local parts
    owners: list[Tensor]
    # where among all parameters of the optimizer each one is
    places: list[int]
    # the index of each group of the call among the optimizer's
    groups: list[int]


@dataclass
class Scaling:
    """A loss scaler's arguments for one step. All tensors are fp32 with one element."""

    # gradients are divided by it
    grad_scale: Tensor | None = None
    # set by the scaler: unless it is 0, nothing changes
    found_inf: Tensor | None = None
    # set by the step: becomes 1 if a gradient is not finite
    overflow: Tensor | None = None
    # ranks that agree on it
    process_groups: Sequence[Any] = field(default_factory=list)


def on(t: Tensor | None, device: torch.device) -> Tensor | None:
    return t if t is None or t.device == device else t.to(device, non_blocking=True)


def zero(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=device)


def raise_flag(flag: Tensor, found: Tensor) -> None:
    """flag becomes the larger of both."""
    torch.maximum(flag, found.reshape(flag.shape).to(flag.device), out=flag)


def check_grads(grads: list[Tensor], found_inf: Tensor, groups: Sequence[Any] = ()) -> None:
    """found_inf becomes 1 if a gradient is not finite, here or on a rank that shares them or belongs to `groups`."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        by_device.setdefault(grad.device, []).append(local(grad))
    for device, tensors in by_device.items():
        found = zero(device)
        run_check(CheckCall(tensors, [], [], found, None, None))
        raise_flag(found_inf, found)
    agree_on_found_inf(found_inf, grads, list(groups))  # even without gradients here: other ranks wait for this one


def unscale_grads_(grads: list[Tensor], grad_scale: Tensor) -> None:
    """Divides gradients by grad_scale, in place."""
    inverses: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for grad in grads:
        where = grad.device, grad.dtype
        if where not in inverses:
            wide = torch.float64 if grad.dtype is torch.float64 else torch.float32
            inverses[where] = grad_scale.to(grad.device, wide, non_blocking=True).reciprocal().to(grad.dtype)
        local(grad).mul_(inverses[where])


class Norms:
    """The squared norms of a step's gradients, and the loss scale that they still contain."""

    def __init__(self, squares: list[Tensor], grad_scale: Tensor | None) -> None:
        self._squares = squares
        # the scaler changes its own in place
        self._grad_scale = None if grad_scale is None else grad_scale.clone()

    def total(self) -> Tensor:
        home = self._squares[0].device
        total = torch.stack([s.sum().to(home, self._squares[0].dtype) for s in self._squares]).sum().sqrt()
        return (total if self._grad_scale is None else total / self._grad_scale.to(home)).to(torch.float32)


def check_pass(
    batches: list[Batch], scaling: Scaling, *, measures: bool, shard_group: Any | None, home: torch.device
) -> Norms | None:
    """Fills in found_inf, grad_sq and weight_sq of each batch's call if a scaler, clipping or LARS needs them.

    Args:
        measures: whether norms of gradients are needed; those of weights are if trust_coefficient is set (LARS).
        shard_group: ranks that hold other parameters of the same model.
        home: where the collectives of a rank without gradients run.
    """
    checks = scaling.overflow is not None or measures
    flags = [] if scaling.found_inf is None else [scaling.found_inf]
    for batch in batches if checks else ():
        flags.append(_check(batch, measures))
    groups = list(scaling.process_groups)
    if shard_group is not None and not any(g is shard_group for g in groups):
        groups.append(shard_group)
    if not batches and not groups:  # a rank takes part even if it has no gradients
        return None
    norms = _join_norms(batches, scaling.grad_scale, shard_group, home) if measures else None
    if not flags:
        if not (checks and groups):
            return norms
        flags.append(zero(home))
    device = flags[0].device
    found = flags[0] if len(flags) == 1 else torch.stack([f.reshape(()).to(device) for f in flags]).amax()
    if checks:
        agree_on_found_inf(found, [p for batch in batches for p in batch.owners], groups)
    if scaling.overflow is not None:
        raise_flag(scaling.overflow, found)
    for batch in batches:
        batch.call.found_inf = on(found, batch.owners[0].device)
    return norms


def _check(batch: Batch, measures: bool) -> Tensor:
    """sgd_check on a batch; returns its found_inf."""
    call, device = batch.call, batch.owners[0].device
    found_inf = zero(device)
    if measures:
        call.grad_sq = torch.zeros(len(call.params), dtype=widest_dtype(device), device=device)
    adapted = any(call.trust_coefficient)
    if adapted:
        call.weight_sq = torch.zeros(len(call.params), dtype=widest_dtype(device), device=device)
    weights = (call.params, call.masters) if adapted else ([], [])
    run_check(CheckCall(call.grads, *weights, found_inf, call.grad_sq, call.weight_sq))
    for squares in (call.grad_sq, call.weight_sq):
        if squares is not None:
            sum_over_shards(squares, batch.owners)
    return found_inf


def _join_norms(
    batches: list[Batch], grad_scale: Tensor | None, shard_group: Any | None, home: torch.device
) -> Norms | None:
    """Adds to each batch's squares the sum of all other devices and ranks: each batch needs the global norm."""
    squares = [batch.call.grad_sq for batch in batches if batch.call.grad_sq is not None]
    sums = [s.sum() for s in squares] if len(squares) > 1 or shard_group is not None else []
    if shard_group is not None:
        device = sums[0].device if sums else home
        own = torch.zeros((), dtype=widest_dtype(device), device=device)
        own = torch.stack([own, *[s.to(device, own.dtype) for s in sums]]).sum()
        elsewhere = sum_of_other_ranks(own, shard_group)
        squares.append(elsewhere)
        sums.append(elsewhere)
    if len(sums) > 1:
        for k, batch in enumerate(batches):
            own = squares[k]
            others = [s.to(own.device, own.dtype) for j, s in enumerate(sums) if j != k]
            batch.call.grad_sq = torch.cat([own, torch.stack(others)])
    return Norms(squares, grad_scale) if squares else None
