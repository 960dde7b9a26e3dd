"""What Triton's interpreter does otherwise than cards, up to 3.8: bfloat16 is cut off, and multiplied as integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def correct() -> None:
    """From here on it rounds to bfloat16 as torch and cards do, ties to even, and multiplies its values."""
    import triton.language as tl
    from triton.runtime import interpreter

    theirs = interpreter._convert_float

    def converted(values: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return theirs(values, source, target, rounding_mode)
        return torch.from_numpy(np.array(values)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = converted

    theirs_dot = interpreter.InterpreterBuilder.create_dot

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        def wide(operand: Any) -> Any:
            if operand.dtype.scalar.primitive_bitwidth != 16:
                return operand
            return self.cast_impl(operand, tl.block_type(tl.float32, list(operand.data.shape)))

        return theirs_dot(self, wide(a), wide(b), *rest)

    interpreter.InterpreterBuilder.create_dot = dot
