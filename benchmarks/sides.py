"""Times one case on several sides, in turn and in one process: ours by pytest-benchmark, and its peers beside it.

Every call of an op has inputs that no cache holds: as many sets of them as are twice as large as the last-level cache
take turns. A copy of memory and a product of matrices, timed in the same rounds, say what the machine gives at that
time.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cpuinfo
import torch

import fasttricks

THREADS = 2
KEEP = os.environ.get("FASTTRICKS_BENCH_KEEP") == "1"  # freed memory, so that no page fault is timed
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
MOST_SETS, MOST_ROUNDS = 64, 60
LEAST_TIME = 0.1  # seconds of ours
Inputs = tuple[list[torch.Tensor], torch.Tensor]  # what gets gradients, and the gradient of the output
Call = Callable[[], object]


class Run(NamedTuple):
    """What is timed of a side; its forward pass, whose saved tensors are counted, without the parameters."""

    step: Call
    forward: Call | None = None
    parameters: Sequence[torch.Tensor] = ()


class Roof(NamedTuple):
    """A call, and the bytes that it moves or its floating-point operations."""

    call: Call
    amount: int


@functools.cache
def last_level_cache() -> int:
    """Bytes of the last-level cache; 32 MiB where the system does not say."""
    info = cpuinfo.get_cpu_info()
    return int(info.get("l3_cache_size") or info.get("l2_cache_size") or 0) or 32 << 20


@functools.cache
def roofs() -> dict[str, Roof]:
    """A copy of memory, and a product of matrices."""
    source = torch.ones(2 * last_level_cache(), dtype=torch.uint8)  # ones: pages that were never written are one page
    target = torch.empty_like(source)
    a, b, product = (torch.randn(1024, 1024) for _ in range(3))
    return {
        "copy": Roof(lambda: target.copy_(source), 2 * source.numel()),
        "matmul": Roof(lambda: torch.mm(a, b, out=product), 2 * 1024**3),
    }


def cold(make: Callable[[], Any], size: int) -> Callable[[], Any]:
    """A function that returns the next of as many sets as no cache holds; a set has `size` bytes."""
    count = min(MOST_SETS, math.ceil(2 * last_level_cache() / size))
    return itertools.cycle([make() for _ in range(count)]).__next__


def training_step(op: Callable[..., torch.Tensor], inputs: list[torch.Tensor], dy: torch.Tensor) -> None:
    """Forward and backward."""
    torch.autograd.grad(op(*inputs), inputs, dy)


def saved_bytes(forward: Call, parameters: Sequence[torch.Tensor] = ()) -> int:
    """Bytes that one call keeps for its backward pass, without those of the parameters."""
    storages: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = forward()
    del y
    known = {p.untyped_storage().data_ptr() for p in parameters}
    return sum(size for at, size in storages.items() if at not in known)


def peak_bytes(call: Call) -> int:
    """The most bytes that the tensors made in a call hold at a time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def spread(times: Sequence[float]) -> float:
    """The distance of the quartiles over the median."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle


def in_turn(
    benchmark: Any, ours: Call, peers: dict[str, Call], beside: dict[str, Call], rounds: int, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of each call, by side: those of `ours` by pytest-benchmark, which come last in a round.

    warm: before each timed call the same side runs once more, so that it finds freed memory as its own side left it.
    """
    times: dict[str, list[float]] = {name: [] for name in (*peers, *beside)}

    def others() -> None:
        for name, call in (peers | beside).items():
            if warm and name in peers:
                call()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        if warm:
            ours()

    for call in (*peers.values(), ours):
        call()
    start = time.perf_counter()
    ours()
    rounds = max(rounds, min(MOST_ROUNDS, int(LEAST_TIME / (time.perf_counter() - start))))
    benchmark.pedantic(ours, setup=others, rounds=rounds, iterations=1)
    return times | {"ours": benchmark.stats.stats.data}


def measure(
    benchmark: Any,
    ours: Run,
    peers: dict[str, Run],
    rounds: int,
    moved: int | None = None,
    flops: int | None = None,
    threads: int = THREADS,
    warm: bool = True,
) -> dict[str, float]:
    """Records and prints a case.

    Args:
        rounds: timed calls of each side, at least; more of short ones.
        moved: bytes that the formula of a step moves.
        flops: floating-point operations of the formula.
        warm: see `in_turn`; False where a step takes seconds.

    Returns:
        How many times as long each peer takes, by best rounds. Recorded in benchmark.extra_info: these by name, and
        `median`: the same by medians of the first peer; `spread` of ours; `gb_s` and `copy_gb_s`: bytes per second of
        the formula and of a copy; `of_copy`: their quotient; `gflop_s` and `matmul_gflop_s`: of the formula and of a
        product of matrices; `saved_mb` and `peer_saved_mb`: kept for the backward pass; `peak_mb` and `peer_peak_mb`.
    """
    torch.set_num_threads(threads)
    if KEEP:
        fasttricks.keep_freed_memory()
    formula = {"copy": ("gb_s", moved), "matmul": ("gflop_s", flops)}
    beside = {name: roofs()[name].call for name, (_, amount) in formula.items() if amount is not None}
    times = in_turn(benchmark, ours.step, {name: peer.step for name, peer in peers.items()}, beside, rounds, warm)
    best = {name: min(of_side) for name, of_side in times.items()}
    found = {name: best[name] / best["ours"] for name in peers}
    first = next(iter(peers))
    middle = statistics.median(times[first]) / statistics.median(times["ours"])
    extra = {**found, "median": middle, "spread": spread(times["ours"])}
    for name, (unit, amount) in formula.items():
        if amount is not None:
            extra[unit] = amount / best["ours"] / 1e9
            extra[f"{name}_{unit}"] = roofs()[name].amount / best[name] / 1e9
    if moved is not None:
        extra["of_copy"] = extra["gb_s"] / extra["copy_gb_s"]
    for prefix, run in (("", ours), ("peer_", peers[first])):
        extra[f"{prefix}peak_mb"] = peak_bytes(run.step) / 1e6
        if run.forward is not None:
            extra[f"{prefix}saved_mb"] = saved_bytes(run.forward, run.parameters) / 1e6
    benchmark.extra_info |= extra
    print(f"\n{benchmark.name}: {best['ours'] * 1e3:.2f} ms, {described(extra)}")
    return found


def described(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in figures.items())


def compare(
    benchmark: Any,
    ours: Callable[..., torch.Tensor],
    peers: dict[str, Callable[..., torch.Tensor]],
    make: Callable[[], Inputs],
    rounds: int,
    moved: int | None = None,
    flops: int | None = None,
    threads: int = THREADS,
) -> dict[str, float]:
    """Measures forward and backward of functions of the same inputs, sets of which `make` returns."""
    first = make()
    next_set = cold(make, sum(t.numel() * t.element_size() for t in (*first[0], first[1])))

    def run(op: Callable[..., torch.Tensor]) -> Run:
        return Run(lambda: training_step(op, *next_set()), lambda: op(*first[0]))

    sides = {name: run(peer) for name, peer in peers.items()}
    return measure(benchmark, run(ours), sides, rounds, moved, flops, threads)
