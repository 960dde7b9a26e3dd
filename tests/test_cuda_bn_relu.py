"""bn_relu's CUDA kernels without a GPU: both variants, bytes, thread orders, sanitizers, planted faults."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from cases import LAYOUTS

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this file tests no Triton kernel", allow_module_level=True)

import emulated

from fasttricks.ops.bn_relu import unpack_mask

EPS = 1e-5


def inputs(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype = torch.float16
) -> list[torch.Tensor]:
    return [torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(3)]


def all_results(x: torch.Tensor, z: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    ops, weight, bias = torch.ops.fasttricks_emulated, torch.linspace(0.5, 2, x.shape[1]), torch.ones(x.shape[1])
    y, mean, var, mask = ops.bn_add_relu_forward(x, z, weight, bias, EPS)
    plain = ops.bn_relu_forward(x, weight, bias, EPS)
    backward = ops.bn_relu_backward(dy, x, mask, weight, bias, mean, var, EPS, True, True)
    two = ops.bn_relu_backward(dy, x, mask, weight, bias, mean, var, EPS, True, True, z)
    return [
        y,
        mean,
        var,
        mask,
        *plain,
        *backward,
        *two,
        *ops.bn_relu_backward_reduce(dy, x, None, weight, bias, mean, var, EPS),
    ]


# room for a row of x and dz of a thread, or two rows of x, in each of two blocks on a multiprocessor
ONE_ROW = 2 * ((17 << 10) + (8 << 10))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("shape", "shared"), [((6, 40, 8, 8), 228 << 10), ((7, 13, 9, 5), 228 << 10), ((17, 72, 8, 8), ONE_ROW)], ids=str
)
def test_every_order_of_threads_gives_the_same_bits(
    shape: tuple[int, ...], shared: int, layout: torch.memory_format
) -> None:
    library, results, given = emulated.load(), [], inputs(shape, layout)
    for schedule in emulated.SCHEDULES:
        with library.schedule(**schedule), library.shared_per_sm(shared):
            results.append(all_results(*given))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_misaligned_tensors_give_the_same_values(layout: torch.memory_format) -> None:
    """Pointers without alignment take the variant with several launches, with narrow accesses."""
    emulated.load()

    def moved(t: torch.Tensor) -> torch.Tensor:
        memory = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
        return memory.as_strided(t.shape, t.stride()).copy_(t)

    given = inputs((6, 40, 8, 8), layout)
    for a, b in zip(all_results(*given), all_results(*map(moved, given)), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_refused_cooperative_launches(layout: torch.memory_format) -> None:
    """The same values in several launches, where one would have done on a whole card."""
    library, given = emulated.load(), inputs((6, 40, 8, 8), layout)
    expected = all_results(*given)
    with library.refused_cooperative_launches(), library.metered() as meter:
        results = all_results(*given)
    assert (meter.launches, meter.cooperative_launches) == (4 * 3 + 2, 0)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


# ---- bytes ----


# shape, layout, whether forward and backward keep everything in the shared memory of four multiprocessors, not a part
PLACES = (
    ((4, 64, 56, 56), torch.contiguous_format, False, False),
    ((4, 64, 56, 56), torch.channels_last, False, False),
    ((8, 256, 14, 14), torch.contiguous_format, True, False),
    ((8, 256, 14, 14), torch.channels_last, True, False),
    ((64, 64, 8, 8), torch.contiguous_format, True, False),
    ((64, 32, 7, 7), torch.contiguous_format, True, True),
    ((64, 64, 7, 7), torch.channels_last, True, True),
)
PART = 4 * 2 * (96 << 10)  # bytes that two blocks of a multiprocessor keep if not everything fits


@pytest.mark.parametrize("residual", [False, True], ids=["bn_relu", "bn_add_relu"])
@pytest.mark.parametrize("one", [True, False], ids=["one launch", "three"])
@pytest.mark.parametrize(("shape", "layout", "forward_fits", "backward_fits"), PLACES)
def test_bytes_moved_are_within_5_percent_of_the_formula(
    shape: tuple[int, ...],
    layout: torch.memory_format,
    forward_fits: bool,
    backward_fits: bool,
    one: bool,
    residual: bool,
) -> None:
    """x is read twice, but what stays in shared memory once, of the bytes of DRAM, too; masks have one bit per element.

    Parameters, statistics and partial sums add at most 192 bytes per channel.
    """
    library, ops = emulated.load(), torch.ops.fasttricks_emulated
    x, z, dy = inputs(shape, layout)
    weight, bias = torch.rand(shape[1]) + 0.5, torch.rand(shape[1])
    unit, bits, channel = 2 * x.numel(), x.numel() / 8, 192 * shape[1]
    shared = (228 << 10) * one
    kept = [(arrays * unit if fits else PART) * one for arrays, fits in ((1, forward_fits), (2, backward_fits))]
    launches = (0, 1) if one else (3, 0)
    with library.shared_per_sm(shared), library.metered() as meter:
        if residual:
            _, mean, var, mask = ops.bn_add_relu_forward(x, z, weight, bias, EPS)
        else:
            (_, mean, var), mask = ops.bn_relu_forward(x, weight, bias, EPS), None
    assert (meter.launches, meter.cooperative_launches) == launches
    formula = unit * (3 + residual) + bits * residual - kept[0]
    assert formula <= meter.moved <= formula * 1.05 + channel
    assert formula <= meter.dram <= formula * 1.05 + channel
    assert [emulated.kept_bytes(x, arrays, shared) for arrays in (1, 2)] == kept
    again = 2 - kept[1] / (2 * unit)  # how often the mask is read
    with library.shared_per_sm(shared), library.metered() as meter:
        ops.bn_relu_backward(dy, x, mask, weight, bias, mean, var, EPS, True, residual)
    assert (meter.launches, meter.cooperative_launches) == launches
    formula = unit * (5 + residual) + bits * residual * again - kept[1]
    assert formula <= meter.moved <= formula * 1.05 + channel
    assert formula <= meter.dram <= formula * 1.05 + channel
    for need_dz in (False, residual):  # else dz is workspace, of which only the rest is written
        with library.shared_per_sm(shared), library.metered() as meter:
            ops.bn_relu_backward(dy, x, mask, weight, bias, mean, var, EPS, True, need_dz, z)
        assert (meter.launches, meter.cooperative_launches) == launches
        formula = unit * 7 + bits * residual - kept[1] * (1 if need_dz else 1.5)
        assert formula <= meter.moved <= formula * 1.05 + channel


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_zero_gamma_does_not_read_x_again(layout: torch.memory_format) -> None:
    """If all weights are zero, x is read for its statistics only: forward 3N with the residual, backward once."""
    library, ops, shape = emulated.load(), torch.ops.fasttricks_emulated, (4, 64, 56, 56)
    x, z, dy = inputs(shape, layout)
    weight, unit, bits = torch.zeros(64), 2 * x.numel(), x.numel() / 8
    with library.metered() as meter:
        _, mean, var, mask = ops.bn_add_relu_forward(x, z, weight, None, EPS)
    assert meter.moved <= 1.05 * (3 * unit + bits)
    with library.metered() as meter:
        dx, *_ = ops.bn_relu_backward(dy, x, mask, weight, None, mean, var, EPS, True, True)
    assert meter.moved <= 1.05 * (5 * unit + 2 * bits)  # reads dy and x, then dy again; writes dx and dresidual
    assert (dx == 0).all()
    with library.metered() as meter:
        dx, dz, *_ = ops.bn_relu_backward(dy, x, mask, weight, None, mean, var, EPS, True, True, z)
    assert meter.moved <= 1.05 * (5 * unit + bits)
    assert (dx == 0).all()
    assert torch.equal(dz, (dy + z) * unpack_mask(mask, x))


@pytest.mark.parametrize("residual", [False, True], ids=["bn_relu", "bn_add_relu"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_constant_statistics_with_a_part_on_the_chip(layout: torch.memory_format, residual: bool) -> None:
    """dx and dresidual do not depend on the sums, and so not on the number of launches."""
    library, ops = emulated.load(), torch.ops.fasttricks_emulated
    x, z, dy = inputs((17, 72, 8, 8), layout)
    weight, mean, var = torch.rand(72) - 0.5, torch.randn(72), torch.rand(72) + 0.5
    mask = ops.bn_add_relu_apply(x, z, weight, None, mean, var, EPS)[1] if residual else None
    for dy2 in (None, z):
        made = []
        for shared in (0, ONE_ROW):
            with library.shared_per_sm(shared), library.metered() as meter:
                made.append(ops.bn_relu_backward(dy, x, mask, weight, None, mean, var, EPS, False, residual, dy2))
            assert (meter.cooperative_launches > 0) == (shared > 0)
        assert all(torch.equal(a, b) for a, b in zip(made[0][:2], made[1][:2], strict=True))
        torch.testing.assert_close(made[0][2:], made[1][2:], rtol=1e-4, atol=1e-3)


def test_evaluation_is_one_pass() -> None:
    library, ops = emulated.load(), torch.ops.fasttricks_emulated
    x, z, _ = inputs((4, 64, 56, 56), torch.channels_last)
    one = torch.ones(64)
    with library.metered() as meter:
        ops.bn_relu_apply(x, one, one, one, one, EPS)
    assert (meter.launches, meter.moved <= 1.05 * 4 * x.numel()) == (1, True)
    with library.metered() as meter:
        ops.bn_add_relu_apply(x, z, one, one, one, one, EPS)
    assert (meter.launches, meter.moved <= 1.05 * (6 + 1 / 8) * x.numel()) == (1, True)


def test_an_empty_batch_launches_one_kernel() -> None:
    library, ops = emulated.load(), torch.ops.fasttricks_emulated
    x = torch.empty(0, 8, 4, 4)
    with library.metered() as meter:
        _, mean, var, mask = ops.bn_add_relu_forward(x, x, None, None, EPS)
        ops.bn_relu_backward(x, x, mask, None, None, mean, var, EPS, True, True)
        ops.bn_update_stats_(torch.zeros(8), torch.ones(8), mean, var, torch.zeros((), dtype=torch.float64))
        ops.bn_relu_forward(x, None, None, EPS, torch.zeros(8), torch.ones(8))
    assert (meter.launches, meter.cooperative_launches) == (1, 0)  # that of bn_update_stats_


# ---- offsets ----


def test_offsets_beyond_2_to_the_31_are_right() -> None:
    """Those of the last element, and its channel, of tensors with more than 2^31 elements."""
    plans = emulated.plans()
    for n, c, hw, channels_last in ((4096, 1024, 1024, True), (1 << 21, 8, 513, True), (70000, 64, 784, False)):
        assert n * c * hw > 2**31
        assert plans.bn_last_offset(plans.bn_shape(n, c, hw, channels_last), most=64) == (n * c * hw - 1, c - 1)


# ---- other builds ----


@pytest.mark.parametrize("kind", ["plain", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("asan", "tsan"))])
def test_both_variants_are_right_in_every_build(kind: str) -> None:
    assert emulated.run("run_bn_relu.py", emulated.Build(kind)) == ""


# fault -> file, text, its replacement, build, expected output
FAULTS = {
    "barrier removed before a block's moments are combined": (
        "bn_relu_tile.cuh",
        "if (y >> log2 == 1) put();\n      __syncthreads();\n",
        "if (y >> log2 == 1) put();\n",
        "plain",
        "wrong",
    ),
    "grid barrier removed before the moments are read": (
        "bn_slab.cuh",
        "  FT_GRID_BARRIER();\n  for_channels_of_grid(s, [&](int c, int lane) { finalize_moments(",
        "  for_channels_of_grid(s, [&](int c, int lane) { finalize_moments(",
        "tsan",
        "data race",
    ),
    "the first row that is not kept taken for one that is": (
        "bn_slab.cuh",
        "!skip_x && !slab.has(row + kRows - 1 - u)",
        "!skip_x && !slab.has(row + kRows - 2 - u)",
        "plain",
        "wrong",
    ),
    "the first row that is not kept never written": (
        "bn_slab.cuh",
        "if (need_dz || !dz_slab.has(row))",
        "if (need_dz || !dz_slab.has(row - 1))",
        "plain",
        "wrong",
    ),
    "barrier removed between a block's parts of two tiles": (
        "bn_relu_tile.cuh",
        "    __syncthreads();\n    tile = hidden(tile) + 1;\n",
        "    tile = hidden(tile) + 1;\n",
        "tsan",
        "data race",
    ),
    "the first unit given to no block": (
        "bn_relu_plan.h",
        "(block < extra ? block : extra)",
        "(block < extra ? block : extra) + (block == 0)",
        "plain",
        "wrong",
    ),
    "elements past the last one read": (
        "bn_relu_tile.cuh",
        "needed && j < valid ? cuda::load(p + j)",
        "needed && j <= valid ? cuda::load(p + j)",
        "asan",
        "heap-buffer-overflow",
    ),
    "a parameter never staged in shared memory": (
        "bn_relu_tile.cuh",
        "store_shared(staged + 2 * kBnStaged + place(k), p.bias ?",
        "(void)(p.bias ?",
        "plain",
        "wrong",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, tmp_path: Path) -> None:
    *change, kind, said = FAULTS[fault]
    build = emulated.Build(kind, emulated.changed(tmp_path, *change), ("bn_relu",))
    assert said in emulated.run("run_bn_relu.py", build)
