"""What FusedSGD refuses: options, parameters and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fasttricks.optim import FusedSGD


def test_sparse_and_complex_are_refused() -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    optimizer = FusedSGD(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"does not take sparse gradients.*\(10, 3\) in group 0"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)
    with pytest.raises(TypeError, match="complex64"):
        FusedSGD([nn.Parameter(torch.zeros(3, dtype=torch.complex64))], lr=0.1)


def parameter() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3))]


BAD = [
    ({"lr": -0.1}, ValueError, "lr is -0.1"),
    ({"lr": math.nan}, ValueError, "lr is nan"),
    ({"lr": math.inf}, ValueError, "lr is inf"),
    ({"lr": torch.tensor(math.nan)}, ValueError, "lr is nan"),
    ({"lr": torch.tensor([0.1, 0.2])}, ValueError, r"lr is a tensor of shape \(2,\)"),
    ({"lr": torch.tensor(1)}, TypeError, "int64"),
    ({"lr": torch.tensor(0.1, requires_grad=True)}, ValueError, "lr requires grad"),
    ({"momentum": -0.9}, ValueError, "momentum is -0.9"),
    ({"momentum": math.nan}, ValueError, "momentum is nan"),
    ({"weight_decay": -1e-4}, ValueError, "weight_decay is -0.0001"),
    ({"weight_decay": torch.tensor(0.1)}, TypeError, "weight_decay is a Tensor"),
    ({"nesterov": True}, ValueError, "nesterov requires"),
    ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError, "nesterov requires"),
    ({"differentiable": True}, ValueError, "differentiable is True"),
    ({"foreach": True, "fused": True}, ValueError, "foreach and fused"),
    ({"max_grad_norm": 0}, ValueError, "max_grad_norm is 0"),
    ({"max_grad_norm": math.inf}, ValueError, "max_grad_norm is inf"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options_are_refused(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        FusedSGD(parameter(), **options)
    if "lr" in options or "momentum" in options or "weight_decay" in options:
        optimizer = FusedSGD(parameter(), lr=0.1)
        with pytest.raises(error, match=message):
            optimizer.add_param_group({"params": parameter(), **options})
        assert len(optimizer.param_groups) == 1  # unchanged


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        FusedSGD([], lr=0.1)
    with pytest.raises(TypeError):
        FusedSGD(parameter()[0], lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        FusedSGD([1.0], lr=0.1)
    a = parameter()
    with pytest.raises(ValueError, match="some parameters appear in more than one"):
        FusedSGD([{"params": a}, {"params": a}], lr=0.1)


def test_an_lr_that_became_infinite_stops_the_step() -> None:
    p = parameter()
    optimizer = FusedSGD(p, lr=0.1)
    p[0].grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr of group 0 is nan"):
        optimizer.step()
    torch.testing.assert_close(p[0].detach(), torch.full((3,), 0.9))
