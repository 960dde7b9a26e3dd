"""Which implementation of an op runs (auto, cuda, triton, cpu, reference), and why not another."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

CHOICES = ("auto", "cuda", "triton", "cpu", "reference")
LIB = Path(__file__).resolve().parent / "lib"
CPU_LIBRARY = LIB / "libfasttricks_cpu.so"

# why a library is not loaded; a missing key means that it is
not_loaded: dict[str, str] = {}


def build_facts() -> dict[str, object]:
    """What the build wrote about itself (build.json): torch and compiler used, ISAs, architectures; {} if not built."""
    path = LIB / "build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _load(name: str, path: Path) -> None:
    if not path.exists():
        not_loaded[name] = f"not built: {path.name} is not in {path.parent}"
        return
    try:
        torch.ops.load_library(str(path))
    except (OSError, ImportError, RuntimeError) as error:
        built = build_facts().get("torch", "unknown")
        not_loaded[name] = f"built with torch {built}, does not load on torch {torch.__version__}: {error}"
        warnings.warn(f"fasttricks: {path.name} {not_loaded[name]}. Plain torch is used instead.", stacklevel=3)


def load_libraries() -> None:
    """Loads the op libraries; what cannot be loaded is left out with one warning (`fasttricks.info()` says why)."""
    _load("cpu", CPU_LIBRARY)
    for name in ("cuda", "triton"):
        not_loaded[name] = f"this build has no {name} kernels"


def _check(name: str, argument: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{argument} is {name!r}; accepted: {', '.join(CHOICES)}")
    return name


# a plain global, not a context variable: torch.compile guards on it, and autograd's own threads see it
_wish = _check(os.environ.get("FASTTRICKS_BACKEND") or "auto", "FASTTRICKS_BACKEND")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within this context every op runs on the named backend: auto, cuda, triton, cpu or reference.

    Raises ValueError for another name, and an op raises RuntimeError where that backend cannot serve its tensors.
    """
    global _wish
    before, _wish = _wish, _check(name, "backend")
    try:
        yield
    finally:
        _wish = before


def why_not(name: str, device: torch.device) -> str | None:
    """Why backend `name` cannot serve tensors on `device`; None if it can."""
    if name == "reference":
        return None
    # meta and fake tensors take the road that real ones take; the fakes are registered for every library
    if name == "cpu":
        if device.type not in ("cpu", "meta"):
            return f"the cpu backend takes tensors on the CPU, these are on {device}"
        return not_loaded.get("cpu")
    if name in ("cuda", "triton"):
        if device.type != "cuda":
            return f"the {name} backend takes CUDA tensors, these are on {device}"
        return not_loaded.get(name)
    raise ValueError(f"backend is {name!r}; accepted: {', '.join(CHOICES[1:])}")


def select(op: str, device: torch.device) -> str:
    """The backend for `op` on `device`: the forced one, else the first of cuda, triton, cpu, reference that fits."""
    if _wish != "auto":
        if reason := why_not(_wish, device):
            raise RuntimeError(f"fasttricks.{op}: backend {_wish!r} was asked for, but {reason}")
        return _wish
    for name in ("cuda", "triton", "cpu"):
        if why_not(name, device) is None:
            return name
    return "reference"


load_libraries()
