"""What a training step of ResNet-50-D on the CPU spends on convolutions, which no operator of fasttricks replaces.

    python benchmarks/step_shares.py [--layout NHWC] [--batch 32] [--rounds 5] [--as-usual]

The eager and the fused network take turns; the best step of each is printed. One more step of each runs under
torch.profiler and shows the seconds within convolutions, and so how fast a step with nothing else would be.
Freed memory is kept unless --as-usual is given: page faults take as long as kernels on some machines.
"""

from __future__ import annotations

import argparse
import time

import torch
from bench_train_step import BATCH, Side, batch_of
from sides import LAYOUTS
from torch.profiler import ProfilerActivity, profile

import fasttricks

CONVOLUTIONS = ("aten::mkldnn_convolution", "aten::convolution_backward", "aten::_slow_conv2d_forward")


def seconds(side: Side, images: torch.Tensor, labels: torch.Tensor) -> float:
    start = time.perf_counter()
    side.step(images, labels)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of a training step, and those within convolutions.")
    parser.add_argument("--layout", choices=LAYOUTS, default="NHWC")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--as-usual", action="store_true", help="do not keep freed memory")
    given = parser.parse_args()
    if not given.as_usual:
        fasttricks.keep_freed_memory()
    layout = LAYOUTS[given.layout]
    batch = batch_of(given.batch, 224, layout)
    eager = Side(False, layout, None)
    sides = {"eager": eager, "fused": Side(True, layout, eager.model.state_dict())}
    for side in sides.values():
        side.step(*batch)
    rounds = [{name: seconds(side, *batch) for name, side in sides.items()} for _ in range(given.rounds)]
    best = {name: min(times[name] for times in rounds) for name in sides}
    print(f"{given.layout}, batch {given.batch}, {torch.get_num_threads()} threads")
    for name, side in sides.items():
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            whole = seconds(side, *batch)
        inside = sum(e.self_cpu_time_total for e in profiled.key_averages() if e.key in CONVOLUTIONS) / 1e6
        print(f"{name}: {best[name]:.2f} s; profiled {whole:.2f} s, {inside:.2f} s of it in convolutions", end="")
        print(f", {whole / inside:.2f}x if all else took no time" if name == "eager" else "")
    print(f"fused against eager: {best['eager'] / best['fused']:.2f}x")


if __name__ == "__main__":
    main()
