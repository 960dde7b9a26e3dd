"""The graph of one block's forward by torch.fx: its children are leaves, except those to inline."""

from __future__ import annotations

import builtins
import contextlib
import dis
import inspect
import itertools
import operator
import random
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..nn import run
from .reads import looks_at_types

# how an argument of a call is given: not at all (its default value), or by its type
DEFAULT = "default"
TENSOR = "tensor"
TYPES: dict[str, type] = {TENSOR: torch.Tensor, "list": list, "tuple": tuple, "dict": dict}
Kinds = tuple[str, ...]
TYPE_ASKED = "type asked"  # in the meta of a node: the forward looks at the type of its value, a tensor
# a forward with more optional arguments is traced with all of them at their defaults only
_OPTIONAL = 3


class Untraceable(BaseException):  # which a forward that is traced does not catch as an Exception
    """Why a forward has no graph that always computes the same; asked: as `trace` returns it."""

    asked: Collection[int] = ()


class _Unknown(BaseException):
    """The trace must start again with the answer to: does the child of this name return a tensor?"""


def _untraceable(error: Exception) -> Untraceable:
    return Untraceable(f"torch.fx cannot trace its forward: {type(error).__name__}: {str(error)[:120]}")


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of module without what `fuse` made of it."""
    return getattr(type(module), "_fasttricks_original", type(module))


def kind_of(value: Any, default: Any, asked: bool) -> str | None:
    """The kind of value as an argument; None if no graph accepts it.

    asked: whether the forward looks at the argument's type; one that does not computes the same for every type.
    """
    if value is default or (
        isinstance(value, (bool, int, float, str)) and type(value) is type(default) and value == default
    ):
        return DEFAULT
    for kind, cls in TYPES.items():
        if issubclass(type(value), cls):
            return kind if asked else TENSOR
    return None


def _augmented(name: str) -> Callable[[Any, Any], Any]:
    """An augmented assignment as a function.

    Not that of the module operator, for which torch.fx writes the statement: it would change numbers in place as well.
    """
    assign = getattr(operator, name)

    def function(target: Any, value: Any) -> Any:
        return assign(target, value)

    function.__name__ = function.__qualname__ = name
    function.__module__ = __name__
    return function


AUGMENTED = {
    name: _augmented(name)
    for name in (
        *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
        *("iand", "ior", "ixor", "ilshift", "irshift"),
    )
}
globals().update(AUGMENTED)  # where the code of a graph finds them


class _Proxy(fx.Proxy):
    """A proxy that records augmented assignments, which are plain operations for torch.fx and lose what they change."""

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return _Attribute(self, name)

    def __len__(self) -> int:
        raise Untraceable("its forward asks for the length of a value")

    def is_a(self, classes: Any) -> bool:
        """What isinstance(value, classes) would be for the value."""
        tracer: Any = self.tracer
        if self.node.op == "call_module":
            if self.node.target not in tracer.tensors:
                raise _Unknown(self.node.target)
            if tracer.tensors[self.node.target]:
                self.node.meta[TYPE_ASKED] = True
                return issubclass(torch.Tensor, classes)
        raise Untraceable("its forward looks at the type of a value that it computes")


class _Attribute(fx.proxy.Attribute):
    """An attribute, as `x.data`, or a method of a proxy."""

    __getattr__ = _Proxy.__getattr__


def last_of(module: Any) -> nn.Module | None:
    """Whose forward makes what a call of module returns: the last one of modules in sequence; None: a hook may."""
    while isinstance(module, nn.Module) and run.untouched(module):
        if original_class(module).forward is not nn.Sequential.forward or not len(module._modules):
            return module
        module = list(module.children())[-1]
    return None


def last_class(module: Any) -> type[nn.Module] | None:
    last = last_of(module)
    return None if last is None else original_class(last)


def returns_tensor(module: nn.Module, training: bool) -> bool:
    """Whether a call of module returns one tensor: it is annotated so, or the graph of its forward ends so."""
    last = last_of(module)
    if last is None:
        return False
    cls = original_class(last)
    says = getattr(cls.forward, "__annotations__", {}).get("return")
    if says is not None:  # an Identity is annotated, but returns what it is given
        return says in (torch.Tensor, "Tensor", "torch.Tensor") and cls is not nn.Identity
    if isinstance(last, nn.modules.pooling._MaxPoolNd):
        return not last.return_indices
    try:
        signature = Signature.of(last)
        kinds = tuple(TENSOR if d is inspect.Parameter.empty else DEFAULT for d in signature.defaults)
        graph, asked = trace(last, signature, kinds, training, ())
    except Untraceable:
        return False
    return not asked and _is_tensor(graph.output_node().args[0], last, training)


_ARITHMETIC = {operator.add, operator.sub, operator.mul, operator.truediv, *AUGMENTED.values()}
_RETURNING_A_TENSOR = {
    *(torch.add, torch.mul, torch.cat, torch.stack, torch.flatten, torch.relu, torch.sigmoid, torch.tanh),
    *(F.relu, F.relu6, F.leaky_relu, F.silu, F.gelu, F.hardswish, F.dropout, F.conv2d, F.linear, F.pad),
    *(F.avg_pool2d, F.adaptive_avg_pool2d, F.interpolate),
}


def _is_tensor(value: Any, root: nn.Module, training: bool) -> bool:
    """Whether value, a node of root's graph, is known to be a tensor."""
    if not isinstance(value, fx.Node):
        return False
    if value.op == "call_module":
        return returns_tensor(root.get_submodule(str(value.target)), training)
    if value.target in _ARITHMETIC:  # of lists, it may be one
        return any(_is_tensor(operand, root, training) for operand in value.args)
    return value.target in _RETURNING_A_TENSOR


