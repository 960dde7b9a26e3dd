"""bn_relu and bn_add_relu: BatchNorm + ReLU, and BatchNorm + residual add + ReLU, as one op each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from ..backends import loaded_namespaces, ops_for
from ..layout import layout_of
from ..reference import bn_relu as plain

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ACCEPTED = "float16, bfloat16, float32, float64"


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
        weight, bias: (C,) or None (ones, zeros); float32 or the dtype of x, and so the running statistics. Sums are
            float32, float64 for float64.
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
        ValueError: a wrong shape or device, one value per channel in training, evaluation without running statistics,
            a negative or non-finite eps, a non-finite momentum.
        TypeError: not a tensor, or a dtype that is not accepted.

    Examples:
        >>> x = torch.randn(2, 4, 8, 8, requires_grad=True)
        >>> y = fasttricks.bn_relu(x, torch.ones(4), torch.zeros(4))
        >>> expected = torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True))
        >>> torch.allclose(y, expected, atol=1e-5)
        True
    """
    return _call(
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
) -> torch.Tensor:
    """BatchNorm, addition of the shortcut and ReLU in one op: the end of a residual block (He et al. 2015).

        y = relu(weight * (x - mean) / sqrt(var + eps) + bias + residual)

    The ReLU mask is saved as one bit an element. Where weight is zero (zero gamma: He et al. 2018, section 3.1) x is
    read for its statistics only, and the gradient of x is exactly zero.

    Args:
        residual: the shape, dtype and device of x; any strides.
        The others, the result and the errors: see `bn_relu`.

    Examples:
        >>> x, residual = torch.randn(2, 2, 4, 8, 8)
        >>> y = fasttricks.bn_add_relu(x, residual, torch.zeros(4))  # zero gamma: the block is its shortcut
        >>> torch.equal(y, residual.relu())
        True
    """
    if not isinstance(residual, torch.Tensor):
        raise TypeError(f"bn_add_relu: residual is a {type(residual).__name__}; accepted: a tensor")
    return _call(
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


def _call(
    op: str,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    group: distributed.ProcessGroup | None,
    num_batches_tracked: torch.Tensor | None,
) -> torch.Tensor:
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is None:
        if not training or running_mean is None or running_var is None:
            momentum = 0.0
        elif num_batches_tracked is None:
            raise ValueError(f"{op}: momentum is None and num_batches_tracked is None; accepted: one of the two given")
        else:
            now = (running_mean.clone(), running_var.clone())
            y = _call(op, x, residual, weight, bias, *now, training, 1.0, eps, group, None)
            factor = 1.0 / num_batches_tracked.to(running_mean.dtype)
            with torch.no_grad():
                for buffer, new in zip((running_mean, running_var), now, strict=True):
                    buffer.copy_((1.0 - factor) * buffer + factor * new)
            return y
    _check(op, x, residual, weight, bias, running_mean, running_var, training, momentum, eps)
    count = x.numel() // x.shape[1] if x.shape[1] else 0
    if training and group is not None:
        from .bn_relu_sync import synchronised

        return synchronised(op, x, residual, weight, bias, running_mean, running_var, momentum, eps, group)
    if training and count == 1:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)}: Expected more than 1 value per channel when training; accepted: two "
            "values per channel or more, or training=False"
        )
    ops = ops_for(op, x.device)
    if ops is None:
        return plain.bn_add_relu(
            x, residual, weight, bias, running_mean, running_var, training=training, momentum=momentum, eps=eps
        )
    if not training:
        assert running_mean is not None
        assert running_var is not None
        if residual is None:
            return ops.bn_relu_apply(x, weight, bias, running_mean, running_var, eps)
        return ops.bn_add_relu_apply(x, residual, weight, bias, running_mean, running_var, eps)[0]
    if residual is None:
        y, mean, var = ops.bn_relu_forward(x, weight, bias, eps)
    else:
        y, mean, var, _ = ops.bn_add_relu_forward(x, residual, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        ops.bn_update_stats_(running_mean, running_var, mean, var, count, momentum)
    return y


def _check(
    op: str,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: x is a {type(x).__name__}; accepted: a tensor")
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: x has dtype {x.dtype}; accepted: {_ACCEPTED}")
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; accepted: 2 to 5 dimensions (N, C, ...)")
    if residual is not None:
        if residual.dtype != x.dtype:
            raise TypeError(f"{op}: residual has dtype {residual.dtype}; accepted: the dtype of x, {x.dtype}")
        if residual.shape != x.shape:
            raise ValueError(
                f"{op}: residual has shape {tuple(residual.shape)}; accepted: the shape of x, {tuple(x.shape)}"
            )
        if residual.device != x.device:
            raise ValueError(f"{op}: residual is on {residual.device}; accepted: the device of x, {x.device}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, t in named.items():
        if t is None:
            continue
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}; accepted: a tensor or None")
        if t.dtype not in (wide, x.dtype):
            accepted = f"{wide} or the dtype of x, {x.dtype}" if wide != x.dtype else f"{wide}"
            raise TypeError(f"{op}: {name} has dtype {t.dtype}; accepted: {accepted}")
        if tuple(t.shape) != (x.shape[1],):
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; accepted: ({x.shape[1]},), the channels of x")
        if t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device}; accepted: the device of x, {x.device}")
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{op}: {missing} is None and the other is not; accepted: both, or neither")
    if not training and running_mean is None:
        raise ValueError(f"{op}: training is False and running_mean, running_var are None; accepted: both given")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{op}: eps is {eps}; accepted: zero or more, finite")
    if not abs(momentum) < float("inf"):
        raise ValueError(f"{op}: momentum is {momentum}; accepted: a finite number")


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))


