"""The layout that kernels choose for what they make; csrc/layout.h makes the same choice in C++."""

from __future__ import annotations

import torch


def layout_of(x: torch.Tensor) -> torch.memory_format:
    """The layout of a result that is like x (N, C, ...): that of x, or for other strides the one it resembles."""
    if x.numel() == 0 or x.is_contiguous() or x.shape[1] == 1 or x.stride(1) != 1:
        return torch.contiguous_format
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
