"""Batches for the trainer, of an ImageFolder tree, of a packed one, or of the digits of scikit-learn.

DIR/train/CLASS/*.png ...        DIR/val/CLASS/*.png ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from .augment import Augment, train_transform, val_transform
from .digits import digits_folder
from .images import DataError, Images, Sample, Samples
from .pack import INDEX, PackedImages


class Batch(NamedTuple):
    """images (N, 3, H, W) uint8, the shifts of their colours (N, 3) float32, labels (N,) int64, and the files that
    could not be read, (name, why)."""

    images: Tensor
    shift: Tensor | None
    labels: Tensor
    bad: list[tuple[str, str]]


def collate(samples: list[Sample]) -> Batch:
    """Stacks the samples that could be read (possibly none of them)."""
    good = [(s.image, s.label) for s in samples if s.image is not None]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    shifts = [s.shift for s in samples if s.shift is not None]
    labels = torch.tensor([label for _, label in good], dtype=torch.int64)
    return Batch(images, torch.stack(shifts) if shifts else None, labels, [file for s in samples for file in s.bad])


class TrainSampler(DistributedSampler):
    """This rank's share of a permutation drawn from (seed, epoch); yields (index, epoch). Call ``set_epoch`` first."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in super().__iter__():
            yield index, self.epoch


class ValSampler(Sampler):
    """Every ``world``-th image from ``rank``: all ranks together see each image exactly once."""

    def __init__(self, size: int, rank: int, world: int):
        self.indices = range(rank, size, world)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter((index, 0) for index in self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def open_data(data: str, data_dir: Path | None, *, augment: Augment, size: int, seed: int) -> tuple[Samples, Samples]:
    """The training and the validation set of ``data``: "digits", or a directory with train/ and val/ inside, or what
    `fasttricks pack` made of it.

    Raises:
        DataError: see :class:`Images`.
    """
    root = digits_folder(data_dir) if data == "digits" else Path(data)
    if not root.is_dir():
        raise DataError(f"--data {data}: no such directory; give 'digits' or a directory with train/ and val/ inside")
    kind = PackedImages if (root / INDEX).exists() else Images
    for part in ("train", "val"):
        if kind is Images and not (root / part).is_dir():
            raise DataError(
                f"--data {data}: {root / part} is missing; expected {root}/train/CLASS/*.jpg and {root}/val/CLASS/*.jpg"
            )
    noise = augment == "imagenet"
    train = kind(root / "train", train_transform(augment, size), substitute=True, noise=noise, seed=seed)
    val = kind(root / "val", val_transform(augment, size), classes=train.classes, substitute=False, seed=seed)
    return train, val


def loader(dataset: Dataset, sampler: Sampler, batch: int, *, workers: int, drop_last: bool, pin: bool) -> DataLoader:
    """Batches of ``batch`` images per rank; workers live through the run."""
    return DataLoader(
        dataset,
        batch_size=batch,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        drop_last=drop_last,
        pin_memory=pin,
        persistent_workers=workers > 0,
    )


@contextlib.contextmanager
def worker_deaths_explained() -> Iterator[None]:
    """Turns torch's error about a worker that died, which its signal handler raises anywhere, into a `DataError`, and
    a `DataError` of a worker, which torch wraps in a traceback, into one sentence."""
    try:
        yield
    except DataError as error:
        message = str(error)
        if "DataLoader worker process" not in message:
            raise
        raise DataError(message.rstrip().rpartition(f"{DataError.__module__}.{DataError.__name__}: ")[2]) from error
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise DataError(
            f"a worker that reads images died ({str(error).split('. ')[0]}), as when memory or shared memory runs out; "
            "give --workers 0, fewer --workers, or a larger /dev/shm (docker run --shm-size=8g)"
        ) from error
