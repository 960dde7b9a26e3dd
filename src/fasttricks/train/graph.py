"""A training step as one CUDA graph: the host launches it with one call, and not each kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..optim.base import FusedOptimizer
from .step import Batches, Step

# steps before the capture: libraries choose their algorithms, and the optimizer makes its state
WARMUP = 3


def unsupported(device: torch.device, ranks: int, optimizer: torch.optim.Optimizer) -> str | None:
    """Why a step cannot be captured, or None."""
    if device.type != "cuda":
        return f"it needs CUDA, the run is on {device.type}"
    if ranks > 1:
        return "it is for one process, and DistributedDataParallel is for several"
    if not isinstance(optimizer, FusedOptimizer):
        return f"{type(optimizer).__name__} reads its learning rate on the host; --fused has one on the device"
    return None


class Recorder(Protocol):
    """What :class:`GraphedStep` needs of CUDA."""

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """Runs a step before the capture and returns its result."""

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Records ``run`` without executing it; returns the replay, and the tensors that each replay refills."""


class CUDARecorder:
    """torch.cuda.graph."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def warm_up(self, run: Callable[[], Any]) -> Any:
        # on a stream of its own, as the capture: see torch.cuda.graph
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = run()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        # other threads, such as that which pins memory, may call CUDA meanwhile
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result


class GraphedStep:
    """Runs ``step`` a few times, then captures it and replays the capture.

    If the capture fails, the model does something that a graph cannot hold, such as reading a value on the host: the
    reason is printed, and all steps run eagerly.

    Args:
        say: prints a sentence.
    """

    def __init__(self, step: Step, recorder: Recorder, say: Callable[[str], None]):
        self.step, self.recorder, self.say = step, recorder, say
        self.done = 0
        self.failed = False
        self._replay: Callable[[], None] | None = None
        self._inputs: list[tuple[Tensor, Tensor]] = []
        self._result: tuple[Tensor, Tensor] | None = None

    @property
    def captured(self) -> bool:
        return self._replay is not None

    def __call__(self, batches: Batches) -> tuple[Tensor, Tensor]:
        """As :meth:`Step.__call__`. The next call overwrites the result."""
        if self.failed:
            return self.step(batches)
        if self.done < WARMUP:
            self.done += 1
            return self.recorder.warm_up(lambda: self.step(batches))
        if self._replay is None and not self._capture(batches):
            return self.step(batches)
        assert self._replay is not None
        assert self._result is not None
        for (images, labels), (new_images, new_labels) in zip(self._inputs, batches, strict=True):
            images.copy_(new_images, non_blocking=True)
            labels.copy_(new_labels, non_blocking=True)
        self._refresh_rates()
        self._replay()
        if self.step.average is not None:
            self.step.average.steps += 1
        return self._result

    def _capture(self, batches: Batches) -> bool:
        average = self.step.average
        steps = average.steps if average is not None else 0
        mark, self.step.mark = self.step.mark, lambda part: None  # no timing within a graph
        self._inputs = [(images.clone(), labels.clone()) for images, labels in batches]
        self._refresh_rates()
        try:
            self._replay, self._result = self.recorder.capture(lambda: self.step(self._inputs))
        except RuntimeError as error:
            self.failed = True
            self.step.forget()
            self.say(f"no CUDA graph: the step cannot be captured: {str(error).splitlines()[0]}")
        finally:
            self.step.mark = mark
            if average is not None:
                average.steps = steps  # the capture ran nothing
        return not self.failed

    def _refresh_rates(self) -> None:
        """Writes the learning rates to the device tensors that the graph reads."""
        optimizer = self.step.optimizer
        assert isinstance(optimizer, FusedOptimizer)
        for index, group in enumerate(optimizer.param_groups):
            for device in {p.device for p in group["params"]}:
                optimizer._rate(index, group, device)
