"""LossScaler: dynamic (or static) loss scaling whose scale, flag and counter live on the device."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import FLOATS, check_number, fail
from .base import FusedOptimizer
from .check import check_grads, unscale_grads_


class LossScaler:
    """Scales losses so that fp16 gradients neither vanish nor overflow; used as torch.amp.GradScaler.

        scaler.scale(loss).backward();  scaler.step(optimizer);  scaler.update()

    With FusedSGD and FusedLARS nothing waits for the device: the check pass sets found_inf, the step reads it, update()
    changes the scale, all on the device. fp16 gradients are accepted, also by unscale_(), which puts the unscaled fp32
    gradients of fp16 and bf16 parameters on their masters (optimizer.master_params()).

    Args:
        init_scale: the first scale.
        growth_factor: the scale's factor after growth_interval steps without overflow.
        backoff_factor: its factor after an overflow.
        growth_interval: steps without overflow before the scale grows.
        dynamic: False: the scale stays init_scale; steps with overflow are still skipped.
        enabled: False: scale() returns its argument and step() calls optimizer.step().
        process_group: ranks that must agree on found_inf. Not needed with DDP (all ranks hold the same gradients),
            FSDP2 or ZeroRedundancyOptimizer (both detected).

    Raises:
        ValueError: a scale or a factor is out of range.

    Examples:
        >>> weight = nn.Parameter(torch.ones(1).half())
        >>> optimizer = fasttricks.optim.FusedSGD([weight], lr=0.1)
        >>> scaler = fasttricks.optim.LossScaler(init_scale=1024.0)
        >>> scaler.scale(weight * float("inf")).backward()  # an overflow
        >>> scaler.step(optimizer)
        >>> scaler.update()
        >>> weight.item(), scaler.get_scale()
        (1.0, 512.0)
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        *,
        dynamic: bool = True,
        enabled: bool = True,
        process_group: Any | None = None,
    ) -> None:
        if not (math.isfinite(init_scale) and init_scale > 0):
            raise ValueError(f"init_scale is {init_scale}; accepted: a finite number above 0")
        if not (math.isfinite(growth_factor) and growth_factor > 1):
            raise ValueError(f"growth_factor is {growth_factor}; accepted: a finite number above 1")
        if not 0 < backoff_factor < 1:
            raise ValueError(f"backoff_factor is {backoff_factor}; accepted: between 0 and 1")
        if growth_interval < 1:
            raise ValueError(f"growth_interval is {growth_interval}; accepted: at least 1")
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.growth_interval = growth_interval
        self.dynamic = dynamic
        self.process_group = process_group
        self._enabled = enabled
        self._tensors(torch.device("cpu"), float(init_scale), 0)
        self._placed = False
        self._stages: dict[int, str] = {}

    def _tensors(self, device: torch.device, scale: float, growth_tracker: int) -> None:
        #: fp32, one element: the scale
        self.loss_scale = torch.full((), scale, dtype=torch.float32, device=device)
        #: fp32, one element: nonzero if the last iteration's gradients were not finite; kept until the next iteration
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)
        self._growth_tracker = torch.full((), growth_tracker, dtype=torch.int32, device=device)

    def _place(self, device: torch.device) -> None:
        """Moves to the device of the first loss; later losses on other devices get a copy of the scale."""
        if not self._placed:
            self.loss_scale, self.found_inf, self._growth_tracker = (
                t.to(device) for t in (self.loss_scale, self.found_inf, self._growth_tracker)
            )
            self._placed = True

    def is_enabled(self) -> bool:
        """Whether the scaler does anything."""
        return self._enabled

    def get_scale(self) -> float:
        """The scale as a float (waits for the device; `loss_scale` is the tensor), 1.0 if not enabled."""
        return self.loss_scale.item() if self._enabled else 1.0

    def scale(self, outputs: Any) -> Any:
        """outputs * scale, for a tensor or a list or tuple of tensors."""
        if not self._enabled:
            return outputs
        if isinstance(outputs, Tensor):
            self._place(outputs.device)
            return outputs * self.loss_scale.to(outputs.device, non_blocking=True)
        if isinstance(outputs, (list, tuple)):
            return type(outputs)(self.scale(o) for o in outputs)
        raise TypeError(f"outputs is {type(outputs).__name__}; accepted: a tensor, or a list or tuple of tensors")

    @staticmethod
    def _grads(optimizer: torch.optim.Optimizer) -> list[Tensor]:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for grad in grads:
            if grad.layout is not torch.strided or grad.dtype not in FLOATS:
                raise RuntimeError(
                    f"a gradient has layout {grad.layout} and dtype {grad.dtype}; accepted: dense floating"
                )
        return grads

    def _begin(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._stages:
            self.found_inf.zero_()
        stage = self._stages.get(id(optimizer))
        if stage == "stepped":
            raise RuntimeError("this optimizer has been stepped already since the last update()")

    @torch.no_grad()
    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the optimizer's gradients by the scale, in place, and checks them; for clipping before step().

        Gradients of a fused optimizer's fp16 and bf16 parameters are left as they are (fp16 might underflow): their
        masters get unscaled fp32 copies, which step() uses. Clip optimizer.master_params().

        Raises:
            RuntimeError: called twice since update(), or after step().
            ValueError: another optimizer has fp16 gradients.
        """
        if not self._enabled:
            return
        self._begin(optimizer)
        if self._stages.get(id(optimizer)) == "unscaled":
            raise RuntimeError("unscale_() has been called already on this optimizer since the last update()")
        inner = _inner(optimizer)
        if isinstance(inner, FusedOptimizer):
            inner.unscale_(self.loss_scale, self.found_inf, self._groups(optimizer))
        else:
            grads = self._grads(optimizer)
            if any(g.dtype in (torch.float16, torch.bfloat16) for g in grads):
                given = type(optimizer).__name__
                raise ValueError(
                    f"unscale_() on half gradients of {given}; accepted: those of FusedSGD and FusedLARS, or fp32"
                )
            check_grads(grads, self.found_inf, self._groups(optimizer))
            unscale_grads_(grads, self.loss_scale)
        self._stages[id(optimizer)] = "unscaled"

    def _groups(self, optimizer: torch.optim.Optimizer) -> list[Any]:
        if self.process_group is not None:
            return [self.process_group]
        sharded = getattr(getattr(optimizer, "optimizer", optimizer), "process_group", None)
        # each rank of a ZeroRedundancyOptimizer checks only its own parameters
        return [] if sharded is None or _inner(optimizer) is optimizer else [sharded]

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Checks the gradients and steps the optimizer, which unscales them; a step with overflow changes nothing.

        FusedSGD, FusedLARS and other optimizers that unscale by themselves (`_step_supports_amp_scaling`, such as
        torch's with fused=True) are stepped without waiting for the device; for any other the gradients are unscaled
        first and the host waits for found_inf, as in torch.amp.GradScaler.

        Raises:
            RuntimeError: called twice since update().
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        self._begin(optimizer)
        unscaled = self._stages.get(id(optimizer)) == "unscaled"
        inner = _inner(optimizer)
        if isinstance(inner, FusedOptimizer):
            scale = None if unscaled else self.loss_scale
            with inner.scaled(scale, self.found_inf, self._groups(optimizer), check=not unscaled):
                result = optimizer.step(*args, **kwargs)
        elif getattr(optimizer, "_step_supports_amp_scaling", False):
            if not unscaled:
                check_grads(self._grads(optimizer), self.found_inf, self._groups(optimizer))
            optimizer.grad_scale = None if unscaled else self.loss_scale  # type: ignore[attr-defined]
            optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
            try:
                result = optimizer.step(*args, **kwargs)
            finally:
                del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        else:
            if not unscaled:
                self.unscale_(optimizer)
            result = None if self.found_inf.item() else optimizer.step(*args, **kwargs)
        self._stages[id(optimizer)] = "stepped"
        return result

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Ends the iteration: after an overflow the scale shrinks, after growth_interval steps without one it grows.

        Args:
            new_scale: sets the scale to this instead; a number, or a tensor of one element.
        """
        if not self._enabled:
            return
        if new_scale is not None:
            self.loss_scale.fill_(new_scale)
        elif not self._stages:
            raise RuntimeError("update() without a step() or unscale_() before it")
        elif self.dynamic:
            torch._amp_update_scale_(
                self.loss_scale,
                self._growth_tracker,
                self.found_inf,
                self.growth_factor,
                self.backoff_factor,
                self.growth_interval,
            )
        self._stages = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> LossScaler:
        memo[id(self.process_group)] = self.process_group  # a copy works with the same ranks
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError(
                "LossScaler: process_group cannot be pickled; save scaler.state_dict(), and give process_group to the "
                "scaler that loads it"
            )
        return self.__dict__.copy()

    def state_dict(self) -> dict[str, Any]:
        """The scale, the factors and the counter, as torch.amp.GradScaler's state_dict; {} if not enabled."""
        if not self._enabled:
            return {}
        return {
            "scale": self.loss_scale.item(),
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": int(self._growth_tracker.item()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict() of this class or of torch.amp.GradScaler.

        Raises:
            TypeError: no dictionary, or an entry is no number.
            ValueError: an entry is missing (a disabled scaler's state_dict is empty) or out of range.
        """
        if not isinstance(state_dict, Mapping):
            given = f"is a {type(state_dict).__name__}"
            fail("LossScaler.load_state_dict", "state_dict", given, "the state_dict of a scaler", TypeError)
        if not self._enabled:
            return
        names = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
        if missing := [name for name in names if name not in state_dict]:
            raise ValueError(f"state_dict lacks {', '.join(missing)}; accepted: the state_dict of an enabled scaler")
        for name in names:
            value = state_dict[name]
            value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            check_number("LossScaler.load_state_dict", name, value, 0.0)
        self.growth_factor = state_dict["growth_factor"]
        self.backoff_factor = state_dict["backoff_factor"]
        self.growth_interval = state_dict["growth_interval"]
        self._tensors(self.loss_scale.device, state_dict["scale"], state_dict["_growth_tracker"])


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The fused optimizer within one that wraps it, else the optimizer itself.

    Wrappers are torch.distributed.optim.ZeroRedundancyOptimizer (`optim`) and accelerate's AcceleratedOptimizer
    (`optimizer`).
    """
    wrapped = getattr(optimizer, "optimizer", optimizer)
    inner = getattr(wrapped, "optim", None)
    inner = inner if hasattr(wrapped, "process_group") else wrapped
    return inner if isinstance(inner, FusedOptimizer) else optimizer
