"""Runs the tests of a file in a process that forces one instruction set of the CPU library."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch


def instruction_sets() -> list[str]:
    """The instruction sets that this CPU has, the best one last: all other tests run on it."""
    sets = ["generic"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        best = torch.backends.cpu.get_cpu_capability()
        sets += ["avx2"] if best in ("AVX2", "AVX512") else []
        sets += ["avx512"] if best == "AVX512" else []
    return sets


def run_on(isa: str, file: str, chosen: str, seed: int) -> None:
    """Asserts that the tests of `file` selected by `-k chosen` pass on `isa`, and that the library uses it."""
    env = dict(os.environ, FASTTRICKS_CPU_ISA=isa, FASTTRICKS_BACKEND="cpu")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", chosen, f"--seed={seed}"]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout
    ask = "import torch, fasttricks; print(torch.ops.fasttricks.cpu_isa())"
    printed = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == isa
