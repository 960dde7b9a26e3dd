"""Files that cannot be read: each is named once, and too many of them end the run."""

from __future__ import annotations

import math
import warnings

from .data import Batch
from .images import DataError, DataWarning

FEW = 1000  # images that are read before a share of them counts


class BadFiles:
    """The files that this rank could not read.

    The limit is checked while images are read: a drive that fails ends the run before an epoch of substitutes is over.

    Args:
        limit: largest share of the training or validation images that may be unreadable.
        images: of this rank, for training and for validation.
    """

    def __init__(self, limit: float, images: dict[bool, int]):
        self.limit, self.images = limit, images
        #: of earlier parts of the run, too
        self.names: set[str] = set()
        self.read, self.found = {True: 0, False: 0}, {True: 0, False: 0}

    def report(self, batch: Batch, training: bool) -> None:
        """Call it with every batch.

        Raises:
            DataError: the share of unreadable files is over the limit.
        """
        self.read[training] += len(batch.images)
        instead = "the next image takes its place" if training else "left out of the accuracy"
        for name, why in batch.bad:
            if name in self.names:
                continue
            self.names.add(name)
            self.found[training] += 1
            warnings.warn(f"cannot read {name}: {why}; {instead}", DataWarning, stacklevel=2)
            among = min(max(self.read[training], FEW), self.images[training])
            if self.found[training] > math.ceil(self.limit * among):
                raise DataError(
                    f"{self.found[training]} of the first {among} {'training' if training else 'validation'} images "
                    f"cannot be read, the last for: {why}; --max-bad-files {self.limit:g} is the share that is accepted"
                )
