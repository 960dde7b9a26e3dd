"""Optimizers collect their tensors once and notice every change between steps; defaults of torch change nothing."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fasttricks.optim import FusedLARS, FusedSGD, LossScaler

SHAPES = ((4, 3), (5,), (2, 3, 2, 2), (0,), ())


class Twins:
    """FusedSGD and torch.optim.SGD with equal parameters, to which the same changes are made."""

    def __init__(self) -> None:
        values = [torch.randn(s) for s in SHAPES]
        self.params = [[nn.Parameter(v.clone()) for v in values] for _ in range(2)]
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
        groups = [[{"params": ps[:2]}, {"params": ps[2:], "lr": 0.2}] for ps in self.params]
        ours, theirs = FusedSGD(groups[0], **options), torch.optim.SGD(groups[1], **options, foreach=False)
        self.optimizers: list[Any] = [ours, theirs]
        self.give_grads()

    def give_grads(self) -> None:
        for pair in zip(*self.params, strict=True):
            grad = torch.randn(pair[0].shape)
            for p in pair:
                p.grad = grad.to(p.dtype, copy=True)

    def each(self, change: Callable[[Any, list[nn.Parameter]], None]) -> None:
        """Makes the same change to both, with the same random numbers."""
        python, seed = random.getstate(), torch.get_rng_state()
        for optimizer, params in zip(self.optimizers, self.params, strict=True):
            random.setstate(python)
            torch.set_rng_state(seed)
            change(optimizer, params)

    def check(self) -> None:
        for a, b in zip(*self.params, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-5, atol=1e-6)
            mine, theirs = (o.state[p].get("momentum_buffer") for o, p in zip(self.optimizers, (a, b), strict=True))
            if theirs is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def some(params: list[nn.Parameter]) -> nn.Parameter:
    return params[random.randrange(len(params))]


def drop_gradients(optimizer: Any, params: list[nn.Parameter]) -> None:
    for p in params:
        if random.random() < 0.5:
            p.grad = None


def swap_data(optimizer: Any, params: list[nn.Parameter]) -> None:
    p = some(params)
    p.data = torch.randn(p.shape, dtype=p.dtype)


def swap_data_of_another_layout(optimizer: Any, params: list[nn.Parameter]) -> None:
    params[2].data = params[2].data.contiguous(memory_format=torch.channels_last)


def write_in_place(optimizer: Any, params: list[nn.Parameter]) -> None:
    with torch.no_grad():
        some(params).mul_(0.5)


def replace_momentum(optimizer: Any, params: list[nn.Parameter]) -> None:
    state = optimizer.state[some(params)]
    if state.get("momentum_buffer") is not None:
        state["momentum_buffer"] = torch.randn(state["momentum_buffer"].shape)


def replace_state(optimizer: Any, params: list[nn.Parameter]) -> None:
    p = some(params)
    optimizer.state[p] = {k: v.clone() for k, v in optimizer.state[p].items() if v is not None}


def clear_state(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.state.clear()


def change_options(optimizer: Any, params: list[nn.Parameter]) -> None:
    group = optimizer.param_groups[random.randrange(2)]
    name = random.choice(["lr", "weight_decay", "momentum", "dampening"])
    group[name] = random.random() * 0.5


def reload(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def move_a_parameter_to_the_other_group(optimizer: Any, params: list[nn.Parameter]) -> None:
    groups = optimizer.param_groups
    if len(groups[1]["params"]) > 1:
        groups[0]["params"].append(groups[1]["params"].pop(0))


CHANGES = [
    *(drop_gradients, swap_data, swap_data_of_another_layout, write_in_place, replace_momentum, replace_state),
    *(clear_state, change_options, reload, move_a_parameter_to_the_other_group),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(backend: str, change: Callable[..., None]) -> None:
    twins = Twins()
    for _ in range(3):
        for _ in range(2):
            for o in twins.optimizers:
                o.step()
            twins.check()
            twins.give_grads()
        twins.each(change)
        for o in twins.optimizers:
            o.step()
        twins.check()
        twins.give_grads()


def test_many_changes_in_any_order_are_noticed() -> None:
    random.seed(torch.initial_seed())
    twins = Twins()
    for _ in range(60):
        for change in random.sample(CHANGES, 2):
            twins.each(change)
        for o in twins.optimizers:
            o.step()
        twins.check()
        twins.give_grads()


def test_the_plan_is_kept_while_no_tensor_is_replaced() -> None:
    twins = Twins()
    ours = twins.optimizers[0]
    ours.step()
    plan = ours._plan
    for _ in range(3):  # new gradients and another lr do not matter
        twins.give_grads()
        ours.param_groups[0]["lr"] *= 0.5
        ours.step()
    assert ours._plan is plan
    assert all(not batch.call.grads for batch in plan.batches), "gradients are not kept alive"


def test_autograd_detects_a_step(backend: str) -> None:
    """A backward pass that needs parameters from before a step raises, as with torch.optim.SGD."""
    for dtype in (torch.float32, torch.float16):
        p = nn.Parameter(torch.ones(4, dtype=dtype))
        optimizer = FusedSGD([p], lr=0.1)
        loss = (p * p).sum()
        p.grad = torch.ones_like(p)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# ---- torch.set_default_dtype, torch.set_default_device, devices without float64 ----


def train(device: str) -> list[torch.Tensor]:
    """Trains on fixed values with every part of the optimizers; returns parameters, state and scale."""
    results = []
    for kind in (FusedSGD, FusedLARS):
        for max_grad_norm in (None, 0.5):
            params = [
                nn.Parameter(torch.linspace(-1, 1, 12, dtype=d, device=device).view(3, 4))
                for d in (torch.float32, torch.float16, torch.bfloat16)
            ]
            optimizer = kind(params, lr=0.1, momentum=0.9, weight_decay=1e-2, max_grad_norm=max_grad_norm)
            scaler = LossScaler(64.0, growth_interval=2)
            for i in range(5):
                for p in params:
                    p.grad = (p.detach() * 64).requires_grad_(False)
                scaler.scale(torch.ones((), dtype=torch.float32, device=device))
                if i % 2:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            scaler.update(8.0) if scaler._stages else scaler.loss_scale.fill_(8.0)
            fresh = kind(params, lr=0.1)
            fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            fresh.step()
            results += [*params, *fresh.master_params(), *(fresh.state[p]["momentum_buffer"] for p in params)]
            results += [scaler.loss_scale] + ([] if optimizer.grad_norm is None else [optimizer.grad_norm])
    return [t.detach().clone() for t in results]


@functools.cache
def of_default(backend: str) -> list[torch.Tensor]:
    return train("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    want = of_default(backend)
    torch.set_default_dtype(dtype)
    try:
        got = train("cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_the_default_device_changes_nothing() -> None:
    want = train("cpu")
    with torch.device("meta"):
        got = train("cpu")
    torch.set_default_device("meta")
    try:
        more = train("cpu")
    finally:
        torch.set_default_device(None)
    for a, b, c in zip(got, want, more, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


class WithoutFloat64(torch.utils._python_dispatch.TorchDispatchMode):
    """A device without float64: creating such a tensor raises, as on MPS."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        if any(isinstance(t, torch.Tensor) and t.dtype is torch.float64 for t in made):
            raise TypeError(f"{func}: this device has no float64")
        return result


