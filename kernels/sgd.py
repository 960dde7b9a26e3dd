"""sgd_check and sgd_step in Triton: tables, launch plans and registration. sgd_kernels.py has the formulas."""

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

from ..checks import FLOATS
from ..ops.sgd_call import CheckCall, StepCall, Stepped, is_half
from . import launch as launching
from . import sgd_kernels as kernels

# values per block, and per pass of its threads: 8 per thread, 16 bytes at 16 bit
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
    """Copies of tensors whose elements lie in different orders; results are copied back to the tensors."""

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
    """The launches of items (key, vec, numel); an empty item has no block."""
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
    return launching.TYPES[FLOATS[index]]


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
    """The words on the device; equal words are written once per stream.

    While a CUDA graph is captured, the graph itself writes them: the cache may drop its copy before a replay.
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
    CheckCall(grads, params, masters, found_inf, grad_sq, weight_sq).check()
    device = found_inf.device
    items = []
    for i, grad in enumerate(grads):
        dtype = FLOATS.index(grad.dtype)
        items.append(Item((False, dtype, dtype, False), grad.numel(), 0, i, (*_packed([grad]), *[None] * 4)))
    if weight_sq is not None:
        rest = iter(masters)
        for i, param in enumerate(params):
            master = next(rest) if is_half(param) else None
            dtype = FLOATS.index(param.dtype)
            tensors = (None, *_packed([param, master]), None, None)
            items.append(Item((True, dtype, dtype, False), param.numel(), 0, i, tensors))
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
    step = StepCall(
        params, grads, momentum_buffers, steps, masters, group_sizes, lr, momentum, dampening, weight_decay, nesterov,
        maximize, trust_coefficient, eps, lr_in_momentum, max_norm, grad_scale, found_inf, grad_sq, weight_sq,
    )  # fmt: skip
    step.check()
    if not params:
        return
    given = [_item(t) for t in step.tensors()]
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
    modes = {"CLIP": max_norm > 0, "LARS": any(trust_coefficient), "LR_IN_MOMENTUM": lr_in_momentum}
    # tensors that share memory are stepped one after another, all with the step counts from before the call
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


def _item(t: Stepped) -> Item:
    dtypes = FLOATS.index(t.param.dtype), FLOATS.index(t.grad.dtype)
    tensors = t.grad, t.param, t.master, t.momentum_buffer, t.steps
    return Item((False, *dtypes, t.momentum_buffer is not None), t.param.numel(), t.group, t.index, tensors)


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
