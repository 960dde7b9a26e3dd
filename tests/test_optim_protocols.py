"""FusedSGD against torch.optim.SGD: schedulers, weight averaging, closures and hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_pairs import Pair, same
from torch import Tensor, nn
from torch.optim import lr_scheduler

from fasttricks.optim import FusedSGD

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda s: 1 / (s + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda s: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),  # also cycles the momentum
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 5)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


def test_every_scheduler_is_listed() -> None:
    listed = {n for n in lr_scheduler.__all__ if n not in ("LRScheduler",)}
    assert set(SCHEDULERS) >= listed - {"SWALR"}


@pytest.mark.parametrize("lr", [0.1, "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_equal_torch(name: str, lr: Any) -> None:
    pair = Pair(lr=torch.tensor(0.1) if lr == "tensor" else lr, momentum=0.9)
    if lr == "tensor":  # each optimizer has its own
        pair.torch.param_groups[0]["lr"] = torch.tensor(0.1)
    schedulers = [SCHEDULERS[name](o) for o in (pair.ours, pair.torch)]
    for _ in range(6):
        pair.step()
        for s in schedulers:
            s.step(1.0) if name == "ReduceLROnPlateau" else s.step()
    assert float(pair.ours.param_groups[0]["lr"]) == float(pair.torch.param_groups[0]["lr"])
    pair.check()


def test_swa_equals_torch() -> None:
    pair = Pair(lr=0.1, momentum=0.9)
    schedulers = [torch.optim.swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3) for o in (pair.ours, pair.torch)]
    for _ in range(5):
        pair.step()
        for s in schedulers:
            s.step()
    pair.check()


def test_closure_is_called_and_returned() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = FusedSGD([p], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.8))
    with torch.no_grad():
        assert optimizer.step(closure).item() == pytest.approx(3 * 0.64)


def test_hooks_run_in_order() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = FusedSGD([p], lr=1.0)
    seen: list[str] = []

    def before(_: Any, args: Any, kwargs: Any) -> None:
        seen.append("before")
        p.grad = torch.full((3,), 0.25)

    handles = [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(lambda *_: seen.append("after")),
        optimizer.register_state_dict_pre_hook(lambda *_: seen.append("save")),
        optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved")),
        optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("load")),
        optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded")),
    ]
    optimizer.step()
    assert (p == 0.75).all()
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "save", "saved", "load", "loaded"]
    for h in handles:
        h.remove()


def test_zero_grad_zeroes_or_drops_gradients() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = FusedSGD([p], lr=1.0)
    p.grad = torch.ones(3)
    optimizer.zero_grad(set_to_none=False)
    assert (p.grad == 0).all()
    optimizer.zero_grad()
    assert p.grad is None


def stepped_in_hooks(model: nn.Module, lr: float) -> dict[Tensor, FusedSGD]:
    """One optimizer per parameter, which steps as soon as the gradient is accumulated."""
    optimizers: dict[Tensor, FusedSGD] = {p: FusedSGD([p], lr=lr, momentum=0.9) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    return optimizers


def test_steps_in_post_accumulate_grad_hooks_equal_one_step() -> None:
    """One optimizer per parameter that steps during the backward pass equals one step after it."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    other = copy.deepcopy(model)
    reference = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, foreach=False)
    stepped_in_hooks(model, lr=0.1)
    for _ in range(3):
        x = torch.randn(6, 4)
        model(x).square().sum().backward()
        reference.zero_grad()
        other(x).square().sum().backward()
        reference.step()
    same(list(model.parameters()), list(other.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_half_parameters_can_be_stepped_in_hooks() -> None:
    """In fp16, with masters equal bit for bit."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)).half()
    other = copy.deepcopy(model)
    whole = FusedSGD(other.parameters(), lr=1e-3, momentum=0.9)
    optimizers = stepped_in_hooks(model, lr=1e-3)
    for _ in range(3):
        x = torch.randn(6, 4).half()
        model(x).float().square().sum().backward()
        whole.zero_grad()
        other(x).float().square().sum().backward()
        whole.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizers[p].state[p]["master"], whole.state[q]["master"])
