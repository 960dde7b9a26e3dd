"""bn_add_relu with its 2x2 means in Triton: launches and registration. bn_add_relu_pool_kernels.py has the formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from ..ops.bn_outputs import means_of
from ..ops.bn_relu_checks import check_apply, check_forward, check_pool
from ..reference.bn_relu import accumulate_dtype, values_per_channel
from . import bn_add_relu_pool_kernels as kernels
from . import launch as launching
from .bn_relu import (
    APPLY_GROUPS,
    WARPS,
    apply,
    apply_tensors,
    empty_like_x,
    laid_out,
    statistics,
    update_running,
)

MEANS = 512  # of a program that computes nothing else


def _apply_pool(
    x: Tensor, layout: torch.memory_format, residual: Tensor, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, var: Tensor, eps: float, ceil_mode: bool, skip: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, its means and the bit mask."""
    pooled = means_of(x, ceil_mode)
    n, c, height, width = x.shape
    nhwc = layout != torch.contiguous_format
    sizes = {"height": height, "width": width, "pooled_height": pooled.shape[2], "pooled_width": pooled.shape[3]}
    wide = x.numel() >= launching.WIDE_FROM
    if x.numel() == 0 or (c if nhwc else width) % 8:
        y, mask = apply(x, layout, residual, weight, bias, mean, var, eps, skip)
        assert mask is not None
        if pooled.numel():
            arguments = {"y": y, "pooled": pooled, "numel": pooled.numel(), "pixel": c if nhwc else 1, **sizes}
            constants: dict[str, Any] = {"ACC": launching.TYPES[accumulate_dtype(x.dtype)], "WIDE": wide}
            constants["BLOCK"] = MEANS
            grid = (cdiv(pooled.numel(), MEANS),)
            launching.launch(kernels.bn_pool_means_kernel, grid, arguments, constants, WARPS)
        return y, pooled, mask
    y = empty_like_x(x, layout)
    mask = torch.empty(x.numel() // 8, dtype=torch.uint8, device=x.device)
    units = (c if nhwc else width) // 8
    groups = n * cdiv(height, 2) * units * (cdiv(width, 2) if nhwc else c)
    read = apply_tensors(x, layout, residual, weight, bias, mean, var)
    tensors = {**read, "y": y, "mask": mask, "pooled": pooled}
    arguments = {**tensors, "groups": groups, "units": units, "channels": c, **sizes}
    constants = {"EPS": eps, "NHWC": nhwc, "SKIP": skip and weight is not None, "WIDE": wide, "GROUPS": APPLY_GROUPS}
    launching.launch(kernels.bn_apply_pool_kernel, (cdiv(groups, APPLY_GROUPS),), arguments, constants, WARPS)
    return y, pooled, mask


def bn_add_relu_pool_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None,
    momentum: float | None, ceil_mode: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, its 2x2 means, the batch statistics and the bit mask of the ReLU; updates the running statistics."""
    op, moved = "bn_add_relu_pool_forward", (running_mean, running_var, num_batches_tracked, momentum)
    check_forward(op, x, residual, weight, bias, eps, *moved)
    check_pool(op, x, ceil_mode)
    x, layout = laid_out(x)
    mean, var = statistics(x, layout)
    y, pooled, mask = _apply_pool(x, layout, residual, weight, bias, mean, var, eps, ceil_mode, skip=True)
    update_running(running_mean, running_var, mean, var, values_per_channel(x), num_batches_tracked, momentum)
    return y, pooled, mean, var, mask


def bn_add_relu_pool_apply(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float,
    ceil_mode: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, its 2x2 means and the bit mask from given statistics."""
    op = "bn_add_relu_pool_apply"
    check_apply(op, x, residual, weight, bias, mean, var, eps)
    check_pool(op, x, ceil_mode)
    return _apply_pool(*laid_out(x), residual, weight, bias, mean, var, eps, ceil_mode, skip=False)


launching.define(bn_add_relu_pool_forward, ("running_mean", "running_var", "num_batches_tracked"))
launching.define(bn_add_relu_pool_apply)
