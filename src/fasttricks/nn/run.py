"""One call of a BatchNorm module with the ReLU that follows it, or of a pool with its convolution.

The modules of `fasttricks.nn` and the blocks of `fasttricks.fuse` both call these functions. A call is one op if that
equals calling the modules one after another; if not, they are called one after another.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.modules.module import _has_any_global_hook

from ..ops import pooled_output
from ..ops.avgpool_conv1x1 import avgpool_conv1x1
from ..ops.bn_add_bn_relu import Norm
from ..ops.bn_add_bn_relu import call as call_of_two
from ..ops.bn_add_relu_pool import call as call_with_pool
from ..ops.bn_relu import call


def untouched(module: nn.Module) -> bool:
    """Whether a call of module runs only the forward of its class: no hooks, and no forward set on the instance."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def tensor_of(value: Any, name: str) -> torch.Tensor:
    """What the child `name` of a block returned, if the block was fused because that child returns a tensor.

    Raises:
        TypeError: it is no tensor.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"fasttricks.fuse: {name} returned a {type(value).__name__}; accepted: a tensor, as its forward or the "
            "annotation of that said. Correct the annotation, or leave the block that calls it as it is (filter_fn)"
        )
    return value


# forwards of the classes whose calls the ops and the blocks replace, which a tool may replace for all modules at once
_BN_FORWARD, _RELU_FORWARD = nn.BatchNorm2d.forward, nn.ReLU.forward
_POOL_FORWARD, _CONV_FORWARD, _SEQUENTIAL_FORWARD = nn.AvgPool2d.forward, nn.Conv2d.forward, nn.Sequential.forward


def _has_patched_class() -> bool:
    return not (
        nn.BatchNorm2d.forward is _BN_FORWARD
        and nn.ReLU.forward is _RELU_FORWARD
        and nn.AvgPool2d.forward is _POOL_FORWARD
        and nn.Conv2d.forward is _CONV_FORWARD
        and nn.Sequential.forward is _SEQUENTIAL_FORWARD
    )


def wants_plain_modules(x: Any) -> bool:
    """Whether a tool records operations on x (torch.export, ONNX, jit.trace, torch.fx), or changed every module.

    That is by global module hooks, or by another forward of a class of torch.

    torch.fx records operations on its own proxies only.
    """
    return (
        torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or _has_any_global_hook()
        or _has_patched_class()
        or (type(x) is not torch.Tensor and is_fx_symbolic_tracing())
    )


_TIMM_NORMS = ("BatchNormAct2d", "SyncBatchNormAct")
_norms: dict[type, bool] = {nn.BatchNorm2d: True, nn.SyncBatchNorm: True}


def is_norm_class(cls: type) -> bool:
    """Whether cls is BatchNorm2d, SyncBatchNorm or timm's BatchNorm with an activation, but not a subclass of them."""
    known = _norms.get(cls)
    if known is None:
        known = (
            cls.__module__ == "timm.layers.norm_act"
            and cls.__name__ in _TIMM_NORMS
            and "_fasttricks_original" not in vars(cls)
        )
        _norms[cls] = known
    return known


def is_plain_norm(module: Any) -> bool:
    """Whether module computes a BatchNorm and nothing more."""
    cls = type(module)
    if cls is nn.BatchNorm2d or cls is nn.SyncBatchNorm:
        return untouched(module)
    if not isinstance(module, nn.Module) or not is_norm_class(cls) or not untouched(module):
        return False
    return all(type(child) is nn.Identity and untouched(child) for child in module.children())


_ZERO, _ONE, _TWO = (0, (0, 0)), (1, (1, 1)), (2, (2, 2))  # sizes as modules store them


_pools: dict[type, bool] = {nn.AvgPool2d: True}


def is_pool_class(cls: type) -> bool:
    """Whether cls is AvgPool2d, or timm's that pads an odd edge with zeros, but not a subclass of them."""
    known = _pools.get(cls)
    if known is None:
        known = _pools[cls] = cls.__module__ == "timm.layers.pool2d_same" and cls.__name__ == "AvgPool2dSame"
    return known


def is_2x2_pool(pool: Any) -> bool:
    """Whether pool is a 2x2 average pool with stride 2 that divides by the number of pixels inside the image."""
    return pool.kernel_size in _TWO and pool.stride in _TWO and pool.padding in _ZERO and pool.divisor_override is None


def pads_an_edge(pool: nn.Module, x: torch.Tensor) -> bool:
    """Whether timm's 2x2 pool pads an odd edge of x with zeros, which the op does not."""
    return type(pool) is not nn.AvgPool2d and bool(x.shape[-2] % 2 or x.shape[-1] % 2)


