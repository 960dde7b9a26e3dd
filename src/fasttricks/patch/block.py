"""The class of a fused block: each pair is one op, and a guard falls back to the original forward."""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import itertools
import math
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from ..nn import run
from ..recomputation import recompute
from . import match
from .reads import global_names, reads
from .rewrite import ceil_mode_of, modules_of, rewrite
from .trace import (
    DEFAULT,
    TENSOR,
    TYPE_ASKED,
    TYPES,
    Kinds,
    Signature,
    Untraceable,
    kind_of,
    last_class,
    original_class,
    trace,
)

Allowed = Callable[[str, nn.Module, str], bool]


@dataclass
class Plan:
    """The result of tracing a block: its pairs, why others were rejected, and the rewritten graphs."""

    pairs: dict[str, str] = field(default_factory=dict)  # name within the block -> kind
    left: dict[str, match.Left] = field(default_factory=dict)
    signature: Signature = field(default_factory=lambda: Signature([], []))
    graphs: dict[tuple[Kinds, bool], fx.Graph] = field(default_factory=dict)
    asked: set[int] = field(default_factory=set)  # positions of the arguments whose type the forward looks at
    # (name within the block, what it must still be) -> in which modes
    watched: dict[tuple[str, str], set[bool]] = field(default_factory=dict)
    inlined: set[str] = field(default_factory=set)
    last: str | None = None  # the BatchNorm of the pair of BatchNorm, addition and ReLU whose result is the block's
    pooling: str | None = None  # the convolution of a pair that pools the block's input
    ceil_mode: bool = False  # of that pool


def plan(
    block: nn.Module, allowed: Allowed, min_elements: int | None = 0, ceil_mode_of_reader: bool | None = None
) -> Plan:
    """Traces a block's forward in both modes and every combination of its arguments, and finds the pairs.

    ceil_mode_of_reader: that of a pool by which the next block reads this one's result, if there is one.

    Raises:
        Untraceable: no combination can be traced.
    """
    signature = Signature.of(block)
    result = Plan(signature=signature)
    errors: list[Untraceable] = []
    combinations = signature.combinations()
    traced: list[tuple[Kinds, bool, fx.Graph, set[int]]] = []
    for kinds in combinations:  # which grow as a forward looks at the types of its arguments
        for training in (True, False):
            try:
                graph, asked, inlined = _trace_inlining(block, signature, kinds, training)
            except Untraceable as error:
                errors.append(error)
                result.asked.update(error.asked)
                combinations += _others(kinds, error.asked, combinations)
                continue
            result.asked.update(asked)
            combinations += _others(kinds, asked, combinations)
            found = match.Matcher(graph, block, training).match(allowed)
            result.left.update(found.left)
            if found.pairs:
                _add(result, graph, found.pairs, inlined, training)
                _add_ends(result, block, found.pairs)
                rewrite(graph, found.pairs, min_elements, ceil_mode_of_reader)
                traced.append((kinds, training, graph, asked))
    for kinds, training, graph, asked in traced:
        for given in _same_graph(kinds, result.asked - asked):
            result.graphs[given, training] = graph
    if len(errors) == 2 * len(combinations):
        raise errors[0]
    for name in result.pairs:
        result.left.pop(name, None)
    return result


def _add(result: Plan, graph: fx.Graph, pairs: list[match.Pair], inlined: set[str], training: bool) -> None:
    result.pairs.update({pair.name: pair.kind for pair in pairs})
    result.inlined |= inlined
    tensors = [(str(node.target), "tensor") for node in graph.nodes if TYPE_ASKED in node.meta]
    for name, role in (*modules_of(pairs), *tensors):
        result.watched.setdefault((name, role), set()).add(training)


def _add_ends(result: Plan, block: nn.Module, pairs: list[match.Pair]) -> None:
    for pair in pairs:
        if pair.ends_block:
            result.last = pair.name
        elif pair.kind == match.AVGPOOL_CONV1X1 and not pair.conv_first and pair.reads_argument:
            result.pooling, result.ceil_mode = pair.name, ceil_mode_of(pair.pool, block)


def _others(kinds: Kinds, asked: Collection[int], known: list[Kinds]) -> list[Kinds]:
    """What to trace as well, as the forward looks at the types of the arguments `asked`: containers for tensors."""
    swapped = [(*kinds[:i], kind, *kinds[i + 1 :]) for i in asked if kinds[i] == TENSOR for kind in TYPES]
    return [other for other in swapped if other not in known]


