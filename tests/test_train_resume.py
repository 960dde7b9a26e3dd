"""Checkpoints: a resumed run continues bit for bit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
from train_runs import SMALL, differences, refused, rows, train, write_tree

from fasttricks.train import checkpoint, cli, loop

pytestmark = pytest.mark.filterwarnings("always::fasttricks.train.images.DataWarning")


class Cut(Exception):
    """Stands for the end of the process."""


def interrupted(tree: Path, out: Path, after: int, *more: str) -> None:
    """A run that ends right after the checkpoint of this step."""
    save = loop.Trainer._save

    def save_and_end(self: loop.Trainer, best: bool = False) -> None:
        save(self, best)
        if self.step == after:
            raise Cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_save", save_and_end)
        with pytest.raises(Cut):
            train(tree, out, *more)


REFINED = ["--recipe", "refined", "--epochs", "4", "--warmup-epochs", "2.5", "--batch-size", "4", "--ema", "0.9"]


@pytest.mark.parametrize(
    ("more", "after"),
    [
        (["--precision", "fp32"], 12),  # of 24 steps, 6 per epoch: between epochs
        (["--precision", "fp16"], 12),
        (["--precision", "fp32"], 8),  # within an epoch and the warmup
        (["--precision", "fp16", "--accumulate", "2"], 4),
        (["--precision", "fp32", "--no-fused"], 18),  # after the last step of an epoch, before its validation
        (["--precision", "fp32", "--model", "nin", "--width", "8", "--image-size", "64"], 7),  # dropout
    ],
    ids=lambda value: str(value) if isinstance(value, int) else " ".join(value[1:]),
)
def test_resume_continues_bit_for_bit(tree: Path, tmp_path: Path, more: list[str], after: int) -> None:
    """Weights, optimizer, schedule, loss scale, average, generators and log are those of the uninterrupted run."""
    options = [*REFINED, *more]
    assert train(tree, tmp_path / "whole", *options) == 0
    interrupted(tree, tmp_path / "cut", after, *options, "--save-every", str(after))
    assert train(tree, tmp_path / "cut", *options, "--resume") == 0
    assert differences(tmp_path / "whole", tmp_path / "cut") == []


def test_workers_change_nothing(tree: Path, tmp_path: Path) -> None:
    """Neither the results nor those of a run that resumes in the middle of an epoch; a bad file is still counted."""
    (tree / "train" / "cat" / "5.png").write_bytes(b"no image")
    options = [*REFINED, "--save-every", "4"]
    assert train(tree, tmp_path / "none", *options) == 0
    interrupted(tree, tmp_path / "cut", 8, *options, "--workers", "1")
    assert train(tree, tmp_path / "cut", *options, "--workers", "2", "--resume") == 0
    assert differences(tmp_path / "none", tmp_path / "cut") == []
    assert [row["bad_files"] for row in rows(tmp_path / "cut")] == ["1"] * 4


def test_the_middle_of_an_epoch_has_the_same_steps(tree: Path, tmp_path: Path, capsys: object) -> None:
    options = [*REFINED, "--save-every", "4"]
    interrupted(tree, tmp_path / "run", 8, *options)
    base = ["--data", tree, "--out", tmp_path / "run", *SMALL, *options, "--resume"]
    assert "in the middle of an epoch with batch_size 4, this run has 8" in refused(capsys, *base, "--batch-size", "8")
    assert "in the middle of an epoch with seed 0, this run has 1" in refused(capsys, *base, "--seed", "1")


def test_a_run_without_a_checkpoint_starts_again(tree: Path, tmp_path: Path, capsys: object) -> None:
    """Where it was started; elsewhere, --resume is an error."""
    base = ["--data", tree, "--out", tmp_path / "run", *SMALL, "--batch-size", "8", "--epochs", "1", "--resume"]
    assert "no checkpoint at" in refused(capsys, *base)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "config.yaml").write_text("")
    assert cli.main(["train", *map(str, base)]) == 0


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
    (tmp_path / "text.pt").write_text("import torch\n")
    torch.save(torch.nn.ReLU(), tmp_path / "module.pt")
    (tmp_path / "empty.pt").touch()
    for name in ("text", "module", "empty"):
        printed = refused(capsys, *base, *SMALL, "--resume", tmp_path / f"{name}.pt")
        last = printed.strip().splitlines()[-1]
        assert re.search(rf"--resume: .*{name}\.pt cannot be read as a checkpoint: (it is no file|it ends)", last), (
            printed
        )
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    assert "is not a checkpoint of this trainer" in refused(capsys, *base, *SMALL, "--resume", tmp_path / "foreign.pt")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"format": 1})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(checkpoint.CheckpointError, match="disk full; the previous file is unchanged"):
        checkpoint.save(path, {"format": 2})
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"format": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
