"""The memory format of the kernels' results; csrc/layout.h makes the same choice in C++."""

from __future__ import annotations

import torch


def layout_of(x: torch.Tensor) -> torch.memory_format:
    """The memory format of a result shaped like x (N, C, ...): that of x, or the one that its strides resemble."""
    if x.numel() == 0 or x.is_contiguous() or x.shape[1] == 1 or x.stride(1) != 1:
        return torch.contiguous_format
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