def _same_graph(kinds: Kinds, others: Collection[int]) -> list[Kinds]:
    """Where a forward looked at the type of an argument only given other arguments, one graph serves all types."""
    choices = [tuple(TYPES) if kind == TENSOR and i in others else (kind,) for i, kind in enumerate(kinds)]
    return list(itertools.product(*choices))


def _trace_inlining(
    block: nn.Module, signature: Signature, kinds: Kinds, training: bool
) -> tuple[fx.Graph, set[int], set[str]]:
    """The graph with those children inlined that hold half of a pair."""
    inlined: set[str] = set()
    refused: set[str] = set()
    graph, asked = trace(block, signature, kinds, training, inlined)
    while new := match.to_inline(graph, block, training, refused | inlined):
        for name in new:
            try:
                graph, asked = trace(block, signature, kinds, training, {*inlined, name})
                inlined.add(name)
            except Untraceable:
                refused.add(name)
    return graph, asked, inlined | _read_only(graph, block, inlined)


def _read_only(graph: fx.Graph, block: nn.Module, inlined: set[str]) -> set[str]:
    """Modules below the inlined ones that no forward calls: it may have read their attributes, as in `self.drop.p`."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"} | inlined
    found = set()
    open_ = sorted(inlined)
    while open_:
        parent = open_.pop()
        names = [f"{parent}.{child}" for child, m in block.get_submodule(parent).named_children()]
        found |= {name for name in names if name not in called}
        open_ += [name for name in names if name not in called]
    return found


# ---- the generated class ----

_classes: weakref.WeakValueDictionary[Any, type] = weakref.WeakValueDictionary()
_own_attributes = frozenset(vars(nn.Module()))
_MISSING = object()


def fused_class(block: nn.Module, made: Plan) -> type[nn.Module]:
    """The subclass of block's class for a plan; blocks of the same structure share it."""
    base = original_class(block)
    sources, functions = [], {}
    for (kinds, training), graph in made.graphs.items():
        code = graph.python_code("self")
        sources.append((kinds, training, code.src, tuple(sorted((k, id(v)) for k, v in code.globals.items()))))
        functions[kinds, training] = code
    guard_source, guard_globals = _guard_source(block, made)
    guarded = tuple(sorted((k, id(v)) for k, v in guard_globals.items()))
    key = (base, guard_source, guarded, tuple(sources), tuple(sorted(made.asked)))
    known = _classes.get(key)
    if known is None:
        compiled: dict[str, Callable[..., Any]] = {}  # several combinations share one graph
        variants = {}
        for which, code in functions.items():
            if code.src not in compiled:
                compiled[code.src] = _compile(code.src, dict(code.globals), "forward")
            variants[which] = compiled[code.src]
        guard = _compile(guard_source, guard_globals, "ready")
        known = _classes[key] = _make(base, made.signature, made.asked, variants, guard, made.pairs)
    return known


def _compile(source: str, names: dict[str, Any], name: str) -> Callable[..., Any]:
    exec(compile(source, "<fasttricks.fuse>", "exec"), names)
    return names[name]


def _make(
    base: type[nn.Module],
    signature: Signature,
    asked: Collection[int],
    variants: dict[tuple[Kinds, bool], Callable[..., Any]],
    ready: Callable[[nn.Module], bool],
    pairs: dict[str, str],
) -> type[nn.Module]:
    defaults, names = signature.defaults, signature.names
    asks = [i in asked for i in range(len(defaults))]

    def kinds_of(args: tuple[Any, ...]) -> tuple[Any, ...]:
        given = [kind_of(*each) for each in zip(args, defaults, asks)]  # noqa: B905  (others are not given)
        return (*given, *[DEFAULT] * (len(defaults) - len(given)))

    one_tensor = (TENSOR, *[DEFAULT] * (len(defaults) - 1))  # what most blocks are given
    of_one_tensor = {mode: variants.get((one_tensor, mode)) for mode in (True, False)}

    # base.forward is looked up at each call: someone may have replaced it
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if run.wants_plain_modules(args[0] if args else None) or not ready(self):
            return base.forward(self, *args, **kwargs)
        if len(args) == 1 and not kwargs and type(args[0]) is torch.Tensor:
            function = of_one_tensor[self.training]
            return base.forward(self, *args) if function is None else function(self, *args)
        every = args
        if kwargs:
            later = names[len(args) :]
            if not kwargs.keys() <= set(later):
                return base.forward(self, *args, **kwargs)
            every = (*args, *map(kwargs.get, later, defaults[len(args) :]))
        kinds = kinds_of(every)
        function = variants.get((kinds, self.training))
        if function is None:
            return base.forward(self, *args, **kwargs)
        return function(self, *[value for value, kind in zip(every, kinds) if kind != DEFAULT])  # noqa: B905

    return _subclass(base, forward, pairs)


