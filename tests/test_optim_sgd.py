"""FusedSGD beside torch.optim.SGD(foreach=False, fused=False): every protocol of torch.optim."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from fasttricks.optim import FusedSGD, param_groups

HAS_FMA = torch.backends.cpu.get_cpu_capability() != "DEFAULT"


def make_params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Of many kinds: matrices, channels-last filters, a slice, an empty one, a scalar."""
    last = torch.channels_last
    made = [torch.randn(5, 3), torch.randn(7), torch.randn(4, 3, 3, 3).contiguous(memory_format=last)]
    made += [torch.randn(8, 9)[::2, 1:8], torch.randn(0, 3), torch.randn(()), torch.randn(6, 4).t()]
    return [nn.Parameter(t.to(dtype)) for t in made]


def twins(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def give_grads(*lists: list[nn.Parameter], skip: tuple[int, ...] = ()) -> None:
    for i, same in enumerate(zip(*lists, strict=True)):
        grad = torch.randn(same[0].shape)
        for p in same:
            p.grad = None if i in skip else grad.to(p.dtype)


def same(mine: list[nn.Parameter], theirs: list[nn.Parameter], backend: str = "cpu") -> None:
    for a, b in zip(mine, theirs, strict=True):
        if backend == "cpu" and HAS_FMA:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a.detach(), b.detach(), rtol=3e-7, atol=3e-7)


class Pair:
    """The same parameters under both optimizers."""

    def __init__(self, make: Callable[[type, list[nn.Parameter]], Any] | None = None, **options: Any) -> None:
        self.mine = make_params()
        self.theirs = twins(self.mine)
        if make is None:
            self.ours = FusedSGD(self.mine, **options)
            self.torch = torch.optim.SGD(self.theirs, foreach=False, **options)
        else:
            self.ours, self.torch = make(FusedSGD, self.mine), make(torch.optim.SGD, self.theirs)

    def step(self, skip: tuple[int, ...] = ()) -> None:
        give_grads(self.mine, self.theirs, skip=skip)
        self.ours.step()
        self.torch.step()

    def check(self, backend: str = "cpu") -> None:
        same(self.mine, self.theirs, backend)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
    ],
)
def test_as_torch(backend: str, options: dict) -> None:
    pair = Pair(**options)
    for _ in range(4):
        pair.step()
    pair.check(backend)


def test_no_gradient_no_change(backend: str) -> None:
    """Without a gradient a parameter keeps its value and its state; its first step is when its first gradient comes."""
    pair = Pair(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1)
    for skip in ((0, 2, 4), (0, 1), (), (3,), ()):
        pair.step(skip)
        pair.check(backend)
    pair.step(tuple(range(7)))
    pair.check(backend)


def test_options_change_between_steps(backend: str) -> None:
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


def test_groups_and_add_param_group() -> None:
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
    assert pair.ours.param_groups[0] is first  # what schedulers hold on to
    del scheduler


def test_added_half_parameters_get_masters() -> None:
    """A group of fp16 parameters that comes after three steps has masters, and its first step is its own."""
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


def test_lr_is_a_tensor() -> None:
    """Changed in place between steps: .1, then 1 with momentum .9 and gradient 1 takes p from 1 to .9 to -1."""
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
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),  # cycles the momentum, too
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
def test_schedulers(name: str, lr: Any) -> None:
    pair = Pair(lr=torch.tensor(0.1) if lr == "tensor" else lr, momentum=0.9)
    if lr == "tensor":  # one tensor for each
        pair.torch.param_groups[0]["lr"] = torch.tensor(0.1)
    schedulers = [SCHEDULERS[name](o) for o in (pair.ours, pair.torch)]
    for _ in range(6):
        pair.step()
        for s in schedulers:
            s.step(1.0) if name == "ReduceLROnPlateau" else s.step()
    assert float(pair.ours.param_groups[0]["lr"]) == float(pair.torch.param_groups[0]["lr"])
    pair.check()


def test_swa() -> None:
    pair = Pair(lr=0.1, momentum=0.9)
    schedulers = [torch.optim.swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3) for o in (pair.ours, pair.torch)]
    for _ in range(5):
        pair.step()
        for s in schedulers:
            s.step()
    pair.check()


def test_closure() -> None:
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


def test_hooks() -> None:
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


