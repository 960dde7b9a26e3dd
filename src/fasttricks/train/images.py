"""Samples of images: from an ImageFolder tree, and what all sources of samples have in common.

Every sample is augmented from a seed of its own, made of (seed, epoch, index): what the network sees depends neither on
the number of workers nor on whether the run was interrupted.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from .augment import colour_noise
from .decode import BAD_FILE, decode_rgb


class DataWarning(UserWarning):
    """Files that were left out, by name."""


class DataError(RuntimeError):
    """The images cannot be used as they are; the message says which and why."""


class Sample(NamedTuple):
    """One image as uint8 (3, H, W), or None if the file could not be read; the shift of its colours; and the files that
    could not be read on the way, (name, why)."""

    image: Tensor | None
    shift: Tensor | None
    label: int
    bad: list[tuple[str, str]]


class Samples(Dataset):
    """Samples with their own seeds, of a source that may hold bad files.

    A file that cannot be read is replaced by the next readable one (training, so that every rank has as many batches)
    or left out (validation, so that accuracy is over real images only); its name travels with the sample.

    Attributes:
        classes: names of the classes in order.
        transform: image -> uint8 tensor.
        substitute: replace a bad file by the next good one.
        noise: draw a shift of the colours for each image.
        seed: base of the samples' seeds.
    """

    classes: list[str]
    transform: Callable[[Any], Tensor]
    substitute: bool
    noise: bool
    seed: int

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What a message calls the file."""
        raise NotImplementedError

    def read(self, index: int) -> tuple[bytes, int]:
        """The file and its label.

        Raises:
            OSError: it cannot be read.
        """
        raise NotImplementedError

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, epoch = key
        bad: list[tuple[str, str]] = []
        for step in range(len(self) if self.substitute else 1):
            place = (index + step) % len(self)
            try:
                file, label = self.read(place)
                image = decode_rgb(file)
            except BAD_FILE as error:
                bad.append((self.name(place), f"{type(error).__name__}: {error}"))
                continue
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(_mix(self.seed, epoch, index))
                pixels = self.transform(image)
                return Sample(pixels, colour_noise() if self.noise else None, label, bad)
        if self.substitute:
            raise DataError(f"no image file can be read any more; the first is {': '.join(bad[0])}")
        return Sample(None, None, 0, bad)

    def _check_one_is_readable(self) -> None:
        first = ""
        for index in range(len(self)):
            try:
                decode_rgb(self.read(index)[0])
                return
            except BAD_FILE as error:
                first = first or f"{self.name(index)}: {error}"
        raise DataError(f"none of the {len(self)} image files can be read; the first is {first}")


class Images(Samples, ImageFolder):
    """The samples of an ImageFolder.

    Hidden files and folders are ignored. Files that are no images by name are counted and named in a warning.

    Args:
        root: a folder with one folder per class.
        transform: image -> uint8 tensor.
        classes: names of the classes in order; None takes the folders of ``root``.
        substitute, noise, seed: see `Samples`.

    Raises:
        DataError: ``root`` is missing or not a directory, holds no class, an empty class or one not in ``classes``, or
            no file of it can be read.
    """

    def __init__(
        self,
        root: Path,
        transform: v2.Compose,
        *,
        classes: Sequence[str] | None = None,
        substitute: bool,
        noise: bool = False,
        seed: int,
    ):
        if not root.is_dir():
            raise DataError(
                f"{root}: {'is not a directory' if root.exists() else 'no such directory'}; "
                "expected one folder per class inside it"
            )
        self._wanted = None if classes is None else list(classes)
        self.strays: list[str] = []
        try:
            super().__init__(str(root), transform=transform, is_valid_file=self._is_image, allow_empty=True)
        except FileNotFoundError as error:
            raise DataError(str(error)) from error
        self.substitute, self.noise, self.seed = substitute, noise, seed
        counts = np.bincount(self.targets, minlength=len(self.classes))
        empty = [name for name, count in zip(self.classes, counts, strict=True) if not count and (root / name).is_dir()]
        if empty:
            raise DataError(
                f"{root}: no image in the class folder{'s' if len(empty) > 1 else ''} {few(empty)}; "
                f"accepted are {' '.join(IMG_EXTENSIONS)}"
            )
        absent = [name for name in self.classes if not (root / name).is_dir()]
        if absent:
            warnings.warn(
                f"{root}: no folder for {len(absent)} of {len(self.classes)} classes ({few(absent)}): "
                "the accuracy is over the others",
                DataWarning,
                stacklevel=2,
            )
        if classes is None and len(self.classes) == 1:
            warnings.warn(
                f"{root}: one class only, {self.classes[0]}: nothing to tell apart; expected a folder for each class",
                DataWarning,
                stacklevel=2,
            )
        if self.strays:
            warnings.warn(
                f"{root}: skipped {len(self.strays)} file{'s' if len(self.strays) > 1 else ''} that "
                f"are no images by name: {few(self.strays)}",
                DataWarning,
                stacklevel=2,
            )
        self._check_one_is_readable()

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        folders = [entry.name for entry in os.scandir(directory) if entry.is_dir()]
        found = sorted(name for name in folders if not name.startswith("."))
        if not found:
            raise DataError(f"{directory}: no class folder in it; expected one folder per class")
        if self._wanted is not None:
            unknown = sorted(set(found) - set(self._wanted))
            if unknown:
                raise DataError(
                    f"{directory}: class folder{'s' if len(unknown) > 1 else ''} {few(unknown)} "
                    "not among the classes of the training set"
                )
            found = self._wanted
        return found, {name: i for i, name in enumerate(found)}

    def _is_image(self, path: str) -> bool:
        parts = Path(path).relative_to(self.root).parts
        if any(part.startswith(".") for part in parts):
            return False
        if path.lower().endswith(IMG_EXTENSIONS):
            return True
        self.strays.append(path)
        return False

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return self.samples[index][0]

    def read(self, index: int) -> tuple[bytes, int]:
        path, label = self.samples[index]
        return Path(path).read_bytes(), label


def _mix(*numbers: int) -> int:
    """One 64-bit seed of several numbers, through numpy's SeedSequence."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def few(names: Sequence[str], most: int = 5) -> str:
    more = len(names) - most
    return ", ".join(str(name) for name in names[:most]) + (f" and {more} more" if more > 0 else "")
