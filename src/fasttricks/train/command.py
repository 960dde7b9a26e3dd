"""Commands: from the parsed command line to the trainer."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..models import build
from ..nn import zero_init_last
from . import ablation, config, distributed, preview
from . import bench_data as benchmark_of_data
from . import pack as packing
from .checkpoint import CheckpointError, write
from .data import open_data, worker_deaths_explained
from .distributed import World
from .errors import Interrupted, TrainingError
from .images import DataError, DataWarning
from .loop import Trainer
from .page import write_page
from .recipe import Recipe, RecipeError, Run, asked_fields, resolve
from .report import ReportError, read_runs, section


def report(folders: Sequence[Path], png: Path, page: Path | None) -> int:
    """Runs ``fasttricks report``; returns the exit status."""
    console = Console()
    try:
        sections = [ablation.report(folder, console) for folder in folders if _is_ablation(folder)]
        if alone := [folder for folder in folders if not _is_ablation(folder)]:
            compared = section(read_runs(alone))
            compared.print(console)
            compared.save_png(png)
            console.print(f"curves: {png}", highlight=False, soft_wrap=True)
            sections.append(compared)
        if page is not None or alone or len(sections) > 1:  # an ablation has a page of its own
            page = page or Path("report.html")
            write_page(page, "Training runs", sections)
            console.print(f"page: {page}", highlight=False, soft_wrap=True)
    except (ReportError, OSError) as error:
        print(f"fasttricks report: {error}", file=sys.stderr)
        return 1
    return 0


def _is_ablation(folder: Path) -> bool:
    return (folder / "ablation.json").exists()


def ablate(args: argparse.Namespace, options: Sequence[str]) -> int:
    """Runs ``fasttricks ablate`` with ``options`` for every run; returns the exit status."""
    out = args.out or Path("runs") / f"ablate-{args.table}"
    description: dict[str, Any] = {
        "table": args.table,
        "seeds": args.seeds,
        "model": args.model,
        "teacher": args.teacher,
        "options": list(options),
    }
    jobs = ablation.plan(out, **description)
    console = Console()
    try:
        if args.dry_run:
            ablation.check_same(out, description)
            ablation.show_plan(jobs, args.jobs, console)
            return 0
        with ablation.termination_raised():
            failed = ablation.run(out, jobs, description, args.jobs, console)
        if failed:
            print(
                f"fasttricks ablate: {failed} of {len(jobs)} runs failed; the same command continues", file=sys.stderr
            )
            return 1
        ablation.report(out, console)
    except (ablation.AblationError, ReportError) as error:
        print(f"fasttricks ablate: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, ablation.Terminated) as stop:
        print("fasttricks ablate: interrupted; the same command continues", file=sys.stderr)
        return 143 if isinstance(stop, ablation.Terminated) else 130
    return 0


def given_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of the recipe that the command line sets; the recipe and the preset decide the others."""
    given = {name: value for name, value in vars(args).items() if name in Recipe.model_fields and value is not None}
    del given["recipe"]
    if args.bias_decay is not None:
        given["no_bias_decay"] = not args.bias_decay
    return given


