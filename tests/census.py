"""Ground truth for `fasttricks.fuse`: the pairs of a model, found from the functions that its forward pass calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fasttricks.nn import run

RELU = {"relu", "relu_"}
ADD = {"add", "add_", "__add__", "__iadd__", "__radd__"}


@dataclass
class Value:
    """What one torch function returned."""

    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: str
    users: list[Value] = field(default_factory=list)

    def only_user(self) -> Value | None:
        return self.users[0] if len(self.users) == 1 else None


class _Watch(TorchFunctionMode):
    """Records which values each function reads. It keeps them alive, so that no id is reused."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Value] = []
        self.current: dict[int, Value] = {}
        self.alive: list[Any] = []
        self.stack: list[str] = [""]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        outs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        name = getattr(func, "__name__", "")
        if not outs or name == "__get__":
            return out
        value = Value(name, args, kwargs, self.stack[-1])
        readers = [self.current[id(t)] for t in tree_leaves((args, kwargs)) if id(t) in self.current]
        for read in {id(v): v for v in readers}.values():
            read.users.append(value)
        self.values.append(value)
        for t in outs:
            self.current[id(t)] = value
            self.alive.append(t)
        return out


def watch(model: nn.Module, *inputs: Any) -> list[Value]:
    """The values of one forward pass, each with the name of the innermost module that computed it."""
    watcher = _Watch()
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, a, name=name: watcher.stack.append(name)))
        handles.append(module.register_forward_hook(lambda m, a, out: (watcher.stack.pop(), None)[1], always_call=True))
    try:
        with watcher:
            out = model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    seen_outside = Value("return", (), {}, "")
    for t in tree_leaves(out):
        if id(t) in watcher.current:
            watcher.current[id(t)].users.append(seen_outside)
    return watcher.values


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) and len(set(value)) == 1 else value


def _is_pool(value: Value) -> bool:
    """Whether it is a 2x2 average pool."""
    if value.function != "avg_pool2d":
        return False
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given = {**dict(zip(names, value.args[1:], strict=False)), **value.kwargs}
    sizes = (_one(given["kernel_size"]), _one(given.get("stride") or 2), _one(given.get("padding", 0)))
    return sizes == (2, 2, 0) and given.get("divisor_override") is None


def _is_conv(value: Value) -> bool:
    """Whether it is a 1x1 convolution."""
    if value.function != "conv2d":
        return False
    names = ("bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(names, value.args[2:], strict=False)), **value.kwargs}
    weight = given.get("weight", value.args[1] if len(value.args) > 1 else None)
    plain = (_one(given.get("stride", 1)), _one(given.get("padding", 0)), given.get("groups", 1))
    return tuple(weight.shape[2:]) == (1, 1) and plain in ((1, 0, 1), (1, "valid", 1))


def census(model: nn.Module, *inputs: Any) -> dict[str, list[set[str]]]:
    """For each op the pairs that it could replace, each as the names of modules that may call it.

    The module is the BatchNorm or the convolution; if the outputs of two BatchNorms are added, either one.
    """
    found: dict[str, list[set[str]]] = {"bn_relu": [], "bn_add_relu": [], "avgpool_conv1x1": []}
    added: dict[int, set[str]] = {}
    for value in watch(model, *inputs):
        user = value.only_user()
        if user is None:
            continue
        if value.function == "batch_norm" and user.function in RELU:
            found["bn_relu"].append({value.module})
        elif value.function == "batch_norm" and user.function in ADD:
            last = user.only_user()
            if last is not None and last.function in RELU:
                if id(user) not in added:
                    found["bn_add_relu"].append(added.setdefault(id(user), set()))
                added[id(user)].add(value.module)
        elif _is_pool(value) and _is_conv(user):
            found["avgpool_conv1x1"].append({user.module})
        elif _is_conv(value) and _is_pool(user):
            after = user.only_user()
            if after is None or not _is_conv(after):  # else the pool is that convolution's
                found["avgpool_conv1x1"].append({value.module})
    return found


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Context manager that counts the calls of each fused op by modules and fused blocks."""
    counts = {"bn_relu": 0, "bn_add_relu": 0, "avgpool_conv1x1": 0}

    def counting_pools(*args: Any, **kwargs: Any) -> Any:
        counts["avgpool_conv1x1"] += 1
        return pool(*args, **kwargs)

    def counting_norms(op: str, *args: Any) -> Any:
        counts[op] += 1
        return norm(op, *args)

    def counting_two_norms(*args: Any) -> Any:
        counts["bn_add_relu"] += 1
        return two_norms(*args)

    pool, norm, two_norms = run.avgpool_conv1x1, run.call, run.call_of_two
    with (
        mock.patch.object(run, "avgpool_conv1x1", counting_pools),
        mock.patch.object(run, "call", counting_norms),
        mock.patch.object(run, "call_of_two", counting_two_norms),
    ):
        yield counts
