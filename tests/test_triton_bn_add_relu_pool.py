"""bn_add_relu_pool in Triton: values against torch, exact zeros, offsets, bytes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS, allowed, poisoned_memory, relative_error, triton_device
from triton_meter import metered

DEVICE = triton_device()

from fasttricks.kernels import launch as launching  # noqa: E402
from fasttricks.ops.bn_outputs import unpack_mask  # noqa: E402

ops = torch.ops.fasttricks_triton
EPS = 1e-5
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
# 8 channels or columns together, or not; odd heights and widths; several programs
SHAPES = ((2, 8, 4, 8), (2, 16, 5, 7), (3, 3, 5, 16), (2, 5, 7, 7), (2, 3, 1, 9), (5, 24, 12, 16))


def inputs(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> list[torch.Tensor]:
    """x, residual, weight, bias."""
    parameter = torch.promote_types(dtype, torch.float32)
    large = [(torch.randn(shape, device=DEVICE) + s).to(dtype).contiguous(memory_format=layout) for s in (0.7, -0.4)]
    return [*large, *(torch.randn(shape[1], dtype=parameter, device=DEVICE) for _ in range(2))]


def forward(given: list[torch.Tensor], ceil_mode: bool) -> tuple[torch.Tensor, ...]:
    """y, its means, mean, var, mask."""
    return ops.bn_add_relu_pool_forward(*given, EPS, None, None, None, None, ceil_mode)


def means(y: torch.Tensor, ceil_mode: bool) -> torch.Tensor:
    return F.avg_pool2d(y, 2, ceil_mode=ceil_mode, count_include_pad=False)


@pytest.mark.parametrize("ceil_mode", [False, True], ids=["floor", "ceil"])
@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_y_is_that_of_bn_add_relu_and_pooled_its_means(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, ceil_mode: bool
) -> None:
    if not ceil_mode and min(shape[2:]) == 1:
        return
    given = inputs(shape, dtype, layout)
    with poisoned_memory():
        y, pooled, mean, var, mask = forward(given, ceil_mode)
        applied = ops.bn_add_relu_pool_apply(*given, mean, var, EPS, ceil_mode)
    plain = ops.bn_add_relu_forward(*given, EPS)
    # rounding may differ: compilers contract other products and sums in other kernels
    assert all(torch.equal(a, b) for a, b in zip((mean, var), plain[1:3], strict=True))
    for got_y, got_pooled, got_mask in ((y, pooled, mask), applied):
        assert relative_error(got_y.cpu(), plain[0].cpu()) <= allowed(0.0, dtype)
        assert torch.equal(unpack_mask(got_mask, got_y), ~(got_y <= 0))
        assert got_y.stride() == given[0].stride()
        want, theirs = means(got_y.double(), ceil_mode).cpu(), means(got_y, ceil_mode).cpu()
        assert got_pooled.is_contiguous(memory_format=layout)
        assert relative_error(got_pooled.cpu(), want) <= allowed(relative_error(theirs, want), dtype)


@layouts
def test_zero_weight_is_exact(layout: torch.memory_format) -> None:
    x, residual, weight, bias = inputs((3, 8, 4, 8), torch.float32, layout)
    y, pooled, *_ = forward([x, residual, weight.zero_(), bias], False)
    assert torch.equal(y, F.relu(bias[:, None, None] + residual))
    torch.testing.assert_close(pooled, means(y, False))


@layouts
def test_nan_reaches_its_channel_or_window(layout: torch.memory_format) -> None:
    x, residual, weight, bias = inputs((2, 8, 4, 8), torch.float32, layout)
    weight[2] = 0
    x[1, 2, 2, 2] = math.nan
    y, pooled, *_ = forward([x, residual, weight, bias], False)
    assert y[:, 2].isnan().all()
    assert pooled[:, 2].isnan().all()
    assert y[:, 3:].isfinite().all()
    x[1, 2, 2, 2], residual[0, 5, 3, 1] = 0, math.nan
    y, pooled, *_, mask = forward([x, residual, weight, bias], False)
    assert y.isnan().nonzero().tolist() == [[0, 5, 3, 1]]
    assert pooled.isnan().nonzero().tolist() == [[0, 5, 1, 0]]
    assert unpack_mask(mask, y)[0, 5, 3, 1]


@layouts
@pytest.mark.parametrize("shape", [(3, 8, 5, 8), (2, 5, 5, 6)], ids=str)
def test_64_bit_offsets_give_the_same_bits(
    shape: tuple[int, ...], layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(shape, torch.float16, layout)
    first = forward(given, True)
    monkeypatch.setattr(launching, "WIDE_FROM", 0)
    assert all(torch.equal(a, b) for a, b in zip(first, forward(given, True), strict=True))


@pytest.mark.skipif(not launching.INTERPRETED, reason="only the interpreter counts bytes")
@layouts
@pytest.mark.parametrize(("zero", "n"), [(False, 4.25), (True, 3.25)], ids=["", "zero"])
def test_bytes_equal_the_formula(layout: torch.memory_format, zero: bool, n: float) -> None:
    """Of activations and mask, in units of the bytes of x; zero: all weights are 0, which saves a read of x."""
    given = inputs((4, 16, 8, 8), torch.float16, layout)
    if zero:
        given[2].zero_()
    unit = given[0].numel() * 2
    with metered() as meter:
        y, pooled, *_, mask = forward(given, False)
        moved, _, launches = meter.take(*given[:2], y, pooled, mask)
    assert (moved, launches) == ((n + 1 / 16) * unit, 3)
