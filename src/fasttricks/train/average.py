"""The moving average of the weights."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn


class Average:
    """A copy of a model whose parameters and statistics are moving averages, in fp32 so that small changes add up.

        average = decay * average + (1 - decay) * model

    :meth:`update` does not wait for the device, unlike ``torch.optim.swa_utils.AveragedModel``.

    Args:
        model: the first update copies it.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module = copy.deepcopy(model).float().requires_grad_(False)
        self.model, self.decay, self.steps = model, decay, 0

    @functools.cached_property
    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(_tensors(self.module), _tensors(self.model), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Adds the current weights to the average."""
        floating = [(mine, new) for mine, new in self._pairs if mine.is_floating_point()]
        if self.steps:
            targets = [mine for mine, _ in floating]
            torch._foreach_lerp_(targets, [new.to(torch.float32) for _, new in floating], 1 - self.decay)
        for mine, new in self._pairs:
            if not self.steps or not mine.is_floating_point():
                mine.copy_(new)
        self.steps += 1


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
