"""avgpool_conv1x1 in Triton: checks, tiles and registration. avgpool_conv1x1_kernels.py has the formulas.

Tensor descriptors (TMA) are not used: a window's values must be summed in registers before the product, so a box of x
in shared memory cannot be an operand. The weight could be one, but it stays in the L2 cache anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from ..layout import layout_of
from ..ops.avgpool_conv1x1_checks import check_backward, check_forward
from ..reference.avgpool_conv1x1 import output_size
from ..reference.bn_relu import accumulate_dtype
from . import avgpool_conv1x1_kernels as kernels
from . import launch as launching
from . import tune, version

SUM_BLOCK = 512


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of a program's product, its warps, and the stages of its loop's loads."""

    m: int
    n: int
    k: int
    warps: int
    stages: int = 2


@dataclass(frozen=True)
class Shape:
    """The sizes of x and y, as kernels receive them."""

    n: int
    c: int
    h: int
    w: int
    o: int
    ho: int
    wo: int
    stride: int
    nhwc: bool
    dtype: torch.dtype

    @staticmethod
    def of(x: Tensor, weight: Tensor, stride: int, ceil_mode: bool) -> Shape:
        n, c, h, w = x.shape
        ho, wo = output_size(x, stride, ceil_mode)
        nhwc = layout_of(x) == torch.channels_last
        shape = Shape(n, c, h, w, weight.shape[0], ho, wo, stride, nhwc, x.dtype)
        return shape.after_pool if stride == 1 else shape  # no windows: all pixels of an image are one row

    @property
    def after_pool(self) -> Shape:
        """The same convolution, of the pooled tensor."""
        pixels = self.ho * self.wo
        return replace(self, h=1, w=pixels, ho=1, wo=pixels, stride=1)

    @property
    def pixels(self) -> int:
        return self.n * self.ho * self.wo

    @property
    def full(self) -> bool:
        """Whether all windows lie inside the image and cover it."""
        return (self.ho * self.stride, self.wo * self.stride) == (self.h, self.w)

    @property
    def covered(self) -> bool:
        """Whether every pixel of x is in a window: floor drops an odd last row or column."""
        return self.ho * self.stride >= self.h and self.wo * self.stride >= self.w

    @property
    def narrow(self) -> bool:
        """Whether the rows or planes of NCHW rule out 16-byte accesses: every value then needs its address."""
        return not self.nhwc and (self.w % 8 != 0 or self.ho * self.wo % 8 != 0)

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.nhwc else torch.contiguous_format

    def family(self) -> str:
        """Autotuning cache key for this class of shapes."""
        sizes = tune.bucket(self.pixels, self.c, self.o)
        return f"{self.dtype} {'NHWC' if self.nhwc else 'NCHW'} {self._multiples()} stride {self.stride} {sizes}"

    def sizes(self) -> dict[str, int]:
        v = self._multiples()
        return {
            "images": self.n, "c_units": self.c // v["CV"], "o_units": self.o // v["OV"], "h": self.h,
            "w_units": self.w // v["XV"], "ho": self.ho, "wo": self.wo,
            "plane_units": self.ho * self.wo // v["YV"],
        }  # fmt: skip

    def constants(self) -> dict[str, Any]:
        numel = max(self.n * self.c * self.h * self.w, self.pixels * self.o, self.c * self.o)
        modes = {"NHWC": self.nhwc, "STRIDE": self.stride, "FULL": self.full}
        accumulated = launching.TYPES[accumulate_dtype(self.dtype)]
        return {**modes, **self._multiples(), "WIDE": numel >= launching.WIDE_FROM, "ACC": accumulated}

    def _multiples(self) -> dict[str, int]:
        """The largest powers of two that divide the sizes, up to the number of elements in 16 bytes."""
        sizes = {"CV": self.c, "OV": self.o, "XV": self.w, "YV": self.ho * self.wo}
        return {name: launching.multiple_of(size, 16 // self.dtype.itemsize) for name, size in sizes.items()}


# of y and dx, by the bytes of float32 and float64
PLAIN_TILES = {4: Tile(64, 64, 16, 8), 8: Tile(64, 32, 16, 8) if version() >= (3, 5) else Tile(16, 16, 16, 4)}


def output_tiles(shape: Shape, columns: int, spread: bool) -> tuple[Tile, ...]:
    """Tiles (pixels x channels x depth) of y or, if spread, of dx; the first is the default."""
    if shape.dtype.itemsize > 2:
        return (PLAIN_TILES[shape.dtype.itemsize],)
    if columns <= 128:
        n = max(16, next_power_of_2(columns))
        return Tile(64, n, 32, 8 if shape.narrow else 4), Tile(32, n, 32, 4)
    # x (or dy) is read once for each tile of columns; those spread over the columns of NCHW take more registers
    broad = Tile(64, 128 if shape.narrow or (spread and not shape.nhwc) else 256, 32, 8)
    return (broad, Tile(64, 128, 32, 8)) if broad.n == 256 else (broad,)


def weight_tiles(shape: Shape) -> tuple[Tile, ...]:
    """Tiles (output channels x input channels x pixels) of dW; the first is the default."""
    if shape.dtype.itemsize == 8:
        return (PLAIN_TILES[8],)
    if shape.dtype.itemsize == 4:
        return (Tile(64, 32, 16, 8, stages=1),)
    default = Tile(128, 64, 32, 8 if shape.narrow and shape.stride == 2 else 4)
    return (default,) if shape.narrow else (default, Tile(64, 64, 64, 8))


def avgpool_conv1x1_forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, ceil_mode: bool) -> Tensor:
    """y; see fasttricks.avgpool_conv1x1."""
    check_forward(f"{launching.NAMESPACE}::avgpool_conv1x1_forward", x, weight, bias, stride, ceil_mode)
    shape = Shape.of(x, weight, stride, ceil_mode)
    size = (shape.n, shape.o, *output_size(x, stride, ceil_mode))
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=shape.layout)
    if y.numel() == 0:
        return y
    tensors = {
        "x": x.contiguous(memory_format=shape.layout),
        "weight": weight.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        "y": y,
    }
    _pixels_by_channels(kernels.avgpool_conv1x1_forward_kernel, shape, tensors, shape.o, spread=False)
    return y


