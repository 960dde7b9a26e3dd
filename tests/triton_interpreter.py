"""A correction of Triton's interpreter: up to 3.8 it cuts float32 to bfloat16 off, where cards round to the nearest."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def correct() -> None:
    """From here on the interpreter rounds to bfloat16 as torch and cards do, ties to even."""
    import triton.language as tl
    from triton.runtime import interpreter

    theirs = interpreter._convert_float

    def converted(values: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return theirs(values, source, target, rounding_mode)
        return torch.from_numpy(np.array(values)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = converted
