"""Condenses benchmark results, and writes the tables and pictures of README.md and docs/.

    python benchmarks/report.py                          rewrites the tables and draws the pictures
    python benchmarks/report.py RAW.json RESULT.json     the same, after condensing a pytest-benchmark file
    python benchmarks/report.py --runs RUN...            the same, after storing the curves of runs in digits.json
    python benchmarks/report.py --ablations RUN...       the same, after storing ablations in ablations.json

A condensed file has for each case the best and the median time in milliseconds and the figures that the case recorded
(ratios to its peers, bytes or FLOP per second: see sides.py), and for the machine the processor, the cores and torch's
version. A table is the text between ``<!-- NAME -->`` and ``<!-- /NAME -->`` in a page. A picture contains the digest
of the file that it was drawn from. tests/test_docs.py checks that both are up to date.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch

import fasttricks
from fasttricks.train import paper

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "assets"
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "gallery", "tricks")))
BLUE, ORANGE, GREY = "#3b6fb6", "#e0882f", "#9a9a9a"


class Comparison(NamedTuple):
    """The speedups of one op over one peer, by case."""

    op: str
    peer: str
    ratios: dict[str, float]

    @property
    def mean(self) -> float:
        return math.exp(sum(map(math.log, self.ratios.values())) / len(self.ratios))


def condense(raw: dict) -> dict:
    processor = raw["machine_info"]["cpu"].get("brand_raw", "unknown")
    cases = {
        case["fullname"].removeprefix("benchmarks/"): {
            "best_ms": round(case["stats"]["min"] * 1e3, 4),
            "median_ms": round(case["stats"]["median"] * 1e3, 4),
            **{name: round(value, 4) for name, value in case["extra_info"].items()},
        }
        for case in raw["benchmarks"]
    }
    about = {"processor": processor, "cores": raw["machine_info"]["cpu"]["count"], "torch": torch.__version__}
    return {"machine": {**about, "isa": fasttricks.info()["cpu_isa"]}, "cases": cases}


def condense_runs(folders: Sequence[Path]) -> dict:
    """The recipe of each run, and its losses and accuracy by epoch; no times, which depend on the machine."""
    runs = {}
    for folder in folders:
        with (folder / "log.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        columns = ("train_loss", "val_loss", "val_top1")
        runs[folder.name] = {
            "recipe": json.loads((folder / "recipe.json").read_text()),
            **{name: [round(float(row[name]), 5) for row in rows] for name in columns},
        }
    return runs


def condense_ablations(folders: Sequence[Path]) -> dict:
    """The options of each ablation, and the validation accuracy after the last epoch by row and seed."""
    from fasttricks.train.ablation import read

    found = {}
    for folder in folders:
        about, groups = read(folder)
        rows = {group.name: [round(v, 2) for v in group.each(lambda run: run.rows[-1]["val_top1"])] for group in groups}
        found[about["table"]] = {"model": about["model"], "options": about["options"], "top1": rows}
    return found


def load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def comparisons(cases: dict[str, dict[str, float]]) -> list[Comparison]:
    """The comparisons of results/cpu.json, in the order of the tables."""

    def of(test: str, figure: str) -> dict[str, float]:
        found = {
            match[1]: figures[figure]
            for name, figures in cases.items()
            if (match := re.fullmatch(rf"{re.escape(test)}\[(.+)\]", name))
        }
        if not found:
            raise ValueError(f"results/cpu.json has no case of {test}")
        return found

    def against(ours: str, theirs: str) -> dict[str, float]:
        case = "bench_sgd.py::test_case[{}]"
        return {"ResNet-50": cases[case.format(theirs)]["best_ms"] / cases[case.format(ours)]["best_ms"]}

    bn, add = "bench_bn_relu.py::test_bn_relu", "bench_bn_relu.py::test_bn_add_relu"
    return [
        Comparison("bn_relu", "eager `relu(bn(x))`", of(bn, "eager")),
        Comparison("bn_relu", "`torch.compile` of it", of(bn, "compiled")),
        Comparison("bn_add_relu", "eager `relu(bn(x) + residual)`", of(add, "eager")),
        Comparison("bn_add_relu", "`torch.compile` of it", of(add, "compiled")),
        Comparison(
            "avgpool_conv1x1",
            "eager `conv2d(avg_pool2d(x))`",
            of("bench_avgpool_conv1x1.py::test_forward_backward", "eager"),
        ),
        Comparison(
            "FusedSGD, LossScaler, fp16",
            "eager unscale, check, SGD(foreach=True), copy",
            against("fused_fp16", "eager_fp16"),
        ),
        Comparison("FusedSGD, fp32", "`torch.optim.SGD(fused=True)`", against("fused_fp32", "torch_fused_fp32")),
        *(
            Comparison(f"training step, ResNet-50-D, {layout}", "eager modules, `torch.optim.SGD`", {layout: ratio})
            for layout, ratio in of("bench_train_step.py::test_step", "ratio").items()
        ),
    ]


# -- tables


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def _times(value: float) -> str:
    return f"{value:.1f}x" if value >= 9.95 else f"{value:.2f}x"


def speed_table() -> str:
    """The machine, and a row per comparison: op, peer, geometric mean and range."""
    result = load("cpu.json")
    machine = result["machine"]
    rows = []
    for op, peer, ratios in (compared := comparisons(result["cases"])):
        values = sorted(ratios.values())
        span = f"{_times(values[0])} to {_times(values[-1])}" if len(values) > 1 else ""
        mean = _times(compared[len(rows)].mean)
        rows.append([f"`{op}`" if "_" in op else op, peer, str(len(values)), mean, span])
    about = (
        f"{machine['cores']} cores of an {machine['processor']} ({machine['isa']}), torch {machine['torch']}, float32 "
        "and batch 32 unless a row says more, forward and backward."
    )
    return f"{about}\n\n" + _markdown(["op", "compared with", "cases", "speedup (geometric mean)", "range"], rows)


class Case(NamedTuple):
    """One shape of an op in results/cpu.json: milliseconds, and how many times as long the peers take."""

    op: str
    channels: list[str]
    size: str
    layout: str
    ms: float
    eager: float
    compiled: float | None


def cases() -> Iterator[Case]:
    """Every case of the BatchNorm ops and of avgpool_conv1x1."""
    for name, figures in load("cpu.json")["cases"].items():
        match = re.fullmatch(
            r"bench_\w+\.py::test_(bn_relu|bn_add_relu|bn_add_bn_relu|forward_backward)\[(.+)-(NCHW|NHWC)\]", name
        )
        if match is not None:
            op = "avgpool_conv1x1" if match[1] == "forward_backward" else match[1]
            *channels, size = match[2].split("-")
            yield Case(op, channels, size, match[3], figures["best_ms"], figures["eager"], figures.get("compiled"))


def case_table() -> str:
    """Time and speedups for every case of the BatchNorm ops and avgpool_conv1x1."""
    rows = [
        [
            f"`{case.op}`",
            f"{' → '.join(case.channels)} x {case.size} x {case.size}, {case.layout}",
            f"{case.ms:.2f}",
            _times(case.eager),
            "" if case.compiled is None else _times(case.compiled),
        ]
        for case in cases()
    ]
    return _markdown(["op", "channels x height x width", "ms", "against eager", "against `torch.compile`"], rows)


def traffic_table() -> str:
    """Bytes moved by the CUDA and Triton kernels over those of the formulas: the range over the shapes."""
    seen: dict[str, dict[str, list[float]]] = {}
    launches: dict[str, dict[str, set[int]]] = {}
    for row in load("traffic.json"):
        seen.setdefault(row["op"], {}).setdefault(row["backend"], []).append(row["ratio"])
        launches.setdefault(row["op"], {}).setdefault(row["backend"], set()).add(row["launches"])

    def span(values: Sequence[float]) -> str:
        low, high = min(values), max(values)
        return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"

    def cells(op: str, backend: str) -> list[str]:
        if backend not in seen[op]:
            return ["", ""]
        return [span(seen[op][backend]), " or ".join(map(str, sorted(launches[op][backend])))]

    rows = [[f"`{op}`", *cells(op, "cuda"), *cells(op, "triton")] for op in seen]
    return _markdown(["op", "CUDA: bytes / formula", "launches", "Triton: bytes / formula", "launches"], rows)


def step_table() -> str:
    """A row per side of results/step_traffic.json, and its bytes beside eager's."""
    steps = load("step_traffic.json")
    rows = [
        [
            step["side"],
            f"{step['bytes'] / 1e9:.1f}",
            f"{step['bytes'] / steps[0]['bytes']:.1%}",
            str(step["launches"]),
            f"{step['saved'] / 1e9:.2f}",
        ]
        for step in steps
    ]
    return _markdown(["", "GB moved", "of eager's", "launches", "GB saved for the backward pass"], rows)


