"""The trainer end to end on tiny image trees: what a run writes, precisions, averaged weights, bad settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
from PIL import Image
from train_runs import SMALL, refused, rows, train, write_tree

from fasttricks.train import cli

pytestmark = pytest.mark.filterwarnings("always::fasttricks.train.images.DataWarning")


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
    files = ["--png", str(tmp_path / "curves.png"), "--html", str(tmp_path / "report.html")]
    assert cli.main(["report", str(out), str(out), *files]) == 0
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


def test_bad_settings(tree: Path, tmp_path: Path, capsys: object) -> None:
    base = ["--data", tree, "--out", tmp_path / "run", *SMALL]
    assert "--lr nan" in refused(capsys, *base, "--lr", "nan")
    assert "--momentum -1.0" in refused(capsys, *base, "--momentum", "-1")
    assert "larger than the training set of 24 images" in refused(capsys, *base, "--batch-size", "25")
    assert "cannot be divided into at least 2 images" in refused(capsys, *base, "--batch-size", "1")
    assert "'resnet19' is unknown" in refused(capsys, *base[:4], "--model", "resnet19", "--batch-size", "8")
    assert "no checkpoint at" in refused(capsys, *base, "--resume", tmp_path / "none.pt")
    (tmp_path / "file").write_text("")
    assert "File exists" in refused(capsys, *base[:2], "--out", tmp_path / "file", *SMALL, "--batch-size", "8")
    small = ["--model", "torchvision/alexnet", "--image-size", "32", "--batch-size", "8"]
    assert "does not take images of 32x32" in refused(capsys, *base[:4], *small)
    if not torch.cuda.is_available():
        assert "torch sees no CUDA device" in refused(capsys, *base, "--device", "cuda")
