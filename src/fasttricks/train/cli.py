"""The command line: ``fasttricks train``, ``ablate``, ``report``, ``pack`` and ``bench-data``."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The parser of the command. Options that are not given are None: the recipe or the preset decides."""
    main_parser = argparse.ArgumentParser(prog="fasttricks", description=__doc__)
    commands = main_parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser(
        "train",
        allow_abbrev=False,
        help="train an image classifier",
        description="Train an image classifier with a recipe of He et al. 2018. Under torchrun: one process a device.",
    )
    switch = argparse.BooleanOptionalAction
    where = train.add_argument_group("data and output")
    where.add_argument(
        "--config", type=Path, metavar="FILE.yaml", help="options from a file; those of the command line override them"
    )
    where.add_argument("--data", required=True, help="a directory with train/CLASS/* and val/CLASS/*, or 'digits'")
    where.add_argument("--data-dir", type=Path, help="where 'digits' is written (default: the user's cache)")
    where.add_argument("--out", type=Path, help="folder of the run (default: runs/RECIPE)")
    where.add_argument("--dry-run", action="store_true", help="print size, steps and learning rate, and stop")
    where.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    where.add_argument(
        "--resume", nargs="?", const=True, type=Path, metavar="PATH", help="continue from PATH (default: OUT/last.pt)"
    )
    where.add_argument(
        "--save-every", type=int, metavar="N", help="write a checkpoint every N steps, too (default: after each epoch)"
    )
    where.add_argument("--workers", type=int, help="reading processes per rank (default: 2 on CUDA, 0 on CPU)")
    where.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    where.add_argument("--log-every", type=int, help="steps between points in TensorBoard (default: 10)")

    what = train.add_argument_group("recipe")
    what.add_argument("--recipe", choices=["baseline", "efficient", "refined"], default="efficient")
    what.add_argument(
        "--preset",
        choices=["imagenet", "digits-cpu"],
        help="sizes for the data; digits-cpu: width 24, 40x40 pixels, small batches (default for --data digits)",
    )
    what.add_argument(
        "--model",
        help="resnet{18,34,50,101,152}{,a,b,c,d}, mobilenet_v1, inception_v3, nin, torchvision/NAME or timm/NAME",
    )
    what.add_argument("--width", type=int, help="channels of the first stage, for own models (64 for ResNet)")
    what.add_argument("--fused", action=switch, help="fused modules and optimizer, or eager ones")
    what.add_argument("--channels-last", action=switch, help="NHWC instead of NCHW (default: on CUDA)")
    what.add_argument("--image-size", type=int, help="edge of the images in pixels")
    what.add_argument("--augment", choices=["imagenet", "digits"])
    what.add_argument("--epochs", type=int)
    what.add_argument("--batch-size", type=int, help="images per forward and backward pass, over all processes")
    what.add_argument("--accumulate", type=int, metavar="N", help="passes per step, whose gradients are averaged")
    what.add_argument("--sync-bn", action=switch, help="statistics of batch norm over all processes")
    what.add_argument("--precision", choices=["fp32", "fp16", "bf16"], help="fp16 and bf16 keep fp32 master weights")
    what.add_argument("--optimizer", choices=["sgd", "lars"])
    what.add_argument("--lr", type=float, help="learning rate; at a batch of 256 with --linear-lr")
    what.add_argument("--momentum", type=float)
    what.add_argument("--nesterov", action=switch)
    what.add_argument("--weight-decay", type=float)
    what.add_argument("--schedule", choices=["step", "cosine"], help="after the warmup")
    what.add_argument("--seed", type=int)

    tricks = train.add_argument_group("tricks")
    tricks.add_argument("--linear-lr", action=switch, help="scale the learning rate by batch/256")
    tricks.add_argument("--warmup-epochs", type=float, help="epochs over which the learning rate rises from 0")
    tricks.add_argument("--zero-gamma", action=switch, help="the last gamma of a residual block starts at 0")
    tricks.add_argument("--bias-decay", action=switch, help="weight decay also of biases, gamma and beta")
    tricks.add_argument(
        "--xavier",
        action=switch,
        help="Xavier-uniform weights and zero biases (the default), or the initialisation of the library",
    )
    tricks.add_argument("--label-smoothing", type=float, metavar="EPS", help="0.1 in the paper")
    tricks.add_argument("--mixup", type=float, metavar="ALPHA", help="0.2 in the paper")

    tricks.add_argument(
        "--teacher",
        metavar="MODEL",
        help="distil from a checkpoint, or from torchvision/NAME or timm/NAME with its published weights",
    )
    tricks.add_argument("--temperature", type=float, metavar="T", help="of the distillation (default: 20)")
    tricks.add_argument(
        "--ema", type=float, metavar="DECAY", help="keep a moving average of the weights, and validate it"
    )

    speed = train.add_argument_group("execution")
    speed.add_argument("--compile", action=switch, help="torch.compile the model")
    speed.add_argument(
        "--cuda-graph", action=switch, help="launch each step as one CUDA graph (default: on CUDA, if possible)"
    )

    guard = train.add_argument_group("when to stop")
    guard.add_argument("--max-skipped-steps", type=int, help="overflowing steps in a row (default: 30)")
    guard.add_argument("--min-loss-scale", type=float, help="smallest loss scale (default: 2^-10)")
    guard.add_argument(
        "--max-bad-files", type=float, metavar="SHARE", help="of the images that may be unreadable (default: 0.1)"
    )

    ablate = commands.add_parser(
        "ablate",
        allow_abbrev=False,  # --seed must not match --seeds
        help="train the rows of one of the paper's tables",
        description="Train every row of one of the paper's tables with several seeds. Further options are those of "
        "fasttricks train, for every run. Finished runs are kept; interrupted ones resume.",
    )
    ablate.add_argument(
        "table",
        choices=["efficient", "tweaks", "refinements", "models"],
        help="section 3's heuristics, ResNet-A to D, section 5's refinements, or three networks",
    )
    ablate.add_argument("--out", type=Path, help="folder of the ablation (default: runs/ablate-TABLE)")
    ablate.add_argument("--seeds", type=_at_least_one, default=3, metavar="N", help="seeds 0 to N-1 (default: 3)")
    ablate.add_argument("--model", default="resnet50d", help="of every row (default: resnet50d); not for 'models'")
    ablate.add_argument("--teacher", help="for distillation (default: a ResNet-152-D is trained first)")
    ablate.add_argument("--jobs", type=_at_least_one, default=1, metavar="N", help="runs at a time, one per device")
    ablate.add_argument("--dry-run", action="store_true", help="print what would run, and stop")

    report = commands.add_parser("report", help="compare runs: a table, curves, and an HTML page of both")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="--out folders of runs or of ablations")
    report.add_argument("--html", type=Path, help="file of the page (default: report.html, or that of the ablation)")
    report.add_argument("--png", type=Path, default=Path("curves.png"), help="file of the curves (default: curves.png)")

    pack = commands.add_parser(
        "pack",
        help="pack a folder of images into tar shards of WebDataset",
        description="Pack a directory with train/CLASS/* and val/CLASS/* into tar shards. --data takes the result.",
    )
    pack.add_argument("source", type=Path, metavar="DIR", help="a directory with train/CLASS/* and val/CLASS/*")
    pack.add_argument("out", type=Path, metavar="OUT", help="the folder of the shards")
    pack.add_argument("--shard-mb", type=_at_least_one, default=1000, metavar="MB", help="size of a shard (1000)")
    pack.add_argument("--overwrite", action="store_true", help="replace packed images in OUT")

    bench = commands.add_parser(
        "bench-data",
        help="images per second that can be read, beside those that a model takes",
        description="Read and augment images for some seconds with each number of workers, then train on one batch.",
    )
    bench.add_argument("--data", required=True, nargs="+", help="as for fasttricks train; several are compared")
    bench.add_argument("--data-dir", type=Path, help="where 'digits' is written (default: the user's cache)")
    bench.add_argument("--model", default="resnet50d", help="as for fasttricks train (default: resnet50d)")
    bench.add_argument("--image-size", type=_at_least_one, default=224, help="edge of the images in pixels (224)")
    bench.add_argument("--batch-size", type=_at_least_one, default=64)
    bench.add_argument("--augment", choices=["imagenet", "digits"], default="imagenet")
    bench.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4], metavar="N")
    bench.add_argument(
        "--precision", choices=["fp32", "fp16", "bf16"], help="of the model (default: fp16 on CUDA, fp32 on a CPU)"
    )
    bench.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    bench.add_argument("--seconds", type=float, default=5.0, help="for each number of workers, and for the model (5)")
    return main_parser


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: accepted: at least 1")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 0, 1 after one sentence on stderr, or 128 + the signal."""
    commands = parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["train"]:
            argv = _with_config(argv)
        args, rest = commands.parse_known_args(argv)
        if args.command == "ablate":
            _check_options(rest)
        elif rest:
            commands.error(f"unrecognized arguments: {' '.join(rest)}")
    except ImportError as error:
        print(f"fasttricks {argv[0]}: --config: {error}; pip install 'fasttricks[train]'", file=sys.stderr)
        return 1
    except RuntimeError as error:  # of a configuration
        print(f"fasttricks {argv[0]}: {error}", file=sys.stderr)
        return 1
    try:
        from . import command
    except ImportError as error:
        print(f"fasttricks {args.command}: {error}; pip install 'fasttricks[train]'", file=sys.stderr)
        return 1
    if args.command == "report":
        return command.report(args.runs, args.png, args.html)
    if args.command == "ablate":
        return command.ablate(args, rest)
    if args.command == "pack":
        return command.pack(args)
    if args.command == "bench-data":
        return command.bench_data(args)
    return command.train(args)


