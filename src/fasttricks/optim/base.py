"""Base of FusedSGD and FusedLARS: a torch.optim.Optimizer whose step is one call of sgd_step per device."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import FLOATS, check_number
from ..ops.sgd import run_step
from ..ops.sgd_call import is_half, widest_dtype
from .check import Norms, Scaling, check_grads, check_pass, on, unscale_grads_
from .distributed import full, local_grad
from .plan import Options, Part, Plan
from .state import (
    MasterGrads,
    check_form,
    check_loaded,
    master_of,
    master_value,
    regrouped,
    settle,
    without_unwritten_momentum,
    wrapped,
)


class StepData:
    """What outlives a call between backward passes and steps.

    An object of its own, since the wrappers of Lightning and Fabric take over an optimizer's attributes once, and step
    the optimizer itself: both see the same.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.master_grads = MasterGrads()
        self.norms: Norms | None = None
        self.scaling: Scaling | None = None


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the fused optimizers: masters, clipping, loss scaling, checkpoints."""

    # LARS: the momentum accumulates lr * trust * g
    _lr_in_momentum = False
    _eps = 0.0

    # set around one step by torch.amp.GradScaler
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None,
        shard_group: Any | None,
        unscale_in_step: bool,
        foreach: bool | None,
        differentiable: bool,
        fused: bool | None,
    ) -> None:
        if max_grad_norm is not None and check_number(type(self).__name__, "max_grad_norm", max_grad_norm, 0.0) == 0:
            raise ValueError("max_grad_norm is 0; accepted: None, or a finite number above 0")
        if differentiable:
            raise ValueError(f"differentiable is True; {type(self).__name__} cannot be differentiated: accepted: False")
        if foreach and fused:
            raise ValueError("foreach and fused are both True; torch.optim.SGD refuses that, too")
        self.max_grad_norm = max_grad_norm
        self.shard_group = shard_group
        self.unscale_in_step = unscale_in_step
        self._reset()
        super().__init__(params, defaults)

    def _reset(self) -> None:
        self._plan: Plan | None = None
        # (group, device) -> lr as a float and on the device
        self._lr_on_device: dict[tuple[int, torch.device], tuple[float, Tensor]] = {}
        self._step_data = getattr(self, "_step_data", None) or StepData()
        self._step_data.reset()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Read by torch.amp.GradScaler: whether step() takes scaled gradients."""
        return self.unscale_in_step

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
            lr = lr.item()
        check_number(type(self).__name__, "lr", lr, 0.0)
        self._group_options(0, group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("nesterov requires a momentum above 0 and a dampening of 0")
        for i, p in enumerate(group["params"]):
            if p.dtype not in FLOATS:
                raise TypeError(
                    f"parameter {i} of the group has dtype {p.dtype}; accepted: float16, bfloat16, float32, float64"
                )
            if p.layout is not torch.strided:
                raise TypeError(f"parameter {i} of the group has layout {p.layout}; accepted: torch.strided (dense)")
        if not self.unscale_in_step and any(p.dtype is torch.float16 for p in group["params"]):
            warnings.warn(
                "unscale_in_step is False and a parameter is float16: torch.amp.GradScaler refuses to unscale fp16 "
                "gradients; scale with fasttricks.optim.LossScaler, or keep the parameters in float32 under autocast",
                stacklevel=4,
            )

    def _options(self, index: int, group: dict[str, Any], trust_coefficient: float = 0.0) -> Options:
        name = type(self).__name__
        return Options(
            index,
            len(group["params"]),
            check_number(name, "momentum", group["momentum"], 0.0),
            check_number(name, "dampening", group["dampening"]),
            check_number(name, "weight_decay", group["weight_decay"], 0.0),
            bool(group["nesterov"]),
            bool(group["maximize"]),
            trust_coefficient,
        )

    def _group_options(self, index: int, group: dict[str, Any]) -> list[Options]:
        """The options of the group's parts."""
        return [self._options(index, group)]

    def _part_of(self, p: Tensor, group: dict[str, Any]) -> int:
        """The index of p's options in _group_options."""
        return 0

    # -- masters

    @torch.no_grad()
    def master_params(self) -> Iterator[Tensor]:
        """The fp32 master of each fp16 or bf16 parameter, and every other parameter itself; for clipping by other code.

        A master holds its parameter's gradient in fp32 in `.grad`, and the next step() uses that gradient, with any
        change made to it. After LossScaler.unscale_(optimizer) it is unscaled.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if not is_half(p):
                    yield p
                    continue
                master = master_of(p, self.state[p])
                self._step_data.master_grads.give(p, master)
                yield master

    @torch.no_grad()
    def master_state(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """model.state_dict() with a copy of the fp32 master in place of each fp16 or bf16 parameter.

        For uses that need full precision, such as checkpoints or an exponential moving average (with a decay of 0.9999
        its changes are below bf16's resolution). Load it into a float32 copy of the model.
        """
        result = model.state_dict()
        mine = {id(p) for group in self.param_groups for p in group["params"]}
        for name, p in model.named_parameters(remove_duplicate=False):
            if name in result and id(p) in mine and is_half(p):
                result[name] = master_value(p, self.state[p])
        return result

    @torch.no_grad()
    def sync_masters(self) -> None:
        """Sets every fp32 master to its parameter's present value.

        Not needed for correctness: a step detects, value by value, parameters that were changed from outside
        (model.load_state_dict, an EMA swap, p.data edits). It discards the extra precision of the masters.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if is_half(p) and "master" in self.state[p]:
                    master_of(p, self.state[p]).copy_(p)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim.Optimizer.zero_grad; also drops the masters' gradients."""
        self._step_data.master_grads.clear()
        super().zero_grad(set_to_none)

    # -- loss scaling

    @contextlib.contextmanager
    def scaled(
        self, grad_scale: Tensor | None, overflow: Tensor, process_groups: Sequence[Any] = (), *, check: bool = True
    ) -> Iterator[None]:
        """For loss scalers: a step() in this context takes scaled gradients and changes nothing if one has overflowed.

            with optimizer.scaled(scale, overflow): optimizer.step()

        Nothing waits for the device. LossScaler is written with this and unscale_().

        Args:
            grad_scale: fp32, one element: the loss scale; None: the gradients are already unscaled.
            overflow: fp32, one element: set to 1 by the step if a gradient is not finite, else unchanged.
            process_groups: groups whose ranks must agree on overflow. Those of DTensors and `shard_group` are known.
            check: False: overflow is read, not set, and a step changes nothing unless it is 0 (after unscale_()).
        """
        flags = {"overflow": overflow} if check else {"found_inf": overflow}
        self._step_data.scaling = Scaling(grad_scale, process_groups=process_groups, **flags)
        try:
            yield
        finally:
            self._step_data.scaling = None

    @torch.no_grad()
    def unscale_(self, grad_scale: Tensor, overflow: Tensor, process_groups: Sequence[Any] = ()) -> None:
        """For loss scalers: divides the gradients by grad_scale before a step, so that other code can clip them.

        Gradients of fp16 and bf16 parameters are left as they are (fp16 might underflow): their masters get unscaled
        fp32 copies, which step() uses. Arguments as in scaled().

        Raises:
            RuntimeError: a gradient is sparse.
        """
        grads = [t.grad for t in self.master_params() if t.grad is not None]
        for grad in grads:
            if grad.layout is not torch.strided:
                raise RuntimeError(f"a gradient has layout {grad.layout}; accepted: torch.strided (dense)")
        groups = list(process_groups)
        if self.shard_group is not None and not any(g is self.shard_group for g in groups):
            groups.append(self.shard_group)
        check_grads(grads, overflow, groups)
        unscale_grads_(grads, grad_scale)

    # -- the step

    @property
    def grad_norm(self) -> Tensor | None:
        """The global L2 norm (unscaled, not yet clipped) of the last step that measured it, or None."""
        return None if self._step_data.norms is None else self._step_data.norms.total()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step on all parameters that have a gradient, without waiting for the device.

        With `found_inf` set (by torch.amp.GradScaler) and not 0 on the device, nothing changes.

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
        scaling = self._step_data.scaling
        if scaling is None:
            scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
            scaling = Scaling(None if scale is None else full(scale), None if found is None else full(found))
        plan = self._prepare()
        norms = check_pass(
            plan.batches, scaling, measures=self._measures(), shard_group=self.shard_group, home=self._home(scaling)
        )
        self._step_data.norms = norms or self._step_data.norms
        for batch in plan.batches:
            batch.call.grad_scale = on(scaling.grad_scale, batch.owners[0].device)
            run_step(batch.call)
            batch.call.grads = ()  # zero_grad() can free them
        self._step_data.master_grads.clear()
        return loss

    def _measures(self) -> bool:
        """Whether a step measures the norms of gradients."""
        return self.max_grad_norm is not None

    def _home(self, scaling: Scaling) -> torch.device:
        """Where the collectives of a rank without gradients run."""
        for group in self.param_groups:
            for p in group["params"]:
                return p.device
        return torch.device("cpu") if scaling.overflow is None else scaling.overflow.device

    def _prepare(self) -> Plan:
        """The plan, with this step's gradients, rates and settings in its calls."""
        groups = self.param_groups
        params = [p for group in groups for p in group["params"]]
        grads: list[Tensor | None] = [p.grad for p in params]
        if self._step_data.master_grads:
            of_masters = [self._step_data.master_grads.get(p) for p in params]
            grads = [mine if given is None else given for given, mine in zip(of_masters, grads, strict=True)]
        options = [o for i, group in enumerate(groups) for o in self._group_options(i, group)]
        plan = self._plan
        if plan is None or not plan.holds(params, grads, options, self.state):
            plan = self._plan = Plan(params, grads, self._parts(options), self.state)
        for batch in plan.batches:
            call, device = batch.call, batch.owners[0].device
            taken: list[Any] = [grads[place] for place in batch.places]
            if {g.layout for g in taken} != {torch.strided}:
                self._refuse_sparse(params, grads)
            if set(map(type, taken)) != {Tensor}:
                taken = [local_grad(g, p) for g, p in zip(taken, batch.owners, strict=True)]
            call.grads = taken
            call.lr = [self._rate(index, groups[index], device) for index in batch.groups]
            call.eps, call.lr_in_momentum, call.max_norm = self._eps, self._lr_in_momentum, self.max_grad_norm or 0.0
            call.found_inf = call.grad_sq = call.weight_sq = None
        return plan

    def _refuse_sparse(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        groups = [index for index, group in enumerate(self.param_groups) for _ in group["params"]]
        for p, grad, index in zip(params, grads, groups, strict=True):
            if grad is not None and grad.layout is not torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} does not take sparse gradients: that of a parameter of shape "
                    f"{tuple(p.shape)} in group {index} has layout {grad.layout}; use torch.optim.SGD for it"
                )

    def _parts(self, options: list[Options]) -> list[Part]:
        """All parameters, with the options of each."""
        parts: list[Part] = []
        rest, place = iter(options), 0
        for i, group in enumerate(self.param_groups):
            mine: list[Part] = [(next(rest), []) for _ in self._group_options(i, group)]
            for p in group["params"]:
                mine[self._part_of(p, group)][1].append((place, p))
                place += 1
            parts += mine
        return parts

    def _rate(self, index: int, group: dict[str, Any], device: torch.device) -> Tensor:
        """The group's lr on the device. A float's tensor is kept and refilled: captured graphs read the same memory."""
        lr = group["lr"]
        if isinstance(lr, Tensor):
            return lr if lr.device == device else lr.to(device, non_blocking=True)
        cached = self._lr_on_device.get((index, device))
        if cached is not None and cached[0] == lr:
            return cached[1]
        value = check_number(type(self).__name__, f"lr of group {index}", lr, 0.0)
        if cached is None:
            made = torch.full((), value, dtype=widest_dtype(device), device=device)
        else:
            made = cached[1].fill_(value)
        self._lr_on_device[index, device] = (value, made)
        return made

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer.state_dict; loads into torch.optim.SGD, too.

        state[i]: momentum_buffer (fp32, fp64 for fp64) and step, its count of steps, once the parameter has been
        stepped with momentum; master (fp32) for an fp16 or bf16 parameter.
        """
        result = super().state_dict()
        result["state"] = without_unwritten_momentum(result["state"])
        return result

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this class or of torch.optim.SGD; masters and momentum keep their precision.

        Parameters take precedence: if a loaded master does not round to its parameter, the next step uses the
        parameter's value. A parameter without a master in the checkpoint gets one from its value. A checkpoint with
        other groups of the same parameters loads by their names (torch's `param_names`): the state alone, while the
        groups' options stay those of this optimizer.

        Raises:
            TypeError: no state_dict of an optimizer.
            ValueError: the checkpoint is that of another optimizer, or has other parameters or shapes. The optimizer
                is left unchanged.
        """
        check_form(state_dict, type(self).__name__)
        handle = self.register_load_state_dict_pre_hook(lambda _, given: self._accept(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def _accept(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        sizes = [[len(g["params"]) for g in groups] for groups in (state_dict["param_groups"], self.param_groups)]
        if sizes[0] != sizes[1]:
            state_dict = regrouped(state_dict, self.param_groups)
        options = [name for name in self.defaults if name != "differentiable"]
        check_loaded(state_dict, self.param_groups, options, type(self).__name__)
        return wrapped(state_dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedOptimizer:
        memo[id(self.shard_group)] = self.shard_group  # a copy works with the same ranks
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.shard_group is not None:  # without it, each rank would clip by the norm of its own gradients
            raise TypeError(
                f"{type(self).__name__}: shard_group is a process group, which cannot be pickled; save "
                "optimizer.state_dict(), and give shard_group to the optimizer that loads it"
            )
        return super().__reduce_ex__(protocol)

    def __getstate__(self) -> dict[str, Any]:
        own = ("max_grad_norm", "shard_group", "unscale_in_step")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reset()
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # torch adds it to defaults on every load; no group of ours has it
                    group.setdefault(name, value)
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.state:
                    settle(p, self.state[p])
