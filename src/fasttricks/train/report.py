"""log.csv, which has one row per epoch, and the report that compares runs."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from . import checkpoint

COLUMNS = (
    "epoch",
    "step",
    "lr",
    "train_loss",
    "train_top1",
    "val_loss",
    "val_top1",
    "val_top5",
    "img_per_s",
    "train_seconds",
    "loss_scale",
    "skipped_steps",
    "bad_files",
)


class ReportError(RuntimeError):
    """The run cannot be read; the message says why."""


class CsvLog:
    """Appends one row per epoch to ``path``. Opening it drops the rows after ``epochs_done``."""

    def __init__(self, path: Path, epochs_done: int):
        # kept as text, so that resuming changes no digit; an incomplete last row is one of those that are dropped
        rows = _rows(path)[:epochs_done] if epochs_done and path.exists() else []
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        checkpoint.write(path, lambda file: file.write(text.getvalue().encode()))
        self.path = path

    def append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ReportError(f"{path} is not a log of this trainer; its columns are {reader.fieldnames}")
            return list(reader)
    except FileNotFoundError as error:
        raise ReportError(f"{path}: no such file; give the --out folder of a training run") from error


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log.csv as numbers.

    Raises:
        ReportError: the file is missing or no log of this trainer.
    """
    try:
        return [{name: float(row[name]) for name in COLUMNS} for row in _rows(path)]
    except (TypeError, ValueError) as error:
        raise ReportError(f"{path} is damaged: {error}") from error


class Run(NamedTuple):
    """The folder of a run: its name, recipe and log."""

    name: str
    recipe: dict[str, Any]
    rows: list[dict[str, float]]

    @property
    def img_per_s(self) -> float:
        """Median over the epochs except the first, which includes the start-up."""
        return median(row["img_per_s"] for row in self.rows[1:] or self.rows)

    @property
    def best(self) -> dict[str, float]:
        finite = [row for row in self.rows if math.isfinite(row["val_top1"])]
        return max(finite or self.rows, key=lambda row: row["val_top1"])


def read_run(folder: Path) -> Run:
    """Read a run.

    Raises:
        ReportError: a file is missing or damaged, or no epoch has ended yet.
    """
    rows = read_log(folder / "log.csv")
    if not rows:
        raise ReportError(f"{folder}: no epoch has ended yet")
    try:
        recipe = json.loads((folder / "recipe.json").read_text())
    except (FileNotFoundError, ValueError) as error:
        raise ReportError(f"{folder / 'recipe.json'}: {error}") from error
    return Run(folder.name or str(folder), recipe, rows)


def table(runs: Sequence[Run]) -> Table:
    """A table with one column per run."""
    view = Table(title="top-1 and top-5: validation, in percent")
    view.add_column("")
    for run in runs:
        view.add_column(run.name, justify="right")

    def row(title: str, *cells: str) -> None:
        view.add_row(title, *cells)

    row("model", *(r.recipe["model"] for r in runs))
    row("width", *(str(r.recipe["width"] or "full") for r in runs))
    row("modules", *("fused" if r.recipe["fused"] else "eager" for r in runs))
    row("batch", *(str(r.recipe["batch_size"]) for r in runs))
    row("precision", *(r.recipe["precision"] for r in runs))
    row("tricks", *(", ".join(_tricks(r.recipe)) or "none" for r in runs))
    row("epochs", *(str(len(r.rows)) for r in runs))
    view.add_section()
    row("top-1, last epoch", *(f"{r.rows[-1]['val_top1']:.2f}" for r in runs))
    row("top-1, best epoch", *(f"{r.best['val_top1']:.2f} (epoch {r.best['epoch']:.0f})" for r in runs))
    row("top-5, last epoch", *(f"{r.rows[-1]['val_top5']:.2f}" for r in runs))
    row("img/s, training", *(f"{r.img_per_s:.0f}" for r in runs))
    row("training seconds", *(f"{sum(x['train_seconds'] for x in r.rows):.1f}" for r in runs))
    return view


def _tricks(recipe: dict[str, Any]) -> list[str]:
    named = {
        "linear lr": recipe["linear_lr"],
        "warmup": recipe["warmup_epochs"] > 0,
        "zero gamma": recipe["zero_gamma"],
        "no bias decay": recipe["no_bias_decay"],
        "cosine": recipe["schedule"] == "cosine",
        "label smoothing": recipe["label_smoothing"] > 0,
        "distillation": recipe.get("teacher") is not None,
        "mixup": recipe["mixup"] > 0,
        "LARS": recipe["optimizer"] == "lars",
        "EMA": recipe.get("ema", 0) > 0,
    }
    return [name for name, used in named.items() if used]


def draw(runs: Sequence[Run], png: Path) -> None:
    """Draws loss and top-1 by epoch and top-1 by training time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, top1, timed = figure.subplots(1, 3)
    for i, run in enumerate(runs):
        epochs = [row["epoch"] for row in run.rows]
        seconds, total = [], 0.0
        for row in run.rows:
            total += row["train_seconds"]
            seconds.append(total)
        color, accuracy = f"C{i}", [row["val_top1"] for row in run.rows]
        loss.plot(epochs, [row["train_loss"] for row in run.rows], color=color, label=f"{run.name}, training")
        loss.plot(epochs, [row["val_loss"] for row in run.rows], color=color, ls="--", label=f"{run.name}, validation")
        top1.plot(epochs, accuracy, color=color, label=f"{run.name} ({run.img_per_s:.0f} img/s)")
        timed.plot(seconds, accuracy, color=color, label=run.name)
    loss.set(xlabel="epoch", ylabel="loss", yscale="log")
    top1.set(xlabel="epoch", ylabel="validation top-1, %")
    timed.set(xlabel="training time, s", ylabel="validation top-1, %")
    for axes in (loss, top1, timed):
        axes.grid(alpha=0.3)
        axes.legend()
    png.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write(png, lambda file: figure.savefig(file, format="png", dpi=120))


def report(folders: Sequence[Path], png: Path, console: Console) -> None:
    """Prints the table of the runs and draws their curves to ``png``."""
    runs = [read_run(folder) for folder in folders]
    console.print(table(runs))
    draw(runs, png)
    console.print(f"curves: {png}", highlight=False, soft_wrap=True)