def _with_config(argv: list[str]) -> list[str]:
    """Inserts the options of --config before those of the command line, which therefore override them."""
    finder = argparse.ArgumentParser(prog="fasttricks train", add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    path = finder.parse_known_args(argv)[0].config
    if path is None:
        return argv
    from . import config

    options = config.arguments(path)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            _, unknown = parser().parse_known_args(["train", "--data=", *options])
    except SystemExit as error:  # argparse has printed the usage, and what is wrong with a value
        raise config.ConfigError(f"--config {path}: {printed.getvalue().rpartition('error: ')[2].strip()}") from error
    if unknown:
        names = ", ".join(option.partition("=")[0] for option in unknown)
        raise config.ConfigError(f"--config {path}: {names}: not among the options of fasttricks train --help")
    return [*argv[:1], *options, *argv[1:]]


# options that an ablation sets for each run
_SET_BY_ABLATION = ("--recipe", "--out", "--overwrite", "--resume", "--seed")


def _check_options(options: Sequence[str]) -> None:
    """Exits as argparse does if an option is unknown to ``fasttricks train`` or one that an ablation sets."""
    commands = parser()
    commands.parse_args(_with_config(["train", *options]))
    for option in options:
        if option.partition("=")[0] in _SET_BY_ABLATION:
            commands.error(f"{option}: fasttricks ablate sets it for each run")
