"""Checkpoints of other optimizers and schedules continue, or are refused with the reason."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from fasttricks.optim import FusedLARS, FusedSGD, LossScaler, param_groups, warmup_cosine


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def train(optimizer: Any, model: nn.Module, steps: int = 2) -> None:
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()


def snapshot(optimizer: Any) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict())


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_same(a[k], b[k])
    else:
        assert a == b


class TrustedSGD(torch.optim.SGD):
    """SGD with one more option, like the LARS of other packages."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            group["trust_coeff"] = 1e-3


@pytest.mark.parametrize("stepped", [True, False])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda p: torch.optim.Adam(p), "exp_avg, exp_avg_sq|lacks momentum, dampening"),
        (lambda p: torch.optim.AdamW(p), "exp_avg, exp_avg_sq|lacks momentum, dampening"),
        (lambda p: torch.optim.RMSprop(p, momentum=0.9), "square_avg|lacks dampening, nesterov"),
        (lambda p: torch.optim.Adagrad(p), "has sum|lacks momentum"),
        (lambda p: torch.optim.Rprop(p), "has prev|lacks momentum"),
        (lambda p: TrustedSGD(p, lr=0.1, momentum=0.9), "has trust_coeff"),
    ],
)
def test_state_of_another_optimizer_is_refused(other: Any, message: str, stepped: bool) -> None:
    """The error names what it has or lacks; the optimizer is unchanged and can continue."""
    model = make_model()
    foreign = other(model.parameters())
    ours = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
    train(ours, model)
    if stepped:
        train(foreign, model)
    before = snapshot(ours)
    with pytest.raises(ValueError, match=f"state_dict: .*({message}).*; accepted: ") as caught:
        ours.load_state_dict(foreign.state_dict())
    assert "FusedSGD" in str(caught.value)
    assert_same(ours.state_dict(), before)
    train(ours, model)


def test_lars_loads_only_its_own_checkpoints() -> None:
    model = make_model()
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lars = FusedLARS(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="lacks trust_coefficient, adapt_1d"):
        lars.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="trust_coefficient, adapt_1d, of which FusedSGD knows nothing"):
        FusedSGD(model.parameters(), lr=0.1).load_state_dict(lars.state_dict())
    FusedLARS(model.parameters(), lr=0.3).load_state_dict(lars.state_dict())


def test_options_of_schedules_and_of_users_are_loaded() -> None:
    """Options that schedules add to groups, and the user's own, are accepted."""
    model = make_model()

    def make(kind: type) -> Any:
        return kind([{"params": list(model.parameters()), "lr_mult": 0.5}], lr=0.1, momentum=0.9)

    before = make(torch.optim.SGD)
    torch.optim.lr_scheduler.OneCycleLR(before, 0.1, total_steps=10)
    after = make(FusedSGD)
    after.load_state_dict(before.state_dict())
    assert after.param_groups[0]["lr_mult"] == 0.5
    assert after.param_groups[0]["initial_lr"] == before.param_groups[0]["initial_lr"]


def test_a_lambda_schedule_continues_one_of_torch() -> None:
    """As docs/frameworks.md says: from the same epoch a LambdaLR gives the rates of CosineAnnealingLR."""
    model = make_model()
    optimizer = FusedSGD(model.parameters(), lr=0.4, momentum=0.9)
    theirs = CosineAnnealingLR(optimizer, 10)
    for _ in range(4):
        train(optimizer, model, 1)
        theirs.step()
    saved = copy.deepcopy(theirs.state_dict())
    resumed = FusedSGD(model.parameters(), lr=0.4)
    resumed.load_state_dict(snapshot(optimizer))
    ours = LambdaLR(resumed, warmup_cosine(0, 10), last_epoch=saved["last_epoch"] - 1)
    for _ in range(6):
        assert resumed.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
        for o, s in ((optimizer, theirs), (resumed, ours)):
            train(o, model, 1)
            s.step()


def test_a_copy_keeps_unscale_in_step() -> None:
    optimizer = FusedSGD(make_model().parameters(), lr=0.1, unscale_in_step=False)
    assert copy.deepcopy(optimizer)._step_supports_amp_scaling is False
    assert FusedSGD(make_model().parameters(), lr=0.1)._step_supports_amp_scaling is True


