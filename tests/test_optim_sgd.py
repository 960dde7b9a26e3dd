"""FusedSGD against torch.optim.SGD(foreach=False, fused=False): updates, options, groups and dtypes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from optimizer_pairs import Pair, give_grads, make_params, same
from torch import Tensor, nn
from torch.optim import lr_scheduler

from fasttricks.optim import FusedSGD


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
    ],
)
def test_updates_equal_torch(backend: str, options: dict) -> None:
    pair = Pair(**options)
    for _ in range(4):
        pair.step()
    pair.check(backend)


def test_parameters_without_gradient_do_not_change(backend: str) -> None:
    """Their state does not change either; the first step of a parameter is that of its first gradient."""
    pair = Pair(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1)
    for skip in ((0, 2, 4), (0, 1), (), (3,), ()):
        pair.step(skip)
        pair.check(backend)
    pair.step(tuple(range(7)))
    pair.check(backend)


def test_options_can_change_between_steps(backend: str) -> None:
    pair = Pair(lr=0.1)
    changes = [
        {"momentum": 0.9, "dampening": 0.5},
        {"weight_decay": 0.1},
        {"lr": 0.01},
        {"momentum": 0.0},
        {"momentum": 0.5, "dampening": 0.0, "nesterov": True},
        {"maximize": True},
        {"lr": 0.0},
    ]
    for change in [{}, *changes]:
        for optimizer in (pair.ours, pair.torch):
            optimizer.param_groups[0].update(change)
        for _ in range(2):
            pair.step()
            pair.check(backend)


def test_groups_and_added_groups_equal_torch() -> None:
    def make(kind: type, params: list[nn.Parameter]) -> Any:
        groups = [{"params": params[:2], "lr": 0.5, "weight_decay": 0.0}, {"params": params[2:4], "momentum": 0.0}]
        return kind(groups, lr=0.1, momentum=0.9, weight_decay=0.1, **({} if kind is FusedSGD else {"foreach": False}))

    pair = Pair(make)
    pair.step()
    first = pair.ours.param_groups[0]
    scheduler = lr_scheduler.StepLR(pair.ours, 1), lr_scheduler.StepLR(pair.torch, 1)
    for optimizer, params in ((pair.ours, pair.mine), (pair.torch, pair.theirs)):
        optimizer.add_param_group({"params": params[4:], "lr": 0.3, "dampening": 0.5})
    for _ in range(3):
        pair.step()
        pair.check()
        for optimizer in (pair.ours, pair.torch):
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
    assert pair.ours.param_groups[0] is first  # schedulers hold a reference to it
    del scheduler


def test_added_half_parameters_get_masters() -> None:
    """A group of fp16 parameters added after three steps has masters and its own first step."""
    a = nn.Parameter(torch.zeros(3))
    optimizer = FusedSGD([a], lr=1.0, momentum=0.5, dampening=0.5)
    for _ in range(3):
        a.grad = torch.ones(3)
        optimizer.step()
    b = nn.Parameter(torch.zeros(3, dtype=torch.float16))
    optimizer.add_param_group({"params": [b], "lr": 2.0, "weight_decay": 0.0})
    b.grad = torch.ones(3, dtype=torch.float16)
    optimizer.step()
    state = optimizer.state[b]
    assert (state["master"] == -2).all()
    assert state["master"].dtype == torch.float32
    assert (state["momentum_buffer"] == 1).all()  # not dampened
    assert state["step"] == 1
    assert optimizer.state[a]["step"] == 4


def test_an_lr_tensor_can_change_in_place() -> None:
    """An lr of 0.1, then 1, with momentum 0.9 and gradients of 1: p is 1, 0.9, -1."""
    for shape, dtype in (((), torch.float32), ((1,), torch.float64)):
        lr = torch.full(shape, 0.1, dtype=dtype)
        p = nn.Parameter(torch.ones(4))
        optimizer = FusedSGD([p], lr=lr, momentum=0.9)
        for new, want in ((None, 0.9), (1.0, -1.0)):
            if new is not None:
                lr.fill_(new)
            p.grad = torch.ones(4)
            optimizer.step()
            torch.testing.assert_close(p.detach(), torch.full((4,), want))
    pair = Pair(lr=torch.tensor(0.05), momentum=0.9)
    pair.step()
    pair.check()


def test_shared_parameters_equal_torch() -> None:
    """A parameter of two layers is stepped once; one given twice is stepped twice, with torch's warning."""
    models = [nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)) for _ in range(2)]
    for m in models:
        m[1].weight = m[0].weight
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [FusedSGD(models[0].parameters(), lr=0.1, momentum=0.9)]
    optimizers.append(torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9, foreach=False))  # type: ignore[arg-type]
    x = torch.randn(3, 4)
    for _ in range(3):
        for m, o in zip(models, optimizers, strict=True):
            o.zero_grad()
            m(x).square().sum().backward()
            o.step()
    same(list(models[0].parameters()), list(models[1].parameters()))
    a = nn.Parameter(torch.randn(50))
    b = nn.Parameter(a.detach().clone())
    with pytest.warns(UserWarning, match="duplicate"):
        twice = FusedSGD([a, a], lr=0.1, momentum=0.9), torch.optim.SGD([b, b], lr=0.1, momentum=0.9, foreach=False)
    for _ in range(3):
        give_grads([a], [b])
        for o in twice:
            o.step()
    same([a], [b])


