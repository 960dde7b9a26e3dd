"""A batch whose loss is not finite: found without waiting for the device, and kept in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .step import Batches


class BadBatch:
    """Keeps the first batches whose step had a loss that is not finite, on the device.

    Args:
        every_step: the host looks after each step, and no copy on the device is needed.
    """

    def __init__(self, every_step: bool):
        self.every_step = every_step
        self.batches: list[tuple[Tensor, Tensor]] = []
        self._step: Tensor | None = None
        self._loss: Tensor | None = None

    @torch.no_grad()
    def look(self, step: int, batches: Batches, loss: Tensor) -> None:
        """Call it after each step, with the loss of this rank."""
        if self.every_step:
            self.batches, self._step, self._loss = list(batches), torch.tensor(step), loss
            return
        if self._step is None or self._loss is None:
            self.batches = [(images.clone(), labels.clone()) for images, labels in batches]
            self._step, self._loss = torch.full((), step, device=loss.device), loss.clone()
            return
        first = torch.isfinite(self._loss)  # nothing is kept for good yet
        for kept, new in zip(self.batches, batches, strict=True):
            for mine, theirs in zip(kept, new, strict=True):
                torch.where(first, theirs, mine, out=mine)
        self._step.copy_(torch.where(first, step, self._step))
        self._loss.copy_(torch.where(first, loss, self._loss))

    @property
    def step(self) -> int:
        """The step of the batch. Waits for the device."""
        return -1 if self._step is None else int(self._step)

    @property
    def mine(self) -> bool:
        """Whether the loss of this rank was not finite. Waits for the device."""
        return self._loss is not None and not bool(torch.isfinite(self._loss))

    def save(self, path: Path, **more: Any) -> None:
        """Writes the batch for ``torch.load(path, weights_only=True)``.

        Args:
            more: further entries, such as the state of the model.
        """
        state = {
            "step": self.step,
            "loss": float("nan") if self._loss is None else self._loss.item(),
            "images": [images.cpu() for images, _ in self.batches],
            "labels": [labels.cpu() for _, labels in self.batches],
            **more,
        }
        path.parent.mkdir(parents=True, exist_ok=True)  # on other machines than that of rank 0, nothing has made it
        checkpoint.save(path, state)
