"""bn_add_relu_pool's CUDA kernels without a GPU: launches, bytes, thread orders, sanitizers, planted faults."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from cases import LAYOUTS

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this file tests no Triton kernel", allow_module_level=True)

import emulated

EPS = 1e-5
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])


def inputs(shape: tuple[int, ...], layout: torch.memory_format) -> list[torch.Tensor]:
    return [torch.randn(shape).half().contiguous(memory_format=layout) for _ in range(2)]


def forward(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, ceil_mode: bool = False
) -> tuple[torch.Tensor, ...]:
    """y, its means, mean, var, mask."""
    given = x, residual, weight, torch.linspace(-1, 1, x.shape[1]), EPS, None, None, None, None, ceil_mode
    return torch.ops.fasttricks_emulated.bn_add_relu_pool_forward(*given)


def moved(t: torch.Tensor) -> torch.Tensor:
    """The same values at an address that is not a multiple of 16."""
    memory = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
    return memory.as_strided(t.shape, t.stride()).copy_(t)


@layouts
@pytest.mark.parametrize("shape", [(6, 40, 8, 8), (8, 8, 9, 7), (9, 40, 14, 14)], ids=str)
def test_every_order_of_threads_gives_the_same_bits(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    library, results, given = emulated.load(), [], inputs(shape, layout)
    for schedule in emulated.SCHEDULES:
        with library.schedule(**schedule):
            results.append(forward(*given, torch.linspace(0.5, 2, shape[1]), True))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@layouts
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("shape", [(6, 40, 8, 8), (8, 8, 9, 7)], ids=str)
def test_misaligned_tensors_give_the_same_values(
    shape: tuple[int, ...], ceil_mode: bool, layout: torch.memory_format
) -> None:
    """The means are then computed from y, in a launch of their own."""
    library, given, weight = emulated.load(), inputs(shape, layout), torch.linspace(0.5, 2, shape[1])
    with library.metered() as one:
        expected = forward(*given, weight, ceil_mode)
    with library.metered() as two:
        results = forward(*map(moved, given), weight, ceil_mode)
    assert (one.launches, two.launches) == (3, 4)
    for a, b in zip(results[:4], expected[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


SHAPES = ((4, 64, 56, 56), (8, 128, 28, 28), (8, 256, 14, 14))


@layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_within_5_percent_of_the_formula(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    """4.25 N: x is read twice, the residual once; y is written once, and a quarter of it again. Evaluation: 3.25 N."""
    library, (x, z), one = emulated.load(), inputs(shape, layout), torch.ones(shape[1])
    unit, bits, channel = 2 * x.numel(), x.numel() / 8, 192 * shape[1]
    with library.metered() as meter:
        forward(x, z, one)
    assert (meter.launches, meter.cooperative_launches) == (3, 0)
    formula = 4.25 * unit + bits
    assert formula <= meter.moved <= 1.05 * formula + channel
    with library.metered() as meter:
        torch.ops.fasttricks_emulated.bn_add_relu_pool_apply(x, z, one, one, one, one, EPS, False)
    assert meter.launches == 1
    formula = 3.25 * unit + bits
    assert formula <= meter.moved <= 1.05 * formula + channel


@layouts
def test_zero_gamma_does_not_read_x_again(layout: torch.memory_format) -> None:
    library, (x, z) = emulated.load(), inputs((4, 64, 56, 56), layout)
    formula = 3.25 * 2 * x.numel() + x.numel() / 8
    with library.metered() as meter:
        forward(x, z, torch.zeros(64))
    assert formula <= meter.moved <= 1.05 * formula


@layouts
@pytest.mark.parametrize("shape", [(6, 64, 14, 14), (2, 24, 28, 28), (2, 16, 56, 56)], ids=str)
def test_bank_conflicts(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    """NCHW: some lanes of a warp read the next pair of image rows, whose banks are those of others."""
    library, given = emulated.load(), inputs(shape, layout)
    with library.metered(conflicts=True) as meter:
        forward(*given, torch.ones(shape[1]))
    assert meter.least_wavefronts > 0
    assert meter.conflicts <= (1.1 if layout == torch.channels_last else 1.25)


# ---- other builds ----


@pytest.mark.parametrize("kind", ["plain", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("asan", "tsan"))])
def test_every_build_is_right(kind: str) -> None:
    assert emulated.run("run_bn_add_relu_pool.py", emulated.Build(kind)) == ""


# fault -> file, text, its replacement, build, expected output
FAULTS = {
    "a mean not divided by the pixels of its window": (
        "bn_add_relu_pool.cuh",
        "(right ? 0.5f : 1.0f)",
        "(right ? 0.5f : 0.9f)",
        "plain",
        "wrong means",
    ),
    "a pixel beyond the image": (
        "bn_add_relu_pool.cuh",
        "return (k % 2 == 0 || right) && (k < 2 || below);",
        "return (k % 2 == 0 || right);",
        "asan",
        "heap-buffer-overflow",
    ),
    "the second channel of 8 neighbours is the first": (
        "bn_add_relu_pool.cuh",
        "kPlanes + slot[u] + (until[u] < kBnColumns)",
        "kPlanes + slot[u]",
        "plain",
        "wrong",
    ),
    "barrier removed before the means are read": (
        "bn_add_relu_pool.cuh",
        "    __syncthreads();\n    T* const means",
        "    T* const means",
        "tsan",
        "data race",
    ),
    "y of the next units written over that of these": (
        "bn_add_relu_pool.cuh",
        "staged + half * kAtOnce",
        "staged + 0 * half",
        "tsan",
        "data race",
    ),
    "the first unit given to no block": (
        "bn_add_relu_pool_plan.h",
        "(block < extra ? block : extra)",
        "(block < extra ? block : extra) + (block == 0)",
        "plain",
        "wrong",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, tmp_path: Path) -> None:
    *change, kind, said = FAULTS[fault]
    build = emulated.Build(kind, emulated.changed(tmp_path, *change), ("bn_relu", "bn_add_relu_pool"))
    assert said in emulated.run("run_bn_add_relu_pool.py", build)
