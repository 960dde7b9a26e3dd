"""The paper's tables as sets of training runs: ``fasttricks ablate TABLE``.

A folder of an ablation holds ablation.json (what it runs) and a folder ARM/seed-N for each run.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from . import checkpoint, paper
from .page import Section, new_figure, write_page
from .report import Group, ReportError, Run, draw_epochs, read_run, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLES = ("efficient", "tweaks", "refinements", "models")
TEACHER = "teacher"  # name of the row that trains the teacher


class AblationError(RuntimeError):
    """The ablation cannot run; the message says why."""


class Terminated(BaseException):
    """SIGTERM, raised by the handler in :func:`termination_raised`."""


@contextlib.contextmanager
def termination_raised() -> Iterator[None]:
    """SIGTERM raises :class:`Terminated` in the main thread."""

    def stop(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def arms(table: str, model: str, teacher: str) -> dict[str, list[str]]:
    """The options of ``fasttricks train`` for each row of a table, top to bottom.

    Args:
        table: "efficient" stacks the heuristics of section 3, "refinements" those of section 5, "tweaks" compares
            ResNet-A to D (section 4), "models" trains three networks with the recipes efficient and refined.
        model: name of the model; "tweaks" takes its variants.
        teacher: for the distillation of "refinements" and "models".
    """
    efficient = ["--recipe", "efficient", "--model", model]
    if table == "efficient":
        fp32 = ["--precision", "fp32"]
        return {
            "baseline": ["--recipe", "baseline", "--model", model],
            "+ linear scaling": [*efficient, *fp32, "--warmup-epochs", "0", "--no-zero-gamma", "--bias-decay"],
            "+ warmup": [*efficient, *fp32, "--no-zero-gamma", "--bias-decay"],
            "+ zero gamma": [*efficient, *fp32, "--bias-decay"],
            "+ no bias decay": [*efficient, *fp32],
            "+ fp16": [*efficient, "--precision", "fp16"],
        }
    if table == "tweaks":
        stem = re.sub(r"[abcd]$", "", model)
        return {f"{stem}{letter}": ["--recipe", "efficient", "--model", f"{stem}{letter}"] for letter in "abcd"}
    if table == "refinements":
        cosine = [*efficient, "--schedule", "cosine"]
        smooth = [*cosine, "--label-smoothing", "0.1"]
        taught = [*smooth, "--teacher", teacher]
        return {
            "efficient": efficient,
            "+ cosine": cosine,
            "+ label smoothing": smooth,
            "+ distillation": taught,
            "+ mixup": [*taught, "--mixup", "0.2"],
        }
    networks = ("resnet50d", "inception_v3", "mobilenet_v1")
    recipes = {"efficient": [], "refined": ["--teacher", teacher]}
    return {
        f"{network}, {recipe}": ["--recipe", recipe, "--model", network, *more]
        for network in networks
        for recipe, more in recipes.items()
    }


class Job(NamedTuple):
    """One training run."""

    arm: str
    seed: int
    out: Path
    options: list[str]

    def epochs(self) -> tuple[int, int]:
        """(epochs done, epochs of the run); (0, 0) before it started."""
        try:
            run = read_run(self.out)
        except ReportError:
            return 0, 0
        return len(run.rows), run.recipe["epochs"]

    @property
    def finished(self) -> bool:
        done, total = self.epochs()
        return 0 < total <= done

    def command(self) -> list[str]:
        go_on = "--resume" if (self.out / "last.pt").exists() else "--overwrite"
        return [sys.executable, "-m", "fasttricks.train", *self.options, "--out", str(self.out), go_on]


def plan(out: Path, table: str, seeds: int, model: str, teacher: str | None, options: Sequence[str]) -> list[Job]:
    """The runs of an ablation. If the table needs a teacher and none is given, the run that trains it is first.

    Args:
        out: folder of the ablation.
        options: of ``fasttricks train``, for every run.
    """
    trained = out / TEACHER / "seed-0" / "best.pt"
    lines = arms(table, model, teacher or str(trained))
    jobs = []
    if teacher is None and any(str(trained) in line for line in lines.values()):
        learn = ["--recipe", "efficient", "--model", "resnet152d", "--schedule", "cosine", "--label-smoothing", "0.1"]
        jobs.append(Job(TEACHER, 0, out / TEACHER / "seed-0", [*options, *learn, "--seed", "0"]))
    for arm, line in lines.items():
        folder = out / re.sub(r"\W+", "-", arm).strip("-")
        jobs += [
            Job(arm, seed, folder / f"seed-{seed}", [*options, *line, "--seed", str(seed)]) for seed in range(seeds)
        ]
    return jobs


def run(out: Path, jobs: Sequence[Job], description: dict[str, Any], at_once: int, console: Console) -> int:
    """Runs what has not finished; an interrupted run resumes from its checkpoint.

    Args:
        description: table, model, teacher and options, as in ablation.json.
        at_once: runs at a time. On CUDA each has a device to itself, on the CPU its share of the cores.

    Returns:
        How many runs failed.

    Raises:
        AblationError: ``out`` holds an ablation of other options.
    """
    check_same(out, description)
    out.mkdir(parents=True, exist_ok=True)
    (out / "ablation.json").write_text(json.dumps(description, indent=1) + "\n")
    failed, done = 0, sum(job.finished for job in jobs)
    places: SimpleQueue[int] = SimpleQueue()
    for place in range(at_once):
        places.put(place)

    processes: set[subprocess.Popen[bytes]] = set()

    def work(job: Job) -> str:
        place = places.get()
        try:
            return _train(job, place, at_once, processes)
        finally:
            places.put(place)

    with ThreadPoolExecutor(at_once) as pool:
        # other runs need the checkpoint of the teacher
        for part in ([j for j in jobs if j.arm == TEACHER], [j for j in jobs if j.arm != TEACHER]):
            waiting = {pool.submit(work, job): job for job in part if not job.finished}
            try:
                for future in as_completed(waiting):
                    job, fault = waiting[future], future.result()
                    done += not fault
                    failed += bool(fault)
                    last = fault or f"top-1 {read_run(job.out).rows[-1]['val_top1']:.2f}"
                    console.print(
                        f"{done}/{len(jobs)}  {job.arm}, seed {job.seed}: {last}",
                        highlight=False,
                        soft_wrap=True,
                        markup=False,
                    )
            except (KeyboardInterrupt, Terminated) as stop:
                pool.shutdown(wait=False, cancel_futures=True)
                if isinstance(stop, Terminated):  # the terminal sends Ctrl-C to the runs, too
                    for process in list(processes):
                        process.terminate()
                raise  # leaving the pool waits for their checkpoints
            if failed:
                break
    return failed


def check_same(out: Path, description: dict[str, Any]) -> None:
    """Raises:
    AblationError: the folder holds an ablation of other options. More seeds are the same ablation.
    """
    try:
        before = json.loads((out / "ablation.json").read_text())
    except FileNotFoundError:
        return
    except ValueError as error:
        raise AblationError(f"{out / 'ablation.json'} is damaged: {error}") from error
    changed = [
        f"{name} {before.get(name)!r} -> {value!r}"
        for name, value in description.items()
        if name != "seeds" and before.get(name) != value
    ]
    if changed:
        raise AblationError(
            f"--out {out} holds an ablation of other options ({'; '.join(changed)}): give another --out"
        )


def _train(job: Job, place: int, at_once: int, processes: set[subprocess.Popen[bytes]]) -> str:
    """Runs the job; returns an error message, or an empty string."""
    env = dict(os.environ)
    if torch.cuda.is_available():
        env["CUDA_VISIBLE_DEVICES"] = _device(place)
    else:
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
    job.out.mkdir(parents=True, exist_ok=True)
    with (
        (job.out / "output.txt").open("a") as file,
        subprocess.Popen(job.command(), stdout=file, stderr=subprocess.STDOUT, env=env) as process,
    ):
        processes.add(process)
        code = process.wait()
        processes.discard(process)
    if code == 0:
        return ""
    lines = (job.out / "output.txt").read_text().strip().splitlines()
    return f"failed ({code}): {lines[-1] if lines else 'no output'}"


def _device(place: int) -> str:
    """The CUDA device for this place, of those that are visible to this process."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = seen.split(",") if seen else [str(i) for i in range(torch.cuda.device_count())]
    return devices[place % len(devices)]


