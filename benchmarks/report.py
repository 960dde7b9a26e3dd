"""Condenses benchmark results, and writes the tables and pictures of README.md and docs/.

    python benchmarks/report.py                          rewrites the tables and draws the pictures
    python benchmarks/report.py RAW.json... RESULT.json  the same, after condensing pytest-benchmark's files into one,
                                                         which keeps what it holds of other benchmarks
    python benchmarks/report.py --runs RUN...            the same, after storing the curves of runs in digits.json
    python benchmarks/report.py --ablations RUN...       the same, after storing ablations in ablations.json

A condensed file has for each case the best and the median time in milliseconds and the figures that the case recorded
(ratios to its peers, bytes or FLOP per second: see sides.py), and for the machine the processor, the cores and torch's
version. A table is the text between ``<!-- NAME -->`` and ``<!-- /NAME -->`` in a page. tests/test_docs.py checks that
tables and pictures are up to date.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

import measured
import torch
from measured import CPU, MORE, RESULTS, ROOT, Case, Figures, load
from pictures import draw, measured_pictures

import fasttricks
from fasttricks.train import paper

PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "gallery", "tricks")))


def condense(*raws: dict) -> dict:
    """Of one machine."""
    cpu = raws[0]["machine_info"]["cpu"]
    cases = {
        case["fullname"].removeprefix("benchmarks/"): {
            "best_ms": round(case["stats"]["min"] * 1e3, 4),
            "median_ms": round(case["stats"]["median"] * 1e3, 4),
            **{name: round(value, 4) for name, value in case["extra_info"].items()},
        }
        for raw in raws
        for case in raw["benchmarks"]
    }
    about = {"processor": cpu.get("brand_raw", "unknown"), "cores": cpu["count"], "torch": torch.__version__}
    return {"machine": {**about, "isa": fasttricks.info()["cpu_isa"]}, "cases": cases}


def with_other_benchmarks(result: dict, target: Path) -> dict:
    """The result and, of the same machine, what `target` holds of benchmarks that have no case in it."""
    if not target.exists():
        return result
    before = json.loads(target.read_text())
    if before["machine"] != result["machine"]:
        return result
    measured = {_file_of(case) for case in result["cases"]}
    others = {case: figures for case, figures in before["cases"].items() if _file_of(case) not in measured}
    return {**result, "cases": {**others, **result["cases"]}}


def _file_of(case: str) -> str:
    return case.partition("::")[0]


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


# -- tables


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def _times(value: float) -> str:
    return f"{value:.1f}x" if value >= 9.95 else f"{value:.2f}x"


def _machine(result: str) -> str:
    machine = load(result)["machine"]
    return f"{machine['cores']} cores of an {machine['processor']} ({machine['isa']}), torch {machine['torch']}"


def _filled(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of the columns that are not empty."""
    kept = [k for k in range(len(header)) if any(row[k] for row in rows)]
    return _markdown([header[k] for k in kept], [[row[k] for k in kept] for row in rows])


def _figure(figures: Figures, name: str, say: Callable[[float], str]) -> str:
    return say(figures[name]) if name in figures else ""


def _saved(figures: Figures) -> str:
    """Megabytes kept for the backward pass, ours and eager torch's."""
    names = ("saved_mb", "peer_saved_mb")
    return " / ".join(f"{figures[name]:.1f}" for name in names if name in figures)


SAVED = "saved, MB (eager)"


def _not_yet(target: str) -> str:
    return f"Not yet measured: `make {target}`."


def speed_table() -> str:
    """The machine, and a row per comparison: op, peer, geometric mean and range."""
    rows = []
    for compared in measured.comparisons():
        op, values = compared.op, sorted(compared.ratios.values())
        span = f"{_times(values[0])} to {_times(values[-1])}" if len(values) > 1 else ""
        rows.append([f"`{op}`" if "_" in op else op, compared.peer, str(len(values)), _times(compared.mean), span])
    if not rows:
        return _not_yet("bench")
    about = f"{_machine(CPU)}, float32 and batch 32 unless a row says more, forward and backward."
    return f"{about}\n\n" + _markdown(["op", "compared with", "cases", "speedup (geometric mean)", "range"], rows)


def _case_row(case: Case) -> list[str]:
    figures = case.figures
    return [
        f"`{case.op}`",
        f"{' → '.join(case.channels)} x {case.size} x {case.size}, {case.layout}",
        f"{figures['best_ms']:.2f}",
        _figure(figures, "spread", "{:.0%}".format),
        *(_figure(figures, name, _times) for name in ("eager", "median", "compiled", "timm")),
        _figure(figures, "of_copy", "{:.0%}".format),
        _figure(figures, "saved_mb", lambda _: _saved(figures)),
    ]