def _recorded(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, value: self.tracer.create_proxy("call_function", function, (self, value), {})


for _name, _function in AUGMENTED.items():
    setattr(_Proxy, f"__{_name}__", _recorded(_function))
    setattr(_Attribute, f"__{_name}__", _recorded(_function))


class _ArgumentProxy(_Proxy):
    """A proxy of an argument."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Read by C code: by torch, for which this is no tensor, and by the patterns of `match`."""
        if _MATCH_CLASS in sys._getframe(1).f_code.co_code[::2]:
            raise Untraceable("its forward matches an argument with a class pattern")
        return _ArgumentProxy

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        """Forwards look at the types of their arguments by hasattr, too."""
        if not (name.startswith("__") or hasattr(self.ask_type(), name)):
            raise Untraceable(f"its forward reads {name} of an argument, which a {self.ask_type().__name__} lacks")
        return super().__getattr__(name)

    def __getitem__(self, key: Any) -> fx.Proxy:
        if isinstance(key, str) and self.ask_type() is not dict:
            raise Untraceable("its forward reads an argument that is no dictionary by a key")
        return super().__getitem__(key)  # type: ignore[misc]  # torch.fx adds it to the class later

    def is_a(self, classes: Any) -> bool:
        """What isinstance(argument, classes) would be for the argument."""
        cls = self.ask_type()
        for other in classes if isinstance(classes, tuple) else get_args(classes) or (classes,):
            if isinstance(other, type) and issubclass(other, cls) and other is not cls:
                raise Untraceable(f"its forward asks whether an argument is a {other.__name__}")
        return issubclass(cls, classes)

    def ask_type(self) -> type:
        """The type of the argument; notes that it was asked for."""
        tracer: Any = self.tracer
        position = tracer.names.index(self.node.target)
        tracer.asked.add(position)
        return TYPES[tracer.kinds[position]]


_MATCH_CLASS = dis.opmap.get("MATCH_CLASS", -1)
_isinstance = builtins.isinstance
_lock, _traces = threading.Lock(), 0  # several threads may fuse models at once


def _answering(value: Any, classes: Any) -> bool:
    """isinstance, for forwards that look at the types of their arguments."""
    if not issubclass(type(value), _Proxy):
        return _isinstance(value, classes)
    frame = sys._getframe(1)
    asker = frame.f_globals.get("__name__", "")
    if (asker == "torch" or asker.startswith("torch.")) and frame.f_code.co_name != "is_tensor":  # torch.fx itself
        return _isinstance(value, classes)
    return _isinstance(value, classes) or value.is_a(classes)


@contextlib.contextmanager
def _answering_isinstance() -> Iterator[None]:
    """For what a forward calls by name. `__class__` alone would also tell C code that a proxy is a tensor."""
    global _traces
    with _lock:
        _traces += 1
        builtins.isinstance = _answering
    try:
        yield
    finally:
        with _lock:
            _traces -= 1
            if not _traces:
                builtins.isinstance = _isinstance


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, inline: Collection[str], signature: Signature, kinds: Kinds, tensors: dict[str, bool]) -> None:
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]  # wrapping the functions of math costs more than the trace
        self.inline, self.names, self.kinds, self.defaults = inline, signature.names, kinds, signature.defaults
        self.tensors = tensors  # by the name of a child: does it return one?
        self.asked: set[int] = set()
        self.state = _state()

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return name not in self.inline

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        values: list[Any] = [self.root]
        for name, kind, default in zip(self.names, self.kinds, self.defaults, strict=True):
            values.append(default if kind == DEFAULT else self.create_proxy("placeholder", name, (), {}))
        return original_class(self.root).forward, values

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ArgumentProxy(node, self) if node.op == "placeholder" else _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self._refusing(super().to_bool, obj)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return self._refusing(super().iter, obj)

    def keys(self, obj: fx.Proxy) -> Any:
        return self._refusing(super().keys, obj)

    @staticmethod
    def _refusing(ask: Callable[[fx.Proxy], Any], obj: fx.Proxy) -> Any:
        """What torch.fx answers, or an error that the forward does not catch."""
        try:
            return ask(obj)
        except fx.proxy.TraceError as error:
            raise _untraceable(error) from error

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _state() != self.state:
            raise Untraceable("its forward changes the gradient mode, autocast or saved tensors, or checkpoints")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), torch.Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            raise Untraceable("its forward makes tensors that a graph would keep as constants")
        return super().create_arg(a)


