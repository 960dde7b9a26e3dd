"""kill -9 at random moments: the resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
import train_kills
from train_runs import SMALL, differences

KILLS = 20


@pytest.mark.long
def test_kills_at_random_moments(tree: Path, tmp_path: Path) -> None:
    """With half precision, a loss scale, warmup, mixup, averages, accumulation, and checkpoints in mid-epoch."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["--data", str(tree), *SMALL, "--recipe", "refined", "--precision", "fp16", "--ema", "0.9", "--epochs"]
    options += ["20", "--warmup-epochs", "2.5", "--batch-size", "4", "--accumulate", "2", "--save-every", "1"]
    arguments = [sys.executable, train_kills.__file__, str(whole), str(cut), str(KILLS), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(arguments, capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr[-3000:]
    kills = re.fullmatch(r"(\d+) kills, (\d+) of them while a checkpoint was written\n", ran.stdout)
    assert kills is not None, ran.stdout
    assert int(kills[1]) == KILLS
    assert int(kills[2]) > 0
    assert differences(whole, cut) == []
    assert not [path for path in cut.iterdir() if path.name.startswith(".")]  # no half-written file is left
