"""The fixtures of the tests: those with `backend` run once on every backend that this machine can test."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# the processes of `pytest -n` share the cores; tests of threading set the number of threads themselves
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import torch

import fasttricks
from fasttricks.backends import namespaces, not_loaded
from fasttricks.nn import run

run.SMALL_ON_CPU = 0  # fused models run the ops on the tests' small tensors, too

# Triton's interpreter replaces its compiler in the whole process, which then tests no other backend
if os.environ.get("TRITON_INTERPRET") == "1":
    BACKENDS = ["triton"]
    importlib.import_module("triton_interpreter").correct()
else:
    BACKENDS = ["cpu", "cuda-emulated", "reference"]
    if torch.cuda.is_available():
        BACKENDS += [f"{name}-on_card" for name in ("cuda", "triton", "reference")]
BACKENDS = [name for name in BACKENDS if name not in not_loaded]
if not BACKENDS:  # else no test would run, and the suite would pass
    raise pytest.UsageError(f"no backend is loaded: {not_loaded}")


@contextlib.contextmanager
def run_on(choice: str) -> Iterator[str]:
    """Context manager in which ops run on this element of BACKENDS; returns the name of the backend."""
    name, _, where = choice.partition("-")
    if where == "emulated":
        importlib.import_module("emulated").load()
    place = torch.device("cuda") if where == "on_card" else contextlib.nullcontext()
    with place, fasttricks.backend(name):
        yield name


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend that ops run on during this test; on a card, new tensors are on it."""
    with run_on(request.param) as name:
        yield name


@pytest.fixture(params=[name for name in BACKENDS if not name.startswith("reference")])
def raw_ops(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The namespace of the raw ops of each backend that has some: all but the reference."""
    with run_on(request.param) as name:
        yield getattr(torch.ops, namespaces[name])


@pytest.fixture(autouse=True)
def _fresh_inputs(request: pytest.FixtureRequest) -> None:
    """Seeds torch anew on every run; the report's header prints the seed, and --seed repeats it."""
    seed = request.config.getoption("--seed")
    torch.manual_seed(seed)
    request.node.user_properties.append(("seed", seed))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Any]:
    """Two processes: `ranks.run(function, *arguments)`. Its tests are of the xdist_group "ranks": one start for all."""
    both = importlib.import_module("ranks").Ranks()
    yield both
    both.stop()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tiny image folder of three classes."""
    return importlib.import_module("train_runs").write_tree(tmp_path / "data")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=torch.seed() % 2**31, help="seed of the random inputs")


# files with tests that take half a minute
LONGEST_FIRST = (
    "test_cuda_sass.py",
    "test_traffic.py",
    "test_examples.py",
    "test_train.py",
    "test_train_config.py",
    "test_train_distributed.py",
    "test_train_faults.py",
    "test_train_kills.py",
    "test_train_recipes.py",
    "test_train_resume.py",
    "test_train_step.py",
    "test_optim_distributed.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the longest tests first, so that no process is still busy with one at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST_FIRST)


def pytest_report_header(config: pytest.Config) -> str:
    return f"fasttricks: backends {', '.join(BACKENDS)}; --seed={config.getoption('--seed')}"
