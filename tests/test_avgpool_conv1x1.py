"""avgpool_conv1x1: values and gradients against the formula; layouts, strides, windows at edges, special values."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    AVGPOOL_CONV1X1_MODES,
    AVGPOOL_CONV1X1_SHAPES,
    DTYPES,
    LAYOUTS,
    allowed,
    avgpool_conv1x1_exact,
    avgpool_conv1x1_fits,
    poisoned_memory,
    relative_error,
)

from fasttricks.ops.avgpool_conv1x1 import avgpool_conv1x1
from fasttricks.reference.avgpool_conv1x1 import avgpool_conv1x1 as reference

NAMES = ("y", "dx", "dweight", "dbias")


def draw(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> list[torch.Tensor]:
    n, c, h, w, o = shape
    x = torch.randn(n, c, h, w, dtype=torch.float64).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(o, c, 1, 1, dtype=torch.float64).to(dtype)
    return [x, weight, torch.randn(o, dtype=torch.float64).to(dtype)]


def run(op, tensors, dy, stride, ceil_mode):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = op(*leaves, stride=stride, ceil_mode=ceil_mode)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def output_like(tensors, stride, ceil_mode) -> torch.Tensor:
    return torch.randn_like(reference(*tensors, stride=stride, ceil_mode=ceil_mode))


def check(tensors, dy, stride, ceil_mode, what: object) -> list[torch.Tensor]:
    """Asserts that the op errs at most twice as much as torch; returns its output and gradients."""
    exact = avgpool_conv1x1_exact(*tensors, dy, stride, ceil_mode)
    theirs = run(reference, tensors, dy, stride, ceil_mode)
    with poisoned_memory():
        ours = run(avgpool_conv1x1, tensors, dy, stride, ceil_mode)
    for name, got, torchs, want in zip(NAMES, ours, theirs, exact, strict=True):
        assert tuple(got.shape) == want.shape, (name, what)
        limit = allowed(relative_error(torchs, want), got.dtype)
        assert relative_error(got, want) <= limit, (name, what, relative_error(got, want), limit)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", AVGPOOL_CONV1X1_SHAPES, ids=str)
def test_values_and_gradients(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for (stride, ceil_mode), layout in itertools.product(AVGPOOL_CONV1X1_MODES, LAYOUTS):
        if not avgpool_conv1x1_fits(shape, stride, ceil_mode):
            continue
        tensors = draw(shape, dtype, layout)
        dy = output_like(tensors, stride, ceil_mode)
        ours = check(tensors, dy, stride, ceil_mode, (stride, ceil_mode, layout))
        if min(shape[1:4]) > 1:
            assert ours[1].is_contiguous(memory_format=layout)
        if min(ours[0].shape[1:]) > 1:
            assert ours[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", AVGPOOL_CONV1X1_SHAPES, ids=str)
def test_gradient_of_the_pooled_tensor(raw_ops: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """W^T dy, neither divided nor spread; the other gradients are the same bits."""
    for (stride, ceil_mode), layout in itertools.product(AVGPOOL_CONV1X1_MODES, LAYOUTS):
        if not avgpool_conv1x1_fits(shape, stride, ceil_mode):
            continue
        x, weight, _ = draw(shape, dtype, layout)
        pooled = x if stride == 1 else F.avg_pool2d(x, 2, 2, 0, ceil_mode, False)
        dy = torch.randn_like(F.conv2d(pooled, weight))
        with poisoned_memory():
            given = (dy, x, weight, stride, ceil_mode, True)
            dx, *others = raw_ops.avgpool_conv1x1_backward(*given, True, True, pooled_dx=True)
            both = layout == torch.channels_last and ceil_mode  # the two products need not be repeated in every mode
            spread, *same = raw_ops.avgpool_conv1x1_backward(*given, both, both)
        _, exact, _, _ = avgpool_conv1x1_exact(pooled, weight, None, dy, 1, False)
        limit = allowed(relative_error(F.conv_transpose2d(dy, weight), exact), dtype)
        assert dx.shape == pooled.shape
        assert dx.dtype == dtype
        assert relative_error(dx, exact) <= limit, (stride, ceil_mode, layout)
        assert stride == 2 or torch.equal(dx, spread)
        assert not both or all(torch.equal(a, b) for a, b in zip(others, same, strict=True))
        if min(dx.shape[1:]) > 1:
            assert dx.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradient_of_an_empty_pooled_tensor(raw_ops: Any, layout: torch.memory_format) -> None:
    x, weight, _ = draw((0, 6, 5, 7, 3), torch.float32, layout)
    for ceil_mode, size in ((False, (2, 3)), (True, (3, 4))):
        given = (torch.empty(0, 3, *size), x, weight, 2, ceil_mode)
        dx, dweight, dbias = raw_ops.avgpool_conv1x1_backward(*given, True, True, True, pooled_dx=True)
        assert dx.shape == (0, 6, *size)
        assert not dweight.any()
        assert not dbias.any()
        assert raw_ops.avgpool_conv1x1_backward(*given, False, True, True, pooled_dx=True)[0].numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_channel_and_one_pixel_are_exact(backend: str, dtype: torch.dtype) -> None:
    """Dimensions of size one. Small integers make every sum exact in bfloat16; means of multiples of 4 are integers."""

    def integers(t: torch.Tensor) -> torch.Tensor:
        return t.round().clamp(-3, 3)

    for shape in ((1, 1, 2, 2, 1), (1, 1, 1, 1, 1), (2, 1, 1, 1, 3), (1, 3, 1, 2, 1), (1, 1, 3, 3, 1)):
        for (stride, ceil_mode), layout in itertools.product(AVGPOOL_CONV1X1_MODES, LAYOUTS):
            if avgpool_conv1x1_fits(shape, stride, ceil_mode):
                x, *parameters = (integers(t) for t in draw(shape, dtype, layout))
                tensors = [4 * x, *parameters]
                dy = 4 * integers(output_like(tensors, stride, ceil_mode))
                exact = avgpool_conv1x1_exact(*tensors, dy, stride, ceil_mode)
                with poisoned_memory():
                    ours = run(avgpool_conv1x1, tensors, dy, stride, ceil_mode)
                for name, got, want in zip(NAMES, ours, exact, strict=True):
                    assert got.double().numpy().tolist() == want.astype("float64").tolist(), (name, shape, layout)


def test_any_number_of_threads_gives_the_same_bits(backend: str) -> None:
    """Work is divided along the pixels, or along the channels if there are few pixels."""
    before = torch.get_num_threads()
    large = () if backend == "triton" else ((1, 40, 30, 30, 20), (2, 300, 6, 6, 500))
    try:
        for threads in (1, 3, 7, 16) if backend == "cpu" else (1,):
            torch.set_num_threads(threads)
            for shape in ((1, 130, 4, 4, 260), (3, 33, 7, 9, 65), *large):
                for layout in LAYOUTS:
                    tensors = draw(shape, torch.float32, layout)
                    dy = output_like(tensors, 2, True)
                    first = check(tensors, dy, 2, True, (threads, shape, layout))
                    again = run(avgpool_conv1x1, tensors, dy, 2, True)
                    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(before)


def test_windows_at_odd_edges_average_the_pixels_inside(backend: str) -> None:
    """Windows that overhang the edge; the expected values were computed by hand."""
    x = torch.arange(25.0).reshape(1, 1, 5, 5).requires_grad_()
    one = torch.ones(1, 1, 1, 1)
    y = avgpool_conv1x1(x, one, ceil_mode=True)
    assert y[0, 0].tolist() == [[3, 5, 6.5], [13, 15, 16.5], [20.5, 22.5, 24]]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad[0, 0].tolist() == [[0.25] * 4 + [0.5]] * 4 + [[0.5] * 4 + [1]]
    x.grad = None
    avgpool_conv1x1(x, one).sum().backward()
    assert x.grad[0, 0].tolist() == [[0.25] * 4 + [0]] * 4 + [[0.0] * 5]
    single = torch.full((1, 1, 1, 1), 7.0)
    assert avgpool_conv1x1(single, one, ceil_mode=True).item() == 7


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_stride_1_is_the_plain_convolution(backend: str, layout: torch.memory_format) -> None:
    x, weight, bias = draw((2, 20, 5, 7, 9), torch.float64, layout)
    torch.testing.assert_close(avgpool_conv1x1(x, weight, bias, stride=1), F.conv2d(x, weight, bias))


def strided_inputs() -> dict[str, torch.Tensor]:
    base = torch.randn(4, 10, 8, 12)
    return {
        "transposed": base.transpose(2, 3),
        "every other channel": base[:, ::2],
        "every other pixel": base[:, :, ::2, ::3],
        "channels_last, some channels": base.contiguous(memory_format=torch.channels_last)[:, 2:7],
        "channels_last, cropped": base.contiguous(memory_format=torch.channels_last)[:, :, 1:, 1:],
        "expanded": base[:1].expand(3, -1, -1, -1),
        "expanded channels": base[:, :1].expand(-1, 5, -1, -1),
        "one channel": base.contiguous(memory_format=torch.channels_last)[:, :1],
        "one column": base.contiguous(memory_format=torch.channels_last)[:, :, :, :1],
        "ambiguous (2, 1, 4, 4)": torch.randn(2, 1, 4, 4).contiguous(memory_format=torch.channels_last),
        "ambiguous (2, 8, 1, 1)": torch.randn(2, 8, 1, 1).contiguous(memory_format=torch.channels_last),
        "ambiguous (1, 8, 5, 1)": torch.randn(1, 8, 5, 1).contiguous(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize("name", sorted(strided_inputs()))
def test_any_strides_of_x_are_accepted(backend: str, name: str) -> None:
    x = strided_inputs()[name]
    tensors = [x, torch.randn(40, x.shape[1], 1, 1), torch.randn(40)]
    for stride, ceil_mode in AVGPOOL_CONV1X1_MODES:
        if avgpool_conv1x1_fits(x.shape, stride, ceil_mode):
            check(tensors, output_like(tensors, stride, ceil_mode), stride, ceil_mode, name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_strides_of_dy_are_accepted(backend: str, layout: torch.memory_format) -> None:
    """dy expanded, from a concatenation, transposed, in the other layout, or sliced."""
    tensors = draw((2, 6, 8, 8, 4), torch.float32, layout)
    other = LAYOUTS[layout is LAYOUTS[0]]
    losses = {
        "sum": lambda y: y.sum(),
        "cat": lambda y: (torch.cat([y, 2 * y], 1) ** 2).sum(),
        "transpose": lambda y: (y.transpose(2, 3).contiguous() * torch.arange(4.0)).sum(),
        "other layout": lambda y: (y.contiguous(memory_format=other) ** 2).sum(),
        "slice": lambda y: y[:, ::2, 1:].pow(2).sum(),
    }
    for name, loss in losses.items():
        grads = []
        for op in (avgpool_conv1x1, reference):
            leaves = [t.detach().double().requires_grad_() for t in tensors]
            grads.append(torch.autograd.grad(loss(op(*leaves)), leaves))
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, msg=name)
        assert grads[0][0].is_contiguous(memory_format=layout), name


def weights() -> dict[str, torch.Tensor]:
    base = torch.randn(12, 10, 1, 1)
    return {
        "contiguous": base,
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(10, 12, 1, 1).transpose(0, 1),
        "slice": torch.randn(24, 10, 1, 1)[::2],
        "expanded": torch.randn(1, 10, 1, 1).expand(12, -1, -1, -1),
        "one input channel": torch.randn(12, 1, 1, 1).contiguous(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize("name", sorted(weights()))
def test_any_strides_of_weight_are_accepted(backend: str, name: str) -> None:
    weight = weights()[name]
    tensors = [torch.randn(3, weight.shape[1], 6, 5), weight, torch.randn(12)]
    ours = check(tensors, output_like(tensors, 2, False), 2, False, name)
    if weight.is_contiguous() and backend != "reference":
        assert ours[2].stride() == weight.stride()


def test_weight_gradient_has_the_strides_of_weight(backend: str) -> None:
    """Otherwise DistributedDataParallel copies the gradient and warns."""
    for layout in LAYOUTS:
        weight = torch.randn(8, 6, 1, 1).contiguous(memory_format=layout).requires_grad_()
        avgpool_conv1x1(torch.randn(2, 6, 4, 4).contiguous(memory_format=layout), weight).sum().backward()
        assert weight.grad is not None
        assert backend == "reference" or weight.grad.stride() == weight.stride()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_empty_batch_has_zero_gradients(backend: str, layout: torch.memory_format) -> None:
    x = torch.randn(0, 6, 4, 5).contiguous(memory_format=layout).requires_grad_()
    weight, bias = torch.randn(3, 6, 1, 1, requires_grad=True), torch.randn(3, requires_grad=True)
    with poisoned_memory():
        y = avgpool_conv1x1(x, weight, bias)
        y.sum().backward()
    assert y.shape == (0, 3, 2, 2)
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros(3, 6, 1, 1))
    assert torch.equal(bias.grad, torch.zeros(3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_nan_and_infinity_propagate_as_in_torch(backend: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    for special in (float("nan"), float("inf"), float("-inf")):
        tensors = draw((2, 37, 8, 8, 35), dtype, layout)
        tensors[0][0, 3, 2, 5] = special
        dy = output_like(tensors, 2, False)
        dy[1, 2, 3, 0] = special
        ours, theirs = (run(op, tensors, dy, 2, False) for op in (avgpool_conv1x1, reference))
        for name, got, want in zip(NAMES, ours, theirs, strict=True):
            assert torch.equal(got.isnan(), want.isnan()), name
            assert torch.equal(got.isinf(), want.isinf()), name
            assert torch.equal(got[got.isinf()], want[want.isinf()]), name


def test_half_means_are_rounded_except_on_the_cpu(backend: str) -> None:
    """The mean 1 + 2^-12 is not a float16: times 1024, minus 1024, it is 0.25, or 0 if rounded for tensor cores."""
    x = torch.ones(1, 2, 2, 2, dtype=torch.float16)
    x[0, 0, 0, 0] = 1 + 2**-10
    weight = torch.tensor([1024.0, -1024.0], dtype=torch.float16).reshape(1, 2, 1, 1)
    want = 0.25 if backend == "cpu" else 0.0
    assert avgpool_conv1x1(x, weight).item() == want
