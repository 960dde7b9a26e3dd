"""The cost of the first step of ResNet-50-D with Triton: compiling kernels, or loading them from Triton's cache.

    PYTHONPATH=tests/static python benchmarks/first_call.py [--target 90]

Needs no GPU: records the launches of a training step (fp16, NHWC and NCHW, batch 256, 224 x 224) and compiles them
ahead of time, with an empty cache and with a full one. Writes results/first_call.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import test_triton_aot as aot
import torch
import triton

from fasttricks.kernels import avgpool_conv1x1, bn_add_bn_relu, bn_add_relu_pool, bn_relu

LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
# (channels, height = width) of the BatchNorms, and of the shortcuts with a pool, which double the channels
BN = (
    (32, 112), (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14),
    (512, 14), (512, 7), (2048, 7),
)  # fmt: skip
AVGPOOL_CONV1X1_SHAPES = ((256, 56), (512, 28), (1024, 14))
BATCH = 256


def step(layout: torch.memory_format) -> None:
    """Runs the ops of one training step on meta tensors."""
    for channels, size in BN:
        x = aot.meta((BATCH, channels, size, size), torch.float16, layout)
        w, b = (torch.empty(channels, device="meta") for _ in range(2))
        running = torch.empty_like(w), torch.empty_like(w), torch.empty((), dtype=torch.int64, device="meta")
        y, mean, var = bn_relu.bn_relu_forward(x, w, b, 1e-5, *running)
        bn_relu.bn_relu_backward(y, x, None, w, b, mean, var, 1e-5, True, False)
        y, mean, var, mask = bn_relu.bn_add_relu_forward(x, x, w, b, 1e-5, *running)
        bn_add_relu_pool.bn_add_relu_pool_forward(x, x, w, b, 1e-5, *running, 0.1, False)
        pooled = aot.meta((BATCH, channels, size // 2, size // 2), torch.float16, layout)
        for dy2 in (None, x, pooled):  # of no shortcut, an identity, a projection
            bn_relu.bn_relu_backward(y, x, mask, w, b, mean, var, 1e-5, True, True, dy2)
        y, *four, mask = bn_add_bn_relu.bn_add_bn_relu_forward(x, x, w, b, w, b, 1e-5, 1e-5, *running)
        bn_add_bn_relu.bn_add_bn_relu_backward(y, x, x, mask, w, w, *four, 1e-5, 1e-5, True, x)
    for channels, size in AVGPOOL_CONV1X1_SHAPES:
        x = aot.meta((BATCH, channels, size, size), torch.float16, layout)
        weight = torch.empty(2 * channels, channels, 1, 1, dtype=torch.float16, device="meta")
        y = avgpool_conv1x1.avgpool_conv1x1_forward(x, weight, None, 2, False)
        avgpool_conv1x1.avgpool_conv1x1_backward(y, x, weight, 2, False, True, True, False)
    aot.sgd_launches(torch.float16, torch.float16)


def variants(layout: torch.memory_format) -> list[Any]:
    """The launches to compile, without duplicates, with the default tiles."""
    with pytest.MonkeyPatch.context() as patch:
        return aot.taken_down(lambda: step(layout), patch, every_choice_of_tiles=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", type=int, default=90, help="compute capability of the GPU, such as 90")
    target = parser.parse_args().target

    made: dict[str, Any] = {"triton": triton.__version__, "target": f"sm_{target}", "cores": os.cpu_count()}
    for name, layout in LAYOUTS.items():
        launches = variants(layout)
        made[name] = {"kernels": len(launches)}
        with tempfile.TemporaryDirectory() as folder:
            triton.knobs.cache.dir = folder
            for state in ("empty cache", "full cache"):
                start = time.perf_counter()
                for launched in launches:
                    aot.compiled(launched, target)
                made[name][f"seconds, {state}"] = round(time.perf_counter() - start, 2)
    print(json.dumps(made, indent=1))
    target_file = Path(__file__).parent / "results" / "first_call.json"
    target_file.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
