"""Where the time of the training steps goes."""

from __future__ import annotations

import time

import torch

PARTS = ("data", "forward", "backward", "optimizer")


class Clock:
    """Seconds by part of a step. On CUDA the parts on the device are timed by events, which nothing waits for before
    :meth:`seconds`; the time for data is what the host waited for a batch."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.host = dict.fromkeys(PARTS, 0.0)
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.start()

    def start(self) -> None:
        """The next part begins now."""
        self.last = time.perf_counter()
        if self.cuda:
            self.last_event = torch.cuda.Event(enable_timing=True)
            self.last_event.record()

    def end(self, part: str) -> None:
        """``part`` ends now, and the next one begins."""
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
        """The sums so far; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
            for part, begun, ended in self.events:
                self.host[part] += begun.elapsed_time(ended) / 1000
            self.events.clear()
        return dict(self.host)
