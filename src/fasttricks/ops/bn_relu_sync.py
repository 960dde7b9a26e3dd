"""bn_relu and bn_add_relu with statistics over the ranks of a process group (SyncBN)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import distributed

from .. import transforms
from ..backends import ops_for
from ..recomputation import current
from ..reference import bn_relu as plain
from .bn_relu import compute_again


def merge(parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, biased variance and count over all ranks, from one row [mean (C), M2 (C), count] per rank, in float64.

    Chan, Golub and LeVeque 1979: M2 = sum of M2_i + n_i * (mean_i - mean)^2; a rank without values has no weight.
    """
    channels = (parts.shape[1] - 1) // 2
    mean, m2, count = parts[:, :channels], parts[:, channels:-1], parts[:, -1:]
    total = count.sum()
    whole = (mean * count).sum(0) / total.clamp(min=1)
    spread = (m2 + count * (mean - whole).square()).sum(0) / total.clamp(min=1)
    return whole, spread, total


class _SynchronisedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, op: str, x: Any, residual: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any,
        momentum: float | None, eps: float, group: Any, batches: Any,
    ) -> Any:  # fmt: skip
        ops = ops_for(op, x.device)
        if ops is None:
            raise RuntimeError(f"fasttricks.{op}: group was given, but no kernels are loaded for {x.device}")
        local = plain.values_per_channel(x)
        mean, var = ops.bn_stats(x)
        mine = torch.cat([mean.double(), var.double() * local, mean.new_full((1,), local, dtype=torch.float64)])
        parts = mine.new_empty(distributed.get_world_size(group), mine.numel())
        distributed.all_gather_into_tensor(parts.view(-1), mine, group=group)
        whole, spread, total = merge(parts)
        # if all ranks together have one value, each has at most one: only such a rank waits for the device
        if local <= 1 and int(total) == 1:
            raise ValueError(
                f"{op}: x has shape {tuple(x.shape)} and one value per channel over all ranks: Expected more than 1 "
                "value per channel for batch statistics; accepted: two or more, or running statistics"
            )
        mean, var = whole.to(mean.dtype), spread.to(var.dtype)
        if running_mean is not None:
            ops.bn_update_stats_(running_mean, running_var, mean, var, total, batches, momentum)
        elif batches is not None:
            batches.add_(1)
        if residual is None:
            y, mask = ops.bn_relu_apply(x, weight, bias, mean, var, eps), None
        else:
            y, mask = ops.bn_add_relu_apply(x, residual, weight, bias, mean, var, eps)
        ctx.save_for_backward(x, weight, bias, mean, var, mask, total)
        ctx.constants = ops, eps, group
        if (outputs := current()) is not None:
            again = functools.partial(compute_again, ops, eps)
            outputs.add(y, again, (x, residual), (weight, bias), (mean, var))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, weight, bias, mean, var, mask, total = ctx.saved_tensors
        ops, eps, group = ctx.constants
        dweight, dbias = ops.bn_relu_backward_reduce(dy, x, mask, weight, bias, mean, var, eps)
        sums = torch.stack([dweight, dbias])
        distributed.all_reduce(sums, group=group)  # of dx; dweight and dbias stay local, as DDP averages them
        means = (sums / total.clamp(min=1)).to(sums.dtype)
        needs = ctx.needs_input_grad
        dx, dresidual = ops.bn_relu_backward_apply(
            dy, x, mask, weight, bias, mean, var, eps, means[0], means[1], needs[2]
        )
        return (
            None,
            dx if needs[1] else None,
            dresidual if needs[2] else None,
            dweight.to(weight.dtype) if needs[3] else None,
            dbias.to(bias.dtype) if needs[4] else None,
            *(None,) * 6,
        )


def synchronised(
    op: str,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    momentum: float | None,
    eps: float,
    group: distributed.ProcessGroup,
    batches: torch.Tensor | None,
) -> torch.Tensor:
    """The op in training with statistics over all ranks: one all_gather forward, one all_reduce backward.

    The number of values stays on the device: only a rank with at most one value per channel waits for it.

    Raises:
        RuntimeError: within torch.func or forward mode, which have no rules for collectives.
    """
    if transforms.active():
        raise RuntimeError(
            f"{op}: group is given within torch.func or forward-mode AD, which have no rules for collectives; "
            "accepted: no group there, evaluation, or nn.BatchNorm2d instead of a converted nn.SyncBatchNorm"
        )
    return _SynchronisedBatchNorm.apply(
        op, x, residual, weight, bias, running_mean, running_var, momentum, eps, group, batches
    )
