"""The paper's tables as sets of runs."""

from __future__ import annotations

import csv
import os
import shutil
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from signal import Signals

import pytest

pytest.importorskip("torchvision")
from PIL import Image
from train_runs import SMALL, rows

from fasttricks.train import ablation, cli, command
from fasttricks.train.recipe import Recipe, resolve

pytestmark = pytest.mark.filterwarnings("always::fasttricks.train.images.DataWarning")


def ablation_lines(table: str, *more: str) -> dict[str, Recipe]:
    """The recipe of each line as it would run on ImageNet, after the command line."""
    found = {}
    for job in ablation.plan(Path("out"), table, 1, "resnet50d", None, more):
        args = cli.parser().parse_args(["train", "--data", "x", *job.options])
        given = command.given_fields(args)
        found[job.arm], _ = resolve(args.recipe, "imagenet", given, train_images=1_281_167, device="cuda")
    return found


def test_the_lines_of_the_tables() -> None:
    """Each line of the stacked tables differs from the one above in its trick alone."""
    fields = {
        "+ warmup": {"warmup_epochs"},
        "+ zero gamma": {"zero_gamma"},
        "+ no bias decay": {"no_bias_decay"},
        "+ fp16": {"precision"},
        "+ cosine": {"schedule"},
        "+ label smoothing": {"label_smoothing"},
        "+ distillation": {"teacher"},
        "+ mixup": {"mixup"},
    }
    for table, before_first in (("efficient", "+ linear scaling"), ("refinements", "efficient")):
        lines = ablation_lines(table)
        names = [name for name in lines if name != ablation.TEACHER]
        for above, name in pairwise(names[names.index(before_first) :]):
            a, b = lines[above].model_dump(), lines[name].model_dump()
            assert {field for field in a if a[field] != b[field]} == fields[name], name
    stacked = ablation_lines("efficient")
    assert stacked["+ fp16"] == resolve("efficient", "imagenet", {}, train_images=1_281_167, device="cuda")[0]
    assert stacked["baseline"] == resolve("baseline", "imagenet", {}, train_images=1_281_167, device="cuda")[0]
    refined = ablation_lines("refinements")
    full = resolve(
        "refined", "imagenet", {"teacher": refined["+ mixup"].teacher}, train_images=1_281_167, device="cuda"
    )[0]
    assert refined["+ mixup"].model_dump(exclude={"recipe"}) == full.model_dump(exclude={"recipe"})
    assert [r.model for r in ablation_lines("tweaks").values()] == [f"resnet50{letter}" for letter in "abcd"]
    sizes = {name: (r.model, r.image_size) for name, r in ablation_lines("models").items()}
    assert sizes["inception_v3, efficient"] == ("inception_v3", 299)


def two_lines(table: str, model: str, teacher: str) -> dict[str, list[str]]:
    """Stands for the lines of a table: a run is a process of its own, which takes seconds to start."""
    return {letter: ["--recipe", "efficient", "--model", model + letter] for letter in "bd"}


@pytest.mark.long
def test_an_ablation_runs_resumes_and_reports(
    tree: Path, tmp_path: Path, capsys: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "arms", two_lines)
    out = tmp_path / "ablation"
    start = ["ablate", "tweaks", "--out", str(out), "--model", "resnet18"]
    more = ["--data", str(tree), *SMALL[2:], "--epochs", "1", "--batch-size", "8"]
    assert cli.main([*start, "--seeds", "1", *more, "--dry-run"]) == 0
    assert "2 runs to do" in capsys.readouterr().out
    assert not out.exists()
    assert cli.main([*start, "--seeds", "1", *more, "--jobs", "2"]) == 0
    printed = capsys.readouterr().out
    assert "2/2" in printed
    with (out / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["arm"] for row in table] == ["b", "d"]
    assert table[1]["top1"] == rows(out / "d" / "seed-0")[-1]["val_top1"]
    # What has finished is kept, what is missing runs.
    kept = (out / "b" / "seed-0" / "last.pt").stat().st_mtime_ns
    shutil.rmtree(out / "d")
    assert cli.main([*start, "--seeds", "1", *more, "--dry-run"]) == 0
    assert "1 runs to do: about" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*start, "--seeds", "1", *more]) == 0
    assert (out / "b" / "seed-0" / "last.pt").stat().st_mtime_ns == kept
    assert cli.main(["report", str(out)]) == 0
    assert Image.open(out / "curves.png").size[0] > 500
    # Other options are another ablation; what the ablation sets is refused.
    assert cli.main([*start, *more, "--epochs", "2"]) == 1
    assert "holds an ablation of other options" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*start, *more, "--seed", "3"])
    assert "--seed: fasttricks ablate sets it" in capsys.readouterr().err


@pytest.mark.long
def test_a_failed_line_of_an_ablation_is_named(
    tree: Path, tmp_path: Path, capsys: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "arms", lambda *_: {"first line": ["--batch-size", "1000"]})
    more = ["--out", str(tmp_path / "ablation"), "--seeds", "1", "--data", str(tree)]
    assert cli.main(["ablate", "tweaks", *more]) == 1
    printed = capsys.readouterr()
    assert "first line, seed 0: failed (1): fasttricks train: --batch-size 1000 is larger" in printed.out
    assert "1 of 1 runs failed" in printed.err


def test_a_terminated_ablation_terminates_its_runs(
    tree: Path, tmp_path: Path, capsys: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each writes its checkpoint first; the next run does not start."""
    started, saved = tmp_path / "started", tmp_path / "saved"
    code = (
        "import pathlib, signal, sys, time\n"
        f"def stop(*_):\n    pathlib.Path({str(saved)!r}).touch()\n    sys.exit(143)\n"
        f"signal.signal(signal.SIGTERM, stop)\npathlib.Path({str(started)!r}).touch()\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(ablation.Job, "command", lambda self: [sys.executable, "-c", code])

    def terminate() -> None:
        while not started.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), Signals.SIGTERM)

    sender = threading.Thread(target=terminate)
    sender.start()
    status = cli.main(["ablate", "tweaks", "--out", str(tmp_path / "out"), "--seeds", "1", "--data", str(tree)])
    sender.join()
    assert status == 143
    assert "the same command continues" in capsys.readouterr().err
    assert saved.exists()
    assert len(list((tmp_path / "out").glob("*/seed-0"))) == 1
