"""The traffic meter of the Triton kernels: bytes that loads and stores move under the interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch


class Meter:
    """Counts the bytes of the tensors in `watched` that are loaded and stored."""

    def __init__(self) -> None:
        self.watched: list[torch.Tensor] = []
        self.moved = 0

    def count(self, addresses: np.ndarray, valid: np.ndarray, itemsize: int) -> None:
        at = addresses[np.broadcast_to(valid, addresses.shape)].astype(np.int64)
        for t in self.watched:
            start = t.data_ptr()
            self.moved += itemsize * int(((at >= start) & (at < start + t.numel() * t.element_size())).sum())

    def take(self) -> int:
        """The bytes since the last call."""
        moved, self.moved = self.moved, 0
        return moved


@contextlib.contextmanager
def metered() -> Iterator[Meter]:
    """Within this context the interpreter's accesses are counted."""
    from triton.runtime.interpreter import InterpreterBuilder

    made = Meter()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def size(pointer: object) -> int:
        return pointer.get_element_ty().primitive_bitwidth // 8

    def metered_load(self: object, pointer, mask, *rest, **named):  # type: ignore[no-untyped-def]
        made.count(pointer.data, mask.data, size(pointer))
        return load(self, pointer, mask, *rest, **named)

    def metered_store(self: object, pointer, value, mask, *rest, **named):  # type: ignore[no-untyped-def]
        made.count(pointer.data, mask.data, size(pointer))
        return store(self, pointer, value, mask, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", metered_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", metered_store)
        yield made