def _subclass(base: type[nn.Module], forward: Callable[..., Any], pairs: dict[str, str]) -> type[nn.Module]:
    namespace: dict[str, Any] = {
        "forward": _own_function(forward),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__deepcopy__": _deepcopy,
        "__reduce_ex__": _reduce_as_original,
        "_fasttricks_original": base,
        "_fasttricks_pairs": dict(pairs),
    }
    if issubclass(base, fx.GraphModule):
        namespace["recompile"] = _recompile_as_original
    return type(base.__name__, (base,), namespace)


def _own_function(forward: Any) -> Callable[..., Any]:
    """A copy of forward, which wraps a module's, for one class.

    torch.compile limits how often it compiles one code object: this one has its own. torch.jit.script compiles the
    source of the wrapped forward with the names that the function knows: this one knows those of both.
    """
    code = forward.__code__.replace()
    names = {**getattr(inspect.unwrap(forward), "__globals__", {}), "__name__": __name__}
    names.update((name, globals()[name]) for name in global_names(code) if name in globals())
    function = FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
    return functools.update_wrapper(function, forward.__wrapped__)


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy that is fused too."""
    own = getattr(original_class(self), "__deepcopy__", None)
    if own is not None:  # its class defines its own copy
        return own(self, memo)
    new = type(self).__new__(type(self))
    memo[id(self)] = new
    # a class that holds parametrizations refuses __getstate__: it can be copied, but not pickled
    state = self.__dict__ if is_parametrized(self) else _state_of(self)
    new.__setstate__(copy.deepcopy(state, memo))
    return new


def _recompile_as_original(self: fx.GraphModule) -> Any:
    """A graph that was edited is another forward: the module has its own class again."""
    self.__class__ = original_class(self)  # type: ignore[assignment]
    return self.recompile()


def _reduce_as_original(self: nn.Module, protocol: int) -> Any:
    """Pickles contain the original class, which loads without fasttricks."""
    original = original_class(self)
    if original.__reduce_ex__ is not object.__reduce_ex__ or original.__reduce__ is not object.__reduce__:
        return original.__reduce_ex__(self, protocol)
    return copyreg._reconstructor, (original, object, None), _state_of(self)  # type: ignore[attr-defined]


def _state_of(module: nn.Module) -> Any:
    return module.__getstate__() if hasattr(module, "__getstate__") else module.__dict__.copy()


def recomputing_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a whole model, which `fuse` has changed or not, with each forward pass within `recompute()`."""

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with recompute():
            return cls.forward(self, *args, **kwargs)

    base = getattr(cls, "_fasttricks_original", cls)
    return _subclass(base, forward, getattr(cls, "_fasttricks_pairs", {}))


# ---- timm's BatchNorm that holds its ReLU ----


def has_relu(norm: nn.Module) -> bool:
    """Is norm timm's BatchNormAct2d (or its SyncBatchNorm) with a ReLU, and nothing else in between?"""
    if not run.is_norm_class(original_class(norm)):
        return False
    children = dict(norm.named_children())
    act = children.pop("act", None)
    return is_plain_relu(act) and all(type(m) is nn.Identity and run.untouched(m) for m in children.values())


def fused_norm_act_class(base: type[nn.Module], min_elements: int | None = 0) -> type[nn.Module]:
    """The subclass of timm's BatchNormAct2d, or of its SyncBatchNorm, whose forward is one op."""
    known = _classes.get((base, min_elements))
    if known is None:
        original = base.forward

        @functools.wraps(original)
        def forward(self: nn.Module, x: Any) -> Any:
            if (
                issubclass(type(x), torch.Tensor)
                and x.dim() == 4
                and not (min_elements != 0 and run.is_small(x, min_elements, self))
                and not run.wants_plain_modules(x)
                and base.forward is original
                and has_relu(self)
            ):
                return run.norm_relu(self, x)
            return base.forward(self, x)

        known = _classes[base, min_elements] = _subclass(base, forward, {"": match.BN_RELU})
    return known


# ---- the guard: is the block still what was traced? ----


