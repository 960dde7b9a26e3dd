"""bn_add_bn_relu in plain torch: differentiable any number of times, and fallback."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from . import bn_relu as plain


def apply(
    x: torch.Tensor, residual: torch.Tensor, weight: Any, bias: Any, residual_weight: Any, residual_bias: Any,
    mean: torch.Tensor, var: torch.Tensor, residual_mean: torch.Tensor, residual_var: torch.Tensor, eps: float,
    residual_eps: float, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """relu(bn(x) + bn(residual)), summed in float32 or 64, in `dtype`."""
    z = plain.normalised(x, weight, bias, mean, var, eps)
    z = z + plain.normalised(residual, residual_weight, residual_bias, residual_mean, residual_var, residual_eps)
    return F.relu(z.to(dtype))


def backward(
    dy: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, weight: Any, residual_weight: Any, mean: torch.Tensor,
    var: torch.Tensor, residual_mean: torch.Tensor, residual_var: torch.Tensor, eps: float, residual_eps: float,
    training: bool, passes: torch.Tensor,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The formula of the backward pass in differentiable operations: dx, dresidual, dweight, dresidual_weight, dbias.

    passes: which elements the ReLU passed.
    """
    dx, _, dweight, dbias = plain.backward(dy, x, None, weight, None, mean, var, eps, training, passes)
    dresidual, _, dresidual_weight, _ = plain.backward(
        dy, residual, None, residual_weight, None, residual_mean, residual_var, residual_eps, training, passes
    )
    return dx, dresidual, dweight, dresidual_weight, dbias