def show_plan(jobs: Sequence[Job], at_once: int, console: Console) -> None:
    """Prints what would run, and an estimate of the time from the runs that have finished."""
    view = Table("run", "state", "command")
    seconds: dict[str, list[float]] = {}
    for job in jobs:
        done, total = job.epochs()
        if job.finished:
            seconds.setdefault(job.arm, []).append(sum(r["train_seconds"] for r in read_run(job.out).rows))
        state = "finished" if job.finished else f"resumes after epoch {done} of {total}" if done else "to do"
        command = " ".join(["fasttricks train", *job.options, "--out", str(job.out)])
        view.add_row(f"{job.arm}, seed {job.seed}", state, command)
    console.print(view)
    left = [job for job in jobs if not job.finished]
    known = [s for of_arm in seconds.values() for s in of_arm]
    if left and known:
        total_seconds = sum(mean(seconds.get(job.arm, known)) for job in left) / at_once
        console.print(
            f"{len(left)} runs to do: about {total_seconds / 60:.0f} min, estimated from {len(known)} finished"
            f" run{'s' if len(known) > 1 else ''}",
            highlight=False,
        )
    elif left:
        console.print(f"{len(left)} runs to do; --dry-run estimates the time once one has finished", highlight=False)


def read(out: Path) -> tuple[dict[str, Any], list[Group]]:
    """The description of an ablation, and its rows with the runs that have finished.

    Raises:
        ReportError: no ablation, or none of its runs has finished.
    """
    try:
        description = json.loads((out / "ablation.json").read_text())
        jobs = plan(out, **{k: description[k] for k in ("table", "seeds", "model", "teacher", "options")})
    except (OSError, ValueError, KeyError) as error:
        raise ReportError(f"{out / 'ablation.json'}: {error}") from error
    lines: dict[str, list[Run]] = {}
    for job in jobs:
        lines.setdefault(job.arm, [])
        if job.finished:
            lines[job.arm].append(read_run(job.out))
    found = [Group(name, runs) for name, runs in lines.items() if runs]
    if not found:
        raise ReportError(f"{out}: no run of this ablation has finished")
    return description, found


