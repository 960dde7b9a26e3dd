"""bn_add_bn_relu: the end of a residual block with a projection, both BatchNorms, the addition and ReLU in one op."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Proxy

from .. import transforms
from ..backends import loaded_namespaces, ops_for
from ..checks import check_bool
from ..recomputation import current
from ..reference import bn_add_bn_relu as plain
from ..reference.bn_relu import spread, widened
from . import second_gradient
from .bn_add_bn_relu_checks import check_apply, check_backward, check_forward, check_public
from .bn_outputs import empty_like_x, mask_of, pack_mask, per_channel_of, unpack_mask
from .bn_relu import bn_add_relu, differentiable_statistics, torch_batch_norm
from .registration import differentiable, library_of, opaque


def bn_add_bn_relu(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    residual_weight: torch.Tensor | None = None,
    residual_bias: torch.Tensor | None = None,
    residual_running_mean: torch.Tensor | None = None,
    residual_running_var: torch.Tensor | None = None,
    *,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: torch.Tensor | None = None,
    residual_momentum: float | None = 0.1,
    residual_eps: float = 1e-5,
    residual_num_batches_tracked: torch.Tensor | None = None,
) -> torch.Tensor:
    """Two BatchNorms, their sum and ReLU in one op: the end of a residual block with a projection (He et al. 2015).

        y = relu(weight * (x - mean) / sqrt(var + eps) + bias
                 + residual_weight * (residual - residual_mean) / sqrt(residual_var + residual_eps) + residual_bias)

    The sum is rounded once, to the dtype of x; between two modules the shortcut's BatchNorm would be rounded too.
    Where weight is zero (zero gamma: He et al. 2018, section 3.1) the gradient of x is exactly zero.

    Args:
        x, residual: (N, C, ...), of the main branch and of the shortcut. Of two dtypes both BatchNorms keep their own,
            and the sum has the one that torch promotes them to.
        weight, bias, running_mean, running_var, momentum, eps, num_batches_tracked: of the BatchNorm of x, and with
            `residual_` of the BatchNorm of residual; see `bn_relu`.
        training: whether both use batch statistics.

    Returns:
        y: the shape, dtype and layout of x.

    Raises:
        ValueError, TypeError: as `bn_relu`; residual does not have the shape of x.

    Examples:
        >>> x, shortcut = torch.randn(2, 2, 4, 8, 8)
        >>> y = fasttricks.bn_add_bn_relu(x, shortcut, residual_weight=torch.ones(4))
        >>> norm = torch.nn.BatchNorm2d(4)
        >>> torch.allclose(y, torch.relu(norm(x) + norm(shortcut)), atol=1e-5)
        True
    """
    main = (weight, bias, running_mean, running_var, momentum, eps, num_batches_tracked)
    other = (
        residual_weight,
        residual_bias,
        residual_running_mean,
        residual_running_var,
        residual_momentum,
        residual_eps,
        residual_num_batches_tracked,
    )
    if isinstance(x, Proxy):
        options = {"training": training, **dict(zip(_NORM, main, strict=True))}
        options |= {f"residual_{name}": value for name, value in zip(_NORM, other, strict=True)}
        return transforms.recorded(bn_add_bn_relu, x, (x, residual), options)
    return call(x, residual, training, main, other)


_NORM = ("weight", "bias", "running_mean", "running_var", "momentum", "eps", "num_batches_tracked")
# their values
Norm = tuple[Any, Any, Any, Any, float | None, float, Any]


def call(*given: Any) -> torch.Tensor:
    """bn_add_bn_relu, with the arguments of `_run`."""
    if torch.compiler.is_compiling():  # checked once, while the graph is made
        check_public(*given)
        return _run(*given)
    try:
        return _run(*given)
    except Exception:  # the raw ops check too: here the error names the argument as the caller knows it
        check_public(*given)
        raise


def _run(x: torch.Tensor, residual: torch.Tensor, training: bool, main: Norm, other: Norm) -> torch.Tensor:
    check_bool("bn_add_bn_relu", "training", training)
    ops = ops_for("bn_add_bn_relu", x.device)
    compiling = torch.compiler.is_compiling()
    transformed = not compiling and transforms.active()
    if (
        ops is None
        or residual.shape != x.shape
        or residual.dtype != x.dtype
        or (transformed and transforms.functionalizes())
        or ((compiling or torch.jit.is_tracing()) and transforms.exports())
    ):
        check_public(x, residual, training, main, other)
        return _one_after_the_other(x, residual, training, main, other)
    weight, bias, *constants = main
    residual_weight, residual_bias, *residual_constants = other
    tensors = (x, residual, weight, bias, residual_weight, residual_bias)
    everything = (ops, training, constants, residual_constants)
    if compiling or transformed or torch.jit.is_tracing():
        return _raw(*tensors, everything)[0]
    if torch.is_grad_enabled():
        return _FusedPair.apply(*tensors, everything, False)
    with torch._C._AutoDispatchBelowAutograd():
        return _raw(*tensors, everything)[0]


def _one_after_the_other(
    x: torch.Tensor, residual: torch.Tensor, training: bool, main: Norm, other: Norm
) -> torch.Tensor:
    """The shortcut's BatchNorm by torch, and `bn_add_relu`."""
    weight, bias, running_mean, running_var, momentum, eps, batches = other
    residual = torch_batch_norm(residual, weight, bias, running_mean, running_var, training, momentum, eps, batches)
    weight, bias, running_mean, running_var, momentum, eps, batches = main
    return bn_add_relu(
        x, residual, weight, bias, running_mean, running_var, training=training, momentum=momentum, eps=eps,
        num_batches_tracked=batches,
    )  # fmt: skip