def _state() -> tuple[Any, ...]:
    """What a graph does not record, and changes what its operations do."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        tuple((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


def _holds(value: Any) -> bool:
    return type(value) in (list, dict)


def _items(value: Any) -> Iterator[Any]:
    """What a list holds, or a dictionary, whose keys and values take turns."""
    return iter(value) if type(value) is list else itertools.chain.from_iterable(value.items())


@contextlib.contextmanager
def _left_as_it_was(module: nn.Module, training: bool, inline: Collection[str]) -> Iterator[None]:
    """The modules whose forwards are traced, in the mode `training`; afterwards as before, random generators too."""
    traced = [module, *(module.get_submodule(name) for name in inline)]
    before = [dict(m.__dict__) for m in traced]
    modules = [dict(m._modules) for m in traced]
    held = [(value, list(_items(value))) for attributes in before for value in attributes.values() if _holds(value)]
    python, torch_state = random.getstate(), torch.get_rng_state()
    for m in traced:
        m.__dict__["training"] = training
    changed = None
    try:
        yield
        if random.getstate() != python or not torch.equal(torch.get_rng_state(), torch_state):
            changed = "its forward draws random numbers"
    finally:
        random.setstate(python)
        torch.set_rng_state(torch_state)
        for m, attributes, children in zip(traced, before, modules, strict=True):
            now = {**m.__dict__, "training": attributes["training"]}
            if now.keys() != attributes.keys() or any(now[k] is not v for k, v in attributes.items()):
                changed = "its forward changes attributes of its module"
            m.__dict__.clear()
            m.__dict__.update(attributes)
            if m._modules != children:
                changed = "its forward changes its children"
        for value, items in held:
            now_held = list(_items(value))
            if len(now_held) != len(items) or any(a is not b for a, b in zip(now_held, items, strict=True)):
                changed = "its forward changes a list or dictionary of its module"
                value.clear()
                value.extend(items) if type(value) is list else value.update(zip(items[::2], items[1::2], strict=True))
    if changed:
        raise Untraceable(changed)


def refuse_types(module: nn.Module) -> None:
    """Raises Untraceable if the forward of module looks at types in a way that a trace cannot answer."""
    if looks_at_types(original_class(module)):
        raise Untraceable("its forward uses type() or __class__")


@dataclass
class Signature:
    """The positional arguments of a forward, and the combinations of their kinds that are traced."""

    names: list[str]
    defaults: list[Any]

    @classmethod
    def of(cls, module: nn.Module) -> Signature:
        if "forward" in module.__dict__:
            raise Untraceable("its forward is an attribute of the instance")
        parameters = list(inspect.signature(original_class(module).forward).parameters.values())[1:]
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            raise Untraceable("its forward takes *args or **kwargs")
        if any(p.kind is p.KEYWORD_ONLY for p in parameters):
            raise Untraceable("its forward takes keyword-only arguments")
        refuse_types(module)
        return cls([p.name for p in parameters], [p.default for p in parameters])

    def combinations(self) -> list[Kinds]:
        """Every argument as a tensor, and optional ones also at their defaults."""
        optional = [d is not inspect.Parameter.empty for d in self.defaults]
        if sum(optional) > _OPTIONAL:
            return [tuple(DEFAULT if o else TENSOR for o in optional)]
        return list(itertools.product(*((DEFAULT, TENSOR) if o else (TENSOR,) for o in optional)))


def trace(
    module: nn.Module, signature: Signature, kinds: Kinds, training: bool, inline: Collection[str]
) -> tuple[fx.Graph, set[int]]:
    """The graph of module's forward, and the positions of the arguments whose type it asked for.

    Raises:
        Untraceable: there is none, or it would not compute what the forward does.
    """
    tensors: dict[str, bool] = {}
    while True:
        tracer = _Tracer(inline, signature, kinds, tensors)
        try:
            for name in inline:
                refuse_types(module.get_submodule(name))
            with _left_as_it_was(module, training, inline), _answering_isinstance():
                return tracer.trace(module), tracer.asked
        except _Unknown as child:
            (name,) = child.args
        except (Exception, Untraceable) as error:  # arbitrary code, run on proxies, may raise anything
            if isinstance(error, Exception):
                error = _untraceable(error)
            error.asked = tracer.asked
            raise error from error.__cause__
        tensors[name] = returns_tensor(module.get_submodule(name), training)
