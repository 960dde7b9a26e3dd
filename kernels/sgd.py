"""sgd_check and sgd_step in Triton: checks, tables, launch plans and registration. sgd_kernels.py has the formulas."""

from __future__ import annotations

import functools
import itertools
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from ..reference.bn_relu import accumulate_dtype
from ..reference.sgd import is_half
from . import launch as launching
from . import sgd_kernels as kernels

# values of a block, and of one pass of its threads: 8 each, 16 bytes at 16 bit
BLOCK, TILE, WARPS = 8192, 2048, 8
# partial sums, and step counts, that a program takes at a time
SUMS, COUNTS = 256, 1024


# ---- what belongs together: one tensor of a call ----


@dataclass(frozen=True)
class Item:
    """A tensor to check or to step. key: (is a weight to check, dtype, dtype of the gradient, has momentum)."""

    key: tuple[bool, int, int, bool]
    numel: int
    group: int
    index: int
    tensors: tuple[Tensor | None, ...]  # gradient, parameter, master, momentum buffer, step count

    @property
    def addresses(self) -> tuple[int, ...]:
        return tuple(0 if t is None else t.data_ptr() for t in self.tensors)


def _dense(t: Tensor) -> bool:
    """Whether the elements lie one after another in some order of the dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _same_places(first: Tensor, *others: Tensor | None) -> bool:
    """Whether all tensors are dense and have their elements in the same order."""
    given = [t for t in others if t is not None]
    if first.is_contiguous() and all(t.is_contiguous() for t in given):
        return True

    def strides(t: Tensor) -> list[int]:
        return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]

    return all(strides(t) == strides(first) for t in given) and _dense(first)


def _packed(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors, or contiguous copies where their elements lie in different orders."""
    first, *others = tensors
    assert first is not None
    if _same_places(first, *others):
        return list(tensors)
    return [None if t is None else t.contiguous() for t in tensors]


