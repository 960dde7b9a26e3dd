"""sgd_check and sgd_step: SGD with momentum and fp32 masters over whole lists of tensors, one call each.

    g = grad * inv_scale * clip;  if maximize: g = -g;  g += wd * p;  [LARS: g *= trust]
    buf = g on a parameter's first step, else mu * buf + (1 - damp) * g
    d = g + mu * buf if nesterov else buf;  p -= lr * d;  half_param = half(p)          p is the fp32 master

This is torch.optim.SGD's arithmetic (foreach=False, fused=False) on the masters. lr, the loss scale, found_inf, the
norms and the per-parameter step counts are read on the device, so that a step never waits for the host and can be
captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import loaded_namespaces, ops_for
from ..checks import check_number, fail
from ..reference import sgd as _reference
from .sgd_call import CheckCall, StepCall, widest_dtype


def _run(op: str, call: CheckCall | StepCall, device: torch.device) -> bool:
    """Runs an op on the backend of the device; only the op checks the arguments. Returns whether it is a raw op."""
    ops = ops_for(op, device)
    if ops is None:
        getattr(_reference, op)(*call.arguments())
        return False
    if torch.compiler.is_compiling():
        getattr(ops, op).default(*call.arguments())
    else:  # no gradient is recorded: the dispatch for autograd looks at every tensor
        with torch._C._AutoDispatchBelowAutograd():
            getattr(ops, op).default(*call.arguments())
    return True


def run_check(call: CheckCall) -> None:
    """Runs sgd_check on the backend of its device."""
    _run("sgd_check", call, call.found_inf.device)


def run_step(call: StepCall) -> None:
    """Runs sgd_step on the backend of its device."""
    if _run("sgd_step", call, call.params[0].device) and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(call.params)  # autograd must detect that a saved parameter was modified


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
    """One pass over all gradients: sets found_inf to 1 if any value is infinite or NaN, and measures norms.

    Args:
        grads: gradients of any shapes and strides, fp16, bf16, fp32 or fp64, on one device.
        found_inf: fp32, one element; set to 1 on a non-finite value, else unchanged.
        grad_sq: (len(grads),), fp64 (fp32 on devices without fp64); receives each gradient's sum of squares. found_inf
            is also set if a sum is not finite (fp64 gradients beyond 1e154).
        params, masters, weight_sq: for LARS. weight_sq, of shape (len(params),) and the dtype of grad_sq, receives the
            sum of squares of each weight. For fp16 and bf16 weights it is that of the fp32 master (masters has one for
            each of them, in order).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device.

    Examples:
        >>> found_inf = torch.zeros(())
        >>> fasttricks.sgd_check([torch.ones(3), torch.tensor([1.0, float("inf")])], found_inf)
        >>> found_inf
        tensor(1.)
    """
    call = CheckCall(list(grads), list(params), list(masters), found_inf, grad_sq, weight_sq)
    call.check()
    run_check(call)


def _per_group(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        fail("sgd_step", name, f"has {len(value)} values", f"one value, or one for each of the {count} groups")
    return list(value)


def _numbers(name: str, value: Any, count: int, least: float = 0.0) -> list[float]:
    return [check_number("sgd_step", name, v, least) for v in _per_group(name, value, count)]


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
    """One SGD step over all parameters, in place. The module's docstring has the formula.

    Args:
        params: fp16, bf16, fp32 or fp64 tensors of any shapes and strides, on one device; dtypes may be mixed.
        grads: their gradients, of the same shapes; dtypes and strides may differ.
        momentum_buffers: for each parameter whose group has momentum, in order: fp32 (fp64 for fp64) of its shape.
        steps: for each momentum buffer its count of steps, fp32, one element; 0: this is the first step (buf = g).
        masters: for each fp16 and bf16 parameter, in order: its fp32 master. If a parameter no longer equals its
            rounded master because it was changed from outside, the parameter's value is used.
        lr, momentum, dampening, weight_decay, nesterov, maximize, trust_coefficient: one value, or one for each group.
            lr: float, or a tensor of one element that is read on the device.
        group_sizes: how many of params make up each group, in order; default: all are one group.
        grad_scale: fp32, one element: the loss scale, by which gradients are divided.
        found_inf: fp32, one element; unless it is 0, no parameter, master, momentum or count is changed.
        grad_sq, weight_sq: what sgd_check wrote, for max_norm and for LARS.
        max_norm: clip to this global L2 norm of the (unscaled) gradients: clip = min(1, max_norm / (norm + 1e-6)).
        trust_coefficient: 0, or LARS's eta: trust = eta * |p| / (|g| + wd * |p| + eps), 1 where a norm is 0.
        lr_in_momentum: buf accumulates lr * trust * g and p -= d, as in the LARS paper.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device, or a value out of range.

    Examples:
        >>> param, grad = torch.ones(3), torch.full((3,), 2.0)
        >>> fasttricks.sgd_step([param], [grad], lr=0.1)
        >>> param
        tensor([0.8000, 0.8000, 0.8000])
    """
    sizes = [len(params)] if group_sizes is None else list(group_sizes)
    count = len(sizes)
    if max_norm is not None and check_number("sgd_step", "max_norm", max_norm, 0.0) == 0:
        fail("sgd_step", "max_norm", "is 0", "None, or a finite number > 0")
    device = params[0].device if len(params) and isinstance(params[0], Tensor) else torch.device("cpu")
    call = StepCall(
        *(list(params), list(grads), list(momentum_buffers), list(steps), list(masters), sizes),
        lr=[_rate(rate, device) for rate in _per_group("lr", lr, count)],
        momentum=_numbers("momentum", momentum, count),
        dampening=_numbers("dampening", dampening, count, -math.inf),
        weight_decay=_numbers("weight_decay", weight_decay, count),
        nesterov=_per_group("nesterov", nesterov, count),
        maximize=_per_group("maximize", maximize, count),
        trust_coefficient=_numbers("trust_coefficient", trust_coefficient, count),
        eps=check_number("sgd_step", "eps", eps, 0.0),
        lr_in_momentum=lr_in_momentum,
        max_norm=float(max_norm or 0),
        grad_scale=grad_scale,
        found_inf=found_inf,
        grad_sq=grad_sq,
        weight_sq=weight_sq,
    )
    call.check()
    if call.params:
        run_step(call)


def _rate(lr: Any, device: torch.device) -> Tensor:
    if isinstance(lr, Tensor):
        return lr
    return torch.full((), check_number("sgd_step", "lr", lr, 0.0), dtype=widest_dtype(device), device=device)


def _fake_check(*arguments: Any) -> None:
    CheckCall(*arguments).check()


def _fake_step(*arguments: Any) -> None:
    StepCall(*arguments).check()


def register(namespace: str) -> None:
    """Registers fakes for the ops of a namespace (fasttricks, fasttricks_triton)."""
    torch.library.register_fake(f"{namespace}::sgd_check", _fake_check)
    torch.library.register_fake(f"{namespace}::sgd_step", _fake_step)


for loaded in loaded_namespaces():
    register(loaded)