def is_1x1_conv(conv: Any) -> bool:
    """Whether conv is a 1x1 convolution with stride 1 and one group."""
    return (
        conv.kernel_size in _ONE
        and conv.stride in _ONE
        and (conv.padding in _ZERO or conv.padding in ("valid", "same"))
        and conv.groups == 1
    )


def is_plain_conv1x1(module: Any) -> bool:
    return type(module) is nn.Conv2d and is_1x1_conv(module) and untouched(module)


def _process_group(norm: nn.Module) -> distributed.ProcessGroup | None:
    """The process group over which a SyncBatchNorm computes its statistics now; None: this process alone."""
    if type(norm) is nn.BatchNorm2d or not norm.training or not isinstance(norm, nn.SyncBatchNorm):
        return None
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    group = norm.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


def _own(norm: Any, tensors: dict[str, Any], name: str) -> Any:
    """A parameter or buffer from its dictionary, at a fraction of the cost of nn.Module.__getattr__."""
    if name in tensors:
        return tensors[name]
    return getattr(norm, name)  # FSDP and pruning replace a parameter by a plain attribute


def _weight_and_bias(module: Any) -> tuple[Any, Any]:
    parameters = module._parameters
    return _own(module, parameters, "weight"), _own(module, parameters, "bias")


def _state(norm: Any) -> tuple[bool, Norm]:
    """Whether norm uses batch statistics, and its parameters, statistics and options as the ops take them."""
    buffers = norm._buffers
    training, momentum, tracked = norm.training, norm.momentum, None
    mean, var = _own(norm, buffers, "running_mean"), _own(norm, buffers, "running_var")
    if training:
        if norm.track_running_stats:
            tracked = _own(norm, buffers, "num_batches_tracked")
        else:
            mean = var = None  # untracked buffers are not updated
    if momentum is None and tracked is None:
        momentum = 0.0  # without a count there is no cumulative average, and torch then updates nothing
    return training or mean is None, (*_weight_and_bias(norm), mean, var, momentum, norm.eps, tracked)


def _op(
    norm: Any, x: torch.Tensor, residual: torch.Tensor | None, ceil_mode_of_reader: bool | None = None
) -> torch.Tensor:
    """The fused op with the parameters, statistics and mode of norm."""
    training, (weight, bias, mean, var, momentum, eps, tracked) = _state(norm)
    group = _process_group(norm)
    op = "bn_relu" if residual is None else "bn_add_relu"
    given = (op, x, residual, weight, bias, mean, var, training, momentum, eps, group, tracked)
    if ceil_mode_of_reader is None or group is not None or not pooled_output.wanted(x, ceil_mode_of_reader):
        return call(*given)
    y, means = call_with_pool(ceil_mode_of_reader, *given)
    pooled_output.attach(y, means, ceil_mode_of_reader)
    return y


# In the functions below, a pair on fewer than min_elements elements calls its modules. None: where autograd records
# calls on the CPU, SMALL_ON_CPU; below it a node of ours costs more time than two of torch's, and the kernel wins less.


SMALL_ON_CPU = 32_768  # measured: benchmarks/bench_small.py and bench_models.py


def is_small(x: torch.Tensor, min_elements: int | None, norm: Any = None) -> bool:
    """Whether x has fewer elements. False in compiled graphs, where a call has no cost of its own, and for a norm with
    statistics over several processes, which torch has on cards only.
    """
    if torch.compiler.is_compiling():
        return False
    if min_elements is None:
        small = x.numel() < SMALL_ON_CPU and x.device.type == "cpu" and torch.is_grad_enabled()
    else:
        small = x.numel() < min_elements
    return small and (norm is None or _process_group(norm) is None)


def norm_relu(norm: Any, x: torch.Tensor, min_elements: int | None = 0) -> torch.Tensor:
    """relu(norm(x)) for a plain norm, which the caller has checked, or for timm's, whose ReLU is its own."""
    if x.dim() != 4 or (min_elements != 0 and is_small(x, min_elements, norm)):
        return F.relu(norm(x))
    return _op(norm, x, None)


def norm_add_relu(
    norm: Any,
    x: torch.Tensor,
    residual: Any,
    in_place: bool = False,
    min_elements: int | None = 0,
    ceil_mode_of_reader: bool | None = None,
) -> torch.Tensor:
    """relu(norm(x) + residual) for a plain norm; in_place: the addition was `+=` on the result of norm.

    ceil_mode_of_reader: that of a 2x2 pool in the next block, which may take the means of the result from here.
    """
    if (
        x.dim() != 4
        or not isinstance(residual, torch.Tensor)
        or residual.shape != x.shape
        or residual.dtype != x.dtype
        or (min_elements != 0 and is_small(x, min_elements, norm))
    ):
        y = norm(x)
        if in_place:
            y += residual
        else:
            y = y + residual
        return F.relu(y)
    return _op(norm, x, residual, ceil_mode_of_reader)