def test_one_group_can_mix_dtypes(backend: str) -> None:
    """fp16, bf16, fp32 and fp64 parameters equal torch.optim.SGD on their masters."""
    mine = [p for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64) for p in make_params(d)]
    theirs = [nn.Parameter(p.detach().to(torch.float64 if p.dtype is torch.float64 else torch.float32)) for p in mine]
    ours = FusedSGD(mine, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True)
    reference = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True, foreach=False)
    for _ in range(4):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(a.shape).to(a.dtype)
            b.grad = a.grad.to(b.dtype)
        ours.step()
        reference.step()
    same(list(ours.master_params()), theirs, backend)  # type: ignore[arg-type]
    for a, b in zip(mine, ours.master_params(), strict=True):
        assert torch.equal(a.detach(), b.detach().to(a.dtype))


def test_parameters_can_change_dtype() -> None:
    """model.half(), .float() and .double() between steps: momentum stays fp32 (fp64)."""
    model = nn.Linear(6, 4)
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)

    def step() -> None:
        give_grads(list(model.parameters()))
        optimizer.step()

    step()
    momentum = optimizer.state[model.weight]["momentum_buffer"].clone()
    model.half()
    assert torch.equal(optimizer.state[model.weight]["momentum_buffer"], momentum)
    before = model.weight.detach().float()
    step()
    state = optimizer.state[model.weight]
    assert state["momentum_buffer"].dtype == state["master"].dtype == torch.float32
    want = before - 0.1 * (momentum * 0.9 + model.weight.grad.float())
    torch.testing.assert_close(state["master"], want, rtol=1e-6, atol=1e-6)
    for change in (model.float, model.double, model.bfloat16):
        change()
        step()
        assert model.weight.isfinite().all()
    assert optimizer.state[model.weight]["momentum_buffer"].dtype == torch.float32
    assert optimizer.state[model.weight]["step"] == 5


def test_named_parameters_are_accepted() -> None:
    model = nn.Linear(3, 2)
    optimizer = FusedSGD(model.named_parameters(), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert "lr: 0.1" in repr(optimizer)


def test_torch_arguments_are_accepted() -> None:
    """FusedSGD takes the arguments of torch.optim.SGD."""
    for options in ({"foreach": True}, {"fused": True}, {"foreach": False, "fused": False, "differentiable": False}):
        FusedSGD(make_params(), 0.1, 0.9, 0.0, 1e-4, True, maximize=False, **options)


def batches(n: int) -> Iterator[Tensor]:
    for _ in range(n):
        yield torch.randn(8, 3, 8, 8)


def test_a_model_trains_as_with_torch() -> None:
    """Convolution, BatchNorm and linear layer in channels_last, ten steps with a schedule: equal bit for bit."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    model = model.to(memory_format=torch.channels_last)
    other = copy.deepcopy(model)
    optimizers = [
        FusedSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4),
        torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, foreach=False),
    ]
    schedulers = [lr_scheduler.CosineAnnealingLR(o, 10) for o in optimizers]
    for x in batches(10):
        for m, o, s in zip((model, other), optimizers, schedulers, strict=True):
            o.zero_grad()
            nn.functional.cross_entropy(m(x), torch.arange(8) % 4).backward()
            o.step()
            s.step()
    same(list(model.parameters()), list(other.parameters()))
