"""avgpool_conv1x1: the 2x2 average pool and 1x1 convolution of a ResNet-D shortcut, as one op."""

from __future__ import annotations

from typing import Any

import torch

from ..backends import loaded_namespaces, ops_for
from ..layout import layout_of
from ..reference.avgpool_conv1x1 import avgpool_conv1x1 as reference
from ..reference.avgpool_conv1x1 import avgpool_conv1x1_backward as differentiable_backward
from ..reference.avgpool_conv1x1 import output_size

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def avgpool_conv1x1(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int = 2,
    ceil_mode: bool = False,
) -> torch.Tensor:
    """2x2 average pool with stride 2, then a 1x1 convolution; the pooled tensor is neither written nor saved.

        p[n, c, i, j] = mean of the pixels of x[n, c, 2i : 2i + 2, 2j : 2j + 2] that lie inside the image
        y[n, o, i, j] = sum over c of weight[o, c] * p[n, c, i, j]  (+ bias[o])

    This is `conv2d(avg_pool2d(x, 2, 2, ceil_mode=ceil_mode, count_include_pad=False), weight, bias)`, the shortcut of
    ResNet-D (He et al. 2019, Bag of Tricks for Image Classification with Convolutional Neural Networks, section 4.2).
    Sums of fp16 and bf16 tensors are float32. The pooled value is float32 too and not rounded in between on the CPU; on
    CUDA it enters the tensor cores in the 16 bits of x.

    Args:
        x: (N, C, H, W), float16, bfloat16, float32 or float64. NCHW and NHWC (`channels_last`) run as they are, and
            y and the gradient of x have the same layout; other strides are copied once.
        weight: (Cout, C, 1, 1), the dtype and device of x (under autocast x, weight and bias are cast to its dtype).
        bias: (Cout,) or None.
        stride: 2, or 1 for the plain 1x1 convolution without a pool.
        ceil_mode: with odd H or W, True keeps the window that overhangs the edge (output ceil(H / 2)); False drops the
            last row or column (floor(H / 2)).

    Returns:
        y: (N, Cout, H', W').

    Raises:
        ValueError: a wrong shape, stride or device, or an output that would be empty (H or W of 1 without ceil_mode).
        TypeError: not a tensor, an integer dtype, or dtypes that differ.

    Examples:
        >>> x, weight = torch.randn(2, 4, 7, 7), torch.randn(8, 4, 1, 1)
        >>> fasttricks.avgpool_conv1x1(x, weight).shape
        torch.Size([2, 8, 3, 3])
        >>> fasttricks.avgpool_conv1x1(x, weight, ceil_mode=True).shape
        torch.Size([2, 8, 4, 4])
    """
    x, weight, bias = _autocast(x, weight, bias)
    _check(x, weight, bias, stride, ceil_mode)
    ops = ops_for("avgpool_conv1x1", x.device)
    if ops is None:
        return reference(x, weight, bias, stride=stride, ceil_mode=ceil_mode)
    return ops.avgpool_conv1x1_forward(x, weight, bias, stride, ceil_mode)


def _autocast(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """The rule of convolutions: floating tensors other than float64 go to the autocast dtype of their device."""
    first = tensors[0]
    if not isinstance(first, torch.Tensor) or not torch.amp.is_autocast_available(first.device.type):
        return tensors
    device = first.device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def cast(t: torch.Tensor | None) -> torch.Tensor | None:
        if not isinstance(t, torch.Tensor) or t.device.type != device:
            return t
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    return tuple(cast(t) for t in tensors)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, ceil_mode: bool) -> None:
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is None and name == "bias":
            continue
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"avgpool_conv1x1: {name} is a {type(t).__name__}; accepted: a tensor")
        if t.dtype not in DTYPES:
            raise TypeError(
                f"avgpool_conv1x1: {name} has dtype {t.dtype}; accepted: float16, bfloat16, float32, float64"
            )
        if t.dtype != x.dtype:
            raise TypeError(f"avgpool_conv1x1: {name} has dtype {t.dtype}; accepted: the dtype of x, {x.dtype}")
        if t.device != x.device:
            raise ValueError(f"avgpool_conv1x1: {name} is on {t.device}; accepted: the device of x, {x.device}")
    if x.dim() != 4:
        raise ValueError(f"avgpool_conv1x1: x has shape {tuple(x.shape)}; accepted: 4 dimensions (N, C, H, W)")
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (x.shape[1], 1, 1) or 0 in weight.shape:
        raise ValueError(
            f"avgpool_conv1x1: weight has shape {tuple(weight.shape)} and x {tuple(x.shape)}; accepted: weight of "
            f"shape (Cout, C, 1, 1) with the C of x, none of them zero (no groups, no other kernel size)"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"avgpool_conv1x1: bias has shape {tuple(bias.shape)}; accepted: ({weight.shape[0]},)")
    if isinstance(stride, bool) or not isinstance(stride, int) or stride not in (1, 2):
        raise ValueError(f"avgpool_conv1x1: stride is {stride!r}; accepted: 1, 2")
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"avgpool_conv1x1: ceil_mode is {ceil_mode!r}; accepted: True, False")
    if 0 in (size := output_size(x, stride, ceil_mode)):
        raise ValueError(
            f"avgpool_conv1x1: x has shape {tuple(x.shape)}, so that the output would be {size[0]} x {size[1]}: Output "
            f"size is too small; accepted: H and W of at least {1 if ceil_mode else stride}"
        )


def _fake_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, ceil_mode: bool
) -> torch.Tensor:
    size = (x.shape[0], weight.shape[0], *output_size(x, stride, ceil_mode))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout_of(x))


def _fake_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: int,
    ceil_mode: bool,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x)) if need_dx else x.new_empty(0)
    dweight = torch.empty_like(weight) if need_dweight else weight.new_empty(0)
    return dx, dweight, weight.new_empty(weight.shape[0] if need_dbias else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, _, ctx.stride, ctx.ceil_mode = inputs
    ctx.save_for_backward(x, weight)


def register(namespace: str) -> None:
    """Gives the ops of a namespace with these schemas (fasttricks, fasttricks_triton) their fakes and autograd."""
    ops = getattr(torch.ops, namespace)

    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True: these gradients will be differentiated
            return *differentiable_backward(dy, x, weight, ctx.stride, ctx.ceil_mode, *need), None, None
        grads = ops.avgpool_conv1x1_backward(dy, x, weight, ctx.stride, ctx.ceil_mode, *need)
        return *(g if needed else None for g, needed in zip(grads, need, strict=True)), None, None

    torch.library.register_fake(f"{namespace}::avgpool_conv1x1_forward", _fake_forward)
    torch.library.register_fake(f"{namespace}::avgpool_conv1x1_backward", _fake_backward)
    torch.library.register_autograd(f"{namespace}::avgpool_conv1x1_forward", backward, setup_context=_setup_context)


for loaded in loaded_namespaces():
    register(loaded)
