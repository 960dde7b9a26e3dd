"""Packed images, image files of every kind, and batches that are ready before they are needed."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
from PIL import Image
from torchvision.transforms import v2
from train_runs import SMALL, differences, refused, train, write_tree

from fasttricks.train import augment, bad_files, cli, images, loop, prefetch
from fasttricks.train import pack as packing
from fasttricks.train.data import Batch, TrainSampler, ValSampler, open_data
from fasttricks.train.decode import BAD_FILE, decode_rgb
from fasttricks.train.images import DataError, DataWarning

pytestmark = pytest.mark.filterwarnings("always::fasttricks.train.images.DataWarning")


# ---- image files ----


def written(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels_of(file: bytes) -> np.ndarray:
    """(H, W, 3)"""
    image = decode_rgb(file)
    return image.permute(1, 2, 0).numpy() if isinstance(image, torch.Tensor) else np.asarray(image)


COLOUR = (200, 90, 40)
FILES = {
    "JPEG": written(Image.new("RGB", (40, 24), COLOUR), "JPEG", quality=95),
    "progressive JPEG": written(Image.new("RGB", (40, 24), COLOUR), "JPEG", quality=95, progressive=True),
    "PNG": written(Image.new("RGB", (40, 24), COLOUR), "PNG"),
    "RGBA": written(Image.new("RGBA", (40, 24), (*COLOUR, 7)), "PNG"),
    "palette": written(Image.new("RGB", (40, 24), COLOUR).convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
    "WebP": written(Image.new("RGB", (40, 24), COLOUR), "WEBP", lossless=True),
    "CMYK": written(Image.new("RGB", (40, 24), COLOUR).convert("CMYK"), "JPEG", quality=95),
}
GREYS = {
    "grey JPEG": written(Image.new("L", (40, 24), 90), "JPEG", quality=95),
    "grey with alpha": written(Image.new("LA", (40, 24), (90, 5)), "PNG"),
    "16 bits": written(Image.fromarray(np.full((24, 40), 90 * 257, dtype=np.uint16)), "PNG"),
}


@pytest.mark.parametrize("kind", [*FILES, *GREYS])
def test_every_kind_of_file_is_rgb(kind: str) -> None:
    got = pixels_of(FILES.get(kind) or GREYS[kind])
    assert (got.shape, got.dtype) == ((24, 40, 3), np.uint8)
    assert np.abs(got.astype(int) - (COLOUR if kind in FILES else (90, 90, 90))).max() <= 3


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(format: str, orientation: int) -> None:
    """The exchange of width and height, and where the bright corner is."""
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :8] = 255
    undo = {  # what a camera stores, by the EXIF standard's list of orientations
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
        8: lambda a: np.rot90(a, -1),
    }
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = pixels_of(written(stored, format, exif=exif, **({"quality": 100} if format == "JPEG" else {})))
    assert got.shape == upright.shape
    assert np.abs(got.astype(int) - upright).mean() < 8


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"no image",
        FILES["JPEG"][:-60],
        FILES["CMYK"][:300],
        FILES["PNG"][:60],
        FILES["WebP"][:20],
        b"\xff\xd8\xff",
    ],
    ids=["empty", "text", "cut JPEG", "cut CMYK", "cut PNG", "cut WebP", "start of a JPEG"],
)
def test_damaged_files_raise_what_the_samples_expect(file: bytes) -> None:
    with pytest.raises(BAD_FILE):
        decode_rgb(file)


# ---- normalisation on the device ----


def test_normalised_as_single_images_are() -> None:
    images = torch.randint(256, (3, 3, 5, 7), dtype=torch.uint8)
    shift = torch.randn(3, 3) * 0.1
    got = augment.normalise(images, shift)
    single = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(augment.MEAN, augment.STD)])
    for i in range(3):
        want = single(images[i]) + (shift[i] / torch.tensor(augment.STD))[:, None, None]
        torch.testing.assert_close(got[i], want)
    assert augment.normalise(images, None, torch.bfloat16).dtype == torch.bfloat16
    assert augment.normalise(images[:0]).shape == (0, 3, 5, 7)


def test_the_noise_of_colours_has_the_covariance_of_krizhevsky() -> None:
    drawn = torch.stack([augment.colour_noise() for _ in range(4000)])
    vectors, values = torch.tensor(augment.PCA_VECTORS), torch.tensor(augment.PCA_VALUES)
    want = vectors @ torch.diag((0.1 * values) ** 2) @ vectors.T
    assert (drawn.T.cov() - want).norm() < 0.15 * want.norm()


# ---- packed images ----


SUFFIXES = (".JPG", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
IMAGES = 24 + len(SUFFIXES)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A tree of files of all formats, one of them damaged."""
    root = write_tree(tmp_path / "photos")
    for path, suffix in zip(sorted((root / "train" / "cat").iterdir()), SUFFIXES, strict=True):
        Image.open(path).save(path.with_suffix(suffix))
    (root / "train" / "dog" / "2.png").write_bytes(b"broken")
    return root


