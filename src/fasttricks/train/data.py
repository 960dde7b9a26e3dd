"""Images for the trainer: an ImageFolder tree, or the digits of scikit-learn written as one.

    DIR/train/CLASS/*.png ...        DIR/val/CLASS/*.png ...

Every sample is augmented from a seed of its own, made of (seed, epoch, index): what the network sees depends neither on
the number of workers nor on whether the run was interrupted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

# Mean and standard deviation of ImageNet's channels, and the eigenvectors and eigenvalues of their covariance
# (Krizhevsky et al. 2012, section 4.1; the figures every ImageNet trainer uses), for images scaled to 0..1.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PCA_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
PCA_VALUES = (0.2175, 0.0188, 0.0045)

Augment = Literal["imagenet", "digits"]


class DataWarning(UserWarning):
    """Files that were left out, by name."""


class DataError(RuntimeError):
    """The images cannot be used as they are; the message says which and why."""


class PCANoise(torch.nn.Module):
    """Adds sum_k N(0, std) * value_k * vector_k to the colours of an image (3, H, W) in 0..1 (Krizhevsky 2012)."""

    def __init__(self, std: float = 0.1):
        super().__init__()
        self.std = std
        self.vectors, self.values = torch.tensor(PCA_VECTORS), torch.tensor(PCA_VALUES)

    def forward(self, image: Tensor) -> Tensor:
        noise = torch.randn(3) * self.std
        return image + (self.vectors @ (noise * self.values))[:, None, None]


class ScaleHSV(torch.nn.Module):
    """Multiplies hue, saturation and value of a PIL image by a factor each, drawn uniformly from [low, high].

    Hue is an angle and wraps around; saturation and value stop at their largest value. Computed by Pillow in 8 bits.
    """

    def __init__(self, low: float, high: float):
        super().__init__()
        self.low, self.high = low, high

    def forward(self, image: Image.Image) -> Image.Image:
        factors = torch.empty(3).uniform_(self.low, self.high)
        scaled = torch.arange(256) * factors[:, None]
        tables = torch.cat([scaled[:1].round().remainder(256), scaled[1:].round().clamp(max=255)])
        return image.convert("HSV").point(tables.flatten().int().tolist()).convert("RGB")


def train_transform(augment: Augment, size: int) -> v2.Compose:
    """PIL image -> normalised float tensor (3, size, size), augmented.

    "imagenet" is section 2.1 of He et al. 2018: a random crop of 8 to 100% of the area, aspect 3/4 to 4/3, a flip,
    hue, saturation and brightness times 0.6 to 1.4, and PCA noise of std 0.1. "digits" never flips: it turns by up
    to 10 degrees, shifts and scales by up to a tenth.
    """
    if augment == "imagenet":
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), antialias=True),
                v2.RandomHorizontalFlip(),
                ScaleHSV(0.6, 1.4),
                *_to_tensor(),
                PCANoise(0.1),
                v2.Normalize(MEAN, STD),
            ]
        )
    return v2.Compose(
        [
            v2.Resize((size, size), antialias=True),
            v2.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR),
            *_to_tensor(),
            v2.Normalize(MEAN, STD),
        ]
    )


def val_transform(augment: Augment, size: int) -> v2.Compose:
    """PIL image -> normalised float tensor (3, size, size): the shorter edge to 256/224 of size and the centre of it
    ("imagenet"), or the whole image ("digits")."""
    if augment == "imagenet":
        resize = [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)]
    else:
        resize = [v2.Resize((size, size), antialias=True)]
    return v2.Compose([*resize, *_to_tensor(), v2.Normalize(MEAN, STD)])


def _to_tensor() -> list[torch.nn.Module]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]


def load_rgb(path: str) -> Image.Image:
    """Read an image file as 8-bit RGB. Alpha is dropped; 16-bit grey is scaled to 8 bits (Pillow alone would clip it).

    Raises:
        OSError, ValueError, SyntaxError: the file is not an image, is truncated, or its values have no known range.
    """
    with Image.open(path) as image:
        image.load()
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
            grey = np.asarray(image, dtype=np.float64)
            return Image.fromarray(np.round(grey / 257.0).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError(f"32-bit pixels (mode {image.mode}) have no known range")
        if image.mode == "P" and "transparency" in image.info:
            return image.convert("RGBA").convert("RGB")
        return image.convert("RGB")


# What Pillow raises on damaged files: UnidentifiedImageError and truncation are OSError, broken PNG chunks SyntaxError,
# bad headers ValueError, and a header of absurd size DecompressionBombError.
BAD_FILE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


class Sample(NamedTuple):
    """One image, or None if the file could not be read, and the files that could not be read on the way."""

    image: Tensor | None
    label: int
    bad: list[str]


class Images(ImageFolder):
    """An ImageFolder whose samples carry their own seeds, and which tolerates bad files.

    Hidden files and folders are ignored. Files that are no images by name are counted and named in a warning. A file
    that cannot be read is replaced by the next readable one (training, so that every rank has as many batches) or left
    out (validation, so that accuracy is over real images only); its path travels with the sample.

    Args:
        root: a folder with one folder per class.
        transform: PIL image -> tensor.
        classes: names of the classes in order; None takes the folders of ``root``.
        substitute: replace a bad file by the next good one.
        seed: base of the samples' seeds.

    Raises:
        DataError: ``root`` is missing or not a directory, holds no class, an empty class or one not in ``classes``, or
            no file of it can be read.
    """

    def __init__(
        self, root: Path, transform: v2.Compose, *, classes: Sequence[str] | None = None, substitute: bool, seed: int
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
        self.substitute, self.seed = substitute, seed
        counts = np.bincount(self.targets, minlength=len(self.classes))
        empty = [name for name, count in zip(self.classes, counts, strict=True) if not count and (root / name).is_dir()]
        if empty:
            raise DataError(
                f"{root}: no image in the class folder{'s' if len(empty) > 1 else ''} {_few(empty)}; "
                f"accepted are {' '.join(IMG_EXTENSIONS)}"
            )
        absent = [name for name in self.classes if not (root / name).is_dir()]
        if absent:
            warnings.warn(
                f"{root}: no folder for {len(absent)} of {len(self.classes)} classes ({_few(absent)}): "
                "the accuracy is over the others",
                DataWarning,
                stacklevel=2,
            )
        if self.strays:
            warnings.warn(
                f"{root}: skipped {len(self.strays)} file{'s' if len(self.strays) > 1 else ''} that "
                f"are no images by name: {_few(self.strays)}",
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
                    f"{directory}: class folder{'s' if len(unknown) > 1 else ''} {_few(unknown)} "
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

    def _check_one_is_readable(self) -> None:
        first = ""
        for path, _ in self.samples:
            try:
                load_rgb(path)
                return
            except BAD_FILE as error:
                first = first or f"{path}: {error}"
        raise DataError(f"{self.root}: none of the {len(self.samples)} image files can be read; the first is {first}")

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, epoch = key
        bad: list[str] = []
        for step in range(len(self.samples) if self.substitute else 1):
            path, label = self.samples[(index + step) % len(self.samples)]
            try:
                image = load_rgb(path)
            except BAD_FILE as error:
                bad.append(f"{path}: {type(error).__name__}: {error}")
                continue
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(_mix(self.seed, epoch, index))
                return Sample(self.transform(image), label, bad)
        if self.substitute:
            raise DataError(f"{self.root}: no image file can be read any more; the first is {bad[0]}")
        return Sample(None, 0, bad)


def _mix(*numbers: int) -> int:
    """One 64-bit seed of several numbers, through numpy's SeedSequence."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _few(names: Sequence[str], most: int = 5) -> str:
    more = len(names) - most
    return ", ".join(str(name) for name in names[:most]) + (f" and {more} more" if more > 0 else "")


