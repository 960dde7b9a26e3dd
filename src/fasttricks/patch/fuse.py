"""fuse, unfuse, unfused and fusions: a model's blocks with their pairs as one op each, in place."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import nn

from ..checks import fail
from ..nn import run
from ..nn.holder import Holder
from .block import Allowed, Plan, fingerprint, fused_class, fused_norm_act_class, has_relu, plan, recomputing_class
from .match import AVGPOOL_CONV1X1, BN_ADD_RELU, BN_RELU, NOT_WANTED, Left
from .report import Fusion, Fusions
from .trace import Untraceable, original_class

Model = TypeVar("Model", bound=nn.Module)
Filter = Callable[[nn.Module, str], bool]


def fuse(
    model: Model,
    *,
    bn_relu: bool = True,
    bn_add_relu: bool = True,
    avgpool_conv1x1: bool = True,
    filter_fn: Filter | None = None,
    strict: bool = False,
    recompute: bool = False,
    min_elements: int | None = None,
) -> Model:
    """Runs each BatchNorm with its ReLU, or addition and ReLU, and each 2x2 pool with its 1x1 convolution as one op.

    A pool after a 1x1 convolution (DenseNet) is run before it, which is equal up to rounding.

    For training: no weight is changed or folded, every module stays the object that it is (`nn.BatchNorm2d` stays
    `nn.BatchNorm2d`), and so do the state_dict, the parameters and the hooks. Only the forward of blocks
    with such pairs changes: the class of the block becomes a subclass whose forward runs each pair as one op. If the
    result could differ (a hook on a module of a pair, a replaced child, a changed attribute, an export), the call runs
    the original forward.

    Args:
        model: changed in place. Models wrapped by DistributedDataParallel or torch.compile are changed inside.
        bn_relu, bn_add_relu, avgpool_conv1x1: which kinds of pairs.
        filter_fn: called with the BatchNorm (or the 1x1 convolution) and its name; False leaves that pair as it is.
        strict: raise if a pair is left as it is for a reason other than these arguments.
        recompute: run every forward pass of the model within `fasttricks.recompute()`, which saves memory.
        min_elements: a pair whose input has fewer elements calls its modules one after another. Graphs of torch.compile
            always hold the op. None: 0, but 32,768 for a BatchNorm on the CPU where autograd records the call, which on
            fewer elements takes longer than two calls of torch (`benchmarks/bench_small.py`); 0 with recompute.

    Returns:
        The same model. `fasttricks.fusions(model)` says what was done, and why anything was left.

    Raises:
        TypeError: model is not an nn.Module, or an argument is of another type.
        ValueError: model is scripted; min_elements is negative; or strict, and a pair is left. Nothing is changed then.

    Examples:
        >>> block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> model = fasttricks.fuse(block)
        >>> model is block, type(block[1]).__name__
        (True, 'BatchNorm2d')
        >>> fasttricks.fusions(model).counts
        Counter({'bn_relu': 1})
    """
    _check(model, "fuse")
    wanted = {BN_RELU: bn_relu, BN_ADD_RELU: bn_add_relu, AVGPOOL_CONV1X1: avgpool_conv1x1}
    for name, value in {**wanted, "strict": strict, "recompute": recompute}.items():
        if not isinstance(value, bool):
            fail("fuse", name, f"is a {type(value).__name__}", "True or False", TypeError)
    if filter_fn is not None and not callable(filter_fn):
        accepted = "a function of (module, name), or None"
        fail("fuse", "filter_fn", f"is a {type(filter_fn).__name__}", accepted, TypeError)
    changes, rows = _analyse(model, wanted, filter_fn, _limit(min_elements, recompute))
    if strict and (left := [row for row in rows if row.kind is not None and row.reason not in ("", NOT_WANTED)]):
        raise ValueError(f"fuse: strict is True, and pairs are left as they are:\n{Fusions(left)}")
    unfuse(model)
    for module, cls in changes:
        module.__class__ = cls
    if recompute:
        model.__class__ = recomputing_class(type(model))  # type: ignore[assignment]
    return model


def _limit(min_elements: int | None, recompute: bool) -> int | None:
    """min_elements, checked; who recomputes wants the memory of small tensors, too."""
    if min_elements is None:
        return 0 if recompute else None
    if not isinstance(min_elements, Integral) or isinstance(min_elements, bool):
        fail("fuse", "min_elements", f"is a {type(min_elements).__name__}", "an int or None", TypeError)
    if min_elements < 0:
        fail("fuse", "min_elements", f"is {min_elements}", "0 or more")
    return int(min_elements)


def unfuse(model: Model) -> Model:
    """Undoes `fuse`, in place: every block has its original class again. Returns the model.

    Examples:
        >>> model = fasttricks.fuse(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))
        >>> type(fasttricks.unfuse(model)) is nn.Sequential
        True
    """
    _check(model, "unfuse")
    for module in model.modules():
        if hasattr(type(module), "_fasttricks_original"):
            module.__class__ = _without_fusion(type(module))
    return model


@contextlib.contextmanager
def unfused(model: Model) -> Iterator[Model]:
    """Context manager in which model is as before `fuse`, for tools that inspect its modules or their source.

    Examples:
        >>> model = fasttricks.fuse(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())).eval()
        >>> with fasttricks.unfused(model):
        ...     exported = torch.export.export(model, (torch.randn(2, 8, 4, 4),))
        >>> any("fasttricks" in str(node.target) for node in exported.graph.nodes)
        False
    """
    _check(model, "unfused")
    fused = [(module, type(module)) for module in model.modules() if hasattr(type(module), "_fasttricks_original")]
    unfuse(model)
    try:
        yield model
    finally:
        for module, cls in fused:
            module.__class__ = cls


def fusions(model: nn.Module) -> Fusions:
    """Which pairs of a model run as one op, and why others do not; on a model that is not fused, what `fuse` would do.

    Returns:
        One `Fusion` for each BatchNorm and each 2x2 pool with a 1x1 convolution after or before it; prints as a table.

    Examples:
        >>> model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.SiLU())
        >>> fasttricks.fusions(fasttricks.fuse(model)).counts
        Counter({'bn_relu': 1})
    """
    _check(model, "fusions")
    _, rows = _analyse(model, dict.fromkeys((BN_RELU, BN_ADD_RELU, AVGPOOL_CONV1X1), True), None)
    now = {
        _join(name, pair)
        for name, module in model.named_modules()
        for pair in getattr(type(module), "_fasttricks_pairs", ())
    }
    return Fusions(
        [row if row.reason or row.name in now else Fusion(row.name, row.kind, "not fused yet") for row in rows]
    )


def _check(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        fail(function, "model", f"is {given}", "a torch.nn.Module", TypeError)
    if isinstance(model, torch.jit.ScriptModule):
        accepted = "the module before torch.jit.script or torch.jit.trace"
        fail(function, "model", "is scripted or traced", accepted)


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _analyse(
    model: nn.Module, wanted: dict[str, bool], filter_fn: Filter | None, min_elements: int | None = 0
) -> tuple[list[tuple[nn.Module, type[nn.Module]]], Fusions]:
    """The classes that modules get, and the report. Inner blocks come first: an outer one takes what they leave."""
    changes: list[tuple[nn.Module, type[nn.Module]]] = []
    pairs: dict[str, str] = {}
    reasons: dict[str, Left] = {}
    modules = dict(model.named_modules())
    known: dict[Any, Planned] = {}  # blocks of the same structure are traced once
    # name of a block -> its place in changes, and how to plan it with the ceil_mode of a pool that reads its result
    planned: dict[str, tuple[int, Plan, Callable[[bool], Planned]]] = {}
    for name, module in sorted(modules.items(), key=lambda item: -item[0].count(".") - bool(item[0])):

        def allowed(kind: str, part: nn.Module, inner: str, name: str = name) -> bool:
            return wanted[kind] and (filter_fn is None or filter_fn(part, _join(name, inner)))

        if has_relu(module):
            if allowed(BN_RELU, module, ""):
                changes.append((module, fused_norm_act_class(original_class(module), min_elements)))
                pairs[name] = BN_RELU
            else:
                reasons[name] = Left(BN_RELU, NOT_WANTED)
            continue
        if any(map(_is_quantised, module.children())):
            why = Left("unknown", "its block is made for quantisation")
            reasons.update({_join(name, inner): why for inner, m in module.named_children() if run.is_plain_norm(m)})
            continue
        if not _may_hold_pairs(module) or not _pending(name, module, pairs):
            continue
        key = fingerprint(module) if filter_fn is None else name
        if key not in known:
            known[key] = _plan(module, allowed, min_elements)
        made, cls = known[key]
        reasons.update({_join(name, inner): why for inner, why in made.left.items()})
        new = {_join(name, inner): kind for inner, kind in made.pairs.items()}
        if cls is not None and new.keys() - pairs.keys():
            planned[name] = len(changes), made, functools.partial(_plan, module, allowed, min_elements)
            changes.append((module, cls))
            pairs.update(new)
    for name, (_, reader, _) in planned.items():
        before = _block_before(name, modules)
        if reader.pooling is None or before not in planned:
            continue
        i, made, again = planned[before]
        if made.last is not None and _channels_fit(changes[i][0], made, modules[name], reader):
            _, cls = again(reader.ceil_mode)
            assert cls is not None
            changes[i] = changes[i][0], cls
    rows = []
    for name, module in modules.items():
        if name in pairs:
            rows.append(Fusion(name, pairs[name]))
        elif run.is_norm_class(original_class(module)):
            holder = modules.get(name.rpartition(".")[0])
            unknown = "no forward that calls it can be traced"
            if isinstance(holder, Holder):
                unknown = f"{type(holder).__name__} runs it and what follows already"
            rows.append(Fusion(name, *reasons.get(name, Left(None, unknown))))
        elif isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            cls = original_class(module)
            rows.append(Fusion(name, None, f"its class, {cls.__name__}, may compute something else than its base"))
        elif name in reasons:
            rows.append(Fusion(name, *reasons[name]))
    return changes, Fusions(rows)


Planned = tuple[Plan, type[nn.Module] | None]


def _block_before(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The block whose result the block of this name should read: its sibling, or the last one of the stage before."""
    if not name:
        return None
    parent, _, child = name.rpartition(".")
    siblings = list(modules[parent]._modules)
    if (i := siblings.index(child)) > 0:
        return _join(parent, siblings[i - 1])
    stage = _block_before(parent, modules)
    blocks = list(modules[stage]._modules) if stage in modules else []
    return _join(str(stage), blocks[-1]) if blocks else None


