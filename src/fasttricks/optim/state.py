"""The fp32 state of parameters: masters, momentum, step counts and masters' gradients; how checkpoints become state."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import fail
from ..ops.sgd_call import compute_dtype, is_half
from ..reference.sgd import masters_as_seen

FP32_STATE = ("master", "momentum_buffer")
STATE = (*FP32_STATE, "step")


def state_tensor(p: Tensor, value: Tensor) -> Tensor:
    """A copy of value with p's strides and device, in fp32 (fp64 for fp64)."""
    made = torch.empty_like(p, dtype=compute_dtype(p.dtype), memory_format=torch.preserve_format)
    return made.requires_grad_(False).copy_(value)


def _kept(p: Tensor, state: dict[str, Any], name: str) -> Tensor | None:
    """state[name], moved to p's device and compute dtype if either changed."""
    t = state.get(name)
    if t is not None and (t.device != p.device or t.dtype is not compute_dtype(p.dtype)):
        t = state[name] = state_tensor(p, t)
        if "step" in state:
            state["step"] = state["step"].to(p.device)
    return t


def master_of(p: Tensor, state: dict[str, Any]) -> Tensor:
    """The fp32 master of a half parameter, made from its value if it has none."""
    master = _kept(p, state, "master")
    if master is None:
        master = state["master"] = state_tensor(p, p.detach())
    return master


def momentum_of(p: Tensor, state: dict[str, Any]) -> Tensor:
    """The momentum buffer; a new one comes with a step count of 0, and is not read by its first step."""
    buffer = _kept(p, state, "momentum_buffer")
    if buffer is None:
        zeros = torch.zeros_like(p, dtype=compute_dtype(p.dtype), memory_format=torch.preserve_format)
        buffer = state["momentum_buffer"] = zeros.requires_grad_(False)
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
    return buffer


def master_value(p: Tensor, state: dict[str, Any]) -> Tensor:
    """A copy of p as the next step will see it: its master, or its own value if that was changed from outside."""
    return masters_as_seen(p.detach(), master_of(p, state))


class MasterGrads:
    """The fp32 gradients of masters, for clipping by other code; valid until the parameter's gradient changes."""

    def __init__(self) -> None:
        # parameter -> (master, the gradient that the master's was made from, that gradient's version)
        self._made: dict[Tensor, tuple[Tensor, weakref.ref[Tensor], int]] = {}

    def __bool__(self) -> bool:
        return bool(self._made)

    def give(self, p: Tensor, master: Tensor) -> None:
        """Puts p's gradient, in fp32, on its master, unless it is there already."""
        if p.grad is None:
            self.drop(p)
        elif self.get(p) is None:
            master.grad = p.grad.detach().to(master.dtype)
            self._made[p] = (master, weakref.ref(p.grad), p.grad._version)

    def get(self, p: Tensor) -> Tensor | None:
        """The gradient of p's master, if it was made from p's present one."""
        if p not in self._made:
            return None
        master, made_from, version = self._made[p]
        if p.grad is None or made_from() is not p.grad:
            self.drop(p)
            return None
        if version != p.grad._version:
            raise RuntimeError(
                "a gradient changed after master_params() or unscale_() had copied it to its master; accumulate before "
                "them, and clip optimizer.master_params() (or give max_grad_norm), not model.parameters(); "
                "optimizer.zero_grad() drops the copies"
            )
        return master.grad

    def drop(self, p: Tensor) -> None:
        if p in self._made:
            self._made.pop(p)[0].grad = None

    def clear(self) -> None:
        for p in list(self._made):
            self.drop(p)


# ---- checkpoints ----


