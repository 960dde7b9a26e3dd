"""FusedLARS against its formula in float64; schedules, groups, scalers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttricks.optim import FusedLARS, LossScaler, param_groups


class Formula:
    """Algorithm 1 of You, Gitman and Ginsburg 2017 in float64."""

    def __init__(self, weights: list[Tensor], mu: float, wd: float, eta: float, eps: float, within: bool) -> None:
        self.w = [w.detach().double().clone() for w in weights]
        self.v: list[Tensor | None] = [None] * len(weights)
        self.mu, self.wd, self.eta, self.eps, self.within = mu, wd, eta, eps, within

    def step(self, grads: list[Tensor | None], lr: float, adapt_1d: bool = False) -> None:
        for i, given in enumerate(grads):
            if given is None:
                continue
            w, g = self.w[i], given.double()
            trust = 1.0
            if (w.ndim > 1 or adapt_1d) and w.norm() > 0 and g.norm() > 0:
                trust = (self.eta * w.norm() / (g.norm() + self.wd * w.norm() + self.eps)).item()
            update = trust * (g + self.wd * w) * (lr if self.within else 1.0)
            before = self.v[i]
            self.v[i] = update if before is None else self.mu * before + update
            self.w[i] = w - self.v[i] * (1.0 if self.within else lr)


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("adapt_1d", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_steps_equal_the_formula(backend: str, within: bool, adapt_1d: bool, dtype: torch.dtype) -> None:
    """For weights, biases, a zero weight and a zero gradient, with a learning rate that changes."""
    params = [
        nn.Parameter(t.to(dtype)) for t in (torch.randn(8, 5), torch.randn(8), torch.zeros(3, 3), torch.randn(4, 2))
    ]
    formula = Formula(params, 0.9, 1e-2, 0.02, 1e-8, within)
    optimizer = FusedLARS(
        params,
        lr=1.0,
        momentum=0.9,
        weight_decay=1e-2,
        trust_coefficient=0.02,
        eps=1e-8,
        lr_in_momentum=within,
        adapt_1d=adapt_1d,
    )
    for lr in (1.0, 2.0, 0.5):
        optimizer.param_groups[0]["lr"] = lr
        grads = [torch.randn(p.shape).to(dtype) for p in params]
        grads[3].zero_()
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        formula.step(grads, lr, adapt_1d)
    for got, want in zip(optimizer.master_params(), formula.w, strict=True):
        error = (got.detach().double() - want).norm() / want.norm()
        assert error < (1e-12 if dtype is torch.float64 else 1e-6)


@pytest.mark.parametrize("scale", [1.0, 256.0])
def test_the_trust_ratio_uses_unscaled_clipped_gradients(scale: float) -> None:
    """An overflow changes nothing."""
    p = nn.Parameter(torch.randn(6, 5).half())
    formula = Formula([p], 0.9, 0.0, 0.1, 0.0, True)
    optimizer = FusedLARS([p], lr=1.0, trust_coefficient=0.1, max_grad_norm=0.5)
    scaler = LossScaler(scale, dynamic=False)
    for bad in (False, True, False):
        g = torch.randn(6, 5).half()
        p.grad = g * scale
        if bad:
            p.grad[2, 3] = math.nan
        scaler.step(optimizer)
        scaler.update()
        if not bad:
            formula.step([g * min(1.0, 0.5 / (g.double().norm().item() + 1e-6))], 1.0)
    got = next(optimizer.master_params()).detach().double()
    assert (got - formula.w[0]).norm() / formula.w[0].norm() < 1e-3  # g * clip in fp16 in the formula


def test_changed_weights_are_measured() -> None:
    """A change from outside is included in the norm of the weights."""
    p = nn.Parameter(torch.ones(4, 4, dtype=torch.float16))
    optimizer = FusedLARS([p], lr=1.0, momentum=0.0, trust_coefficient=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    with torch.no_grad():
        p.fill_(2.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(next(optimizer.master_params()).detach(), torch.full((4, 4), 1.8))


def close(optimizer: FusedLARS, formula: Formula, tolerance: float = 1e-6) -> None:
    for got, want in zip(optimizer.master_params(), formula.w, strict=True):
        assert (got.detach().double() - want).norm() <= tolerance * want.norm()


def test_biases_and_batchnorms_are_stepped_as_by_sgd() -> None:
    """Biases and BatchNorms have no decay and no trust ratio; convolutions follow the formula."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5))
    params = list(model.parameters())
    layers, others = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
    twins = [nn.Parameter(p.detach().clone()) for p in others]
    optimizer = FusedLARS(param_groups(model, 5e-5), lr=0.3, momentum=0.9, trust_coefficient=0.01, lr_in_momentum=False)
    plain = torch.optim.SGD(twins, lr=0.3, momentum=0.9, foreach=False)
    formula = Formula(layers, 0.9, 5e-5, 0.01, 0.0, False)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(6, 3, 5, 5)), torch.arange(6) % 5).backward()
        formula.step([p.grad for p in layers], 0.3)
        for p, twin in zip(others, twins, strict=True):
            twin.grad = p.grad.clone()
        optimizer.step()
        plain.step()
    for p, w in zip(layers, formula.w, strict=True):
        assert (p.detach().double() - w).norm() < 1e-6 * w.norm()
    for p, twin in zip(others, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-7)


