"""What the files in benchmarks/results/ say, as the tables and pictures need it.

cpu.json: what `make bench` measures; cpu-more.json: the rest of `make bench-all`. A figure or file may be missing.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CPU, MORE = "cpu.json", "cpu-more.json"
Figures = dict[str, float]


def load(name: str) -> Any:
    """A result file; an empty one if it is not there."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else {}


def digest(name: str) -> str:
    return hashlib.sha256((RESULTS / name).read_bytes()).hexdigest()


def matching(result: str, pattern: str) -> list[tuple[re.Match[str], Figures]]:
    """The cases of a file whose name matches as a whole."""
    cases = load(result).get("cases", {})
    return [(match, figures) for name, figures in cases.items() if (match := re.fullmatch(pattern, name))]


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


# -- cpu.json


class Comparison(NamedTuple):
    """The speedups of one op over one peer, by case."""

    op: str
    peer: str
    ratios: dict[str, float]

    @property
    def mean(self) -> float:
        return geometric_mean(self.ratios.values())


# op, peer, name of the test, figure
COMPARED = (
    ("bn_relu", "eager `relu(bn(x))`", r"bench_bn_relu.py::test_bn_relu\[(.+)\]", "eager"),
    ("bn_relu", "`torch.compile` of it", r"bench_bn_relu.py::test_bn_relu\[(.+)\]", "compiled"),
    ("bn_relu", "timm's `BatchNormAct2d`", r"bench_bn_relu.py::test_bn_relu\[(.+)\]", "timm"),
    ("bn_add_relu", "eager `relu(bn(x) + residual)`", r"bench_bn_relu.py::test_bn_add_relu\[(.+)\]", "eager"),
    ("bn_add_relu", "`torch.compile` of it", r"bench_bn_relu.py::test_bn_add_relu\[(.+)\]", "compiled"),
    ("bn_add_bn_relu", "eager `relu(bn(x) + bn(r))`", r"bench_bn_add_bn_relu.py::test_bn_add_bn_relu\[(.+)\]", "eager"),
    ("bn_add_bn_relu", "`torch.compile` of it", r"bench_bn_add_bn_relu.py::test_bn_add_bn_relu\[(.+)\]", "compiled"),
    (
        *("avgpool_conv1x1", "eager `conv2d(avg_pool2d(x))`"),
        *(r"bench_avgpool_conv1x1.py::test_forward_backward\[(.+)\]", "eager"),
    ),
    (
        *("FusedSGD, LossScaler, fp16", "eager unscale, check, SGD(foreach=True), copy"),
        *(r"bench_sgd.py::test_(fp16)", "eager"),
    ),
    ("FusedSGD, fp32", "`torch.optim.SGD(fused=True)`", r"bench_sgd.py::test_(fp32)", "torch_fused"),
    *(
        (
            *(f"training step, ResNet-50-D, {layout}", "eager modules, `torch.optim.SGD`"),
            *(rf"bench_train_step.py::test_step\[({layout})\]", "eager"),
        )
        for layout in ("NCHW", "NHWC")
    ),
)


def comparisons() -> list[Comparison]:
    """Those of COMPARED that were measured."""
    found = []
    for op, peer, pattern, figure in COMPARED:
        ratios = {match[1]: figures[figure] for match, figures in matching(CPU, pattern) if figure in figures}
        if ratios:
            found.append(Comparison(op, peer, ratios))
    return found


class Case(NamedTuple):
    """One shape of an op, and its figures (see sides.measure)."""

    op: str
    channels: list[str]
    size: str
    layout: str
    figures: Figures


def cases() -> list[Case]:
    """Every shape of the BatchNorm ops and of avgpool_conv1x1."""
    found = []
    tests = "bn_relu|bn_add_relu|bn_add_bn_relu|forward_backward"
    for match, figures in matching(CPU, rf"bench_\w+\.py::test_({tests})\[(.+)-(NCHW|NHWC)\]"):
        *channels, size = match[2].split("-")
        op = "avgpool_conv1x1" if match[1] == "forward_backward" else match[1]
        found.append(Case(op, channels, size, match[3], figures))
    return found


