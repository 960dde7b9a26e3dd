"""avgpool_conv1x1 on every instruction set that this CPU has, each forced in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def instruction_sets() -> list[str]:
    sets = ["generic"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        best = torch.backends.cpu.get_cpu_capability()
        sets += ["avx2"] if best in ("AVX2", "AVX512") else []
        sets += ["avx512"] if best == "AVX512" else []
    return sets


@pytest.mark.parametrize("isa", instruction_sets())
def test_values_on(isa: str, request: pytest.FixtureRequest) -> None:
    """The value tests of test_avgpool_conv1x1.py; the process says which instruction set it ran."""
    env = dict(os.environ, FASTTRICKS_CPU_ISA=isa, FASTTRICKS_BACKEND="cpu")
    chosen = "(test_values or test_any or test_one or test_nan or test_windows or test_half) and not reference"
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*pytest_, "test_avgpool_conv1x1.py", "-k", chosen, f"--seed={request.config.getoption('--seed')}"],
        cwd=HERE,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout
    ask = "import torch, fasttricks; print(torch.ops.fasttricks.cpu_isa())"
    told = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True, check=True).stdout
    assert told.strip() == isa
