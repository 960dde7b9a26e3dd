"""Passes the gradient of a shortcut to the op that made the shortcut's tensor, without an addition by autograd.

The output y of a residual block has two readers: the first convolution of the next block, and the next block's
shortcut. Autograd adds their two gradients in a kernel of its own (it reads both and writes the sum). Here the reader
at the shortcut's end hands its gradient to the node that made y and returns none; the node then receives both, and its
backward op adds them while it reads them.

The gradient of y that autograd sees is then that of the other reader alone. So nothing is handed over where somebody
could look at it: hooks on y or its node, `y.retain_grad()` and `backward(inputs=[y])`, which calls it,
`torch.autograd.grad`, create_graph=True.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

_receivers: set[type] = set()  # the classes of nodes that take a second gradient
_AccumulateGrad = torch._C._functions.AccumulateGrad


def receives(function: type[torch.autograd.Function]) -> None:
    """Lets the nodes of an autograd.Function take a second gradient of their first output."""
    node: Any = function._backward_cls
    node.observed, node.seconds = False, None  # of a node that nobody has looked at or handed a gradient to
    for name in ("_register_hook_dict", "register_hook", "register_prehook"):
        setattr(node, name, _watched(getattr(node, name)))
    _receivers.add(node)


def _watched(register: Any) -> Any:
    @functools.wraps(register)
    def method(node: Any, *given: Any) -> Any:
        node.observed = True
        return register(node, *given)

    return method


def prepare(ctx: Any, y: torch.Tensor) -> None:
    """In forward, of a Function that receives: y is its first output."""
    ctx.output = weakref.ref(y)


def receiver(ctx: Any, argument: int) -> Any:
    """In backward: the node that made the argument of this number, if it takes a gradient now; else None."""
    if not isinstance(ctx, BackwardCFunction):  # compiled autograd's stand-in: its graph has this edge already
        return None
    edges = ctx.next_functions
    node, output = edges[argument]
    if type(node) not in _receivers or output != 0 or node.observed:
        return None
    y = node.output()
    if y is not None and y.retains_grad:
        return None
    if not any(type(leaf) is _AccumulateGrad and _accumulates(leaf) for leaf, _ in edges) or not _executes(node):
        return None
    if node.seconds is not None and torch._C._current_graph_task_id() in node.seconds:
        return None  # one second gradient per backward pass
    return node


def _accumulates(leaf: Any) -> bool:
    """Whether this leaf's gradient is accumulated: `torch.autograd.grad`, which may ask for that of y, does not."""
    try:
        return _executes(leaf)
    except RuntimeError:  # autograd.grad was called for this leaf
        return False


_executes = torch._C._will_engine_execute_node


def give(node: Any, gradient: torch.Tensor) -> None:
    """Hands a gradient over to a node from `receiver`."""
    stream = torch.cuda.current_stream(gradient.device) if gradient.is_cuda else None
    if node.seconds is None:
        node.seconds = {}
    node.seconds[torch._C._current_graph_task_id()] = gradient, stream


def taken(ctx: Any) -> torch.Tensor | None:
    """In backward of a Function that receives: the second gradient, if there is one."""
    if ctx.seconds is None:
        return None
    gradient, stream = ctx.seconds.pop(torch._C._current_graph_task_id(), (None, None))
    if stream is not None and stream != (current := torch.cuda.current_stream(gradient.device)):
        current.wait_stream(stream)
        gradient.record_stream(current)
    return gradient
