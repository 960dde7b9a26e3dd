"""A model trained for some steps, fused and not: what both must give."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases import relative_error
from census import counted
from torch import nn
from torch.utils._pytree import tree_leaves

import fasttricks


class Case(NamedTuple):
    """What makes a model, the edge of its images, and how many of them make a batch."""

    make: Callable[[], nn.Module]
    edge: int = 32
    batch: int = 4


class Course(NamedTuple):
    """What some steps of training and an evaluation gave."""

    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    evaluated: torch.Tensor


def batches_of(case: Case, steps: int) -> list[torch.Tensor]:
    return [torch.randn(case.batch, 3, case.edge, case.edge, dtype=torch.float64) for _ in range(steps)]


def train(model: nn.Module, batches: list[torch.Tensor]) -> Course:
    """Steps of SGD, one on each batch, whose random numbers are the same for every model; then evaluation."""
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
    outputs, gradients = [], {}
    model.train()
    for i, x in enumerate(batches):
        torch.manual_seed(i)
        got = tree_leaves(model(x.to(dtype)))
        outputs += [y.detach() for y in got]
        optimizer.zero_grad()
        target = torch.arange(len(x)) % got[0].shape[1]
        sum(F.cross_entropy(y, target) for y in got).backward()
        gradients.update({f"{n}, step {i}": p.grad for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    with torch.no_grad():
        evaluated = model.eval()(batches[-1].to(dtype))
    return Course(outputs, gradients, copy.deepcopy(model.state_dict()), evaluated)


def distance(got: Course, want: Course) -> float:
    """The largest relative error of an output, a gradient or a parameter."""
    assert got.gradients.keys() == want.gradients.keys()
    assert list(got.state) == list(want.state)
    errors = {
        f"output {i}": relative_error(a, b) for i, (a, b) in enumerate(zip(got.outputs, want.outputs, strict=True))
    }
    errors["evaluated"] = relative_error(got.evaluated, want.evaluated)
    # a bias before a BatchNorm has a gradient of zero, and rounding
    least = 1e-4 * max(g.norm() for g in want.gradients.values())
    for name, g in want.gradients.items():
        errors[name] = float((got.gradients[name] - g).norm() / g.norm().clamp_min(least))
    for name, value in want.state.items():
        if value.is_floating_point():
            errors[name] = float((got.state[name] - value).norm() / value.norm().clamp_min(1e-6))
        else:  # num_batches_tracked
            assert torch.equal(got.state[name], value), name
    assert all(error == error for error in errors.values()), errors
    return max(errors.values())


def assert_same(got: Course, want: Course, tolerance: float) -> None:
    assert distance(got, want) < tolerance


def total_error(got: Iterable[torch.Tensor], want: Iterable[torch.Tensor]) -> float:
    """The relative error of all values as one vector."""
    return relative_error(torch.cat([t.flatten() for t in got]), torch.cat([t.flatten() for t in want]))


def assert_close_in_float32(fused: nn.Module, plain: nn.Module, batches: list[torch.Tensor]) -> None:
    """As assert_same, but rounding decides on which side of zero some inputs of ReLUs are, which of two is larger.

    One such decision can move the gradients by a sixth: they must be close on one batch at least, outputs on all.
    """
    errors = []
    for x in batches:
        got, want = (train(copy.deepcopy(model), [x]) for model in (fused, plain))
        assert got.gradients.keys() == want.gradients.keys()
        assert total_error(got.outputs, want.outputs) < 1e-2
        errors.append(total_error(got.gradients.values(), want.gradients.values()))
        if errors[-1] < 0.1:
            return
    raise AssertionError(errors)


def twins(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A model in float64 that is fused, and the same one that is not; no two of its BatchNorm's channels are alike."""
    plain = make().double()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.2)
            module.momentum = 0.7  # after three batches the statistics are of the weights: evaluation stays in range
    return fasttricks.fuse(copy.deepcopy(plain)), plain


def taken(model: nn.Module, x: torch.Tensor) -> int:
    """How many fused calls a forward makes."""
    with counted() as counts:
        model(x)
    return sum(counts.values())


def saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=isinstance(value, dict))


def assert_survives_copies(fused: nn.Module, x: torch.Tensor) -> None:
    """An evaluated model gives the same after deepcopy, pickle and torch.save, and is fused then or again."""
    want = fused(x)
    twin = copy.deepcopy(fused)
    assert relative_error(twin(x), want) == 0
    assert taken(twin, x) == taken(fused, x) > 0
    for load in (lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded):
        loaded = load(fused)
        assert [type(m) for m in loaded.modules()] == [type(m) for m in fasttricks.unfuse(twin).modules()]
        assert relative_error(loaded(x), want) < 1e-10
        assert relative_error(fasttricks.fuse(loaded)(x), want) == 0
