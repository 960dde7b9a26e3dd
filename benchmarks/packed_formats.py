"""Images per second of CPU time of one process that reads, decodes and crops every image once in random order.

    python benchmarks/packed_formats.py [--images 1200] [--rounds 5] [--work DIR]

From a folder of JPEGs, from what `fasttricks pack` makes of it, from the same shards by WebDataset's reader, and from
the chunks of litdata if it is installed. They take turns, and the time is that of the CPU, threads
included, so that other programs disturb it little.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from torchvision.io import ImageReadMode, decode_jpeg, write_jpeg
from torchvision.transforms import v2

from fasttricks.train.pack import pack

CROP = v2.RandomResizedCrop(224, antialias=True)


def read(data: bytes) -> torch.Tensor:
    """The image as a training pipeline takes it."""
    return CROP(decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB))


def make_folder(root: Path, images: int) -> None:
    """JPEGs of 500 x 375 pixels, as large as photographs: noise of few pixels, enlarged."""
    for part, count in (("train", images), ("val", 10)):
        for i in range(count):
            path = root / part / f"class{i % 10}" / f"{i:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = torch.rand(3, 47, 63) * 255
            write_jpeg(v2.functional.resize(coarse, [375, 500], antialias=False).byte(), str(path), quality=90)


def folder(root: Path) -> Iterator[bytes]:
    files = sorted((root / "train").rglob("*.jpg"))
    for i in torch.randperm(len(files)).tolist():
        yield files[i].read_bytes()


def packed(root: Path) -> Iterator[bytes]:
    import numpy as np

    index = np.load(root / "train.npz")
    offsets, sizes = index["offset"].tolist(), index["size"].tolist()
    with (root / "train-000000.tar").open("rb") as shard:
        for i in torch.randperm(len(offsets)).tolist():
            shard.seek(offsets[i])
            yield shard.read(sizes[i])


def webdataset(root: Path) -> Iterator[bytes]:
    import webdataset as wds

    shards = [str(path) for path in sorted(root.glob("train-*.tar"))]
    for sample in wds.WebDataset(shards, shardshuffle=False, empty_check=False).shuffle(1000):
        yield sample["jpg"]


def litdata(root: Path) -> Iterator[bytes]:
    from litdata import StreamingDataset

    for sample in StreamingDataset(str(root), shuffle=True):
        yield sample["jpg"]


def write_litdata(source: Path, out: Path) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(out), chunk_bytes="64MB")
    for i, path in enumerate(sorted((source / "train").rglob("*.jpg"))):
        writer[i] = {"jpg": path.read_bytes(), "label": i % 10}
    writer.done()
    writer.merge()


def rate(source: Callable[[Path], Iterator[bytes]], root: Path, images: int) -> float:
    start, count = time.process_time(), 0
    for data in source(root):
        count += read(data).shape[0] == 3
    assert count == images, f"{count} of {images} images"
    return images / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder for the images (default: a temporary one)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(dir=args.work))
    try:
        make_folder(work / "folder", args.images)
        pack(work / "folder", work / "packed", shard_bytes=10**9, overwrite=False, done=lambda *_: None)
        sources = {
            "folder": (folder, work / "folder"),
            "fasttricks pack": (packed, work / "packed"),
            "WebDataset": (webdataset, work / "packed"),
        }
        if importlib.util.find_spec("litdata"):
            write_litdata(work / "folder", work / "litdata")
            sources["litdata"] = (litdata, work / "litdata")
        rates: dict[str, list[float]] = {name: [] for name in sources}
        for _ in range(args.rounds):
            for name, (source, root) in sources.items():
                rates[name].append(rate(source, root, args.images))
        for name, values in rates.items():
            ratio = median(a / b for a, b in zip(values, rates["folder"], strict=True))
            print(f"{name:16} best {max(values):6.0f} img/s of CPU time, {ratio:.2f} of the folder's")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
