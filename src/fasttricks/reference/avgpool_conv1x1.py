"""avgpool_conv1x1 in plain torch: what it accepts, what the tests compare with, what runs where no kernel can."""

from __future__ import annotations

import torch
import torch.nn.functional as F

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(
    op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, ceil_mode: bool
) -> None:
    """Raises a TypeError or ValueError that names `op` and the argument that it does not accept."""
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is None and name == "bias":
            continue
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}; accepted: a tensor")
        if t.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} has dtype {t.dtype}; accepted: float16, bfloat16, float32, float64")
        if t.dtype != x.dtype:
            raise TypeError(f"{op}: {name} has dtype {t.dtype}; accepted: the dtype of x, {x.dtype}")
        if t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device}; accepted: the device of x, {x.device}")
    if x.dim() != 4:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; accepted: 4 dimensions (N, C, H, W)")
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (x.shape[1], 1, 1) or 0 in weight.shape:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)} and x {tuple(x.shape)}; accepted: weight of shape "
            "(Cout, C, 1, 1) with the C of x, none of them zero (no groups, no other kernel size)"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}; accepted: ({weight.shape[0]},)")
    if isinstance(stride, bool) or not isinstance(stride, int) or stride not in (1, 2):
        raise ValueError(f"{op}: stride is {stride!r}; accepted: 1, 2")
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"{op}: ceil_mode is {ceil_mode!r}; accepted: True, False")
    if 0 in (size := output_size(x, stride, ceil_mode)):
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)}, so that the output would be {size[0]} x {size[1]}: Output size is "
            f"too small; accepted: H and W of at least {1 if ceil_mode else stride}"
        )


def check_dy(op: str, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, stride: int, ceil_mode: bool) -> None:
    """As `check`, for the gradient of the output of arguments that are accepted."""
    shape = (x.shape[0], weight.shape[0], *output_size(x, stride, ceil_mode))
    if dy.dtype != x.dtype:
        raise TypeError(f"{op}: dy has dtype {dy.dtype}; accepted: the dtype of x, {x.dtype}")
    if dy.device != x.device:
        raise ValueError(f"{op}: dy is on {dy.device}; accepted: the device of x, {x.device}")
    if tuple(dy.shape) != shape:
        raise ValueError(f"{op}: dy has shape {tuple(dy.shape)}; accepted: {shape}")


def output_size(x: torch.Tensor, stride: int, ceil_mode: bool) -> tuple[int, int]:
    """(H', W') of x's pooled image: windows that overhang the edge count with ceil_mode."""
    up = stride - 1 if ceil_mode else 0
    return (x.shape[2] + up) // stride, (x.shape[3] + up) // stride


def avgpool_conv1x1(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int = 2,
    ceil_mode: bool = False,
) -> torch.Tensor:
    """`conv2d(avg_pool2d(x, 2, 2, count_include_pad=False), weight, bias)`; without the pool where stride is 1."""
    pooled = x if stride == 1 else F.avg_pool2d(x, 2, 2, 0, ceil_mode, count_include_pad=False)
    return F.conv2d(pooled, weight, bias)


def avgpool_conv1x1_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: int,
    ceil_mode: bool,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dweight, dbias), None where not needed, made of operations that autograd can differentiate again."""
    pooled = x if stride == 1 else F.avg_pool2d(x, 2, 2, 0, ceil_mode, count_include_pad=False)
    dpooled, dweight, dbias = torch.ops.aten.convolution_backward(
        dy,
        pooled,
        weight,
        [weight.shape[0]],
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        1,
        [need_dx, need_dweight, need_dbias],
    )
    if need_dx and stride != 1:
        dpooled = torch.ops.aten.avg_pool2d_backward(dpooled, x, [2, 2], [2, 2], [0, 0], ceil_mode, False, None)
    return dpooled, dweight, dbias
