"""sgd_check and sgd_step in plain torch, with no host synchronisation: the fallback where there is no kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def masters_as_seen(param: Tensor, master: Tensor) -> Tensor:
    """The fp32 master, with param's value where param is no longer the rounded master (it was changed from outside)."""
    return torch.where(master.to(param.dtype) == param, master, param.to(master.dtype))


def is_half(t: Tensor) -> bool:
    return t.dtype in (torch.float16, torch.bfloat16)


def sgd_check(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    masters: Sequence[Tensor],
    found_inf: Tensor,
    grad_sq: Tensor | None,
    weight_sq: Tensor | None,
) -> None:
    """See fasttricks.sgd_check; the arguments of the raw op."""

    def square_sum(t: Tensor) -> Tensor:
        return t.double().square().sum()

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
    if not params:
        return
    skip = found_inf.reshape(()) != 0 if found_inf is not None else None
    inv_scale = None if grad_scale is None else grad_scale.reshape(()).double().reciprocal()
    clip = None
    if max_norm > 0:
        if grad_sq is None:
            raise ValueError("grad_sq is None; accepted with max_norm: the squared norms that sgd_check writes")
        norm = grad_sq.sum().sqrt() * (1.0 if inv_scale is None else inv_scale)
        clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)

    def write(old: Tensor, new: Tensor) -> None:
        old.copy_(new if skip is None else torch.where(skip, old, new))

    buffers, counts, copies = iter(momentum_buffers), list(steps), iter(masters)
    counted = iter(counts)
    i = 0
    for k, size in enumerate(group_sizes):
        for param, grad in zip(params[i : i + size], grads[i : i + size], strict=True):
            master = next(copies) if is_half(param) else None
            p = param if master is None else masters_as_seen(param, master)
            rate = lr[k].reshape(()).to(torch.float64)
            g = grad.to(p.dtype)
            if inv_scale is not None:
                g = g * inv_scale.to(p.dtype)
            if clip is not None:
                g = g * clip.to(p.dtype)
            if maximize[k]:
                g = -g
            if weight_decay[k] != 0:
                g = g.add(p, alpha=weight_decay[k])
            if trust_coefficient[k] > 0:
                assert grad_sq is not None
                assert weight_sq is not None
                w = weight_sq[i].sqrt()
                n = grad_sq[i].sqrt() * (1.0 if inv_scale is None else inv_scale) * (1.0 if clip is None else clip)
                trust = trust_coefficient[k] * w / (n + weight_decay[k] * w + eps)
                trust = torch.where((w > 0) & (n > 0), trust, torch.ones_like(trust))
                g = g * (rate * trust if lr_in_momentum else trust).to(p.dtype)
            elif lr_in_momentum:
                g = g * rate.to(p.dtype)
            if momentum[k] != 0:
                buffer, count = next(buffers), next(counted)
                new = torch.where(count == 0, g, (buffer * momentum[k]).add(g, alpha=1 - dampening[k]))
                g = g.add(new, alpha=momentum[k]) if nesterov[k] else new
                write(buffer, new)
            new_p = p - g if lr_in_momentum else torch.addcmul(p, g, rate.to(p.dtype), value=-1)
            if master is not None:
                write(master, new_p)
            write(param, new_p.to(param.dtype))
            i += 1
    # a parameter given twice is stepped twice, both with the count that it came with
    for count in counts:
        count.add_(1.0 if skip is None else (~skip).to(count.dtype))
