"""The kernels of bn_add_bn_relu.

    z = (x - mean) * weight * rstd + bias + (r - r_mean) * r_weight * r_rstd + r_bias       r is the residual
    y = relu(z);  m = y > 0 or y is NaN,  dz = (dy [+ dy2]) * m
    dbias = sum dz, of both;  dweight = sum dz * xhat,  dr_weight = sum dz * rhat
    dx = weight * rstd * (dz - dbias / M - xhat * dweight / M);  dr in the same way

Memory, tiles and a second gradient are those of bn_relu_kernels.py, and so is what sums the parts of the reductions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bn_relu_kernels import (
    SIZES,
    affine,
    any_of_group,
    bits_of_group,
    channel_of,
    channel_total,
    first_tile,
    gradient_of_input,
    gradient_of_y,
    groups_of,
    is_live,
    mask_bits,
    mean_and_rstd,
    parameters,
    place,
    slope_and_shift,
    store_relu,
)


@triton.jit(do_not_specialize=SIZES)
def bn_add_bn_apply_kernel(
    x, residual, weight, bias, mean, var, residual_weight, residual_bias, residual_mean, residual_var, y, mask,
    numel, units, channels, period,
    EPS: tl.constexpr, RESIDUAL_EPS: tl.constexpr, NHWC: tl.constexpr, VEC: tl.constexpr, FULL: tl.constexpr,
    SKIP: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    """y and the bit mask; flat over memory, 8 elements (one mask byte) per group.

    SKIP: if weight is 0 and the statistics of x (and so all x) are finite, x is not read: its term is exactly 0.
    """
    first = first_tile(period, LOOPS)
    group, index, valid = groups_of(first, numel, FULL, WIDE, GROUPS)
    channel = channel_of(group, index, units, channels, NHWC, VEC)
    m, rstd, w, b = parameters(weight, bias, mean, var, channel, valid, EPS)
    r_m, r_rstd, r_w, r_b = parameters(
        residual_weight, residual_bias, residual_mean, residual_var, channel, valid, RESIDUAL_EPS
    )  # fmt: skip
    if SKIP:
        live = any_of_group((w != 0) | (m * 0 != 0) | (rstd * 0 != 0))
    scale, r_scale = w * rstd, r_w * r_rstd
    b += r_b
    for loop in range(0, LOOPS):
        group, index, valid = groups_of(first + loop * period, numel, FULL, WIDE, GROUPS)
        read = (valid & live) if SKIP else valid
        v = tl.load(x + index, mask=read, other=0.0).to(m.dtype)
        r = tl.load(residual + index, mask=valid, other=0.0).to(m.dtype)
        z = affine(r, r_m, r_scale, affine(v, m, scale, b))
        store_relu(z, y, mask, group, index, valid, numel)


@triton.jit(do_not_specialize=SIZES)
def bn_add_bn_backward_reduce_kernel(
    dy, dy2, x, residual, mask, mean, var, residual_mean, residual_var, dz, dweight, dbias, dresidual_weight,
    rows, units, channels, tiles, per_split, height, width_units, pooled_height, pooled_width,
    EPS: tl.constexpr, RESIDUAL_EPS: tl.constexpr, NHWC: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, WIDE: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """One split's sum dz, sum dz * xhat and sum dz * rhat; and dz, if there is a dy2."""
    block, split = tl.program_id(0), tl.program_id(1)
    width: tl.constexpr = COLS if NHWC else 1
    channel = block * width + tl.arange(0, width)
    inside = channel < channels
    m, rstd = mean_and_rstd(mean, var, channel, inside, EPS)
    r_m, r_rstd = mean_and_rstd(residual_mean, residual_var, channel, inside, RESIDUAL_EPS)
    sum_dz = tl.zeros((ROWS, COLS), m.dtype)
    sum_dz_xhat = tl.zeros((ROWS, COLS), m.dtype)
    sum_dz_rhat = tl.zeros((ROWS, COLS), m.dtype)
    for tile in range(split * per_split, tl.minimum(tiles, (split + 1) * per_split)):
        offset, valid, _ = place(tile, block, rows, units, channels, NHWC, VEC, ROWS, COLS, WIDE)
        v = tl.load(x + offset, mask=valid, other=0.0).to(m.dtype)
        r = tl.load(residual + offset, mask=valid, other=0.0).to(m.dtype)
        g = gradient_of_y(
            dy, dy2, offset, valid, tile, block, rows, units, channels, height, width_units, pooled_height,
            pooled_width, NHWC, VEC, ROWS, COLS, WIDE, SPREAD, m.dtype,
        )  # fmt: skip
        g = tl.where(mask_bits(mask, offset, valid, VEC, ROWS, COLS) & valid, g, 0.0)
        if dz is not None:
            tl.store(dz + offset, g.to(dz.dtype.element_ty), mask=valid)
        sum_dz += g
        # the distances are masked too: 0 * (NaN or Inf of a padded element) must not enter
        sum_dz_xhat += g * tl.where(valid, v - m[None, :], 0.0)
        sum_dz_rhat += g * tl.where(valid, r - r_m[None, :], 0.0)
    at = split * channels + channel
    tl.store(dbias + at, channel_total(sum_dz, NHWC), mask=inside)
    tl.store(dweight + at, channel_total(sum_dz_xhat, NHWC) * rstd, mask=inside)
    tl.store(dresidual_weight + at, channel_total(sum_dz_rhat, NHWC) * r_rstd, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def bn_add_bn_backward_apply_kernel(
    dy, x, residual, mask, weight, mean, var, residual_weight, residual_mean, residual_var, dweight, dbias,
    dresidual_weight, dx, dresidual, numel, units, channels, period, count,
    EPS: tl.constexpr, RESIDUAL_EPS: tl.constexpr, NHWC: tl.constexpr, VEC: tl.constexpr, FULL: tl.constexpr,
    BATCH: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    """dx and dresidual. BATCH: the statistics depend on x and the residual. Without a mask, what is given as dy is dz.

    If weight is 0 and the sums and statistics are finite, dx is exactly 0 and x is not read; so the residual.
    """
    first = first_tile(period, LOOPS)
    group, index, valid = groups_of(first, numel, FULL, WIDE, GROUPS)
    channel = channel_of(group, index, units, channels, NHWC, VEC)
    m, rstd, w, _ = parameters(weight, None, mean, var, channel, valid, EPS)
    r_m, r_rstd, r_w, _ = parameters(
        residual_weight, None, residual_mean, residual_var, channel, valid, RESIDUAL_EPS
    )  # fmt: skip
    db = tl.load(dbias + channel, mask=valid, other=0.0)
    dw = tl.load(dweight + channel, mask=valid, other=0.0)
    r_dw = tl.load(dresidual_weight + channel, mask=valid, other=0.0)
    live = is_live(w, m, rstd, dw, db)
    r_live = is_live(r_w, r_m, r_rstd, r_dw, db)
    slope, shift = slope_and_shift(rstd, dw, db, count, BATCH)
    r_slope, _ = slope_and_shift(r_rstd, r_dw, db, count, BATCH)
    scale, r_scale = w * rstd, r_w * r_rstd
    for loop in range(0, LOOPS):
        group, index, valid = groups_of(first + loop * period, numel, FULL, WIDE, GROUPS)
        g = tl.load(dy + index, mask=valid & (live | r_live), other=0.0).to(m.dtype)
        if mask is not None:
            g = tl.where(bits_of_group(mask, group, numel), g, 0.0)
        v = tl.load(x + index, mask=valid & live, other=0.0).to(m.dtype)
        r = tl.load(residual + index, mask=valid & r_live, other=0.0).to(m.dtype)
        d = gradient_of_input(g, v, m, scale, slope, shift, BATCH)
        r_d = gradient_of_input(g, r, r_m, r_scale, r_slope, shift, BATCH)
        tl.store(dx + index, d.to(dx.dtype.element_ty), mask=valid)
        tl.store(dresidual + index, r_d.to(dresidual.dtype.element_ty), mask=valid)
