"""Tiny image trees and runs of the trainer on them, for its tests."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fasttricks.train import cli

SMALL = ["--model", "resnet18d", "--width", "4", "--image-size", "32", "--augment", "digits", "--log-every", "1"]


def write_tree(root: Path, classes: tuple[str, ...] = ("cat", "dog", "owl"), train: int = 8, val: int = 4) -> Path:
    """Classes that differ by their brightness, so that a network learns them at once."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for i, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for j in range(count):
                pixels = rng.integers(80 * i, 80 * i + 60, (36, 40, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{j}.png")
    return root


def train(tree: Path | str, out: Path, *more: str) -> int:
    return cli.main(["train", "--data", str(tree), "--out", str(out), *SMALL, *more])


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def same(a: object, b: object) -> bool:
    """Bitwise equality of tensors and of containers of them."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def differences(one: Path, other: Path) -> list[str]:
    """What differs in the checkpoints and logs of two runs, apart from times."""
    found = []
    for name in ("last.pt", "best.pt"):
        a, b = (torch.load(out / name, weights_only=True) for out in (one, other))
        assert a.keys() == b.keys()
        found += [f"{name}: {part}" for part in a if not same(a[part], b[part])]
    timing = {"img_per_s", "train_seconds"}
    a, b = ([{k: v for k, v in row.items() if k not in timing} for row in rows(out)] for out in (one, other))
    return found if a == b else [*found, f"log.csv: {a} {b}"]


def refused(capsys: object, *arguments: object) -> str:
    assert cli.main(["train", *map(str, arguments)]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed
