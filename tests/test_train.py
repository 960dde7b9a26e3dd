"""The trainer end to end on tiny image trees: recipes, logs, resuming bit for bit, ranks, and bad input."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from signal import Signals
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
import torchvision
from PIL import Image
from torch.utils.data import get_worker_info

from fasttricks import models
from fasttricks.train import ablation, checkpoint, cli, command, data, loop, preview
from fasttricks.train.objective import Objective, load_teacher
from fasttricks.train.recipe import RECIPES, Recipe, RecipeError, fit_batch, resolve

pytestmark = pytest.mark.filterwarnings("always::fasttricks.train.data.DataWarning")

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


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "data")


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


@pytest.mark.parametrize("recipe", ["baseline", "efficient"])
def test_a_run_learns_and_writes_its_parts(tree: Path, tmp_path: Path, recipe: str, capsys: object) -> None:
    out, lr = tmp_path / "run", {"baseline": "0.02", "efficient": "0.2"}[recipe]
    write_tree(tree, train=20, val=8)
    assert train(tree, out, "--recipe", recipe, "--epochs", "8", "--batch-size", "8", "--lr", lr) == 0
    log = rows(out)
    assert [int(r["epoch"]) for r in log] == list(range(1, 9))
    assert float(log[-1]["train_loss"]) < float(log[0]["train_loss"])
    assert max(float(r["val_top1"]) for r in log) > 60  # three classes: chance is 33
    assert all(float(r["val_top5"]) == 100 for r in log)
    assert list((out / "tensorboard").glob("events*"))
    for name in ("last.pt", "best.pt"):
        state = torch.load(out / name, weights_only=True)
        assert state["classes"] == ["cat", "dog", "owl"]
    assert not [p for p in out.iterdir() if p.name.startswith(".")]  # no draft is left
    assert cli.main(["report", str(out), str(out), "--png", str(tmp_path / "curves.png")]) == 0
    assert Image.open(tmp_path / "curves.png").size[0] > 500
    printed = capsys.readouterr().out
    assert "top-1, last epoch" in printed
    assert "img/s, training" in printed


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_with_masters(tree: Path, tmp_path: Path, precision: str) -> None:
    """Parameters are half, their masters float32, and the loss falls."""
    out = tmp_path / "run"
    more = ["--precision", precision, "--epochs", "4", "--batch-size", "8", "--lr", "0.4"]
    assert train(tree, out, "--recipe", "efficient", *more) == 0
    state = torch.load(out / "last.pt", weights_only=True)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert state["model"]["fc.weight"].dtype == half
    assert state["model"]["bn1.weight"].dtype == torch.float32
    tensors = [t for s in state["optimizer"]["state"].values() for t in s.values() if isinstance(t, torch.Tensor)]
    assert {t.dtype for t in tensors if t.numel() > 1} == {torch.float32}
    assert float(rows(out)[-1]["train_loss"]) < float(rows(out)[0]["train_loss"])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resume_continues_bit_for_bit(tree: Path, tmp_path: Path, precision: str) -> None:
    """Two epochs, a stop, two more: weights, optimizer, schedule, scaler and generators of four in one go."""
    more = ["--recipe", "refined", "--precision", precision, "--epochs", "4", "--warmup-epochs", "2.5"]
    more += ["--batch-size", "8", "--ema", "0.9"]
    assert train(tree, tmp_path / "whole", *more) == 0
    code = (
        "import sys; from fasttricks.train import cli, loop\n"
        "save = loop.Trainer._save\n"
        "def stop(self, *a):\n    save(self, *a)\n    if self.epoch == 2: sys.exit(9)\n"
        "loop.Trainer._save = stop\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = ["train", "--data", str(tree), "--out", str(tmp_path / "cut"), *SMALL, *more]
    assert subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True).returncode == 9
    assert train(tree, tmp_path / "cut", *more, "--resume") == 0
    whole, cut = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    for part in (
        "model",
        "optimizer",
        "scheduler",
        "scaler",
        "ema",
        "averaged_steps",
        "rng",
        "epoch",
        "step",
        "best_top1",
    ):
        assert same(whole[part], cut[part]), part
    timing = {"img_per_s", "train_seconds"}
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "cut"), strict=True):  # as text
        assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}


def test_two_ranks_train_as_one(tree: Path, tmp_path: Path) -> None:
    """torchrun with two gloo processes; every validation image is counted once."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "fasttricks.train"]
    more = ["--data", str(tree), "--out", str(out), *SMALL, "--recipe", "efficient", "--epochs", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *more, "--batch-size", "8"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(rows(out)) == 2
    assert "2 processes on cpu" in done.stdout
    assert len(torch.load(out / "last.pt", weights_only=True)["rng"]) == 2


# ---- images ----


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
    told = capsys.readouterr().err
    assert "broken.png" in told
    assert "cut.png" in told
    assert "notes.txt" in told
    assert ".DS_Store" not in told
    assert rows(tmp_path / "run")[0]["bad_files"] == "2"


def refused(capsys: object, *arguments: object) -> str:
    assert cli.main(["train", *map(str, arguments)]) == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told


@pytest.mark.parametrize("signal", [Signals.SIGKILL, Signals.SIGBUS])
def test_a_killed_worker_takes_one_sentence(
    tree: Path, tmp_path: Path, capsys: object, monkeypatch: pytest.MonkeyPatch, signal: Signals
) -> None:
    load = data.load_rgb

    def load_or_die(path: str) -> Image.Image:
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal)
        return load(path)

    monkeypatch.setattr(data, "load_rgb", load_or_die)  # forked workers have it too
    monkeypatch.setattr(
        multiprocessing.context._default_context, "_actual_context", multiprocessing.get_context("fork")
    )
    told = refused(capsys, "--data", tree, "--out", tmp_path / "run", *SMALL, "--workers", "1")
    assert "a worker that reads images died" in told
    assert "--workers 0" in told
    assert "/dev/shm" in told
    assert len([line for line in told.splitlines() if line.startswith("fasttricks train:")]) == 1


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