@contextlib.contextmanager
def short_warnings() -> Iterator[None]:
    """Warnings about data are one line each, without the code that raised them."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **rest: Any) -> None:
        if issubclass(category, DataWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            shown(message, category, *where, **rest)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


def pack(args: argparse.Namespace) -> int:
    """Runs ``fasttricks pack``; returns the exit status."""
    columns = (TextColumn("{task.description:5}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with short_warnings(), Progress(*columns, console=Console()) as progress:
            tasks = {part: progress.add_task(part, total=None) for part in ("train", "val")}

            def done(part: str, count: int, total: int) -> None:
                progress.update(tasks[part], completed=count, total=total)

            packing.pack(
                args.source, args.out, shard_bytes=args.shard_mb * 1_000_000, overwrite=args.overwrite, done=done
            )
    except (DataError, OSError) as error:
        print(f"fasttricks pack: {error}", file=sys.stderr)
        return 1
    return 0


def bench_data(args: argparse.Namespace) -> int:
    """Runs ``fasttricks bench-data``; returns the exit status."""
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with short_warnings(), worker_deaths_explained():
            options = {"augment": args.augment, "size": args.image_size, "seed": 0}
            recipe = Recipe(
                model=args.model,
                image_size=args.image_size,
                batch_size=args.batch_size,
                precision=args.precision or ("fp16" if device == "cuda" else "fp32"),
                channels_last=device == "cuda",
            )
            benchmark_of_data.show(
                {data: open_data(data, args.data_dir, **options)[0] for data in args.data},
                recipe,
                workers=args.workers,
                device=torch.device(device),
                seconds=args.seconds,
                console=Console(),
            )
    except (DataError, TrainingError, ValueError, OSError) as error:
        print(f"fasttricks bench-data: {error}", file=sys.stderr)
        return 1
    return 0


def train(args: argparse.Namespace) -> int:
    """Runs ``fasttricks train``; returns the exit status."""
    given = given_fields(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("fasttricks train: --device cuda: torch sees no CUDA device", file=sys.stderr)
        return 1
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    world = distributed.start(device)
    console = Console(quiet=not world.first)
    try:
        with short_warnings():
            _train(args, given, world, console)
    except ValidationError as error:
        for fault in error.errors():
            option = "--" + "-".join(str(part) for part in fault["loc"]).replace("_", "-")
            print(f"fasttricks train: {option} {fault['input']}: {fault['msg']}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print(f"fasttricks train: {error}", file=sys.stderr)
        return 128 + error.signal
    except (DataError, RecipeError, CheckpointError, TrainingError, OSError) as error:
        print(f"fasttricks train: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not distributed.lost_peer(error):
            raise
        print(
            f"fasttricks train: rank {world.rank} lost the connection to another rank: {str(error).splitlines()[0]}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("fasttricks train: interrupted; --resume continues from the last checkpoint, if any", file=sys.stderr)
        return 130
    finally:
        distributed.stop(world)
    return 0


def _train(args: argparse.Namespace, given: dict[str, Any], world: World, console: Console) -> None:
    preset = args.preset or ("digits-cpu" if args.data == "digits" else "imagenet")
    out = args.out or Path("runs") / args.recipe
    resume, replace = _what_to_resume(args, out)
    fields = set(Run.model_fields) - {"data", "data_dir", "out", "resume", "device"}
    options = {name: value for name, value in vars(args).items() if name in fields and value is not None}
    if world.device.type == "cuda":
        options.setdefault("workers", 2)
    run = Run(data=args.data, data_dir=args.data_dir, out=out, resume=resume, **options)
    if resume is None and (out / "last.pt").exists() and not replace and not args.dry_run:
        raise TrainingError(
            f"--out {out} already holds a run; give --resume to continue it, --overwrite to replace it or another --out"
        )

    # the batch size depends on the number of images, so the data is opened before the recipe is resolved
    first = asked_fields(args.recipe, preset, given)
    with warnings.catch_warnings():
        if not world.first:  # rank 0 writes the digits and prints the warnings
            world.barrier()
            warnings.simplefilter("ignore", DataWarning)
        train_set, val_set = open_data(
            args.data,
            args.data_dir,
            augment=first.get("augment", "imagenet"),
            size=first.get("image_size", 224),
            seed=first.get("seed", 0),
        )
    if world.first:
        world.barrier()
    if first.get("zero_gamma") and "zero_gamma" not in given and not _has_residual_blocks(first):
        given = {**given, "zero_gamma": False}
        console.print(f"{first['model']} has no known residual block: no zero gamma", highlight=False)
    recipe, notes = resolve(args.recipe, preset, given, train_images=len(train_set), device=world.device.type)
    say = partial(console.print, highlight=False, soft_wrap=True)
    for note in notes:
        say(note)

    trainer = Trainer(recipe, run, train_set, val_set, world, console)
    if args.dry_run:
        if world.first:
            preview.show(
                recipe,
                len(train_set.classes),
                world.size,
                trainer.training_step.teacher,
                trainer.learning_rates(),
                console,
            )
        return
    if world.first:
        trainer.check_output()
        config.save(out / "config.yaml", recipe, run, preset, args.device)
        text = json.dumps(recipe.model_dump(), indent=2) + "\n"
        write(out / "recipe.json", lambda file: file.write(text.encode()))
        if resume is None:
            for old in (out / "last.pt", out / "best.pt", out / "log.csv", *out.glob("not-finite*.pt")):
                old.unlink(missing_ok=True)
    size, parameters = recipe.image_size, sum(p.numel() for p in trainer.model.parameters())
    say(
        f"{recipe.model}, {parameters / 1e6:.2f} M parameters, {'fused' if recipe.fused else 'eager'} modules; "
        f"{len(train_set)} training and {len(val_set)} validation images of {len(train_set.classes)} classes at "
        f"{size}x{size}; recipe {recipe.recipe}: batch {_batch(recipe, world)}, {trainer.steps_per_epoch} steps per "
        f"epoch, "
        f"{recipe.precision}, {world.size} process{'es' if world.size > 1 else ''} on {world.device.type}"
    )
    with worker_deaths_explained():
        trainer.fit()
    say(f"best top-1 {trainer.best_top1:.2f}; log and checkpoints in {out}")


def _what_to_resume(args: argparse.Namespace, out: Path) -> tuple[Path | None, bool]:
    """The checkpoint to continue from, or None, and whether a new run may replace the one in ``out``."""
    last = out / "last.pt"
    restarted = distributed.restarts() > 0
    if restarted and last.exists():
        return last, True
    if args.resume is not True:
        return args.resume, args.overwrite or restarted
    # without a checkpoint, a run that was started here starts again
    return None if (out / "config.yaml").exists() and not last.exists() else last, True


def _batch(recipe: Recipe, world: World) -> str:
    """The images per step, and how they are divided."""
    if recipe.accumulate == 1 and world.size == 1:
        return str(recipe.effective_batch)
    factors = [str(recipe.batch_size // world.size)]
    factors += [f"{recipe.accumulate} passes"] * (recipe.accumulate > 1)
    factors += [f"{world.size} processes"] * (world.size > 1)
    return f"{recipe.effective_batch} = {' x '.join(factors)}"


def _has_residual_blocks(fields: dict[str, Any]) -> bool:
    """Whether the model has blocks that zero gamma applies to. True for unknown models: the trainer reports them."""
    try:
        with torch.device("meta"):
            model = build(fields.get("model", Recipe.model_fields["model"].default), 2, fused=False)
    except (ValueError, ImportError):
        return True
    try:
        zero_init_last(model)
    except ValueError:
        return False
    return True