def norm_add_norm_relu(
    norm: Any, x: torch.Tensor, other: Any, residual: Any, in_place: bool = False, min_elements: int | None = 0
) -> torch.Tensor:
    """relu(norm(x) + other(residual)) for plain norms; in_place: the addition was `+=` on the result of norm."""
    if (
        x.dim() != 4
        or residual.shape != x.shape
        or residual.dtype != x.dtype
        or (min_elements != 0 and is_small(x, min_elements, norm))
        or _process_group(norm) is not None
        or _process_group(other) is not None
    ):
        return norm_add_relu(norm, x, other(residual), in_place, min_elements)
    training, state = _state(norm)
    other_training, other_state = _state(other)
    if training != other_training:
        return norm_add_relu(norm, x, other(residual), in_place, min_elements)
    return call_of_two(x, residual, training, state, other_state)


def avgpool_conv1x1_of_modules(
    pool: nn.AvgPool2d, conv: nn.Conv2d, x: torch.Tensor, min_elements: int = 0, may_change: bool = False
) -> torch.Tensor:
    """conv(pool(x)) of a 2x2 pool and a 1x1 convolution."""
    if pads_an_edge(pool, x):
        return conv(pool(x))
    return avgpool_conv1x1_of(conv, x, pool.ceil_mode, min_elements, may_change)


def avgpool_conv1x1_of(
    conv: nn.Conv2d, x: torch.Tensor, ceil_mode: bool, min_elements: int = 0, may_change: bool = False
) -> torch.Tensor:
    """conv(avg_pool2d(x, 2, ceil_mode=ceil_mode)) of a 1x1 convolution.

    may_change: x may be changed in place later. The op's backward needs x, and so does a pool's unless x requires no
    gradient: then the convolution alone saves something, the pooled tensor.
    """
    if (
        x.dim() != 4
        or (min_elements != 0 and is_small(x, min_elements))
        or (may_change and not x.requires_grad and torch.is_grad_enabled())
    ):
        return conv(F.avg_pool2d(x, 2, ceil_mode=ceil_mode))
    return pool_and_conv1x1(conv, x, ceil_mode)


def pool_and_conv1x1(conv: Any, x: torch.Tensor, ceil_mode: bool) -> torch.Tensor:
    """As one op or, if the block that made x has pooled it, the convolution alone."""
    weight, bias = _weight_and_bias(conv)
    if (means := pooled_output.taken(x, ceil_mode, weight)) is not None:
        return F.conv2d(means, weight, bias)
    return avgpool_conv1x1(x, weight, bias, stride=2, ceil_mode=ceil_mode)


def conv1x1_avgpool_of_modules(
    pool: nn.AvgPool2d, conv: nn.Conv2d, x: torch.Tensor, min_elements: int = 0
) -> torch.Tensor:
    """pool(conv(x)) of a 1x1 convolution and a 2x2 pool: both are linear, so the pool may come first."""
    if pads_an_edge(pool, x):
        return pool(conv(x))
    return conv1x1_avgpool_of(conv, x, pool.ceil_mode, min_elements)


def conv1x1_avgpool_of(conv: nn.Conv2d, x: torch.Tensor, ceil_mode: bool, min_elements: int = 0) -> torch.Tensor:
    """avg_pool2d(conv(x), 2, ceil_mode=ceil_mode) of a 1x1 convolution."""
    if x.dim() != 4 or (min_elements != 0 and is_small(x, min_elements)):
        return F.avg_pool2d(conv(x), 2, ceil_mode=ceil_mode)
    return avgpool_conv1x1(x, *_weight_and_bias(conv), stride=2, ceil_mode=ceil_mode)


def pooled_shape_of_module(pool: nn.AvgPool2d, x: torch.Tensor) -> torch.Size:
    """pool(x).shape of a 2x2 pool."""
    return pooled_shape(x, pool.ceil_mode or type(pool) is not nn.AvgPool2d)


def pooled_shape(x: torch.Tensor, ceil_mode: bool) -> torch.Size:
    """avg_pool2d(x, 2, ceil_mode=ceil_mode).shape"""
    *outer, height, width = x.shape
    return torch.Size((*outer, (height + ceil_mode) // 2, (width + ceil_mode) // 2))
