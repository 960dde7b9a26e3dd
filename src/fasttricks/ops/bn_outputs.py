"""Outputs of the BatchNorm ops: their shapes and types, and the bits of the mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..layout import layout_of
from ..reference.avgpool_conv1x1 import output_size
from ..reference.bn_relu import accumulate_dtype


def empty_like_x(x: torch.Tensor) -> torch.Tensor:
    """An output or a gradient of the shape, dtype and layout of x."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))


def means_of(x: torch.Tensor, ceil_mode: bool) -> torch.Tensor:
    """The 2x2 means of an output of the shape, dtype and layout of x."""
    size = (*x.shape[:2], *output_size(x, 2, ceil_mode))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout_of(x))


def per_channel_of(x: torch.Tensor) -> torch.Tensor:
    """Statistics or gradients per channel, in the dtype of the sums."""
    return x.new_empty(x.shape[1], dtype=accumulate_dtype(x.dtype))


def mask_of(x: torch.Tensor) -> torch.Tensor:
    """The mask of the ReLU: a bit for each element of x."""
    return x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


def pack_mask(passes: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The bit mask of bn_add_relu from booleans of the shape of x."""
    dense = passes if layout_of(x) == torch.contiguous_format else passes.movedim(1, -1)
    flat = dense.reshape(-1)
    padded = F.pad(flat, (0, -flat.shape[0] % 8)).view(-1, 8)
    powers = 1 << torch.arange(8, device=x.device)
    return (padded * powers).sum(1).to(torch.uint8)


def unpack_mask(mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The bit mask of bn_add_relu as booleans of the shape of x (the layout of bits is the memory order of y)."""
    bits = (mask.unsqueeze(1) >> torch.arange(8, device=mask.device, dtype=torch.uint8)) & 1
    flat = bits.flatten()[: x.numel()].bool()
    if layout_of(x) == torch.contiguous_format:
        return flat.view(x.shape)
    return flat.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
