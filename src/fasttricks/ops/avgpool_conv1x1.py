"""avgpool_conv1x1: the 2x2 average pool and 1x1 convolution of a ResNet-D shortcut, as one op."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch.fx import Proxy
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from .. import transforms
from ..backends import left_to_torch, loaded_namespaces, namespace_for
from ..layout import layout_of
from ..reference.avgpool_conv1x1 import avgpool_conv1x1 as reference
from ..reference.avgpool_conv1x1 import avgpool_conv1x1_backward as differentiable_backward
from ..reference.avgpool_conv1x1 import output_size
from . import second_gradient
from .avgpool_conv1x1_checks import check_backward, check_forward


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
    Sums of fp16 and bf16 tensors are computed in float32. On the CPU the pooled value stays float32; on CUDA it is
    rounded to the dtype of x before it enters the tensor cores.

    Args:
        x: (N, C, H, W), float16, bfloat16, float32 or float64. NCHW and NHWC (`channels_last`) are both native;
            y and the gradient of x have the layout of x. Other strides are copied once.
        weight: (Cout, C, 1, 1), the dtype and device of x (under autocast x, weight and bias are cast to its dtype).
        bias: (Cout,) or None.
        stride: 2, or 1 for the 1x1 convolution without a pool.
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
    if isinstance(x, Proxy):
        options = {"stride": stride, "ceil_mode": ceil_mode}
        return transforms.recorded(avgpool_conv1x1, x, (x, weight, bias), options)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _traced(x, weight, bias, stride, ceil_mode)
    try:
        if torch._C._is_any_autocast_enabled():
            x, weight, bias = _autocast(x, weight, bias)
        namespace = _chosen(x)
        # the dispatcher would cast other types to int and bool before the kernels could refuse them
        if namespace is not None and type(stride) is int and type(ceil_mode) is bool:
            return _differentiable[namespace](x, weight, bias, stride, ceil_mode)
    except Exception:
        check_forward("avgpool_conv1x1", x, weight, bias, stride, ceil_mode)  # names the arguments of this function
        raise
    if isinstance(stride, Integral) and not isinstance(stride, int):  # of NumPy
        return avgpool_conv1x1(x, weight, bias, stride=int(stride), ceil_mode=ceil_mode)
    check_forward("avgpool_conv1x1", x, weight, bias, stride, ceil_mode)
    return reference(x, weight, bias, stride=stride, ceil_mode=ceil_mode)


def _chosen(x: torch.Tensor) -> str | None:
    """The namespace of the kernels for x; BY_TORCH if the kernels are slower, None if there are none."""
    namespace = namespace_for("avgpool_conv1x1", x.device)
    if namespace == "fasttricks" and x.is_cuda:
        slower = left_to_torch("avgpool_conv1x1", x.device, x.element_size(), x.shape[1])
        return BY_TORCH if slower else namespace
    return namespace


def _traced(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, ceil_mode: bool
) -> torch.Tensor:
    """The call under torch.compile and torch.jit.trace: one op in their graph; operations of torch in exported ones."""
    x, weight, bias = _autocast(x, weight, bias)
    check_forward("avgpool_conv1x1", x, weight, bias, stride, ceil_mode)
    namespace = _chosen(x)
    if namespace in (None, BY_TORCH) or transforms.active() or transforms.exports():
        return reference(x, weight, bias, stride=stride, ceil_mode=ceil_mode)
    # a constant: with dynamic=True stride may be a symbol, which Triton's inferred schema would keep
    constant = 2 if stride == 2 else 1
    return getattr(torch.ops, namespace).avgpool_conv1x1_forward(x, weight, bias, constant, ceil_mode)


def _autocast(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """The autocast rule of convolutions: casts floating tensors, except float64, to their device's autocast dtype."""
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


def _fake_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, ceil_mode: bool
) -> torch.Tensor:
    check_forward("avgpool_conv1x1_forward", x, weight, bias, stride, ceil_mode)
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
    pooled_dx: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_backward("avgpool_conv1x1_backward", dy, x, weight, stride, ceil_mode)
    shape = (*x.shape[:2], *dy.shape[2:]) if pooled_dx else x.shape
    dx = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x)) if need_dx else x.new_empty(0)
    dweight = torch.empty_like(weight) if need_dweight else weight.new_empty(0)
    return dx, dweight, weight.new_empty(weight.shape[0] if need_dbias else 0)


def _forward_flops(x: Any, weight: Any, *rest: Any, out_shape: Any, **options: Any) -> int:
    """The flops of the convolution; torch counts none for pools."""
    return conv_flop_count(x, weight, out_shape)


