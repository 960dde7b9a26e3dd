"""A sampler that starts in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DistributedSampler, Sampler


class PartialEpoch(Sampler):
    """The samples of another sampler from ``first`` on, at most ``count`` from the start of the epoch.

    Args:
        whole: the sampler of a whole epoch.
        count: samples per epoch.
    """

    def __init__(self, whole: DistributedSampler, count: int):
        self.whole, self.count, self.first = whole, count, 0

    def start(self, epoch: int, first: int) -> None:
        """The next iteration is over ``epoch``, from sample ``first`` on."""
        self.whole.set_epoch(epoch)
        self.first = first

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.whole), self.first, self.count)

    def __len__(self) -> int:
        return self.count
