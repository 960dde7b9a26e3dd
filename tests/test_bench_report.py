"""Benchmarks that run at tiny sizes, and tables and pictures of their results; no speed is asserted."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measured
import pictures
import pytest
import report
import sides
import torch
from PIL import Image
from torch import nn


class Benchmark:
    """Stands in for the fixture of pytest-benchmark, which measures nothing under pytest-xdist."""

    name = "case"

    def __init__(self) -> None:
        self.extra_info: dict[str, float] = {}

    def pedantic(self, function: Callable[[], Any], setup: Callable[[], Any], rounds: int, iterations: int) -> None:
        data = []
        for _ in range(rounds):
            setup()
            start = time.perf_counter()
            function()
            data.append(time.perf_counter() - start)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=data))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Few rounds, small inputs; the number of threads is put back."""
    monkeypatch.setattr(sides, "MOST_ROUNDS", 3)
    monkeypatch.setattr(sides, "last_level_cache", lambda: 1 << 16)
    threads = torch.get_num_threads()
    yield Benchmark()
    torch.set_num_threads(threads)


# -- sides.py


class Slow(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x.relu()


def test_a_case_records_every_figure(bench: Benchmark) -> None:
    def draw() -> sides.Inputs:
        return [torch.randn(64, 64, requires_grad=True)], torch.randn(64, 64)

    peers = {"eager": Slow(0.02), "other": Slow(0.0)}
    found = sides.compare(bench, Slow(0.002), peers, draw, rounds=3, moved=10**6, flops=10**7)
    assert found["eager"] > found["other"]
    info = bench.extra_info
    assert info["eager"] == found["eager"] > 1
    best = min(bench.stats.stats.data)
    assert info["gb_s"] == pytest.approx(1e-3 / best)
    assert info["gflop_s"] == pytest.approx(1e-2 / best)
    assert info["of_copy"] == pytest.approx(info["gb_s"] / info["copy_gb_s"])
    assert info["matmul_gflop_s"] > 0
    assert info["saved_mb"] == info["peer_saved_mb"] == pytest.approx(4 * 64 * 64 / 1e6)


def test_saved_bytes_are_those_of_activations() -> None:
    linear = nn.Linear(8, 4)
    x = torch.randn(16, 8)
    assert sides.saved_bytes(lambda: linear(x)) == 4 * 16 * 8
    x.requires_grad_()
    assert sides.saved_bytes(lambda: linear(x)) == 4 * (16 * 8 + 8 * 4)
    assert sides.saved_bytes(lambda: linear(x), tuple(linear.parameters())) == 4 * 16 * 8


def test_peak_bytes_are_what_lives_at_a_time() -> None:
    def call() -> None:
        a = torch.empty(1000, dtype=torch.uint8)
        b = torch.empty(3000, dtype=torch.uint8)
        del a
        c = torch.empty(500, dtype=torch.uint8)
        del b, c

    assert sides.peak_bytes(call) == 4000


def test_sets_of_inputs_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "last_level_cache", lambda: 100)
    made = iter(range(1000))
    following = sides.cold(lambda: next(made), size=40)
    assert [following() for _ in range(11)] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]


# -- each benchmark that reports, once


def small(monkeypatch: pytest.MonkeyPatch, name: str, **values: Any) -> Any:
    module = importlib.import_module(name)
    for key, value in values.items():
        monkeypatch.setattr(module, key, value)
    return module


