"""The backends that this machine can test, as one fixture; every op's tests are written once and run on each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fasttricks
from fasttricks.backend import why_not

BACKENDS = [name for name in ("cpu", "reference") if why_not(name, torch.device("cpu")) is None]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend that ops run on during this test."""
    with fasttricks.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _fresh_inputs(request: pytest.FixtureRequest) -> None:
    """New random inputs on every run; the seed is printed with a failure, and --seed repeats it."""
    seed = request.config.getoption("--seed")
    torch.manual_seed(seed)
    request.node.user_properties.append(("seed", seed))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=torch.seed() % 2**31, help="seed of the random inputs")


def pytest_report_header(config: pytest.Config) -> str:
    return f"fasttricks: backends {', '.join(BACKENDS)}; --seed={config.getoption('--seed')}"
