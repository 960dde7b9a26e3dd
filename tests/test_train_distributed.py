"""The trainer on two ranks: the same numbers as on one, under torchrun, and after a rank was killed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from signal import Signals
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("torchvision")
if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)
import train_ranks
from cases import relative_error
from torch.utils._pytree import tree_leaves
from train_runs import SMALL, rows, same, train

from fasttricks.train import cli

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
of_two_ranks = pytest.mark.xdist_group("two_ranks")  # one process runs them once
ONE_STATISTIC = ["--sync-bn", "--epochs", "2", "--batch-size", "8"]


def assert_close(one: Path, two: Path) -> None:
    """The results of two runs but for rounding.

    A running mean near zero has the rounding of the values that cancel in it. Momentum changes by a whole gradient's
    share where rounding moves an activation across the zero of its ReLU.
    """
    for name in ("model", "ema", "optimizer", "scheduler", "step", "epoch", "classes"):
        a, b = (tree_leaves(torch.load(out / "last.pt", weights_only=True)[name]) for out in (one, two))
        floats = [i for i, x in enumerate(a) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        assert all(same(x, y) for i, (x, y) in enumerate(zip(a, b, strict=True)) if i not in floats), name
        if floats:
            each, all_of_them = (5e-2, 5e-3) if name == "optimizer" else (1e-3, 1e-5)
            for i in floats:
                assert (b[i] - a[i]).norm() < each * a[i].norm() + 5e-6 * a[i].numel() ** 0.5, name
            whole = [torch.cat([leaves[i].flatten() for i in floats]) for leaves in (a, b)]
            assert relative_error(whole[1], whole[0]) < all_of_them, name
    for a, b in zip(rows(one), rows(two), strict=True):
        for name in a.keys() - {"img_per_s", "train_seconds"}:
            assert float(b[name]) == pytest.approx(float(a[name]), rel=1e-5), name


VARIANTS = {
    "fused": ["--recipe", "efficient", "--ema", "0.9"],
    "eager": ["--recipe", "efficient", "--no-fused"],
    "accumulate": ["--recipe", "efficient", "--accumulate", "2", "--batch-size", "4"],
    "torchvision": ["--fused", "--model", "torchvision/shufflenet_v2_x0_5", "--epochs", "1", "--batch-size", "24"],
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the data, and the runs of all variants on two ranks."""
    from train_runs import write_tree

    root = tmp_path_factory.mktemp("ranks")
    tree = write_tree(root / "data")
    every = [["--data", str(tree), *options_of(name), "--out", str(root / name)] for name in VARIANTS]
    every += [["--data", str(tree), *SMALL, "--batch-size", "8", "--epochs", "1", "--out", str(root / "apart")]]
    diverging = ["--data", str(tree), *SMALL, "--batch-size", "8", "--lr", "1e38", "--out", str(root / "diverging")]
    ran = subprocess.run(
        [sys.executable, train_ranks.__file__, "2", json.dumps([*every, diverging])],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("2 processes on cpu") == len(every) + 1
    assert ran.stdout.count("exit statuses [0, 0]") == len(every)
    assert ran.stdout.count("exit statuses [1, 1]") == 1
    return root


def options_of(variant: str) -> list[str]:
    more = VARIANTS[variant]
    small = [*SMALL[:2], *SMALL[4:]] if variant == "torchvision" else SMALL  # without --width
    return [*small, *ONE_STATISTIC, *more]


@of_two_ranks
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_are_one(two_ranks: Path, variant: str, tmp_path: Path) -> None:
    """With the statistics of batch norm over both ranks."""
    where = ["--data", str(two_ranks / "data"), "--out", str(tmp_path / "one")]
    assert cli.main(["train", *where, *options_of(variant)]) == 0
    assert_close(tmp_path / "one", two_ranks / variant)


@of_two_ranks
def test_statistics_of_each_rank(two_ranks: Path, tmp_path: Path) -> None:
    """Without --sync-bn, the result is another; each rank has its random numbers."""
    assert train(two_ranks / "data", tmp_path / "one", "--batch-size", "8", "--epochs", "1") == 0
    with pytest.raises(AssertionError):
        assert_close(tmp_path / "one", two_ranks / "apart")
    assert len(torch.load(two_ranks / "apart" / "last.pt", weights_only=True)["rng"]) == 2


@of_two_ranks
def test_a_loss_that_is_not_finite(two_ranks: Path) -> None:
    """All ranks stop, and each keeps its batch."""
    kept = [torch.load(two_ranks / "diverging" / f"not-finite-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert kept[0]["step"] == kept[1]["step"]
    assert not same(kept[0]["images"], kept[1]["images"])
    assert all(len(images) == 4 for each in kept for images in each["images"])


@pytest.mark.long
def test_a_signal_stops_all_ranks_after_the_same_step(tree: Path, tmp_path: Path) -> None:
    """Sent to one of them; the run resumes."""
    out = tmp_path / "run"
    where = ["--data", str(tree), "--out", str(out), *SMALL, *ONE_STATISTIC]
    arguments = [sys.executable, train_ranks.__file__, "2", json.dumps([[*where, "--epochs", "1000"]])]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(arguments, env=ENVIRONMENT, **pipes) as process:
        while not (out / "last.pt").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), Signals.SIGTERM)
        printed, errors = process.communicate(timeout=120)
    assert printed.endswith("exit statuses [143, 143]\n")
    lines = [line for line in errors.splitlines() if line.startswith("fasttricks train:")]
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert re.search(r"stopped by SIGTERM after (step|epoch) \d+; ", lines[0])
    state = torch.load(out / "last.pt", weights_only=True)
    assert [each["steps"] for each in state["progress"]] == [state["step"] - 3 * state["epoch"]] * 2


def rank_of(pid: int, rank: int) -> int | None:
    """The process with this rank among the children of torchrun."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    return None


@pytest.mark.long
def test_torchrun_restarts_from_the_last_checkpoint(tree: Path, tmp_path: Path) -> None:
    """A rank is killed within an epoch; the rest of the run is that of one process without a fault."""
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--monitor-interval=0.1"]
    options = ["--recipe", "efficient", *ONE_STATISTIC, "--epochs", "6", "--save-every", "1", "--ema", "0.5"]
    command = [*torchrun, "-m", "fasttricks.train", "--data", str(tree), "--out", str(out), *SMALL, *options]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=ENVIRONMENT, **pipes) as process:
        while not (out / "last.pt").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        victim = rank_of(process.pid, 1)
        assert victim is not None
        os.kill(victim, Signals.SIGKILL)
        printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]
    assert printed.count("resumed") == 1
    lost = [line for line in errors.splitlines() if line.startswith("fasttricks train:")]
    assert all("lost the connection to another rank" in line for line in lost)
    assert "Traceback" not in errors
    assert train(tree, tmp_path / "one", *options) == 0
    assert_close(tmp_path / "one", out)