# ops, training, and of each BatchNorm running_mean, running_var, momentum, eps, num_batches_tracked
_Constants = tuple[Any, bool, Any, Any]


def _raw(
    x: Any, residual: Any, weight: Any, bias: Any, residual_weight: Any, residual_bias: Any, constants: _Constants
) -> tuple[Any, ...]:
    """y, the statistics that it has, and the mask, by the raw op."""
    ops, training, (mean, var, momentum, eps, batches), residual_constants = constants
    residual_mean, residual_var, residual_momentum, residual_eps, residual_batches = residual_constants
    tensors = (x, residual, weight, bias, residual_weight, residual_bias)
    if training:
        return ops.bn_add_bn_relu_forward.default(
            *tensors, eps, residual_eps, mean, var, batches, momentum, residual_mean, residual_var, residual_batches,
            residual_momentum,
        )  # fmt: skip
    statistics = (mean, var, residual_mean, residual_var)
    y, mask = ops.bn_add_bn_relu_apply.default(*tensors, *statistics, eps, residual_eps)
    return y, *statistics, mask


def compute_again(
    ops: Any, eps: float, residual_eps: float, x: Any, residual: Any, weight: Any, bias: Any, residual_weight: Any,
    residual_bias: Any, mean: Any, var: Any, residual_mean: Any, residual_var: Any,
) -> torch.Tensor:  # fmt: skip
    """y once more, from the statistics that it had."""
    constants = (ops, False, (mean, var, None, eps, None), (residual_mean, residual_var, None, residual_eps, None))
    return _raw(x, residual, weight, bias, residual_weight, residual_bias, constants)[0]


class _FusedPair(torch.autograd.Function):
    """Both ops as one node of autograd's graph. whole: all outputs of the raw op, else y alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, residual: Any, weight: Any, bias: Any, residual_weight: Any, residual_bias: Any,
        constants: _Constants, whole: bool,
    ) -> Any:  # fmt: skip
        below = torch._C._AutoDispatchBelowAutograd()
        try:  # as a context manager it costs twice the time
            y, *statistics, mask = _raw(x, residual, weight, bias, residual_weight, residual_bias, constants)
        finally:
            del below
        ctx.save_for_backward(x, residual, mask, weight, residual_weight, *statistics)
        ctx.types = [None if t is None else t.dtype for t in (weight, bias, residual_weight, residual_bias)]
        ctx.constants = constants
        ctx.set_materialize_grads(False)
        second_gradient.prepare(ctx, y)
        if whole:
            others = (*statistics, mask) if constants[1] else (mask,)
            ctx.mark_non_differentiable(*others)
            return (y, *others)
        if (outputs := current()) is not None:
            again = functools.partial(compute_again, constants[0], constants[2][3], constants[3][3])
            affine = (weight, bias, residual_weight, residual_bias)
            outputs.add(y, again, (x, residual), affine, tuple(statistics))
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, *unused: Any) -> tuple[Any, ...]:
        dy2 = second_gradient.taken(ctx)
        x, residual, mask, weight, residual_weight, *statistics = ctx.saved_tensors
        if dy is None:
            if dy2 is None:
                return (None,) * 8
            dy, dy2 = spread(dy2, x), None
        ops, training, (_, _, _, eps, _), (_, _, _, residual_eps, _) = ctx.constants
        if torch.is_grad_enabled() or transforms.active():  # these gradients will be differentiated
            mean, var, residual_mean, residual_var = statistics
            grads = plain.backward(
                dy, x, residual, weight, residual_weight, mean, var, residual_mean, residual_var, eps, residual_eps,
                training, unpack_mask(mask, x),
            )  # fmt: skip
        else:
            below = torch._C._AutoDispatchBelowAutograd()
            try:
                grads = ops.bn_add_bn_relu_backward.default(
                    dy, x, residual, mask, weight, residual_weight, *statistics, eps, residual_eps, training, dy2
                )
            finally:
                del below
        dx, dresidual, dweight, dresidual_weight, dbias = grads
        needs = ctx.needs_input_grad
        dresidual_bias = dbias.clone() if needs[3] and needs[5] else dbias  # autograd may keep and change either
        affine = zip((dweight, dbias, dresidual_weight, dresidual_bias), ctx.types, needs[2:6], strict=True)
        return (
            dx if needs[0] else None,
            dresidual if needs[1] else None,
            *(gradient.to(dtype) if needed else None for gradient, dtype, needed in affine),
            None,
            None,
        )


second_gradient.receives(_FusedPair)


def _composed(
    x: Any, residual: Any, weight: Any, bias: Any, residual_weight: Any, residual_bias: Any, constants: _Constants
) -> tuple[Any, ...]:
    """As `_raw`, in torch's own differentiable ops."""
    ops, training, (mean, var, momentum, eps, batches), residual_constants = constants
    residual_mean, residual_var, residual_momentum, residual_eps, residual_batches = residual_constants
    values, residual_values = widened(x), widened(residual)
    if training:
        mean, var = differentiable_statistics(ops, values, mean, var, batches, momentum)
        residual_mean, residual_var = differentiable_statistics(
            ops, residual_values, residual_mean, residual_var, residual_batches, residual_momentum
        )
    statistics = (mean, var, residual_mean, residual_var)
    y = plain.apply(
        values, residual_values, weight, bias, residual_weight, residual_bias, *statistics, eps, residual_eps, x.dtype
    )
    return y, *statistics, pack_mask(~(y <= 0), x)


