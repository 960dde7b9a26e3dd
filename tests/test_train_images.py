"""Image folders and their transforms: damaged files, missing classes, the augmentation of the paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
from PIL import Image
from train_runs import SMALL, refused, rows, train

from fasttricks.train import augment

pytestmark = pytest.mark.filterwarnings("always::fasttricks.train.images.DataWarning")


def test_modes_bad_files_and_strays(tree: Path, tmp_path: Path, capsys: object) -> None:
    """Every mode becomes RGB; hidden and other files are left out; a damaged one is named and counted."""
    folder = tree / "train" / "cat"
    for mode in ("L", "LA", "P", "RGBA", "CMYK", "I;16"):
        image = Image.new(mode, (40, 36)) if mode == "I;16" else Image.new("RGB", (40, 36), (9, 9, 9)).convert(mode)
        image.save(folder / f"{mode.replace(';', '')}.{'jpg' if mode == 'CMYK' else 'png'}")
    (folder / "broken.png").write_bytes(b"no image at all")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "notes.txt").write_text("x")
    (tree / "train" / ".hidden").mkdir()
    (tree / "val" / "dog" / "cut.png").write_bytes((tree / "val" / "dog" / "0.png").read_bytes()[:200])
    assert train(tree, tmp_path / "run", "--epochs", "1", "--batch-size", "10", "--recipe", "baseline") == 0
    printed = capsys.readouterr().err
    assert "broken.png" in printed
    assert "cut.png" in printed
    assert "notes.txt" in printed
    assert ".DS_Store" not in printed
    assert rows(tmp_path / "run")[0]["bad_files"] == "2"


def test_missing_and_empty_folders(tree: Path, tmp_path: Path, capsys: object) -> None:
    out = ["--out", tmp_path / "run", *SMALL]
    assert "no such directory" in refused(capsys, "--data", tmp_path / "nowhere", *out)
    (tree / "train" / "empty").mkdir()
    assert "no image in the class folder empty" in refused(capsys, "--data", tree, *out)
    (tree / "train" / "empty").rmdir()
    (tree / "val" / "wolf").mkdir()
    (tree / "val" / "wolf" / "0.png").write_bytes((tree / "val" / "dog" / "0.png").read_bytes())
    assert "wolf not among the classes of the training set" in refused(capsys, "--data", tree, *out)
    (tree / "train" / "owl").rename(tmp_path / "owl")
    for name in ("cat", "dog"):
        for file in (tree / "train" / name).iterdir():
            file.write_bytes(b"broken")
    assert "none of the 16 image files can be read" in refused(capsys, "--data", tree, *out)
    (tree / "val").rename(tmp_path / "val")
    assert f"{tree / 'val'} is missing" in refused(capsys, "--data", tree, *out)


def test_a_single_class_is_named(tree: Path, tmp_path: Path, capsys: object) -> None:
    """As where images lie in one folder too many: the loss would be 0 and the accuracy 100%."""
    assert train(tree, tmp_path / "three", "--dry-run") == 0
    assert "one class only" not in capsys.readouterr().err
    for part in ("train", "val"):
        (tree / part).rename(tree / "images")
        (tree / part).mkdir()
        (tree / "images").rename(tree / part / "images")
        for folder in list((tree / part / "images").iterdir()):
            for file in folder.iterdir():
                file.rename(tree / part / "images" / f"{folder.name}-{file.name}")
            folder.rmdir()
    assert train(tree, tmp_path / "one", "--dry-run") == 0
    printed = capsys.readouterr().err
    assert printed.count("one class only, images: nothing to tell apart") == 1


def test_a_class_without_validation_images_keeps_its_number(tree: Path, tmp_path: Path, capsys: object) -> None:
    """Val uses the classes of train; a missing folder shifts no class."""
    (tree / "val" / "cat").rename(tmp_path / "cat")
    assert train(tree, tmp_path / "run", "--epochs", "1", "--batch-size", "8") == 0
    assert "no folder for 1 of 3 classes (cat)" in capsys.readouterr().err
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["classes"] == ["cat", "dog", "owl"]


def test_colours_are_scaled_in_hsv() -> None:
    """A factor of one changes nothing; every other is exact at the pixels whose hue, saturation and value are known."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 11, 3)).astype(np.uint8))
    unchanged = np.asarray(augment.ScaleHSV(1, 1)(image), dtype=int)
    assert np.abs(unchanged - np.asarray(image.convert("HSV").convert("RGB"), dtype=int)).max() == 0
    hsv = np.asarray([[[100, 120, 90], [200, 255, 200]]], dtype=np.uint8)
    torch.manual_seed(3)
    hue, saturation, value = torch.empty(3).uniform_(0.6, 1.4).tolist()
    torch.manual_seed(3)
    got = np.asarray(augment.ScaleHSV(0.6, 1.4)(Image.fromarray(hsv, "HSV").convert("RGB")).convert("HSV"), dtype=int)
    want = np.stack(
        [
            np.round(hsv[..., 0] * hue) % 256,
            np.minimum(hsv[..., 1] * saturation, 255),
            np.minimum(hsv[..., 2] * value, 255),
        ],
        axis=-1,
    )
    assert np.abs(got - want).max() <= 3  # 8 bits, there and back


def test_augmentation_is_the_papers() -> None:
    crop, flip, colour, *_ = augment.train_transform("imagenet", 64).transforms
    assert (crop.size, tuple(crop.scale), tuple(crop.ratio)) == ((64, 64), (0.08, 1.0), (3 / 4, 4 / 3))
    assert (flip.p, colour.low, colour.high, augment.PCA_STD) == (0.5, 0.6, 1.4, 0.1)
    assert torch.tensor([123.68, 116.779, 103.939]).div(255).sub(torch.tensor(augment.MEAN)).abs().max() < 0.5 / 255
    assert torch.tensor([58.393, 57.12, 57.375]).div(255).sub(torch.tensor(augment.STD)).abs().max() < 0.5 / 255
    image = Image.new("RGB", (400, 300))
    pixels = augment.train_transform("imagenet", 64)(image)
    assert (pixels.shape, pixels.dtype) == ((3, 64, 64), torch.uint8)
    resize, centre, *_ = augment.val_transform("imagenet", 224).transforms
    assert (resize.size, centre.size) == ([256], (224, 224))
