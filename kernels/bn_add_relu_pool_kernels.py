"""The kernels of bn_add_relu_pool.

    y = relu(weight * (x - mean) * rstd + bias + residual)
    pooled = the means of the 2x2 windows of y, rounded, over the pixels inside the image

One pass computes both if 8 neighbours in memory, which share a byte of the mask, are channels of one pixel (NHWC) or
pixels of one row of the image (NCHW); otherwise the means are computed from y. Memory is as in bn_relu_kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bn_relu_kernels import affine, any_of_group, parameters, passes

SIZES = ["groups", "units", "channels", "height", "width", "pooled_height", "pooled_width", "numel", "pixel"]


@triton.jit
def _relu_of_group(x, residual, y, mask, group, valid, read, m, scale, b):
    """Writes y and the bits of the mask of 8 neighbours; returns the rounded y in the type of the statistics, or 0."""
    index = group * 8 + tl.arange(0, 8)[None, :]
    v = tl.load(x + index, mask=read, other=0.0).to(m.dtype)
    z = affine(v, m, scale, b) + tl.load(residual + index, mask=valid, other=0.0).to(m.dtype)
    rounded = z.to(y.dtype.element_ty)
    through = passes(rounded.to(z.dtype))
    out = tl.where(through, rounded, 0.0)
    tl.store(y + index, out, mask=valid)
    bits = tl.sum(through.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
    tl.store(mask + group, bits[:, None].to(tl.uint8), mask=valid)
    return tl.where(valid, out.to(m.dtype), 0.0)


@triton.jit(do_not_specialize=SIZES)
def bn_apply_pool_kernel(
    x, residual, weight, bias, mean, var, y, mask, pooled, groups, units, channels, height, width, pooled_height,
    pooled_width,
    EPS: tl.constexpr, NHWC: tl.constexpr, SKIP: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """y, the mask and the means. A group: 8 channels of the pixels of a window, or 8 columns of a pair of image rows.

    units: groups of 8 channels of a pixel, or of 8 columns of an image row. SKIP: as in bn_apply_kernel. WIDE: offsets
    are of 64 bits; the number of groups never is.
    """
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]
    valid = group < groups
    unit, at = group % units, group // units
    down = (height + 1) // 2
    if NHWC:
        across = (width + 1) // 2
        column, at = at % across, at // across
        row, plane = at % down, at // down
        if WIDE:
            plane = plane.to(tl.int64)
        channel = unit * 8 + tl.arange(0, 8)[None, :]
        first = ((plane * height + 2 * row) * width + 2 * column) * units + unit
        line = width * units
    else:
        row, plane = at % down, at // down
        channel = plane % channels
        if WIDE:
            plane = plane.to(tl.int64)
        first = (plane * height + 2 * row) * units + unit
        line = units
    m, rstd, w, b = parameters(weight, bias, mean, var, channel, valid, EPS)
    scale = w * rstd
    live = valid
    if SKIP:
        live = any_of_group((w != 0) | (m * 0 != 0) | (rstd * 0 != 0))
    total = tl.zeros((GROUPS, 8), m.dtype)
    for k in range(0, 2):  # a loop at run time: with four pixels at a time the registers do not suffice
        inside, here = valid & (2 * row + k < height), first + k * line
        total += _relu_of_group(x, residual, y, mask, here, inside, inside & live, m, scale, b)
        if NHWC:
            inside &= 2 * column + 1 < width
            total += _relu_of_group(x, residual, y, mask, here + units, inside, inside & live, m, scale, b)
    share = tl.where(2 * row + 1 < height, 0.5, 1.0)
    if NHWC:
        right = 2 * column + 1 < width
        means = total * (share * tl.where(right, 0.5, 1.0))
        to = ((plane * pooled_height + row) * pooled_width + column) * units + unit
        valid &= (row < pooled_height) & (column < pooled_width)
        tl.store(pooled + to * 8 + tl.arange(0, 8)[None, :], means.to(pooled.dtype.element_ty), mask=valid)
    else:
        pairs = tl.sum(tl.reshape(total, (GROUPS, 4, 2)), axis=2)
        means = pairs * (share * 0.5)
        to = (plane * pooled_height + row) * units + unit
        valid &= row < pooled_height
        tl.store(pooled + to * 4 + tl.arange(0, 4)[None, :], means.to(pooled.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=SIZES)
def bn_pool_means_kernel(
    y, pooled, numel, pixel, height, width, pooled_height, pooled_width,
    ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The means alone, from y. pixel: the channels of a pixel (NHWC), or 1; numel: how many means there are."""
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    index = block * BLOCK + tl.arange(0, BLOCK)
    valid = index < numel
    rest, at = index % pixel, index // pixel
    column, at = at % pooled_width, at // pooled_width
    row, plane = at % pooled_height, at // pooled_height
    right, below = 2 * column + 1 < width, 2 * row + 1 < height
    first = ((plane * height + 2 * row) * width + 2 * column) * pixel + rest
    second = first + width * pixel
    total = tl.load(y + first, mask=valid, other=0.0).to(ACC)
    total += tl.load(y + first + pixel, mask=valid & right, other=0.0).to(ACC)
    total += tl.load(y + second, mask=valid & below, other=0.0).to(ACC)
    total += tl.load(y + second + pixel, mask=valid & below & right, other=0.0).to(ACC)
    means = total * (tl.where(right, 0.5, 1.0) * tl.where(below, 0.5, 1.0))
    tl.store(pooled + index, means.to(pooled.dtype.element_ty), mask=valid)
