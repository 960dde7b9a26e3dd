"""Shapes, layouts, dtypes and tolerances that the tests of all backends share."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import pytest
import torch

from fasttricks import backends

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # each element takes a thousand times as long
HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, *HALF)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def relative_error(out: torch.Tensor, exact: np.ndarray | torch.Tensor) -> float:
    """||out - exact|| / ||exact||, or ||out|| if exact is zero, in the dtype of a NumPy `exact`, else in float64."""
    want = exact if isinstance(exact, np.ndarray) else exact.detach().double().cpu().numpy()
    got = out.detach().double().cpu().numpy().astype(want.dtype)
    norm = np.sqrt((want**2).sum())
    return float(np.sqrt(((got - want) ** 2).sum()) / (norm if norm > 0 else 1))


def allowed(torch_error: float, dtype: torch.dtype) -> float:
    """The largest error allowed: twice torch's own error, plus one unit in the last place."""
    return 2 * torch_error + torch.finfo(dtype).eps


def triton_device() -> torch.device:
    """The device on which this process runs Triton kernels; skips the calling module if there is none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if reason := backends.why_not("triton", device):
        pytest.skip(f"triton: {reason}", allow_module_level=True)
    return device


def fill_with(byte: int | None) -> None:
    """Makes glibc's malloc fill new memory with this byte; None: it does not. Other C libraries cannot."""
    if platform.libc_ver()[0] == "glibc":
        M_PERTURB = -6  # from malloc.h; malloc fills with the complement of its argument
        ctypes.CDLL(None).mallopt(M_PERTURB, 0 if byte is None else ~byte & 0xFF)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Context manager in which new tensors hold NaN (integers: their largest value), to expose unwritten elements.

    torch does not fill tensors that the CPU library allocates. malloc does, with a byte that gives 3e38 in float32 and
    bfloat16, NaN in float16 and 1e306 in float64.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    fill_with(0x7F)
    try:
        yield
    finally:
        fill_with(None)
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


# ---- avgpool_conv1x1 ----

# (N, C, H, W, Cout): odd sizes, channels that do not fill a register, rows and columns of one pixel, sums over several
# blocks
AVGPOOL_CONV1X1_SHAPES = (
    (4, 3, 5, 4, 40),
    (3, 33, 7, 9, 65),
    (2, 64, 14, 14, 128),
    (2, 530, 6, 4, 35),
    (2, 7, 3, 1, 600),
    (5, 16, 1, 5, 37),
    (4 if INTERPRETED else 20, 24, 15, 15, 40),
)
# (stride, ceil_mode)
AVGPOOL_CONV1X1_MODES = ((1, False), (2, False), (2, True))


def avgpool_conv1x1_fits(shape: tuple[int, ...], stride: int, ceil_mode: bool) -> bool:
    """Whether the output has at least one pixel: without ceil_mode a single row or column is dropped."""
    return stride == 1 or ceil_mode or min(shape[2:4]) > 1