def case_table() -> str:
    """Time and speedups for every case of the BatchNorm ops and avgpool_conv1x1."""
    header = ["op", "channels x height x width", "ms", "spread", "against eager", "by medians"]
    header += ["against `torch.compile`", "against timm", "of a copy's bandwidth", SAVED]
    rows = [_case_row(case) for case in measured.cases()]
    return _filled(header, rows) if rows else _not_yet("bench")


def roofline_picture() -> str:
    if measured.roofline() is None:
        return _not_yet("bench")
    return "![GFLOP/s over FLOP per byte of each case, under the roofs of the machine](assets/roofline.png)"


def scaling_picture() -> str:
    if not measured.scaling():
        return _not_yet("bench-all")
    picture = "![Milliseconds of each op, ours and eager torch's, over each axis](assets/scaling.png)"
    return f"{_machine(MORE)}.\n\n{picture}"


COMPILED = {"compiled": "`torch.compile`", "max_autotune": "max-autotune"}


def _against_eager(figures: Figures, side: str) -> str:
    """How many times as fast as eager torch this side is; recorded is how many times as long both take as ours."""
    return _figure(figures, side, lambda ratio: _times(figures["eager"] / ratio))


def network_table() -> str:
    """A row per network and dtype: eager's time, and how many times as fast the other sides are."""
    found = measured.networks()
    if not found:
        return _not_yet("bench-all")
    rows = [
        [
            name,
            dtype,
            f"{figures['best_ms'] * figures['eager']:.0f}",
            *(_against_eager(figures, side) for side in COMPILED),
            _times(figures["eager"]),
            _against_eager(figures, "fused_compiled"),
            _figure(figures, "spread", "{:.0%}".format),
            _saved(figures),
        ]
        for name, dtype, figures in found
    ]
    header = ["network", "dtype", "eager, ms", *COMPILED.values(), "fused", "fused, compiled", "spread", SAVED]
    return f"{_machine(MORE)}. How many times as fast as eager:\n\n" + _filled(header, rows)


def model_table() -> str:
    """A row per model and image size, the slowest against unfused first."""
    found = measured.models()
    if not found:
        return _not_yet("bench-all")
    rows = [
        [
            name,
            str(pixels),
            f"{figures['best_ms']:.0f}",
            f"{figures['median']:.3f}x",
            _figure(figures, "spread", "{:.0%}".format),
            _saved(figures),
        ]
        for name, pixels, figures in found
    ]
    slow = sum(figures["median"] < 0.98 for _, _, figures in found)
    about = f"{_machine(MORE)}. More than 2% slower than unfused: {slow} of {len(found)}."
    return f"{about}\n\n" + _filled(["model", "pixels", "ms", "against unfused, by medians", "spread", SAVED], rows)


def batch_table() -> str:
    """A row per op, network and dtype, a column per batch: geometric mean and range of the ratio to eager torch."""
    found = measured.batches()
    if not found:
        return _not_yet("bench-all")
    sizes = sorted({batch for rows in found.values() for batch in rows})

    def cell(ratios: Sequence[float]) -> str:
        return f"{_times(measured.geometric_mean(ratios))} ({_times(min(ratios))} to {_times(max(ratios))})"

    rows = [
        [f"`{op}`", network, dtype, *(cell(of[batch]) if batch in of else "" for batch in sizes)]
        for (op, network, dtype), of in found.items()
    ]
    header = ["op", "network", "dtype", *(f"batch {batch}" for batch in sizes)]
    return f"{_machine(MORE)}.\n\n" + _markdown(header, rows)


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
    "roofline": roofline_picture,
    "scaling": scaling_picture,
    "networks": network_table,
    "models": model_table,
    "batches": batch_table,
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


def main() -> None:
    if sys.argv[1:2] == ["--runs"]:
        runs = condense_runs([Path(folder) for folder in sys.argv[2:]])
        (RESULTS / "digits.json").write_text(json.dumps(runs, indent=1) + "\n")
    elif sys.argv[1:2] == ["--ablations"]:
        ablations = condense_ablations([Path(folder) for folder in sys.argv[2:]])
        (RESULTS / "ablations.json").write_text(json.dumps(ablations, indent=1) + "\n")
    elif sys.argv[1:]:
        *sources, target = map(Path, sys.argv[1:])
        result = condense(*(json.loads(source.read_text()) for source in sources))
        target.write_text(json.dumps(with_other_benchmarks(result, target), indent=1) + "\n")
        for name, figures in result["cases"].items():
            print(name, ", ".join(f"{key} {value:g}" for key, value in figures.items()))
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
    for name in measured_pictures():
        draw(name)


if __name__ == "__main__":
    main()
