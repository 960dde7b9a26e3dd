"""Detection of torch.func transforms, forward-mode AD and tracing by torch.fx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.autograd import forward_ad


def active() -> bool:
    """Whether a transform of torch.func runs (grad, jvp, vmap, ...), or a level of forward-mode AD is entered.

    Kernels have no rules for these; the torch ops of the references do.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def functionalizes() -> bool:
    """Whether torch.func.functionalize is among the transforms that run."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Functionalize for level in stack)


def exports() -> bool:
    """Whether torch.export or torch.onnx.export records, for programs that may not have the ops of fasttricks."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()


def recorded(function: Callable[..., Any], x: fx.Proxy, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The call of a function as one node of the graph that torch.fx traces."""
    return x.tracer.create_proxy("call_function", function, args, options)