def accuracy_table() -> str:
    """A column per run of results/digits.json."""
    runs = load("digits.json")
    recipes = [run["recipe"] for run in runs.values()]

    def row(title: str, cell: Callable[[dict], str], of: Sequence[dict]) -> list[str]:
        return [title, *(cell(item) for item in of)]

    rows = [
        row("model", lambda r: f"{r['model']}, width {r['width'] or 64}", recipes),
        row("modules", lambda r: "fused" if r["fused"] else "eager", recipes),
        row("batch", lambda r: str(r["batch_size"]), recipes),
        row("precision", lambda r: r["precision"], recipes),
        row("top-1, last epoch", lambda r: f"{r['val_top1'][-1]:.2f}", list(runs.values())),
        row("top-1, best epoch", lambda r: f"{max(r['val_top1']):.2f}", list(runs.values())),
    ]
    return _markdown(["", *runs], rows)


def ablation_table(name: str) -> str:
    """A row per row of the ablation: mean and standard deviation over the seeds, the change to the first row, and what
    the paper says.
    """
    found = load("ablations.json")[name]
    first = mean(next(iter(found["top1"].values())))
    rows = [
        [arm, f"{mean(top1):.2f} ± {stdev(top1):.2f}", f"{mean(top1) - first:+.2f}", paper.cell(name, arm)]
        for arm, top1 in found["top1"].items()
    ]
    rows[0][2] = ""
    seeds = len(next(iter(found["top1"].values())))
    command = f"`fasttricks ablate {name} --seeds {seeds} {' '.join(found['options'])}`"
    return f"{command}\n\n" + _markdown(["", f"top-1, mean of {seeds} seeds", "change", "paper"], rows)


