"""Autograd and torch.func rules of raw ops, written as kernels: torch.library.register_autograd accepts no op that
changes an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import transforms

_libraries: list[torch.library.Library] = []  # their kernels go with them


def library_of(namespace: str, fakes: dict[str, Callable[..., Any]]) -> torch.library.Library:
    """Registers the fakes of raw ops of a namespace; what else is registered belongs to the library returned."""
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
    _libraries.append(torch.library.Library(namespace, "IMPL"))
    return _libraries[-1]


def differentiable(
    library: torch.library.Library,
    op: Any,
    ordered: Callable[..., tuple[tuple[Any, ...], Any]],
    function: type[torch.autograd.Function],
    composed: Callable[..., Any],
) -> None:
    """Registers the rules of an op with a derivative.

    Args:
        ordered: turns the arguments of the op into the tensors that may need gradients, and all others.
        function: takes these tensors and the others, and True: it returns what the op returns.
        composed: takes the same; returns what the op returns, made of differentiable operations of torch.
    """

    def autograd(*given: Any) -> Any:
        tensors, others = ordered(*given)
        if transforms.active():
            return composed(*tensors, others)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return function.apply(*tensors, others, True)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*given)

    def batched(*given: Any) -> Any:
        tensors, others = ordered(*given)
        return composed(*tensors, others)

    name = op._schema.name.partition("::")[2]
    library.impl(name, autograd, "Autograd")
    library.impl(name, batched, "FuncTorchBatched")


def opaque(library: torch.library.Library, op: Any, accepted: str) -> None:
    """Registers the rules of an op without a derivative; accepted: what the error recommends."""

    def refuse() -> None:
        raise RuntimeError(f"{op._schema.name} has no derivative and no rule for torch.func; accepted: {accepted}")

    def autograd(*given: Any) -> Any:
        if transforms.active():
            refuse()
        with torch._C._AutoDispatchBelowAutograd():
            return op(*given)

    name = op._schema.name.partition("::")[2]
    library.impl(name, autograd, "Autograd")
    library.impl(name, lambda *given: refuse(), "FuncTorchBatched")
