"""bn_relu and bn_add_relu: BatchNorm + ReLU, and BatchNorm + residual add + ReLU, as one op each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed
from torch.fx import Proxy

from .. import transforms
from ..backends import loaded_namespaces, ops_for
from ..checks import check_bool, fail
from ..recomputation import current
from ..reference import bn_relu as plain
from . import second_gradient
from .bn_outputs import empty_like_x, mask_of, pack_mask, per_channel_of, unpack_mask
from .bn_relu_checks import check_apply, check_backward, check_forward, check_public, check_update, check_x
from .registration import differentiable, library_of, opaque


def bn_relu(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    *,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    group: distributed.ProcessGroup | None = None,
    num_batches_tracked: torch.Tensor | None = None,
) -> torch.Tensor:
    """BatchNorm (Ioffe and Szegedy 2015) and ReLU in one op, the semantics of `relu(torch.batch_norm(x, ...))`.

        y = relu(weight * (x - mean) / sqrt(var + eps) + bias)

    In training, mean and biased variance are those of x over all but the channels, and the running statistics move:
    running = (1 - momentum) * running + momentum * new, the variance unbiased. Otherwise they are the running ones.
    Saved for the backward pass: x, and mean and variance per channel; its ReLU mask is that of y, bit for bit.

    Args:
        x: (N, C, ...), 2 to 5 dimensions, float16, bfloat16, float32 or float64. NCHW and NHWC (`channels_last`)
            run as they are, and y and the gradient of x have the same layout; other strides are copied once.
        weight, bias: (C,) or None (ones, zeros); float16, bfloat16, float32 (or float64, for x of float64), and so
            the running statistics. Sums are float32, float64 for float64.
        running_mean, running_var: (C,), changed in place in training; both None: batch statistics only.
        training: whether to use batch statistics.
        momentum, eps: as in torch.nn.BatchNorm2d; a momentum of None is the cumulative average, of factor
            1 / num_batches_tracked.
        group: a process group over whose ranks the batch statistics are taken (count-weighted; ranks may hold
            different, or no, samples). None: this process alone.
        num_batches_tracked: an int64 scalar that counts the calls in training, or None.

    Returns:
        y: the shape, dtype and layout of x.

    Raises:
        ValueError: a wrong shape or device, batch statistics of one value per channel, evaluation without running
            statistics, a negative or non-finite eps, a non-finite momentum.
        TypeError: not a tensor, or a dtype that is not accepted.

    Examples:
        >>> x = torch.randn(2, 4, 8, 8, requires_grad=True)
        >>> y = fasttricks.bn_relu(x, torch.ones(4), torch.zeros(4))
        >>> expected = torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True))
        >>> torch.allclose(y, expected, atol=1e-5)
        True
    """
    if isinstance(x, Proxy):
        options = {"training": training, "momentum": momentum, "eps": eps, "group": group}
        options["num_batches_tracked"] = num_batches_tracked
        return transforms.recorded(bn_relu, x, (x, weight, bias, running_mean, running_var), options)
    return call(
        "bn_relu", x, None, weight, bias, running_mean, running_var, training, momentum, eps, group, num_batches_tracked
    )


def bn_add_relu(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    *,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    group: distributed.ProcessGroup | None = None,
    num_batches_tracked: torch.Tensor | None = None,
    pool: bool = False,
    ceil_mode: bool = False,
) -> Any:
    """BatchNorm, addition of the shortcut and ReLU in one op: the end of a residual block (He et al. 2015).

        y = relu(weight * (x - mean) / sqrt(var + eps) + bias + residual)

    The ReLU mask is saved as one bit an element. Where weight is zero (zero gamma: He et al. 2018, section 3.1) x is
    read for its statistics only, and the gradient of x is exactly zero.

    Args:
        residual: on the device of x, of a shape that is, or broadcasts to, that of x; any strides. Of another dtype
            than x both are cast to the dtype that torch promotes them to, which is then that of y; gradients have the
            dtype of their tensor.
        pool: whether to return (y, pooled): pooled (N, C, H', W') are the means of the 2x2 windows of y, computed while
            y is written. A shortcut of ResNet-D (He et al. 2019, section 4.2) that reads y is then a 1x1 convolution of
            pooled, and the gradient of pooled is spread while the backward pass reads it. x must be (N, C, H, W).
        ceil_mode: of the pool, with odd H or W: True keeps the window that overhangs the edge and takes the mean of its
            pixels inside (H' = ceil(H / 2)); False drops the last row or column (floor(H / 2)).
        The others, the result and the errors: see `bn_relu`.

    Returns:
        y, the shape, dtype and layout of x; with pool (y, pooled), both of that dtype and layout.

    Raises:
        ValueError, TypeError: as `bn_relu`; with pool also for an x that is not (N, C, H, W), and for H or W so small
            that pooled would be empty.

    Examples:
        >>> x, residual = torch.randn(2, 2, 4, 8, 8)
        >>> y = fasttricks.bn_add_relu(x, residual, torch.zeros(4))  # zero gamma: the block is its shortcut
        >>> torch.equal(y, residual.relu())
        True
        >>> y, pooled = fasttricks.bn_add_relu(x, residual, pool=True)
        >>> torch.allclose(pooled, torch.nn.functional.avg_pool2d(y, 2))
        True
    """
    if isinstance(x, Proxy):
        options = {"training": training, "momentum": momentum, "eps": eps, "group": group, "pool": pool}
        options |= {"num_batches_tracked": num_batches_tracked, "ceil_mode": ceil_mode}
        return transforms.recorded(bn_add_relu, x, (x, residual, weight, bias, running_mean, running_var), options)
    if not isinstance(residual, torch.Tensor):
        raise TypeError(f"bn_add_relu: residual is a {type(residual).__name__}; accepted: a tensor")
    check_bool("bn_add_relu", "pool", pool)
    check_bool("bn_add_relu", "ceil_mode", ceil_mode)
    given = (
        "bn_add_relu",
        x,
        residual,
        weight,
        bias,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        group,
        num_batches_tracked,
    )
    if pool:
        from .bn_add_relu_pool import call as call_with_pool

        return call_with_pool(ceil_mode, *given)
    return call(*given)


def call(*given: Any) -> torch.Tensor:
    """bn_relu or bn_add_relu, with the arguments of `_run`."""
    if torch.compiler.is_compiling():  # checked once, while the graph is made
        check_call(*given)
        return _run(*given)
    try:
        return _run(*given)
    except Exception:  # the raw ops check too: here the error names the argument as the caller knows it
        check_call(*given)
        raise


def check_call(*given: Any) -> None:
    """Checks the arguments of `_run`."""
    *arguments, group, batches = given
    if group is not None and not isinstance(group, distributed.ProcessGroup):
        fail(given[0], "group", f"is a {type(group).__name__}", "a process group or None", TypeError)
    check_public(*arguments, batches, group is None)  # type: ignore[call-arg]


def _run(
    op: str, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    running_mean: torch.Tensor | None, running_var: torch.Tensor | None, training: bool, momentum: float | None,
    eps: float, group: distributed.ProcessGroup | None, batches: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    check_bool(op, "training", training)
    ops = None if group is not None and training else ops_for(op, x.device)
    if ops is None or (residual is not None and (residual.dtype != x.dtype or residual.shape != x.shape)):
        check_call(op, x, residual, weight, bias, running_mean, running_var, training, momentum, eps, group, batches)
        if residual is not None:
            x, residual = _as_one(x, residual)
    if group is not None and training:
        from .bn_relu_sync import synchronised

        return synchronised(op, x, residual, weight, bias, running_mean, running_var, momentum, eps, group, batches)
    compiling = torch.compiler.is_compiling()
    transformed = not compiling and transforms.active()
    if transformed and transforms.functionalizes():
        return _by_batch_norm(x, residual, weight, bias, running_mean, running_var, training, momentum, eps, batches)
    tracing = compiling or torch.jit.is_tracing()
    if ops is None or (tracing and transforms.exports()):
        return plain.bn_add_relu(
            x, residual, weight, bias, running_mean, running_var, training=training, momentum=momentum, eps=eps,
            num_batches_tracked=batches,
        )  # fmt: skip
    constants = (ops, training, momentum, eps, running_mean, running_var, batches)
    if tracing or transformed:
        return _raw(x, residual, weight, bias, constants)[0]
    if torch.is_grad_enabled():
        return _Fused.apply(x, residual, weight, bias, constants, False)
    with torch._C._AutoDispatchBelowAutograd():
        return _raw(x, residual, weight, bias, constants)[0]


def _by_batch_norm(
    x: Any, residual: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool,
    momentum: float | None, eps: float, batches: Any,
) -> torch.Tensor:  # fmt: skip
    """By torch.batch_norm, which alone may change statistics that are no arguments of a functionalized function."""
    y = torch_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps, batches)
    return F.relu(y if residual is None else y + residual)


def torch_batch_norm(
    x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, momentum: float | None,
    eps: float, batches: Any,
) -> torch.Tensor:  # fmt: skip
    """torch.batch_norm, with the count of batches that nn.BatchNorm2d keeps."""
    if training and batches is not None:
        batches.add_(1)
        momentum = 1.0 / float(batches) if momentum is None else momentum
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum or 0.0, eps)


def _as_one(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as torch's addition sees them: of one dtype, and of the shape of x."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype).expand(x.shape)


# what a call has besides tensors that may need gradients: ops, training, momentum, eps, running_mean, running_var,
# num_batches_tracked; as one argument it costs autograd.Function the least
Constants = tuple[Any, bool, float | None, float, Any, Any, Any]


def _raw(x: Any, residual: Any, weight: Any, bias: Any, constants: Constants) -> tuple[Any, Any, Any, Any]:
    """y, the statistics that it has, and a residual's mask, by the raw op that serves."""
    ops, training, momentum, eps, mean, var, batches = constants
    mask = None
    if training and residual is None:
        y, mean, var = ops.bn_relu_forward.default(x, weight, bias, eps, mean, var, batches, momentum)
    elif training:
        y, mean, var, mask = ops.bn_add_relu_forward.default(
            x, residual, weight, bias, eps, mean, var, batches, momentum
        )
    elif residual is None:
        y = ops.bn_relu_apply.default(x, weight, bias, mean, var, eps)
    else:
        y, mask = ops.bn_add_relu_apply.default(x, residual, weight, bias, mean, var, eps)
    return y, mean, var, mask


def compute_again(
    ops: Any, eps: float, x: Any, residual: Any, weight: Any, bias: Any, mean: Any, var: Any
) -> torch.Tensor:
    """y once more, from the statistics that it had."""
    return _raw(x, residual, weight, bias, (ops, False, None, eps, mean, var, None))[0]


class _Fused(torch.autograd.Function):
    """All four ops as one node of autograd's graph. whole: all outputs of the raw op, else y alone."""

    @staticmethod
    def forward(ctx: Any, x: Any, residual: Any, weight: Any, bias: Any, constants: Constants, whole: bool) -> Any:
        outputs = run_forward(ctx, _raw, x, residual, weight, bias, constants, whole)
        return outputs if len(outputs) > 1 else outputs[0]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, *unused: Any) -> tuple[Any, ...]:
        return *gradients(ctx, dy, second_gradient.taken(ctx)), None, None