class Batch(NamedTuple):
    """images (N, 3, H, W) float32, labels (N,) int64, and the files that could not be read, "PATH: why"."""

    images: Tensor
    labels: Tensor
    bad: list[str]


def collate(samples: list[Sample]) -> Batch:
    """Stack the samples that could be read (possibly none of them)."""
    good = [s.image for s in samples if s.image is not None]
    labels = torch.tensor([s.label for s in samples if s.image is not None], dtype=torch.int64)
    images = torch.stack(good) if good else torch.empty(0, 3, 1, 1)
    return Batch(images, labels, [path for s in samples for path in s.bad])


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


def open_data(data: str, data_dir: Path | None, *, augment: Augment, size: int, seed: int) -> tuple[Images, Images]:
    """The training and the validation set of ``data``: "digits", or a directory with train/ and val/ inside.

    Raises:
        DataError: see :class:`Images`.
    """
    root = digits_folder(data_dir) if data == "digits" else Path(data)
    if not root.is_dir():
        raise DataError(f"--data {data}: no such directory; give 'digits' or a directory with train/ and val/ inside")
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise DataError(
                f"--data {data}: {root / part} is missing; expected {root}/train/CLASS/*.jpg and {root}/val/CLASS/*.jpg"
            )
    train = Images(root / "train", train_transform(augment, size), substitute=True, seed=seed)
    val = Images(root / "val", val_transform(augment, size), classes=train.classes, substitute=False, seed=seed)
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
    """Turns torch's error about a worker that died, which its signal handler raises anywhere, into a `DataError`."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise DataError(
            f"a worker that reads images died ({str(error).split('. ')[0]}), as when memory or shared memory runs out; "
            "give --workers 0, fewer --workers, or a larger /dev/shm (docker run --shm-size=8g)"
        ) from error


def cache_dir() -> Path:
    """Where ``digits`` is written when no --data-dir is given."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasttricks"


def digits_folder(data_dir: Path | None = None) -> Path:
    """The 1,797 scanned digits of scikit-learn (8x8 pixels, 17 grey levels; Alpaydin and Kaynak 1998, UCI) as PNG files
    in an ImageFolder tree, written on the first call: a stratified fifth, drawn with a fixed seed, is val/.

    Returns:
        DATA_DIR/digits, or the same under the user's cache directory.
    """
    root = (data_dir or cache_dir()) / "digits"
    if root.is_dir():
        return root
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("--data digits needs scikit-learn: pip install 'fasttricks[train]'") from error
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    train, val = train_test_split(np.arange(len(pixels)), test_size=0.2, stratify=digits.target, random_state=0)
    root.parent.mkdir(parents=True, exist_ok=True)
    # Written under another name and renamed: a folder of the final name is complete.
    draft = Path(tempfile.mkdtemp(prefix=".digits-", dir=root.parent))
    try:
        draft.chmod(0o755)
        for part, indices in (("train", train), ("val", val)):
            for i in sorted(indices):
                folder = draft / part / str(digits.target[i])
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[i]).save(folder / f"{i:04d}.png")
        try:
            draft.rename(root)
        except OSError:
            if not root.is_dir():  # another process was first: its folder is as good
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return root
