"""What goes wrong during a run: losses that are not finite, and data workers that die."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from signal import Signals

import pytest

pytest.importorskip("torchvision")
from PIL import Image
from torch.utils.data import get_worker_info
from train_runs import SMALL, refused, train

from fasttricks.train import data

pytestmark = pytest.mark.filterwarnings("always::fasttricks.train.data.DataWarning")


def test_divergence_stops_and_keeps_the_last_good_epoch(tree: Path, tmp_path: Path, capsys: object) -> None:
    """A loss that is not finite ends the run; best.pt stays that of a good epoch."""
    out = tmp_path / "run"
    assert train(tree, out, "--epochs", "1", "--batch-size", "8", "--recipe", "baseline") == 0
    best = (out / "best.pt").read_bytes()
    more = ["--epochs", "3", "--batch-size", "8", "--recipe", "baseline", "--lr", "1e30", "--resume"]
    assert train(tree, out, *more) == 1
    printed = capsys.readouterr().err
    assert "not finite" in printed
    assert "holds epoch 1" in printed
    assert (out / "best.pt").read_bytes() == best


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
    printed = refused(capsys, "--data", tree, "--out", tmp_path / "run", *SMALL, "--workers", "1")
    assert "a worker that reads images died" in printed
    assert "--workers 0" in printed
    assert "/dev/shm" in printed
    assert len([line for line in printed.splitlines() if line.startswith("fasttricks train:")]) == 1
