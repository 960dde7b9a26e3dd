"""What goes wrong during a run: losses, disks, signals and data workers."""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from signal import Signals, default_int_handler, getsignal
from signal import signal as handle
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")
from PIL import Image
from torch.utils.data import get_worker_info
from train_runs import SMALL, differences, refused, same, train

from fasttricks import models
from fasttricks.train import checkpoint, command, data, images, loop
from fasttricks.train.objective import keep_norms_in_fp32
from fasttricks.train.recipe import DTYPES, Recipe
from fasttricks.train.step import Step

pytestmark = pytest.mark.filterwarnings("always::fasttricks.train.images.DataWarning")


def diverged(tree: Path, out: Path, *more: str) -> dict[str, Any]:
    """What a run with an absurd learning rate keeps of the batch that gave no finite loss."""
    assert train(tree, out, "--epochs", "3", "--batch-size", "4", "--warmup-epochs", "0", "--lr", "1e38", *more) == 1
    return torch.load(out / "not-finite.pt", weights_only=True)


def of_the_kept_batch(kept: dict[str, Any]) -> torch.Tensor:
    """Its loss, computed again."""
    recipe = Recipe(**kept["recipe"])
    model = models.build(recipe.model, len(kept["classes"]), width=recipe.width, fused=recipe.fused)
    model = keep_norms_in_fp32(model, DTYPES[recipe.precision])
    model.load_state_dict(kept["model"])
    losses = [
        torch.nn.functional.cross_entropy(model.train()(images).float(), labels)
        for images, labels in zip(kept["images"], kept["labels"], strict=True)
    ]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("more", [["--no-fused"], [], ["--accumulate", "2"], ["--precision", "bf16"]], ids=" ".join)