def test_a_class_without_validation_images_keeps_its_number(tree: Path, tmp_path: Path, capsys: object) -> None:
    """Val uses the classes of train; a missing folder shifts no class."""
    (tree / "val" / "cat").rename(tmp_path / "cat")
    assert train(tree, tmp_path / "run", "--epochs", "1", "--batch-size", "8") == 0
    assert "no folder for 1 of 3 classes (cat)" in capsys.readouterr().err
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["classes"] == ["cat", "dog", "owl"]


# ---- settings ----


def test_bad_settings(tree: Path, tmp_path: Path, capsys: object) -> None:
    base = ["--data", tree, "--out", tmp_path / "run", *SMALL]
    assert "--lr nan" in refused(capsys, *base, "--lr", "nan")
    assert "--momentum -1.0" in refused(capsys, *base, "--momentum", "-1")
    assert "larger than the training set of 24 images" in refused(capsys, *base, "--batch-size", "25")
    assert "does not divide into at least 2 images" in refused(capsys, *base, "--batch-size", "1")
    assert "'resnet19' is unknown" in refused(capsys, *base[:4], "--model", "resnet19", "--batch-size", "8")
    assert "no checkpoint at" in refused(capsys, *base, "--resume", tmp_path / "none.pt")
    (tmp_path / "file").write_text("")
    assert "File exists" in refused(capsys, *base[:2], "--out", tmp_path / "file", *SMALL, "--batch-size", "8")
    small = ["--model", "torchvision/alexnet", "--image-size", "32", "--batch-size", "8"]
    assert "does not take images of 32x32" in refused(capsys, *base[:4], *small)
    if not torch.cuda.is_available():
        assert "torch sees no CUDA device" in refused(capsys, *base, "--device", "cuda")


