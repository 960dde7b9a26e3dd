"""Argument checks of the ops: each error names the op, the argument, what was given and what is accepted.

csrc/checks.h has the same checks with the same messages for raw calls of the C++ ops.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# numbers of Python and NumPy, and those that torch.compile traces
NUMBERS: tuple[Any, ...] = (numbers.Real, torch.SymFloat, torch.SymInt)


def fail(op: str, name: str, given: str, accepted: str, kind: type[Exception] = ValueError) -> NoReturn:
    """Raises the error of the argument `name`."""
    raise kind(f"{op}: {name} {given}; accepted: {accepted}")


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def check_tensor(op: str, name: str, t: Any, optional: bool = False) -> None:
    """TypeError unless t is a tensor (or None, if optional)."""
    if not isinstance(t, torch.Tensor) and not (optional and t is None):
        accepted = "a tensor or None" if optional else "a tensor"
        fail(op, name, f"is a {type(t).__name__}", accepted, TypeError)


def check_dtype(op: str, name: str, t: torch.Tensor, accepted: Sequence[torch.dtype] = FLOATS) -> None:
    """TypeError unless the dtype of t is one of `accepted`."""
    if t.dtype not in accepted:
        fail(op, name, f"has dtype {dtype_name(t.dtype)}", ", ".join(map(dtype_name, accepted)), TypeError)


def check_shape(op: str, name: str, t: torch.Tensor, shape: Sequence[int], meaning: str) -> None:
    """ValueError unless t has this shape; `meaning` explains the shape, such as "the channels of x"."""
    if tuple(t.shape) != tuple(shape):
        fail(op, name, f"has shape {tuple(t.shape)}", f"{tuple(shape)}, {meaning}")


def check_device(op: str, name: str, t: torch.Tensor, other: torch.Tensor, whose: str = "x") -> None:
    """ValueError unless t is on the device of `other`; `whose` says which tensor that is."""
    if t.device != other.device:
        fail(op, name, f"is on {t.device}", f"the device of {whose}, {other.device}")


def check_written(op: str, name: str, t: torch.Tensor) -> None:
    """ValueError if elements of t share memory, for tensors that the op writes; torch refuses the same in place."""
    if t.is_contiguous() or t.numel() == 0:
        return
    if any(stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape, strict=True)):
        fail(op, name, "is expanded: its elements share memory", "a tensor that can be written")


def check_bool(op: str, name: str, value: Any) -> None:
    """TypeError unless value is a bool."""
    if not isinstance(value, bool):
        fail(op, name, f"is {value!r}", "True, False", TypeError)


def check_number(op: str, name: str, value: Any, least: float = -math.inf) -> float:
    """Returns value as a float; TypeError unless it is a number, ValueError unless finite and >= `least`."""
    if not isinstance(value, NUMBERS):
        fail(op, name, f"is a {type(value).__name__}", "a number", TypeError)
    # comparisons rather than math.isfinite, because torch.compile traces them
    if not (least <= value and -math.inf < value < math.inf):
        fail(op, name, f"is {value}", "a finite number" if least == -math.inf else f"a finite number >= {least:g}")
    return float(value)