def test_a_loss_that_is_not_finite_is_kept_with_its_batch(
    tree: Path, tmp_path: Path, capsys: object, more: list[str]
) -> None:
    """The file gives the loss again, and names the step."""
    kept = diverged(tree, tmp_path / "run", *more)
    printed = capsys.readouterr().err
    assert f"the loss of step {kept['step']} is not finite; its batch and the weights are in" in printed
    assert "there is no checkpoint yet" in printed
    assert not math.isfinite(kept["loss"])
    assert not torch.isfinite(of_the_kept_batch(kept))
    assert [len(images) for images in kept["images"]] == [4] * (2 if "--accumulate" in more else 1)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_batch_is_found_some_steps_later(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Where the host looks at the loss every few steps: the weights are still those of the step."""
    kept = [diverged(tree, tmp_path / "at_once", "--precision", precision)]

    class Later(loop.Trainer):
        def train_epoch(self, *tensorboard: Any) -> dict[str, Any]:
            self.look_every = 5
            return super().train_epoch(*tensorboard)

    monkeypatch.setattr(command, "Trainer", Later)
    kept.append(diverged(tree, tmp_path / "later", "--precision", precision))
    assert kept[1]["step"] == kept[0]["step"] % 5
    for part in ("images", "labels"):
        assert same(kept[0][part], kept[1][part])
    parameters = [name for name, _ in models.build("resnet18d", 3, width=4).named_parameters()]
    assert all(same(kept[0]["model"][name], kept[1]["model"][name]) for name in parameters)


def test_divergence_keeps_the_last_good_epoch(tree: Path, tmp_path: Path, capsys: object) -> None:
    out = tmp_path / "run"
    assert train(tree, out, "--epochs", "1", "--batch-size", "8", "--recipe", "baseline") == 0
    best = (out / "best.pt").read_bytes()
    more = ["--epochs", "3", "--batch-size", "8", "--recipe", "baseline", "--lr", "1e30", "--resume"]
    assert train(tree, out, *more) == 1
    printed = capsys.readouterr().err
    assert "not finite" in printed
    assert "last.pt holds an earlier state" in printed
    assert (out / "best.pt").read_bytes() == best


def test_weights_that_are_not_finite_are_not_saved(
    tree: Path, tmp_path: Path, capsys: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss that was finite, as when a gradient overflows."""
    update = Step.update

    def poison(self: Step) -> None:
        update(self)
        if next(steps) == 5:
            next(self.model.parameters()).data.flatten()[0] = float("nan")

    monkeypatch.setattr(Step, "update", poison)
    steps = itertools.count(1)
    assert train(tree, tmp_path / "run", "--epochs", "3", "--batch-size", "4", "--save-every", "1") == 1
    assert "a weight or a running statistic is not finite (epoch 1, step 5" in capsys.readouterr().err
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 4


# ---- output that cannot be written ----


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_output_is_checked_before_training(
    tree: Path, tmp_path: Path, capsys: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["--data", tree, *SMALL, "--batch-size", "8", "--out"]
    with files_of_at_most(100_000):
        printed = refused(capsys, *base, tmp_path / "small")
    assert "cannot write there: File too large; checkpoints need" in printed
    assert list((tmp_path / "small").iterdir()) == []
    assert "cannot write there: Not a directory" in refused(capsys, *base, "/dev/null/run")
    assert "cannot write there: No such file or directory" in refused(capsys, *base, "/proc/run")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    printed = refused(capsys, *base, tmp_path / "full", "--ema", "0.5", "--precision", "bf16")
    model = models.build("resnet18d", 3, width=4)
    state = sum(t.numel() for t in model.state_dict().values()) * 4
    assert "cannot write there: No space left on device; checkpoints need" in printed
    needed = float(re.findall(r"need ([0-9.e+]+) MB", printed)[0]) * 1e6
    assert 3 * 2 * state < needed < 3 * 5 * state


def test_space_where_blocks_cannot_be_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are written."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    with files_of_at_most(100_000_000):
        checkpoint.check_space(tmp_path, 33_000_000)
        with pytest.raises(checkpoint.CheckpointError, match="File too large; checkpoints need 102 MB"):
            checkpoint.check_space(tmp_path, 34_000_000)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_later(
    tree: Path, tmp_path: Path, capsys: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint stays, and the run resumes from it."""
    options = ["--epochs", "3", "--batch-size", "8", "--recipe", "baseline"]
    assert train(tree, tmp_path / "whole", *options) == 0
    out, save = tmp_path / "run", checkpoint.save

    def save_on_a_full_disk(path: Path, state: dict[str, Any]) -> None:
        with files_of_at_most(50_000) if state["epoch"] == 2 else contextlib.nullcontext():
            save(path, state)

    monkeypatch.setattr(checkpoint, "save", save_on_a_full_disk)
    assert train(tree, out, *options) == 1
    printed = capsys.readouterr().err
    assert re.search(r"cannot write .*(best|last)\.pt: .*; the previous file is unchanged\n$", printed)
    assert "Traceback" not in printed
    assert torch.load(out / "last.pt", weights_only=True)["epoch"] == 1
    monkeypatch.undo()
    assert train(tree, out, *options, "--resume") == 0
    assert differences(tmp_path / "whole", out) == []


# ---- signals ----


def train_with_signals(tree: Path, out: Path, signals: dict[int, Signals], *more: str) -> int:
    """A run that sends itself signals while it receives these batches."""
    received = 0

    class Watched(loop.Trainer):
        def _receive(self, batch: data.Batch, training: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal received
            received += training
            if training and received in signals:
                os.kill(os.getpid(), signals.pop(received))
            return super()._receive(batch, training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "Trainer", Watched)
        return train(tree, out, *more)


@pytest.mark.parametrize(("signal", "status"), [(Signals.SIGINT, 130), (Signals.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_writes_a_checkpoint(
    tree: Path, tmp_path: Path, capsys: object, signal: Signals, status: int
) -> None:
    options = ["--epochs", "3", "--batch-size", "4", "--recipe", "efficient"]
    assert train(tree, tmp_path / "whole", *options) == 0
    before = [getsignal(number) for number in (Signals.SIGINT, Signals.SIGTERM)]
    assert train_with_signals(tree, tmp_path / "run", {9: signal}, *options) == status
    printed = capsys.readouterr().err
    assert f"stopped by {signal.name} after step 9; the same command with --resume continues from" in printed
    assert [getsignal(number) for number in (Signals.SIGINT, Signals.SIGTERM)] == before
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"], state["progress"][0]["steps"]) == (1, 9, 3)
    assert train(tree, tmp_path / "run", *options, "--resume") == 0
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def test_a_second_interrupt_acts_at_once(tree: Path, tmp_path: Path, capsys: object) -> None:
    """During accumulation, before the step ends: no checkpoint is written."""
    options = ["--epochs", "3", "--batch-size", "4", "--accumulate", "3"]
    signals = {4: Signals.SIGINT, 5: Signals.SIGINT}
    before = handle(Signals.SIGINT, default_int_handler)  # processes of pytest -n may ignore it
    try:
        assert train_with_signals(tree, tmp_path / "run", signals, *options) == 130
    finally:
        handle(Signals.SIGINT, before)
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.long
def test_an_interrupt_from_the_terminal(tree: Path, tmp_path: Path) -> None:
    """The whole process group gets it, data workers too."""
    out = tmp_path / "run"
    arguments = [sys.executable, "-m", "fasttricks.train", "--data", str(tree), "--out", str(out), *SMALL]
    arguments += ["--epochs", "10000", "--batch-size", "4", "--workers", "1", "--save-every", "5"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True) as process:
        while not (out / "last.pt").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        os.killpg(process.pid, Signals.SIGINT)
        printed = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert re.fullmatch(r"fasttricks train: stopped by SIGINT after (step|epoch) \d+; .*--resume.*\n", printed), printed


# ---- data workers ----


@pytest.mark.parametrize("signal", [Signals.SIGKILL, Signals.SIGBUS])
def test_a_killed_worker_takes_one_sentence(
    tree: Path, tmp_path: Path, capsys: object, monkeypatch: pytest.MonkeyPatch, signal: Signals
) -> None:
    decode = images.decode_rgb

    def decode_or_die(file: bytes) -> Image.Image | torch.Tensor:
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal)
        return decode(file)

    monkeypatch.setattr(images, "decode_rgb", decode_or_die)  # forked workers have it too
    monkeypatch.setattr(
        multiprocessing.context._default_context, "_actual_context", multiprocessing.get_context("fork")
    )
    printed = refused(capsys, "--data", tree, "--out", tmp_path / "run", *SMALL, "--workers", "1")
    assert "a worker that reads images died" in printed
    assert "--workers 0" in printed
    assert "/dev/shm" in printed
    assert len([line for line in printed.splitlines() if line.startswith("fasttricks train:")]) == 1
