"""Checkpoints: written atomically, and read without executing code.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts; ``torch.load(path, weights_only=True)`` reads it:

    format, recipe, classes, epoch (epochs done), step, best_top1, model, optimizer, scheduler,
    scaler (None without loss scaling), ema (averaged weights; None without), averaged_steps, bad_files,
    rng and progress (one entry per rank; progress is that of the unfinished epoch)
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

FORMAT = 1


class CheckpointError(RuntimeError):
    """The checkpoint cannot be read or is of another model or data set; the message says which."""


def _draft(path: Path) -> Path:
    """Where ``path`` is written before it is renamed. The next write replaces what a killed process left there."""
    return path.with_name(f".{path.name}.new")


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Writes a file atomically: at any moment ``path`` is the previous file or the new one, both complete.

    Args:
        fill: writes the content into the open file.
    """
    draft = _draft(path)
    try:
        with draft.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself survives a power failure
    finally:
        os.close(folder)


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint atomically.

    Raises:
        CheckpointError: it cannot be written, as when the disk is full.
    """
    try:
        write(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split(" (")[0]
        kept = "; the previous file is unchanged" if path.exists() else ""
        raise CheckpointError(f"cannot write {path}: {reason}{kept}") from error


def check_space(folder: Path, size: int, option: str = "--out") -> None:
    """Makes the folder, and reserves and frees the space that a run needs there at once.

    Args:
        size: bytes of a checkpoint. last.pt, best.pt and a new one are there at the same time.

    Raises:
        CheckpointError: the folder cannot be written, or the space is not there.
    """
    probe = _draft(folder / "space")
    held = sum(p.stat().st_size for name in ("last.pt", "best.pt") if (p := folder / name).is_file())
    needed = max(3 * size - held, 1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(bytes(1 << 16))
            file.flush()
            _reserve(file, needed)
            os.fsync(file.fileno())
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason += f"; checkpoints need {needed / 1e6:.4g} MB"
        raise CheckpointError(f"{option} {folder}: cannot write there: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _reserve(file: IO[bytes], size: int) -> None:
    """Allocates the blocks of a file; writes them where the file system cannot allocate."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        chunk = bytes(1 << 24)
        for start in range(0, size, len(chunk)):
            file.write(chunk[: size - start])
        file.flush()


def size_of(model: nn.Module, masters: bool, averaged: bool) -> int:
    """Bytes of a checkpoint of this model: weights, momentum, and fp32 masters and averages where there are."""
    tensors = model.state_dict().values()
    weights = sum(t.numel() * t.element_size() for t in tensors)
    fp32 = sum(4 * p.numel() for p in model.parameters())
    return weights + fp32 * (1 + masters) + averaged * sum(4 * t.numel() for t in tensors)


def load(path: Path, option: str = "--resume") -> dict[str, Any]:
    """Reads a checkpoint onto the CPU. ``option`` is the command-line option that named it.

    Raises:
        CheckpointError: no such file, not a checkpoint of this trainer, or damaged.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{option}: no checkpoint at {path}") from error
    except pickle.UnpicklingError as error:
        reason = "it is no file of torch.save, or holds more than tensors and plain values"
        raise CheckpointError(f"{option}: {path} cannot be read as a checkpoint: {reason}") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0] or "it ends too early"
        raise CheckpointError(f"{option}: {path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{option}: {path} is not a checkpoint of this trainer (format {FORMAT})")
    return state


def load_model(model: nn.Module, state: dict[str, Tensor], path: Path, option: str = "--resume") -> None:
    """Loads weights whose names and shapes must be those of the model.

    Raises:
        CheckpointError: keys or shapes differ; the message names the first few.
    """
    own = model.state_dict()
    faults = [f"lacks {key}" for key in own if key not in state]
    faults += [f"has {key} that the model lacks" for key in state if key not in own]
    faults += [
        f"{key} is {tuple(state[key].shape)}, the model's is {tuple(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{option}: {path} is a checkpoint of another model: {'; '.join(faults[:3])}{more}")
    model.load_state_dict(state)


def all_finite(model: nn.Module) -> bool:
    """Whether every parameter and buffer of floating type is finite."""
    tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
    return bool(torch.stack([torch.isfinite(t).all() for t in tensors]).all())


def rng_state() -> dict[str, Any]:
    """The states of the generators of torch (CPU and every CUDA device), numpy and Python."""
    # numpy's global generator, which transforms of other libraries may use
    kind, words, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    words_as_tensor = torch.from_numpy(np.asarray(words).astype(np.int64))
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, words_as_tensor, int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), gauss_next],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what :func:`rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, words, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
