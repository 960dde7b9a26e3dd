"""bn_add_relu with the 2x2 means of its output, which a shortcut of ResNet-D reads: `bn_add_relu(..., pool=True)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import transforms
from ..backends import loaded_namespaces, ops_for
from ..checks import check_bool
from ..reference.bn_relu import pool, spread
from . import second_gradient
from .bn_outputs import empty_like_x, mask_of, means_of, per_channel_of
from .bn_relu import call as call_without_pool
from .bn_relu import check_call, composed, gradients, run_forward
from .bn_relu_checks import check_apply, check_forward, check_pool
from .registration import differentiable, library_of


def call(ceil_mode: bool, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """bn_add_relu with its 2x2 means; the arguments after the first are those of `bn_relu.call`."""
    if torch.compiler.is_compiling():  # checked once, while the graph is made
        _check(ceil_mode, *given)
        return _run(ceil_mode, *given)
    try:
        return _run(ceil_mode, *given)
    except Exception:  # the raw ops check too: here the error names the argument as the caller knows it
        _check(ceil_mode, *given)
        raise


def _check(ceil_mode: bool, *given: Any) -> None:
    check_call(*given)
    check_pool(given[0], given[1], ceil_mode)


def _run(
    ceil_mode: bool, op: str, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None,
    bias: torch.Tensor | None, running_mean: torch.Tensor | None, running_var: torch.Tensor | None, training: bool,
    momentum: float | None, eps: float, group: Any, batches: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    check_bool(op, "training", training)
    ops = ops_for(op, x.device)
    compiling = torch.compiler.is_compiling()
    transformed = not compiling and transforms.active()
    if (
        ops is None
        or (group is not None and training)
        or residual.dtype != x.dtype
        or residual.shape != x.shape
        or (transformed and transforms.functionalizes())
        or ((compiling or torch.jit.is_tracing()) and transforms.exports())
    ):
        given = (op, x, residual, weight, bias, running_mean, running_var, training, momentum, eps, group, batches)
        _check(ceil_mode, *given)
        y = call_without_pool(*given)
        return y, pool(y, ceil_mode)
    constants = (ops, training, momentum, eps, running_mean, running_var, batches, ceil_mode)
    y, pooled, *_ = run(x, residual, weight, bias, constants)
    return y, pooled


# those of bn_relu.Constants, and ceil_mode
Constants = tuple[Any, bool, float | None, float, Any, Any, Any, bool]


def run(x: Any, residual: Any, weight: Any, bias: Any, constants: Constants) -> tuple[Any, ...]:
    """y and its means, with their derivatives, for arguments that the raw ops take."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms.active():
        return _raw(x, residual, weight, bias, constants)
    if torch.is_grad_enabled():
        return _FusedPool.apply(x, residual, weight, bias, constants, False)
    with torch._C._AutoDispatchBelowAutograd():
        return _raw(x, residual, weight, bias, constants)


def _raw(x: Any, residual: Any, weight: Any, bias: Any, constants: Constants) -> tuple[Any, Any, Any, Any, Any]:
    """y, its means, the statistics that it has, and the mask, by the raw op that serves."""
    ops, training, momentum, eps, mean, var, batches, ceil_mode = constants
    if training:
        return ops.bn_add_relu_pool_forward.default(
            x, residual, weight, bias, eps, mean, var, batches, momentum, ceil_mode
        )
    y, pooled, mask = ops.bn_add_relu_pool_apply.default(x, residual, weight, bias, mean, var, eps, ceil_mode)
    return y, pooled, mean, var, mask


class _FusedPool(torch.autograd.Function):
    """Both ops as one node of autograd's graph. whole: all outputs of the raw op, else y and its means alone."""

    @staticmethod
    def forward(ctx: Any, x: Any, residual: Any, weight: Any, bias: Any, constants: Constants, whole: bool) -> Any:
        return run_forward(ctx, _raw, x, residual, weight, bias, constants, whole)

    @staticmethod
    def backward(ctx: Any, dy: Any, dpooled: Any, *unused: Any) -> tuple[Any, ...]:
        dy2 = second_gradient.taken(ctx)
        if dpooled is None:
            dpooled = dy2
        elif dy2 is not None:  # of a third reader of y
            third = spread(dy2, ctx.saved_tensors[0])
            dy = third if dy is None else dy + third
        return *gradients(ctx, dy, dpooled), None, None


second_gradient.receives(_FusedPool)


def _composed(x: Any, residual: Any, weight: Any, bias: Any, constants: Constants) -> tuple[Any, ...]:
    """As `_raw`, in torch's own differentiable ops."""
    *rest, ceil_mode = constants
    y, *others = composed(x, residual, weight, bias, tuple(rest))
    return y, pool(y, ceil_mode), *others


def _fake_forward(
    x: Any, residual: Any, weight: Any, bias: Any, eps: float, mean: Any, var: Any, batches: Any,
    momentum: float | None, ceil_mode: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    op = "bn_add_relu_pool_forward"
    check_forward(op, x, residual, weight, bias, eps, mean, var, batches, momentum)
    check_pool(op, x, ceil_mode)
    return empty_like_x(x), means_of(x, ceil_mode), per_channel_of(x), per_channel_of(x), mask_of(x)


def _fake_apply(
    x: Any, residual: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float, ceil_mode: bool
) -> tuple[torch.Tensor, ...]:
    op = "bn_add_relu_pool_apply"
    check_apply(op, x, residual, weight, bias, mean, var, eps)
    check_pool(op, x, ceil_mode)
    return empty_like_x(x), means_of(x, ceil_mode), mask_of(x)


FAKES: dict[str, Callable[..., Any]] = {
    "bn_add_relu_pool_forward": _fake_forward,
    "bn_add_relu_pool_apply": _fake_apply,
}


def register(namespace: str) -> None:
    """Gives the ops of a namespace with these schemas (fasttricks, fasttricks_triton) their fakes and derivatives."""
    ops = getattr(torch.ops, namespace)
    library = library_of(namespace, FAKES)

    def ordered(
        x: Any, residual: Any, weight: Any, bias: Any, eps: float, mean: Any, var: Any, batches: Any,
        momentum: float | None, ceil_mode: bool,
    ) -> tuple[tuple[Any, ...], Constants]:  # fmt: skip
        return (x, residual, weight, bias), (ops, True, momentum, eps, mean, var, batches, ceil_mode)

    def ordered_apply(
        x: Any, residual: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float, ceil_mode: bool
    ) -> tuple[tuple[Any, ...], Constants]:
        return (x, residual, weight, bias), (ops, False, None, eps, mean, var, None, ceil_mode)

    def composed_apply(*given: Any) -> tuple[Any, Any, Any]:
        y, pooled, _, _, mask = _composed(*given)
        return y, pooled, mask

    differentiable(library, ops.bn_add_relu_pool_forward.default, ordered, _FusedPool, _composed)
    differentiable(library, ops.bn_add_relu_pool_apply.default, ordered_apply, _FusedPool, composed_apply)


for loaded in loaded_namespaces():
    register(loaded)
