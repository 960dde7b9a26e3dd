"""Batches on the device that trains, ready before they are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")
DEPTH = 2  # batches that are on their way while one is used


def prefetched(batches: Iterable[T], receive: Callable[[T], Any], device: torch.device) -> Iterator[Any]:
    """receive(batch) of each batch, in order. On CUDA it runs on a stream of its own, two batches ahead.

    ``receive`` copies a batch to the device and normalises it; it must not wait for the device. On a CPU nothing runs
    ahead: there is no second device to do it.
    """
    if device.type != "cuda":
        yield from map(receive, batches)
        return
    stream = torch.cuda.Stream(device)
    ready: deque[tuple[Any, torch.cuda.Event]] = deque()

    def start(batch: T) -> None:
        with torch.cuda.stream(stream):
            received, event = receive(batch), torch.cuda.Event()
            event.record(stream)
        ready.append((received, event))

    def take() -> Any:
        received, event = ready.popleft()
        current = torch.cuda.current_stream(device)
        current.wait_event(event)
        for tensor in received:
            tensor.record_stream(current)  # its memory is not used again before the step has read it
        return received

    for batch in batches:
        start(batch)
        if len(ready) > DEPTH:
            yield take()
    while ready:
        yield take()
