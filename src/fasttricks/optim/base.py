"""What FusedSGD and FusedLARS share: collecting the tensors of a step, fp32 masters, loss scaling, checkpoints."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..ops.sgd import DTYPES, check_at_least_zero, check_lr, check_raw, step_raw
from ..reference.sgd import is_half
from .batch import Batch
from .distributed import (
    PLAIN,
    agree_on_found_inf,
    full,
    local,
    local_grad,
    sum_of_other_ranks,
    sum_over_shards,
)

_FP32_STATE = ("master", "momentum_buffer")


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


class _AsSaved:
    """Keeps a state tensor from the cast to the parameter's dtype in torch's load_state_dict."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _wrap_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state = {
        key: {
            name: _AsSaved(v) if isinstance(v, Tensor) and name in (*_FP32_STATE, "step") else v
            for name, v in entry.items()
        }
        if isinstance(entry, dict)
        else entry
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the fused optimizers: a torch.optim.Optimizer whose step is one call of sgd_step a device."""

    # read by torch.amp.GradScaler; on the class, so that it survives deepcopy and pickle
    _step_supports_amp_scaling = True
    # LARS: the momentum sums up lr * trust * g
    _lr_in_momentum = False
    _eps = 0.0

    # set around one step by torch.amp.GradScaler and by LossScaler
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None,
        shard_group: Any | None,
        foreach: bool | None,
        differentiable: bool,
        fused: bool | None,
    ) -> None:
        if max_grad_norm is not None:
            check_at_least_zero("max_grad_norm", max_grad_norm)
            if max_grad_norm == 0:
                raise ValueError("max_grad_norm is 0; accepted: None, or a finite number above 0")
        if differentiable:
            raise ValueError(f"differentiable is True; {type(self).__name__} cannot be differentiated: accepted: False")
        if foreach and fused:
            raise ValueError("foreach and fused are both True; torch.optim.SGD refuses that, too")
        self.max_grad_norm = max_grad_norm
        self.shard_group = shard_group
        self._reset()
        super().__init__(params, defaults)

    def _reset(self) -> None:
        # (group, device) -> lr as a float and on the device
        self._lr_on_device: dict[tuple[int, torch.device], tuple[float, Tensor]] = {}
        # parameters whose master holds a gradient of its own, made from this gradient in this version
        self._master_grads: dict[Tensor, tuple[weakref.ref[Tensor], int]] = {}
        self._last_norm: tuple[list[Tensor], Tensor | None] | None = None
        self._check_into: Tensor | None = None
        self._agree_in: list[Any] = []

    # -- parameter groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as torch.optim.Optimizer does; its fp16 and bf16 parameters get fp32 masters.

        Raises:
            TypeError: a parameter or an option is of a type or dtype that is not accepted.
            ValueError: an option is out of range.
        """
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1:
                raise ValueError(f"lr is a tensor of shape {tuple(lr.shape)}; accepted: one element")
            if lr.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"lr is a tensor of dtype {lr.dtype}; accepted: float32, float64")
            if lr.requires_grad:
                raise ValueError("lr requires grad; accepted: a tensor that does not")
        check_lr(float(lr))
        for name in ("momentum", "weight_decay"):
            check_at_least_zero(name, group[name])
        if isinstance(group["dampening"], Tensor):
            raise TypeError("dampening is Tensor; accepted: a number")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("nesterov requires a momentum above 0 and a dampening of 0")
        for i, p in enumerate(group["params"]):
            if p.dtype not in DTYPES:
                raise TypeError(
                    f"parameter {i} of the group has dtype {p.dtype}; accepted: float16, bfloat16, float32, float64"
                )
            if p.layout is not torch.strided:
                raise TypeError(f"parameter {i} of the group has layout {p.layout}; accepted: torch.strided (dense)")

    def _parts(self, group: dict[str, Any]) -> list[tuple[list[Tensor], float]]:
        """The group's parameters in lists that share a trust coefficient."""
        return [(group["params"], 0.0)]

    # -- state

    def _state_tensor(self, p: Tensor, value: Tensor) -> Tensor:
        """A copy of value with p's strides and device, in fp32 (fp64 for fp64)."""
        made = torch.empty_like(p, dtype=_compute_dtype(p.dtype), memory_format=torch.preserve_format)
        return made.requires_grad_(False).copy_(value)

    def _kept(self, p: Tensor, state: dict[str, Any], name: str) -> Tensor | None:
        """state[name], after it has followed p to another device or to or from fp64."""
        t = state.get(name)
        if t is not None and (t.device != p.device or t.dtype is not _compute_dtype(p.dtype)):
            t = state[name] = self._state_tensor(p, t)
            if "step" in state:
                state["step"] = state["step"].to(p.device)
        return t

    def _master(self, p: Tensor) -> Tensor:
        master = self._kept(p, self.state[p], "master")
        if master is None:
            master = self.state[p]["master"] = self._state_tensor(p, p.detach())
        return master

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        buffer = self._kept(p, state, "momentum_buffer")
        if buffer is None:
            zeros = torch.zeros_like(p, dtype=_compute_dtype(p.dtype), memory_format=torch.preserve_format)
            buffer = state["momentum_buffer"] = zeros.requires_grad_(False)
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        return buffer

    @torch.no_grad()
    def master_params(self) -> Iterator[Tensor]:
        """The fp32 master of each fp16 or bf16 parameter, and every other parameter itself; for clipping by other code.

        A master carries its parameter's gradient in fp32 in its `.grad`, and the next step() takes that gradient, as it
        then is. After LossScaler.unscale_(optimizer) it is unscaled.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if not is_half(p):
                    yield p
                    continue
                master = self._master(p)
                if p.grad is None:
                    self._drop_master_grad(p)
                elif self._master_grad(p) is None:
                    master.grad = p.grad.detach().to(master.dtype)
                    self._master_grads[p] = (weakref.ref(p.grad), p.grad._version)
                yield master

    def _drop_master_grad(self, p: Tensor) -> None:
        if self._master_grads.pop(p, None) is not None and "master" in self.state[p]:
            self.state[p]["master"].grad = None

    def _master_grad(self, p: Tensor) -> Tensor | None:
        """The gradient that master_params() made, as long as it belongs to p's gradient."""
        made_from = self._master_grads.get(p)
        if made_from is None:
            return None
        if p.grad is None or made_from[0]() is not p.grad:
            self._drop_master_grad(p)
            return None
        if made_from[1] != p.grad._version:
            raise RuntimeError(
                "a gradient changed after master_params() or unscale_() had copied it to its master; "
                "accumulate before them, or call optimizer.zero_grad()"
            )
        return self.state[p]["master"].grad

    @torch.no_grad()
    def sync_masters(self) -> None:
        """Sets every fp32 master to its parameter's present value.

        Not needed for correctness: a step notices parameters that were changed from outside (model.load_state_dict, an
        EMA swap, p.data edits) value by value. It also drops what the masters hold beyond the parameters' precision.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if is_half(p) and "master" in self.state[p]:
                    self._master(p).copy_(p)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim.Optimizer.zero_grad; also drops the masters' gradients."""
        for p in list(self._master_grads):
            self._drop_master_grad(p)
        super().zero_grad(set_to_none)

    # -- the step

    @property
    def grad_norm(self) -> Tensor | None:
        """The global L2 norm (unscaled, not yet clipped) of the last step that measured it, or None."""
        if self._last_norm is None:
            return None
        squares, scale = self._last_norm
        total = torch.stack([s.sum().to(squares[0].device) for s in squares]).sum().sqrt()
        return (total if scale is None else total / scale.to(total.device)).to(torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, on all parameters that have a gradient; nothing in it waits for the device.

        With `found_inf` set (by torch.amp.GradScaler, LossScaler) and not 0 on the device, nothing changes.

        Args:
            closure: called first, with gradients enabled; its result is returned.

        Raises:
            RuntimeError: a gradient is sparse.
            ValueError: a group's lr is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = self._collect()
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            scale = full(scale)
        self._measure(batches, scale)
        for device, b in batches.items():
            step_raw(
                device,
                *(b.params, b.grads, b.momentum_buffers, b.steps, b.masters, b.sizes, b.lr),
                *(b.momentum, b.dampening, b.weight_decay, b.nesterov, b.maximize, b.trust_coefficient),
                *(self._eps, self._lr_in_momentum, self.max_grad_norm or 0.0),
                *(_on(scale, device), b.found_inf, b.grad_sq, b.weight_sq),
            )
        for p in list(self._master_grads):
            self._drop_master_grad(p)
        return loss

    def _collect(self) -> dict[torch.device, Batch]:
        batches: dict[torch.device, Batch] = {}
        for index, group in enumerate(self.param_groups):
            momentum = group["momentum"]
            for params, trust in self._parts(group):
                grown: dict[torch.device, int] = {}
                batch, here = None, None
                for p in params:  # some hundred times a step: attributes of tensors are read once, checks are inline
                    grad = p.grad
                    if grad is None:
                        continue
                    if grad.layout is not torch.strided:
                        raise RuntimeError(
                            f"{type(self).__name__} does not take sparse gradients: that of a parameter of shape "
                            f"{tuple(p.shape)} in group {index} has layout {grad.layout}; use torch.optim.SGD for it"
                        )
                    device, dtype = p.device, p.dtype
                    if batch is None or device != here:
                        batch, here = batches.setdefault(device, Batch()), device
                    grown[device] = grown.get(device, 0) + 1
                    plain = type(p) in PLAIN and type(grad) is Tensor
                    half = dtype is torch.float16 or dtype is torch.bfloat16
                    state = self.state[p] if half or momentum != 0 else {}
                    if half:
                        master = state.get("master")
                        if master is None or master.device != device:
                            master = self._master(p)
                        batch.masters.append(master if plain else local(master))
                        if self._master_grads:
                            master_grad = self._master_grad(p)
                            grad = grad if master_grad is None else master_grad
                    if momentum != 0:
                        buffer = state.get("momentum_buffer")
                        if buffer is None or buffer.device != device or buffer.dtype is not _compute_dtype(dtype):
                            buffer = self._momentum(p)
                        batch.momentum_buffers.append(buffer if plain else local(buffer))
                        batch.steps.append(state["step"])
                    batch.owners.append(p)
                    batch.params.append(p if plain else local(p))
                    batch.grads.append(grad if plain else local_grad(grad, p))
                for device, count in grown.items():
                    b = batches[device]
                    b.sizes.append(count)
                    b.lr.append(self._rate(index, group, device))
                    b.momentum.append(float(momentum))
                    b.dampening.append(float(group["dampening"]))
                    b.weight_decay.append(float(group["weight_decay"]))
                    b.nesterov.append(bool(group["nesterov"]))
                    b.maximize.append(bool(group["maximize"]))
                    b.trust_coefficient.append(trust)
        return batches

    def _rate(self, index: int, group: dict[str, Any], device: torch.device) -> Tensor:
        """The group's lr on the device. A float's tensor is kept and refilled: captured graphs read the same memory."""
        lr = group["lr"]
        if isinstance(lr, Tensor):
            return lr if lr.device == device else lr.to(device, non_blocking=True)
        cached = self._lr_on_device.get((index, device))
        if cached is None:
            made = torch.full((), check_lr(lr, f"lr of group {index}"), dtype=torch.float64, device=device)
        else:
            made = cached[1]
            if cached[0] == lr:
                return made
            made.fill_(check_lr(lr, f"lr of group {index}"))
        self._lr_on_device[index, device] = (float(lr), made)
        return made

    def _measures(self) -> bool:
        return self.max_grad_norm is not None

    def _measure(self, batches: dict[torch.device, Batch], scale: Tensor | None) -> None:
        """The check pass, where a scaler, clipping or LARS asks for it: found_inf and norms of every batch."""
        given = getattr(self, "found_inf", None)
        given = None if given is None else full(given)
        into, norms = self._check_into, self._measures()
        flags = [] if given is None else [given]
        if into is not None or norms:
            for device, b in batches.items():
                b.found_inf = torch.zeros((), device=device)
                if norms:
                    b.grad_sq = torch.zeros(len(b.params), dtype=torch.float64, device=device)
                if any(b.trust_coefficient):
                    b.weight_sq = torch.zeros(len(b.params), dtype=torch.float64, device=device)
                weights = (b.params, b.masters) if b.weight_sq is not None else ([], [])
                check_raw(device, b.grads, *weights, b.found_inf, b.grad_sq, b.weight_sq)
                for squares in (b.grad_sq, b.weight_sq):
                    if squares is not None:
                        sum_over_shards(squares, b.owners)
                flags.append(b.found_inf)
        groups = self.agreeing(self._agree_in)
        if not batches and not groups:  # a rank of a group takes part also where it has no gradients
            return
        if norms:
            self._join_norms(list(batches.values()), scale)
        if not flags:
            if not groups or not norms:
                return
            flags.append(torch.zeros((), device=self._home()))
        home = flags[0].device
        found = flags[0] if len(flags) == 1 else torch.stack([f.reshape(()).to(home) for f in flags]).amax()
        if into is not None or norms:
            owners = [p for b in batches.values() for p in b.owners]
            agree_on_found_inf(found, owners, groups)
        if into is not None:
            into.copy_(torch.maximum(into, found.reshape(()).to(into.device)))
        for device, b in batches.items():
            b.found_inf = _on(found, device)

    def agreeing(self, groups: list[Any]) -> list[Any]:
        """These process groups, and shard_group if it is not among them."""
        mine = self.shard_group
        return groups if mine is None or any(g is mine for g in groups) else [*groups, mine]

    def _home(self) -> torch.device:
        """Where the collectives of a rank without gradients run."""
        params = [p for group in self.param_groups for p in group["params"]]
        if params or self._check_into is None:
            return params[0].device if params else torch.device("cpu")
        return self._check_into.device

    def _join_norms(self, batches: list[Batch], scale: Tensor | None) -> None:
        """Each batch must know the norm of all, on several devices and ranks: the others' sum joins its own."""
        squares = [b.grad_sq for b in batches if b.grad_sq is not None]
        sums = [s.sum() for s in squares]
        if self.shard_group is not None:
            home = sums[0].device if sums else self._home()
            own = torch.stack([torch.zeros((), dtype=torch.float64, device=home), *[s.to(home) for s in sums]]).sum()
            elsewhere = sum_of_other_ranks(own, self.shard_group)
            squares.append(elsewhere)
            sums.append(elsewhere)
        self._last_norm = (squares, scale) if squares else None
        if len(sums) < 2 or self.max_grad_norm is None:
            return
        for k, b in enumerate(batches):
            assert b.grad_sq is not None
            others = [s.to(b.grad_sq.device) for j, s in enumerate(sums) if j != k]
            b.grad_sq = torch.cat([b.grad_sq, torch.stack(others)])

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer.state_dict; loads into torch.optim.SGD, too.

        state[i]: momentum_buffer (fp32, fp64 for fp64) and step, its count of steps, once the parameter has been
        stepped with momentum; master (fp32) for an fp16 or bf16 parameter.
        """
        result = super().state_dict()
        entries = {k: s for k, s in result["state"].items() if isinstance(s, dict) and "step" in s}
        # a buffer that no step has written yet (every one was skipped) is not state: its first step is still to come
        by_device: dict[torch.device, list[Any]] = {}
        for k, s in entries.items():
            by_device.setdefault(s["step"].device, []).append(k)
        for keys in by_device.values():
            counts = torch.stack([entries[k]["step"].reshape(()) for k in keys]).tolist()
            for k, count in zip(keys, counts, strict=True):
                if count == 0:
                    kept = {n: v for n, v in entries[k].items() if n not in ("momentum_buffer", "step")}
                    if kept:
                        result["state"][k] = kept
                    else:
                        del result["state"][k]
        return result

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what state_dict() gave, or a checkpoint of torch.optim.SGD; masters and momentum stay as saved.

        The parameters are the authority: where a loaded master does not round to its parameter, the next step takes the
        parameter's value. A parameter without a master in the checkpoint gets one from its value.

        Raises:
            ValueError: the checkpoint has other groups or shapes.
        """
        handle = self.register_load_state_dict_pre_hook(_wrap_state)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = {"max_grad_norm": self.max_grad_norm, "shard_group": self.shard_group}
        return {**super().__getstate__(), **own}

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reset()
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # torch adds it to defaults on every load; no group of ours has it
                    group.setdefault(name, value)
        for p in chain.from_iterable(group["params"] for group in self.param_groups):
            if p in self.state:
                self._settle(p, self.state[p])

    def _settle(self, p: Tensor, state: dict[str, Any]) -> None:
        """Turns loaded state into state of our own: fp32, on p's device, with p's strides, and with a step count."""
        loaded = False
        for name in (*_FP32_STATE, "step"):
            value = state.get(name)
            if not isinstance(value, _AsSaved):
                continue
            loaded = True
            if name == "step":
                state[name] = value.tensor.detach().reshape(()).to(p.device, torch.float32, copy=True)
            elif value.tensor.shape != p.shape:
                raise ValueError(
                    f"state_dict: {name} of a parameter has shape {tuple(value.tensor.shape)}; accepted: "
                    f"{tuple(p.shape)}, the parameter's. Is it the checkpoint of another model?"
                )
            else:
                state[name] = self._state_tensor(p, value.tensor)
        if state.get("momentum_buffer", self) is None:  # torch.optim.SGD before its first step
            del state["momentum_buffer"]
        if "momentum_buffer" not in state:
            state.pop("step", None)
        elif "step" not in state:
            state["step"] = torch.ones((), dtype=torch.float32, device=p.device)
        if loaded and not is_half(p):
            state.pop("master", None)  # p, from the same checkpoint, is the authority


def _on(t: Tensor | None, device: torch.device) -> Tensor | None:
    return t if t is None or t.device == device else t.to(device, non_blocking=True)
