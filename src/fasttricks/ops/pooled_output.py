"""Passes the 2x2 means of a block's output y to the shortcut of the next block, which pools y before its convolution.

The block that makes y computes the means while y is in the cache, and keeps them at the tensor: an attribute of this
one object, so that whoever puts another tensor in its place, or changes it, is honoured. The shortcut takes them if
they are those of y. For autograd its pooled tensor is a function of y, whose gradient is handed to the node that made
y, as `second_gradient` describes, or else spread over the pixels of y. Means that nobody takes are only lost work.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import transforms
from ..backends import hands_means_on
from ..reference.avgpool_conv1x1 import output_size
from ..reference.bn_relu import spread
from . import second_gradient


def wanted(x: torch.Tensor, ceil_mode: bool) -> bool:
    """Whether an output of the shape of x, with a reader that pools it, gets its means."""
    return not (
        torch.compiler.is_compiling()
        or transforms.active()
        or 0 in output_size(x, 2, ceil_mode)  # the reader's error, if there is one
        or not hands_means_on("bn_add_relu", x.device, x.dtype)
    )


def attach(y: torch.Tensor, means: torch.Tensor, ceil_mode: bool) -> None:
    """Keeps the means of y at y."""
    if type(y) is torch.Tensor and not y.is_inference():  # inference tensors do not count their changes
        y._fasttricks_means = means.detach(), ceil_mode, y._version, y.data_ptr()  # type: ignore[attr-defined]


def taken(y: torch.Tensor, ceil_mode: bool, weight: torch.Tensor) -> torch.Tensor | None:
    """The means of y for a convolution with this weight, if y has them still; else None."""
    kept = getattr(y, "_fasttricks_means", None)
    if kept is None or torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms.active():
        return None
    means, mode, version, address = kept
    if mode is not ceil_mode or y._version != version or y.data_ptr() != address:
        return None
    if weight.dtype != y.dtype and not torch._C._is_any_autocast_enabled():  # the op has an error for that
        return None
    if torch.is_grad_enabled() and y.requires_grad:
        return _Means.apply(y, means, weight)
    return means


class _Means(torch.autograd.Function):
    """The means as a function of y. weight: that of the convolution after it, by which `receiver` knows the call."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, means: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.shape = y.shape
        ctx.set_materialize_grads(False)
        return means

    @staticmethod
    def backward(ctx: Any, dmeans: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:
        if dmeans is None:
            return None, None, None
        if not (torch.is_grad_enabled() or transforms.active()):
            node = second_gradient.receiver(ctx, 0)
            if node is not None:
                second_gradient.give(node, dmeans)
                return None, None, None
        return spread(dmeans, dmeans.new_empty(()).expand(ctx.shape)), None, None