def _backward_flops(
    dy: Any, x: Any, weight: Any, stride: int, ceil_mode: bool, need_dx: bool, need_dweight: bool, *rest: Any,
    **options: Any,
) -> int:  # fmt: skip
    return (need_dx + need_dweight) * conv_flop_count(x, weight, dy)


BY_TORCH = "torch"
# of a namespace, or BY_TORCH, the forward with its derivative: in eager mode called directly, without the dispatcher's
# autograd, which costs 10 us
_differentiable: dict[str, Callable[..., torch.Tensor]] = {}
_libraries: list[torch.library.Library] = []  # keeps the registrations alive


def _with_derivative(
    raw_forward: Callable[..., torch.Tensor], raw_backward: Callable[..., tuple[Any, Any, Any]]
) -> Callable[..., torch.Tensor]:
    """The op by these two, which saves x and weight for the backward pass, and no pooled tensor."""

    class AvgPoolConv1x1Function(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, ceil_mode: bool
        ) -> torch.Tensor:
            ctx.save_for_backward(x, weight)
            ctx.mode = stride, ceil_mode
            below = torch._C._AutoDispatchBelowAutograd()
            try:  # as a context manager it costs twice the time
                return raw_forward(x, weight, bias, stride, ceil_mode)
            finally:
                del below

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            x, weight = ctx.saved_tensors
            need_dx, need_dweight, need_dbias, _, _ = ctx.needs_input_grad
            arguments = (dy, x, weight, *ctx.mode, need_dx, need_dweight, need_dbias)
            if torch.is_grad_enabled() or transforms.active():  # create_graph=True, or vmap over gradients
                return *differentiable_backward(*arguments), None, None
            node = second_gradient.receiver(ctx, 0) if need_dx else None
            below = torch._C._AutoDispatchBelowAutograd()
            try:
                dx, dweight, dbias = raw_backward(*arguments, node is not None)
            finally:
                del below
            if node is not None:
                second_gradient.give(node, dx)
                need_dx = False
            return dx if need_dx else None, dweight if need_dweight else None, dbias if need_dbias else None, None, None

    def forward(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, ceil_mode: bool
    ) -> torch.Tensor:
        if transforms.active():
            check_forward("avgpool_conv1x1_forward", x, weight, bias, stride, ceil_mode)
            return reference(x, weight, bias, stride=stride, ceil_mode=ceil_mode)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(x, weight, bias):
            return AvgPoolConv1x1Function.apply(x, weight, bias, stride, ceil_mode)
        with torch._C._AutoDispatchBelowAutograd():
            return raw_forward(x, weight, bias, stride, ceil_mode)

    return forward


def _forward_by_torch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, ceil_mode: bool
) -> torch.Tensor:
    check_forward("avgpool_conv1x1", x, weight, bias, stride, ceil_mode)
    return reference(x, weight, bias, stride=stride, ceil_mode=ceil_mode)


_differentiable[BY_TORCH] = _with_derivative(_forward_by_torch, differentiable_backward)


def register(namespace: str) -> None:
    """Registers fakes, autograd and flop counts for the ops of a namespace (fasttricks, fasttricks_triton)."""
    ops = getattr(torch.ops, namespace)
    raw_forward, raw_backward = ops.avgpool_conv1x1_forward.default, ops.avgpool_conv1x1_backward.default
    forward = _with_derivative(raw_forward, raw_backward)

    def backward(
        dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, stride: int, ceil_mode: bool, *need: bool
    ) -> tuple[torch.Tensor, ...]:
        if transforms.active() or (torch.is_grad_enabled() and torch._C._any_requires_grad(dy, x, weight)):
            check_backward("avgpool_conv1x1_backward", dy, x, weight, stride, ceil_mode)
            grads = differentiable_backward(dy, x, weight, stride, ceil_mode, *need)
            return tuple(x.new_empty(0) if g is None else g for g in grads)
        with torch._C._AutoDispatchBelowAutograd():
            return raw_backward(dy, x, weight, stride, ceil_mode, *need)

    library = torch.library.Library(namespace, "FRAGMENT")
    for key in ("Autograd", "FuncTorchBatched"):
        library.impl("avgpool_conv1x1_forward", forward, key)
        library.impl("avgpool_conv1x1_backward", backward, key)
    _libraries.append(library)
    _differentiable[namespace] = forward
    torch.library.register_fake(f"{namespace}::avgpool_conv1x1_forward", _fake_forward)
    torch.library.register_fake(f"{namespace}::avgpool_conv1x1_backward", _fake_backward)
    register_flop_formula(ops.avgpool_conv1x1_forward)(_forward_flops)
    register_flop_formula(ops.avgpool_conv1x1_backward)(_backward_flops)


for loaded in loaded_namespaces():
    register(loaded)
