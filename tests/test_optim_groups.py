"""param_groups, linear_scaled_lr and the schedules."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fasttricks.optim import FusedSGD, linear_scaled_lr, param_groups, warmup_cosine, warmup_step


class Tied(nn.Module):
    """Several norm layers, a shared weight, a frozen weight, a parameter without a layer, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.plain = nn.BatchNorm2d(4, affine=False)
        self.norm = nn.LayerNorm([4, 5])  # two-dimensional
        self.group = nn.GroupNorm(2, 4)
        self.embedding = nn.Embedding(7, 4)
        self.fc = nn.Linear(4, 7)
        self.fc.weight = self.embedding.weight
        self.no_bias = nn.Linear(4, 2, bias=False).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(()))
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)


def test_groups_are_a_partition() -> None:
    model = Tied()
    groups = param_groups(model, 1e-4)
    listed = [p for g in groups for p in g["params"]]
    assert len(listed) == len({id(p) for p in listed})
    assert {id(p) for p in listed} == {id(p) for p in model.parameters()}
    assert [g["weight_decay"] for g in groups] == [1e-4, 0.0]
    decayed = {id(p) for p in groups[0]["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in decayed}
    attention = {"attention.in_proj_weight", "attention.out_proj.weight", "attention.bias_k", "attention.bias_v"}
    assert names == {"conv.weight", "embedding.weight", "no_bias.weight"} | attention


def test_the_second_group_does_not_inherit_decay() -> None:
    optimizer = FusedSGD(param_groups(Tied(), 1e-4), lr=0.1, weight_decay=0.5)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-4, 0.0]


def test_zero_gamma_is_not_decayed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    nn.init.zeros_(model[1].weight)
    assert any(p is model[1].weight for p in param_groups(model, 1e-4)[1]["params"])


def test_one_group_if_all_parameters_are_decayed_alike() -> None:
    assert len(param_groups(Tied(), 1e-4, no_bias_decay=False)) == 1
    assert len(param_groups(nn.Linear(3, 2, bias=False), 1e-4)) == 1
    for decay in (-1.0, math.nan):
        with pytest.raises(ValueError, match="weight_decay is"):
            param_groups(Tied(), decay)
    with pytest.raises(ValueError, match="no parameters"):
        param_groups(nn.ReLU(), 0.1)


def test_linear_scaled_lr_is_proportional_to_the_batch() -> None:
    assert linear_scaled_lr(0.1, 1024) == pytest.approx(0.4)
    assert linear_scaled_lr(0.1, 64, 128) == pytest.approx(0.05)
    for arguments in ((math.nan, 256), (-0.1, 256), (0.1, 0), (0.1, 1, 0)):
        with pytest.raises(ValueError, match="accepted"):
            linear_scaled_lr(*arguments)


def test_warmup_cosine_equals_its_formula() -> None:
    factor = warmup_cosine(4, 14)
    assert [factor(i) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    for i in range(4, 14):
        assert factor(i) == pytest.approx(0.5 * (1 + math.cos(math.pi * (i - 4) / 10)))
    assert factor(14) == factor(99) == 0
    assert warmup_cosine(0, 10, 0.1)(10) == 0.1
    assert warmup_cosine(0, 10)(0) == 1
    assert warmup_cosine(3, 3)(2) == 1


def test_warmup_step_equals_its_definition() -> None:
    factor = warmup_step(2, [4, 6], 0.5)
    assert [factor(i) for i in range(8)] == [0.5, 1, 1, 1, 0.5, 0.5, 0.25, 0.25]
    assert warmup_step(0, [])(100) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: warmup_cosine(5, 4),
        lambda: warmup_cosine(-1, 4),
        lambda: warmup_cosine(1, 4, 1.5),
        lambda: warmup_step(-1, [3]),
        lambda: warmup_step(1, [3, 2]),
        lambda: warmup_step(1, [3], 0.0),
    ],
)
def test_bad_schedules_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match="accepted"):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("schedule", [warmup_cosine(5, 20, 0.01), warmup_step(5, [8, 12])])
@pytest.mark.parametrize("stop", [2, 9])
def test_a_resumed_schedule_equals_an_uninterrupted_one(schedule: object, stop: int) -> None:
    """Stopped during the warm-up or after it."""

    def start() -> tuple[FusedSGD, LambdaLR]:
        optimizer = FusedSGD([nn.Parameter(torch.ones(2))], lr=0.4)
        return optimizer, LambdaLR(optimizer, pickle.loads(pickle.dumps(schedule)))

    def run(optimizer: FusedSGD, scheduler: LambdaLR, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return rates

    whole = run(*start(), 20)
    first = start()
    head = run(*first, stop)
    second = start()
    states = copy.deepcopy([s.state_dict() for s in first])
    for s, state in zip(second, states, strict=True):
        s.load_state_dict(state)
    assert head + run(*second, 20 - stop) == whole
