"""Bad arguments of sgd_check and sgd_step: the same errors from the functions and the raw ops, on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fasttricks
from fasttricks import backends
from fasttricks.backends import ops_for
from fasttricks.ops.sgd import sgd_check, sgd_step
from fasttricks.ops.sgd_call import CheckCall, StepCall
from fasttricks.reference import sgd as reference

CPU = torch.device("cpu")


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def squares(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.ones(count, dtype=dtype)


def good_step() -> StepCall:
    """An fp32 parameter and an fp16 one, with momentum."""
    params = [ones(3), ones(4, dtype=torch.float16)]
    return StepCall(
        params=params,
        grads=[torch.ones_like(p) for p in params],
        momentum_buffers=[ones(3), ones(4)],
        steps=[torch.zeros(()), torch.zeros(())],
        masters=[ones(4)],
        group_sizes=[2],
        lr=[torch.tensor(0.1)],
        momentum=[0.9],
        dampening=[0.0],
        weight_decay=[0.0],
        nesterov=[False],
        maximize=[False],
        trust_coefficient=[0.0],
    )


def good_check() -> CheckCall:
    return CheckCall([ones(3)], [ones(3), ones(4, dtype=torch.float16)], [ones(4)], torch.zeros(()), None, squares(2))


HALF, INT, COMPLEX = torch.float16, torch.int32, torch.complex64
# what is replaced in the arguments of a good call, the error of Python's checks, its message
STEP: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"grads": []}, ValueError, "grads has 0 tensors; accepted: 2"),
    ({"grads": [ones(2), ones(4)]}, ValueError, r"grads\[0\] has shape \(2,?\); accepted: \(3,?\)"),
    ({"grads": [ones(3, dtype=INT), ones(4)]}, TypeError, r"grads\[0\] has dtype int32; accepted: float16"),
    ({"grads": [ones(3, dtype=COMPLEX), ones(4)]}, TypeError, r"grads\[0\] has dtype .*accepted: float16"),
    ({"params": [ones(3, dtype=INT), ones(4, dtype=HALF)]}, TypeError, r"params\[0\] has dtype int32"),
    ({"params": [torch.ones(1).expand(3), ones(4, dtype=HALF)]}, ValueError, r"params\[0\] is .*expanded"),
    ({"masters": []}, ValueError, "masters has 0 tensors"),
    ({"masters": [ones(4), ones(4)]}, ValueError, "masters has 2 tensors; accepted: 1"),
    ({"masters": [ones(4, dtype=HALF)]}, TypeError, r"masters\[0\] has dtype float16; accepted: float32"),
    ({"masters": [ones(5)]}, ValueError, r"masters\[0\] has shape \(5,?\); accepted: \(4,?\)"),
    ({"masters": [torch.ones(1).expand(4)]}, ValueError, r"masters\[0\] is .*expanded"),
    ({"momentum_buffers": [], "steps": []}, ValueError, "momentum_buffers has 0 tensors"),
    ({"momentum_buffers": [ones(3, dtype=HALF), ones(4)]}, TypeError, r"momentum_buffers\[0\] has dtype float16"),
    ({"momentum_buffers": [ones(4), ones(4)]}, ValueError, r"momentum_buffers\[0\] has shape"),
    ({"steps": [torch.zeros(())]}, ValueError, "steps has 1 tensors"),
    ({"steps": [torch.zeros(2), torch.zeros(())]}, ValueError, r"steps\[0\] has shape \(2,?\); accepted: one element"),
    ({"steps": [torch.zeros((), dtype=INT)] * 2}, TypeError, r"steps\[0\] has dtype int32; accepted: float32"),
    ({"group_sizes": [3]}, ValueError, "group_sizes add up to 3; accepted: 2"),
    ({"group_sizes": [-1, 3]}, ValueError, "(group_sizes has -1|has 1 values)"),
    ({"lr": [torch.zeros(2)]}, ValueError, "lr has shape"),
    ({"lr": [torch.zeros((), dtype=HALF)]}, TypeError, "lr has dtype float16; accepted: float32"),
    ({"lr": []}, ValueError, "lr has 0 values; accepted: (1|one value)"),
    ({"momentum": [0.1, 0.2]}, ValueError, "momentum has 2 values; accepted: (1|one value)"),
    ({"dampening": []}, ValueError, "dampening has 0 values; accepted: (1|one value)"),
    ({"weight_decay": [0.0, 0.0]}, ValueError, "weight_decay has 2 values; accepted: (1|one value)"),
    ({"nesterov": []}, ValueError, "nesterov has 0 values; accepted: (1|one value)"),
    ({"maximize": [True, True]}, ValueError, "maximize has 2 values; accepted: (1|one value)"),
    ({"trust_coefficient": []}, ValueError, "trust_coefficient has 0 values; accepted: (1|one value)"),
    ({"momentum": [-0.1]}, ValueError, "momentum is -0.1; accepted: a finite number >= 0"),
    ({"dampening": [math.nan]}, ValueError, "dampening is nan; accepted: a finite number"),
    ({"weight_decay": [math.inf]}, ValueError, "weight_decay is inf; accepted: a finite number >= 0"),
    ({"trust_coefficient": [-1.0]}, ValueError, "trust_coefficient is -1.*accepted: a finite number >= 0"),
    ({"trust_coefficient": [1.0]}, ValueError, "is None; accepted with trust_coefficient|is None; accepted: with max"),
    ({"eps": -1.0}, ValueError, "eps is -1.*accepted: a finite number >= 0"),
    ({"max_norm": math.inf}, ValueError, "max_norm is inf"),
    ({"max_norm": -1.0}, ValueError, "max_norm is -1"),
    ({"max_norm": 1.0}, ValueError, "grad_sq is None"),
    ({"max_norm": 1.0, "grad_sq": squares(1)}, ValueError, r"grad_sq has shape \(1,?\); accepted: \(2,\) or longer"),
    ({"grad_sq": squares(2, torch.float32)}, TypeError, "grad_sq has dtype float32; accepted: float64"),
    ({"weight_sq": squares(4)[::2]}, ValueError, "weight_sq has shape .*contiguous"),
    ({"found_inf": torch.zeros(2)}, ValueError, "found_inf has shape"),
    ({"found_inf": torch.zeros((), dtype=torch.float64)}, TypeError, "found_inf has dtype float64; accepted: float32"),
    ({"grad_scale": torch.ones((), dtype=HALF)}, TypeError, "grad_scale has dtype float16; accepted: float32"),
]
CHECK: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"found_inf": torch.zeros(2)}, ValueError, "found_inf has shape .*accepted: one element"),
    ({"found_inf": torch.zeros((), dtype=HALF)}, TypeError, "found_inf has dtype float16; accepted: float32"),
    ({"grads": [ones(3, dtype=INT)]}, TypeError, r"grads\[0\] has dtype int32"),
    ({"grad_sq": squares(2)}, ValueError, r"grad_sq has shape \(2,?\); accepted: \(1,\), contiguous"),
    ({"params": [ones(3, dtype=INT), ones(4, dtype=HALF)]}, TypeError, r"params\[0\] has dtype int32"),
    ({"masters": [ones(4, dtype=HALF)]}, TypeError, r"masters\[0\] has dtype float16; accepted: float32"),
    ({"grad_sq": squares(1, torch.float32)}, TypeError, "grad_sq has dtype float32; accepted: float64"),
    ({"weight_sq": squares(3)}, ValueError, r"weight_sq has shape \(3,?\); accepted: \(2,\), contiguous"),
    ({"weight_sq": squares(2, torch.float32)}, TypeError, "weight_sq has dtype float32; accepted: float64"),
    ({"masters": []}, ValueError, "masters has 0 tensors"),
    ({"masters": [ones(5)]}, ValueError, r"masters\[0\] has shape"),
]


def changed(call: Any, changes: dict[str, Any]) -> Any:
    for name, value in changes.items():
        setattr(call, name, value)
    return call


def run_function(call: Any) -> None:
    fields = dict(vars(call))
    if isinstance(call, CheckCall):
        sgd_check(fields.pop("grads"), fields.pop("found_inf"), **fields)
    else:
        lists = [fields.pop(n) for n in ("params", "grads", "momentum_buffers", "steps", "masters")]
        fields["max_norm"] = fields["max_norm"] or None
        sgd_step(*lists, **fields)


def run_raw(call: Any) -> None:
    name = "sgd_check" if isinstance(call, CheckCall) else "sgd_step"
    ops = ops_for(name, CPU)
    getattr(reference if ops is None else ops, name)(*call.arguments())


@pytest.mark.parametrize("run", [run_function, run_raw])
def test_good_arguments(backend: str, run: Any) -> None:
    call = good_step()
    run(call)
    assert (call.params[0] < 1).all()
    run(good_check())


@pytest.mark.parametrize("run", [run_function, run_raw])
@pytest.mark.parametrize("op", ["sgd_step", "sgd_check"])
def test_bad_arguments(backend: str, run: Any, op: str) -> None:
    """Each error names the op, the argument, what was given and what is accepted; nothing has been changed."""
    good, cases = (good_step, STEP) if op == "sgd_step" else (good_check, CHECK)
    for changes, kind, message in cases:
        call = changed(good(), changes)
        before = [t.clone() for t in (*call.params, *call.masters)]
        # the checks of C++ raise RuntimeError
        kinds = kind if run is run_function or backend in ("triton", "reference") else RuntimeError
        with pytest.raises(kinds, match=f"(^|fasttricks::){op}: .*({message})"):
            run(call)
        assert all(torch.equal(a, b) for a, b in zip(before, (*call.params, *call.masters), strict=True))


@pytest.mark.parametrize("run", [run_function, run_raw])
def test_tensors_of_other_kinds(backend: str, run: Any) -> None:
    """Tensors on another device, as if nothing were there to compute; sparse tensors; what is no tensor."""
    scalars = {
        "grad_scale": torch.ones(()),
        "found_inf": torch.zeros(()),
        "grad_sq": squares(2),
        "weight_sq": squares(2),
    }
    for op, good, first, more in (
        ("sgd_step", good_step, "params", scalars),
        ("sgd_check", good_check, "found_inf", {"grad_sq": squares(1)}),
    ):
        for name, value in vars(changed(good(), more)).items():
            tensors = value if isinstance(value, list) else [value]
            if name == first or not isinstance(tensors[0], Tensor):  # the first tensor says where all must be
                continue
            moved = [t.to("meta") for t in tensors]
            wrong = moved if isinstance(value, list) else moved[0]
            with pytest.raises(
                (ValueError, RuntimeError), match=rf"{op}: {name}.* is on meta; accepted: the device of"
            ):
                run(changed(good(), {**more, name: wrong}))
        call = good()
        with pytest.raises((TypeError, NotImplementedError, RuntimeError), match=r"grads\[0\] has layout|Sparse"):
            run(changed(call, {"grads": [torch.ones(3).to_sparse(), *call.grads[1:]]}))
    if run is run_function:
        for name in ("params", "grads", "masters"):
            with pytest.raises(TypeError, match=rf"sgd_step: {name}\[0\] is a float; accepted: a tensor"):
                run(changed(good_step(), {name: [1.0, *getattr(good_step(), name)[1:]]}))
        with pytest.raises(TypeError, match=r"sgd_check: found_inf is a float; accepted: a tensor"):
            run(changed(good_check(), {"found_inf": 1.0}))
        for name in ("lr", "momentum", "weight_decay"):
            with pytest.raises(TypeError, match=f"sgd_step: {name} is a str; accepted: a number"):
                run(changed(good_step(), {name: "0.1"}))


def test_a_refused_backend_is_named_by_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.devices, "cuda", ("cuda",))  # the emulated kernels, once loaded, take more
    there = [torch.ones(3, device="meta")]
    with fasttricks.backend("cuda"):
        with pytest.raises(RuntimeError, match=r"fasttricks\.sgd_step: backend 'cuda'"):
            sgd_step(there, there, lr=0.1)
        with pytest.raises(RuntimeError, match=r"fasttricks\.sgd_check: backend 'cuda'"):
            sgd_check(there, torch.zeros((), device="meta"))
