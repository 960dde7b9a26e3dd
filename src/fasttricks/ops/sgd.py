"""sgd_check and sgd_step: SGD with momentum and fp32 masters over whole lists of tensors, one call each.

    g = grad * inv_scale * clip;  if maximize: g = -g;  g += wd * p;  [LARS: g *= trust]
    buf = g on a parameter's first step, else mu * buf + (1 - damp) * g
    d = g + mu * buf if nesterov else buf;  p -= lr * d;  half_param = half(p)          p is the fp32 master

This is torch.optim.SGD's arithmetic (foreach=False, fused=False) on the masters. What decides is read on the device:
lr, the loss scale, found_inf, the norms and the per-parameter step counts, so that a step never waits for the host and
can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import loaded_namespaces, ops_for
from ..reference import sgd as _reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _kernel(name: str, device: torch.device) -> Any:
    ops = ops_for("sgd", device)
    return getattr(_reference if ops is None else ops, name)


def check_raw(device: torch.device, *arguments: Any) -> None:
    """The raw op on the backend of `device`; no checks but its own."""
    _kernel("sgd_check", device)(*arguments)


def step_raw(device: torch.device, *arguments: Any) -> None:
    """The raw op on the backend of `device`; no checks but its own."""
    _kernel("sgd_step", device)(*arguments)


def _check_list(name: str, tensors: Sequence[Tensor], device: torch.device) -> None:
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}[{i}] is {type(t).__name__}; accepted: torch.Tensor")
        if t.layout is not torch.strided:
            raise TypeError(f"{name}[{i}] has layout {t.layout}; accepted: torch.strided (dense) tensors")
        if t.dtype not in DTYPES:
            raise TypeError(f"{name}[{i}] has dtype {t.dtype}; accepted: float16, bfloat16, float32, float64")
        if t.device != device:
            raise ValueError(f"{name}[{i}] is on {t.device}; accepted: {device}, where the first one is")


def _check_shapes(name: str, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    if len(tensors) != len(params):
        raise ValueError(f"{name} has {len(tensors)} tensors; accepted: {len(params)}, one for each that needs one")
    for i, (t, p) in enumerate(zip(tensors, params, strict=True)):
        if t.shape != p.shape:
            raise ValueError(f"{name}[{i}] has shape {tuple(t.shape)}; accepted: {tuple(p.shape)}, its parameter's")


@torch.no_grad()
def sgd_check(
    grads: Sequence[Tensor],
    found_inf: Tensor,
    *,
    grad_sq: Tensor | None = None,
    params: Sequence[Tensor] = (),
    masters: Sequence[Tensor] = (),
    weight_sq: Tensor | None = None,
) -> None:
    """One pass over all gradients: sets found_inf to 1 where any value is infinite or NaN, and measures norms.

    Args:
        grads: gradients of any shapes and strides, fp16, bf16, fp32 or fp64, on one device.
        found_inf: fp32, one element; set to 1 on a non-finite value, otherwise left as it is.
        grad_sq: fp64, (len(grads),); receives each gradient's sum of squares. found_inf is set, too, where one is not
            finite (fp64 gradients beyond 1e154).
        params, masters, weight_sq: for LARS. weight_sq, fp64 (len(params),), receives the sum of squares of each
            weight: of its fp32 master where it is fp16 or bf16 (masters: one for each of those, in order).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device.

    Examples:
        >>> found_inf = torch.zeros(())
        >>> fasttricks.sgd_check([torch.ones(3), torch.tensor([1.0, float("inf")])], found_inf)
        >>> found_inf
        tensor(1.)
    """
    if not isinstance(found_inf, Tensor) or found_inf.dtype != torch.float32 or found_inf.numel() != 1:
        raise ValueError("found_inf must be an fp32 tensor of one element")
    device = found_inf.device
    for name, tensors in (("grads", grads), ("params", params), ("masters", masters)):
        _check_list(name, tensors, device)
    for name, out, like in (("grad_sq", grad_sq, grads), ("weight_sq", weight_sq, params)):
        if out is not None and (out.dtype != torch.float64 or out.shape != (len(like),) or out.device != device):
            raise ValueError(f"{name} must be an fp64 tensor of shape ({len(like)},) on {device}")
    if weight_sq is not None:
        _check_shapes("masters", masters, [p for p in params if _reference.is_half(p)])
    check_raw(device, list(grads), list(params), list(masters), found_inf, grad_sq, weight_sq)


def _per_group(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} values; accepted: one value, or one for each of the {count} groups")
    return list(value)


@torch.no_grad()
def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] = (),
    steps: Sequence[Tensor] = (),
    masters: Sequence[Tensor] = (),
    *,
    lr: float | Tensor | Sequence[float | Tensor],
    momentum: float | Sequence[float] = 0.0,
    dampening: float | Sequence[float] = 0.0,
    weight_decay: float | Sequence[float] = 0.0,
    nesterov: bool | Sequence[bool] = False,
    maximize: bool | Sequence[bool] = False,
    group_sizes: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    grad_sq: Tensor | None = None,
    max_norm: float | None = None,
    weight_sq: Tensor | None = None,
    trust_coefficient: float | Sequence[float] = 0.0,
    eps: float = 0.0,
    lr_in_momentum: bool = False,
) -> None:
    """One SGD step over all parameters, in place; the formula stands at the top of this module.

    Args:
        params: fp16, bf16, fp32 or fp64 tensors of any shapes and strides, on one device; dtypes may be mixed.
        grads: their gradients, of the same shapes; dtypes and strides may differ.
        momentum_buffers: for each parameter whose group has momentum, in order: fp32 (fp64 for fp64) of its shape.
        steps: beside each momentum buffer its count of steps, fp32, one element; 0: this is the first (buf = g).
        masters: for each fp16 and bf16 parameter, in order: its fp32 master. Where a parameter is no longer its rounded
            master (it was changed from outside) the parameter's value is taken.
        lr, momentum, dampening, weight_decay, nesterov, maximize, trust_coefficient: one value, or one for each group.
            lr: float, or a tensor of one element that is read on the device.
        group_sizes: how many of params make up each group, in order; default: all are one group.
        grad_scale: fp32, one element: what the loss was multiplied by (gradients are divided by it).
        found_inf: fp32, one element: unless it is 0 nothing changes: no parameter, master, momentum or count.
        grad_sq, weight_sq: what sgd_check wrote, for max_norm and for LARS.
        max_norm: clip to this global L2 norm of the (unscaled) gradients: clip = min(1, max_norm / (norm + 1e-6)).
        trust_coefficient: 0, or LARS's eta: trust = eta * |p| / (|g| + wd * |p| + eps), 1 where a norm is 0.
        lr_in_momentum: buf sums up lr * trust * g and p -= d, as in LARS's paper.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device, or a value out of range.

    Examples:
        >>> param, grad = torch.ones(3), torch.full((3,), 2.0)
        >>> fasttricks.sgd_step([param], [grad], lr=0.1)
        >>> param
        tensor([0.8000, 0.8000, 0.8000])
    """
    if not params:
        return
    device = params[0].device
    sizes = [len(params)] if group_sizes is None else list(group_sizes)
    if sum(sizes) != len(params) or min(sizes) < 0:
        raise ValueError(f"group_sizes is {sizes}; accepted: sizes that add up to the {len(params)} parameters")
    count = len(sizes)
    rates = [
        r if isinstance(r, Tensor) else torch.full((), check_lr(r), dtype=torch.float64, device=device)
        for r in _per_group("lr", lr, count)
    ]
    mu, damp = _per_group("momentum", momentum, count), _per_group("dampening", dampening, count)
    decay, eta = (
        _per_group("weight_decay", weight_decay, count),
        _per_group("trust_coefficient", trust_coefficient, count),
    )
    for name, values in (("momentum", mu), ("weight_decay", decay), ("trust_coefficient", eta)):
        for value in values:
            check_at_least_zero(name, value)
    lists = {"params": params, "grads": grads, "momentum_buffers": momentum_buffers, "masters": masters}
    for name, tensors in {**lists, "steps": steps, "lr": rates}.items():
        _check_list(name, tensors, device)
    _check_shapes("grads", grads, params)
    starts = [sum(sizes[:k]) for k in range(count)]
    moving = [p for k in range(count) if mu[k] != 0 for p in params[starts[k] : starts[k] + sizes[k]]]
    _check_shapes("momentum_buffers", momentum_buffers, moving)
    _check_shapes("masters", masters, [p for p in params if _reference.is_half(p)])
    if len(steps) != len(moving):
        raise ValueError(f"steps has {len(steps)} tensors; accepted: {len(moving)}, one for each momentum buffer")
    if max_norm is not None and not (max_norm > 0 and math.isfinite(max_norm)):
        raise ValueError(f"max_norm is {max_norm}; accepted: None, or a finite number above 0")
    if grad_sq is None and (max_norm is not None or any(eta)):
        raise ValueError("grad_sq is None; accepted with max_norm or trust_coefficient: what sgd_check wrote")
    if weight_sq is None and any(eta):
        raise ValueError("weight_sq is None; accepted with trust_coefficient: what sgd_check wrote")
    step_raw(
        device,
        *(list(params), list(grads), list(momentum_buffers), list(steps), list(masters)),
        *(sizes, rates, mu, damp, decay, _per_group("nesterov", nesterov, count)),
        *(_per_group("maximize", maximize, count), eta, eps, lr_in_momentum, max_norm or 0.0),
        *(grad_scale, found_inf, grad_sq, weight_sq),
    )


def check_lr(lr: float, where: str = "lr") -> float:
    """lr as a float. Raises ValueError unless it is finite and at least 0."""
    if not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"{where} is {lr}; accepted: a finite number >= 0")
    return float(lr)


def check_at_least_zero(name: str, value: float) -> None:
    """Raises TypeError unless value is a number, ValueError unless it is finite and at least 0."""
    if isinstance(value, Tensor) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {type(value).__name__}; accepted: a number")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value}; accepted: a finite number >= 0")


def _fake(*arguments: Any) -> None:
    """Both ops only mutate what they are given."""


def register(namespace: str) -> None:
    """Gives the ops of a namespace with these schemas (fasttricks, fasttricks_triton) their fakes."""
    for name in ("sgd_check", "sgd_step"):
        torch.library.register_fake(f"{namespace}::{name}", _fake)


for loaded in loaded_namespaces():
    register(loaded)
