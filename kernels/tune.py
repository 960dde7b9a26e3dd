"""The choice among a few tiles of a kernel: the first, or the fastest for a class of shapes (FASTTRICKS_AUTOTUNE=1).

The choices are kept in $FASTTRICKS_CACHE (default ~/.cache/fasttricks), one file per card and version of Triton.
Only kernels that give the same result when they run again are measured: those of sgd, which work in place, are not.
Tiles differ in the order of additions: results are bitwise reproducible only with the same choices.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

Choice = TypeVar("Choice")


def enabled() -> bool:
    return os.environ.get("FASTTRICKS_AUTOTUNE") == "1"


def bucket(*sizes: int) -> str:
    """A class of sizes: their powers of two."""
    return "x".join(str(size.bit_length()) for size in sizes)


def fastest(
    name: str,
    family: Callable[[], str],
    device: torch.device,
    choices: Sequence[Choice],
    run: Callable[[Choice], Any],
) -> Choice:
    """The choice for kernel `name` and the class of shapes that family() names; run(choice) launches the kernel."""
    if len(choices) == 1 or not enabled():
        return choices[0]
    kept, key = _kept(_path(device)), f"{name} {family()}"
    known = kept.get(key)
    if known is None and not _capturing(device):
        times = [measured(functools.partial(run, choice)) for choice in choices]
        known = str(choices[times.index(min(times))])
        kept[key] = known
        _write(_path(device), kept)
    # a file written by another version is not trusted
    return next((choice for choice in choices if str(choice) == known), choices[0])


def measured(run: Callable[[], Any]) -> float:
    """Milliseconds of one run."""
    return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.lru_cache
def _path(device: torch.device) -> Path:
    folder = Path(os.environ.get("FASTTRICKS_CACHE") or Path.home() / ".cache" / "fasttricks")
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return folder / f"{card.replace(' ', '_')}-triton-{triton.__version__}.json"


@functools.lru_cache
def _kept(path: Path) -> dict[str, str]:
    """Cached choices; {} if the file is unreadable."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(path.read_text()))
    return {}


def _write(path: Path, kept: dict[str, str]) -> None:
    """Merges concurrent writes; on I/O failure the choices stay in memory only."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError, ValueError):
            kept.update({**json.loads(path.read_text()), **kept})
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(kept, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
