"""What was built, what is loaded, and why anything is missing: `fasttricks.info()` and `python -m fasttricks.info`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from .backends import build_facts, not_loaded, select


def _version() -> str:
    try:
        return version("fasttricks")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown (not installed)"


def info() -> dict[str, object]:
    """Describes this installation.

    Returns a dict of: fasttricks, torch and python versions; `built` (the build's own facts: torch and compiler it was
    built with, CPU instruction sets, CUDA architectures); `cpu_isa` (the instruction set in use); `loaded` (libraries);
    `not_loaded` (name -> reason); `backend` (what `auto` takes for CPU and CUDA tensors).

    Examples:
        >>> sorted(fasttricks.info())
        ['backend', 'built', 'cpu_isa', 'fasttricks', 'loaded', 'not_loaded', 'python', 'torch']
    """
    built = build_facts()
    loaded = [name for name in ("cpu", "cuda", "triton") if name not in not_loaded]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "fasttricks": _version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "built": built or "not built",
        "cpu_isa": torch.ops.fasttricks.cpu_isa() if "cpu" in loaded else None,
        "loaded": loaded,
        "not_loaded": dict(not_loaded),
        "backend": {d: select("info", torch.device(d)) for d in devices},
    }


def main() -> None:
    for key, value in info().items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, text in value.items():
                print(f"  {name}: {', '.join(text) if isinstance(text, list) else text}")
        else:
            print(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
