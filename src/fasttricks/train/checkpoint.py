"""Checkpoints: written atomically, and read without executing code.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts; ``torch.load(path, weights_only=True)`` reads it:

    format, recipe, classes, epoch (epochs done), step, best_top1, model, optimizer, scheduler,
    scaler (None without loss scaling), ema (averaged weights; None without), rng (one entry per rank)
"""

from __future__ import annotations

import os
import pickle
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FORMAT = 1


class CheckpointError(RuntimeError):
    """The checkpoint cannot be read or is of another model or data set; the message says which."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` next to ``path``, flush it to disk and rename it into place: at any moment ``path`` is the old
    file or the new one, never half of one."""
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def load(path: Path, option: str = "--resume") -> dict[str, Any]:
    """Reads a checkpoint onto the CPU. ``option`` is the command-line option that named it.

    Raises:
        CheckpointError: no such file, not a checkpoint of this trainer, or damaged.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{option}: no checkpoint at {path}") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{option}: {path} cannot be read as a checkpoint: {error}") from error
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
