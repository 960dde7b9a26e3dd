"""The kernels of avgpool_conv1x1: three products over the output's pixels q = (n, i, j), with p the pooled x.

    p[q][c] = mean of the pixels of x's window that lie inside the image           (stride 1: x itself)
    y[q][o] = sum over c of p[q][c] * W[o][c] + bias[o]
    dp[q][c] = sum over o of dy[q][o] * W[o][c];  dx = dp / count at every pixel of the window
    dW[o][c] = sum over q of dy[q][o] * p[q][c];  dbias[o] = sum over q of dy[q][o]

p exists in registers only, and enters the tensor cores in the 16 bits of x. Tiles lie as memory does: (q, channels) for
NHWC, (channels, q) for NCHW. Of NCHW a tile of x is loaded by its columns e = STRIDE * q + s, which are neighbours in
memory, and pairs of them are summed afterwards.

Sizes arrive divided by what they are multiples of (CV: C, OV: Cout, XV: W, YV: Ho * Wo), so that the compiler knows it
and emits wide accesses without specialising on the shape.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import version

# tl.dot of Triton 3.4 does not support float64
DOUBLE_DOT = tl.constexpr(version() >= (3, 5))

_SIZES = ["images", "c_units", "o_units", "h", "w_units", "ho", "wo", "plane_units", "steps", "splits", "numel"]


@triton.jit
def _range(first, SIZE: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        first = first.to(tl.int64)
    return first + tl.arange(0, SIZE)


@triton.jit
def _windows(
    first_q, first_c, images, channels, h, w, ho, wo,
    NHWC: tl.constexpr, STRIDE: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr, Q: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A tile of x from pixel first_q of the output and channel first_c on: what _pixel makes offsets of.

    (offsets of the windows' corners, and of the channels from them; validity; row and column of the corners; values
    between the columns of a window). NCHW: every column has its own entry, and one is between it and the next.
    """
    c = first_c + tl.arange(0, C)
    if NHWC:
        q = _range(first_q, Q, WIDE)
        plane = ho * wo
        n, i, column = q // plane, q % plane // wo, q % wo * STRIDE
        corner = ((n * h + i * STRIDE) * w + column) * channels
        inside = (q < images * plane)[:, None] & (c < channels)[None, :]
        return corner[:, None], c[None, :], inside, (i * STRIDE)[:, None], column[:, None], channels
    else:
        # all columns of x are windows' where windows are full; then W is their span, and known to be a multiple of XV
        span = w if FULL else wo * STRIDE
        e = _range(first_q * STRIDE, Q * STRIDE, WIDE)
        n, i, column = e // (ho * span), e // span % ho, e % span
        corner = (n * channels * h + i * STRIDE) * w + column
        inside = (e < images * (ho * span))[None, :] & (c < channels)[:, None]
        start = c * (h * w) if not WIDE else c.to(tl.int64) * h * w
        return corner[None, :], start[:, None], inside, (i * STRIDE)[None, :], column[None, :], 1


@triton.jit
def _pixel(corner, across, inside, row, column, apart, h, w, r, s, FULL: tl.constexpr):
    """Offsets and validity of the pixels in row r and column s of the windows."""
    valid = inside
    if not FULL:
        valid &= (row + r < h) & (column + s < w)
    return corner + (r * w + s) * apart + across, valid


