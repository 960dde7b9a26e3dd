"""log.csv, which has one row per epoch, and the report that compares runs."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from . import checkpoint
from .page import Section, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    """Reads a run.

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


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads runs. Where the names of different folders are the same, those of their parents are added.

    Raises:
        ReportError: see :func:`read_run`.
    """
    paths = [folder.resolve() for folder in folders]
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    return [read_run(path)._replace(name="/".join(path.parts[-depth:])) for path in paths]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and sample standard deviation; of a single value, the value."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


class Group(NamedTuple):
    """Runs that differ in their seeds only."""

    name: str
    runs: list[Run]

    def each(self, value: Callable[[Run], float]) -> list[float]:
        """A value of each run."""
        return [value(run) for run in self.runs]

    def by_epoch(self, column: str) -> list[tuple[float, ...]]:
        """For each epoch that all runs have, the values of the runs."""
        return list(zip(*([row[column] for row in run.rows] for run in self.runs), strict=False))


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The runs, those of the same recipe and different seeds together."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        same = json.dumps({name: value for name, value in run.recipe.items() if name != "seed"}, sort_keys=True)
        key = same
        while any(other.recipe["seed"] == run.recipe["seed"] for other in found.get(key, [])):
            key += "again"  # the same run twice is no spread
        found.setdefault(key, []).append(run)
    return [Group(", ".join(run.name for run in group), group) for group in found.values()]


def section(runs: Sequence[Run]) -> Section:
    """A table with one column for each recipe, and its curves."""
    groups = grouped(runs)
    rows: list[list[str]] = []

    def setting(title: str, value: Callable[[dict[str, Any]], str]) -> None:
        rows.append([title, *(value(group.runs[0].recipe) for group in groups)])

    def figure(title: str, value: Callable[[Run], float], digits: int = 2) -> None:
        rows.append([title, *(spread(group.each(value), digits) for group in groups)])

    setting("model", lambda recipe: recipe["model"])
    setting("width", lambda recipe: str(recipe["width"] or "full"))
    setting("modules", lambda recipe: "fused" if recipe["fused"] else "eager")
    setting("batch", lambda recipe: str(recipe["batch_size"] * recipe.get("accumulate", 1)))
    setting("precision", lambda recipe: recipe["precision"])
    setting("tricks", lambda recipe: ", ".join(_tricks(recipe)) or "none")
    rows.append(["seeds", *(", ".join(str(run.recipe["seed"]) for run in group.runs) for group in groups)])
    rows.append(["epochs", *(_range([len(run.rows) for run in group.runs]) for group in groups)])
    figure("top-1, last epoch", lambda run: run.rows[-1]["val_top1"])
    figure("top-1, best epoch", lambda run: run.best["val_top1"])
    rows.append(["best epoch", *(_range([int(run.best["epoch"]) for run in group.runs]) for group in groups)])
    figure("top-5, last epoch", lambda run: run.rows[-1]["val_top5"])
    figure("img/s, training", lambda run: run.img_per_s, 0)
    figure("training seconds", lambda run: sum(row["train_seconds"] for row in run.rows), 1)
    header = ["", *(group.name for group in groups)]
    details = {f"settings of {run.name}": json.dumps(run.recipe, indent=2) for run in runs}
    return Section("top-1 and top-5: validation, in percent", header, rows, draw(groups), details)


def _short(name: str) -> str:
    """A name for a legend, which must leave space for the curves."""
    return name if len(name) <= 40 else f"{name[:24]}...{name[-13:]}"


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


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


def draw_epochs(axes: Any, group: Group, column: str, color: str, label: str, style: str = "-") -> None:
    """Draws the mean of each epoch, and its range over the seeds."""
    values = group.by_epoch(column)
    epochs = range(1, len(values) + 1)
    axes.plot(epochs, [mean(each) for each in values], style, color=color, label=_short(label))
    if len(group.runs) > 1:
        low, high = [min(each) for each in values], [max(each) for each in values]
        axes.fill_between(epochs, low, high, color=color, alpha=0.15)


def draw(groups: Sequence[Group]) -> Figure:
    """Loss and top-1 by epoch, and top-1 by training time."""
    figure = new_figure(15, 4.5)
    loss, top1, timed = figure.subplots(1, 3)
    for i, group in enumerate(groups):
        color, seconds = f"C{i}", [mean(each) for each in group.by_epoch("train_seconds")]
        draw_epochs(loss, group, "train_loss", color, f"{group.name}, training")
        draw_epochs(loss, group, "val_loss", color, f"{group.name}, validation", "--")
        speed = mean(group.each(lambda run: run.img_per_s))
        draw_epochs(top1, group, "val_top1", color, f"{group.name} ({speed:.0f} img/s)")
        means = [mean(each) for each in group.by_epoch("val_top1")]
        timed.plot(list(accumulate(seconds)), means, color=color, label=_short(group.name))
    loss.set(xlabel="epoch", ylabel="loss", yscale="log")
    top1.set(xlabel="epoch", ylabel="validation top-1, %")
    timed.set(xlabel="training time, s", ylabel="validation top-1, %")
    for axes in (loss, top1, timed):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
