"""Learning-rate factors for torch.optim.lr_scheduler.LambdaLR: linear warm-up, then steps or half a cosine.

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(warmup_steps, total_steps))

One step is one call of scheduler.step(), normally after every batch; for one call after every epoch, give the counts in
epochs. The objects pickle, and compare by value. LambdaLR does not load the state of other schedulers
(KeyError: 'lr_lambdas'): give it their epoch as last_epoch.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


def _warmup(step: int, warmup_steps: int) -> float:
    return (step + 1) / warmup_steps


@dataclass(frozen=True)
class warmup_cosine:
    """(step + 1) / warmup_steps during the warm-up, then half a cosine from 1 to min_factor at total_steps.

        factor = min_factor + (1 - min_factor) * (1 + cos(pi * t / T)) / 2
        t = step - warmup_steps, T = total_steps - warmup_steps

    He et al. 2019, "Bag of Tricks", sections 3.1 and 5.1. From total_steps on the factor is min_factor. Both counts are
    in calls of scheduler.step(): batches, or epochs if that is called once per epoch.

    Raises:
        ValueError: not 0 <= warmup_steps <= total_steps, or min_factor is outside [0, 1].

    Examples:
        >>> factor = fasttricks.optim.warmup_cosine(warmup_steps=2, total_steps=10)
        >>> [round(factor(step), 3) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    warmup_steps: int
    total_steps: int
    min_factor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} and total_steps {self.total_steps}; "
                "accepted: 0 <= warmup_steps <= total_steps"
            )
        if not 0 <= self.min_factor <= 1:
            raise ValueError(f"min_factor is {self.min_factor}; accepted: 0 to 1")

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return _warmup(step, self.warmup_steps)
        if step >= self.total_steps:
            return self.min_factor
        t = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.min_factor + (1 - self.min_factor) * 0.5 * (1 + math.cos(math.pi * t))


@dataclass(frozen=True)
class warmup_step:
    """(step + 1) / warmup_steps during the warm-up, then gamma ** (how many milestones have been reached).

    Milestones are in steps from the start, the warm-up included.

    Raises:
        ValueError: warmup_steps is negative, milestones do not ascend, or gamma is not above 0 and finite.

    Examples:
        >>> factor = fasttricks.optim.warmup_step(warmup_steps=2, milestones=(30, 60))
        >>> [round(factor(step), 3) for step in (0, 1, 29, 30, 60)]
        [0.5, 1.0, 1.0, 0.1, 0.01]
    """

    warmup_steps: int
    milestones: Sequence[int]
    gamma: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; accepted: at least 0")
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones are {self.milestones}; accepted: ascending steps")
        if not (math.isfinite(self.gamma) and self.gamma > 0):
            raise ValueError(f"gamma is {self.gamma}; accepted: a finite number above 0")

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return _warmup(step, self.warmup_steps)
        return self.gamma ** bisect_right(self.milestones, step)
