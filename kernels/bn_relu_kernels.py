"""The kernels of bn_relu and bn_add_relu.

    y = relu(weight * (x - mean) * rstd + bias [+ residual]),  rstd = 1 / sqrt(var + eps)
    m = y > 0 or y is NaN (as torch's relu),  dz = dy * m,  xhat = (x - mean) * rstd
    dbias = sum dz,  dweight = sum dz * xhat,  dresidual = dz
    dx = weight * rstd * (dz - dbias / M - xhat * dweight / M)           M = values per channel

A second gradient dy2 of y is added to dy by the pass that sums, which then writes dz for the pass that makes dx. It has
the shape of x, or that of the 2x2 means of y, whose gradient each pixel of a window gets an equal part of.

Memory is (rows, channels, pixels) for NCHW and (rows, channels) for NHWC, where rows are samples and pixels. `inner` is
the length that is contiguous in one channel's (NCHW) or one pixel's (NHWC) run; it arrives divided by VEC, so that the
compiler knows its divisibility and emits 128-bit accesses without specialising on the shape.
"""

from __future__ import annotations

import triton
import triton.language as tl

# sizes say nothing about alignment (VEC does), so that no shape compiles a kernel again
SIZES = ["rows", "units", "channels", "tiles", "per_split", "numel", "period", "splits", "count"]
SIZES += ["height", "width_units", "pooled_height", "pooled_width"]


@triton.jit
def channel_total(values, NHWC: tl.constexpr):
    """Sum over a tile, per channel: a vector for NHWC, one number for NCHW."""
    if NHWC:
        return tl.sum(values, axis=0)
    else:
        return tl.sum(tl.sum(values, axis=1), axis=0)


