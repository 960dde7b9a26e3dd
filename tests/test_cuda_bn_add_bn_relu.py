"""bn_add_bn_relu's CUDA kernels, and bn_relu's with a second gradient, without a GPU: bytes, thread orders, faults."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this file tests no Triton kernel", allow_module_level=True)

import emulated

EPS = 1e-5
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
SECONDS = ("none", "full", "pooled")


class Call:
    """fp16 inputs of both ops, and their passes."""

    def __init__(self, shape: tuple[int, ...], layout: torch.memory_format, second: str = "none") -> None:
        self.x, self.z, self.dy, more = (torch.randn(shape).half().contiguous(memory_format=layout) for _ in range(4))
        self.dy2 = {"none": None, "full": more, "pooled": F.avg_pool2d(more, 2)}[second]
        self.weight, self.bias = torch.linspace(0.5, 2, shape[1]), torch.ones(shape[1])
        self.ops: Any = torch.ops.fasttricks_emulated

    def one(self, residual: bool) -> Callable[[], tuple[torch.Tensor, ...]]:
        """The backward pass of bn_relu or bn_add_relu."""
        affine = self.weight, self.bias
        if residual:
            _, *statistics, mask = self.ops.bn_add_relu_forward(self.x, self.z, *affine, EPS)
        else:
            (_, *statistics), mask = self.ops.bn_relu_forward(self.x, *affine, EPS), None
        given = mask, *affine, *statistics, EPS, True, residual
        return lambda: self.ops.bn_relu_backward(self.dy, self.x, *given, self.dy2)

    def forward(self, weight: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        weight = self.weight if weight is None else weight
        return self.ops.bn_add_bn_relu_forward(self.x, self.z, weight, self.bias, self.weight, self.bias, EPS, EPS)

    def backward(self, saved: tuple[torch.Tensor, ...], weight: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        _, *statistics, mask = saved
        given = mask, self.weight if weight is None else weight, self.weight, *statistics, EPS, EPS, True
        return self.ops.bn_add_bn_relu_backward(self.dy, self.x, self.z, *given, self.dy2)


# room for a row of x, of the residual and of dz of a thread in each of two blocks on a multiprocessor
ONE_ROW = 2 * ((17 << 10) + (12 << 10))
ALL = 228 << 10


@layouts
@pytest.mark.parametrize("second", SECONDS)
@pytest.mark.parametrize(
    ("shape", "shared"), [((6, 40, 8, 8), ALL), ((6, 40, 8, 8), 0), ((7, 13, 9, 5), ALL), ((17, 72, 8, 8), ONE_ROW)]
)
def test_every_order_of_threads_gives_the_same_bits(
    shape: tuple[int, ...], shared: int, second: str, layout: torch.memory_format
) -> None:
    library, results = emulated.load(), []
    call = Call(shape, layout, second)
    for schedule in emulated.SCHEDULES:
        with library.schedule(**schedule), library.shared_per_sm(shared):
            saved = call.forward()
            results.append([*saved, *call.backward(saved), *call.one(False)(), *call.one(True)()])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@layouts
@pytest.mark.parametrize("second", SECONDS)
def test_misaligned_tensors_give_the_same_values(second: str, layout: torch.memory_format) -> None:
    """Pointers without alignment take the kernels with narrow accesses."""
    emulated.load()
    call = Call((6, 40, 8, 8), layout, second)
    saved = call.forward()
    expected = [*saved, *call.backward(saved), *call.one(True)(), *call.one(False)()]

    def moved(t: torch.Tensor) -> torch.Tensor:
        memory = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
        return memory.as_strided(t.shape, t.stride()).copy_(t)

    call.x, call.z, call.dy = map(moved, (call.x, call.z, call.dy))
    call.dy2 = None if call.dy2 is None else moved(call.dy2)
    saved = call.forward()
    results = [*saved, *call.backward(saved), *call.one(True)(), *call.one(False)()]
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@layouts
@pytest.mark.parametrize("second", SECONDS)
def test_refused_cooperative_launches(second: str, layout: torch.memory_format) -> None:
    """The same values in several launches, where one would have done on a whole card."""
    library, call = emulated.load(), Call((6, 40, 8, 8), layout, second)
    with library.metered() as meter:
        saved = call.forward()
        expected = [*saved, *call.backward(saved)]
    assert (meter.launches, meter.cooperative_launches) == (0, 2)
    with library.refused_cooperative_launches(), library.metered() as meter:
        saved = call.forward()
        results = [*saved, *call.backward(saved)]
    assert (meter.launches, meter.cooperative_launches) == (5 + 3, 0)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@layouts
@pytest.mark.parametrize("second", SECONDS)
def test_constant_statistics_with_a_part_on_the_chip(second: str, layout: torch.memory_format) -> None:
    """dx and dresidual do not depend on the sums, and so not on the number of launches; nor does what is not read."""
    library, call, made = emulated.load(), Call((17, 72, 8, 8), layout, second), []
    weight, statistics = torch.rand(72) - 0.5, [torch.randn(72), torch.rand(72) + 0.5] * 2
    call.x[0, 0] = torch.inf
    weight[0] = 0
    mask = torch.randint(256, (call.x.numel() // 8,), dtype=torch.uint8)
    given = mask, weight, weight, *statistics, EPS, EPS, False, call.dy2
    for shared in (0, ONE_ROW):
        with library.shared_per_sm(shared), library.metered() as meter:
            made.append(call.ops.bn_add_bn_relu_backward(call.dy, call.x, call.z, *given))
        assert (meter.cooperative_launches > 0) == (shared > 0)
    assert all(torch.equal(a, b) for a, b in zip(made[0][:2], made[1][:2], strict=True))
    torch.testing.assert_close(made[0][2:], made[1][2:], rtol=1e-4, atol=1e-3, equal_nan=True)


SHAPE = (8, 64, 28, 28)  # exceeds the shared memory of the emulated card
ROW = 4 * 2 * (4 << 10)  # bytes of a tensor that one row of all threads has, of two blocks on each multiprocessor
# shape, shared memory of a multiprocessor, bytes that are kept of each tensor; None: everything
PLACES = {
    "nothing": (SHAPE, 0, 0),
    "a part": (SHAPE, ONE_ROW, ROW),
    "everything": ((64, 32, 7, 7), ALL, None),
}


@layouts
@pytest.mark.parametrize("second", SECONDS)
@pytest.mark.parametrize("kept", PLACES)
def test_bytes_of_two_batch_norms_are_within_5_percent_of_the_formula(
    kept: str, second: str, layout: torch.memory_format
) -> None:
    """Forward 5 N; backward 8 N, with a second gradient 10 N; bytes of DRAM, where a mean's gradient is read once.

    Less what stays on the chip: that is not read again, and of two gradients' dz not written. Parameters, statistics
    and partial sums add at most 320 bytes per channel.
    """
    shape, shared, part = PLACES[kept]
    library, call = emulated.load(), Call(shape, layout, second)
    unit, bits, channel = 2 * call.x.numel(), call.x.numel() / 8, 320 * shape[1]
    taken = [arrays * (unit if part is None else part) for arrays in (2, 3)]
    assert [emulated.kept_bytes(call.x, arrays, shared, pair=True) for arrays in (2, 3)] == taken
    with library.shared_per_sm(shared), library.metered() as meter:
        saved = call.forward()
    assert (meter.launches, meter.cooperative_launches) == ((0, 1) if shared else (5, 0))
    formula = 5 * unit + bits - taken[0]
    assert formula <= meter.moved <= 1.05 * formula + channel
    with library.shared_per_sm(shared), library.metered() as meter:
        call.backward(saved)
    assert (meter.launches, meter.cooperative_launches) == ((0, 1) if shared else (3, 0))
    pooled = call.dy2.nbytes if call.dy2 is not None else 0
    if second == "none":
        formula = 8 * unit + bits - taken[1] + (1 - taken[1] / (3 * unit)) * bits
    else:
        formula = 9 * unit + pooled + bits - 4 / 3 * taken[1]
    assert formula <= meter.dram <= 1.05 * formula + channel


@layouts
@pytest.mark.parametrize("second", ["full", "pooled"])
@pytest.mark.parametrize("residual", [False, True], ids=["bn_relu", "bn_add_relu"])
def test_bytes_with_a_second_gradient_are_within_5_percent_of_the_formula(
    second: str, residual: bool, layout: torch.memory_format
) -> None:
    """7 N where adding first takes 3 N and 6 N: dz is read by the last pass, and it is dresidual. Nothing is kept."""
    library, call = emulated.load(), Call(SHAPE, layout, second)
    backward = call.one(residual)
    with library.shared_per_sm(1024), library.metered() as meter:
        backward()
    assert (meter.launches, meter.cooperative_launches) == (3, 0)
    formula = (7 if second == "full" else 6.25) * 2 * call.x.numel() + residual * call.x.numel() / 8
    assert formula <= meter.dram <= 1.05 * formula
    # from the L2 cache: both rows of pixels of a window load its gradient, in NHWC every pixel does
    repeated = {"full": 0, "pooled": 0.25 if layout == torch.contiguous_format else 0.75}[second] * 2 * call.x.numel()
    assert meter.moved <= 1.05 * (formula + repeated)


@layouts
@pytest.mark.parametrize("shared", [0, ONE_ROW], ids=["nothing kept", "a part"])
def test_zero_gamma_does_not_read_x_again(shared: int, layout: torch.memory_format) -> None:
    """If all weights of x are zero: forward 4 N, backward 7 N with dx = 0, less what is kept of the others."""
    library, call, weight = emulated.load(), Call(SHAPE, layout), torch.zeros(SHAPE[1])
    unit, bits, kept = 2 * call.x.numel(), call.x.numel() / 8, ROW if shared else 0
    with library.shared_per_sm(shared), library.metered() as meter:
        saved = call.forward(weight)
    assert meter.moved <= 1.05 * (4 * unit + bits - kept)
    with library.shared_per_sm(shared), library.metered() as meter:
        dx, dresidual, *_ = call.backward(saved, weight)
    assert meter.moved <= 1.05 * (7 * unit + 2 * bits - 2 * kept)
    assert (dx == 0).all()
    assert (dresidual != 0).any()


@pytest.mark.parametrize("second", ["full", "pooled"])
@pytest.mark.parametrize("shape", [(6, 64, 14, 14), (5, 24, 8, 6), (40, 512, 2, 2)], ids=str)
@pytest.mark.parametrize("shared", [0, ALL, 64 << 10], ids=["several launches", "one", "a part on the chip"])
@layouts
def test_bank_conflicts(shape: tuple[int, ...], shared: int, second: str, layout: torch.memory_format) -> None:
    library, call = emulated.load(), Call(shape, layout, second)
    with library.shared_per_sm(shared), library.metered(conflicts=True) as meter:
        saved = call.forward()
        call.backward(saved)
        call.one(True)()
    assert meter.least_wavefronts > 0
    assert meter.conflicts <= 1.1


# ---- other builds ----

BUILD = ("bn_relu", "bn_add_bn_relu")  # bn_relu.cu defines what the calls of both share


@pytest.mark.parametrize("kind", ["plain", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("asan", "tsan"))])
def test_every_build_is_right(kind: str) -> None:
    assert emulated.run("run_bn_add_bn_relu.py", emulated.Build(kind)) == ""


# fault -> file, text, its replacement, build, expected output
FAULTS = {
    "a mean's gradient not divided by the pixels of its window": (
        "bn_second_gradient.cuh",
        "(2 * row + 1 < height ? 0.5f : 1.0f)",
        "(2 * row + 2 < height ? 0.5f : 1.0f)",
        "plain",
        "wrong d",
    ),
    "the mean of the pixel before": (
        "bn_second_gradient.cuh",
        "j == 0 || column % 2 == 0",
        "j == 0 || column % 2 == 1",
        "plain",
        "wrong d",
    ),
    "barrier removed before the parameters of the residual are staged": (
        "bn_add_bn_relu.cuh",
        "skip_x = tile.channel_params(p, staged, mean, scale, bias) && from_x;\n    __syncthreads();\n",
        "skip_x = tile.channel_params(p, staged, mean, scale, bias) && from_x;\n",
        "tsan",
        "data race",
    ),
    "barrier removed before the factors of dresidual are staged": (
        "bn_add_bn_relu.cuh",
        "mean, scale, unused, shift, slope);\n    __syncthreads();\n",
        "mean, scale, unused, shift, slope);\n",
        "tsan",
        "data race",
    ),
    "dz not masked": (
        "bn_add_bn_relu.cuh",
        "keep_passing(bits[u], g[u]);\n        keep(",
        "(void)bits[u];\n        keep(",
        "plain",
        "wrong d",
    ),
    "grid barrier removed before the statistics are computed": (
        "bn_add_bn_slab.cuh",
        "  FT_GRID_BARRIER();\n  for_channels_of_grid(s, [&](int c, int lane) {\n    finalize_moments(of_x",
        "  for_channels_of_grid(s, [&](int c, int lane) {\n    finalize_moments(of_x",
        "tsan",
        "data race",
    ),
    "the first row of the residual that is not kept taken for one that is": (
        "bn_add_bn_slab.cuh",
        "load_row_last(residual, e, z[u], !kept);",
        "load_row_last(residual, e, z[u], !z_slab.has(row + kRows - 2 - u));",
        "plain",
        "wrong y",
    ),
    "the first row of dz that is not kept never written": (
        "bn_add_bn_slab.cuh",
        "if (other.data && !dz_slab.has(row))",
        "if (other.data && !dz_slab.has(row - 1))",
        "plain",
        "wrong d",
    ),
    "what is kept of one tensor where the other's begins": (
        "bn_slab.cuh",
        "vectors + rows * kVectors * kBnThreads, rows",
        "vectors + (rows - 1) * kVectors * kBnThreads, rows",
        "plain",
        "wrong",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, tmp_path: Path) -> None:
    *change, kind, said = FAULTS[fault]
    build = emulated.Build(kind, emulated.changed(tmp_path, *change), BUILD)
    assert said in emulated.run("run_bn_add_bn_relu.py", build)