class AsSaved:
    """Protects a state tensor from torch's load_state_dict, which casts to the parameter's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def wrapped(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state_dict with its state tensors kept from casts; settle() unwraps them."""
    state = {
        key: {name: AsSaved(v) if isinstance(v, Tensor) and name in STATE else v for name, v in entry.items()}
        if isinstance(entry, dict)
        else entry
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def settle(p: Tensor, state: dict[str, Any]) -> None:
    """Converts loaded state: fp32, on p's device, with p's strides, and with a step count."""
    loaded = False
    for name in STATE:
        value = state.get(name)
        if not isinstance(value, AsSaved):
            continue
        loaded = True
        if name == "step":
            state[name] = value.tensor.detach().reshape(()).to(p.device, torch.float32, copy=True)
        else:
            state[name] = state_tensor(p, value.tensor)
    if state.get("momentum_buffer", p) is None:  # torch.optim.SGD before its first step
        del state["momentum_buffer"]
    if "momentum_buffer" not in state:
        state.pop("step", None)
    elif "step" not in state:
        state["step"] = torch.ones((), dtype=torch.float32, device=p.device)
    if loaded and not is_half(p):
        state.pop("master", None)  # p, from the same checkpoint, takes precedence


def without_unwritten_momentum(state: dict[Any, Any]) -> dict[Any, Any]:
    """The state to save: a momentum buffer that no step has written yet (all were skipped) is left out."""
    by_device: dict[torch.device, list[Any]] = {}
    for key, entry in state.items():
        if isinstance(entry, dict) and "step" in entry:
            by_device.setdefault(entry["step"].device, []).append(key)
    unwritten: set[Any] = set()
    for keys in by_device.values():
        counts = torch.stack([state[key]["step"].reshape(()) for key in keys]).tolist()
        unwritten |= {key for key, count in zip(keys, counts, strict=True) if count == 0}
    kept = {
        key: {name: v for name, v in entry.items() if name not in ("momentum_buffer", "step")}
        if key in unwritten
        else entry
        for key, entry in state.items()
    }
    return {key: entry for key, entry in kept.items() if entry or key not in unwritten}


def regrouped(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Maps a state_dict with other groups onto `groups` by parameter name; the options are those of `groups`.

    Raises:
        ValueError: the parameters are not named on both sides, or not the same.
    """
    saved = state_dict["param_groups"]
    sizes, have = ([len(g["params"]) for g in gs] for gs in (saved, groups))
    if not all("param_names" in g for g in (*saved, *groups)):
        raise ValueError(
            f"state_dict has groups of {sizes} parameters; accepted: groups of {have}, or any groups if the parameters "
            "are named on both sides: give the optimizers model.named_parameters() or param_groups(..., named=True). "
            "To name those of a saved state, load it into torch.optim.SGD(model.named_parameters()) and take that "
            "optimizer's state_dict(). Or is it the checkpoint of another model?"
        )
    keys = {name: key for g in saved for name, key in zip(g["param_names"], g["params"], strict=True)}
    names = [name for g in groups for name in g["param_names"]]
    if different := sorted(set(keys) ^ set(names)):
        raise ValueError(
            f"state_dict has other parameters than the optimizer; those of one only: {', '.join(different)}"
        )
    warnings.warn(
        "state_dict has other groups than the optimizer: its state is loaded by the parameters' names, and the options "
        "of the groups (lr, momentum, weight_decay, ...) stay those of the optimizer",
        stacklevel=5,
    )
    index = {name: i for i, name in enumerate(names)}
    state = {i: state_dict["state"][keys[name]] for name, i in index.items() if keys[name] in state_dict["state"]}
    options = [{**g, "params": [index[name] for name in g["param_names"]]} for g in groups]
    return {**state_dict, "state": state, "param_groups": options}


def check_form(state_dict: Any, kind: str) -> None:
    """Raises unless state_dict has the form of an optimizer's: {"state": {...}, "param_groups": [{...}, ...]}."""
    op, accepted = f"{kind}.load_state_dict", "the state_dict of an optimizer, {'state': ..., 'param_groups': ...}"
    if not isinstance(state_dict, Mapping):
        fail(op, "state_dict", f"is a {type(state_dict).__name__}", accepted, TypeError)
    if missing := [name for name in ("state", "param_groups") if name not in state_dict]:
        has = ", ".join(map(repr, list(state_dict)[:4])) or "nothing"
        fail(op, "state_dict", f"lacks {', '.join(missing)} (it has {has})", accepted)
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping):
        fail(op, "state_dict['state']", f"is a {type(state).__name__}", "a dict", TypeError)
    if not isinstance(groups, (list, tuple)) or not all(isinstance(g, Mapping) and "params" in g for g in groups):
        given = f"is a {type(groups).__name__}, or one of other things"
        fail(op, "state_dict['param_groups']", given, "a list of dicts with 'params'", TypeError)


def check_loaded(state_dict: dict[str, Any], groups: list[dict[str, Any]], options: Iterable[str], kind: str) -> None:
    """Raises ValueError unless the state_dict is one of an optimizer with these groups and options, or of SGD's."""
    options = list(options)
    sgd = [*torch.optim.SGD([torch.empty(0, device="cpu")]).defaults, "param_names"]
    of_schedules = ("initial_lr", "swa_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")
    params = [p for g in groups for p in g["params"]]
    keys = [key for g in state_dict["param_groups"] for key in g["params"]]
    for i, (key, p) in enumerate(zip(keys, params, strict=True)):
        entry = state_dict["state"].get(key, {})
        if unknown := [name for name in entry if name not in STATE]:
            raise ValueError(
                f"state_dict: the state of parameter {i} has {', '.join(unknown)}; accepted: {', '.join(STATE)}. "
                f"It is that of another optimizer than {kind} or torch.optim.SGD"
            )
        for name in FP32_STATE:
            value = entry.get(name)
            if isinstance(value, Tensor) and value.shape != p.shape:
                raise ValueError(
                    f"state_dict: {name} of a parameter has shape {tuple(value.shape)}; accepted: "
                    f"{tuple(p.shape)}, the parameter's. Is it the checkpoint of another model?"
                )
    for i, (saved, own) in enumerate(zip(state_dict["param_groups"], groups, strict=True)):
        # checkpoints from before torch 1.11 have no maximize
        if missing := [name for name in options if name not in saved and name != "maximize"]:
            raise ValueError(
                f"state_dict: group {i} lacks {', '.join(missing)}; accepted: groups with {', '.join(options)}. "
                f"It is that of another optimizer than {kind}"
            )
        known = {*options, *sgd, *of_schedules, *own, "params"}
        if unknown := [name for name in saved if name not in known]:
            raise ValueError(
                f"state_dict: group {i} has {', '.join(unknown)}, of which {kind} knows nothing; accepted: "
                f"{', '.join(options)}, and options that the optimizer's own group has"
            )
