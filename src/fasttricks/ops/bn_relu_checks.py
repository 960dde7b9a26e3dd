"""Argument checks of bn_relu, bn_add_relu and their raw ops; the C++ ops raise the same messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..checks import FLOATS, check_bool, check_device, check_dtype, check_number, check_shape, check_tensor
from ..reference.avgpool_conv1x1 import output_size


def check_x(op: str, x: Any) -> None:
    check_tensor(op, "x", x)
    check_dtype(op, "x", x)
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; accepted: 2 to 5 dimensions (N, C, ...)")


def check_like_x(op: str, name: str, t: Any, x: torch.Tensor) -> None:
    check_tensor(op, name, t)
    check_device(op, name, t, x)
    check_dtype(op, name, t, (x.dtype,))
    check_shape(op, name, t, x.shape, "the shape of x")


def check_per_channel(op: str, x: torch.Tensor, optional: bool = True, **named: Any) -> None:
    """Checks tensors of shape (C,) in any floating dtype that the dtype of the sums represents exactly."""
    accepted = FLOATS if x.dtype == torch.float64 else FLOATS[:3]
    for name, t in named.items():
        check_tensor(op, name, t, optional)
        if t is not None:
            check_device(op, name, t, x)
            check_dtype(op, name, t, accepted)
            check_shape(op, name, t, x.shape[1:2], "the channels of x")


def _check_scalar(op: str, name: str, t: Any, x: torch.Tensor, dtype: torch.dtype) -> None:
    check_tensor(op, name, t)
    check_device(op, name, t, x)
    check_dtype(op, name, t, (dtype,))
    if t.numel() != 1:
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; accepted: (), a number")


def check_running(
    op: str, x: torch.Tensor, running_mean: Any, running_var: Any, batches: Any, momentum: float | None,
    prefix: str = "",
) -> None:  # fmt: skip
    """Checks running statistics with the channels of x; prefix: of the names of the arguments."""
    _check_moved(op, x, running_mean, running_var, batches, momentum, prefix)
    check_per_channel(op, x, **{f"{prefix}running_mean": running_mean, f"{prefix}running_var": running_var})


def _check_moved(
    op: str, x: torch.Tensor, running_mean: Any, running_var: Any, batches: Any, momentum: float | None,
    prefix: str = "",
) -> None:  # fmt: skip
    if (running_mean is None) != (running_var is None):
        missing = f"{prefix}running_mean" if running_mean is None else f"{prefix}running_var"
        raise ValueError(f"{op}: {missing} is None and the other is not; accepted: both, or neither")
    if momentum is not None:
        check_number(op, f"{prefix}momentum", momentum)
    elif running_mean is not None and batches is None:
        raise ValueError(
            f"{op}: {prefix}momentum is None and {prefix}num_batches_tracked is None; accepted: one of the two given"
        )
    if batches is not None:
        _check_scalar(op, f"{prefix}num_batches_tracked", batches, x, torch.int64)


def check_several_values(op: str, x: torch.Tensor) -> None:
    values = x.shape[0]
    for size in x.shape[2:]:
        values = values * size
    if values == 1 and x.shape[1] > 0:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)}: Expected more than 1 value per channel for batch statistics; "
            "accepted: two or more, or running statistics"
        )


def _check_affine(op: str, x: Any, weight: Any, bias: Any, eps: float) -> None:
    check_x(op, x)
    check_per_channel(op, x, weight=weight, bias=bias)
    check_number(op, "eps", eps, least=0)


def check_forward(
    op: str, x: Any, residual: Any, weight: Any, bias: Any, eps: float, running_mean: Any = None,
    running_var: Any = None, batches: Any = None, momentum: float | None = 0.1, several: bool = True,
) -> None:  # fmt: skip
    """Checks a forward op with batch statistics; `several`: whether to refuse a single value per channel."""
    _check_affine(op, x, weight, bias, eps)
    if residual is not None:
        check_like_x(op, "residual", residual, x)
    check_running(op, x, running_mean, running_var, batches, momentum)
    if several:
        check_several_values(op, x)


def check_apply(op: str, x: Any, residual: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float) -> None:
    """Checks a forward op with given statistics."""
    _check_affine(op, x, weight, bias, eps)
    if residual is not None:
        check_like_x(op, "residual", residual, x)
    check_per_channel(op, x, optional=False, mean=mean, var=var)


def check_backward(
    op: str, dy: Any, x: Any, mask: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float,
    need_dresidual: bool = False, dy2: Any = None, **sums: Any,
) -> None:  # fmt: skip
    """Checks any of the backward ops; sums: the further arguments of bn_relu_backward_apply."""
    _check_affine(op, x, weight, bias, eps)
    check_like_x(op, "dy", dy, x)
    check_second(op, dy2, x)
    check_per_channel(op, x, optional=False, mean=mean, var=var, **sums)
    if mask is not None:
        check_mask(op, mask, x)
    elif need_dresidual and x.numel() > 0:
        raise ValueError(f"{op}: need_dresidual is true and mask is None; accepted: the mask that the forward op gave")


def check_mask(op: str, mask: Any, x: torch.Tensor) -> None:
    check_tensor(op, "mask", mask)
    check_device(op, "mask", mask, x)
    check_dtype(op, "mask", mask, (torch.uint8,))
    check_shape(op, "mask", mask, ((x.numel() + 7) // 8,), "a bit for each element of x")


def check_second(op: str, dy2: Any, x: torch.Tensor) -> None:
    """Checks a second gradient of y: of the shape of x, or of its 2x2 means."""
    check_tensor(op, "dy2", dy2, optional=True)
    if dy2 is None:
        return
    check_device(op, "dy2", dy2, x)
    check_dtype(op, "dy2", dy2, (x.dtype,))
    if dy2.shape != x.shape and not is_pooled(dy2, x):
        raise ValueError(
            f"{op}: dy2 has shape {tuple(dy2.shape)}; accepted: {tuple(x.shape)}, the shape of x, or that of its 2x2 "
            "means"
        )


def is_pooled(dy2: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether dy2 has the shape of the 2x2 means of x, of which the last window of an odd edge may be smaller."""
    return (
        dy2.dim() == x.dim() == 4
        and dy2.shape[:2] == x.shape[:2]
        and all(pooled in (size // 2, (size + 1) // 2) for pooled, size in zip(dy2.shape[2:], x.shape[2:], strict=True))
    )


def check_pool(op: str, x: torch.Tensor, ceil_mode: Any) -> None:
    """Checks what the 2x2 means of an output of the shape of x need."""
    check_bool(op, "ceil_mode", ceil_mode)
    if x.dim() != 4:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; accepted: 4 dimensions (N, C, H, W)")
    if 0 in (size := output_size(x, 2, ceil_mode)):
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)}, so that the pooled output would be {size[0]} x {size[1]}: Output "
            f"size is too small; accepted: H and W of at least {1 if ceil_mode else 2}"
        )


