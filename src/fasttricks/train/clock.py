"""Time of the parts of the training steps."""

from __future__ import annotations

import time

import torch

PARTS = ("data", "forward", "backward", "optimizer", "graph")  # graph: the last three in one CUDA graph


class Clock:
    """Sums the seconds of each part of a step.

    On CUDA, events time the parts that run on the device, and only :meth:`seconds` waits for them. "data" is the time
    that the host waits for batches."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.host = dict.fromkeys(PARTS, 0.0)
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.start()

    def start(self) -> None:
        """Starts the next part."""
        self.last = time.perf_counter()
        if self.cuda:
            self.last_event = torch.cuda.Event(enable_timing=True)
            self.last_event.record()

    def end(self, part: str) -> None:
        """Ends ``part`` and starts the next one."""
        begun, self.last = self.last, time.perf_counter()
        if not self.cuda or part == "data":
            self.host[part] += self.last - begun
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            if part != "data":
                self.events.append((part, self.last_event, event))
            self.last_event = event

    def seconds(self) -> dict[str, float]:
        """The sums so far. Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
            for part, begun, ended in self.events:
                self.host[part] += begun.elapsed_time(ended) / 1000
            self.events.clear()
        return dict(self.host)