def avgpool_conv1x1_exact(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dy: torch.Tensor, stride: int, ceil_mode: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(y, dx, dweight, dbias) by the formulas in NumPy's long double (80 bits on x86), exact enough for float64 too."""

    def long(t: torch.Tensor) -> np.ndarray:
        return t.detach().double().numpy().astype(np.longdouble)

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # numpy's own loop: BLAS has no long double
        return np.dot(a, b)

    n, c, h, w = x.shape
    ho, wo = ((s + (stride - 1 if ceil_mode else 0)) // stride for s in (h, w))
    # the window of each pixel, and how many pixels of each window lie inside the image
    rows, columns = np.arange(h) // stride, np.arange(w) // stride
    inside = (rows < ho)[:, None] & (columns < wo)[None, :]
    count = np.zeros((ho, wo), dtype=np.longdouble)
    pooled = np.zeros((n, c, ho, wo), dtype=np.longdouble)
    values = long(x)
    for r in range(h):
        for s in range(w):
            if inside[r, s]:
                count[rows[r], columns[s]] += 1
                pooled[:, :, rows[r], columns[s]] += values[:, :, r, s]
    pooled = pooled / count
    flat = pooled.transpose(1, 0, 2, 3).reshape(c, -1)
    grad = long(dy).transpose(1, 0, 2, 3).reshape(dy.shape[1], -1)
    matrix = long(weight)[:, :, 0, 0]

    y = product(matrix, flat).reshape(-1, n, ho, wo).transpose(1, 0, 2, 3)
    if bias is not None:
        y = y + long(bias)[:, None, None]
    dpooled = product(matrix.T, grad).reshape(c, n, ho, wo).transpose(1, 0, 2, 3) / count
    dx = np.zeros((n, c, h, w), dtype=np.longdouble)
    for r in range(h):
        for s in range(w):
            if inside[r, s]:
                dx[:, :, r, s] = dpooled[:, :, rows[r], columns[s]]
    return y, dx, product(grad, flat.T)[:, :, None, None], grad.sum(axis=1)


# ---- bn_relu, bn_add_relu ----

# (N, C, ...): channels that do not fill a register, one pixel, one row, several chunks per reduction, 2 to 5 dimensions
BN_SHAPES = (
    (4, 6, 7, 9),
    (2, 65, 10, 10),
    (9, 7, 1, 1),
    (2, 1, 5, 3),
    (16, 130, 1, 2),
    (1, 3, 70, 71),
    (33, 5),
    (4, 9, 11),
    (2, 3, 4, 5, 6),
)


def bn_layouts(shape: tuple[int, ...]) -> tuple[torch.memory_format, ...]:
    return {4: LAYOUTS, 5: (torch.contiguous_format, torch.channels_last_3d)}.get(
        len(shape), (torch.contiguous_format,)
    )


def bn_cases(shapes: Iterable[tuple[int, ...]]) -> pytest.MarkDecorator:
    """Parametrizes `shape` and `layout`: every shape in its layouts."""
    made = [(shape, layout) for shape in shapes for layout in bn_layouts(shape)]
    ids = [f"{'x'.join(map(str, s))}-{'cl' if layout != torch.contiguous_format else 'nchw'}" for s, layout in made]
    return pytest.mark.parametrize(("shape", "layout"), made, ids=ids)


def bn_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:
    return (2 * torch.randn(shape) + 0.5).to(dtype).contiguous(memory_format=layout)


def bn_affine(channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """weight of both signs and bias, in the type of the sums, such that y is positive in about half of a channel."""
    weight = (0.5 + torch.rand(channels)) * torch.where(torch.rand(channels) < 0.5, -1, 1)
    wide = bn_wide(dtype)
    return weight.to(wide), (torch.rand(channels) - 0.5).to(wide)


def bn_wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which values of `dtype` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def nudged(t: torch.Tensor) -> torch.Tensor:
    """t in float64, each value changed by at most one rounding of the type in which it is summed."""
    eps = torch.finfo(bn_wide(t.dtype)).eps
    return t.double() * (1 + eps * (2 * torch.rand(t.shape, dtype=torch.float64, device=t.device) - 1))


def assert_bn_close(
    results: Mapping[str, torch.Tensor],
    by_torch: Callable[[Callable[[torch.Tensor], torch.Tensor]], Iterable[torch.Tensor]],
    roundings: int = 32,
) -> None:
    """Asserts that each result errs at most twice as much as torch's, plus what some roundings of the inputs change.

    The latter is large where few values per channel cancel, or where the ReLU lets few through.

    by_torch(to): the values in the order of `results`, by torch's ops on inputs that `to` was applied to.
    """
    peers, exact, *near = (list(by_torch(to)) for to in (torch.clone, torch.Tensor.double, *[nudged] * 4))
    for (name, got), peer, want, *others in zip(results.items(), peers, exact, *near, strict=True):
        # at least a rounding in float64, in which the exact values are computed
        change = max(torch.finfo(torch.float64).eps, *(relative_error(other, want) for other in others))
        error, limit = relative_error(got, want), allowed(relative_error(peer, want), got.dtype) + roundings * change
        assert error <= limit, (name, error, limit)
        norms = got.double().norm() * want.norm()
        if norms > 0:  # whatever the limit, the values point in the exact direction
            assert (got.double() * want).sum() / norms > 1 - 1e-4, name


def assert_bn_statistics(mean: torch.Tensor, var: torch.Tensor, x: torch.Tensor) -> None:
    """Asserts that these are the mean and the biased variance of each channel of x, in the type of sums."""
    dims = [0, *range(2, x.dim())]

    def by_torch(to: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        values = to(x)
        return torch.var_mean(values.to(bn_wide(values.dtype)), dims, correction=0)[::-1]

    assert mean.dtype == var.dtype == bn_wide(x.dtype)
    assert_bn_close({"mean": mean, "var": var}, by_torch, roundings=64)


# Shapes whose pixels are pooled: one pixel, row or column, odd edges, rows that span the chunks of a reduction
BN_POOLED_SHAPES = (
    ((2, 7, 3, 5),)
    if INTERPRETED
    else ((3, 5, 1, 1), (2, 3, 1, 6), (2, 9, 7, 1), (2, 7, 3, 5), (3, 6, 7, 7), (2, 17, 8, 12), (1, 2, 70, 71))
)
# of the tests of two gradients and of two BatchNorms; test_triton_* have the shapes that Triton's tiles call for
BN_BLOCK_SHAPES = ((2, 3, 5, 4),) if INTERPRETED else BN_SHAPES
BN_BLOCK_DTYPES = (torch.float32, torch.float16) if INTERPRETED else DTYPES
BN_SECONDS = ("full", "floor", "ceil", "mixed")


def bn_second_shape(shape: tuple[int, ...], second: str) -> tuple[int, ...]:
    """The shape of a second gradient of y: that of x, or of its 2x2 means with windows dropped or cut at odd edges."""
    if second == "full":
        return shape
    up = {"floor": (0, 0), "ceil": (1, 1), "mixed": (0, 1)}[second]
    return (*shape[:2], *((size + more) // 2 for size, more in zip(shape[2:], up, strict=True)))


def bn_add_gradients(dy: torch.Tensor, dy2: torch.Tensor) -> torch.Tensor:
    """dy plus a second gradient, as an op of its own would add them: rounded once, in the layout of dy."""
    wide = bn_wide(dy.dtype)
    return (dy.to(wide) + bn_spread(dy2.to(wide), dy.shape)).to(dy.dtype)


def bn_spread(dy2: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A second gradient of y as a gradient of every pixel: that of a mean is divided by the pixels of its window."""
    if dy2.shape == shape:
        return dy2
    covered = [min(size, 2 * windows) for size, windows in zip(shape[2:], dy2.shape[2:], strict=True)]
    rows, columns = (
        (size - 2 * torch.arange(windows)).clamp(max=2) for size, windows in zip(covered, dy2.shape[2:], strict=True)
    )
    each = (dy2 / (rows[:, None] * columns)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    out = dy2.new_zeros(shape)
    out[:, :, : covered[0], : covered[1]] = each[:, :, : covered[0], : covered[1]]
    return out