@pytest.mark.parametrize("op", ["bn_relu", "bn_add_relu", "avgpool_conv1x1", "FusedSGD.step"])
def test_scaling_runs(bench: Benchmark, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    base = {"batch": 2, "channels": 4, "size": 5, "parameters": 200, "threads": 1}
    small(monkeypatch, "bench_scaling", BASE=base, ROUNDS=2).test_scaling(bench, op, "threads", 2)
    assert bench.extra_info["eager"] > 0
    assert torch.get_num_threads() == 2


def test_operators_run(bench: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module: module)  # whose compiler takes seconds
    bn = small(monkeypatch, "bench_bn_relu", BATCH=2, ROUNDS=2)
    two = small(monkeypatch, "bench_bn_add_bn_relu", ROUNDS=2)
    pool = small(monkeypatch, "bench_avgpool_conv1x1", BATCH=2, ROUNDS=2)
    for run in (
        lambda: bn.test_bn_relu(bench, 4, 5, "NHWC"),
        lambda: bn.test_bn_add_relu(bench, 4, 5, "NCHW"),
        lambda: bn.test_network(bench, "any", 4, 5, 2, "bfloat16", "NHWC"),
        lambda: bn.test_block_end(bench, 4, 5, 2, "float32", "NCHW"),
        lambda: two.test_bn_add_bn_relu(bench, 4, 5, "NCHW"),
        lambda: pool.test_forward_backward(bench, 4, 6, 5, "NHWC"),
    ):
        bench.extra_info.clear()
        run()
        assert bench.extra_info["of_copy"] > 0
    if bn.BatchNormAct2d is not None:
        assert len(bn.ratios["timm"]) == 1


def test_optimizers_run(bench: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    sgd = small(monkeypatch, "bench_sgd", SHAPES=[(8, 4), (8,)], COUNT=40, ROUNDS=2)
    sgd.test_fp16(bench)
    assert {"eager", "in_place", "of_copy", "gflop_s"} <= bench.extra_info.keys()
    sgd.test_fp32(bench)
    assert bench.extra_info["torch_fused"] > 0


def test_whole_networks_run(bench: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = {"eager": (False, None), "other": (True, None)}  # no compiler, which takes minutes
    steps = small(monkeypatch, "bench_train_step", SIDES=peers, SMALL_BATCH=2, SMALL_IMAGE=32, SMALL_ROUNDS=2)
    steps.test_network(bench, "mobilenet_v1", "bfloat16")
    assert {"eager", "other", "saved_mb", "peer_saved_mb", "peak_mb"} <= bench.extra_info.keys()
    models = small(monkeypatch, "bench_models", ROUNDS=2)
    models.test_model(bench, "torchvision/mnasnet1_0", 32)
    assert len(models.MODELS) == len(set(models.MODELS)) == 20


@pytest.mark.long
def test_compiled_networks_run(bench: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = small(monkeypatch, "bench_train_step", SMALL_BATCH=2, SMALL_IMAGE=32, SMALL_ROUNDS=2)
    steps.test_network(bench, "resnet18d", "float32")
    assert set(steps.SIDES) <= bench.extra_info.keys()


# -- report.py


@pytest.mark.parametrize("power", [-1.0, 0.5, 2.0])
def test_the_fit_recovers_a_known_exponent(power: float) -> None:
    values = [1, 2, 4, 16]
    assert measured.exponent(values, [3 * n**power for n in values]) == pytest.approx(power)


BOTH = {"eager": 2.0, "median": 1.9, "spread": 0.03, "saved_mb": 1.0, "peer_saved_mb": 2.5}
ROOFS = {"gb_s": 20.0, "copy_gb_s": 25.0, "of_copy": 0.8, "gflop_s": 40.0, "matmul_gflop_s": 200.0}
CASES = {
    "cpu.json": {
        "bench_bn_relu.py::test_bn_relu[64-112-NCHW]": {**BOTH, **ROOFS, "compiled": 8.0, "timm": 3.0},
        "bench_bn_relu.py::test_bn_relu[64-112-NHWC]": {"eager": 4.5},
        "bench_avgpool_conv1x1.py::test_forward_backward[256-512-56-NHWC]": {**BOTH, **ROOFS, "gflop_s": 150.0},
        "bench_sgd.py::test_fp32": {**BOTH, **ROOFS, "gflop_s": 5.0, "torch_fused": 1.1},
    },
    "cpu-more.json": {
        **{f"bench_scaling.py::test_scaling[bn_relu-batch-{n}]": {"best_ms": 0.5 * n, **BOTH} for n in (1, 4, 16)},
        **{f"bench_scaling.py::test_scaling[bn_relu-threads-{n}]": {"best_ms": 4 / n, **BOTH} for n in (1, 2, 4)},
        "bench_scaling.py::test_scaling[FusedSGD.step-parameters-10000]": {"best_ms": 1.0, **BOTH},
        "bench_scaling.py::test_scaling[FusedSGD.step-parameters-1000000]": {"best_ms": 10.0, **BOTH},
        "bench_train_step.py::test_network[torchvision/resnet50-bfloat16]": {
            **BOTH,
            **{"best_ms": 100.0, "compiled": 4.0, "max_autotune": 1.0, "fused_compiled": 0.5},
        },
        "bench_models.py::test_model[timm/dla34-96]": {**BOTH, "median": 1.2},
        "bench_models.py::test_model[timm/resnet50d-224]": {**BOTH, "median": 0.97},
        "bench_bn_relu.py::test_network[MobileNet-32-112-8-float32-NCHW]": BOTH,
        "bench_bn_relu.py::test_network[MobileNet-64-112-8-float32-NHWC]": {**BOTH, "eager": 8.0},
        "bench_bn_relu.py::test_block_end[256-56-1-bfloat16-NHWC]": BOTH,
    },
}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with results as make bench-all writes them."""
    for name, cases in CASES.items():
        machine = {"processor": "EPIC 1000", "cores": 3, "torch": "2.14", "isa": "avx2"}
        whole = {case: {"best_ms": 1.0, **figures} for case, figures in cases.items()}
        (tmp_path / name).write_text(json.dumps({"machine": machine, "cases": whole}))
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.usefixtures("results")
def test_tables_have_the_figures_of_the_results() -> None:
    assert "3 cores of an EPIC 1000 (avx2)" in report.speed_table()
    assert "| `bn_relu` | eager `relu(bn(x))` | 2 | 3.00x | 2.00x to 4.50x |" in report.speed_table()
    header, _, first, second, _ = report.case_table().splitlines()
    assert "by medians | against `torch.compile` | against timm | of a copy's bandwidth | saved" in header
    assert first.endswith("| 1.00 | 3% | 2.00x | 1.90x | 8.00x | 3.00x | 80% | 1.0 / 2.5 |")
    assert second.endswith("NHWC | 1.00 |  | 4.50x |  |  |  |  |  |")
    network = report.network_table().splitlines()[-1]
    assert network == ("| torchvision/resnet50 | bfloat16 | 200 | 0.50x | 2.00x | 2.00x | 4.00x | 3% | 1.0 / 2.5 |")
    *_, slowest, fastest = report.model_table().splitlines()
    assert "More than 2% slower than unfused: 1 of 2." in report.model_table()
    assert slowest.startswith("| timm/resnet50d | 224 | 1 | 0.970x |")
    assert fastest.startswith("| timm/dla34 | 96 |")
    batches = report.batch_table()
    assert "| `bn_relu` | MobileNet | float32 |  | 4.00x (2.00x to 8.00x) |" in batches
    assert "| `bn_add_relu` | ResNet-50 | bfloat16 | 2.00x (2.00x to 2.00x) |  |" in batches


@pytest.mark.usefixtures("results")
def test_pictures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "ASSETS", tmp_path / "assets")
    names = pictures.measured_pictures()
    assert names == ["speed.png", "cases.png", "roofline.png", "scaling.png"]
    for name in names:
        pictures.draw(name)
        with Image.open(tmp_path / "assets" / name) as picture:
            assert picture.text["Source"] == measured.digest(pictures.PICTURES[name].result)
    assert "assets/roofline.png" in report.roofline_picture()
    assert "assets/scaling.png" in report.scaling_picture()


def test_points_and_curves_are_those_of_the_results(results: Path) -> None:
    found = measured.roofline()
    assert found is not None
    assert (found.copy, found.matmul) == (25.0, 200.0)
    assert [tuple(point) for point in found.points] == [
        ("bn_relu", 2.0, 40.0, 20.0),
        ("avgpool_conv1x1", 7.5, 150.0, 75.0),
        ("FusedSGD, fp32", 0.25, 5.0, 2.5),
    ]
    by_batch, by_threads, sgd = measured.scaling()
    assert tuple(by_batch) == ("bn_relu", "batch", [1, 4, 16], [0.5, 2.0, 8.0], [1.0, 4.0, 16.0])
    assert measured.exponent(by_batch.values, by_batch.ours) == pytest.approx(1.0)
    assert measured.exponent(by_threads.values, by_threads.eager) == pytest.approx(-1.0)
    assert measured.exponent(sgd.values, sgd.ours) == pytest.approx(0.5)


NEW = ("speed", "cases", "roofline", "scaling", "networks", "models", "batches")


def test_what_is_not_measured_is_said_to_be_missing(results: Path) -> None:
    (results / "cpu-more.json").unlink()
    for name in NEW[3:]:
        assert report.TABLES[name]() == "Not yet measured: `make bench-all`."
    cases = json.loads((results / "cpu.json").read_text())
    for figures in cases["cases"].values():
        for name in ROOFS:
            figures.pop(name, None)
    (results / "cpu.json").write_text(json.dumps(cases))
    assert pictures.measured_pictures() == ["speed.png", "cases.png"]
    (results / "cpu.json").unlink()
    for name in NEW[:3]:
        assert report.TABLES[name]() == "Not yet measured: `make bench`."
    assert pictures.measured_pictures() == []


def test_files_of_pytest_benchmark_become_one_result() -> None:
    def raw(name: str, seconds: float) -> dict[str, Any]:
        stats = {"min": seconds, "median": 2 * seconds}
        case = {"fullname": f"benchmarks/{name}", "stats": stats, "extra_info": {"eager": 1.23456}}
        return {"machine_info": {"cpu": {"brand_raw": "EPIC", "count": 2}}, "benchmarks": [case]}

    result = report.condense(raw("bench_a.py::test_a", 0.5), raw("bench_b.py::test_b", 0.25))
    assert result["machine"]["processor"] == "EPIC"
    assert result["cases"] == {
        "bench_a.py::test_a": {"best_ms": 500.0, "median_ms": 1000.0, "eager": 1.2346},
        "bench_b.py::test_b": {"best_ms": 250.0, "median_ms": 500.0, "eager": 1.2346},
    }


def test_a_part_replaces_its_own_cases_alone(tmp_path: Path) -> None:
    """Of the same machine: figures of another one are not mixed with these."""
    here, elsewhere = {"processor": "EPIC", "cores": 2}, {"processor": "EPIC", "cores": 4}
    target = tmp_path / "cpu-more.json"
    part = {"machine": here, "cases": {"bench_a.py::test_a[2]": {"eager": 2.0}}}
    assert report.with_other_benchmarks(part, target) == part
    of_others = {"bench_b.py::test_b": {"eager": 4.0}}
    target.write_text(json.dumps({"machine": here, "cases": {"bench_a.py::test_a[1]": {"eager": 1.0}, **of_others}}))
    assert report.with_other_benchmarks(part, target) == {"machine": here, "cases": {**of_others, **part["cases"]}}
    part["machine"] = elsewhere
    assert report.with_other_benchmarks(part, target) == part