TABLES = {
    "speed": speed_table,
    "cases": case_table,
    "traffic": traffic_table,
    "step": step_table,
    "accuracy": accuracy_table,
    "ablation-efficient": lambda: ablation_table("efficient"),
    "ablation-tweaks": lambda: ablation_table("tweaks"),
}


def rendered(page: str) -> str:
    """The page with up-to-date tables."""
    for name, table in TABLES.items():
        marks = f"<!-- {name} -->", f"<!-- /{name} -->"
        if marks[0] in page:
            before, _, rest = page.partition(marks[0])
            _, end, after = rest.partition(marks[1])
            if not end:
                raise ValueError(f"a page has {marks[0]} without {marks[1]}")
            page = f"{before}{marks[0]}\n{table()}\n{marks[1]}{after}"
    return page


# -- pictures


def draw_speed(figure: Any) -> None:
    """A bar per op: geometric mean of the speedup over eager torch, with the range over the cases."""
    shown = [c for c in comparisons(load("cpu.json")["cases"]) if "compile" not in c.peer]
    figure.set_size_inches(9, 3.6)
    axes = figure.subplots()
    for k, c in enumerate(shown):
        low, high = min(c.ratios.values()), max(c.ratios.values())
        axes.barh(k, c.mean, height=0.62, color=BLUE)
        if high > low:
            axes.plot([low, high], [k, k], color="black", linewidth=1.2, marker="|", markersize=7)
        axes.text(0.06, k, f"{c.mean:.2f}x", va="center", fontsize=9, color="white", fontweight="bold")
    axes.set_yticks(range(len(shown)), [f"{c.op}\nvs {c.peer.replace('`', '')}" for c in shown], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color=GREY, linewidth=1, linestyle="--")
    axes.set_xlim(0, max(max(c.ratios.values()) for c in shown) * 1.03)
    axes.set_xlabel("speedup (bar: geometric mean; line: range over shapes and layouts; dashed: as fast)", fontsize=8)
    axes.set_title("fasttricks on a CPU, forward and backward, against eager PyTorch", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def draw_cases(figure: Any) -> None:
    """A panel per op with a pair of bars per case: milliseconds of fasttricks and of eager torch."""
    ops = ("bn_relu", "bn_add_relu", "bn_add_bn_relu", "avgpool_conv1x1")
    groups: dict[str, list[tuple[str, float, float]]] = {op: [] for op in ops}
    for case in cases():
        label = f"{'→'.join(case.channels)}, {case.size}x{case.size}, {case.layout}"
        groups[case.op].append((label, case.ms, case.ms * case.eager))
    groups = {op: rows for op, rows in groups.items() if rows}
    heights = [len(rows) for rows in groups.values()]
    figure.set_size_inches(9, 2 + 0.3 * sum(heights))
    panels = figure.subplots(len(groups), height_ratios=heights)
    for axes, (op, rows) in zip(panels, groups.items(), strict=True):
        at = range(len(rows))
        axes.barh([k - 0.2 for k in at], [row[1] for row in rows], height=0.4, color=BLUE, label="fasttricks")
        axes.barh([k + 0.2 for k in at], [row[2] for row in rows], height=0.4, color=ORANGE, label="eager torch")
        axes.set_yticks(at, [row[0] for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(f"{op}, forward and backward, batch 32, float32", fontsize=9)
        axes.margins(y=0.02)
        axes.legend(fontsize=8, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("milliseconds (best round)", fontsize=8)


def draw_curves(figure: Any) -> None:
    """Loss and validation accuracy by epoch of the runs in results/digits.json."""
    figure.set_size_inches(10, 3.8)
    loss, top1 = figure.subplots(1, 2)
    for color, (name, run) in zip((ORANGE, BLUE), load("digits.json").items(), strict=True):
        epochs = range(1, len(run["train_loss"]) + 1)
        loss.plot(epochs, run["train_loss"], color=color, label=f"{name}, training")
        loss.plot(epochs, run["val_loss"], color=color, linestyle="--", label=f"{name}, validation")
        top1.plot(epochs, run["val_top1"], color=color, label=name)
    loss.set(xlabel="epoch", ylabel="loss", yscale="log")
    top1.set(xlabel="epoch", ylabel="validation top-1, %")
    for axes in (loss, top1):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)


class Picture(NamedTuple):
    """The result file of a picture, and the function that draws it."""

    result: str
    draw: Callable[[Any], None]


PICTURES = {
    "speed.png": Picture("cpu.json", draw_speed),
    "cases.png": Picture("cpu.json", draw_cases),
    "curves.png": Picture("digits.json", draw_curves),
}


def digest(result: str) -> str:
    return hashlib.sha256((RESULTS / result).read_bytes()).hexdigest()


def draw(name: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    PICTURES[name].draw(figure)
    ASSETS.mkdir(exist_ok=True)
    figure.savefig(ASSETS / name, dpi=110, metadata={"Source": digest(PICTURES[name].result)})


def main() -> None:
    if sys.argv[1:2] == ["--runs"]:
        runs = condense_runs([Path(folder) for folder in sys.argv[2:]])
        (RESULTS / "digits.json").write_text(json.dumps(runs, indent=1) + "\n")
    elif sys.argv[1:2] == ["--ablations"]:
        ablations = condense_ablations([Path(folder) for folder in sys.argv[2:]])
        (RESULTS / "ablations.json").write_text(json.dumps(ablations, indent=1) + "\n")
    elif sys.argv[1:]:
        source, target = map(Path, sys.argv[1:])
        result = condense(json.loads(source.read_text()))
        target.write_text(json.dumps(result, indent=1) + "\n")
        for name, figures in result["cases"].items():
            print(name, ", ".join(f"{key} {value:g}" for key, value in figures.items()))
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
    for name in PICTURES:
        draw(name)


if __name__ == "__main__":
    main()
