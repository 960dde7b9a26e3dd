"""bn_add_bn_relu in Triton: launches and registration. bn_add_bn_relu_kernels.py has the formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from ..ops.bn_add_bn_relu_checks import check_apply, check_backward, check_forward
from ..reference.bn_relu import values_per_channel
from . import bn_add_bn_relu_kernels as kernels
from . import launch as launching
from .bn_relu import (
    WARPS,
    Shape,
    dense,
    empty_like_x,
    in_sums_dtype,
    laid_out,
    like_x,
    per_channel,
    reduce_backward,
    second_gradient,
    statistics,
    update_running,
)

# the numbers per channel of both BatchNorms, as the kernels name them


def _affine(*given: Tensor | None) -> dict[str, Tensor | None]:
    return dict(zip(("weight", "bias", "residual_weight", "residual_bias"), map(dense, given), strict=True))


def _means(x: Tensor, *given: Tensor) -> dict[str, Any]:
    names = ("mean", "var", "residual_mean", "residual_var")
    return {name: in_sums_dtype(t, x) for name, t in zip(names, given, strict=True)}


def _apply(
    x: Tensor, residual: Tensor, layout: torch.memory_format, numbers: dict[str, Tensor | None], eps: float,
    residual_eps: float, skip: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = empty_like_x(x, layout)
    mask = torch.empty(cdiv(x.numel(), 8), dtype=torch.uint8, device=x.device)
    if x.numel() == 0:
        return y, mask
    grid, arguments, constants = Shape.of(x, layout).elementwise(launching.programs(x.device))
    tensors = {"x": x, "residual": residual, **numbers, "y": y, "mask": mask}
    constants |= {"EPS": eps, "RESIDUAL_EPS": residual_eps, "SKIP": skip and numbers["weight"] is not None}
    launching.launch(kernels.bn_add_bn_apply_kernel, grid, {**tensors, **arguments}, constants, WARPS)
    return y, mask


def bn_add_bn_relu_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, residual_weight: Tensor | None,
    residual_bias: Tensor | None, eps: float, residual_eps: float, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, num_batches_tracked: Tensor | None = None, momentum: float | None = 0.1,
    residual_running_mean: Tensor | None = None, residual_running_var: Tensor | None = None,
    residual_num_batches_tracked: Tensor | None = None, residual_momentum: float | None = 0.1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the batch statistics of x and of the residual, and the bit mask; updates both running statistics."""
    moved = running_mean, running_var, num_batches_tracked, momentum
    residual_moved = (
        residual_running_mean, residual_running_var, residual_num_batches_tracked, residual_momentum,
    )  # fmt: skip
    op = "bn_add_bn_relu_forward"
    check_forward(
        op, x, residual, weight, bias, residual_weight, residual_bias, eps, residual_eps, *moved, *residual_moved
    )
    x, layout = laid_out(x)
    residual = like_x(residual, layout)
    mean, var = statistics(x, layout)
    residual_mean, residual_var = statistics(residual, layout)
    numbers = _affine(weight, bias, residual_weight, residual_bias)
    numbers |= _means(x, mean, var, residual_mean, residual_var)
    y, mask = _apply(x, residual, layout, numbers, eps, residual_eps, skip=True)
    count = values_per_channel(x)
    _moved(moved, mean, var, count)
    _moved(residual_moved, residual_mean, residual_var, count)
    return y, mean, var, residual_mean, residual_var, mask


def _moved(moved: tuple[Any, ...], mean: Tensor, var: Tensor, count: int) -> None:
    running_mean, running_var, batches, momentum = moved
    update_running(running_mean, running_var, mean, var, count, batches, momentum)


def bn_add_bn_relu_apply(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, residual_weight: Tensor | None,
    residual_bias: Tensor | None, mean: Tensor, var: Tensor, residual_mean: Tensor, residual_var: Tensor,
    eps: float, residual_eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and the bit mask from given statistics."""
    check_apply(
        "bn_add_bn_relu_apply", x, residual, weight, bias, residual_weight, residual_bias, mean, var, residual_mean,
        residual_var, eps, residual_eps,
    )  # fmt: skip
    x, layout = laid_out(x)
    numbers = _affine(weight, bias, residual_weight, residual_bias)
    numbers |= _means(x, mean, var, residual_mean, residual_var)
    return _apply(x, like_x(residual, layout), layout, numbers, eps, residual_eps, skip=False)


def bn_add_bn_relu_backward(
    dy: Tensor, x: Tensor, residual: Tensor, mask: Tensor, weight: Tensor | None, residual_weight: Tensor | None,
    mean: Tensor, var: Tensor, residual_mean: Tensor, residual_var: Tensor, eps: float, residual_eps: float,
    training: bool, dy2: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dresidual, dweight, dresidual_weight and dbias, of both; dy2: as in bn_relu_backward."""
    check_backward(
        "bn_add_bn_relu_backward", dy, x, residual, mask, weight, residual_weight, mean, var, residual_mean,
        residual_var, eps, residual_eps, training, dy2,
    )  # fmt: skip
    x, layout = laid_out(x)
    inputs: dict[str, Any] = {
        "dy": like_x(dy, layout),
        "x": x,
        "residual": like_x(residual, layout),
        "mask": mask.contiguous(),
        **_means(x, mean, var, residual_mean, residual_var),
    }
    epsilons = {"EPS": eps, "RESIDUAL_EPS": residual_eps}
    second, constants = second_gradient(dy2, x, layout)
    sums = {name: per_channel(x) for name in ("dweight", "dbias", "dresidual_weight")}
    kernel = kernels.bn_add_bn_backward_reduce_kernel
    reduce_backward(kernel, {**inputs, **second}, {**constants, **epsilons}, layout, sums)
    dx, dresidual = empty_like_x(x, layout), empty_like_x(x, layout)
    if x.numel() > 0:
        if second["dz"] is not None:
            inputs |= {"dy": second["dz"], "mask": None}
        weights = {"weight": dense(weight), "residual_weight": dense(residual_weight)}
        outputs = {"dx": dx, "dresidual": dresidual, "count": values_per_channel(x)}
        grid, arguments, constants = Shape.of(x, layout).elementwise(launching.programs(x.device))
        arguments = {**inputs, **weights, **sums, **outputs, **arguments}
        kernel = kernels.bn_add_bn_backward_apply_kernel
        launching.launch(kernel, grid, arguments, {**constants, **epsilons, "BATCH": training}, WARPS)
    return dx, dresidual, sums["dweight"], sums["dresidual_weight"], sums["dbias"]


_MOVED = ("running_mean", "running_var", "num_batches_tracked")
launching.define(bn_add_bn_relu_forward, (*_MOVED, *(f"residual_{name}" for name in _MOVED)))
launching.define(bn_add_bn_relu_apply)
launching.define(bn_add_bn_relu_backward)