def _channels_fit(block: nn.Module, made: Plan, following: nn.Module, reader: Plan) -> bool:
    norm, conv = block.get_submodule(str(made.last)), following.get_submodule(str(reader.pooling))
    return bool(norm.num_features == conv.in_channels)


def _plan(
    module: nn.Module, allowed: Allowed, min_elements: int | None, ceil_mode_of_reader: bool | None = None
) -> Planned:
    """What to do with one block, and the class that does it."""
    try:
        made = plan(module, allowed, min_elements, ceil_mode_of_reader)
    except Untraceable as error:
        why = Left("unknown", f"{original_class(module).__name__}: {error}")
        return Plan({}, {name: why for name, m in module.named_children() if run.is_plain_norm(m)}), None
    return made, fused_class(module, made) if made.pairs else None


def _may_hold_pairs(module: nn.Module) -> bool:
    """Whether the module can hold a pair: a container or user module; torch's own modules compute none."""
    cls = original_class(module)
    if isinstance(module, (torch.jit.ScriptModule, Holder)) or run.is_norm_class(cls):
        return False
    return not cls.__module__.startswith("torch.nn") or cls.forward is nn.Sequential.forward


def _is_quantised(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.") or getattr(module, "qconfig", None) is not None


def _pending(name: str, module: nn.Module, pairs: dict[str, str]) -> bool:
    """Is anything below module left that could be part of a pair?"""
    return any(
        (run.is_plain_norm(m) or run.is_plain_conv1x1(m)) and _join(name, inner) not in pairs
        for inner, m in module.named_modules()
    )


def _without_fusion(cls: type) -> type:
    """cls as before `fuse`; also if another tool has since made a subclass of it (FSDP2, parametrizations)."""
    if "_fasttricks_original" in vars(cls):
        return cls._fasttricks_original  # type: ignore[attr-defined]
    bases = tuple(_without_fusion(b) if hasattr(b, "_fasttricks_original") else b for b in cls.__bases__)
    namespace = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, namespace)