def test_checkpoints_of_something_else(tree: Path, tmp_path: Path, capsys: object) -> None:
    out = tmp_path / "run"
    assert train(tree, out, "--epochs", "1", "--batch-size", "8") == 0
    base = ["--data", tree, "--out", out, "--epochs", "2", "--batch-size", "8", "--image-size", "32"]
    assert "holds a run already" in refused(capsys, *base, *SMALL)
    told = refused(capsys, *base, "--resume", "--model", "resnet34d", "--width", "4")
    assert "is a checkpoint of model 'resnet18d', this run has 'resnet34d'" in told
    before = (out / "last.pt").read_bytes()
    (out / "last.pt").write_bytes(before[: len(before) // 2])
    assert "cannot be read as a checkpoint" in refused(capsys, *base, *SMALL, "--resume")
    other = write_tree(tmp_path / "other", ("cat", "dog"))
    (out / "last.pt").write_bytes(before)
    assert "was trained on 3 classes" in refused(capsys, "--data", other, *base[2:], *SMALL, "--resume")
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    assert "is not a checkpoint of this trainer" in refused(capsys, *base, *SMALL, "--resume", tmp_path / "foreign.pt")


def test_divergence_stops_and_keeps_the_last_good_epoch(tree: Path, tmp_path: Path, capsys: object) -> None:
    """A loss that is not finite ends the run; best.pt stays that of a good epoch."""
    out = tmp_path / "run"
    assert train(tree, out, "--epochs", "1", "--batch-size", "8", "--recipe", "baseline") == 0
    best = (out / "best.pt").read_bytes()
    more = ["--epochs", "3", "--batch-size", "8", "--recipe", "baseline", "--lr", "1e30", "--resume"]
    assert train(tree, out, *more) == 1
    told = capsys.readouterr().err
    assert "not finite" in told
    assert "holds epoch 1" in told
    assert (out / "best.pt").read_bytes() == best


def test_interrupted_checkpoint_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"format": 1})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"format": 2})
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"format": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_recipes_are_the_papers() -> None:
    recipe, notes = resolve("efficient", "imagenet", {}, train_images=1_281_167, device="cuda")
    assert (recipe.batch_size, recipe.precision, recipe.warmup_epochs) == (1024, "fp16", 5)
    assert recipe.linear_lr
    assert recipe.zero_gamma
    assert recipe.no_bias_decay
    assert notes == []
    recipe, notes = resolve("baseline", "imagenet", {}, train_images=1_281_167, device="cuda")
    assert (recipe.batch_size, recipe.precision, recipe.lr, recipe.epochs) == (256, "fp32", 0.1, 120)
    assert not recipe.zero_gamma
    assert notes == []
    recipe, _ = resolve("refined", "imagenet", {}, train_images=1_281_167, device="cuda")
    assert (recipe.schedule, recipe.label_smoothing, recipe.mixup, recipe.temperature) == ("cosine", 0.1, 0.2, 20)
    assert recipe.teacher is None
    assert RECIPES.keys() == {"baseline", "efficient", "refined"}


@pytest.mark.parametrize("epochs", [1, 6, 20, 240])
def test_the_warmup_of_a_recipe_scales_with_the_epochs(epochs: int) -> None:
    recipe, notes = resolve("efficient", "imagenet", {"epochs": epochs}, train_images=1_281_167, device="cuda")
    assert recipe.warmup_epochs == pytest.approx(epochs / 24)
    assert ["in proportion" in note for note in notes] == [True]


def test_a_warmup_that_hides_milestones() -> None:
    """All of them, or the whole run: an error; some of them: a sentence; none, or a cosine: nothing."""

    def resolved(**given: object) -> list[str]:
        return resolve("efficient", "imagenet", given, train_images=1_281_167, device="cuda")[1]

    with pytest.raises(RecipeError, match=r"--warmup-epochs 5: .*1\.5, 3, 4\.5 epochs"):
        resolved(epochs=6, warmup_epochs=5)
    with pytest.raises(RecipeError, match="leaves no epoch of --epochs 6"):
        resolved(epochs=6, warmup_epochs=6, schedule="cosine")
    assert ["divided by 100" in note for note in resolved(epochs=6, warmup_epochs=4)] == [True]
    assert resolved(epochs=6, warmup_epochs=1) == []
    assert resolved(epochs=6, warmup_epochs=5, schedule="cosine") == []


