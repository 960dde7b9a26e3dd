"""One launcher for every kernel, and the registration of ops; the ahead-of-time tests read the same launches."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl

NAMESPACE = "fasttricks_triton"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# offsets of this many elements and more are computed in 64 bits; below it no tile can reach 2**31
WIDE_FROM = 2**31 - 2**16
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}

library = torch.library.Library(NAMESPACE, "DEF")


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], constants: dict[str, Any], warps: int,
    stages: int = 1,
) -> None:  # fmt: skip
    """Runs `kernel` on `grid`.

    arguments: tensors, None and integers; constants: its tl.constexpr parameters; stages: how many tiles of its loop's
    operands are loaded at a time.
    """
    device = next(a.device for a in arguments.values() if isinstance(a, torch.Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[grid](**arguments, **constants, num_warps=warps, num_stages=stages)


@functools.lru_cache
def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if INTERPRETED else 132


def programs(device: torch.device) -> int:
    """How many programs fill the device: four resident programs per multiprocessor."""
    return 4 * _processors(device)


def multiple_of(size: int, most: int = 8) -> int:
    """The largest of 8, 4, 2 and 1, up to `most`, that divides `size`: kernels receive it as a constant."""
    return next(v for v in (8, 4, 2, 1) if v <= most and size % v == 0)


def define(implementation: Callable[..., Any], mutates: Sequence[str] = ()) -> None:
    """Defines the op of this name, with the schema of its annotations, for CUDA and, interpreted, for the CPU."""
    name = implementation.__name__
    library.define(name + torch.library.infer_schema(implementation, mutates_args=mutates))
    library.impl(name, implementation, "CUDA")
    if INTERPRETED:
        library.impl(name, implementation, "CPU")