@triton.jit
def _corner(tile, block, inner, NHWC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The first row and the first column of a tile."""
    if NHWC:
        return tile * ROWS, block * COLS
    else:
        blocks = (inner + COLS - 1) // COLS
        return (tile // blocks) * ROWS, (tile % blocks) * COLS


@triton.jit
def place(
    tile, block, rows, units, channels,
    NHWC: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Offsets, validity and number of valid values per channel of one tile."""
    inner = units * VEC
    if WIDE:
        tile = tl.cast(tile, tl.int64)
        inner = tl.cast(units, tl.int64) * VEC
        block = block.to(tl.int64)
    first_row, first_col = _corner(tile, block, inner, NHWC, ROWS, COLS)
    row = first_row + tl.arange(0, ROWS)[:, None]
    col = first_col + tl.arange(0, COLS)[None, :]
    inside = tl.minimum(rows - first_row, ROWS)
    if NHWC:
        start = row * inner
    else:
        start = row * (inner * channels) + block * inner
        inside *= tl.minimum(inner - first_col, COLS)
    return start + col, (row < rows) & (col < inner), inside


@triton.jit
def gradient_of_y(
    dy, dy2, offset, valid, tile, block, rows, units, channels, height, width_units, pooled_height, pooled_width,
    NHWC: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr,
    SPREAD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of dy [+ dy2, the sum rounded to the type of dy].

    SPREAD: 0 if dy2 has the shape of x. Else it has that of the 2x2 means, and SPREAD divides the width of x.
    """
    g = tl.load(dy + offset, mask=valid, other=0.0).to(ACC)
    if dy2 is not None:
        if SPREAD == 0:
            second = tl.load(dy2 + offset, mask=valid, other=0.0).to(ACC)
        else:
            second = _spread(
                dy2, valid, tile, block, rows, units, channels, height, width_units, pooled_height, pooled_width,
                NHWC, VEC, ROWS, COLS, WIDE, SPREAD, ACC,
            )  # fmt: skip
        g = (g + second).to(dy.dtype.element_ty).to(ACC)
    return g


@triton.jit
def _spread(
    dy2, valid, tile, block, rows, units, channels, height, width_units, pooled_height, pooled_width,
    NHWC: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr,
    SPREAD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """For each pixel of a tile, its window's value divided by the window's pixels inside the image; 0 if it has none.

    NCHW: if the width is even, pixels are read as pairs, whose windows are neighbours in memory.
    """
    width = width_units * SPREAD
    if WIDE:
        tile, units, block = tl.cast(tile, tl.int64), tl.cast(units, tl.int64), block.to(tl.int64)
    PAIRS: tl.constexpr = not NHWC and SPREAD > 1
    WIDTH: tl.constexpr = COLS // 2 if PAIRS else COLS
    inner = units * (VEC // 2 if PAIRS else VEC)
    first_row, first_col = _corner(tile, block, inner, NHWC, ROWS, WIDTH)
    row = first_row + tl.arange(0, ROWS)[:, None]
    col = first_col + tl.arange(0, WIDTH)[None, :]
    if NHWC:
        plane, i, j = row // (height * width), row // width % height // 2, row % width // 2
        valid &= j < pooled_width
    elif PAIRS:
        pooled_width = width_units * (SPREAD // 2)
        plane, i, j = row * channels + block, col // pooled_width // 2, col % pooled_width
        valid = (row < rows) & (col < inner)
    else:
        plane, i, j = row * channels + block, col // width // 2, col % width // 2
        valid &= j < pooled_width
    at = (plane * pooled_height + i) * pooled_width + j
    if NHWC:
        at = at * inner + col
    # 1 / the pixels of the window
    share = tl.where(2 * i + 1 < height, 0.5, 1.0) * tl.where(2 * j + 1 < width, 0.5, 1.0)
    values = tl.load(dy2 + at, mask=valid & (i < pooled_height), other=0.0).to(ACC) * share
    if PAIRS:
        values = tl.reshape(tl.join(values, values), (ROWS, COLS))
    return values


@triton.jit
def mask_bits(
    mask, offset, valid, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """The saved ReLU mask at `offset`: bit i of byte j is element 8j + i; one byte serves 8 aligned columns."""
    if VEC == 8 and COLS >= 8:
        eight = tl.arange(0, 8)[None, None, :]
        at = tl.max(tl.reshape(tl.where(valid, offset, -1), (ROWS, COLS // 8, 8)), axis=2)
        byte = tl.load(mask + at // 8, mask=at >= 0, other=0).to(tl.int32)
        return tl.reshape((byte[:, :, None] >> eight) & 1, (ROWS, COLS)) != 0
    else:
        byte = tl.load(mask + offset // 8, mask=valid, other=0).to(tl.int32)
        return ((byte >> (offset % 8).to(tl.int32)) & 1) != 0


@triton.jit
def mean_and_rstd(mean, var, channel, valid, EPS: tl.constexpr):
    m = tl.load(mean + channel, mask=valid, other=0.0)
    return m, tl.rsqrt(tl.load(var + channel, mask=valid, other=1.0) + EPS)


@triton.jit
def parameters(weight, bias, mean, var, channel, valid, EPS: tl.constexpr):
    """mean, rstd, weight and bias of the channels, in the type of the statistics."""
    m, rstd = mean_and_rstd(mean, var, channel, valid, EPS)
    w = tl.full(m.shape, 1.0, m.dtype)
    b = tl.full(m.shape, 0.0, m.dtype)
    if weight is not None:
        w = tl.load(weight + channel, mask=valid, other=0.0).to(m.dtype)
    if bias is not None:
        b = tl.load(bias + channel, mask=valid, other=0.0).to(m.dtype)
    return m, rstd, w, b


@triton.jit
def affine(v, m, scale, b):
    """(v - m) * scale + b with one rounding of product and sum: forward and backward must round identically."""
    d = v - m
    d, scale = tl.broadcast(d, scale)
    d, b = tl.broadcast(d, b)
    return tl.fma(d, scale, b)


@triton.jit
def passes(z):
    return (z > 0) | (z != z)


@triton.jit(do_not_specialize=SIZES)
def bn_stats_kernel(
    x, mean, m2, counts, rows, units, channels, tiles, per_split,
    NHWC: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Mean, sum of squared distances to it and count of one split's values; tiles merge by Chan's formula."""
    block, split = tl.program_id(0), tl.program_id(1)
    width: tl.constexpr = COLS if NHWC else 1
    channel = block * width + tl.arange(0, width)
    average = tl.zeros((width,), mean.dtype.element_ty)
    squares = tl.zeros((width,), mean.dtype.element_ty)
    n = tl.zeros((width,), mean.dtype.element_ty)
    for tile in range(split * per_split, tl.minimum(tiles, (split + 1) * per_split)):
        offset, valid, inside = place(tile, block, rows, units, channels, NHWC, VEC, ROWS, COLS, WIDE)
        v = tl.load(x + offset, mask=valid, other=0.0).to(mean.dtype.element_ty)
        k = inside.to(mean.dtype.element_ty)
        here = channel_total(v, NHWC) / k
        away = tl.where(valid, v - here, 0.0)
        # the sum of large values rounds; that of their distances gives what it lost
        correction = channel_total(away, NHWC) / k
        here += correction
        m2_here = tl.maximum(channel_total(away * away, NHWC) - correction * correction * k, 0.0, tl.PropagateNan.ALL)
        total = n + k
        delta = here - average
        squares += m2_here + delta * delta * (n * k / total)
        average += delta * (k / total)
        n = total
    inside_c = channel < channels
    at = split * channels + channel
    tl.store(mean + at, average, mask=inside_c)
    tl.store(m2 + at, squares, mask=inside_c)
    tl.store(counts + at, n, mask=inside_c)


@triton.jit(do_not_specialize=SIZES)
def bn_merge_kernel(means, m2s, counts, mean, var, channels, splits, BLOCK: tl.constexpr):
    """mean and biased var from the splits, merged in order by Chan's formula."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = channel < channels
    average = tl.zeros((BLOCK,), mean.dtype.element_ty)
    squares = tl.zeros((BLOCK,), mean.dtype.element_ty)
    n = tl.zeros((BLOCK,), mean.dtype.element_ty)
    for split in range(0, splits):
        at = split * channels + channel
        k = tl.load(counts + at, mask=valid, other=1.0)
        delta = tl.load(means + at, mask=valid, other=0.0) - average
        total = n + k
        squares += tl.load(m2s + at, mask=valid, other=0.0) + delta * delta * (n * k / total)
        average += delta * (k / total)
        n = total
    tl.store(mean + channel, average, mask=valid)
    tl.store(var + channel, squares / n, mask=valid)


@triton.jit(do_not_specialize=SIZES)
def bn_apply_kernel(
    x, residual, weight, bias, mean, var, y, mask, numel, units, channels, period,
    EPS: tl.constexpr, NHWC: tl.constexpr, VEC: tl.constexpr, FULL: tl.constexpr, SKIP: tl.constexpr,
    WIDE: tl.constexpr, GROUPS: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    """y, and with a residual the bit mask; flat over memory, 8 elements (one mask byte) per group.

    SKIP: if weight is 0 and the statistics (and so all x) are finite, x is not read: its term is exactly 0.
    """
    first = first_tile(period, LOOPS)
    group, index, valid = groups_of(first, numel, FULL, WIDE, GROUPS)
    m, rstd, w, b = parameters(
        weight, bias, mean, var, channel_of(group, index, units, channels, NHWC, VEC), valid, EPS
    )  # fmt: skip
    if SKIP:
        live = any_of_group((w != 0) | (m * 0 != 0) | (rstd * 0 != 0))
    scale = w * rstd
    for loop in range(0, LOOPS):
        group, index, valid = groups_of(first + loop * period, numel, FULL, WIDE, GROUPS)
        read = (valid & live) if SKIP else valid
        v = tl.load(x + index, mask=read, other=0.0).to(m.dtype)
        z = affine(v, m, scale, b)
        if residual is not None:
            z += tl.load(residual + index, mask=valid, other=0.0).to(m.dtype)
        store_relu(z, y, mask, group, index, valid, numel)


@triton.jit
def store_relu(z, y, mask, group, index, valid, numel):
    """Writes y, z rounded to the type of y where that passes the ReLU, and the bits of the mask if there is one."""
    rounded = z.to(y.dtype.element_ty)
    through = passes(rounded.to(z.dtype))
    tl.store(y + index, tl.where(through, rounded, 0.0), mask=valid)
    if mask is not None:
        bits = tl.sum((through & valid).to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
        tl.store(mask + group, bits[:, None].to(tl.uint8), mask=group * 8 < numel)


@triton.jit
def any_of_group(flags):
    """Whether any of a group's 8 flags is set, for all 8: one mask per group keeps its load 16 bytes wide."""
    return tl.max(flags.to(tl.int32), axis=1)[:, None] != 0


@triton.jit
def groups_of(tile, numel, FULL: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr):
    """Group, element index and validity of a tile's elements, 8 in a group."""
    if WIDE:
        tile = tile.to(tl.int64)
    group = tile * GROUPS + tl.arange(0, GROUPS)[:, None]
    index = group * 8 + tl.arange(0, 8)[None, :]
    return group, index, (group * 8 < numel) if FULL else (index < numel)


@triton.jit
def channel_of(group, index, units, channels, NHWC: tl.constexpr, VEC: tl.constexpr):
    if VEC == 8:
        if NHWC:
            return (group % units) * 8 + tl.arange(0, 8)[None, :]
        else:
            return (group // units) % channels
    else:
        if NHWC:
            return index % channels
        else:
            return (index // (units * VEC)) % channels


@triton.jit
def first_tile(period, LOOPS: tl.constexpr):
    """The tiles of a program: LOOPS of them, `period` tiles apart so that they have the same channels."""
    return tl.program_id(0) // period * (period * LOOPS) + tl.program_id(0) % period


@triton.jit(do_not_specialize=SIZES)
def bn_backward_reduce_kernel(
    dy, dy2, x, mask, weight, bias, mean, var, dz, dweight, dbias, rows, units, channels, tiles, per_split,
    height, width_units, pooled_height, pooled_width,
    EPS: tl.constexpr, NHWC: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    WIDE: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """One split's sum dz and sum dz * xhat; and dz, if there is a dy2."""
    block, split = tl.program_id(0), tl.program_id(1)
    width: tl.constexpr = COLS if NHWC else 1
    channel = block * width + tl.arange(0, width)
    m, rstd, w, b = parameters(weight, bias, mean, var, channel, channel < channels, EPS)
    # one sum per element of the tile: threads synchronise once, after the last tile
    sum_dz = tl.zeros((ROWS, COLS), m.dtype)
    sum_dz_xhat = tl.zeros((ROWS, COLS), m.dtype)
    for tile in range(split * per_split, tl.minimum(tiles, (split + 1) * per_split)):
        offset, valid, _ = place(tile, block, rows, units, channels, NHWC, VEC, ROWS, COLS, WIDE)
        v = tl.load(x + offset, mask=valid, other=0.0).to(m.dtype)
        g = gradient_of_y(
            dy, dy2, offset, valid, tile, block, rows, units, channels, height, width_units, pooled_height,
            pooled_width, NHWC, VEC, ROWS, COLS, WIDE, SPREAD, m.dtype,
        )  # fmt: skip
        if mask is not None:
            through = mask_bits(mask, offset, valid, VEC, ROWS, COLS)
        else:
            z = affine(v, m[None, :], (w * rstd)[None, :], b[None, :])
            through = passes(z.to(x.dtype.element_ty).to(m.dtype))
        g = tl.where(through & valid, g, 0.0)
        if dz is not None:
            tl.store(dz + offset, g.to(dz.dtype.element_ty), mask=valid)
        sum_dz += g
        # the distance is masked too: 0 * (NaN or Inf of a padded element) must not enter
        sum_dz_xhat += g * tl.where(valid, v - m[None, :], 0.0)
    at = split * channels + channel
    tl.store(dbias + at, channel_total(sum_dz, NHWC), mask=channel < channels)
    tl.store(dweight + at, channel_total(sum_dz_xhat, NHWC) * rstd, mask=channel < channels)


@triton.jit(do_not_specialize=SIZES)
def bn_sum_kernel(parts, dweight, dbias, dresidual_weight, channels, splits, BLOCK: tl.constexpr):
    """The splits' sums, added in order: those of dweight, then of dbias, then of dresidual_weight, if there is one."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = channel < channels
    second, third = splits * channels, 2 * splits * channels
    of_weight = tl.zeros((BLOCK,), dweight.dtype.element_ty)
    of_bias = tl.zeros((BLOCK,), dweight.dtype.element_ty)
    of_residual = tl.zeros((BLOCK,), dweight.dtype.element_ty)
    for split in range(0, splits):
        at = split * channels + channel
        of_weight += tl.load(parts + at, mask=valid, other=0.0)
        of_bias += tl.load(parts + second + at, mask=valid, other=0.0)
        if dresidual_weight is not None:
            of_residual += tl.load(parts + third + at, mask=valid, other=0.0)
    tl.store(dweight + channel, of_weight, mask=valid)
    tl.store(dbias + channel, of_bias, mask=valid)
    if dresidual_weight is not None:
        tl.store(dresidual_weight + channel, of_residual, mask=valid)


@triton.jit(do_not_specialize=SIZES)
def bn_backward_apply_kernel(
    dy, x, mask, weight, bias, mean, var, dweight, dbias, dx, dresidual, numel, units, channels, period, count,
    EPS: tl.constexpr, NHWC: tl.constexpr, VEC: tl.constexpr, FULL: tl.constexpr, BATCH: tl.constexpr,
    DZ: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    """dx and, if requested, dresidual. BATCH: the statistics depend on x. DZ: what is given as dy is dz.

    If weight is 0 and the sums and statistics are finite, dx is exactly 0 and neither x nor (for dx) dy is read.
    """
    first = first_tile(period, LOOPS)
    group, index, valid = groups_of(first, numel, FULL, WIDE, GROUPS)
    channel = channel_of(group, index, units, channels, NHWC, VEC)
    m, rstd, w, b = parameters(weight, bias, mean, var, channel, valid, EPS)
    dw = tl.load(dweight + channel, mask=valid, other=0.0)
    db = tl.load(dbias + channel, mask=valid, other=0.0)
    live = is_live(w, m, rstd, dw, db)
    scale = w * rstd
    slope, shift = slope_and_shift(rstd, dw, db, count, BATCH)
    for loop in range(0, LOOPS):
        group, index, valid = groups_of(first + loop * period, numel, FULL, WIDE, GROUPS)
        read = valid & live
        v = tl.load(x + index, mask=read, other=0.0).to(m.dtype)
        g = tl.load(dy + index, mask=read if dresidual is None else valid, other=0.0).to(m.dtype)
        if not DZ:
            if mask is not None:
                through = bits_of_group(mask, group, numel)
            else:
                through = passes(affine(v, m, scale, b).to(x.dtype.element_ty).to(m.dtype))
            g = tl.where(through, g, 0.0)
        if dresidual is not None:
            tl.store(dresidual + index, g.to(dresidual.dtype.element_ty), mask=valid)
        d = gradient_of_input(g, v, m, scale, slope, shift, BATCH)
        tl.store(dx + index, d.to(dx.dtype.element_ty), mask=valid)


@triton.jit
def bits_of_group(mask, group, numel):
    """The saved ReLU mask of a flat pass: one byte for the 8 elements of a group."""
    byte = tl.load(mask + group, mask=group * 8 < numel, other=0).to(tl.int32)
    return ((byte >> tl.arange(0, 8)[None, :]) & 1) != 0


@triton.jit
def is_live(w, m, rstd, dweight, dbias):
    """Whether dx may differ from 0: weight does, or a sum or statistic is not finite."""
    return any_of_group((w != 0) | (dweight * 0 != 0) | (dbias * 0 != 0) | (m * 0 != 0) | (rstd * 0 != 0))


@triton.jit
def slope_and_shift(rstd, dweight, dbias, count, BATCH: tl.constexpr):
    """Factors of gradient_of_input; without BATCH they are not used."""
    if BATCH:
        k = count.to(rstd.dtype)
        return rstd * (dweight / k), dbias / k
    else:
        return dweight, dbias


@triton.jit
def gradient_of_input(dz, v, m, scale, slope, shift, BATCH: tl.constexpr):
    """dx. scale: weight * rstd; BATCH: the statistics depend on x."""
    if BATCH:
        return scale * (dz - shift - (v - m) * slope)
    else:
        return scale * dz


@triton.jit(do_not_specialize=["channels", "move", "move_rest", "bessel", "bessel_rest"])
def bn_update_stats_kernel(
    running_mean, running_var, mean, var, count, batches, channels, mean_stride, var_stride, move, move_rest, bessel,
    bessel_rest, CUMULATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """running = (1 - move) * running + move * batch, var times bessel; CUMULATIVE: move is 1 / the number of batches.

    A single program, so that the number of batches changes only after every thread has read it. Doubles are passed as a
    float and its rest. Without `count`, a number on the device, bessel is given.
    """
    number = mean.dtype.element_ty
    step = tl.cast(move, number) + tl.cast(move_rest, number)
    unbiased = tl.cast(bessel, number) + tl.cast(bessel_rest, number)
    if batches is not None:
        after = tl.load(batches) + 1
        if CUMULATIVE:
            step = (1.0 / after.to(tl.float64)).to(number)
        tl.debug_barrier()
        tl.store(batches, after)
    last = channels
    if count is not None:
        values = tl.load(count)
        last = channels * (values > 0).to(tl.int32)
        unbiased = (values / tl.maximum(values - 1, 1.0)).to(number)
    for first in range(0, channels, BLOCK):
        channel = first + tl.arange(0, BLOCK)
        valid = channel < last
        m = tl.load(mean + channel, mask=valid, other=0.0)
        v = tl.load(var + channel, mask=valid, other=0.0) * unbiased
        mean_at, var_at = running_mean + channel * mean_stride, running_var + channel * var_stride
        old_mean = tl.load(mean_at, mask=valid, other=0.0).to(m.dtype)
        old_var = tl.load(var_at, mask=valid, other=0.0).to(m.dtype)
        new_mean = (1 - step) * old_mean + step * m
        new_var = (1 - step) * old_var + step * v
        tl.store(mean_at, new_mean.to(running_mean.dtype.element_ty), mask=valid)
        tl.store(var_at, new_var.to(running_var.dtype.element_ty), mask=valid)
