"""The comparison with committed benchmark results finds kernels that take a quarter longer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from regression import Slowed, ratios, slower

COMMITTED = {"a": 2.0, "b": 1.5, "c": 1.0}


def test_a_kernel_that_takes_a_quarter_longer_is_found_at_every_try() -> None:
    asked = []

    def measured(cases: Sequence[str]) -> dict[str, float]:
        asked.append(list(cases))
        return {case: COMMITTED[case] / (1.25 if case == "b" else 1.0) for case in cases}

    assert slower(COMMITTED, measured) == {"b": 1.2}
    assert asked == [["a", "b", "c"], ["b"], ["b"]]


def test_one_good_try_out_of_three_is_enough() -> None:
    tries = iter((0.5, 0.7, 0.95))

    def measured(cases: Sequence[str]) -> dict[str, float]:
        share = next(tries)
        return {case: COMMITTED[case] * share for case in cases}

    assert slower(COMMITTED, measured) == {}


def test_the_planted_fault_takes_the_factor_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1e-3  # waiting takes time
        return now[0]

    def kernel(seconds: float) -> None:
        now[0] += seconds

    def pedantic(function: Any, *, seconds: float) -> None:
        function(seconds)

    monkeypatch.setattr(time, "perf_counter", clock)
    item = SimpleNamespace(funcargs={"benchmark": SimpleNamespace(pedantic=pedantic)})
    Slowed(1.25).pytest_runtest_call(item)  # type: ignore[arg-type]
    item.funcargs["benchmark"].pedantic(kernel, seconds=8.0)
    assert now[0] == pytest.approx(10.0, rel=0.01)


def test_ratios_are_those_of_the_operators() -> None:
    cases = {
        "bench_bn_relu.py::test_bn_relu[64-112-NCHW]": {"best_ms": 1.0, "eager": 3.0, "compiled": 8.0},
        "bench_bn_relu.py::test_geometric_mean[eager]": {"best_ms": 1.0, "geometric_mean": 2.0},
        "bench_avgpool_conv1x1.py::test_forward_backward[256-512-56-NCHW]": {"best_ms": 1.0, "ratio": 2.0},
        "bench_sgd.py::test_case[copy]": {"best_ms": 1.0},
    }
    assert sorted(ratios({"cases": cases}).values()) == [2.0, 3.0]