# ---- tricks ----


def test_a_model_without_residual_blocks_and_with_an_auxiliary_head(tree: Path, tmp_path: Path, capsys: object) -> None:
    """The recipe's zero gamma is left out and not reported; images are of the model's own size."""
    out = tmp_path / "run"
    more = ["--epochs", "1", "--batch-size", "12", "--model", "inception_v3", "--width", "2", "--augment", "digits"]
    assert cli.main(["train", "--data", str(tree), "--out", str(out), *more]) == 0
    told = capsys.readouterr().out
    assert "inception_v3 has no residual block" in told
    assert "at 299x299" in told
    assert "AuxLogits.fc.weight" in torch.load(out / "last.pt", weights_only=True)["model"]
    assert not json.loads((out / "recipe.json").read_text())["zero_gamma"]


def test_colours_are_scaled_in_hsv() -> None:
    """A factor of one changes nothing; every other is exact at the pixels whose hue, saturation and value are known."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 11, 3)).astype(np.uint8))
    unchanged = np.asarray(data.ScaleHSV(1, 1)(image), dtype=int)
    assert np.abs(unchanged - np.asarray(image.convert("HSV").convert("RGB"), dtype=int)).max() == 0
    hsv = np.asarray([[[100, 120, 90], [200, 255, 200]]], dtype=np.uint8)
    torch.manual_seed(3)
    hue, saturation, value = torch.empty(3).uniform_(0.6, 1.4).tolist()
    torch.manual_seed(3)
    got = np.asarray(data.ScaleHSV(0.6, 1.4)(Image.fromarray(hsv, "HSV").convert("RGB")).convert("HSV"), dtype=int)
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
    crop, flip, colour, *_, noise, normalize = data.train_transform("imagenet", 64).transforms
    assert (crop.size, tuple(crop.scale), tuple(crop.ratio)) == ((64, 64), (0.08, 1.0), (3 / 4, 4 / 3))
    assert (flip.p, colour.low, colour.high, noise.std) == (0.5, 0.6, 1.4, 0.1)
    assert torch.tensor([123.68, 116.779, 103.939]).div(255).sub(torch.tensor(normalize.mean)).abs().max() < 0.5 / 255
    assert torch.tensor([58.393, 57.12, 57.375]).div(255).sub(torch.tensor(normalize.std)).abs().max() < 0.5 / 255
    image = Image.new("RGB", (400, 300))
    assert data.train_transform("imagenet", 64)(image).shape == (3, 64, 64)
    resize, centre, *_ = data.val_transform("imagenet", 224).transforms
    assert (resize.size, centre.size) == ([256], (224, 224))


def test_objective_is_the_papers() -> None:
    """Against the sums written out, in float64; gradients by its own derivative."""
    torch.manual_seed(0)
    z, r, a = (torch.randn(5, 7, dtype=torch.float64) for _ in range(3))
    labels, t, eps = torch.randint(7, (5,)), 3.0, 0.1
    q = torch.full((5, 7), eps / 7, dtype=torch.float64)
    q[range(5), labels] += 1 - eps

    def entropy(p: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return -(p * (logits.exp() / logits.exp().sum(1, keepdim=True)).log()).sum(1).mean()

    hard = entropy(q, z)
    soft = t**2 * entropy((r / t).exp() / (r / t).exp().sum(1, keepdim=True), z / t)
    loss = Objective(eps, t)
    torch.testing.assert_close(loss(z, labels), hard, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss(z, labels, r), hard + soft, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss((z, a, None), labels), hard + 0.3 * entropy(q, a), rtol=1e-12, atol=0)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z, labels, r), z)
    want = ((z.softmax(1) - q) + t * ((z / t).softmax(1) - (r / t).softmax(1))) / 5
    assert (gradient - want).norm() / want.norm() < 1e-12


def test_teachers(tree: Path, tmp_path: Path, capsys: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of another model, of other classes, an own name, and a library's with published weights."""
    teacher = tmp_path / "teacher"
    more = ["--epochs", "1", "--batch-size", "8"]
    assert train(tree, teacher, *more, "--ema", "0.5") == 0
    student = ["--recipe", "refined", "--teacher", str(teacher / "best.pt"), "--out", str(tmp_path / "student")]
    assert cli.main(["train", "--data", str(tree), *SMALL, *more, *student, "--model", "resnet18b"]) == 0
    assert cli.main(["report", str(tmp_path / "student"), "--png", str(tmp_path / "c.png")]) == 0
    assert "distillation" in " ".join(capsys.readouterr().out.split())
    base = ["--data", tree, "--out", tmp_path / "run", *SMALL, *more]
    assert "no published weights" in refused(capsys, *base, "--teacher", "resnet18d")
    assert "no checkpoint at" in refused(capsys, *base, "--teacher", tmp_path / "none.pt")
    assert "are for 1000 classes, asked for 3" in refused(capsys, *base, "--teacher", "torchvision/squeezenet1_1")
    assert "are for 1000 classes, asked for 3" in refused(capsys, *base, "--teacher", "timm/resnet18")
    other = write_tree(tmp_path / "other", ("cat", "dog"))
    told = refused(capsys, "--data", other, *base[2:], "--teacher", teacher / "best.pt")
    assert "trained on 3 classes" in told
    # A file in torchvision's cache stands for the download.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    (tmp_path / "hub" / "hub" / "checkpoints").mkdir(parents=True)
    theirs = torchvision.models.squeezenet1_1()
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    torch.save(theirs.state_dict(), tmp_path / "hub" / "hub" / "checkpoints" / url.rpartition("/")[2])
    taught = load_teacher("torchvision/squeezenet1_1", [str(i) for i in range(1000)])
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(taught(x), theirs.eval()(x))
    assert not any(p.requires_grad for p in taught.parameters())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_averaged_weights(tree: Path, tmp_path: Path, precision: str) -> None:
    """The average of a run of one step an epoch is that of its weights written out, and stays so after a resume."""
    out, decay = tmp_path / "run", 0.25
    more = ["--recipe", "efficient", "--precision", precision, "--batch-size", "24", "--ema", str(decay)]
    average = None
    for epochs in (1, 2, 3):
        resume = ["--resume"] if epochs > 1 else []
        assert train(tree, out, *more, "--epochs", str(epochs), "--warmup-epochs", "0", *resume) == 0
        state = torch.load(out / "last.pt", weights_only=True)
        weight = state["model"]["layer1.0.conv1.weight"].double()
        average = weight if average is None else decay * average + (1 - decay) * weight
        assert state["ema"]["layer1.0.conv1.weight"].dtype == torch.float32
        error = (state["ema"]["layer1.0.conv1.weight"].double() - average).norm() / average.norm()
        assert error < 1e-6


