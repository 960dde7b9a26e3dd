"""Bytes kept for the backward pass, and the time per step: fused, recomputed, eager and checkpointed.

    python benchmarks/bench_recompute.py [--image 160] [--batch 8] [--rounds 5]

All models step in turn in every round. Bytes are compared with eager. Times are compared with the fused model in the
same round; the median of these ratios is robust against other load on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from fasttricks import fuse
from fasttricks.models import build

MODELS = ("torchvision/resnet50", "resnet50d", "torchvision/densenet121")


def kept_bytes(model: Callable[[Tensor], Tensor], x: Tensor) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = model(x).sum()
    del loss
    return sum(event.self_cpu_memory_usage for event in profile.events())


def in_segments(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model with torch.utils.checkpoint around each quarter of its top-level children."""
    children = (
        [*model.features, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.classifier]
        if hasattr(model, "features")
        else [*list(model.children())[:-1], nn.Flatten(), list(model.children())[-1]]
    )
    layers = nn.Sequential(*children)
    for module in layers.modules():  # a segment must not modify its input
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return lambda x: checkpoint_sequential(layers, 4, x, use_reentrant=False)


def measure(name: str, batch: int, image: int, rounds: int) -> None:
    x = torch.randn(batch, 3, image, image)
    eager = build(name, fused=False)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "fused": build(name),
        "recompute": fuse(build(name), recompute=True),
        "eager": eager,
        "checkpoint": in_segments(build(name, fused=False)),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):
        for way, model in ways.items():
            start = time.perf_counter()
            model(x).sum().backward()
            times[way].append(time.perf_counter() - start)
    most = kept_bytes(eager, x)
    for way, model in ways.items():
        kept, step = kept_bytes(model, x), statistics.median(times[way][1:])
        ratio = statistics.median(a / b for a, b in zip(times[way][1:], times["fused"][1:], strict=True))
        print(
            f"{name:26} {way:10} {kept / 2**20:8.1f} MiB {kept / most:5.2f}x {step * 1e3:8.0f} ms {ratio:5.2f}x",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(f"{'model':26} {'way':10} {'kept':>12} {'':>6} {'step':>11} {'':>6}")
    for name in MODELS:
        measure(name, given.batch, given.image, given.rounds)


if __name__ == "__main__":
    main()
