"""Times one case on several sides, in turn and in one process: ours by pytest-benchmark, and its peers beside it.

Every call has inputs that no cache holds: as many sets of them as are twice as large as the last-level cache take
turns. A copy of memory, timed in the same rounds, says what the machine's memory gives at that time.
"""

from __future__ import annotations

import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import cpuinfo
import torch

import fasttricks

THREADS = 2
KEEP = os.environ.get("FASTTRICKS_BENCH_KEEP") == "1"  # freed memory, so that no page fault is timed
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
MOST_SETS, MOST_ROUNDS = 64, 60
LEAST_TIME = 0.1  # seconds of ours
Inputs = tuple[list[torch.Tensor], torch.Tensor]  # what gets gradients, and the gradient of the output


@functools.cache
def last_level_cache() -> int:
    """Bytes of the last-level cache; 32 MiB where the system does not say."""
    info = cpuinfo.get_cpu_info()
    return int(info.get("l3_cache_size") or info.get("l2_cache_size") or 0) or 32 << 20


def training_step(op: Callable[..., torch.Tensor], inputs: list[torch.Tensor], dy: torch.Tensor) -> None:
    """Forward and backward."""
    torch.autograd.grad(op(*inputs), inputs, dy)


def saved_bytes(op: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> int:
    """Bytes that one call keeps for its backward pass."""
    storages: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = op(*inputs)
    del y
    return sum(storages.values())


def spread(times: Sequence[float]) -> float:
    """The distance of the quartiles over the median."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle


def compare(
    benchmark: Any,
    ours: Callable[..., torch.Tensor],
    peers: dict[str, Callable[..., torch.Tensor]],
    make: Callable[[], Inputs],
    rounds: int,
    moved: int | None = None,
    flops: int | None = None,
) -> dict[str, float]:
    """Records and prints a case.

    Args:
        ours, peers: forward functions of the same inputs.
        make: a set of inputs.
        rounds: timed calls of each side, at least; more of short ones.
        moved: bytes that the formula of forward and backward moves.
        flops: floating-point operations of forward and backward.

    Returns:
        How many times as long each peer takes, by best rounds. Recorded in benchmark.extra_info: these by name, and
        `median`: the same by medians of the first peer; `spread` of ours; `gb_s` and `of_copy`: bytes per second of the
        formula, and over those of a copy; `gflop_s`; `saved_mb` and `peer_saved_mb`: kept for the backward pass.
    """
    torch.set_num_threads(THREADS)
    if KEEP:
        fasttricks.keep_freed_memory()
    first = make()
    size = sum(t.numel() * t.element_size() for t in (*first[0], first[1]))
    count = min(MOST_SETS, math.ceil(2 * last_level_cache() / size))
    sets = cycle([first, *(make() for _ in range(count - 1))])
    source = torch.empty(2 * last_level_cache(), dtype=torch.uint8)
    target = torch.empty_like(source)
    times: dict[str, list[float]] = {name: [] for name in (*peers, "copy")}

    def timed(name: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        times[name].append(time.perf_counter() - start)

    def others() -> tuple[tuple[Any, ...], dict[str, Any]]:
        for name, peer in peers.items():
            training_step(peer, *next(sets))  # not timed: the timed one finds freed memory as its own side left it
            timed(name, functools.partial(training_step, peer, *next(sets)))
        timed("copy", lambda: target.copy_(source))
        training_step(ours, *next(sets))
        return (ours, *next(sets)), {}

    for side in (*peers.values(), ours):
        training_step(side, *next(sets))
    start = time.perf_counter()
    training_step(ours, *next(sets))
    rounds = max(rounds, min(MOST_ROUNDS, int(LEAST_TIME / (time.perf_counter() - start))))
    benchmark.pedantic(training_step, setup=others, rounds=rounds, iterations=1)
    own = benchmark.stats.stats.data
    best, middle = min(own), statistics.median(own)
    found = {name: min(times[name]) / best for name in peers}
    first_peer = next(iter(peers))
    extra = {**found, "median": statistics.median(times[first_peer]) / middle, "spread": spread(own)}
    text = f"{benchmark.name}: {best * 1e3:.2f} ms, spread {extra['spread']:.0%}"
    if moved is not None:
        extra["gb_s"] = moved / best / 1e9
        extra["of_copy"] = extra["gb_s"] / (2 * source.numel() / min(times["copy"]) / 1e9)
        text += f", {extra['gb_s']:.1f} GB/s of the formula's bytes, {extra['of_copy']:.2f} of a copy's"
    if flops is not None:
        extra["gflop_s"] = flops / best / 1e9
        text += f", {extra['gflop_s']:.0f} GFLOP/s"
    extra["saved_mb"] = saved_bytes(ours, first[0]) / 1e6
    extra["peer_saved_mb"] = saved_bytes(peers[first_peer], first[0]) / 1e6
    benchmark.extra_info |= extra
    print(f"\n{text}; {', '.join(f'{name} {ratio:.2f}x' for name, ratio in found.items())}")
    return found
