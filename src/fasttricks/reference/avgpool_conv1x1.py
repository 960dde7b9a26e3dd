"""avgpool_conv1x1 in plain torch: the oracle of the tests, and the fallback if there is no kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
    """`conv2d(avg_pool2d(x, 2, 2, count_include_pad=False), weight, bias)`; without the pool if stride is 1."""
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
    pooled_dx: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dweight, dbias), None where not needed, made of operations that autograd can differentiate again.

    pooled_dx: dx is the gradient of the pooled tensor.
    """
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
    if need_dx and stride != 1 and not pooled_dx:
        dpooled = torch.ops.aten.avg_pool2d_backward(dpooled, x, [2, 2], [2, 2], [0, 0], ceil_mode, False, None)
    return dpooled, dweight, dbias