@triton.jit
def _pooled(
    x, first_q, first_c, images, c_units, h, w_units, ho, wo,
    NHWC: tl.constexpr, STRIDE: tl.constexpr, FULL: tl.constexpr, CV: tl.constexpr, XV: tl.constexpr,
    WIDE: tl.constexpr, Q: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of p from pixel first_q and channel first_c on, zero outside. FULL: all windows lie inside the image."""
    w = w_units * XV
    corner, across, inside, row, column, apart = _windows(
        first_q, first_c, images, c_units * CV, h, w, ho, wo, NHWC, STRIDE, FULL, WIDE, Q, C
    )  # fmt: skip
    total = tl.zeros(inside.shape, ACC)
    for r in tl.static_range(STRIDE):
        for s in tl.static_range(STRIDE if NHWC else 1):
            offset, valid = _pixel(corner, across, inside, row, column, apart, h, w, r, s, FULL)
            total += tl.load(x + offset, mask=valid, other=0.0).to(ACC)
    if not NHWC:
        total = tl.sum(tl.reshape(total, (C, Q, STRIDE)), axis=2)
    scale = _one_by_count(first_q, h, w, ho, wo, NHWC, STRIDE, FULL, WIDE, Q, ACC)
    return (total * scale).to(x.dtype.element_ty)


@triton.jit
def _one_by_count(
    first_q, h, w, ho, wo,
    NHWC: tl.constexpr, STRIDE: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr, Q: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """1 / the pixels of a window that lie inside the image, 1, 1/2 or 1/4, along the pixels of a tile."""
    if FULL:
        scale = tl.full((Q,), 1.0 / (STRIDE * STRIDE), ACC)
    else:
        q = _range(first_q, Q, WIDE)
        rows = tl.minimum(h - q % (ho * wo) // wo * STRIDE, STRIDE)
        columns = tl.minimum(w - q % wo * STRIDE, STRIDE)
        scale = 1.0 / (rows * columns).to(ACC)
    return scale[:, None] if NHWC else scale[None, :]


@triton.jit
def _outputs(
    first_q, first_o, images, channels, plane_units,
    NHWC: tl.constexpr, YV: tl.constexpr, WIDE: tl.constexpr, Q: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Offsets and validity of a tile of y or dy."""
    o, q = first_o + tl.arange(0, N), _range(first_q, Q, WIDE)
    plane = plane_units * YV
    if NHWC:
        return q[:, None] * channels + o[None, :], (q < images * plane)[:, None] & (o < channels)[None, :]
    else:
        start = q // plane * channels * plane + q % plane
        down = o * plane if not WIDE else o.to(tl.int64) * plane
        return down[:, None] + start[None, :], (o < channels)[:, None] & (q < images * plane)[None, :]


@triton.jit
def _weights(w, first_o, first_c, outputs, channels, N: tl.constexpr, C: tl.constexpr):
    """A tile (o, c) of W, zero outside."""
    o, c = first_o + tl.arange(0, N)[:, None], first_c + tl.arange(0, C)[None, :]
    return tl.load(w + o * channels + c, mask=(o < outputs) & (c < channels), other=0.0)


@triton.jit
def _product(a, b, sums, ACC: tl.constexpr):
    """sums + a b, without TF32."""
    if ACC.primitive_bitwidth == 64 and not DOUBLE_DOT:
        return sums + tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    else:
        return tl.dot(a, b, sums, input_precision="ieee", out_dtype=ACC)


@triton.jit(do_not_specialize=_SIZES)
def avgpool_conv1x1_forward_kernel(
    x, weight, bias, y, images, c_units, o_units, h, w_units, ho, wo, plane_units,
    NHWC: tl.constexpr, STRIDE: tl.constexpr, FULL: tl.constexpr, CV: tl.constexpr, OV: tl.constexpr,
    XV: tl.constexpr, YV: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A tile of y of Q pixels and N channels; neighbouring programs share pixels, and with them x in the L2 cache."""
    channels, outputs = c_units * CV, o_units * OV
    tiles = (outputs + N - 1) // N
    first_q, first_o = tl.program_id(0) // tiles * Q, tl.program_id(0) % tiles * N
    sums = tl.zeros((Q, N) if NHWC else (N, Q), ACC)
    if bias is not None:
        o = first_o + tl.arange(0, N)
        start = tl.load(bias + o, mask=o < outputs, other=0.0).to(ACC)
        sums += start[None, :] if NHWC else start[:, None]
    for first_c in range(0, channels, K):
        p = _pooled(
            x, first_q, first_c, images, c_units, h, w_units, ho, wo, NHWC, STRIDE, FULL, CV, XV, WIDE, Q, K, ACC
        )  # fmt: skip
        w = _weights(weight, first_o, first_c, outputs, channels, N, K)
        if NHWC:
            sums = _product(p, tl.trans(w), sums, ACC)
        else:
            sums = _product(w, p, sums, ACC)
    offset, valid = _outputs(first_q, first_o, images, outputs, plane_units, NHWC, YV, WIDE, Q, N)
    tl.store(y + offset, sums.to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=_SIZES)
def avgpool_conv1x1_input_kernel(
    dy, weight, dx, images, c_units, o_units, h, w_units, ho, wo, plane_units,
    NHWC: tl.constexpr, STRIDE: tl.constexpr, FULL: tl.constexpr, CV: tl.constexpr, OV: tl.constexpr,
    XV: tl.constexpr, YV: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A tile of dp of Q pixels and N channels, to every pixel of the windows; others are zero before."""
    channels, outputs, w_size = c_units * CV, o_units * OV, w_units * XV
    tiles = (channels + N - 1) // N
    first_q, first_c = tl.program_id(0) // tiles * Q, tl.program_id(0) % tiles * N
    sums = tl.zeros((Q, N) if NHWC else (N, Q), ACC)
    for first_o in range(0, outputs, K):
        offset, valid = _outputs(first_q, first_o, images, outputs, plane_units, NHWC, YV, WIDE, Q, K)
        g = tl.load(dy + offset, mask=valid, other=0.0)
        w = _weights(weight, first_o, first_c, outputs, channels, K, N)
        if NHWC:
            sums = _product(g, w, sums, ACC)
        else:
            sums = _product(tl.trans(w), g, sums, ACC)

    scale = _one_by_count(first_q, h, w_size, ho, wo, NHWC, STRIDE, FULL, WIDE, Q, ACC)
    values = (sums * scale).to(dx.dtype.element_ty)
    if not NHWC and STRIDE == 2:
        values = tl.reshape(tl.join(values, values), (N, Q * 2))
    corner, across, inside, row, column, apart = _windows(
        first_q, first_c, images, channels, h, w_size, ho, wo, NHWC, STRIDE, FULL, WIDE, Q, N
    )  # fmt: skip
    for r in tl.static_range(STRIDE):
        for s in tl.static_range(STRIDE if NHWC else 1):
            offset, valid = _pixel(corner, across, inside, row, column, apart, h, w_size, r, s, FULL)
            tl.store(dx + offset, values, mask=valid)


@triton.jit(do_not_specialize=_SIZES)
def avgpool_conv1x1_weight_kernel(
    dy, x, partial, images, c_units, o_units, h, w_units, ho, wo, plane_units, steps,
    NHWC: tl.constexpr, STRIDE: tl.constexpr, FULL: tl.constexpr, CV: tl.constexpr, OV: tl.constexpr,
    XV: tl.constexpr, YV: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One split's tile of dW of M output and N input channels."""
    channels, outputs = c_units * CV, o_units * OV
    tiles = (channels + N - 1) // N
    first_o, first_c, split = tl.program_id(0) // tiles * M, tl.program_id(0) % tiles * N, tl.program_id(1)
    sums = tl.zeros((M, N), ACC)
    for step in range(split * steps, tl.minimum((images * (plane_units * YV) + K - 1) // K, (split + 1) * steps)):
        first_q = step * K
        offset, valid = _outputs(first_q, first_o, images, outputs, plane_units, NHWC, YV, WIDE, K, M)
        g = tl.load(dy + offset, mask=valid, other=0.0)
        p = _pooled(
            x, first_q, first_c, images, c_units, h, w_units, ho, wo, NHWC, STRIDE, FULL, CV, XV, WIDE, K, N, ACC
        )  # fmt: skip
        if NHWC:
            sums = _product(tl.trans(g), p, sums, ACC)
        else:
            sums = _product(g, tl.trans(p), sums, ACC)
    o, c = first_o + tl.arange(0, M), first_c + tl.arange(0, N)
    at = (split * outputs + o)[:, None].to(tl.int64) * channels + c[None, :]
    tl.store(partial + at, sums, mask=(o < outputs)[:, None] & (c < channels)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def avgpool_conv1x1_bias_kernel(
    dy, partial, images, o_units, plane_units, steps,
    NHWC: tl.constexpr, OV: tl.constexpr, YV: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One split's sums of dy, of M channels."""
    outputs, first_o, split = o_units * OV, tl.program_id(0) * M, tl.program_id(1)
    sums = tl.zeros((K, M) if NHWC else (M, K), ACC)
    for step in range(split * steps, tl.minimum((images * (plane_units * YV) + K - 1) // K, (split + 1) * steps)):
        first_q = step * K
        offset, valid = _outputs(first_q, first_o, images, outputs, plane_units, NHWC, YV, WIDE, K, M)
        sums += tl.load(dy + offset, mask=valid, other=0.0).to(ACC)
    o = first_o + tl.arange(0, M)
    tl.store(partial + split * outputs + o, tl.sum(sums, axis=0 if NHWC else 1), mask=o < outputs)


@triton.jit(do_not_specialize=_SIZES)
def avgpool_conv1x1_sum_kernel(partial, out, numel, splits, BLOCK: tl.constexpr):
    """The splits' sums, added in order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = at < numel
    total = tl.zeros((BLOCK,), partial.dtype.element_ty)
    for split in range(0, splits):
        total += tl.load(partial + tl.cast(split, tl.int64) * numel + at, mask=valid, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=valid)