second_gradient.receives(_Fused)


def run_forward(
    ctx: Any, raw: Any, x: Any, residual: Any, weight: Any, bias: Any, constants: Any, whole: bool
) -> tuple[Any, ...]:
    """In forward: what the node returns. raw: makes y, perhaps more that has derivatives, then mean, var and mask."""
    below = torch._C._AutoDispatchBelowAutograd()
    try:  # as a context manager it costs twice the time
        *results, mean, var, mask = raw(x, residual, weight, bias, constants)
    finally:
        del below
    y = results[0]
    ctx.save_for_backward(x, weight, bias, mean, var, mask)
    ctx.constants = constants
    ctx.set_materialize_grads(False)
    second_gradient.prepare(ctx, y)
    if not whole:
        if (outputs := current()) is not None:
            again = functools.partial(compute_again, constants[0], constants[3])
            outputs.add(y, again, (x, residual), (weight, bias), (mean, var))
        return tuple(results)
    others = [t for t in ((mean, var, mask) if constants[1] else (mask,)) if t is not None]
    ctx.mark_non_differentiable(*others)
    return *results, *others


def gradients(ctx: Any, dy: torch.Tensor | None, dy2: torch.Tensor | None) -> tuple[Any, Any, Any, Any]:
    """In backward: the gradients of x, residual, weight and bias. dy2: as of bn_relu_backward, which adds it to dy."""
    x, weight, bias, mean, var, mask = ctx.saved_tensors
    differentiated = torch.is_grad_enabled() or transforms.active()  # these gradients will be, once more
    if dy is None:
        if dy2 is None:
            return None, None, None, None
        dy, dy2 = plain.spread(dy2, x), None
    elif dy2 is not None and differentiated:
        dy, dy2 = dy + plain.spread(dy2, x), None
    ops, training, _, eps, *_ = ctx.constants
    need_dx, need_dresidual, need_dweight, need_dbias, *_ = ctx.needs_input_grad
    if differentiated:
        passes = None if mask is None else unpack_mask(mask, x)
        dx, dresidual, dweight, dbias = plain.backward(dy, x, None, weight, bias, mean, var, eps, training, passes)
    else:
        below = torch._C._AutoDispatchBelowAutograd()
        try:
            dx, dresidual, dweight, dbias = ops.bn_relu_backward.default(
                dy, x, mask, weight, bias, mean, var, eps, training, need_dresidual, dy2
            )
        finally:
            del below
        if need_dresidual and (node := second_gradient.receiver(ctx, 1)) is not None:
            second_gradient.give(node, dresidual)
            need_dresidual = False
    if weight is not None and weight.dtype != dweight.dtype:
        dweight = dweight.to(weight.dtype)
    if bias is not None and bias.dtype != dbias.dtype:
        dbias = dbias.to(bias.dtype)
    return (
        dx if need_dx else None,
        dresidual if need_dresidual else None,
        dweight if need_dweight else None,
        dbias if need_dbias else None,
    )


