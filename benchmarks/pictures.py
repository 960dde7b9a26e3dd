"""Draws the pictures of README.md and docs/ from benchmarks/results/; each holds the digest of its result file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import measured
from measured import CPU, MORE, ROOT, Case, Comparison, Curve, Roofline, exponent

ASSETS = ROOT / "docs" / "assets"
BLUE, ORANGE, GREY = "#3b6fb6", "#e0882f", "#9a9a9a"
OPS = ("bn_relu", "bn_add_relu", "bn_add_bn_relu", "avgpool_conv1x1")
AXES = {
    "batch": "batch",
    "channels": "channels",
    "size": "height = width",
    "threads": "threads",
    "parameters": "parameters",
}


def draw_speed(figure: Any, compared: list[Comparison]) -> None:
    """A bar per op: geometric mean of the speedup over eager torch, with the range over the cases."""
    shown = [c for c in compared if "compile" not in c.peer]
    figure.set_size_inches(9, 0.5 + 0.45 * len(shown))
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


def draw_cases(figure: Any, cases: list[Case]) -> None:
    """A panel per op with a pair of bars per case: milliseconds of fasttricks and of eager torch."""
    groups: dict[str, list[tuple[str, float, float]]] = {op: [] for op in OPS}
    for case in cases:
        label = f"{'→'.join(case.channels)}, {case.size}x{case.size}, {case.layout}"
        ms = case.figures["best_ms"]
        groups[case.op].append((label, ms, ms * case.figures["eager"]))
    groups = {op: rows for op, rows in groups.items() if rows}
    heights = [len(rows) for rows in groups.values()]
    figure.set_size_inches(9, 2 + 0.3 * sum(heights))
    panels = figure.subplots(len(groups), squeeze=False, height_ratios=heights)[:, 0]
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


def draw_roofline(figure: Any, data: Roofline) -> None:
    """GFLOP/s over FLOP per byte of the formula: ours filled, eager torch's hollow; above them the machine's roofs."""
    figure.set_size_inches(9, 5)
    axes = figure.subplots()
    ridge = data.matmul / data.copy
    low = min(point.intensity for point in data.points) / 2
    high = 2 * max(ridge, *(point.intensity for point in data.points))
    roof = f"roof: copy {data.copy:.1f} GB/s, matmul {data.matmul:.0f} GFLOP/s"
    axes.plot([low, ridge, high], [low * data.copy, data.matmul, data.matmul], color="black", linewidth=1.2, label=roof)
    for k, op in enumerate(dict.fromkeys(point.op for point in data.points)):
        points = [point for point in data.points if point.op == op]
        at = [point.intensity for point in points]
        look = {"marker": "osD^vP"[k % 6], "color": f"C{k}", "linestyle": "", "markersize": 6, "alpha": 0.8}
        axes.plot(at, [point.ours for point in points], label=op, **look)
        axes.plot([x * 1.06 for x in at], [point.eager for point in points], markerfacecolor="none", **look)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of the formula", ylabel="GFLOP/s of the formula")
    axes.set_title("Filled: fasttricks; hollow, moved to the right: eager PyTorch; float32 and fp16 SGD", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)


def draw_scaling(figure: Any, curves: list[Curve]) -> None:
    """A row per op, a panel per axis: milliseconds of ours and eager torch, with the exponents that fit them."""
    rows: dict[str, list[Curve]] = {}
    for curve in curves:
        rows.setdefault(curve.op, []).append(curve)
    columns = max(map(len, rows.values()))
    figure.set_size_inches(3.1 * columns, 2.7 * len(rows))
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for line, row in zip(panels, rows.values(), strict=True):
        for axes in line[len(row) :]:
            axes.set_visible(False)
        for axes, curve in zip(line, row, strict=False):
            draw_curve(axes, curve)
        line[0].set_ylabel(f"{row[0].op}\nmilliseconds", fontsize=9)


def draw_curve(axes: Any, curve: Curve) -> None:
    from matplotlib.ticker import LogLocator

    for name, color, times in (("fasttricks", BLUE, curve.ours), ("eager torch", ORANGE, curve.eager)):
        label = f"{name}: n^{exponent(curve.values, times):.2f}"
        axes.plot(curve.values, times, color=color, marker="o", markersize=4, linewidth=1.2, label=label)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel(f"n: {AXES[curve.axis]}", fontsize=9)
    axes.set_xticks(curve.values, [f"{value:g}" for value in curve.values])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def draw_curves(figure: Any, runs: dict[str, Any]) -> None:
    """Loss and validation accuracy by epoch."""
    figure.set_size_inches(10, 3.8)
    loss, top1 = figure.subplots(1, 2)
    for color, (name, run) in zip((ORANGE, BLUE), runs.items(), strict=True):
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
    """The result file of a picture, what is drawn of it, and the function that draws that."""

    result: str
    data: Callable[[], Any]
    draw: Callable[[Any, Any], None]


PICTURES = {
    "speed.png": Picture(CPU, measured.comparisons, draw_speed),
    "cases.png": Picture(CPU, measured.cases, draw_cases),
    "roofline.png": Picture(CPU, measured.roofline, draw_roofline),
    "scaling.png": Picture(MORE, measured.scaling, draw_scaling),
    "curves.png": Picture("digits.json", lambda: measured.load("digits.json"), draw_curves),
}


def measured_pictures() -> list[str]:
    """Those that there is something to draw of."""
    return [name for name, picture in PICTURES.items() if picture.data()]


def draw(name: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = PICTURES[name]
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    picture.draw(figure, picture.data())
    ASSETS.mkdir(exist_ok=True)
    figure.savefig(ASSETS / name, dpi=110, metadata={"Source": measured.digest(picture.result)})
