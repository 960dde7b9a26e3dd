"""Fails if an operator has become slower, against eager torch in the same run, than the committed results say.

    python benchmarks/regression.py                  make bench-check
    python benchmarks/regression.py --slow-down 1.25 what it says of kernels that take a quarter longer; exit status 1

Compares ratios with those of benchmarks/results/cpu.json if they are of this kind of machine. A case that is more than
15% below is measured again, three times in all, and its best ratio counts, because other programs on the machine slow
down single measurements.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import cpuinfo
import pytest
from measured import ROOT, load
from report import condense

TRIES, TOLERANCE = 3, 1.15
FILES = ("bench_bn_relu.py", "bench_avgpool_conv1x1.py")


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """Eager time / our time, by case."""
    cases = {name: row for name, row in results["cases"].items() if name.startswith(FILES)}
    found = {name: row.get("eager", row.get("ratio")) for name, row in cases.items()}
    return {name: ratio for name, ratio in found.items() if ratio is not None}


class Slowed:
    """A plugin of pytest: the function that a benchmark measures takes `factor` times as long."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        benchmark = item.funcargs.get("benchmark")  # type: ignore[attr-defined]
        if benchmark is None:
            return
        pedantic = benchmark.pedantic

        def slowed(function: Callable[..., Any]) -> Callable[..., Any]:
            def longer(*args: Any) -> None:
                start = time.perf_counter()
                function(*args)
                end = start + self.factor * (time.perf_counter() - start)
                while time.perf_counter() < end:
                    pass

            return longer

        benchmark.pedantic = lambda function, **options: pedantic(slowed(function), **options)


def measure(cases: Sequence[str], factor: float) -> dict[str, float]:
    """The ratios of these cases, by pytest-benchmark."""
    raw = ROOT / "build" / "bench-check.json"
    raw.parent.mkdir(exist_ok=True)
    chosen = [str(ROOT / "benchmarks" / case) for case in cases]
    options = ["-q", "-p", "no:cacheprovider", "--benchmark-only", f"--benchmark-json={raw}"]
    if pytest.main([*options, *chosen], plugins=[Slowed(factor)] if factor > 1 else []) != 0:
        raise SystemExit("regression.py: the benchmarks failed")
    return ratios(condense(json.loads(raw.read_text())))


def slower(committed: dict[str, float], measured: Callable[[Sequence[str]], dict[str, float]]) -> dict[str, float]:
    """The cases that stay more than the tolerance below their committed ratio, with the best ratio of all tries."""
    best: dict[str, float] = {}
    left = dict(committed)
    for _ in range(TRIES):
        for case, ratio in measured(list(left)).items():
            best[case] = max(ratio, best.get(case, 0.0))
        left = {case: ratio for case, ratio in committed.items() if best[case] * TOLERANCE < ratio}
        if not left:
            break
    return {case: best[case] for case in left}


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares the operators' speed with the committed results.")
    parser.add_argument("--slow-down", type=float, default=1.0, metavar="FACTOR", help="how much longer kernels take")
    args = parser.parse_args()
    results = load("cpu.json")
    committed = ratios(results)
    here = condense({"machine_info": {"cpu": cpuinfo.get_cpu_info()}, "benchmarks": []})["machine"]
    kinds = [{key: machine[key] for key in ("processor", "cores", "isa")} for machine in (here, results["machine"])]
    if kinds[0] != kinds[1]:
        print(f"regression.py: the results are of another kind of machine: {kinds[1]}; this one: {kinds[0]}")
        return 0
    found = slower(committed, lambda cases: measure(cases, args.slow_down))
    for case, ratio in found.items():
        print(f"{case}: {ratio:.2f} of eager's speed, committed {committed[case]:.2f}")
    print(f"regression.py: {len(found)} of {len(committed)} cases are slower than committed")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
