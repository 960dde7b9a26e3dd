"""Detection of torch.func transforms and forward-mode AD."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def active() -> bool:
    """Whether a transform of torch.func runs (grad, jvp, vmap, ...), or a level of forward-mode AD is entered.

    Kernels have no rules for these; the torch ops of the references do.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
