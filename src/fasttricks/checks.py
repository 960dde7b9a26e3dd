"""Argument checks of the ops: each error names the op, the argument, what was given and what is accepted.

csrc/checks.h has the same checks, in the same words, for raw calls of the C++ ops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def check_tensor(op: str, name: str, t: Any, optional: bool = False) -> None:
    """TypeError unless t is a tensor (or None, where that is accepted)."""
    if not isinstance(t, torch.Tensor) and not (optional and t is None):
        accepted = "a tensor or None" if optional else "a tensor"
        raise TypeError(f"{op}: {name} is a {type(t).__name__}; accepted: {accepted}")


def check_dtype(op: str, name: str, t: torch.Tensor, accepted: Sequence[torch.dtype] = FLOATS) -> None:
    """TypeError unless the dtype of t is one of `accepted`."""
    if t.dtype not in accepted:
        names = ", ".join(map(dtype_name, accepted))
        raise TypeError(f"{op}: {name} has dtype {dtype_name(t.dtype)}; accepted: {names}")


def check_shape(op: str, name: str, t: torch.Tensor, shape: Sequence[int], meaning: str) -> None:
    """ValueError unless t has this shape; `meaning` says whose it is: "the channels of x"."""
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; accepted: {tuple(shape)}, {meaning}")


def check_device(op: str, name: str, t: torch.Tensor, x: torch.Tensor) -> None:
    """ValueError unless t is on the device of x."""
    if t.device != x.device:
        raise ValueError(f"{op}: {name} is on {t.device}; accepted: the device of x, {x.device}")


def check_finite(op: str, name: str, value: float, least: float = -math.inf) -> None:
    """ValueError unless value is finite and at least `least`."""
    if not (least <= value and -math.inf < value < math.inf):  # comparisons, which torch.compile traces
        accepted = "a finite number" if least == -math.inf else f"{least:g} or more, finite"
        raise ValueError(f"{op}: {name} is {value}; accepted: {accepted}")
