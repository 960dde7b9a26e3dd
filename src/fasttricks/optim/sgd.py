"""FusedSGD: torch.optim.SGD in one pass over memory, with fp32 masters for fp16 and bf16 parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .base import FusedOptimizer


class FusedSGD(FusedOptimizer):
    """torch.optim.SGD, with the same arguments, results, hooks and checkpoints, as one fused kernel per step.

    fp32 and fp64 parameters are updated as torch.optim.SGD(foreach=False, fused=False) updates them. An fp16 or bf16
    parameter has an fp32 master and fp32 momentum: the master is updated as an fp32 parameter, then rounded into the
    parameter. All dtypes may be mixed in one group.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a tensor of one element (read on the device at every step).
        momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        max_grad_norm: if given, gradients are clipped to this global L2 norm within the step, as by
            torch.nn.utils.clip_grad_norm_ (after unscaling); a step whose norm is not finite is skipped. `grad_norm`
            holds the norm of the last step.
        shard_group: ranks that hold other parameters of the same model, as under ZeroRedundancyOptimizer: the norm
            and what is not finite are then those of all. Not needed with DDP or DTensors (FSDP2).
        unscale_in_step: whether step() takes the scaled gradients of torch.amp.GradScaler, as that of
            torch.optim.SGD(fused=True) does. False: GradScaler unscales them first and calls step() only if all are
            finite, which waits for the device; for frameworks that clip in between (Lightning) or notice skipped steps
            (Accelerate).
        foreach, fused: accepted as torch.optim.SGD's; this class has one implementation per backend.
        differentiable: accepted as False.

    Raises:
        TypeError: a parameter is complex, sparse or not of a floating dtype; an option is of another type.
        ValueError: an option is negative or not finite, nesterov without momentum or with dampening.

    Examples:
        >>> model = nn.Linear(4, 2).half()
        >>> optimizer = fasttricks.optim.FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> model(torch.randn(8, 4).half()).float().square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["master"].dtype
        torch.float32
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        shard_group: Any | None = None,
        unscale_in_step: bool = True,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(
            params,
            defaults,
            max_grad_norm=max_grad_norm,
            shard_group=shard_group,
            unscale_in_step=unscale_in_step,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
