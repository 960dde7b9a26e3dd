"""fp32 masters and momentum: checkpoints, copies, changed weights, steps below the resolution of fp16."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import optimizer_pairs
import pytest
import torch
from cases import HALF
from torch import Tensor, nn

from fasttricks.optim import FusedLARS, FusedSGD


def make_model(dtype: torch.dtype = torch.float16) -> nn.Module:
    """Half weights and an fp32 BatchNorm, as in mixed precision training."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model[0].to(dtype)
    model[2].to(dtype)
    return model


def give_grads(*models: nn.Module) -> None:
    optimizer_pairs.give_grads(*[list(m.parameters()) for m in models])


def train(optimizers: list[Any], models: list[nn.Module], steps: int = 3) -> None:
    for _ in range(steps):
        give_grads(*models)
        for o in optimizers:
            o.step()


def tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    found: list[Tensor] = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            found += [p.detach(), *[v for _, v in sorted(optimizer.state[p].items())]]
    return found


def assert_equal(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    left, right = tensors(a), tensors(b)
    assert len(left) == len(right)
    for x, y in zip(left, right, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def saved(optimizer: torch.optim.Optimizer) -> dict:
    """The state_dict, saved and loaded with weights_only=True."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", [FusedSGD, FusedLARS])
@pytest.mark.parametrize("dtype", HALF)
def test_resumed_training_equals_uninterrupted_training(kind: type, dtype: torch.dtype) -> None:
    """Three steps after loading, all tensors are equal bit for bit."""
    model = make_model(dtype)
    optimizer = kind(model.parameters(), lr=0.1, momentum=0.9, dampening=0.1, weight_decay=1e-3)
    train([optimizer], [model])
    other = make_model(dtype)
    other.load_state_dict(model.state_dict())
    resumed = kind(other.parameters(), lr=0.7, momentum=0.9)
    resumed.load_state_dict(saved(optimizer))
    assert_equal(optimizer, resumed)
    state = resumed.state[other[0].weight]
    assert state["master"].dtype == state["momentum_buffer"].dtype == torch.float32
    assert not torch.equal(state["master"], state["master"].to(dtype).float())  # it has bits that the parameter lacks
    train([optimizer, resumed], [model, other])
    assert_equal(optimizer, resumed)


def test_loaded_state_shares_no_memory() -> None:
    model, other = make_model(), make_model()
    optimizer, second = (FusedSGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, other))
    train([optimizer], [model])
    second.load_state_dict(optimizer.state_dict())
    mine = {t.data_ptr() for t in tensors(optimizer)}
    assert not mine & {t.data_ptr() for t in tensors(second)}


def test_a_value_that_fp16_cannot_hold_is_loaded() -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = FusedSGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones_like(p)
    optimizer.step()
    state_dict = optimizer.state_dict()
    state_dict["state"][0]["momentum_buffer"] = torch.full((4,), 1.0001)
    optimizer.load_state_dict(state_dict)
    assert (optimizer.state[p]["momentum_buffer"] == torch.tensor(1.0001)).all()


def test_momentum_of_another_layout_is_loaded() -> None:
    p = nn.Parameter(torch.randn(4, 3, 2, 2))
    optimizer = FusedSGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.randn_like(p)
    optimizer.step()
    state_dict = optimizer.state_dict()
    want = state_dict["state"][0]["momentum_buffer"].clone()
    state_dict["state"][0]["momentum_buffer"] = want.contiguous(memory_format=torch.channels_last)
    optimizer.load_state_dict(state_dict)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], want)
    assert optimizer.state[p]["momentum_buffer"].stride() == p.stride()


def test_torch_checkpoints_load_and_ours_load_in_torch() -> None:
    """Three steps of one and three of the other from its checkpoint equal six steps of SGD."""
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 1e-2}
    models = [nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)) for _ in range(3)]
    for m in models[1:]:
        m.load_state_dict(models[0].state_dict())
    kinds = [torch.optim.SGD, FusedSGD]
    throughout = torch.optim.SGD(models[2].parameters(), foreach=False, **options)
    for first, second in ((0, 1), (1, 0)):
        before = kinds[first](models[0].parameters(), **options)
        if first:
            before.load_state_dict(saved(throughout))
        train([before, throughout], [models[0], models[2]])
        models[1].load_state_dict(models[0].state_dict())
        after = kinds[second](models[1].parameters(), lr=0.5)
        after.load_state_dict(saved(before))
        assert after.param_groups[0]["momentum"] == 0.9
        train([after, throughout], [models[1], models[2]])
        for p, q in zip(models[1].parameters(), models[2].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        models[0].load_state_dict(models[1].state_dict())


def test_a_torch_checkpoint_of_an_fp16_model_loads() -> None:
    """Its momentum becomes fp32, masters are copied from the parameters, the next step is not a first step."""
    model = make_model()
    theirs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    train([theirs], [model])
    ours = FusedSGD(model.parameters(), lr=0.1)
    ours.load_state_dict(saved(theirs))
    p = model[0].weight
    assert ours.state[p]["momentum_buffer"].dtype == torch.float32
    assert ours.state[p]["step"] == 1
    buffer, before = ours.state[p]["momentum_buffer"].clone(), p.detach().float()
    give_grads(model)
    ours.step()
    want = buffer * 0.9 + 0.5 * p.grad.float()
    torch.testing.assert_close(ours.state[p]["momentum_buffer"], want)
    torch.testing.assert_close(ours.state[p]["master"], before - 0.1 * want)
    theirs.load_state_dict(saved(ours))
    give_grads(model)
    theirs.step()


def test_a_checkpoint_before_the_first_step_loads() -> None:
    model = make_model()
    ours, theirs = (k(model.parameters(), lr=0.1, momentum=0.9) for k in (FusedSGD, torch.optim.SGD))
    ours.load_state_dict(saved(theirs))
    theirs.load_state_dict(saved(ours))
    old = theirs.state_dict()
    old["state"] = {i: {"momentum_buffer": None} for i in range(6)}
    ours.load_state_dict(old)
    train([ours], [model])
    assert ours.state[model[0].weight]["step"] == 3


def test_a_checkpoint_of_another_model_is_refused() -> None:
    models = [nn.Linear(4, 3), nn.Linear(5, 3), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))]
    optimizers = [FusedSGD(m.parameters(), lr=0.1, momentum=0.9) for m in models]
    train(optimizers[:1], models[:1])
    with pytest.raises(ValueError, match=r"momentum_buffer of a parameter has shape \(3, 4\); accepted: \(3, 5\)"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    with pytest.raises(ValueError, match=r"groups of \[2\] parameters; accepted: groups of \[4\]"):
        optimizers[2].load_state_dict(optimizers[0].state_dict())


@pytest.mark.parametrize("kind", [FusedSGD, FusedLARS])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_continue_identically(kind: type, how: str) -> None:
    """A copy has the options, masters and scaling protocol of the original, and shares no memory with it."""
    model = make_model()
    optimizer = kind(model.parameters(), lr=0.1, momentum=0.9, max_grad_norm=5.0)
    train([optimizer], [model])
    if how == "deepcopy":
        twin, other = copy.deepcopy((optimizer, model))
    elif how == "pickle":
        twin, other = pickle.loads(pickle.dumps((optimizer, model)))
    else:
        file = io.BytesIO()
        torch.save((optimizer, model), file)
        file.seek(0)
        twin, other = torch.load(file, weights_only=False)
    assert twin._step_supports_amp_scaling is True
    assert twin.max_grad_norm == 5.0
    assert not {t.data_ptr() for t in tensors(optimizer)} & {t.data_ptr() for t in tensors(twin)}
    assert_equal(optimizer, twin)
    train([optimizer, twin], [model, other])
    assert_equal(optimizer, twin)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("how", ["load_state_dict", "data", "copy_"])
def test_weights_changed_from_outside_are_kept(dtype: torch.dtype, how: str) -> None:
    """A step with zero gradients keeps weights that were changed in any way, and sets the masters to them."""
    model, source = make_model(dtype), make_model(dtype)
    optimizer = FusedSGD(model.parameters(), lr=0.1)
    train([optimizer], [model])
    if how == "load_state_dict":
        model.load_state_dict(source.state_dict())
    for p, q in zip(model.parameters(), source.parameters(), strict=True):
        if how == "data":
            p.data = q.data.clone()
        elif how == "copy_":
            with torch.no_grad():
                p.copy_(q)
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, q in zip(model.parameters(), source.parameters(), strict=True):
        assert torch.equal(p, q)
    for m, q in zip(optimizer.master_params(), source.parameters(), strict=True):
        torch.testing.assert_close(m.detach(), q.detach().float(), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_swapping_weights_and_back_keeps_the_masters() -> None:
    """As for validation with averaged weights."""
    model = make_model()
    optimizer = FusedSGD(model.parameters(), lr=0.01)
    train([optimizer], [model])
    kept = [p.detach().clone() for p in model.parameters()]
    masters = [m.detach().clone() for m in optimizer.master_params()]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
        for p, k in zip(model.parameters(), kept, strict=True):
            p.copy_(k)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for m, k in zip(optimizer.master_params(), masters, strict=True):
        assert torch.equal(m, k)  # with all their precision


def test_sync_masters_copies_the_parameters() -> None:
    model = make_model()
    optimizer = FusedSGD(model.parameters(), lr=0.1)
    train([optimizer], [model])
    optimizer.sync_masters()
    for p, m in zip(model.parameters(), optimizer.master_params(), strict=True):
        assert torch.equal(m, p.float())


@pytest.mark.parametrize("dtype", HALF)
def test_small_steps_add_up(dtype: torch.dtype) -> None:
    """1000 steps of 1e-4, below the resolution of half: 1 becomes 0.9, and stays 1 with torch.optim.SGD."""
    ours, plain = (nn.Parameter(torch.ones(20, dtype=dtype)) for _ in range(2))
    optimizers = [FusedSGD([ours], lr=1e-4), torch.optim.SGD([plain], lr=1e-4)]
    for p in (ours, plain):
        p.grad = torch.ones_like(p)
    for _ in range(1000):
        for o in optimizers:
            o.step()
    assert (plain == 1).all()
    torch.testing.assert_close(next(optimizers[0].master_params()).detach(), torch.full((20,), 0.9), rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.detach().float(), torch.full((20,), 0.9), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", HALF)
def test_checkpoints_load_across_dtypes(dtype: torch.dtype) -> None:
    """From fp32 to half and back: momentum and counts are kept exactly, masters are copied from the model."""
    wide, half = make_model(torch.float32), make_model(dtype)
    before = FusedSGD(wide.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    train([before], [wide])
    half.load_state_dict(wide.state_dict())  # rounds
    after = FusedSGD(half.parameters(), lr=0.5)
    after.load_state_dict(saved(before))
    back = make_model(torch.float32)
    back.load_state_dict(half.state_dict())
    third = FusedSGD(back.parameters(), lr=0.5)
    third.load_state_dict(saved(after))
    for p, q, r in zip(wide.parameters(), half.parameters(), back.parameters(), strict=True):
        momentum = before.state[p]["momentum_buffer"]
        for optimizer, mine in ((after, q), (third, r)):
            assert torch.equal(optimizer.state[mine]["momentum_buffer"], momentum)
            assert optimizer.state[mine]["step"] == 3
        assert "master" not in third.state[r]
    for q, m in zip(half.parameters(), after.master_params(), strict=True):
        assert torch.equal(m, q.float())
    give_grads(half, back)
    after.step()
    third.step()
    for q, r, m in zip(half.parameters(), back.parameters(), after.master_params(), strict=True):
        if q.dtype is torch.float32:
            assert torch.equal(m, r)
        else:  # from equal weights, with gradients that were rounded differently
            torch.testing.assert_close(m.detach(), r.detach(), rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("how", ["aot_eager", "inductor"])
def test_a_compiled_step_equals_eager(how: str) -> None:
    """torch.compile of step, and of a function that calls it, while a float lr changes."""
    models = [make_model() for _ in range(3)]
    for m in models[1:]:
        m.load_state_dict(models[0].state_dict())
    optimizers = [FusedSGD(m.parameters(), lr=0.1, momentum=0.9, max_grad_norm=1.0) for m in models]
    compiled = torch.compile(optimizers[1].step, backend=how)

    @torch.compile(backend=how)
    def within(x: Tensor) -> Tensor:
        optimizers[2].step()
        return x + 1

    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in optimizers]
    for i in range(4):
        give_grads(*models)
        if i == 2:
            for m in models:
                next(m.parameters()).grad = None
        optimizers[0].step()
        compiled()
        within(torch.ones(1))
        for s in schedulers:
            s.step()
    assert_equal(optimizers[0], optimizers[1])
    assert_equal(optimizers[0], optimizers[2])
