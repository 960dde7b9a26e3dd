"""What a forward reads by name, besides the attributes of its module: globals, and attributes of its class."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")


class Read(NamedTuple):
    """`owner.name`, of a Python module or a class, and its value."""

    owner: Any
    name: str
    value: Any


def reads(cls: type) -> list[Read]:
    """What the forward of cls reads, and the functions and methods that it calls, other than those of torch."""
    found: dict[tuple[int, str], Read] = {}
    pending: list[Any] = [*_of_class(cls, "forward")]
    while pending:
        read = pending.pop()
        if (id(read.owner), read.name) in found:
            continue
        found[id(read.owner), read.name] = read
        if _is_followed(read.value):
            for instruction in _instructions(read.value.__code__):
                if instruction.opname == "LOAD_GLOBAL":
                    pending += _of_globals(read.value, instruction.argval)
                elif instruction.opname in _ATTRIBUTE:
                    pending += _of_class(cls, instruction.argval)
    return list(found.values())


def looks_at_types(cls: type) -> bool:
    """Whether the forward of cls, or a function that it calls, uses `type(...)` or `.__class__`."""
    for read in reads(cls):
        if _is_followed(read.value):
            code = read.value.__code__
            if "type" in global_names(code) and "type" not in read.value.__globals__:
                return True
            if any(i.opname in _ATTRIBUTE and i.argval == "__class__" for i in _instructions(code)):
                return True
    return False


def _is_followed(value: Any) -> bool:
    """Whether value is a function whose code is read as well: one that torch does not define."""
    return isinstance(value, FunctionType) and not _is_torch(value.__module__)


def _is_torch(module: str | None) -> bool:
    return (module or "").partition(".")[0] in ("torch", "builtins")


def _instructions(code: CodeType) -> Iterator[dis.Instruction]:
    yield from dis.get_instructions(code)
    for constant in code.co_consts:  # functions within the function
        if isinstance(constant, CodeType):
            yield from _instructions(constant)


def global_names(code: CodeType) -> set[str]:
    """The globals and built-in functions that code uses."""
    return {instruction.argval for instruction in _instructions(code) if instruction.opname == "LOAD_GLOBAL"}


def _of_globals(function: FunctionType, name: str) -> Iterator[Read]:
    module = sys.modules.get(function.__module__)
    if module is None or vars(module) is not function.__globals__ or name not in function.__globals__:
        return
    value = function.__globals__[name]
    if not isinstance(value, ModuleType):
        yield Read(module, name, value)


def _of_class(cls: type, name: str) -> Iterator[Read]:
    owner = next((c for c in cls.__mro__ if name in vars(c)), None)
    if owner is None or _is_torch(owner.__module__):
        return
    value = getattr(cls, name)
    if value is getattr(cls, name):  # a classmethod is another object at each look
        yield Read(cls, name, value)
