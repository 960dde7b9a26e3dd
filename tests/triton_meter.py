"""Counts the launches of Triton kernels, and the bytes that they load and store in the interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch


class Meter:
    """Counts since the last take(). Within one access each address counts once."""

    def __init__(self) -> None:
        self.launches = 0
        self._accesses: list[tuple[np.ndarray, int]] = []
        # tensors of a launch stay alive until take(), so that their memory is not reused
        self._alive: list[Any] = []

    def launched(self, arguments: dict[str, Any]) -> None:
        self.launches += 1
        self._alive.append(arguments)

    def accessed(self, addresses: np.ndarray, valid: np.ndarray, itemsize: int) -> None:
        self._accesses.append((np.unique(addresses[np.broadcast_to(valid, addresses.shape)]), itemsize))

    def arguments(self) -> list[torch.Tensor]:
        """The tensors that launches had since the last take()."""
        return [t for launched in self._alive for t in launched.values() if isinstance(t, torch.Tensor)]

    def take(self, *tensors: torch.Tensor) -> tuple[int, int, int]:
        """Returns (bytes of these tensors, bytes of all others, launches), and resets the counts."""
        of_these = total = 0
        spans = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
        for addresses, itemsize in self._accesses:
            total += itemsize * addresses.size
            for start, end in spans:
                of_these += itemsize * int(np.diff(np.searchsorted(addresses, np.array([start, end], np.uint64)))[0])
        launches = self.launches
        self.launches, self._accesses, self._alive = 0, [], []
        return of_these, total - of_these, launches


@contextlib.contextmanager
def metered() -> Iterator[Meter]:
    """Context manager that counts the accesses of the interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    from fasttricks.kernels import launch as launching

    meter = Meter()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    launch = launching.launch

    def size(pointer: Any) -> int:
        return pointer.get_element_ty().primitive_bitwidth // 8

    def metered_load(self: object, pointer: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        meter.accessed(pointer.data, mask.data, size(pointer))
        return load(self, pointer, mask, *rest, **named)

    def metered_store(self: object, pointer: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        meter.accessed(pointer.data, mask.data, size(pointer))
        return store(self, pointer, value, mask, *rest, **named)

    def metered_launch(kernel: Any, grid: Any, arguments: dict[str, Any], *rest: Any) -> None:
        meter.launched(arguments)
        launch(kernel, grid, arguments, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", metered_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", metered_store)
        patch.setattr(launching, "launch", metered_launch)
        yield meter