def _guard_source(block: nn.Module, made: Plan) -> tuple[str, dict[str, Any]]:
    names: dict[str, Any] = {
        "norm": run.is_plain_norm,
        "untouched": run.untouched,
        "relu": is_plain_relu,
        "skipped": is_skipped,
        "pool": is_plain_pool,
        "conv": run.is_plain_conv1x1,
        "same_container": is_same_container,
        "last_class": last_class,
        "missing": _MISSING,
    }
    lines = [
        "def ready(self):",
        "    training = self.training",
        "    m = self._modules",
        *_structure(block, "self", "m"),
    ]
    known = {"": "m"}
    for i, name in enumerate(sorted(made.inlined)):
        parent, _, child = name.rpartition(".")
        container = block.get_submodule(name)
        names[f"Class{i}"] = original_class(container)
        lines.append(f"    c{i} = {_child(known, parent, child)}")
        lines.append(f"    if not same_container(c{i}, Class{i}, training):")
        lines.append("        return False")
        lines.append(f"    m{i} = c{i}._modules")
        lines += _structure(container, f"c{i}", f"m{i}")
        known[name] = f"m{i}"
    checks = {
        "norm": "norm({})",
        "relu": "relu({})",
        "pass": "skipped({}, training)",
        "pool": "pool({})",
        "conv": "conv({})",
        "tensor": "last_class({}) is {}",
    }
    for i, ((name, role), modes) in enumerate(sorted(made.watched.items())):
        parent, _, child = name.rpartition(".")
        if role == "tensor":
            names[f"Last{i}"] = last_class(block.get_submodule(name))
        test = checks[role].format(_child(known, parent, child), f"Last{i}")
        mode = "" if len(modes) == 2 else "training and " if True in modes else "not training and "
        lines.append(f"    if {mode}not {test}:\n        return False")
    containers = [block, *(block.get_submodule(name) for name in sorted(made.inlined))]
    lines += _read_by_name({original_class(m): None for m in containers}, names)
    lines.append("    return True")
    return "\n".join(lines), names


def _child(known: dict[str, str], parent: str, child: str) -> str:
    """The child of the module named parent, or None; known: the variables that hold the children of some modules."""
    if parent not in known:
        grandparent, _, name = parent.rpartition(".")
        return f"getattr({_child(known, grandparent, name)}, '_modules', {{}}).get({child!r})"
    return f"{known[parent]}.get({child!r})"


def _structure(module: nn.Module, name: str, children: str) -> list[str]:
    """Attributes that steer a forward, and which children there are."""
    checks = [f"len({children}) == {len(module._modules)}"]
    checks += [f"{children}.get({child!r}, missing) is None" for child, m in module._modules.items() if m is None]
    for key, value in vars(module).items():
        if key in _own_attributes or not _is_simple(value):
            continue
        test = f"is {value!r}" if value is None or isinstance(value, bool) else f"== {value!r}"
        checks.append(f"{name}.__dict__.get({key!r}, missing) {test}")
    joined = "\n        and ".join(checks)
    return [f"    if not (\n        {joined}\n    ):\n        return False"]


def _read_by_name(classes: Collection[type], names: dict[str, Any]) -> list[str]:
    """Globals and attributes of classes that the forwards of classes read; adds their owners and values to names."""
    lines = []
    found = {(id(read.owner), read.name): read for cls in classes for read in reads(cls)}
    for i, read in enumerate(found.values()):
        names[f"owner{i}"] = read.owner
        test = f"== {read.value!r}"
        if not _is_simple(read.value) or read.value is None or isinstance(read.value, bool):
            names[f"value{i}"] = read.value
            test = f"is value{i}"
        lines.append(f"    if not getattr(owner{i}, {read.name!r}, missing) {test}:\n        return False")
    return lines


def fingerprint(block: nn.Module) -> tuple[Any, ...]:
    """Equal for blocks whose forwards give the same graphs; values are compared by identity unless they are plain."""
    return tuple((name, original_class(m), run.untouched(m), *_attributes(m)) for name, m in block.named_modules())


def _attributes(module: nn.Module) -> Iterator[Any]:
    for key, value in vars(module).items():
        if key in ("_parameters", "_buffers", "_modules"):
            yield tuple((name, t is None) for name, t in value.items())
        elif key not in _own_attributes:
            yield key, repr(value) if _is_simple(value) else id(value)


def _is_simple(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(_is_simple(item) for item in value)
    if type(value) is dict:
        return all(_is_simple(item) for pair in value.items() for item in pair)
    if type(value) is float:
        return math.isfinite(value)
    return type(value) in (bool, int, str, type(None))


def is_plain_relu(module: Any) -> bool:
    return type(module) is nn.ReLU and run.untouched(module)


def is_skipped(module: Any, training: bool) -> bool:
    return isinstance(module, nn.Module) and match.is_pass(module, training) and run.untouched(module)


def is_plain_pool(module: Any) -> bool:
    return match.is_2x2_pool(module) and run.untouched(module)


def is_same_container(module: Any, cls: type, training: bool) -> bool:
    return (
        isinstance(module, nn.Module)
        and original_class(module) is cls
        and module.training is training
        and run.untouched(module)
    )