def pack(*arguments: object) -> int:
    return cli.main(["pack", *map(str, arguments)])


@pytest.fixture
def packed(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cli, "_at_least_one", int)
    pytest.importorskip("webdataset")
    assert pack(photos, tmp_path / "packed", "--shard-mb", "0") == 0  # a shard for each image
    return tmp_path / "packed"


def test_packed_samples_are_those_of_the_folder(photos: Path, packed: Path) -> None:
    for data_augment in ("digits", "imagenet"):
        folders, shards = (open_data(str(d), None, augment=data_augment, size=32, seed=3) for d in (photos, packed))
        for folder, shard in zip(folders, shards, strict=True):
            assert (len(folder), folder.classes) == (len(shard), shard.classes)
            for index in range(len(folder)):
                a, b = folder[index, 5], shard[index, 5]
                assert (a.label, len(a.bad)) == (b.label, len(b.bad))
                assert torch.equal(a.image, b.image)
                assert (a.shift is None) == (b.shift is None)
                assert a.shift is None or torch.equal(a.shift, b.shift)


def test_shards_are_those_of_webdataset(photos: Path, packed: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    names = json.loads((packed / "index.json").read_text())["shards"]["train"]
    assert len(names) == IMAGES
    read = list(webdataset.WebDataset([str(packed / name) for name in names], shardshuffle=False))
    assert len(read) == IMAGES
    for sample in read:
        about = json.loads(sample["json"])
        file = (photos / about["path"]).read_bytes()
        assert sample[Path(about["path"]).suffix[1:].lower()] == file


def test_few_shards_are_open_at_a_time(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MOST_OPEN", 2)
    samples, _ = open_data(str(packed), None, augment="digits", size=32, seed=3)
    before = len(os.listdir("/proc/self/fd"))
    first = [samples.read(index) for index in range(IMAGES)]
    assert first == [samples.read(index) for index in range(IMAGES)]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert len(set(first)) == IMAGES


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_curve_of_packed_images_is_the_folders(photos: Path, packed: Path, tmp_path: Path, workers: str) -> None:
    options = ("--epochs", "2", "--batch-size", "9", "--recipe", "baseline")
    assert train(photos, tmp_path / "a", *options) == 0
    assert train(packed, tmp_path / "b", *options, "--workers", workers) == 0
    # the damaged file is counted in both, under other names
    assert [d for d in differences(tmp_path / "a", tmp_path / "b") if "bad_files" not in d] == []


def test_packing_refuses_what_it_must_not_replace(photos: Path, packed: Path, tmp_path: Path, capsys: Any) -> None:
    assert pack(photos, packed) == 1
    assert f"{packed}: exists; give --overwrite" in capsys.readouterr().err
    assert pack(photos, packed, "--overwrite") == 0
    assert len(list(packed.glob("train-*.tar"))) == 1
    other = tmp_path / "other"
    other.mkdir()
    assert pack(photos, other, "--overwrite") == 1
    assert "holds no packed images" in capsys.readouterr().err
    assert pack(tmp_path / "nowhere", tmp_path / "new") == 1
    assert "no such directory" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".new-") or path.name == "new"]


