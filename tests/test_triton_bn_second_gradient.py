"""The second gradient of bn_relu_backward in Triton: the bits of adding first, offsets, splits, bytes.

For values against float64, other dtypes, strides and special values see test_bn_second_gradient.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import BN_SECONDS, LAYOUTS, bn_add_gradients, bn_second_shape, bn_tensor, poisoned_memory, triton_device
from triton_meter import metered

DEVICE = triton_device()

from fasttricks.kernels import bn_relu as implementation  # noqa: E402
from fasttricks.kernels import launch as launching  # noqa: E402

ops = torch.ops.fasttricks_triton
EPS = 1e-5


@pytest.fixture(autouse=True)
def _new_tensors_are_on_the_device() -> Iterator[None]:
    with DEVICE:
        yield


def tensors(shape: tuple[int, ...], second: str, layout: torch.memory_format) -> list[torch.Tensor]:
    """x, dy and dy2."""
    return [bn_tensor(s, torch.float16, layout) for s in (shape, shape, bn_second_shape(shape, second))]


def check_bits(x: torch.Tensor, dy: torch.Tensor, dy2: torch.Tensor, residual: bool, training: bool) -> None:
    """A call with dy2 equals one with the sum, rounded to the dtype of x, bit for bit."""
    weight, bias = torch.randn(2, x.shape[1])
    mean, var = ops.bn_stats(x)
    mask = ops.bn_add_relu_apply(x, dy, weight, bias, mean, var, EPS)[1] if residual else None
    rest = x, mask, weight, bias, mean, var, EPS, training, residual
    want = ops.bn_relu_backward(bn_add_gradients(dy, dy2), *rest)
    with poisoned_memory():
        got = ops.bn_relu_backward(dy, *rest, dy2)
    for name, a, b in zip(("dx", "dresidual", "dweight", "dbias"), got, want, strict=True):
        assert torch.equal(a, b), name
        assert a.stride() == b.stride(), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("width", [1, 3, 6, 4, 8])
def test_equals_adding_first(width: int, layout: torch.memory_format) -> None:
    """NCHW has code of its own for widths that 2, 4 and 8 divide."""
    for number, second in enumerate(BN_SECONDS):
        given = tensors((2, 3, 5, width), second, layout)
        check_bits(*given, residual=number % 2 == 0, training=True)
        check_bits(*given, residual=number % 2 == 1, training=False)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_64_bit_offsets_and_many_splits(layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several splits; planes of two tiles, rows that cross from one to the other."""
    monkeypatch.setattr(launching, "programs", lambda device: 40)
    monkeypatch.setattr(implementation, "BACKWARD_TILE", 64)
    for shape in ((1, 2, 30, 36), (3, 10, 5, 3)) if layout == torch.contiguous_format else ((3, 10, 5, 3),):
        for second in ("full", "ceil"):
            given = tensors(shape, second, layout)
            for wide_from in (2**31, 0):
                monkeypatch.setattr(launching, "WIDE_FROM", wide_from)
                check_bits(*given, residual=True, training=True)


@pytest.mark.skipif(not launching.INTERPRETED, reason="only the interpreter counts bytes")
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero"])
@pytest.mark.parametrize("second", ["full", "floor"])
def test_bytes_equal_the_formula(layout: torch.memory_format, second: str, zero: bool) -> None:
    """Of activations and masks, in units of the bytes of x; zero: all weights are 0, which saves reads of x and dz."""
    x, dy, dy2 = tensors((4, 16, 8, 8), second, layout)
    weight = torch.zeros(16) if zero else torch.rand(16) + 0.5
    mean, var = ops.bn_stats(x)
    unit, share = x.numel() * 2, dy2.numel() / x.numel()
    mask = torch.full((x.numel() // 8,), 0x5A, dtype=torch.uint8)
    rest = weight, None, mean, var, EPS, True
    with metered() as meter:
        dx, dresidual, *_ = ops.bn_relu_backward(dy, x, mask, *rest, True, dy2)
        moved, _, launches = meter.take(x, dy, dy2, mask, dx, dresidual)
        assert (moved, launches) == (((4 if zero else 6) + share + 1 / 16) * unit, 3)
        dx, *_ = ops.bn_relu_backward(dy, x, None, *rest, False)
        _, others, _ = meter.take(x, dy, dx)
        dx, *_ = ops.bn_relu_backward(dy, x, None, *rest, False, dy2)
        moved, with_dz, launches = meter.take(x, dy, dy2, dx)
        assert (moved, launches) == (((3 if zero else 4) + share) * unit, 3)
        assert with_dz - others == (1 if zero else 2) * unit, "dz is written, then read, in memory of its own"
