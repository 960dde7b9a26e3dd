"""SIGINT and SIGTERM during training: the current step ends, and a checkpoint is written."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from .distributed import World

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """A context that records SIGINT and SIGTERM. A second signal acts as it would without the context.

    Outside the main thread, where Python handles no signals, it records nothing.
    """

    def __init__(self, world: World):
        self._received = 0
        self._before: dict[int, Any] = {}
        # The ranks are at different steps when signals arrive. They agree over gloo, on the host, one step later, so
        # that no rank waits for another.
        self._group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self._sent: tuple[torch.Tensor, Any] | None = None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._record) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if not self._received:
            self._received = number
            return
        signal.signal(number, self._before[number])
        signal.raise_signal(number)

    def requested(self) -> int:
        """The signal to stop for, or 0; the same on all ranks, which must call it equally often."""
        if self._group is None:
            return self._received
        agreed = 0
        if self._sent is not None:
            value, work = self._sent
            work.wait()
            agreed = int(value)
        value = torch.tensor(self._received)
        self._sent = value, dist.all_reduce(value, dist.ReduceOp.MAX, self._group, async_op=True)
        return agreed


def leave_signals_to_the_trainer(worker: int) -> None:
    """For DataLoader(worker_init_fn=...): Ctrl-C reaches data workers too, which must live until the step has ended."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