def test_damaged_shards_are_refused(packed: Path, tmp_path: Path, capsys: Any) -> None:
    shard = packed / "train-000004.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:700])
    out = ["--out", tmp_path / "run", *SMALL]
    assert "train-000004.tar: is shorter than the index says; pack again" in refused(capsys, "--data", packed, *out)
    shard.unlink()
    assert "train-000004.tar: is missing; pack again" in refused(capsys, "--data", packed, *out)
    shard.write_bytes(whole)
    index = packed / "index.json"
    index.write_text(index.read_text().replace("images 1", "images 9"))
    assert "format 'fasttricks images 9'; accepted: 'fasttricks images 1'" in refused(capsys, "--data", packed, *out)
    index.write_text(index.read_text().replace("images 9", "images 1"))
    for name in ("train.npz", "index.json"):
        (packed / name).write_bytes((packed / name).read_bytes()[:40])
        assert f"{packed}: its index cannot be read" in refused(capsys, "--data", packed, *out)


# ---- which rank reads what ----


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_epoch_has_each_image_once(ranks: int) -> None:
    """In training, all ranks have equally many images, so that a few may be left out; another few in each epoch."""
    size = 32
    train = [TrainSampler(range(size), ranks, rank, shuffle=True, seed=4, drop_last=True) for rank in range(ranks)]
    epochs = []
    for epoch in (0, 1):
        for sampler in train:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in train]
        assert {len(share) for share in shares} == {size // ranks}
        assert {number for share in shares for _, number in share} == {epoch}
        read = [index for share in shares for index, _ in share]
        assert len(set(read)) == len(read) == size // ranks * ranks
        epochs.append(read)
    assert epochs[0] != epochs[1]
    val = [index for rank in range(ranks) for index, _ in ValSampler(size, rank, ranks)]
    assert sorted(val) == list(range(size))


# ---- bad files ----


@pytest.mark.parametrize("part", ["train", "val"])
def test_too_many_bad_files_end_the_run(tree: Path, tmp_path: Path, capsys: Any, part: str) -> None:
    for i in range(4):
        (tree / part / "owl" / f"{i}.png").write_bytes(b"broken")
    options = ("--epochs", "1", "--batch-size", "8")
    assert train(tree, tmp_path / "run", *options) == 1
    printed = capsys.readouterr().err
    count, kind = ("4 of the first 24", "training") if part == "train" else ("3 of the first 12", "validation")
    assert f"fasttricks train: {count} {kind} images cannot be read, the last for: UnidentifiedImageError" in printed
    assert "--max-bad-files 0.1 is the share that is accepted" in printed
    assert train(tree, tmp_path / "run", *options, "--max-bad-files", "0.5", "--overwrite") == 0
    printed = capsys.readouterr()
    assert "4 files could not be read" in printed.out
    assert [printed.err.count(f"{i}.png: UnidentifiedImageError") for i in range(4)] == [1] * 4


def test_the_limit_counts_new_files_of_a_large_set() -> None:
    """1,000 images are read before a share counts, and files that are known count once."""
    files = bad_files.BadFiles(0.01, {True: 10**6, False: 10**6})
    files.names = {"old"}
    images = torch.empty(500, 3, 1, 1, dtype=torch.uint8)

    def batch(*names: str) -> Batch:
        return Batch(images, None, torch.zeros(500), [(name, "why") for name in names])

    with pytest.warns(DataWarning):
        files.report(batch("old", *map(str, range(10))), True)
    with pytest.raises(DataError, match="11 of the first 1000 training images"), pytest.warns(DataWarning):
        files.report(batch("0", "new"), True)
    for _ in range(4):
        files.report(batch(), True)
    with pytest.warns(DataWarning):
        files.report(batch(*map(str, range(20, 30))), True)


# ---- batches that are ready before they are needed ----


def test_batches_arrive_in_order_and_errors_pass_through() -> None:
    def numbers() -> Iterator[int]:
        yield from (1, 2, 3)
        raise DataError("a worker died")

    batches = prefetch.prefetched(numbers(), lambda n: (torch.tensor(n),), torch.device("cpu"))
    assert [next(batches)[0].item() for _ in range(3)] == [1, 2, 3]
    with pytest.raises(DataError, match="a worker died"):
        next(batches)


class FakeCuda:
    """Records what a stream would do."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def Stream(self, device: torch.device) -> FakeCuda:
        return self

    def Event(self) -> FakeCuda:
        return self

    def stream(self, stream: FakeCuda) -> FakeCuda:
        return self

    def __enter__(self) -> None:
        self.log.append("enter")

    def __exit__(self, *error: object) -> None:
        self.log.append("exit")

    def record(self, stream: FakeCuda) -> None:
        self.log.append("record")

    def current_stream(self, device: torch.device) -> FakeCuda:
        return self

    def wait_event(self, event: FakeCuda) -> None:
        self.log.append("wait")


class FakeTensor:
    def __init__(self, number: int, log: list[str]) -> None:
        self.number, self.log = number, log

    def record_stream(self, stream: FakeCuda) -> None:
        self.log.append(f"use {self.number}")


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_two_batches_are_on_their_way_while_one_is_used(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch, "cuda", FakeCuda(log))

    def receive(number: int) -> tuple[FakeTensor]:
        log.append(f"copy {number}")
        return (FakeTensor(number, log),)

    got = []
    for (tensor,) in prefetch.prefetched(range(count), receive, torch.device("cuda", 0)):
        copied = sum(line.startswith("copy") for line in log)
        assert copied == min(count, len(got) + 1 + prefetch.DEPTH)
        got.append(tensor.number)
    assert got == list(range(count))
    text = " ".join(log)
    assert len(re.findall(r"enter copy \d record exit", text)) == count  # copies run on the stream
    assert re.findall(r"wait use (\d)", text) == [str(n) for n in range(count)]  # and are waited for before use


@pytest.mark.parametrize("workers", ["0", "1"])
def test_images_that_vanish_take_one_sentence(
    tree: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    """Also from a worker, whose errors torch wraps in a traceback."""
    monkeypatch.setattr(
        multiprocessing.context._default_context, "_actual_context", multiprocessing.get_context("fork")
    )
    monkeypatch.setattr(loop.Trainer, "check_output", lambda trainer: shutil.rmtree(tree / "train"))
    (tmp_path / "run").mkdir()
    printed = refused(capsys, "--data", tree, "--out", tmp_path / "run", *SMALL, "--workers", workers)
    assert "fasttricks train: no image file can be read any more; the first is " in printed
    assert "FileNotFoundError" in printed
    assert len(printed.splitlines()) == 1


# ---- speed ----


def test_bench_data_prints_both_speeds(photos: Path, packed: Path, capsys: Any) -> None:
    options = [
        "--image-size",
        "32",
        "--batch-size",
        "4",
        "--seconds",
        "0.1",
        "--model",
        "resnet18",
        "--augment",
        "digits",
    ]
    assert cli.main(["bench-data", "--data", str(photos), str(packed), "--workers", "0", "1", *options]) == 0
    printed = capsys.readouterr().out
    assert "32x32 pixels, batch 4" in printed
    lines = re.findall(rf"│\s+{IMAGES} │\s+([01]) │\s+\d+ │\s+\d+ │\s+(?:data|model) │", printed)
    assert lines == ["0", "1", "0", "1"]
    assert "resnet18 trains in fp32 on cpu" in printed
    assert cli.main(["bench-data", "--data", "nowhere"]) == 1
    assert "no such directory" in capsys.readouterr().err


def test_waiting_for_images_is_reported(
    tree: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = images.decode_rgb

    def slow(file: bytes) -> Any:
        time.sleep(0.1)
        return decode(file)

    monkeypatch.setattr(images, "decode_rgb", slow)
    assert train(tree, tmp_path / "run", "--epochs", "1", "--batch-size", "8") == 0
    assert re.search(r"data is the bottleneck: \d+% of the first epoch waited for images", capsys.readouterr().out)