def test_small_data_and_cpus_change_the_recipe_and_say_so() -> None:
    """A data set smaller than the batch is never zero steps."""
    recipe, notes = resolve("efficient", "imagenet", {}, train_images=1000, device="cpu")
    assert recipe.batch_size == fit_batch(1024, 1000) == 64
    assert recipe.precision == "fp32"
    assert len(notes) == 2
    assert "several times slower than fp32" in notes[1]
    recipe, notes = resolve("efficient", "imagenet", {"precision": "fp16"}, train_images=1000, device="cpu")
    assert recipe.precision == "fp16"
    with pytest.raises(RecipeError, match="no step would run"):
        resolve("baseline", "imagenet", {"batch_size": 65}, train_images=64, device="cpu")


# ---- ablations ----


def ablation_lines(table: str, *more: str) -> dict[str, Recipe]:
    """The recipe of each line as it would run on ImageNet, after the command line."""
    found = {}
    for job in ablation.plan(Path("out"), table, 1, "resnet50d", None, more):
        args = cli.parser().parse_args(["train", "--data", "x", *job.options])
        given = command.given_fields(args)
        found[job.arm], _ = resolve(args.recipe, "imagenet", given, train_images=1_281_167, device="cuda")
    return found


def test_the_lines_of_the_tables() -> None:
    """Each line of the stacked tables differs from the one above in its trick alone."""
    fields = {
        "+ warmup": {"warmup_epochs"},
        "+ zero gamma": {"zero_gamma"},
        "+ no bias decay": {"no_bias_decay"},
        "+ fp16": {"precision"},
        "+ cosine": {"schedule"},
        "+ label smoothing": {"label_smoothing"},
        "+ distillation": {"teacher"},
        "+ mixup": {"mixup"},
    }
    for table, before_first in (("efficient", "+ linear scaling"), ("refinements", "efficient")):
        lines = ablation_lines(table)
        names = [name for name in lines if name != ablation.TEACHER]
        for above, name in pairwise(names[names.index(before_first) :]):
            a, b = lines[above].model_dump(), lines[name].model_dump()
            assert {field for field in a if a[field] != b[field]} == fields[name], name
    stacked = ablation_lines("efficient")
    assert stacked["+ fp16"] == resolve("efficient", "imagenet", {}, train_images=1_281_167, device="cuda")[0]
    assert stacked["baseline"] == resolve("baseline", "imagenet", {}, train_images=1_281_167, device="cuda")[0]
    refined = ablation_lines("refinements")
    full = resolve(
        "refined", "imagenet", {"teacher": refined["+ mixup"].teacher}, train_images=1_281_167, device="cuda"
    )[0]
    assert refined["+ mixup"].model_dump(exclude={"recipe"}) == full.model_dump(exclude={"recipe"})
    assert [r.model for r in ablation_lines("tweaks").values()] == [f"resnet50{letter}" for letter in "abcd"]
    sizes = {name: (r.model, r.image_size) for name, r in ablation_lines("models").items()}
    assert sizes["inception_v3, efficient"] == ("inception_v3", 299)