def stepped(kind: type[torch.optim.Optimizer], params: Any, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    optimizer = kind(params, lr=0.1, **options)
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_the_error_names_the_state_that_does_not_fit(kind: type[torch.optim.Optimizer]) -> None:
    model = nn.Linear(4, 2)
    own = stepped(FusedSGD, model.parameters(), model, momentum=0.9)
    before = copy.deepcopy(own.state_dict())
    other = stepped(kind, model.parameters(), model).state_dict()
    entry = next(name for name in other["state"][0] if name != "step")
    with pytest.raises(ValueError, match=f"the state of parameter 0 has .*{entry}.*accepted: .*momentum_buffer"):
        own.load_state_dict(other)
    with pytest.raises(ValueError, match=r"group 0 lacks .*nesterov"):  # there is no state before the first step
        own.load_state_dict(kind(model.parameters()).state_dict())
    torch.testing.assert_close(own.state_dict(), before, rtol=0, atol=0)


def test_a_checkpoint_of_one_group_loads_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    old = stepped(torch.optim.SGD, model.parameters(), model, momentum=0.9)
    optimizer = FusedSGD(param_groups(model, 1e-2, named=True), lr=0.2, momentum=0.8)
    with pytest.raises(ValueError, match=r"groups of \[6\] .*groups of \[2, 4\].*named=True.*named_parameters"):
        optimizer.load_state_dict(old.state_dict())
    named = torch.optim.SGD(model.named_parameters(), lr=0.1)
    named.load_state_dict(old.state_dict())
    with pytest.warns(UserWarning, match="loaded by the parameters' names"):
        optimizer.load_state_dict(named.state_dict())
    for p in model.parameters():
        assert torch.equal(optimizer.state[p]["momentum_buffer"], old.state[p]["momentum_buffer"])
    assert [(g["lr"], g["momentum"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.2, 0.8, 1e-2),
        (0.2, 0.8, 0.0),
    ]
    renamed = named.state_dict()
    renamed["param_groups"][0]["param_names"] = ["stem", *renamed["param_groups"][0]["param_names"][1:]]
    with pytest.raises(ValueError, match=r"other parameters than the optimizer; .*0\.weight, stem"):
        optimizer.load_state_dict(renamed)


@pytest.mark.parametrize("kind", [FusedSGD, FusedLARS])
def test_a_process_group_is_shared_by_copies_and_not_pickled(kind: Any, tmp_path: Path) -> None:
    """A pickle would lose the group, and clip by the gradients of one rank."""
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = nn.Linear(4, 2)
        group = dist.group.WORLD
        optimizer = stepped(kind, model.parameters(), model, momentum=0.9, max_grad_norm=1.0, shard_group=group)
        twin = copy.deepcopy(optimizer)
        assert twin.shard_group is group
        (p, *_), (q, *_) = (o.param_groups[0]["params"] for o in (optimizer, twin))
        assert p is not q
        assert torch.equal(optimizer.state[p]["momentum_buffer"], twin.state[q]["momentum_buffer"])
        with pytest.raises(TypeError, match=rf"^{kind.__name__}: shard_group is a process group.*state_dict\(\)"):
            pickle.dumps(optimizer)
        assert pickle.loads(pickle.dumps(optimizer.state_dict()))["param_groups"]
    finally:
        dist.destroy_process_group()


# ---- arguments that are not a state_dict ----

NO_STATE: list[tuple[Any, type[Exception], str]] = [
    (None, TypeError, r"state_dict is a NoneType; accepted: the state_dict of"),
    ([1, 2], TypeError, r"state_dict is a list; accepted: the state_dict of"),
    ("last.pt", TypeError, r"state_dict is a str; accepted: the state_dict of"),
]
NO_OPTIMIZER: list[tuple[Any, type[Exception], str]] = [
    ({}, ValueError, r"state_dict lacks state, param_groups \(it has nothing\)"),
    ({"model": {}, "optimizer": {}}, ValueError, r"lacks state, param_groups \(it has 'model', 'optimizer'\)"),
    (make_model().state_dict(), ValueError, r"lacks state, param_groups \(it has '0.weight', '0.bias', "),
    ({"state": {}}, ValueError, r"lacks param_groups \(it has 'state'\)"),
    ({"state": None, "param_groups": []}, TypeError, r"state_dict\['state'\] is a NoneType; accepted: a dict"),
    ({"state": {}, "param_groups": {}}, TypeError, r"state_dict\['param_groups'\] is a dict.*accepted: a list of dict"),
    ({"state": {}, "param_groups": [{"lr": 0.1}]}, TypeError, r"a list, or one of other things; accepted: a list of"),
]


@pytest.mark.parametrize("kind", [FusedSGD, FusedLARS])
def test_an_optimizer_refuses_what_is_not_a_state_dict(kind: type) -> None:
    optimizer = kind(make_model().parameters(), lr=0.1, momentum=0.9)
    before = snapshot(optimizer)
    for wrong, error, message in NO_STATE + NO_OPTIMIZER:
        with pytest.raises(error, match=rf"^{kind.__name__}\.load_state_dict: .*{message}"):
            optimizer.load_state_dict(wrong)
    assert_same(snapshot(optimizer), before)


def test_a_scaler_refuses_what_is_not_a_state_dict() -> None:
    good = torch.amp.GradScaler("cpu", init_scale=8.0).state_dict()
    for wrong, error, message in [
        *NO_STATE,
        ({**good, "scale": "8"}, TypeError, "scale is a str; accepted: a number"),
        ({**good, "growth_factor": None}, TypeError, "growth_factor is a NoneType; accepted: a number"),
        ({**good, "scale": float("nan")}, ValueError, "scale is nan; accepted: a finite number >= 0"),
        ({**good, "_growth_tracker": -1}, ValueError, "_growth_tracker is -1; accepted: a finite number >= 0"),
    ]:
        scaler = LossScaler(2.0)
        with pytest.raises(error, match=rf"^LossScaler\.load_state_dict: {message}"):
            scaler.load_state_dict(wrong)
        assert scaler.state_dict() == LossScaler(2.0).state_dict()
    with pytest.raises(ValueError, match="state_dict lacks scale, growth_factor, backoff_factor"):
        LossScaler().load_state_dict(LossScaler(enabled=False).state_dict())
    scaler.load_state_dict({**good, "scale": torch.tensor(8.0)})  # checkpoint libraries restore numbers as tensors
    assert scaler.state_dict() == good


def test_copies_of_a_scaler_with_a_process_group(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        scaler = LossScaler(8.0, process_group=torch.distributed.group.WORLD)
        twin = copy.deepcopy({"scaler": scaler})["scaler"]
        assert twin.process_group is scaler.process_group
        twin.update(2.0)
        assert (scaler.get_scale(), twin.get_scale()) == (8.0, 2.0)
        with pytest.raises(TypeError, match=r"process_group cannot be pickled; save scaler\.state_dict\(\)"):
            pickle.dumps(scaler)
    finally:
        torch.distributed.destroy_process_group()
    assert pickle.loads(pickle.dumps(LossScaler(8.0))).get_scale() == 8.0
