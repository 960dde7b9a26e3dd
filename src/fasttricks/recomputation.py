"""recompute: the backward pass rebuilds activations from tensors that are saved anyway, instead of keeping them."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Saved:
    """A tensor saved for the backward pass; torch leaves the check for changes in place to whoever has hooks."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = tensor._version

    def value(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"recompute: a tensor of shape {tuple(self.tensor.shape)} that the backward pass needs was changed in "
                f"place: it is at version {self.tensor._version}; expected: {self.version}"
            )
        return self.tensor


def _copied(parameter: Tensor | None) -> Saved | None:
    """A parameter that is sharded has no values when a reader in another module runs backward."""
    return None if parameter is None else Saved(parameter.detach().clone())


class Rebuilt:
    """An output that is computed again, once, when the first of its readers runs backward.

    It is freed when no reader needs it any more: only the readers hold this object.
    """

    __slots__ = ("_compute", "_inputs", "_result")

    def __init__(self, compute: Callable[..., Tensor], inputs: tuple[Saved | Rebuilt | None, ...]) -> None:
        self._compute = compute
        self._inputs = inputs
        self._result: Tensor | None = None

    def value(self) -> Tensor:
        if self._result is None:
            with torch.no_grad():
                self._result = self._compute(*[t if t is None else t.value() for t in self._inputs])
        return self._result


class Outputs:
    """The outputs of one forward pass that can be rebuilt."""

    def __init__(self) -> None:
        # by id: a tensor's own comparison is elementwise. The version: an output that was changed is kept as it is.
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Rebuilt]] = {}

    def add(
        self,
        output: Tensor,
        compute: Callable[..., Tensor],
        inputs: tuple[Tensor | None, ...],
        parameters: tuple[Tensor | None, ...],
        statistics: tuple[Tensor, ...],
    ) -> None:
        """output is compute(*inputs, *parameters, *statistics), bit for bit; what can be rebuilt is not kept."""
        sources = (
            *(None if t is None else self._find(t) or _batch_norm(t) or Saved(t) for t in inputs),
            *map(_copied, parameters),
            *map(Saved, statistics),
        )
        self._known[id(output)] = weakref.ref(output), output._version, Rebuilt(compute, sources)

    def _find(self, tensor: Tensor) -> Rebuilt | None:
        ref, version, rebuilt = self._known.get(id(tensor), (None, 0, None))
        return rebuilt if ref is not None and ref() is tensor and tensor._version == version else None

    def pack(self, tensor: Tensor) -> Saved | Rebuilt:
        return self._find(tensor) or Saved(tensor)


class _Thread(threading.local):
    outputs: Outputs | None = None


_this_thread = _Thread()  # each thread of DataParallel has a forward pass of its own


def _unpack(packed: Saved | Rebuilt) -> Tensor:
    return packed.value()


@contextlib.contextmanager
def recompute() -> Iterator[None]:
    """Context manager in which a forward pass keeps no output of `bn_relu` and `bn_add_relu` for the backward pass.

    The convolution (or whatever else) that reads such an output would save it. Instead the backward pass computes the
    output again, from what the op itself has saved: one elementwise pass, the same bits, so that no gradient changes.
    About half of the bytes that a residual network saves are such outputs.

    `fasttricks.fuse(model, recompute=True)` does it for every forward pass of a model. Under `torch.compile` this
    changes nothing: compiled graphs choose what to save by themselves. Within `torch.utils.checkpoint` the checkpoint
    decides. With `retain_graph=True` a rebuilt output stays until the graph is freed.

    It is no argument of the modules: what a convolution keeps of a module's output is decided while the convolution
    runs, after the module has returned. The context has to be around both.

    Raises:
        RuntimeError: in the backward pass, if a tensor that it needs was changed in place.

    Examples:
        >>> model = torch.nn.Sequential(fasttricks.nn.BatchNormReLU2d(8), torch.nn.Conv2d(8, 8, 3))
        >>> with fasttricks.recompute():
        ...     loss = model(torch.randn(2, 8, 6, 6)).sum()
        >>> loss.backward()
    """
    if torch.compiler.is_compiling() or current() is not None:
        yield
        return
    outputs = _this_thread.outputs = Outputs()
    try:
        with torch.autograd.graph.saved_tensors_hooks(outputs.pack, _unpack):
            yield
    finally:
        _this_thread.outputs = None


def current() -> Outputs | None:
    """Where an op registers an output that can be rebuilt; None outside `recompute()`."""
    return _this_thread.outputs


def _batch_norm(tensor: Tensor) -> Rebuilt | None:
    """How to compute the output of torch's own BatchNorm again, a shortcut's last module; its input is saved."""
    node: Any = tensor.grad_fn
    if type(node).__name__ != "NativeBatchNormBackward0" or not node._saved_training or tensor._version != 0:
        return None
    bias = getattr(node.next_functions[2][0], "variable", None)  # the one argument that the node does not save
    if bias is None:
        return None
    eps = node._saved_eps

    def compute(x: Tensor, weight: Tensor | None, bias: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)

    return Rebuilt(compute, (Saved(node._saved_input), _copied(node._saved_weight), _copied(bias)))