def two_lines(table: str, model: str, teacher: str) -> dict[str, list[str]]:
    """Stands for the lines of a table: a run is a process of its own, which takes seconds to start."""
    return {letter: ["--recipe", "efficient", "--model", model + letter] for letter in "bd"}


@pytest.mark.long
def test_an_ablation_runs_resumes_and_reports(
    tree: Path, tmp_path: Path, capsys: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "arms", two_lines)
    out = tmp_path / "ablation"
    start = ["ablate", "tweaks", "--out", str(out), "--model", "resnet18"]
    more = ["--data", str(tree), *SMALL[2:], "--epochs", "1", "--batch-size", "8"]
    assert cli.main([*start, "--seeds", "1", *more, "--dry-run"]) == 0
    assert "2 runs to do" in capsys.readouterr().out
    assert not out.exists()
    assert cli.main([*start, "--seeds", "1", *more, "--jobs", "2"]) == 0
    told = capsys.readouterr().out
    assert "2/2" in told
    with (out / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["arm"] for row in table] == ["b", "d"]
    assert table[1]["top1"] == rows(out / "d" / "seed-0")[-1]["val_top1"]
    # What has finished is kept, what is missing runs.
    kept = (out / "b" / "seed-0" / "last.pt").stat().st_mtime_ns
    shutil.rmtree(out / "d")
    assert cli.main([*start, "--seeds", "1", *more, "--dry-run"]) == 0
    assert "1 runs to do: about" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*start, "--seeds", "1", *more]) == 0
    assert (out / "b" / "seed-0" / "last.pt").stat().st_mtime_ns == kept
    assert cli.main(["report", str(out)]) == 0
    assert Image.open(out / "curves.png").size[0] > 500
    # Other options are another ablation; what the ablation sets is refused.
    assert cli.main([*start, *more, "--epochs", "2"]) == 1
    assert "holds an ablation of other options" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*start, *more, "--seed", "3"])
    assert "--seed: fasttricks ablate sets it" in capsys.readouterr().err