def _pixels_by_channels(
    kernel: Any, shape: Shape, tensors: Mapping[str, Tensor | None], columns: int, spread: bool
) -> None:
    def run(tile: Tile) -> None:
        grid = (cdiv(shape.pixels, tile.m) * cdiv(columns, tile.n),)
        constants = {**shape.constants(), "Q": tile.m, "N": tile.n, "K": tile.k}
        launching.launch(kernel, grid, {**tensors, **shape.sizes()}, constants, tile.warps, tile.stages)

    device = next(t.device for t in tensors.values() if t is not None)
    run(tune.fastest(kernel.__name__, shape.family, device, output_tiles(shape, columns, spread), run))


def avgpool_conv1x1_backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, ceil_mode: bool, need_dx: bool, need_dweight: bool,
    need_dbias: bool, pooled_dx: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dweight, dbias), empty where not needed; dweight has the strides of weight.

    pooled_dx: dx is the gradient of the pooled tensor.
    """
    op = f"{launching.NAMESPACE}::avgpool_conv1x1_backward"
    check_backward(op, dy, x, weight, stride, ceil_mode)
    shape = Shape.of(x, weight, stride, ceil_mode)
    dx = x.new_empty(0)
    if need_dx:
        size = (*x.shape[:2], *dy.shape[2:]) if pooled_dx else x.shape
        dx = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=shape.layout)
    dweight = torch.empty_like(weight) if need_dweight else weight.new_empty(0)
    dbias = weight.new_empty(shape.o if need_dbias else 0)
    if shape.n == 0:
        return dx, dweight.zero_(), dbias.zero_()
    dy = dy.contiguous(memory_format=shape.layout)
    if need_dx:
        to = shape.after_pool if pooled_dx else shape
        if not to.covered:
            dx.zero_()
        tensors = {"dy": dy, "weight": weight.contiguous(), "dx": dx}
        _pixels_by_channels(kernels.avgpool_conv1x1_input_kernel, to, tensors, shape.c, spread=to.stride > 1)
    if need_dweight:
        _dweight(dy, x.contiguous(memory_format=shape.layout), shape, dweight)
    if need_dbias:
        _dbias(dy, shape, dbias)
    return dx, dweight, dbias


def _splits(shape: Shape, tiles: int, depth: int, device: torch.device) -> tuple[int, int]:
    """(splits, steps of each): the device is full, and no split is shorter than eight steps."""
    steps = cdiv(shape.pixels, depth)
    wanted = max(1, min(launching.programs(device) // (2 * tiles), cdiv(steps, 8)))
    per_split = cdiv(steps, wanted)
    return cdiv(steps, per_split), per_split


def _partial(like: Tensor, splits: int) -> Tensor:
    return torch.empty((splits, like.numel()), dtype=accumulate_dtype(like.dtype), device=like.device)


def _sum_to(out: Tensor, partial: Tensor) -> None:
    dense = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    arguments = {"partial": partial, "out": dense, "numel": out.numel(), "splits": partial.shape[0]}
    grid = (cdiv(out.numel(), SUM_BLOCK),)
    launching.launch(kernels.avgpool_conv1x1_sum_kernel, grid, arguments, {"BLOCK": SUM_BLOCK}, 4)
    if dense is not out:
        out.copy_(dense)


def _dweight(dy: Tensor, x: Tensor, shape: Shape, dweight: Tensor) -> None:
    def run(tile: Tile) -> Tensor:
        tiles = cdiv(shape.o, tile.m) * cdiv(shape.c, tile.n)
        splits, steps = _splits(shape, tiles, tile.k, x.device)
        partial = _partial(dweight, splits)
        arguments = {"dy": dy, "x": x, "partial": partial, **shape.sizes(), "steps": steps}
        constants = {**shape.constants(), "M": tile.m, "N": tile.n, "K": tile.k}
        kernel = kernels.avgpool_conv1x1_weight_kernel
        launching.launch(kernel, (tiles, splits), arguments, constants, tile.warps, tile.stages)
        return partial

    _sum_to(
        dweight, run(tune.fastest("avgpool_conv1x1_weight_kernel", shape.family, x.device, weight_tiles(shape), run))
    )


def _dbias(dy: Tensor, shape: Shape, dbias: Tensor) -> None:
    m, k = (64, 64) if shape.nhwc else (4, 1024)
    tiles = cdiv(shape.o, m)
    splits, steps = _splits(shape, tiles, k, dy.device)
    partial = _partial(dbias, splits)
    sizes, modes = shape.sizes(), shape.constants()
    arguments = {"dy": dy, "partial": partial, "steps": steps}
    arguments |= {name: sizes[name] for name in ("images", "o_units", "plane_units")}
    constants = {name: modes[name] for name in ("NHWC", "OV", "YV", "WIDE", "ACC")}
    constants |= {"M": m, "K": k}
    launching.launch(kernels.avgpool_conv1x1_bias_kernel, (tiles, splits), arguments, constants, 4)
    _sum_to(dbias, partial)


launching.define(avgpool_conv1x1_forward)
launching.define(avgpool_conv1x1_backward)
