"""The emulator of CUDA kernels: its primitives are right in every build and thread order; planted faults are caught."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent / "emulator"
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this file tests no Triton kernel", allow_module_level=True)

from emulated import Build, sanitized  # noqa: E402

ORDERS = ("ascending", "descending", "random")


@functools.cache
def library(kind: str) -> Path:
    return Build(kind, ops=(), sources=(HERE / "primitives.cpp",), name=f"primitives-{kind}").make()


def run(kind: str, name: str, fault: int, order: str, landing: str = "late") -> str:
    """The output of the emulator or the sanitizer; "" if it found nothing wrong."""
    command = [sys.executable, str(HERE / "run_primitive.py"), str(library(kind)), name, str(fault), order, landing]
    done = subprocess.run(command, capture_output=True, text=True, env=sanitized(kind))
    return "" if done.returncode == 0 else done.stderr


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["neighbours", "ring", "votes", "product"])
@pytest.mark.parametrize("kind", ["plain", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("asan", "tsan"))])
def test_primitives_are_right(kind: str, name: str, order: str) -> None:
    assert run(kind, name, 0, order, "early" if order == "descending" else "late") == ""


@pytest.mark.parametrize("stride", [1, 2, 3, 8, 12, 32])
def test_bank_conflicts_are_counted(stride: int) -> None:
    assert run("plain", "banks", stride, "ascending") == ""


# fault -> build, primitive, number of the fault, thread order, when cp.async lands, expected output
FAULTS = {
    "barrier removed: stale values": ("plain", "neighbours", 1, "ascending", "late", "wrong result"),
    "barrier removed: a race": ("tsan", "neighbours", 1, "ascending", "late", "data race"),
    "barrier reached by some": ("plain", "neighbours", 2, "ascending", "late", "deadlock"),
    "threads returned before a shuffle": ("plain", "neighbours", 3, "ascending", "late", "deadlock"),
    "shared array overrun": ("asan", "neighbours", 4, "ascending", "late", "out of bounds"),
    "shared memory read before it is written": ("plain", "neighbours", 5, "ascending", "late", "wrong result"),
    "global memory overrun": ("asan", "neighbours", 6, "ascending", "late", "heap-buffer-overflow"),
    "grid barrier removed": ("plain", "ring", 1, "ascending", "late", "wrong result"),
    "grid barrier removed: a race": ("tsan", "ring", 1, "descending", "late", "data race"),
    "grid barrier reached by some": ("plain", "ring", 2, "ascending", "late", "grid barrier that some threads never"),
    "grid barrier in a plain launch": ("plain", "ring", 3, "ascending", "late", "not cooperative"),
    "lane of the mask has returned": ("plain", "votes", 1, "descending", "late", "has returned"),
    "grid too large": ("plain", "votes", 2, "ascending", "late", "the device would refuse it"),
    "block too large": ("plain", "votes", 3, "ascending", "late", "the device would refuse it"),
    "cp.async without a wait": ("plain", "product", 1, "ascending", "late", "wrong result"),
    "cp.async misaligned": ("plain", "product", 2, "ascending", "late", "misaligned"),
    "cp.async of zeros": ("plain", "product", 3, "ascending", "late", "wrong result"),
    "cp.async without a barrier: a race": ("tsan", "product", 4, "ascending", "early", "data race"),
    "dynamic shared memory too small": ("asan", "product", 5, "ascending", "early", "heap-buffer-overflow"),
}


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=[pytest.mark.long] if kind != "plain" else []) for f, (kind, *_) in FAULTS.items()]
)
def test_planted_faults_are_caught(fault: str) -> None:
    kind, name, number, order, landing, said = FAULTS[fault]
    assert said in run(kind, name, number, order, landing)