def test_zero_grad() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = FusedSGD([p], lr=1.0)
    p.grad = torch.ones(3)
    optimizer.zero_grad(set_to_none=False)
    assert (p.grad == 0).all()
    optimizer.zero_grad()
    assert p.grad is None


def test_optimizers_in_hooks_of_accumulation() -> None:
    """One optimizer a parameter, stepped while the backward pass runs, gives what one step after it gives."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    other = copy.deepcopy(model)
    reference = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, foreach=False)
    optimizers = {p: FusedSGD([p], lr=0.1, momentum=0.9) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        optimizers[p].zero_grad()  # type: ignore[index]

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        x = torch.randn(6, 4)
        model(x).square().sum().backward()
        reference.zero_grad()
        other(x).square().sum().backward()
        reference.step()
    same(list(model.parameters()), list(other.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_half_parameters_in_hooks_of_accumulation() -> None:
    """The same on fp16 with masters: gradients are gone when the backward pass ends, and so is no precision."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)).half()
    other = copy.deepcopy(model)
    whole = FusedSGD(other.parameters(), lr=1e-3, momentum=0.9)
    optimizers = {p: FusedSGD([p], lr=1e-3, momentum=0.9) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        optimizers[p].zero_grad()  # type: ignore[index]

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        x = torch.randn(6, 4).half()
        model(x).float().square().sum().backward()
        whole.zero_grad()
        other(x).float().square().sum().backward()
        whole.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizers[p].state[p]["master"], whole.state[q]["master"])


def test_shared_parameters() -> None:
    """A parameter of two layers is stepped once; one that is given twice is stepped twice, with torch's warning."""
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


def test_mixed_dtypes_in_one_group(backend: str) -> None:
    """fp16, bf16, fp32 and fp64 in one group: each is torch.optim.SGD on its master."""
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


def test_parameters_that_become_half_or_double() -> None:
    """model.half(), .float(), .double() between steps: momentum goes on in fp32 (fp64)."""
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
    ({"weight_decay": torch.tensor(0.1)}, TypeError, "weight_decay is Tensor"),
    ({"nesterov": True}, ValueError, "nesterov requires"),
    ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError, "nesterov requires"),
    ({"differentiable": True}, ValueError, "differentiable is True"),
    ({"foreach": True, "fused": True}, ValueError, "foreach and fused"),
    ({"max_grad_norm": 0}, ValueError, "max_grad_norm is 0"),
    ({"max_grad_norm": math.inf}, ValueError, "max_grad_norm is inf"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        FusedSGD(parameter(), **options)
    if "lr" in options or "momentum" in options or "weight_decay" in options:
        optimizer = FusedSGD(parameter(), lr=0.1)
        with pytest.raises(error, match=message):
            optimizer.add_param_group({"params": parameter(), **options})
        assert len(optimizer.param_groups) == 1  # as it was


def test_bad_parameters() -> None:
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


def test_named_parameters() -> None:
    model = nn.Linear(3, 2)
    optimizer = FusedSGD(model.named_parameters(), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert "lr: 0.1" in repr(optimizer)


def stepped(kind: type[torch.optim.Optimizer], params: Any, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    optimizer = kind(params, lr=0.1, **options)
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_the_state_of_another_optimizer_is_refused(kind: type[torch.optim.Optimizer]) -> None:
    model = nn.Linear(4, 2)
    own = stepped(FusedSGD, model.parameters(), model, momentum=0.9)
    before = copy.deepcopy(own.state_dict())
    other = stepped(kind, model.parameters(), model).state_dict()
    entry = next(name for name in other["state"][0] if name != "step")
    with pytest.raises(ValueError, match=f"the state of parameter 0 has .*{entry}.*accepted: .*momentum_buffer"):
        own.load_state_dict(other)
    with pytest.raises(ValueError, match=r"group 0 lacks .*nesterov"):  # before its first step there is no state
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


def test_torch_arguments_are_accepted() -> None:
    """Code that builds torch.optim.SGD builds FusedSGD with the same words."""
    for options in ({"foreach": True}, {"fused": True}, {"foreach": False, "fused": False, "differentiable": False}):
        FusedSGD(parameter(), 0.1, 0.9, 0.0, 1e-4, True, maximize=False, **options)


def batches(n: int) -> Iterator[Tensor]:
    for _ in range(n):
        yield torch.randn(8, 3, 8, 8)


def test_a_model_trains_as_with_torch() -> None:
    """Convolution, batch norm and linear layer in channels-last, ten steps with a schedule: equal to the last bit."""
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
