"""One training step: forward, backward and update, without waiting for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import optim
from ..optim.base import FusedOptimizer
from .average import Average
from .objective import logits_of

Batches = Sequence[tuple[Tensor, Tensor]]


def _no_mark(part: str) -> None:
    pass


class Step:
    """One update of the weights by the mean gradient of one or more batches.

    After a loss that is not finite, fused optimizers update nothing more: the weights stay as they were before that
    step until the host looks at :attr:`broken`.

    Args:
        model: a module, or a compiled one, in training mode; DistributedDataParallel sums its gradients once per step.
        criterion: (outputs, labels, teacher's logits or None) -> mean loss of the batch.
        scaler: of the loss, for fp16.
        average: updated after the weights.
        ranks: whether ``model`` is a DistributedDataParallel, possibly compiled.
    """

    def __init__(
        self,
        model: Any,
        criterion: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        scaler: optim.LossScaler | None = None,
        teacher: nn.Module | None = None,
        average: Average | None = None,
        ranks: bool = False,
        device: torch.device,
    ):
        self.model, self.criterion, self.optimizer = model, criterion, optimizer
        self.scaler, self.teacher, self.average, self.ranks = scaler, teacher, average, ranks
        #: fp32, one element: 1 after a loss that was not finite on any rank
        self.broken = torch.zeros((), device=device)
        #: called with the name of each part that has ended
        self.mark: Callable[[str], None] = _no_mark

    def __call__(self, batches: Batches) -> tuple[Tensor, Tensor]:
        """Returns the mean loss in fp32 and the number of correct predictions."""
        result = self.gradients(batches)
        self.update()
        return result

    def gradients(self, batches: Batches) -> tuple[Tensor, Tensor]:
        """The first half of a step: the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        losses, hits = [], []
        for i, (images, labels) in enumerate(batches, 1):
            with self._unsynchronised(i < len(batches)):
                outputs = self.model(images)
                taught = None
                if self.teacher is not None:
                    with torch.no_grad():
                        taught = self.teacher(images)
                loss = self.criterion(outputs, labels, taught)
                self.mark("forward")
                self._backward(loss / len(batches) if len(batches) > 1 else loss)
                self.mark("backward")
            losses.append(loss.detach())
            classes = labels if labels.ndim == 1 else labels.argmax(1)
            hits.append((logits_of(outputs).detach().argmax(1) == classes).sum())
        mean = torch.stack(losses).mean() if len(losses) > 1 else losses[0]
        return mean, torch.stack(hits).sum() if len(hits) > 1 else hits[0]

    def _backward(self, loss: Tensor) -> None:
        found = (~torch.isfinite(loss.detach())).to(self.broken.dtype)
        if self.ranks:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        torch.maximum(self.broken, found, out=self.broken)
        if self.scaler is None:
            loss.backward()
            return
        # a gradient that is not finite makes the scaler skip the step
        self.scaler.scale(loss * torch.where(self.broken > 0, torch.nan, 1.0)).backward()

    def _unsynchronised(self, apart: bool) -> contextlib.AbstractContextManager[Any]:
        return self.model.no_sync() if apart and self.ranks else contextlib.nullcontext()

    def update(self) -> None:
        """The second half of a step: the weights and their average."""
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif isinstance(self.optimizer, FusedOptimizer):
            with self.optimizer.scaled(None, self.broken, check=False):
                self.optimizer.step()
        else:
            self.optimizer.step()
        if self.average is not None:
            self.average.update()
        self.mark("optimizer")

    def forget(self) -> None:
        """Discards a step that failed halfway."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler is not None:
            self.scaler._stages = {}