def section(out: Path) -> Section:
    """The table of an ablation and its curves; writes table.csv, with a row for each run, to ``out``.

    Raises:
        ReportError: see :func:`read`.
    """
    description, lines = read(out)
    header = ["", "top-1, last epoch", "change", "paper", "top-1, best epoch", "top-5", "img/s", "seeds"]
    rows, records = [], []
    compared = [line for line in lines if line.name != TEACHER]
    for line in lines:
        last = line.each(lambda run: run.rows[-1]["val_top1"])
        reference = compared[0].each(lambda run: run.rows[-1]["val_top1"]) if compared else []
        changed = line in compared[1:]
        rows.append(
            [
                line.name,
                spread(last),
                f"{mean(last) - mean(reference):+.2f}" if changed else "",
                paper.cell(description["table"], line.name),
                spread(line.each(lambda run: run.best["val_top1"])),
                spread(line.each(lambda run: run.rows[-1]["val_top5"])),
                f"{mean(line.each(lambda run: run.img_per_s)):.0f}",
                str(len(line.runs)),
            ]
        )
        records += [
            {"arm": line.name, "seed": run.recipe["seed"], "epochs": len(run.rows), **_figures(run)}
            for run in line.runs
        ]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    checkpoint.write(out / "table.csv", lambda file: file.write(text.getvalue().encode()))
    title = f"{description['table']}: validation, in percent, over the seeds"
    return Section(title, header, rows, _draw(lines), {"command": _command(out, description)}, paper.NOTE)


def _command(out: Path, description: dict[str, Any]) -> str:
    """The command that continues or repeats the ablation."""
    words = ["fasttricks", "ablate", description["table"], "--out", str(out), "--seeds", str(description["seeds"])]
    words += ["--model", description["model"]]
    words += ["--teacher", description["teacher"]] if description["teacher"] else []
    return shlex.join([*words, *description["options"]])


def _figures(run: Run) -> dict[str, float]:
    last = run.rows[-1]
    return {"top1": last["val_top1"], "top5": last["val_top5"], "best_top1": run.best["val_top1"]}


def _draw(lines: Sequence[Group]) -> Figure:
    """Draws the mean top-1 of each epoch and its range over the seeds."""
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for i, line in enumerate(lines):
        draw_epochs(axes, line, "val_top1", f"C{i}", line.name)
    axes.set(xlabel="epoch", ylabel="validation top-1, %")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def report(out: Path, console: Console) -> Section:
    """Prints the table of an ablation, and writes table.csv, curves.png and report.html to ``out``."""
    found = section(out)
    found.print(console)
    found.save_png(out / "curves.png")
    write_page(out / "report.html", f"Ablation {out.name}", [found])
    files = ", ".join(str(out / name) for name in ("table.csv", "curves.png", "report.html"))
    console.print(files, highlight=False, soft_wrap=True)
    return found
