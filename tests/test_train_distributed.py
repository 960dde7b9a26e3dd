"""The trainer under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
from train_runs import SMALL, rows

pytestmark = pytest.mark.filterwarnings("always::fasttricks.train.data.DataWarning")


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
