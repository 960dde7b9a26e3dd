"""sgd_check and sgd_step in plain torch, with no host synchronisation: the fallback if there is no kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.sgd_call import CheckCall, StepCall, is_half, widest_dtype


def masters_as_seen(param: Tensor, master: Tensor) -> Tensor:
    """The fp32 master, or param's value where it no longer equals the rounded master (it was changed from outside)."""
    return torch.where(master.to(param.dtype) == param, master, param.to(master.dtype))


def sgd_check(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    masters: Sequence[Tensor],
    found_inf: Tensor,
    grad_sq: Tensor | None,
    weight_sq: Tensor | None,
) -> None:
    """See fasttricks.sgd_check; the arguments of the raw op."""
    CheckCall(grads, params, masters, found_inf, grad_sq, weight_sq).check()

    def square_sum(t: Tensor) -> Tensor:
        return t.to(widest_dtype(t.device)).square().sum()

    for i, grad in enumerate(grads):
        finite = torch.isfinite(grad).all()
        if grad_sq is not None:
            grad_sq[i] = square_sum(grad)
            finite = finite & torch.isfinite(grad_sq[i])
        found_inf.copy_(torch.where(finite, found_inf, torch.ones_like(found_inf)))
    if weight_sq is not None:
        rest = iter(masters)
        for i, param in enumerate(params):
            weight_sq[i] = square_sum(masters_as_seen(param, next(rest)) if is_half(param) else param)


def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    steps: Sequence[Tensor],
    masters: Sequence[Tensor],
    group_sizes: Sequence[int],
    lr: Sequence[Tensor],
    momentum: Sequence[float],
    dampening: Sequence[float],
    weight_decay: Sequence[float],
    nesterov: Sequence[bool],
    maximize: Sequence[bool],
    trust_coefficient: Sequence[float],
    eps: float,
    lr_in_momentum: bool,
    max_norm: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    grad_sq: Tensor | None,
    weight_sq: Tensor | None,
) -> None:
    """See fasttricks.sgd_step; the arguments of the raw op."""
    call = StepCall(
        params, grads, momentum_buffers, steps, masters, group_sizes, lr, momentum, dampening, weight_decay, nesterov,
        maximize, trust_coefficient, eps, lr_in_momentum, max_norm, grad_scale, found_inf, grad_sq, weight_sq,
    )  # fmt: skip
    call.check()
    if not params:
        return
    wide = widest_dtype(params[0].device)
    skip = found_inf.reshape(()) != 0 if found_inf is not None else None
    inv_scale = None if grad_scale is None else grad_scale.reshape(()).to(wide).reciprocal()
    clip = None
    if max_norm > 0:
        assert grad_sq is not None
        norm = grad_sq.sum().sqrt() * (1.0 if inv_scale is None else inv_scale)
        clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)

    def write(old: Tensor, new: Tensor) -> None:
        old.copy_(new if skip is None else torch.where(skip, old, new))

    for t in call.tensors():
        param, group = t.param, t.group
        p = param if t.master is None else masters_as_seen(param, t.master)
        rate = lr[group].reshape(()).to(wide)
        g = t.grad.to(p.dtype)
        if inv_scale is not None:
            g = g * inv_scale.to(p.dtype)
        if clip is not None:
            g = g * clip.to(p.dtype)
        if maximize[group]:
            g = -g
        if weight_decay[group] != 0:
            g = g.add(p, alpha=weight_decay[group])
        if trust_coefficient[group] > 0:
            assert grad_sq is not None
            assert weight_sq is not None
            w = weight_sq[t.index].sqrt()
            n = grad_sq[t.index].sqrt() * (1.0 if inv_scale is None else inv_scale) * (1.0 if clip is None else clip)
            trust = trust_coefficient[group] * w / (n + weight_decay[group] * w + eps)
            trust = torch.where((w > 0) & (n > 0), trust, torch.ones_like(trust))
            g = g * (rate * trust if lr_in_momentum else trust).to(p.dtype)
        elif lr_in_momentum:
            g = g * rate.to(p.dtype)
        if t.momentum_buffer is not None and t.steps is not None:
            buffer, mu = t.momentum_buffer, momentum[group]
            new = torch.where(torch.eq(t.steps, 0), g, (buffer * mu).add(g, alpha=1 - dampening[group]))
            g = g.add(new, alpha=mu) if nesterov[group] else new
            write(buffer, new)
        new_p = p - g if lr_in_momentum else torch.addcmul(p, g, rate.to(p.dtype), value=-1)
        if t.master is not None:
            write(t.master, new_p)
        write(param, new_p.to(param.dtype))
    # a parameter given twice is stepped twice, both times with the step count from before the call
    for count in steps:
        count.add_(1.0 if skip is None else (~skip).to(count.dtype))