def check_update(
    running_mean: Any, running_var: Any, mean: Any, var: Any, count: Any, batches: Any, momentum: float | None
) -> None:
    op = "bn_update_stats_"
    _check_moved(op, mean, running_mean, running_var, batches, momentum)
    if mean.dim() != 1:
        raise ValueError(f"{op}: mean has shape {tuple(mean.shape)}; accepted: (C,)")
    for name, t in {"mean": mean, "var": var, "running_mean": running_mean, "running_var": running_var}.items():
        check_dtype(op, name, t)
        check_device(op, name, t, mean)
        check_shape(op, name, t, mean.shape, "the channels of mean")
    _check_scalar(op, "count", count, mean, torch.float64)


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))


def check_public(
    op: str, x: Any, residual: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool,
    momentum: float | None, eps: float, batches: Any, several: bool = True,
) -> None:  # fmt: skip
    """Checks the arguments of `fasttricks.bn_relu` and `fasttricks.bn_add_relu`."""
    check_forward(op, x, None, weight, bias, eps, running_mean, running_var, batches, momentum, training and several)
    if residual is not None:
        check_tensor(op, "residual", residual)
        check_device(op, "residual", residual, x)
        check_dtype(op, "residual", residual)
        if not _broadcasts(residual.shape, x.shape):
            raise ValueError(
                f"{op}: residual has shape {tuple(residual.shape)}; accepted: the shape of x, {tuple(x.shape)}, or "
                "one that broadcasts to it"
            )
    if not training and running_mean is None:
        raise ValueError(f"{op}: training is False and running_mean, running_var are None; accepted: both given")
