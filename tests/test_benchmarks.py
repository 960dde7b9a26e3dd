"""The benchmarks for GPUs run from end to end at tiny sizes on the CPU; no speed is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import card
import predict
import pytest
import torch

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


def on_card(monkeypatch: pytest.MonkeyPatch, name: str) -> card.Predictor:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name=name))
    return card.Predictor(torch.device("cuda"))


def test_rows_of_a_card_have_the_prediction_beside_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = on_card(monkeypatch, "NVIDIA H100 80GB HBM3")
    assert predictor.why_not == ""
    with torch.device("meta"):
        x = torch.empty(256, 512, 7, 7, dtype=torch.float16)
    formula = predictor.bn(x, "NHWC", add=False)["cuda"]
    assert (formula.moved, formula.launches) == (5 * 2 * x.numel(), 3)  # one launch each, and the running statistics
    launches = sum(predict.Machine(predict.LIMITS["h100"], True).bn_launches(tuple(x.shape), False), ())
    assert formula.seconds == sum(one.seconds for one in launches)
    sgd = predictor.sgd(half=True)["cuda"]
    assert (sgd.moved, sgd.launches) == (24 * card.bench_sgd.COUNT, 2)
    pool = predictor.avgpool_conv1x1(torch.empty(256, 256, 56, 56, dtype=torch.float16, device="meta"), "NHWC", 512)
    assert pool["cuda"].launches == 4

    sides = card.of_sides(card.bn_formula(x, add=False), {"cuda": formula})
    row = card.row_of("bn_relu", "case", "cuda", 50e-6, 100e-6, 3e12, sides["cuda"])
    assert asdict(row) == {
        **{"op": "bn_relu", "case": "case", "side": "cuda", "ms": 0.05, "against_eager": 2.0},
        "copy_ms": pytest.approx(1e3 * (10 * x.numel() / 3e12 + 3 * card.LAUNCH)),
        "of_copy": pytest.approx(10 * x.numel() / 50e-6 / 3e12),
        "predicted_ms": 1e3 * formula.seconds,
    }
    assert f"{row.predicted_ms:.3f} ms predicted" in card.line(row)
    assert card.row_of("bn_relu", "case", "triton", 1.0, 1.0, 3e12, sides["triton"]).predicted_ms is None
    assert card.row_of("bn_relu", "case", "eager", 1.0, 1.0, 3e12, None).of_copy is None


def test_a_card_without_published_limits_is_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = on_card(monkeypatch, "Tesla V100-SXM2-16GB")
    assert "accepted: a100, h100, b200, l40s" in predictor.why_not
    assert predictor.bn(torch.empty(2, 8, 4, 4), "NCHW", add=True) == {}


def test_gpu_script_without_a_gpu_says_so() -> None:
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu.sh"), "/dev/null/never"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 1
    assert "finds no GPU" in done.stdout
