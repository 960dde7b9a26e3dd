"""FusedLARS against its formula in float64, and with the protocols of FusedSGD."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fasttricks.optim import FusedLARS, LossScaler


class Formula:
    """You, Gitman, Ginsburg 2017, Algorithm 1, written out in float64."""

    def __init__(self, weights: list[Tensor], mu: float, wd: float, eta: float, eps: float, within: bool) -> None:
        self.w = [w.detach().double().clone() for w in weights]
        self.v: list[Tensor | None] = [None] * len(weights)
        self.mu, self.wd, self.eta, self.eps, self.within = mu, wd, eta, eps, within

    def step(self, grads: list[Tensor], lr: float, adapt_1d: bool = False) -> None:
        for i, g in enumerate(grads):
            w, g = self.w[i], g.double()
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
def test_formula(backend: str, within: bool, adapt_1d: bool, dtype: torch.dtype) -> None:
    """Weights and biases, a zero weight and a zero gradient, over a learning rate that changes."""
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
def test_scaled_and_clipped(scale: float) -> None:
    """The trust ratio sees unscaled, clipped gradients; an overflow changes nothing."""
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
    """The norm is that of the weights as they are, also after a change from outside."""
    p = nn.Parameter(torch.ones(4, 4, dtype=torch.float16))
    optimizer = FusedLARS([p], lr=1.0, momentum=0.0, trust_coefficient=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    with torch.no_grad():
        p.fill_(2.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(next(optimizer.master_params()).detach(), torch.full((4, 4), 1.8))


def test_bad_options() -> None:
    for options in ({"trust_coefficient": 0.0}, {"trust_coefficient": -1.0}, {"eps": -1.0}, {"eps": math.nan}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
            FusedLARS([nn.Parameter(torch.ones(3))], **options)
