"""Argument checks of avgpool_conv1x1 and its raw ops; the C++ ops raise the same messages."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import check_bool, check_device, check_dtype, check_shape, check_tensor
from ..reference.avgpool_conv1x1 import output_size


def check_forward(op: str, x: Any, weight: Any, bias: Any, stride: Any, ceil_mode: Any) -> None:
    """Raises a TypeError or ValueError that names `op` and the argument."""
    check_tensor(op, "x", x)
    check_dtype(op, "x", x)
    for name, t in (("weight", weight), ("bias", bias)):
        check_tensor(op, name, t, optional=name == "bias")
        if t is not None:
            check_dtype(op, name, t, (x.dtype,))
            check_device(op, name, t, x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; accepted: 4 dimensions (N, C, H, W)")
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (x.shape[1], 1, 1) or 0 in weight.shape:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)} and x {tuple(x.shape)}; accepted: weight of shape "
            "(Cout, C, 1, 1) with the C of x, none of them zero (no groups, no other kernel size)"
        )
    if bias is not None:
        check_shape(op, "bias", bias, (weight.shape[0],), "the Cout of weight")
    if isinstance(stride, bool) or not isinstance(stride, int) or stride not in (1, 2):
        raise ValueError(f"{op}: stride is {stride!r}; accepted: 1, 2")
    check_bool(op, "ceil_mode", ceil_mode)
    if 0 in (size := output_size(x, stride, ceil_mode)):
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)}, so that the output would be {size[0]} x {size[1]}: Output size is "
            f"too small; accepted: H and W of at least {1 if ceil_mode else stride}"
        )


def check_backward(op: str, dy: torch.Tensor, x: Any, weight: Any, stride: Any, ceil_mode: Any) -> None:
    """As `check_forward`, and checks dy, the gradient of y."""
    check_forward(op, x, weight, None, stride, ceil_mode)
    check_dtype(op, "dy", dy, (x.dtype,))
    check_device(op, "dy", dy, x)
    check_shape(op, "dy", dy, (x.shape[0], weight.shape[0], *output_size(x, stride, ceil_mode)), "the shape of y")
