"""The kernels of sgd_check and sgd_step; torch.optim.SGD's arithmetic on the fp32 master of a half parameter.

    g = grad * inv_scale * clip;  if maximize: g = -g;  g += wd * p;  g *= multiplier
    buf = g on the parameter's first step, else mu * buf + (1 - damp) * g
    d = g + mu * buf if nesterov else buf;  p -= lr * d

    inv_scale = 1 / grad_scale;  clip = min(1, max_norm / (|all g * inv_scale| + 1e-6))
    trust = eta * |p| / (|g * inv_scale * clip| + wd * |p| + eps), 1 where a norm is 0   (LARS, You et al. 2017)
    multiplier = trust, or lr * trust where the momentum sums up lr * g (then p -= d)

A call's tensors are in a table of int64 words in device memory: tensors are addresses, floating numbers the bits of a
float64. It holds max_norm and eps; rows of `length` words, one for each entry, which is a tensor, and one after them;
and the groups of parameters. Block b of a call works on BLOCK values of the last entry whose FIRST is not above b. A
launch processes the entries of one combination of dtypes.
"""

from __future__ import annotations

import triton
import triton.language as tl

HEADER = tl.constexpr(2)
# rows; GROUP: the group * 2**32 + the index of the tensor's squared norm
FIRST, NUMEL, GROUP, GRAD, PARAM, MASTER, BUFFER, STEPS = (tl.constexpr(k) for k in range(8))
ROWS = tl.constexpr(8)
# words of a group
LR, MOMENTUM, ONE_MINUS_DAMPENING, WEIGHT_DECAY, TRUST_COEFFICIENT, FLAGS = (tl.constexpr(k) for k in range(6))
GROUP_WORDS = tl.constexpr(6)
NESTEROV, MAXIMIZE, LR_IS_DOUBLE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
# of the table, that one launch writes
PIECE = tl.constexpr(128)

_SIZES = ["length", "begin", "end", "first_block", "grads", "norms"]
# entries that a block compares at a time when it searches for its own
SEARCH = tl.constexpr(256)


@triton.jit(do_not_specialize=["count", *(f"w{i}" for i in range(128))])
def sgd_table_kernel(
    table, count,
    w0: tl.int64, w1: tl.int64, w2: tl.int64, w3: tl.int64, w4: tl.int64, w5: tl.int64, w6: tl.int64, w7: tl.int64,
    w8: tl.int64, w9: tl.int64, w10: tl.int64, w11: tl.int64, w12: tl.int64, w13: tl.int64, w14: tl.int64,
    w15: tl.int64, w16: tl.int64, w17: tl.int64, w18: tl.int64, w19: tl.int64, w20: tl.int64, w21: tl.int64,
    w22: tl.int64, w23: tl.int64, w24: tl.int64, w25: tl.int64, w26: tl.int64, w27: tl.int64, w28: tl.int64,
    w29: tl.int64, w30: tl.int64, w31: tl.int64, w32: tl.int64, w33: tl.int64, w34: tl.int64, w35: tl.int64,
    w36: tl.int64, w37: tl.int64, w38: tl.int64, w39: tl.int64, w40: tl.int64, w41: tl.int64, w42: tl.int64,
    w43: tl.int64, w44: tl.int64, w45: tl.int64, w46: tl.int64, w47: tl.int64, w48: tl.int64, w49: tl.int64,
    w50: tl.int64, w51: tl.int64, w52: tl.int64, w53: tl.int64, w54: tl.int64, w55: tl.int64, w56: tl.int64,
    w57: tl.int64, w58: tl.int64, w59: tl.int64, w60: tl.int64, w61: tl.int64, w62: tl.int64, w63: tl.int64,
    w64: tl.int64, w65: tl.int64, w66: tl.int64, w67: tl.int64, w68: tl.int64, w69: tl.int64, w70: tl.int64,
    w71: tl.int64, w72: tl.int64, w73: tl.int64, w74: tl.int64, w75: tl.int64, w76: tl.int64, w77: tl.int64,
    w78: tl.int64, w79: tl.int64, w80: tl.int64, w81: tl.int64, w82: tl.int64, w83: tl.int64, w84: tl.int64,
    w85: tl.int64, w86: tl.int64, w87: tl.int64, w88: tl.int64, w89: tl.int64, w90: tl.int64, w91: tl.int64,
    w92: tl.int64, w93: tl.int64, w94: tl.int64, w95: tl.int64, w96: tl.int64, w97: tl.int64, w98: tl.int64,
    w99: tl.int64, w100: tl.int64, w101: tl.int64, w102: tl.int64, w103: tl.int64, w104: tl.int64, w105: tl.int64,
    w106: tl.int64, w107: tl.int64, w108: tl.int64, w109: tl.int64, w110: tl.int64, w111: tl.int64, w112: tl.int64,
    w113: tl.int64, w114: tl.int64, w115: tl.int64, w116: tl.int64, w117: tl.int64, w118: tl.int64, w119: tl.int64,
    w120: tl.int64, w121: tl.int64, w122: tl.int64, w123: tl.int64, w124: tl.int64, w125: tl.int64, w126: tl.int64,
    w127: tl.int64,
):  # fmt: skip
    """Writes the next `count` words of the table from arguments: a CUDA graph cannot keep a copy from the host."""
    words = (
        w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15, w16, w17, w18, w19, w20, w21, w22,
        w23, w24, w25, w26, w27, w28, w29, w30, w31, w32, w33, w34, w35, w36, w37, w38, w39, w40, w41, w42, w43,
        w44, w45, w46, w47, w48, w49, w50, w51, w52, w53, w54, w55, w56, w57, w58, w59, w60, w61, w62, w63, w64,
        w65, w66, w67, w68, w69, w70, w71, w72, w73, w74, w75, w76, w77, w78, w79, w80, w81, w82, w83, w84, w85,
        w86, w87, w88, w89, w90, w91, w92, w93, w94, w95, w96, w97, w98, w99, w100, w101, w102, w103, w104, w105,
        w106, w107, w108, w109, w110, w111, w112, w113, w114, w115, w116, w117, w118, w119, w120, w121, w122, w123,
        w124, w125, w126, w127,
    )  # fmt: skip
    for i in tl.static_range(PIECE):
        tl.store(table + i, words[i], mask=i < count)