def test_a_device_without_float64_uses_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates, scales and norms are float32; results stay the same."""
    import fasttricks
    from fasttricks.ops import sgd, sgd_call
    from fasttricks.optim import base, check
    from fasttricks.reference import sgd as reference

    assert sgd_call.widest_dtype(torch.device("mps")) is torch.float32
    with fasttricks.backend("reference"):
        want = train("cpu")
        with pytest.raises(TypeError, match="no float64"), WithoutFloat64():
            train("cpu")
        for module in (sgd, sgd_call, base, check, reference):
            monkeypatch.setattr(module, "widest_dtype", lambda _: torch.float32)
        with WithoutFloat64():
            got = train("cpu")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=torch.finfo(a.dtype).eps * 8, atol=1e-6)


# ---- numbers of NumPy ----


@pytest.mark.parametrize("number", [np.float32, np.float64, np.float16])
def test_numpy_numbers_are_accepted(number: type) -> None:
    """As options and as an lr that changes between steps; what is not a number is refused."""
    options = {"lr": number(0.125), "momentum": number(0.5), "weight_decay": number(0.25), "dampening": number(0.125)}
    results = []
    for given in (options, {k: float(v) for k, v in options.items()}):
        p = nn.Parameter(torch.linspace(0, 1, 7))
        optimizer = FusedSGD([p], **given)
        for factor in (1, 0.5):
            optimizer.param_groups[0]["lr"] = given["lr"] * factor
            p.grad = torch.ones(7)
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    FusedSGD([p], lr=np.int64(1), momentum=np.int64(0)).step()
    FusedLARS([p], lr=number(1), trust_coefficient=number(0.5), eps=number(0)).step()
    for name in ("momentum", "weight_decay", "dampening", "lr"):
        for wrong in ("0.1", None, 1j, np.zeros(2)):
            with pytest.raises(TypeError, match=f"{name} is .*; accepted: a number"):
                FusedSGD([p], **{name: wrong})
