"""The benchmarks for GPUs run from end to end at tiny sizes on the CPU; no speed is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.long
def test_card_benchmark_runs_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "card.py"), "--device", "cpu", "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert {row["op"] for row in rows} == {"bn_relu", "bn_add_relu", "avgpool_conv1x1", "sgd", "training step"}
    for case in {(row["op"], row["case"]) for row in rows}:
        assert {"eager", "cpu"} <= {row["side"] for row in rows if (row["op"], row["case"]) == case}
    assert all(row["ms"] > 0 for row in rows)
    assert (tmp_path / "cpu.png").stat().st_size > 10_000


def test_gpu_script_without_a_gpu_says_so() -> None:
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu.sh"), "/dev/null/never"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 1
    assert "finds no GPU" in done.stdout
