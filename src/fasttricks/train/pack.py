"""Images packed into a few large files: tar shards of WebDataset, with an index for reading in any order.

    OUT/index.json                      classes, and the shards of train and val
    OUT/train-000000.tar ...            NNNNNNNN.jpg (the file as it was), NNNNNNNN.json (its label and its path)
    OUT/train.npz, OUT/val.npz          shard, offset, size and label of every image

A file system answers a request for one of a million small files slowly, above all over a network. Any WebDataset
pipeline reads the shards; its readers shuffle what is in a buffer, so that the order depends on workers and shards.
Here an image is read at its offset: in the order that the folder would give.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.transforms import v2

from .images import DataError, Images, Samples

INDEX, FORMAT = "index.json", "fasttricks images 1"
MOST_OPEN = 256  # shards; systems allow a process about 1,000 open files


def pack(source: Path, out: Path, *, shard_bytes: int, overwrite: bool, done: Callable[[str, int, int], None]) -> None:
    """Packs an ImageFolder tree with train/ and val/. The folder ``out`` appears when it is complete.

    Args:
        shard_bytes: a shard is closed when it is at least as large.
        overwrite: replace ``out`` if it holds packed images.
        done: called as done("train" or "val", images packed, images in all).

    Raises:
        DataError: ``source`` is no such tree, ``out`` exists, or WebDataset is not installed.
        OSError: ``out`` cannot be written.
    """
    try:
        from webdataset import TarWriter
    except ImportError as error:
        raise DataError("fasttricks pack needs WebDataset: pip install 'fasttricks[train]'") from error
    if out.exists():
        if not overwrite:
            raise DataError(f"{out}: exists; give --overwrite to replace packed images, or another folder")
        if not (out / INDEX).exists():
            raise DataError(f"{out}: holds no packed images; --overwrite replaces nothing else")
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        draft.chmod(0o755)
        classes: list[str] | None = None
        shards: dict[str, list[str]] = {}
        for part in ("train", "val"):
            images = Images(source / part, v2.Identity(), classes=classes, substitute=False, seed=0)
            classes = images.classes
            shards[part] = _pack_part(images, source, draft, part, shard_bytes, TarWriter, done)
        (draft / INDEX).write_text(json.dumps({"format": FORMAT, "classes": classes, "shards": shards}, indent=1))
        if out.exists():
            shutil.rmtree(out)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _pack_part(
    images: Images,
    source: Path,
    out: Path,
    part: str,
    shard_bytes: int,
    writer: Callable[[str], Any],
    done: Callable[[str, int, int], None],
) -> list[str]:
    """Writes one part; returns the names of its shards."""
    names: list[str] = []
    index, shard, written = 0, None, 0
    try:
        for index in range(len(images)):
            if shard is None or written >= shard_bytes:
                if shard is not None:
                    shard.close()
                names.append(f"{part}-{len(names):06d}.tar")
                shard, written = writer(str(out / names[-1])), 0
            path = Path(images.name(index))
            file, label = path.read_bytes(), images.targets[index]
            about = {"label": label, "path": str(path.relative_to(source))}
            shard.write({"__key__": f"{index:08d}", path.suffix[1:].lower(): file, "json": about})
            written += len(file)
            done(part, index + 1, len(images))
    finally:
        if shard is not None:
            shard.close()
    shard_of, offset, size = _places(out, names)
    np.savez(out / f"{part}.npz", shard=shard_of, offset=offset, size=size, label=np.array(images.targets))
    return names


def _places(out: Path, names: Sequence[str]) -> Iterator[np.ndarray]:
    """Shard, offset and size of each image, by the tar headers of the shards."""
    found: list[tuple[int, int, int]] = []
    for number, name in enumerate(names):
        with tarfile.open(out / name) as shard:
            found += [(number, m.offset_data, m.size) for m in shard if not m.name.endswith(".json")]
    return (np.array(column, dtype=np.int64) for column in zip(*found, strict=True))


class PackedImages(Samples):
    """The samples of one part of packed images, equal to those of the folder that was packed, in the same order.

    Args:
        root: OUT/train or OUT/val.
        transform: image -> uint8 tensor.
        classes: must be those that were packed; None takes them.
        substitute, noise, seed: see `Samples`.

    Raises:
        DataError: the index is damaged or of another format, or a shard is missing or shorter than the index says.
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
        folder, part = root.parent, root.name
        try:
            about = json.loads((folder / INDEX).read_text())
            if about["format"] != FORMAT:
                raise DataError(f"{folder / INDEX}: format {about['format']!r}; accepted: {FORMAT!r}; pack again")
            self.classes = about["classes"]
            self.shards = [folder / name for name in about["shards"][part]]
            with np.load(folder / f"{part}.npz") as places:
                self.shard, self.offset, self.size = places["shard"], places["offset"], places["size"]
                self.labels = places["label"]
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{folder}: its index cannot be read ({error}); pack again") from error
        if classes is not None and list(classes) != self.classes:
            raise DataError(f"{folder}: other classes than those of the training set")
        self.transform, self.substitute, self.noise, self.seed = transform, substitute, noise, seed
        for number, path in enumerate(self.shards):
            end = int((self.offset + self.size)[self.shard == number].max())
            if not path.exists() or path.stat().st_size < end:
                state = "is shorter than the index says" if path.exists() else "is missing"
                raise DataError(f"{path}: {state}; pack again")
        self._files: dict[tuple[int, int], int] = {}
        self._check_one_is_readable()

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.shards[self.shard[index]]}/{index:08d}"

    def read(self, index: int) -> tuple[bytes, int]:
        key = os.getpid(), int(self.shard[index])  # each process has its own file descriptors
        if key not in self._files:
            mine = [each for each in self._files if each[0] == key[0]]
            if len(mine) >= MOST_OPEN:
                os.close(self._files.pop(mine[0]))
            self._files[key] = os.open(self.shards[key[1]], os.O_RDONLY)
        file = os.pread(self._files[key], int(self.size[index]), int(self.offset[index]))
        return file, int(self.labels[index])
