"""Base of the modules that hold one torch module and expose its parameters and buffers as their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_SHARED = ("_parameters", "_buffers", "_non_persistent_buffers_set")


def delegated(name: str, doc: str) -> Any:
    """A property that reads, writes and deletes an attribute of the held module."""

    def read(self: Holder) -> Any:
        return getattr(self.held, name)

    def write(self: Holder, value: Any) -> None:
        setattr(self.held, name, value)

    def delete(self: Holder) -> None:
        delattr(self.held, name)

    return property(read, write, delete, doc=doc)


class Holder(nn.Module):
    """A module that computes the held module and the operations after it in one op.

    The held module is an ordinary child, so that tools that look for an `nn.BatchNorm2d` or an `nn.Conv2d` find one,
    and may convert, freeze or replace it; a replacement is called as it is. The holder itself is neither class, so such
    tools do not replace it, which would drop the operations after the held module.

    Both share the same dictionaries of parameters and buffers. Names are those of the held module: the parameters
    of a model are "bn1.weight", not "bn1.norm.weight", and its state_dict has each of them once.
    """

    _held_name: str  # the name of the child

    # FSDP and pruning replace a parameter by a plain attribute: the held module must get it
    weight = delegated("weight", "of the held module")
    bias = delegated("bias", "of the held module")

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self._modules[self._held_name] = held
        self._share()

    @property
    def held(self) -> Any:
        """The module that is held."""
        return self._modules[self._held_name]

    def _share(self) -> None:
        for name in _SHARED:
            self.__dict__[name] = self.held.__dict__[name]
        # of the format of a state_dict
        self.__dict__["_version"] = getattr(self.held, "_version", 1)

    # ---- a replaced child shares its parameters and buffers too ----

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            object.__setattr__(self, name, value)  # nn.Module would register a Parameter here, not in the child
            return
        super().__setattr__(name, value)
        if name == self._held_name:
            self._share()

    def register_module(self, name: str, module: nn.Module | None) -> None:
        super().register_module(name, module)
        if name == self._held_name:
            self._share()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, module)
        if name == self._held_name:
            self._share()

    # ---- each parameter and buffer once ----

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.held._apply(fn, recurse)
        return self

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As nn.Module; with duplicates, this module alone.

        torch.func.functional_call replaces each name of a tied tensor and restores each: in one dictionary that both
        modules share, the second would restore the replacement.
        """
        return super().named_modules(memo, prefix) if remove_duplicate else iter([(prefix, self)])

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As nn.Module; with recurse=False none: tools that sort parameters by class find them in the child.

        With duplicates they are its own: FSDP asks each of named_modules(remove_duplicate=False), without the child.
        """
        if recurse or not remove_duplicate:
            return super().named_parameters(prefix, recurse, remove_duplicate)
        return iter(())

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """As named_parameters."""
        if recurse or not remove_duplicate:
            return super().named_buffers(prefix, recurse, remove_duplicate)
        return iter(())

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the state_dict of the held module."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "") + self._held_name
        for name in [*self._parameters, *self._buffers]:
            state.pop(f"{prefix}.{name}", None)
        if hasattr(state, "_metadata"):
            state._metadata.pop(prefix, None)
        return state

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        held = self.held
        held._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        # nn.Module visits the child next: it finds what it has just loaded, and neither misses nor changes anything
        for name, tensor in [*held._parameters.items(), *held._buffers.items()]:
            if tensor is not None:
                state_dict[f"{prefix}{self._held_name}.{name}"] = tensor
        # the held module does not know the other children, nor its own by these names; they load and check themselves
        children = [f"{prefix}{name}." for name in self._modules if name != self._held_name]
        children += [f"{prefix}{self._held_name}.{name}." for name in held._modules]
        unexpected[:] = [key for key in unexpected if not key.startswith(tuple(children))]

    def _fqn_modifiers(self) -> dict[str, str]:
        """For torch.distributed.checkpoint: the names of the child's tensors are without its own name."""
        return {"": self._held_name}

    # ---- parametrizations ----

    def _lent(self, compute: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        """compute(*args), with the tensors that are parametrized on this module as attributes of the held one."""
        attributes = self.held.__dict__
        names = [name for name in ("weight", "bias", *_STATISTICS) if is_parametrized(self, name)]
        for name in names:
            attributes[name] = getattr(self, name)
        try:
            return compute(*args)
        finally:
            for name in names:
                del attributes[name]

    # ---- copies ----

    def __deepcopy__(self, memo: dict[int, Any]) -> Holder:
        group = getattr(self.held, "process_group", None)
        if group is not None:
            memo[id(group)] = group  # a copy works with the same ranks
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__dict__, memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        """Without a process group, which cannot be pickled: as of nn.SyncBatchNorm, None is the default group."""
        state = self.__dict__.copy()
        if getattr(self.held, "process_group", None) is not None:
            held = copy.copy(self.held)
            held.process_group = None
            state["_modules"] = {**self._modules, self._held_name: held}
        return state

    # ---- tools that read forwards ----

    def _leaf(self, *args: Any) -> fx.Proxy | None:
        """The call of this module as one node, if torch.fx traces; None if it does not."""
        for value in args:
            if isinstance(value, fx.Proxy):
                tracer = value.tracer
                return tracer.create_proxy("call_module", tracer.path_of_module(self), args, {})  # type: ignore[attr-defined]
        return None

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError(
            f"torch.jit.script cannot compile {type(self).__name__}, which calls an op of fasttricks; torch.export and "
            "torch.jit.trace can, or build the model from torch's modules for it (the state_dict is the same)"
        )

    def extra_repr(self) -> str:
        return self.held.extra_repr()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})" if type(self.held) in self._plain else super().__repr__()

    _plain: tuple[type[nn.Module], ...] = ()  # the classes that a holder holds by default, which its repr does not show