def _fake_forward(x: Any, *rest: Any) -> tuple[torch.Tensor, ...]:
    check_forward("bn_add_bn_relu_forward", x, *rest)
    return empty_like_x(x), *(per_channel_of(x) for _ in range(4)), mask_of(x)


def _fake_apply(x: Any, *rest: Any) -> tuple[torch.Tensor, ...]:
    check_apply("bn_add_bn_relu_apply", x, *rest)
    return empty_like_x(x), mask_of(x)


def _fake_backward(dy: Any, x: Any, *rest: Any) -> tuple[torch.Tensor, ...]:
    check_backward("bn_add_bn_relu_backward", dy, x, *rest)
    return empty_like_x(x), empty_like_x(x), *(per_channel_of(x) for _ in range(3))


FAKES: dict[str, Callable[..., Any]] = {
    "bn_add_bn_relu_forward": _fake_forward,
    "bn_add_bn_relu_apply": _fake_apply,
    "bn_add_bn_relu_backward": _fake_backward,
}


def register(namespace: str) -> None:
    """Gives the ops of a namespace with these schemas (fasttricks, fasttricks_triton) their fakes and derivatives."""
    ops = getattr(torch.ops, namespace)
    library = library_of(namespace, FAKES)

    def ordered(
        x: Any, residual: Any, weight: Any, bias: Any, residual_weight: Any, residual_bias: Any, eps: float,
        residual_eps: float, mean: Any = None, var: Any = None, batches: Any = None, momentum: float | None = 0.1,
        residual_mean: Any = None, residual_var: Any = None, residual_batches: Any = None,
        residual_momentum: float | None = 0.1,
    ) -> tuple[tuple[Any, ...], _Constants]:  # fmt: skip
        tensors = (x, residual, weight, bias, residual_weight, residual_bias)
        main = (mean, var, momentum, eps, batches)
        other = (residual_mean, residual_var, residual_momentum, residual_eps, residual_batches)
        return tensors, (ops, True, main, other)

    def ordered_apply(*given: Any) -> tuple[tuple[Any, ...], _Constants]:
        *tensors, mean, var, residual_mean, residual_var, eps, residual_eps = given
        main, other = (mean, var, None, eps, None), (residual_mean, residual_var, None, residual_eps, None)
        return tuple(tensors), (ops, False, main, other)

    def composed_apply(*given: Any) -> tuple[Any, Any]:
        y, *_, mask = _composed(*given)
        return y, mask

    differentiable(library, ops.bn_add_bn_relu_forward.default, ordered, _FusedPair, _composed)
    differentiable(library, ops.bn_add_bn_relu_apply.default, ordered_apply, _FusedPair, composed_apply)
    opaque(library, ops.bn_add_bn_relu_backward.default, "fasttricks.bn_add_bn_relu, which has")


for loaded in loaded_namespaces():
    register(loaded)
