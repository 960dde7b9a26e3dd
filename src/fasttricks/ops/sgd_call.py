"""The arguments of sgd_check and sgd_step, one structure for each op, and their checks, as in csrc/sgd_call.h."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import (
    FLOATS,
    check_bool,
    check_device,
    check_dtype,
    check_number,
    check_shape,
    check_tensor,
    check_written,
    fail,
)


def is_half(t: Tensor) -> bool:
    return t.dtype is torch.float16 or t.dtype is torch.bfloat16


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a parameter of `dtype` is updated, also that of its momentum: float64 or float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without float64 (MPS, some XPUs): the dtype of rates and sums of squares."""
    if device.type == "xpu":
        return torch.float64 if torch.xpu.get_device_properties(device).has_fp64 else torch.float32
    return torch.float32 if device.type == "mps" else torch.float64


# ---- checks of one argument ----


def _check_dense(op: str, name: str, t: Any, first: Tensor, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """Checks for a strided tensor of one of these dtypes on the device of the call's first tensor."""
    check_tensor(op, name, t)
    if t.layout is not torch.strided:
        fail(op, name, f"has layout {t.layout}", "torch.strided (dense)", TypeError)
    check_dtype(op, name, t, dtypes)
    check_device(op, name, t, first, "the first tensor")


def _check_scalar(
    op: str, name: str, t: Tensor | None, first: Tensor, dtypes: Sequence[torch.dtype] = (torch.float32,)
) -> None:
    if t is None:
        return
    _check_dense(op, name, t, first, dtypes)
    if t.numel() != 1:
        fail(op, name, f"has shape {tuple(t.shape)}", "one element")


def _check_squares(op: str, name: str, t: Tensor | None, count: int, exactly: bool, first: Tensor) -> None:
    if t is None:
        return
    _check_dense(op, name, t, first, (widest_dtype(first.device),))
    if t.dim() != 1 or t.numel() < count or (exactly and t.numel() != count) or not t.is_contiguous():
        fail(op, name, f"has shape {tuple(t.shape)}", f"({count},){'' if exactly else ' or longer'}, contiguous")


def _check_count(op: str, name: str, values: Sequence[Any], count: int, of: str = "tensors") -> None:
    if len(values) != count:
        fail(op, name, f"has {len(values)} {of}", f"{count}, one for each that needs one")


def _check_beside(
    op: str, name: str, tensors: Sequence[Tensor], params: Sequence[Tensor], written: bool = True
) -> None:
    """Checks for one tensor per parameter, with its shape and the dtype in which it is updated."""
    _check_count(op, name, tensors, len(params))
    for i, (t, param) in enumerate(zip(tensors, params, strict=True)):
        _check_dense(op, f"{name}[{i}]", t, param, (compute_dtype(param.dtype),))
        check_shape(op, f"{name}[{i}]", t, param.shape, "the parameter's")
        if written:
            check_written(op, f"{name}[{i}]", t)


# ---- the calls ----


@dataclass
class CheckCall:
    """The arguments of sgd_check, in the order of its schema."""

    grads: Sequence[Tensor]
    params: Sequence[Tensor]
    masters: Sequence[Tensor]
    found_inf: Tensor
    grad_sq: Tensor | None
    weight_sq: Tensor | None

    def arguments(self) -> tuple[Any, ...]:
        return self.grads, self.params, self.masters, self.found_inf, self.grad_sq, self.weight_sq

    def check(self) -> None:
        """Raises TypeError or ValueError unless the op can run."""
        op = "sgd_check"
        check_tensor(op, "found_inf", self.found_inf)
        first = self.found_inf
        _check_scalar(op, "found_inf", first, first)
        _check_squares(op, "grad_sq", self.grad_sq, len(self.grads), True, first)
        _check_squares(op, "weight_sq", self.weight_sq, len(self.params), True, first)
        for name, tensors in (("grads", self.grads), ("params", self.params)):
            for i, t in enumerate(tensors):
                _check_dense(op, f"{name}[{i}]", t, first)
        if self.weight_sq is not None:
            _check_beside(op, "masters", self.masters, [p for p in self.params if is_half(p)], written=False)


@dataclass(frozen=True)
class Stepped:
    """A parameter to step and its tensors: a master if it is half, buffer and steps if its group has momentum."""

    index: int
    group: int
    param: Tensor
    grad: Tensor
    master: Tensor | None
    momentum_buffer: Tensor | None
    steps: Tensor | None


@dataclass
class StepCall:
    """The arguments of sgd_step, in the order of its schema: those of all parameters on one device, group by group."""

    params: Sequence[Tensor] = ()
    grads: Sequence[Tensor] = ()
    momentum_buffers: Sequence[Tensor] = ()
    steps: Sequence[Tensor] = ()
    masters: Sequence[Tensor] = ()
    group_sizes: Sequence[int] = ()
    lr: Sequence[Tensor] = ()
    momentum: Sequence[float] = ()
    dampening: Sequence[float] = ()
    weight_decay: Sequence[float] = ()
    nesterov: Sequence[bool] = ()
    maximize: Sequence[bool] = ()
    trust_coefficient: Sequence[float] = ()
    eps: float = 0.0
    lr_in_momentum: bool = False
    max_norm: float = 0.0
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    grad_sq: Tensor | None = None
    weight_sq: Tensor | None = None

    def arguments(self) -> tuple[Any, ...]:
        return (
            *(self.params, self.grads, self.momentum_buffers, self.steps, self.masters, self.group_sizes, self.lr),
            *(self.momentum, self.dampening, self.weight_decay, self.nesterov, self.maximize, self.trust_coefficient),
            *(self.eps, self.lr_in_momentum, self.max_norm, self.grad_scale, self.found_inf),
            *(self.grad_sq, self.weight_sq),
        )

    def check(self) -> None:
        """Raises TypeError or ValueError unless the op can run."""
        op = "sgd_step"
        _check_count(op, "grads", self.grads, len(self.params))
        options = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "trust_coefficient")
        for name in options:
            _check_count(op, name, getattr(self, name), len(self.group_sizes), "values")
        for size in self.group_sizes:
            if not isinstance(size, (int, torch.SymInt)):
                fail(op, "group_sizes", f"has a {type(size).__name__}", "integers", TypeError)
        if min(self.group_sizes, default=0) < 0:
            fail(op, "group_sizes", f"has {min(self.group_sizes)}", "at least 0")
        if sum(self.group_sizes) != len(self.params):
            fail(op, "group_sizes", f"add up to {sum(self.group_sizes)}", f"{len(self.params)}, the number of params")
        for name in ("momentum", "dampening", "weight_decay", "trust_coefficient"):
            for value in getattr(self, name):
                check_number(op, name, value, -math.inf if name == "dampening" else 0.0)
        for name in ("eps", "max_norm"):
            check_number(op, name, getattr(self, name), 0.0)
        for name, values in (("nesterov", self.nesterov), ("maximize", self.maximize)):
            for value in values:
                check_bool(op, name, value)
        check_bool(op, "lr_in_momentum", self.lr_in_momentum)
        if not self.params:
            return
        check_tensor(op, "params[0]", self.params[0])
        first, adapted = self.params[0], any(self.trust_coefficient)
        for rate in self.lr:
            _check_scalar(op, "lr", rate, first, (torch.float32, torch.float64))
        _check_scalar(op, "grad_scale", self.grad_scale, first)
        _check_scalar(op, "found_inf", self.found_inf, first)
        _check_squares(op, "grad_sq", self.grad_sq, len(self.params), False, first)
        _check_squares(op, "weight_sq", self.weight_sq, len(self.params), False, first)
        if self.grad_sq is None and (self.max_norm > 0 or adapted):
            fail(op, "grad_sq", "is None", "with max_norm or trust_coefficient: what sgd_check wrote")
        if self.weight_sq is None and adapted:
            fail(op, "weight_sq", "is None", "with trust_coefficient: what sgd_check wrote")
        for i, (param, grad) in enumerate(zip(self.params, self.grads, strict=True)):
            _check_dense(op, f"params[{i}]", param, first)
            _check_dense(op, f"grads[{i}]", grad, first)
            check_shape(op, f"grads[{i}]", grad, param.shape, "the parameter's")
            check_written(op, f"params[{i}]", param)
        _check_beside(op, "masters", self.masters, [p for p in self.params if is_half(p)])
        moving = [p for p, group in zip(self.params, self._groups(), strict=True) if self.momentum[group] != 0]
        _check_beside(op, "momentum_buffers", self.momentum_buffers, moving)
        _check_count(op, "steps", self.steps, len(moving))
        for i, steps in enumerate(self.steps):
            _check_scalar(op, f"steps[{i}]", steps, first)

    def _groups(self) -> list[int]:
        """The group of each parameter."""
        return [group for group, size in enumerate(self.group_sizes) for _ in range(size)]

    def tensors(self) -> Iterator[Stepped]:
        """The parameters in order, each with its tensors."""
        masters, buffers, steps = iter(self.masters), iter(self.momentum_buffers), iter(self.steps)
        for i, (group, param, grad) in enumerate(zip(self._groups(), self.params, self.grads, strict=True)):
            moves = self.momentum[group] != 0
            yield Stepped(
                *(i, group, param, grad, next(masters) if is_half(param) else None),
                *((next(buffers), next(steps)) if moves else (None, None)),
            )
