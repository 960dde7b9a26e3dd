"""Two processes for tests of process groups: they start once, and each call has a gloo group of its own."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 120.0  # seconds of a call


def _serve(rank: int, calls: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, arguments, meeting, seed = calls.recv()
        except EOFError:
            # a gloo thread that still holds a tensor would abort when it takes the GIL of a finished interpreter
            os._exit(0)
        try:
            options: dict[str, Any] = {"rank": rank, "world_size": 2, "timeout": timedelta(seconds=LIMIT / 2)}
            dist.init_process_group("gloo", init_method=f"file://{meeting}", **options)
            torch.manual_seed(seed)
            result = function(*arguments)
            dist.barrier()  # neither rank ends gloo while the other still uses it
            dist.destroy_process_group()
            calls.send(("", result))
        except BaseException:
            calls.send((traceback.format_exc(), None))
            os._exit(1)  # the other rank may wait for this one


class Ranks:
    """The two processes; after an error they are started again."""

    def __init__(self) -> None:
        self._running: list[tuple[Any, Connection]] = []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        for rank in range(2):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there), daemon=True)
            process.start()
            there.close()
            self._running.append((process, here))

    def stop(self) -> None:
        """Ends both processes."""
        for process, calls in self._running:
            calls.close()
            process.join(5)
            process.kill()
        self._running.clear()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Calls function(*arguments) on both ranks; returns what they return, rank by rank.

        The function is one of a module, the arguments can be pickled, and both ranks have the seed of this process.
        """
        if not self._running:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            for _, calls in self._running:
                calls.send((function, arguments, f"{folder}/meeting", torch.initial_seed() % 2**31))
            replies: dict[Any, tuple[str, Any]] = {}
            left = [calls for _, calls in self._running]
            failed = False
            while left and not failed:
                ready = wait(left, LIMIT)
                if not ready:
                    replies.update((calls, ("no answer in time", None)) for calls in left)
                for calls in ready:
                    try:
                        replies[calls] = calls.recv()  # type: ignore[union-attr]
                    except EOFError:
                        replies[calls] = "the process ended", None
                    left.remove(calls)  # type: ignore[arg-type]
                failed = any(error for error, _ in replies.values())
            results = [replies.get(calls, ("", None)) for _, calls in self._running]
        if failed:
            self.stop()
            raise AssertionError("\n".join(f"rank {i}: {error}" for i, (error, _) in enumerate(results) if error))
        return [result for _, result in results]