def test_schedules_added_groups_and_missing_gradients() -> None:
    """With an lr tensor, an empty weight and a channels-last weight."""
    a, b = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    empty, late = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.randn(3, 4).bfloat16())
    optimizer = FusedLARS([a, b, empty], lr=torch.tensor(0.5), momentum=0.9, weight_decay=0.1, trust_coefficient=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    first, second = Formula([a, b, empty], 0.9, 0.1, 0.05, 0.0, True), Formula([late], 0.9, 0.0, 0.05, 0.0, True)
    for i in range(5):
        if i == 2:
            optimizer.add_param_group({"params": [late], "lr": 2.0, "weight_decay": 0.0})
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # of both groups
        for p in (a, b, empty, late):
            p.grad = torch.randn(p.shape).to(p.dtype)
        if i == 1:
            a.grad = None
        rates = [float(g["lr"]) for g in optimizer.param_groups]
        optimizer.step()
        first.step([p.grad for p in (a, b, empty)], rates[0])
        if i >= 2:
            second.step([late.grad], rates[1])
        schedule.step()
    got = list(optimizer.master_params())
    for mine, want in zip(got, [*first.w, *second.w], strict=True):
        assert (mine.detach().double() - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("options", [{"nesterov": True}, {"dampening": 0.4}, {"maximize": True}])
def test_momentum_options_equal_sgd(options: dict) -> None:
    """A parameter of one dimension has no trust ratio."""
    mine, theirs = (nn.Parameter(torch.randn(9)) for _ in range(2))
    with torch.no_grad():
        theirs.copy_(mine)
    ours = FusedLARS([mine], lr=0.1, momentum=0.9, weight_decay=0.01, lr_in_momentum=False, **options)
    plain = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.01, foreach=False, **options)
    for _ in range(4):
        mine.grad = torch.randn(9)
        theirs.grad = mine.grad.clone()
        ours.step()
        plain.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("which", ["GradScaler", "LossScaler"])
def test_gradients_are_unscaled_by_the_step_or_before_it(which: str) -> None:
    """The trust ratio is the same."""
    for unscale in (False, True):
        p = nn.Parameter(torch.randn(5, 4))
        formula, optimizer = Formula([p], 0.9, 0.0, 0.1, 0.0, True), FusedLARS([p], lr=1.0, trust_coefficient=0.1)
        scaler: Any = torch.amp.GradScaler("cpu", init_scale=64.0) if which == "GradScaler" else LossScaler(64.0)
        for factor in (1.0, math.inf, 2.0):
            x = torch.randn(5, 4)
            optimizer.zero_grad()
            scaler.scale((p * x * factor).sum()).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            if math.isfinite(factor):
                formula.step([x * factor], 1.0)
        close(optimizer, formula)
        assert scaler.get_scale() == 32


def test_a_gradient_that_is_not_finite_stops_the_step() -> None:
    """Also without a scaler, since the trust ratio is undefined."""
    p, q = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))
    optimizer = FusedLARS([p, q], lr=1.0)
    p.grad, q.grad = torch.full((3, 3), math.inf), torch.ones(3)
    optimizer.step()
    assert (p == 1).all()
    assert (q == 1).all()


def test_bad_options_are_refused() -> None:
    for options in ({"trust_coefficient": 0.0}, {"trust_coefficient": -1.0}, {"eps": -1.0}, {"eps": math.nan}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
            FusedLARS([nn.Parameter(torch.ones(3))], **options)