def differentiable_statistics(
    ops: Any, x: torch.Tensor, running_mean: Any, running_var: Any, batches: Any, momentum: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch statistics in torch's own operations; updates the running ones."""
    mean, var = plain.statistics(x)
    if running_mean is not None:
        count = torch.full((), plain.values_per_channel(x), dtype=torch.float64, device=x.device)
        ops.bn_update_stats_.default(running_mean, running_var, mean.detach(), var.detach(), count, batches, momentum)
    elif batches is not None:
        batches.add_(1)
    return mean, var


def composed(x: Any, residual: Any, weight: Any, bias: Any, constants: Constants) -> tuple[Any, Any, Any, Any]:
    """As `_raw`, in torch's own differentiable ops."""
    ops, training, momentum, eps, mean, var, batches = constants
    values = plain.widened(x)
    if training:
        mean, var = differentiable_statistics(ops, values, mean, var, batches, momentum)
    y = plain.apply(values, residual, weight, bias, mean, var, eps, x.dtype)
    return y, mean, var, None if residual is None else pack_mask(~(y <= 0), x)


def _fake_gradients(x: torch.Tensor, need_dresidual: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_like_x(x), empty_like_x(x) if need_dresidual else x.new_empty(0)


def _fake_forward(x: Any, weight: Any, bias: Any, eps: float, *moved: Any) -> tuple[torch.Tensor, ...]:
    check_forward("bn_relu_forward", x, None, weight, bias, eps, *moved)
    return empty_like_x(x), per_channel_of(x), per_channel_of(x)


def _fake_add_forward(
    x: Any, residual: Any, weight: Any, bias: Any, eps: float, *moved: Any
) -> tuple[torch.Tensor, ...]:
    check_forward("bn_add_relu_forward", x, residual, weight, bias, eps, *moved)
    return empty_like_x(x), per_channel_of(x), per_channel_of(x), mask_of(x)


def _fake_apply(x: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float) -> torch.Tensor:
    check_apply("bn_relu_apply", x, None, weight, bias, mean, var, eps)
    return empty_like_x(x)


def _fake_add_apply(
    x: Any, residual: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    check_apply("bn_add_relu_apply", x, residual, weight, bias, mean, var, eps)
    return empty_like_x(x), mask_of(x)


def _fake_stats(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_x("bn_stats", x)
    return per_channel_of(x), per_channel_of(x)


def _fake_backward(
    dy: Any, x: Any, mask: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float, training: bool, need: bool,
    dy2: Any = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    check_backward("bn_relu_backward", dy, x, mask, weight, bias, mean, var, eps, need, dy2)
    return *_fake_gradients(x, need), per_channel_of(x), per_channel_of(x)


def _fake_backward_reduce(dy: Any, x: Any, *rest: Any) -> tuple[torch.Tensor, ...]:
    check_backward("bn_relu_backward_reduce", dy, x, *rest)
    return per_channel_of(x), per_channel_of(x)


def _fake_backward_apply(
    dy: Any, x: Any, mask: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float, mean_dweight: Any,
    mean_dbias: Any, need: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    sums = {"mean_dweight": mean_dweight, "mean_dbias": mean_dbias}
    check_backward("bn_relu_backward_apply", dy, x, mask, weight, bias, mean, var, eps, need, **sums)
    return _fake_gradients(x, need)


def _fake_update(
    running_mean: Any, running_var: Any, mean: Any, var: Any, count: Any, batches: Any = None,
    momentum: float | None = 0.1,
) -> None:  # fmt: skip
    check_update(running_mean, running_var, mean, var, count, batches, momentum)


FAKES: dict[str, Callable[..., Any]] = {
    "bn_relu_forward": _fake_forward,
    "bn_add_relu_forward": _fake_add_forward,
    "bn_relu_apply": _fake_apply,
    "bn_add_relu_apply": _fake_add_apply,
    "bn_stats": _fake_stats,
    "bn_relu_backward": _fake_backward,
    "bn_relu_backward_reduce": _fake_backward_reduce,
    "bn_relu_backward_apply": _fake_backward_apply,
    "bn_update_stats_": _fake_update,
}


def _ordered(
    ops: Any, x: Any, residual: Any, weight: Any, bias: Any, eps: float, mean: Any = None, var: Any = None,
    batches: Any = None, momentum: float | None = 0.1,
) -> tuple[tuple[Any, Any, Any, Any], Constants]:  # fmt: skip
    """The arguments of a raw op with batch statistics as those of `_raw`."""
    return (x, residual, weight, bias), (ops, True, momentum, eps, mean, var, batches)


def _ordered_apply(
    ops: Any, x: Any, residual: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float
) -> tuple[tuple[Any, Any, Any, Any], Constants]:
    return (x, residual, weight, bias), (ops, False, None, eps, mean, var, None)


def register(namespace: str) -> None:
    """Gives the ops of a namespace with these schemas (fasttricks, fasttricks_triton) their fakes and derivatives."""
    ops = getattr(torch.ops, namespace)
    library = library_of(namespace, FAKES)

    def outputs(*which: int) -> Callable[..., Any]:
        def chosen(*given: Any) -> Any:
            everything = composed(*given)
            results = [everything[i] for i in which]
            return results[0] if len(results) == 1 else tuple(results)

        return chosen

    forward, apply = ops.bn_relu_forward.default, ops.bn_relu_apply.default
    differentiable(library, forward, lambda x, *rest: _ordered(ops, x, None, *rest), _Fused, outputs(0, 1, 2))
    differentiable(library, apply, lambda x, *rest: _ordered_apply(ops, x, None, *rest), _Fused, outputs(0))
    forward, apply = ops.bn_add_relu_forward.default, ops.bn_add_relu_apply.default
    differentiable(library, forward, functools.partial(_ordered, ops), _Fused, outputs(0, 1, 2, 3))
    differentiable(library, apply, functools.partial(_ordered_apply, ops), _Fused, outputs(0, 3))

    accepted = "fasttricks.bn_relu and fasttricks.bn_add_relu, which have"
    for name in ("bn_stats", "bn_relu_backward", "bn_relu_backward_reduce", "bn_relu_backward_apply"):
        opaque(library, getattr(ops, name).default, accepted)

    update = ops.bn_update_stats_.default

    def update_autograd(*given: Any) -> None:  # of no derivative: the running statistics are constants
        with torch._C._AutoDispatchBelowAutograd():
            update(*given)

    def update_batched(
        running_mean: Any, running_var: Any, mean: Any, var: Any, count: Any, n: Any = None, m: Any = 0.1
    ) -> None:
        plain.update_statistics(running_mean, running_var, mean, var, count, n, m)

    library.impl("bn_update_stats_", update_autograd, "Autograd")
    library.impl("bn_update_stats_", update_batched, "FuncTorchBatched")


for loaded in loaded_namespaces():
    register(loaded)
