"""bn_relu and bn_add_relu in plain torch: oracle of the tests, differentiable any number of times, and fallback."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and statistics: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype of sums. One such tensor for statistics and values: the gradient of x is then rounded once."""
    return x.to(accumulate_dtype(x.dtype))


def _per_channel(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return t.to(accumulate_dtype(like.dtype)).reshape(-1, *[1] * (like.dim() - 2))


def values_per_channel(x: torch.Tensor) -> int:
    """The number of values that a channel's statistics are of."""
    return x.shape[0] * math.prod(x.shape[2:])


def statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance per channel of x (N, C, ...); zeros of an empty x."""
    values = widened(x)
    if x.numel() == 0:
        return values.new_zeros(x.shape[1]), values.new_zeros(x.shape[1])
    dims = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(values, dims, correction=0)
    return mean, var


def normalised(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """weight * (x - mean) / sqrt(var + eps) + bias in float32 or 64."""
    scale = torch.rsqrt(var.to(accumulate_dtype(x.dtype)) + eps)
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    z = (x.to(scale.dtype) - _per_channel(mean, x)) * _per_channel(scale, x)
    return z if bias is None else z + _per_channel(bias, x)


def apply(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """relu(weight * (x - mean) / sqrt(var + eps) + bias [+ residual]), summed in float32 or 64, in `dtype`."""
    z = normalised(x, weight, bias, mean, var, eps)
    if residual is not None:
        z = z + residual.to(z.dtype)
    return F.relu(z.to(dtype))


def update_statistics(
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    count: int | torch.Tensor,
    num_batches_tracked: torch.Tensor | None,
    momentum: float | None,
) -> None:
    """running = (1 - momentum) * running + momentum * new, the variance unbiased; an empty batch only counts.

    momentum: None is 1 / num_batches_tracked, the cumulative average.
    """
    with torch.no_grad():
        batches = None if num_batches_tracked is None else num_batches_tracked + 1
        if running_mean is not None and running_var is not None and not (isinstance(count, int) and count == 0):
            factor: float | torch.Tensor
            if momentum is not None:
                factor = momentum
            else:
                assert batches is not None
                factor = 1.0 / batches.to(accumulate_dtype(running_mean.dtype))
            bessel: float | torch.Tensor
            if isinstance(count, torch.Tensor):
                factor, bessel = torch.where(count > 0, factor, 0.0), count / (count - 1).clamp(min=1)
            else:
                bessel = count / max(count - 1, 1)
            for running, new in ((running_mean, mean), (running_var, var * bessel)):
                dtype = accumulate_dtype(running.dtype)
                running.copy_((1 - factor) * running.to(dtype) + factor * new.to(dtype))
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)


def bn_add_relu(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    *,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `fasttricks.bn_add_relu`; residual None: no addition."""
    if not training:
        assert running_mean is not None
        assert running_var is not None
        return apply(x, residual, weight, bias, running_mean, running_var, eps, x.dtype)
    values = widened(x)
    mean, var = statistics(values)
    update_statistics(
        running_mean, running_var, mean.detach(), var.detach(), values_per_channel(x), num_batches_tracked, momentum
    )
    return apply(values, residual, weight, bias, mean, var, eps, x.dtype)


def pool(y: torch.Tensor, ceil_mode: bool) -> torch.Tensor:
    """The 2x2 means of y; with ceil_mode also of the windows that overhang an odd edge, over their pixels inside."""
    return F.avg_pool2d(y, 2, ceil_mode=ceil_mode, count_include_pad=False)


def spread(dy2: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A second gradient of y in the shape of x: that of a 2x2 mean goes to the pixels of its window in equal parts."""
    for dim in (2, 3) if dy2.shape != x.shape else ():
        size, pooled = x.shape[dim], dy2.shape[dim]
        share = torch.full((size,), 0.5, dtype=x.dtype, device=x.device)
        if size % 2:  # the last pixel has a window of its own, or none
            share[-1] = 1.0 if 2 * pooled > size else 0.0
        windows = (torch.arange(size, device=x.device) // 2).clamp(max=max(0, pooled - 1))
        dy2 = dy2.index_select(dim, windows) if pooled else dy2.new_zeros(*dy2.shape[:dim], size, *dy2.shape[dim + 1 :])
        dy2 = dy2 * share.view(-1, *[1] * (3 - dim))
    return dy2


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    training: bool,
    passes: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The formula of the backward pass in differentiable operations: dx, dresidual, dweight, dbias.

    passes: which elements the ReLU passed, where that was saved; else it is computed again from x. In training the
    statistics are functions of x and are recomputed, so that a second derivative sees them.
    """
    values = widened(x)
    dtype = values.dtype
    if training:
        mean, var = statistics(values)
    rstd = torch.rsqrt(var.to(dtype) + eps)
    if passes is None:
        with torch.no_grad():
            y = apply(values, residual, weight, bias, mean, var, eps, x.dtype)
            passes = ~(y <= 0)
    dz = torch.where(passes, dy.to(dtype), torch.zeros((), dtype=dtype, device=x.device))
    centred = values - _per_channel(mean, x)
    dims = [d for d in range(x.dim()) if d != 1]
    dbias = dz.sum(dims)
    dweight = (dz * centred).sum(dims) * rstd
    scale = rstd if weight is None else rstd * weight.to(dtype)
    inner = dz
    if training:
        count = max(1, values_per_channel(x))
        inner = dz - _per_channel(dbias / count, x) - centred * _per_channel(rstd * dweight / count, x)
    dx = inner * _per_channel(scale, x)
    return dx.to(x.dtype), dz.to(x.dtype), dweight, dbias
