"""Checkpoints: a resumed run continues bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
from train_runs import SMALL, refused, rows, same, train, write_tree

from fasttricks.train import checkpoint

pytestmark = pytest.mark.filterwarnings("always::fasttricks.train.data.DataWarning")


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


def test_checkpoints_of_something_else(tree: Path, tmp_path: Path, capsys: object) -> None:
    out = tmp_path / "run"
    assert train(tree, out, "--epochs", "1", "--batch-size", "8") == 0
    base = ["--data", tree, "--out", out, "--epochs", "2", "--batch-size", "8", "--image-size", "32"]
    assert "already holds a run" in refused(capsys, *base, *SMALL)
    printed = refused(capsys, *base, "--resume", "--model", "resnet34d", "--width", "4")
    assert "is a checkpoint of model 'resnet18d', this run has 'resnet34d'" in printed
    before = (out / "last.pt").read_bytes()
    (out / "last.pt").write_bytes(before[: len(before) // 2])
    assert "cannot be read as a checkpoint" in refused(capsys, *base, *SMALL, "--resume")
    other = write_tree(tmp_path / "other", ("cat", "dog"))
    (out / "last.pt").write_bytes(before)
    assert "was trained on 3 classes" in refused(capsys, "--data", other, *base[2:], *SMALL, "--resume")
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    assert "is not a checkpoint of this trainer" in refused(capsys, *base, *SMALL, "--resume", tmp_path / "foreign.pt")


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