class Point(NamedTuple):
    """Of a roofline: FLOP per byte of the formula, and GFLOP/s of ours and of eager torch."""

    op: str
    intensity: float
    ours: float
    eager: float


class Roofline(NamedTuple):
    """GB/s of a copy and GFLOP/s of a product of matrices, by medians over the cases."""

    copy: float
    matmul: float
    points: list[Point]


def roofline() -> Roofline | None:
    """Of the cases that have the figures for it."""
    named = [(case.op, case.figures) for case in cases()]
    named += [(f"FusedSGD, {m[1]}", figures) for m, figures in matching(CPU, r"bench_sgd\.py::test_(fp\d+)")]
    whole = [(op, f) for op, f in named if {"gb_s", "gflop_s", "copy_gb_s", "matmul_gflop_s"} <= f.keys()]
    if not whole:
        return None
    points = [Point(op, f["gflop_s"] / f["gb_s"], f["gflop_s"], f["gflop_s"] / f["eager"]) for op, f in whole]
    copy, matmul = (statistics.median(f[name] for _, f in whole) for name in ("copy_gb_s", "matmul_gflop_s"))
    return Roofline(copy, matmul, points)


# -- cpu-more.json


class Curve(NamedTuple):
    """Milliseconds of an op, ours and eager torch's, at the values of one axis."""

    op: str
    axis: str
    values: list[int]
    ours: list[float]
    eager: list[float]


def scaling() -> list[Curve]:
    curves: dict[tuple[str, str], Curve] = {}
    for match, figures in matching(MORE, r"bench_scaling\.py::test_scaling\[([\w.]+)-(\w+)-(\d+)\]"):
        op, axis, value = match.groups()
        curve = curves.setdefault((op, axis), Curve(op, axis, [], [], []))
        curve.values.append(int(value))
        curve.ours.append(figures["best_ms"])
        curve.eager.append(figures["best_ms"] * figures["eager"])
    return list(curves.values())


def exponent(values: Sequence[float], times: Sequence[float]) -> float:
    """Of the power of the value that fits the times best, by least squares of their logarithms."""
    return statistics.linear_regression([math.log(v) for v in values], [math.log(t) for t in times]).slope


def networks() -> list[tuple[str, str, Figures]]:
    """Name, dtype and figures of each training step of a whole network."""
    found = matching(MORE, r"bench_train_step\.py::test_network\[(.+)-(float32|bfloat16)\]")
    return [(match[1], match[2], figures) for match, figures in found]


def models() -> list[tuple[str, int, Figures]]:
    """Name, pixels and figures of the models that were fused, the slowest against unfused first."""
    found = matching(MORE, r"bench_models\.py::test_model\[(.+)-(\d+)\]")
    return sorted(((m[1], int(m[2]), figures) for m, figures in found), key=lambda row: row[2]["median"])


def batches() -> dict[tuple[str, str, str], dict[int, list[float]]]:
    """By op, network and dtype, and then by batch: the ratios to eager torch of the BatchNorms' shapes."""
    found: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    of_network = matching(MORE, r"bench_bn_relu\.py::test_network\[(.+)-\d+-\d+-(\d+)-(\w+)-(?:NCHW|NHWC)\]")
    for match, figures in of_network:
        rows = found.setdefault(("bn_relu", match[1], match[3]), {})
        rows.setdefault(int(match[2]), []).append(figures["eager"])
    of_block = matching(MORE, r"bench_bn_relu\.py::test_block_end\[\d+-\d+-(\d+)-(\w+)-(?:NCHW|NHWC)\]")
    for match, figures in of_block:
        rows = found.setdefault(("bn_add_relu", "ResNet-50", match[2]), {})
        rows.setdefault(int(match[1]), []).append(figures["eager"])
    return found