def test_a_failed_line_of_an_ablation_is_named(
    tree: Path, tmp_path: Path, capsys: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "arms", lambda *_: {"first line": ["--batch-size", "1000"]})
    more = ["--out", str(tmp_path / "ablation"), "--seeds", "1", "--data", str(tree)]
    assert cli.main(["ablate", "tweaks", *more]) == 1
    told = capsys.readouterr()
    assert "first line, seed 0: failed (1): fasttricks train: --batch-size 1000 is larger" in told.out
    assert "1 of 1 runs failed" in told.err


def test_spread() -> None:
    assert ablation.spread([1.0, 2.0, 4.0]) == "2.33 ± 1.53"
    assert ablation.spread([1.0]) == "1.00"


# ---- configurations and previews ----


def test_a_configuration_with_overrides(tree: Path, tmp_path: Path, capsys: object) -> None:
    """Options from a file, the command line above it; the saved configuration gives the run again, bit for bit."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"data: {tree}\nmodel: resnet18d\nwidth: 4\nimage_size: 32\naugment: digits\nlr: 5e-2\nbatch-size: 8\n"
        "bias_decay: true\nlinear_lr: false\nlabel_smoothing: 0.1\nworkers: null\nepochs: 9\n"
    )
    assert cli.main(["train", "--config", str(path), "--epochs", "2", "--out", str(tmp_path / "a")]) == 0
    recipe = json.loads((tmp_path / "a" / "recipe.json").read_text())
    assert (recipe["epochs"], recipe["lr"], recipe["linear_lr"], recipe["no_bias_decay"]) == (2, 0.05, False, False)
    saved = str(tmp_path / "a" / "config.yaml")
    assert cli.main(["train", "--out", str(tmp_path / "b"), "--config", saved]) == 0
    assert json.loads((tmp_path / "b" / "recipe.json").read_text()) == recipe
    first, again = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("a", "b"))
    assert same(first["model"], again["model"])
    assert same(first["optimizer"], again["optimizer"])

    def refused_config(text: str) -> str:
        path.write_text(text)
        return refused(capsys, "--config", path)

    assert "expected a mapping" in refused_config("- 1")
    assert "is no YAML" in refused_config("a: [")
    assert "lr: expected one value" in refused_config("lr: [1, 2]")
    assert "No such file" in refused(capsys, "--config", tmp_path / "none.yaml")
    path.write_text("learning_rate: 1")
    with pytest.raises(SystemExit):
        cli.main(["train", "--config", str(path), "--data", str(tree)])
    assert "--learning-rate=1" in capsys.readouterr().err


def test_dry_run(tree: Path, tmp_path: Path, capsys: object) -> None:
    out = tmp_path / "run"
    more = ["--epochs", "8", "--batch-size", "8", "--warmup-epochs", "1"]
    assert train(tree, out, *more, "--dry-run") == 0
    told = " ".join(capsys.readouterr().out.split())
    model = models.build("resnet18d", 3, width=4)
    assert f"parameters {sum(p.numel() for p in model.parameters()):,}" in told
    assert "3 an epoch, 24 in 8 epochs" in told
    assert not out.exists()
    recipe = Recipe(model="resnet50d")
    assert preview.multiply_adds(recipe, 1000) == 4_328_824_832
    assert preview.curve([0.0, 0.5, 1.0, 0.5, 0.0]) == "▁▅█▅▁"
    assert preview.curve([1.0] * 1000, 4) == "████"


def test_the_learning_rates_of_the_preview_are_those_of_the_run(tree: Path, tmp_path: Path) -> None:
    """Each step's, across a warmup that ends within an epoch."""
    steps: list[float] = []
    told: list[list[float]] = []

    class Watched(loop.Trainer):
        def fit(self) -> list[dict[str, Any]]:
            told.append(self.learning_rates())
            return super().fit()

        def _step(self, *batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            steps.append(self.optimizer.param_groups[0]["lr"])
            return super()._step(*batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "Trainer", Watched)
        more = ["--epochs", "4", "--batch-size", "8", "--warmup-epochs", "0.67", "--schedule", "cosine"]
        assert train(tree, tmp_path / "run", *more) == 0
    assert steps == pytest.approx(told[0], rel=1e-12)
    assert len(set(steps)) > 6