def _per_channel(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[1], dtype=plain.accumulate_dtype(x.dtype))


def _mask(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


def unpack_mask(mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The bit mask of bn_add_relu as booleans of the shape of x (the layout of bits is the memory order of y)."""
    bits = (mask.unsqueeze(1) >> torch.arange(8, device=mask.device, dtype=torch.uint8)) & 1
    flat = bits.flatten()[: x.numel()].bool()
    if layout_of(x) == torch.contiguous_format:
        return flat.view(x.shape)
    return flat.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)


def _fake_forward(x: torch.Tensor, weight: Any, bias: Any, eps: float) -> tuple[torch.Tensor, ...]:
    return _like(x), _per_channel(x), _per_channel(x)


def _fake_add_forward(x: torch.Tensor, residual: Any, weight: Any, bias: Any, eps: float) -> tuple[torch.Tensor, ...]:
    return _like(x), _per_channel(x), _per_channel(x), _mask(x)


def _fake_apply(x: torch.Tensor, weight: Any, bias: Any, mean: Any, var: Any, eps: float) -> torch.Tensor:
    return _like(x)


def _fake_add_apply(
    x: torch.Tensor, residual: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _like(x), _mask(x)


def _fake_stats(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _per_channel(x), _per_channel(x)


def _fake_gradients(x: torch.Tensor, need_dresidual: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return _like(x), _like(x) if need_dresidual else x.new_empty(0)


def _fake_backward(dy: Any, x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    return *_fake_gradients(x, rest[-1]), _per_channel(x), _per_channel(x)


def _fake_backward_reduce(dy: Any, x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    return _per_channel(x), _per_channel(x)


def _fake_backward_apply(dy: Any, x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    return _fake_gradients(x, rest[-1])


def _fake_update(running_mean: Any, running_var: Any, mean: Any, var: Any, count: int, momentum: float) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any, residual: bool, training: bool) -> None:
    """Saves x, weight, bias, mean, variance and a residual's mask; never the running statistics in training."""
    x, *rest = inputs
    if residual:
        rest = rest[1:]
    weight, bias = rest[:2]
    mean, var = (output[1], output[2]) if training else rest[2:4]
    mask = (output[3] if training else output[1]) if residual else None
    constants = [t for t in ((mean, var) if training else ()) if t is not None] + ([mask] if mask is not None else [])
    ctx.mark_non_differentiable(*constants)
    ctx.set_materialize_grads(False)
    ctx.eps, ctx.residual, ctx.training_statistics = rest[-1], residual, training
    ctx.save_for_backward(x, weight, bias, mean, var, mask)


def register(namespace: str) -> None:
    """Gives the ops of a namespace with these schemas (fasttricks, fasttricks_triton) their fakes and autograd."""
    ops = getattr(torch.ops, namespace)

    def backward(ctx: Any, dy: torch.Tensor | None, *unused: Any) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, mean, var, mask = ctx.saved_tensors
        needs = ctx.needs_input_grad
        after = () if ctx.training_statistics else (None, None)
        if dy is None:
            return (None,) * len(needs)
        need_residual = ctx.residual and needs[1]
        if torch.is_grad_enabled():  # create_graph=True: these gradients will be differentiated
            passes = None if mask is None else unpack_mask(mask, x)
            dx, dresidual, dweight, dbias = plain.backward(
                dy, x, None, weight, bias, mean, var, ctx.eps, ctx.training_statistics, passes
            )
        else:
            dx, dresidual, dweight, dbias = ops.bn_relu_backward(
                dy, x, mask, weight, bias, mean, var, ctx.eps, ctx.training_statistics, need_residual
            )
        affine = (
            None if weight is None or not needs[1 + ctx.residual] else dweight.to(weight.dtype),
            None if bias is None or not needs[2 + ctx.residual] else dbias.to(bias.dtype),
        )
        first = (dx if needs[0] else None, *((dresidual if need_residual else None,) if ctx.residual else ()))
        return *first, *affine, *after, None

    fakes: dict[str, Callable[..., Any]] = {
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
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)

    def autograd(name: str, residual: bool, training: bool) -> None:
        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            _setup(ctx, inputs, output, residual, training)

        torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=setup)

    autograd("bn_relu_forward", residual=False, training=True)
    autograd("bn_add_relu_forward", residual=True, training=True)
    autograd("bn_relu_apply", residual=False, training=False)
    autograd("bn_add_relu_apply", residual=True, training=False)


for loaded in loaded_namespaces():
    register(loaded)
