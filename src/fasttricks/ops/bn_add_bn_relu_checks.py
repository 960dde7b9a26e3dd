"""Argument checks of bn_add_bn_relu and its raw ops; the C++ ops raise the same messages."""

from __future__ import annotations

from typing import Any

from ..checks import check_device, check_dtype, check_number, check_shape, check_tensor
from .bn_relu_checks import (
    check_like_x,
    check_mask,
    check_per_channel,
    check_running,
    check_second,
    check_several_values,
    check_x,
)


def _check_inputs(op: str, x: Any, residual: Any, eps: float, residual_eps: float, **per_channel: Any) -> None:
    check_x(op, x)
    check_like_x(op, "residual", residual, x)
    check_per_channel(op, x, **per_channel)
    check_number(op, "eps", eps, least=0)
    check_number(op, "residual_eps", residual_eps, least=0)


def check_forward(
    op: str, x: Any, residual: Any, weight: Any, bias: Any, residual_weight: Any, residual_bias: Any, eps: float,
    residual_eps: float, running_mean: Any = None, running_var: Any = None, batches: Any = None,
    momentum: float | None = 0.1, residual_running_mean: Any = None, residual_running_var: Any = None,
    residual_batches: Any = None, residual_momentum: float | None = 0.1,
) -> None:  # fmt: skip
    """Checks the forward op with batch statistics."""
    affine = {"weight": weight, "bias": bias, "residual_weight": residual_weight, "residual_bias": residual_bias}
    _check_inputs(op, x, residual, eps, residual_eps, **affine)
    check_running(op, x, running_mean, running_var, batches, momentum)
    check_running(
        op, x, residual_running_mean, residual_running_var, residual_batches, residual_momentum, prefix="residual_"
    )
    check_several_values(op, x)


def check_apply(
    op: str, x: Any, residual: Any, weight: Any, bias: Any, residual_weight: Any, residual_bias: Any, mean: Any,
    var: Any, residual_mean: Any, residual_var: Any, eps: float, residual_eps: float,
) -> None:  # fmt: skip
    """Checks the forward op with given statistics."""
    affine = {"weight": weight, "bias": bias, "residual_weight": residual_weight, "residual_bias": residual_bias}
    _check_inputs(op, x, residual, eps, residual_eps, **affine)
    check_per_channel(op, x, optional=False, mean=mean, var=var, residual_mean=residual_mean, residual_var=residual_var)


def check_backward(
    op: str, dy: Any, x: Any, residual: Any, mask: Any, weight: Any, residual_weight: Any, mean: Any, var: Any,
    residual_mean: Any, residual_var: Any, eps: float, residual_eps: float, training: bool, dy2: Any = None,
) -> None:  # fmt: skip
    _check_inputs(op, x, residual, eps, residual_eps, weight=weight, residual_weight=residual_weight)
    check_like_x(op, "dy", dy, x)
    check_per_channel(op, x, optional=False, mean=mean, var=var, residual_mean=residual_mean, residual_var=residual_var)
    check_mask(op, mask, x)
    check_second(op, dy2, x)


def check_public(x: Any, residual: Any, training: bool, main: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    """Checks the arguments of `fasttricks.bn_add_bn_relu`; main, other: the BatchNorms of x and residual."""
    op = "bn_add_bn_relu"
    check_x(op, x)
    check_tensor(op, "residual", residual)
    check_device(op, "residual", residual, x)
    check_dtype(op, "residual", residual)
    check_shape(op, "residual", residual, x.shape, "the shape of x")
    for prefix, t, norm in (("", x, main), ("residual_", residual, other)):
        weight, bias, running_mean, running_var, momentum, eps, batches = norm
        check_per_channel(op, t, **{f"{prefix}weight": weight, f"{prefix}bias": bias})
        check_number(op, f"{prefix}eps", eps, least=0)
        check_running(op, t, running_mean, running_var, batches, momentum, prefix, written=training)
        if not training and running_mean is None:
            raise ValueError(
                f"{op}: training is False and {prefix}running_mean, {prefix}running_var are None; accepted: both given"
            )
    if training:
        check_several_values(op, x)