class Packed:
    """Tensors to write to whose elements lie in different orders: copies, which are copied back."""

    def __init__(self) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []

    def write(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The tensors, all but the first to be written, as they are or as copies."""
        mine = _packed(tensors)
        for t, copy in zip(tensors[1:], mine[1:], strict=True):
            if t is not None and copy is not None and copy is not t:
                self._copies.append((t, copy))
        return mine

    def copy_back(self) -> None:
        for target, copy in self._copies:
            target.copy_(copy)


# ---- checks ----


def _check_device(op: str, name: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        launching.fail(op, name, f"is on {t.device}", f"{device}, where the first tensor is")


def _check_dtype(op: str, name: str, t: Tensor, *accepted: torch.dtype) -> None:
    if t.dtype not in accepted:
        mine, *names = (str(d).removeprefix("torch.") for d in (t.dtype, *accepted))
        launching.fail(op, name, f"has dtype {mine}", ", ".join(names))


def _check_shape(op: str, name: str, t: Tensor, param: Tensor) -> None:
    if t.shape != param.shape:
        launching.fail(op, name, f"has shape {tuple(t.shape)}", f"{tuple(param.shape)}, the parameter's")


def _check_tensor(op: str, name: str, t: Tensor, device: torch.device) -> None:
    _check_dtype(op, name, t, *launching.DTYPES)
    _check_device(op, name, t, device)


def _check_written(op: str, name: str, t: Tensor) -> None:
    if t.is_contiguous() or t.numel() == 0:
        return
    if any(stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape, strict=True)):
        launching.fail(
            op, name, "is expanded: several of its elements are one place in memory", "tensors that can be written"
        )


def _check_scalar(
    op: str, name: str, t: Tensor | None, device: torch.device, dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> None:
    if t is None:
        return
    if t.numel() != 1:
        launching.fail(op, name, f"has shape {tuple(t.shape)}", "one element")
    _check_dtype(op, name, t, *dtypes)
    _check_device(op, name, t, device)


def _check_squares(op: str, name: str, t: Tensor | None, count: int, exactly: bool, device: torch.device) -> None:
    if t is None:
        return
    _check_dtype(op, name, t, torch.float64)
    _check_device(op, name, t, device)
    if t.dim() != 1 or t.numel() < count or (exactly and t.numel() != count) or not t.is_contiguous():
        more = "" if exactly else " or longer"
        launching.fail(op, name, f"has shape {tuple(t.shape)}", f"({count},){more}, contiguous")


def _check_count(op: str, name: str, values: Sequence[Any], want: int, of: str) -> None:
    if len(values) != want:
        launching.fail(op, name, f"has {len(values)} {of}", f"{want}, one for each that needs one")


class Beside:
    """A list with a tensor for each parameter that needs one, in order."""

    def __init__(self, op: str, name: str, tensors: Sequence[Tensor]) -> None:
        self.op, self.name, self.tensors, self.taken = op, name, tensors, 0

    def next(self, param: Tensor, dtype: torch.dtype, written: bool) -> Tensor:
        """The parameter's, checked: of its shape, and of this dtype."""
        i = self.taken
        if i == len(self.tensors):
            launching.fail(self.op, self.name, f"has {i} tensors", "one for each parameter that needs one")
        self.taken += 1
        t, name = self.tensors[i], f"{self.name}[{i}]"
        _check_dtype(self.op, name, t, dtype)
        _check_device(self.op, name, t, param.device)
        _check_shape(self.op, name, t, param)
        if written:
            _check_written(self.op, name, t)
        return t

    def end(self) -> None:
        _check_count(self.op, self.name, self.tensors, self.taken, "tensors")


# ---- tables and plans ----


@dataclass(frozen=True)
class Launch:
    """Entries [begin, end) of one combination of dtypes; vec: all of them allow accesses of 16 bytes."""

    key: tuple[bool, int, int, bool]
    vec: bool
    begin: int
    end: int
    first_block: int
    blocks: int


@dataclass(frozen=True)
class Plan:
    order: tuple[int, ...]  # of the items, as entries
    firsts: tuple[int, ...]  # an entry's first block; one more: the number of blocks
    launches: tuple[Launch, ...]


@functools.lru_cache(maxsize=64)
def plan(items: tuple[tuple[tuple[bool, int, int, bool], bool, int], ...]) -> Plan:
    """The launches of items (key, vec, numel); an empty one has no block."""
    order = sorted(range(len(items)), key=lambda i: items[i][:2])
    firsts, launches = [0], []
    for (key, vec), run in itertools.groupby(order, key=lambda i: items[i][:2]):
        begin = len(firsts) - 1
        firsts += itertools.accumulate((cdiv(items[i][2], BLOCK) for i in run), initial=firsts.pop())
        blocks = firsts[-1] - firsts[begin]
        if blocks:
            launches.append(Launch(key, vec, begin, len(firsts) - 1, firsts[begin], blocks))
    return Plan(tuple(order), tuple(firsts), tuple(launches))


def _type(index: int) -> Any:
    return launching.TYPES[launching.DTYPES[index]]


def _bits(*numbers: float) -> tuple[int, ...]:
    return struct.unpack(f"{len(numbers)}q", struct.pack(f"{len(numbers)}d", *numbers))


def _write_table(words: tuple[int, ...], device: torch.device) -> Tensor:
    piece = kernels.PIECE.value
    table = torch.empty(len(words), dtype=torch.int64, device=device)
    for start in range(0, len(words), piece):
        some = words[start : start + piece]
        arguments = {f"w{i}": word for i, word in enumerate((*some, *[0] * (piece - len(some))))}
        launching.launch(
            kernels.sgd_table_kernel, (1,), {"table": table[start:], "count": len(some), **arguments}, {}, 1
        )
    return table


@functools.lru_cache(maxsize=64)
def _kept_table(words: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return _write_table(words, device)


def _table(words: tuple[int, ...], device: torch.device) -> Tensor:
    """The words on the device; the same ones are written once a stream.

    Within the capture of a CUDA graph they are written by the graph, which must not read what the cache may drop.
    """
    if device.type != "cuda":
        return _kept_table(words, device, 0)
    if torch.cuda.is_current_stream_capturing():
        return _write_table(words, device)
    return _kept_table(words, device, torch.cuda.current_stream(device).cuda_stream)


class Call:
    """A table on the device and the launches over it."""

    def __init__(self, items: Sequence[Item], groups: Iterable[int], numbers: tuple[float, float]) -> None:
        addresses = [item.addresses for item in items]
        vec = [
            item.numel % 8 == 0 and all(a % 16 == 0 for a in where[:4])
            for item, where in zip(items, addresses, strict=True)
        ]
        self.plan = plan(tuple((item.key, v, item.numel) for item, v in zip(items, vec, strict=True)))
        entries = [(items[i], addresses[i]) for i in self.plan.order]
        rows = [
            [item.numel for item, _ in entries],
            [item.group << 32 | item.index for item, _ in entries],
            *([where[k] for _, where in entries] for k in range(5)),
        ]
        words = (*_bits(*numbers), *self.plan.firsts, *(word for row in rows for word in (*row, 0)), *groups)
        device = next(t.device for t in items[0].tensors if t is not None)
        self.arguments = {"words": _table(words, device), "length": len(entries) + 1}

    def launches(self) -> Iterator[tuple[Launch, tuple[int], dict[str, Any], dict[str, Any]]]:
        """(launch, grid, arguments, constants) of each."""
        for run in self.plan.launches:
            arguments = {**self.arguments, "begin": run.begin, "end": run.end, "first_block": run.first_block}
            constants = {"TYPE": _type(run.key[1]), "VEC": run.vec, "BLOCK": BLOCK, "TILE": TILE}
            yield run, (run.blocks,), arguments, constants


# ---- the ops ----


def sgd_check(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    masters: Sequence[Tensor],
    found_inf: Tensor,
    grad_sq: Tensor | None,
    weight_sq: Tensor | None,
) -> None:
    """See fasttricks.sgd_check; the arguments of the raw op."""
    op, device = "sgd_check", found_inf.device
    _check_scalar(op, "found_inf", found_inf, device)
    _check_squares(op, "grad_sq", grad_sq, len(grads), True, device)
    _check_squares(op, "weight_sq", weight_sq, len(params), True, device)
    items = []
    for i, grad in enumerate(grads):
        _check_tensor(op, f"grads[{i}]", grad, device)
        dtype = launching.DTYPES.index(grad.dtype)
        items.append(Item((False, dtype, dtype, False), grad.numel(), 0, i, (*_packed([grad]), *[None] * 4)))
    if weight_sq is not None:
        copies = Beside(op, "masters", masters)
        for i, param in enumerate(params):
            _check_tensor(op, f"params[{i}]", param, device)
            master = copies.next(param, torch.float32, False) if is_half(param) else None
            dtype = launching.DTYPES.index(param.dtype)
            tensors = (None, *_packed([param, master]), None, None)
            items.append(Item((True, dtype, dtype, False), param.numel(), 0, i, tensors))
        copies.end()
    if not items:
        return
    call = Call(items, (), (0.0, 0.0))
    partial = None
    if grad_sq is not None or weight_sq is not None:
        partial = torch.empty(call.plan.firsts[-1], dtype=torch.float64, device=device)
    outputs = {"found_inf": found_inf, "partial": partial}
    for run, grid, arguments, constants in call.launches():
        constants = {**constants, "WEIGHT": run.key[0]}
        launching.launch(kernels.sgd_check_kernel, grid, {**outputs, **arguments}, constants, WARPS)
    if partial is not None:
        sums = {**outputs, "grad_sq": grad_sq, "weight_sq": weight_sq, **call.arguments, "grads": len(grads)}
        launching.launch(kernels.sgd_norms_kernel, (len(items),), sums, {"BLOCK": SUMS}, 4)


def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    steps: Sequence[Tensor],
    masters: Sequence[Tensor],
    group_sizes: Sequence[int],
    lr: Sequence[Tensor],
    momentum: Sequence[float],
    dampening: Sequence[float],
    weight_decay: Sequence[float],
    nesterov: Sequence[bool],
    maximize: Sequence[bool],
    trust_coefficient: Sequence[float],
    eps: float,
    lr_in_momentum: bool,
    max_norm: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    grad_sq: Tensor | None,
    weight_sq: Tensor | None,
) -> None:
    """See fasttricks.sgd_step; the arguments of the raw op."""
    op = "sgd_step"
    _check_count(op, "grads", grads, len(params), "tensors")
    options = {
        "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
        "maximize": maximize, "trust_coefficient": trust_coefficient,
    }  # fmt: skip
    for name, values in options.items():
        _check_count(op, name, values, len(group_sizes), "values")
    if min(group_sizes, default=0) < 0:
        launching.fail(op, "group_sizes", f"has {min(group_sizes)}", "at least 0")
    if sum(group_sizes) != len(params):
        launching.fail(op, "group_sizes", f"add up to {sum(group_sizes)}", f"{len(params)}, the number of params")
    if not params:
        return
    device, lars = params[0].device, any(eta > 0 for eta in trust_coefficient)
    _check_scalar(op, "grad_scale", grad_scale, device)
    _check_scalar(op, "found_inf", found_inf, device)
    _check_squares(op, "grad_sq", grad_sq, len(params), False, device)
    _check_squares(op, "weight_sq", weight_sq, len(params), False, device)
    if grad_sq is None and (max_norm > 0 or lars):
        launching.fail(op, "grad_sq", "is None", "with max_norm or trust_coefficient: what sgd_check wrote")
    if weight_sq is None and lars:
        launching.fail(op, "weight_sq", "is None", "with trust_coefficient: what sgd_check wrote")
    given = list(_stepped(params, grads, momentum_buffers, steps, masters, group_sizes, lr, momentum))
    flags = [
        kernels.NESTEROV.value * nesterov[g]
        | kernels.MAXIMIZE.value * maximize[g]
        | kernels.LR_IS_DOUBLE.value * (lr[g].dtype == torch.float64)
        for g in range(len(group_sizes))
    ]
    groups = [
        word
        for g, rate in enumerate(lr)
        for word in (
            rate.data_ptr(),
            *_bits(momentum[g], 1.0 - dampening[g], weight_decay[g], trust_coefficient[g]),
            flags[g],
        )
    ]
    scalars: dict[str, Any] = {"grad_scale": grad_scale, "found_inf": found_inf}
    scalars |= {"grad_sq": grad_sq, "weight_sq": weight_sq, "norms": 0 if grad_sq is None else grad_sq.numel()}
    modes = {"CLIP": max_norm > 0, "LARS": lars, "LR_IN_MOMENTUM": lr_in_momentum}
    # tensors that share memory are stepped one by one, all with the counts that they came with
    parts = [[t] for t in given] if _share_memory(params) or _repeated(steps) else [given]
    calls = []
    for part in parts:
        packed = Packed()
        items = [Item(t.key, t.numel, t.group, t.index, (*packed.write(t.tensors[:4]), t.tensors[4])) for t in part]
        call = Call(items, groups, (max_norm, eps))
        for run, grid, arguments, constants in call.launches():
            constants = {**constants, "GRAD_TYPE": _type(run.key[2]), "HAS_MOMENTUM": run.key[3], **modes}
            launching.launch(kernels.sgd_step_kernel, grid, {**scalars, **arguments}, constants, WARPS)
        packed.copy_back()
        calls.append((call, len(items)))
    for call, count in calls if steps else ():
        arguments = {**call.arguments, "found_inf": found_inf, "end": count}
        grid = (cdiv(count, COUNTS),)
        launching.launch(kernels.sgd_count_kernel, grid, arguments, {"BLOCK": COUNTS}, 4)


def _stepped(
    params: Sequence[Tensor], grads: Sequence[Tensor], momentum_buffers: Sequence[Tensor], steps: Sequence[Tensor],
    masters: Sequence[Tensor], group_sizes: Sequence[int], lr: Sequence[Tensor], momentum: Sequence[float],
) -> Iterator[Item]:  # fmt: skip
    """The tensors to step, checked."""
    op, device = "sgd_step", params[0].device
    copies, buffers = Beside(op, "masters", masters), Beside(op, "momentum_buffers", momentum_buffers)
    _check_count(op, "steps", steps, len(momentum_buffers), "tensors")
    for i, step in enumerate(steps):
        _check_scalar(op, f"steps[{i}]", step, device)
    groups = [g for g, size in enumerate(group_sizes) for _ in range(size)]
    for rate in lr:
        _check_scalar(op, "lr", rate, device, (torch.float32, torch.float64))
    for i, (g, param, grad) in enumerate(zip(groups, params, grads, strict=True)):
        _check_tensor(op, f"params[{i}]", param, device)
        _check_tensor(op, f"grads[{i}]", grad, device)
        _check_shape(op, f"grads[{i}]", grad, param)
        _check_written(op, f"params[{i}]", param)
        computed = accumulate_dtype(param.dtype)
        moves = momentum[g] != 0
        master = copies.next(param, computed, True) if is_half(param) else None
        buffer = buffers.next(param, computed, True) if moves else None
        count = steps[buffers.taken - 1] if moves else None
        key = (False, launching.DTYPES.index(param.dtype), launching.DTYPES.index(grad.dtype), moves)
        yield Item(key, param.numel(), g, i, (grad, param, master, buffer, count))
    copies.end()
    buffers.end()


def _share_memory(params: Sequence[Tensor]) -> bool:
    """Whether two parameters share memory: one given twice, or views of one tensor."""
    spans = []
    for t in params:
        if t.numel():
            last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
    spans.sort()
    return any(after[0] < before[1] for before, after in itertools.pairwise(spans))


def _repeated(tensors: Sequence[Tensor]) -> bool:
    return max(Counter(t.data_ptr() for t in tensors).values(), default=0) > 1


launching.define(sgd_check, ("found_inf", "grad_sq", "weight_sq"))
launching.define(sgd_step, ("params", "momentum_buffers", "steps", "masters"))