@triton.jit
def _word(words, length, row, entry):
    return tl.load(words + HEADER + row * length + entry)


@triton.jit
def _number(words, at):
    """The floating number at a place of the table."""
    return tl.load((words + at).to(tl.pointer_type(tl.float64), bitcast=True))


@triton.jit
def _tensor(words, length, row, entry, first, TYPE: tl.constexpr, VEC: tl.constexpr):
    """The entry's tensor of a row, from value `first` on. VEC: its address allows 16-byte accesses."""
    pointer = _word(words, length, row, entry).to(tl.pointer_type(TYPE), bitcast=True) + first
    if VEC:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _find(words, length, begin, end, block, BLOCK: tl.constexpr):
    """(entry, its first value, number of values) of a block: the last entry whose first block is not above it."""
    entry = begin - 1
    for at in range(begin, end, SEARCH):
        some = at + tl.arange(0, SEARCH)
        first = tl.load(words + HEADER + FIRST * length + some, mask=some < end, other=2**62)
        entry += tl.sum((first <= block).to(tl.int32), axis=0)
    first = (block - _word(words, length, FIRST, entry)) * BLOCK
    return entry, first, tl.minimum(_word(words, length, NUMEL, entry) - first, BLOCK).to(tl.int32)


@triton.jit
def _tile(begin, count, VEC: tl.constexpr, TILE: tl.constexpr):
    """Offsets and validity of TILE values from `begin` on, 8 neighbours per thread. VEC: count is a multiple of 8."""
    start = begin + tl.arange(0, TILE // 8)[:, None] * 8
    offset = start + tl.arange(0, 8)[None, :]
    if VEC:
        return offset, tl.broadcast_to(start < count, (TILE // 8, 8))
    else:
        return offset, offset < count


@triton.jit
def _as_seen(param, master):
    """The master, or the parameter if it no longer equals the rounded master because it was changed from outside."""
    same = master.to(param.dtype).to(master.dtype) == param.to(master.dtype)
    return tl.where(same, master, param.to(master.dtype))


@triton.jit
def _not_finite(value):
    return (value != value) | (tl.abs(value) == float("inf"))


@triton.jit(do_not_specialize=_SIZES)
def sgd_check_kernel(
    words, found_inf, partial, length, begin, end, first_block,
    TYPE: tl.constexpr, WEIGHT: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """found_inf = 1 where a gradient is not finite; partial: each block's sum of squares, if norms are requested."""
    block = first_block + tl.program_id(0)
    entry, first, count = _find(words, length, begin, end, block, BLOCK)
    values = _tensor(words, length, PARAM if WEIGHT else GRAD, entry, first, TYPE, VEC)
    square = tl.zeros((TILE // 8, 8), tl.float64)
    bad = tl.zeros((TILE // 8, 8), tl.int32)
    for at in range(0, count, TILE):
        offset, valid = _tile(at, count, VEC, TILE)
        value = tl.load(values + offset, mask=valid, other=0.0)
        if TYPE.primitive_bitwidth == 16:
            if WEIGHT:
                master = _tensor(words, length, MASTER, entry, first, tl.float32, VEC)
                value = _as_seen(value, tl.load(master + offset, mask=valid, other=0.0))
            else:
                value = value.to(tl.float32)
        if not WEIGHT:
            bad |= _not_finite(value).to(tl.int32)
        if partial is not None:
            square += value.to(tl.float64) * value.to(tl.float64)
    if not WEIGHT:
        tl.store(found_inf, 1.0, mask=tl.max(tl.max(bad, axis=1), axis=0) != 0)
    if partial is not None:
        tl.store(partial + block, tl.sum(tl.sum(square, axis=1), axis=0))


@triton.jit(do_not_specialize=_SIZES)
def sgd_norms_kernel(words, found_inf, partial, grad_sq, weight_sq, length, grads, BLOCK: tl.constexpr):
    """Each entry's sum of squares from its blocks' in a fixed order; the first `grads` entries are gradients.

    If the sum of a gradient is not finite (float64 can overflow it), found_inf is set: there is nothing to clip to.
    """
    entry = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float64)
    end = _word(words, length, FIRST, entry + 1)
    for at in range(_word(words, length, FIRST, entry), end, BLOCK):
        block = at + tl.arange(0, BLOCK)
        total += tl.load(partial + block, mask=block < end, other=0.0)
    square = tl.sum(total, axis=0)
    tensor = _word(words, length, GROUP, entry)
    if grad_sq is not None:
        tl.store(grad_sq + tensor, square, mask=entry < grads)
        tl.store(found_inf, 1.0, mask=(entry < grads) & _not_finite(square))
    if weight_sq is not None:
        tl.store(weight_sq + tensor, square, mask=entry >= grads)


@triton.jit
def _norm_of_all(grad_sq, norms, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, norms, BLOCK):
        some = at + tl.arange(0, BLOCK)
        total += tl.load(grad_sq + some, mask=some < norms, other=0.0)
    return tl.sqrt(tl.sum(total, axis=0))


@triton.jit(do_not_specialize=_SIZES)
def sgd_step_kernel(
    words, grad_scale, found_inf, grad_sq, weight_sq, length, begin, end, first_block, norms,
    TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, HAS_MOMENTUM: tl.constexpr, CLIP: tl.constexpr, LARS: tl.constexpr,
    LR_IN_MOMENTUM: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One step of the entries [begin, end); nothing is changed if found_inf is set."""
    ACC: tl.constexpr = tl.float64 if TYPE.primitive_bitwidth == 64 else tl.float32
    HALF: tl.constexpr = TYPE.primitive_bitwidth == 16
    entry, first, count = _find(words, length, begin, end, first_block + tl.program_id(0), BLOCK)
    if found_inf is not None:
        count = tl.where(tl.load(found_inf) == 0, count, 0)

    tensor = _word(words, length, GROUP, entry)
    group = HEADER + ROWS * length + (tensor >> 32).to(tl.int32) * GROUP_WORDS
    flags = tl.load(words + group + FLAGS)
    rate, double = tl.load(words + group + LR), flags & LR_IS_DOUBLE
    lr = tl.load(rate.to(tl.pointer_type(tl.float64), bitcast=True), mask=double != 0, other=0.0)
    lr += tl.load(rate.to(tl.pointer_type(tl.float32), bitcast=True), mask=double == 0, other=0.0).to(tl.float64)
    weight_decay = _number(words, group + WEIGHT_DECAY)
    inv_scale = tl.full((), 1.0, tl.float64)
    if grad_scale is not None:
        inv_scale /= tl.load(grad_scale).to(tl.float64)
    clip = tl.full((), 1.0, tl.float64)
    if CLIP:
        clip = _number(words, 0) / (_norm_of_all(grad_sq, norms, SEARCH) * inv_scale + 1e-6)
        clip = tl.where(clip > 1.0, 1.0, clip)
    multiplier = tl.full((), 1.0, tl.float64)
    if LARS:
        eta, index = _number(words, group + TRUST_COEFFICIENT), tensor & 0xFFFFFFFF
        w = tl.sqrt(tl.load(weight_sq + index))
        n = tl.sqrt(tl.load(grad_sq + index)) * inv_scale * clip
        trust = eta * w / (n + weight_decay * w + _number(words, 1))
        multiplier = tl.where((eta > 0) & (w > 0) & (n > 0), trust, 1.0)
    down = -lr
    if LR_IN_MOMENTUM:
        multiplier *= lr
        down = tl.full((), -1.0, tl.float64)
    momentum = _number(words, group + MOMENTUM).to(ACC)
    one_minus_dampening = _number(words, group + ONE_MINUS_DAMPENING).to(ACC)
    inv_scale, clip, multiplier, down = inv_scale.to(ACC), clip.to(ACC), multiplier.to(ACC), down.to(ACC)
    decays, weight_decay = weight_decay != 0, weight_decay.to(ACC)
    sign = tl.where((flags & MAXIMIZE) != 0, -1.0, 1.0).to(ACC)

    param = _tensor(words, length, PARAM, entry, first, TYPE, VEC)
    grad = _tensor(words, length, GRAD, entry, first, GRAD_TYPE, VEC)
    if HALF:
        master = _tensor(words, length, MASTER, entry, first, ACC, VEC)
    if HAS_MOMENTUM:
        buffer = _tensor(words, length, BUFFER, entry, first, ACC, VEC)
        taken = tl.load(_tensor(words, length, STEPS, entry, 0, tl.float32, False))
        known = tl.where(taken == 0, 0, count)  # of the buffer: nothing before the first step
        nesterov = (flags & NESTEROV) != 0
    for at in range(0, count, TILE):
        offset, valid = _tile(at, count, VEC, TILE)
        p = tl.load(param + offset, mask=valid, other=0.0)
        if HALF:
            p = _as_seen(p, tl.load(master + offset, mask=valid, other=0.0))
        g = tl.load(grad + offset, mask=valid, other=0.0).to(ACC)
        if grad_scale is not None:
            g *= inv_scale
        if CLIP:
            g *= clip
        g *= sign
        g = tl.where(decays, _fused(p, weight_decay, g), g)
        if LARS or LR_IN_MOMENTUM:
            g *= multiplier
        if HAS_MOMENTUM:
            b = tl.load(buffer + offset, mask=_tile(at, known, VEC, TILE)[1], other=0.0)
            b = tl.where(taken == 0, g, _fused(g, one_minus_dampening, b * momentum))
            tl.store(buffer + offset, b, mask=valid)
            g = tl.where(nesterov, _fused(b, momentum, g), b)
        p = _fused(g, down, p)
        if HALF:
            tl.store(master + offset, p, mask=valid)
        tl.store(param + offset, p.to(TYPE), mask=valid)


@triton.jit
def _fused(a, b, c):
    """a * b + c with one rounding, b a scalar, as in torch's kernels."""
    a, b = tl.broadcast(a, b)
    return tl.fma(a, b, c)


@triton.jit(do_not_specialize=_SIZES)
def sgd_count_kernel(words, found_inf, length, end, BLOCK: tl.constexpr):
    """Counts the step in the entries' STEPS; a separate launch, since each block of the step reads the old counts."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if found_inf is not None:
        end = tl.where(tl.load(found_inf) == 0, end, 0)
    address = tl.load(words + HEADER + STEPS * length + entry, mask=entry < end, other=0)
    moves = address != 0
    steps = address.to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(steps, tl.load(steps, mask=moves, other=0.0) + 1.0, mask=moves)
