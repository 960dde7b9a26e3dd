"""Errors of bn_relu and bn_add_relu: the same messages from the public functions and from every backend's raw ops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fasttricks import backends, bn_add_relu, bn_relu

X = torch.randn(2, 3, 4, 4)
C = torch.ones(3)
PUBLIC = [
    ({"x": [1.0]}, TypeError, "x is a list; accepted: a tensor"),
    ({"x": X.long()}, TypeError, "x has dtype int64; accepted: float16, bfloat16, float32, float64"),
    ({"x": torch.ones(3)}, ValueError, r"x has shape \(3,\); accepted: 2 to 5 dimensions \(N, C, ...\)"),
    ({"x": X[:1, :, :1, :1]}, ValueError, "Expected more than 1 value per channel for batch statistics"),
    ({"weight": torch.ones(4)}, ValueError, r"weight has shape \(4,\); accepted: \(3,\), the channels of x"),
    ({"bias": C.double()}, TypeError, "bias has dtype float64; accepted: float16, bfloat16, float32"),
    ({"bias": C.to("meta")}, ValueError, "bias is on meta; accepted: the device of x, cpu"),
    ({"running_mean": C}, ValueError, "running_var is None and the other is not; accepted: both, or neither"),
    ({"running_mean": C[:1], "running_var": C}, ValueError, r"running_mean has shape \(1,\); accepted: \(3,\)"),
    ({"training": False}, ValueError, "training is False and running_mean, running_var are None"),
    ({"eps": -1.0}, ValueError, "eps is -1.*; accepted: a finite number >= 0"),
    ({"eps": float("nan")}, ValueError, "eps is nan; accepted"),
    ({"momentum": float("inf")}, ValueError, "momentum is inf; accepted: a finite number"),
    (
        {"momentum": None, "running_mean": C, "running_var": C},
        ValueError,
        "momentum is None and num_batches_tracked is None; accepted: one of the two given",
    ),
    ({"weight": 1.0}, TypeError, "weight is a float; accepted: a tensor or None"),
    ({"bias": [0.0]}, TypeError, "bias is a list; accepted: a tensor or None"),
    ({"running_mean": C, "running_var": C.long()}, TypeError, "running_var has dtype int64; accepted: float16"),
    ({"eps": "1e-5"}, TypeError, "eps is a str; accepted: a number"),
    ({"momentum": "0.1"}, TypeError, "momentum is a str; accepted: a number"),
    ({"num_batches_tracked": torch.zeros(2, dtype=torch.int64)}, ValueError, r"num_batches_tracked has shape \(2,\)"),
    ({"num_batches_tracked": torch.tensor(0.0)}, TypeError, "num_batches_tracked has dtype float32; accepted: int64"),
]


@pytest.mark.parametrize(("change", "error", "message"), PUBLIC)
def test_public_functions(backend: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": X, "weight": C, "bias": C, **change}
    with pytest.raises(error, match=f"bn_relu: .*{message}"):
        bn_relu(**arguments)
    with pytest.raises(error, match=f"bn_add_relu: .*{message}"):
        bn_add_relu(arguments.pop("x"), X, **arguments)


@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (None, TypeError, "residual is a NoneType; accepted: a tensor"),
        (torch.ones(2, 3, 4, 2), ValueError, r"residual has shape \(2, 3, 4, 2\); accepted: the shape of x"),
        (X.long(), TypeError, "residual has dtype int64; accepted: float16, bfloat16, float32, float64"),
        (X.to("meta"), ValueError, "residual is on meta; accepted: the device of x, cpu"),
    ],
)
def test_residuals(backend: str, residual: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"bn_add_relu: {message}"):
        bn_add_relu(X, residual)


# The raw ops: their arguments, in order. Those named in OF_CHANNELS are (C,), dy and residual are like x.
AFFINE = ("weight", "bias")
OPS: dict[str, tuple[str, ...]] = {
    "bn_relu_forward": ("x", *AFFINE, "eps", "running_mean", "running_var", "num_batches_tracked", "momentum"),
    "bn_add_relu_forward": (
        *("x", "residual", *AFFINE, "eps"),
        *("running_mean", "running_var", "num_batches_tracked", "momentum"),
    ),
    "bn_relu_apply": ("x", *AFFINE, "mean", "var", "eps"),
    "bn_add_relu_apply": ("x", "residual", *AFFINE, "mean", "var", "eps"),
    "bn_stats": ("x",),
    "bn_relu_backward": ("dy", "x", "mask", *AFFINE, "mean", "var", "eps", "training", "need_dresidual"),
    "bn_relu_backward_reduce": ("dy", "x", "mask", *AFFINE, "mean", "var", "eps"),
    "bn_relu_backward_apply": (
        *("dy", "x", "mask", *AFFINE, "mean", "var", "eps"),
        *("mean_dweight", "mean_dbias", "need_dresidual"),
    ),
    "bn_update_stats_": ("running_mean", "running_var", "mean", "var", "count", "num_batches_tracked", "momentum"),
}
OF_CHANNELS = (*AFFINE, "mean", "var", "running_mean", "running_var", "mean_dweight", "mean_dbias")


def right(op: str) -> dict[str, Any]:
    """Arguments that op accepts."""
    values: dict[str, Any] = {name: torch.ones(3) for name in OF_CHANNELS}
    values |= {name: torch.ones(2, 3, 4, 4) for name in ("x", "dy", "residual")}
    values |= {"mask": torch.zeros(12, dtype=torch.uint8), "eps": 1e-5, "momentum": 0.1}
    values |= {"count": torch.tensor(32.0, dtype=torch.float64), "num_batches_tracked": torch.tensor(0)}
    values |= {"training": True, "need_dresidual": True}
    return {name: values[name] for name in OPS[op]}


def faults(op: str, name: str, good: Any) -> list[tuple[Any, str]]:
    """Invalid values of an argument of op, and the error message of each."""
    if name == "eps":
        return [(-1.0, "eps is -1.*; accepted: a finite number >= 0"), (math.nan, "eps is -?nan; accepted: a finite")]
    if name == "momentum":
        return [(math.inf, "momentum is inf; accepted: a finite number")]
    if not isinstance(good, torch.Tensor):
        return []
    dtype = (good.to(torch.int32), f"{name} has dtype int32; accepted: ")
    device = (good.to("meta"), f"{name} is on meta; accepted: the device of ")
    longer = (torch.ones(*good.shape, 2).to(good), rf"{name} has shape \(.*2,?\); accepted: ")
    if name == "x":
        return [dtype, (good[0, :, 0, 0], r"x has shape \(3,\); accepted: 2 to 5 dimensions")]
    if name == "mean" and op == "bn_update_stats_":  # the others are compared with it
        return [dtype, longer]
    if name in OF_CHANNELS:
        return [dtype, device, longer, (good[:1], rf"{name} has shape \(1,\); accepted: \(3,\)")]
    return [dtype, device, longer]


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in OPS.items() for name in names])
def test_every_argument_of_the_raw_ops(backend: str, op: str, name: str) -> None:
    if backend == "reference":
        return  # it has no raw ops
    run = getattr(getattr(torch.ops, backends.namespaces[backend]), op)
    run(*right(op).values())
    for wrong, message in faults(op, name, right(op)[name]):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=f"{op}: .*{message}"):
            run(*(right(op) | {name: wrong}).values())


def test_arguments_of_the_raw_ops_that_belong_together(backend: str) -> None:
    if backend == "reference":
        return
    ops = getattr(torch.ops, backends.namespaces[backend])
    for op, change, message in (
        ("bn_relu_backward", {"mask": None}, "need_dresidual is true and mask is None"),
        ("bn_relu_backward_apply", {"mask": None}, "need_dresidual is true and mask is None"),
        ("bn_relu_forward", {"running_var": None}, "running_var is None and the other is not; accepted: both"),
        ("bn_relu_forward", {"running_mean": None}, "running_mean is None and the other is not; accepted: both"),
        ("bn_add_relu_forward", {"momentum": None, "num_batches_tracked": None}, "momentum is None and num_batches"),
        ("bn_update_stats_", {"momentum": None, "num_batches_tracked": None}, "momentum is None and num_batches"),
        ("bn_relu_forward", {"x": torch.ones(1, 3)}, "Expected more than 1 value per channel"),
        ("bn_add_relu_forward", dict.fromkeys(("x", "residual"), torch.ones(1, 3)), "Expected more than 1 value per"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=f"{op}: .*{message}"):
            getattr(ops, op)(*(right(op) | change).values())


def test_raw_statistics(backend: str) -> None:
    """One value has no unbiased variance, none moves nothing; any strides are written in place."""
    if backend == "reference":
        assert backends.why_not("reference", X.device) is None
        return
    ops = getattr(torch.ops, backends.namespaces[backend])
    mean, var = torch.zeros(6)[::2], torch.ones(6)[::2]
    ops.bn_update_stats_(mean, var, C, C, torch.tensor(1.0, dtype=torch.float64), None, 0.5)
    assert mean.tolist() == [0.5] * 3
    assert var.tolist() == [1.0] * 3
    ops.bn_update_stats_(mean, var, C * 9, C * 9, torch.tensor(0.0, dtype=torch.float64), None, 0.5)
    assert mean.tolist() == [0.5] * 3


def test_negative_variance_is_nan_as_in_torch(backend: str) -> None:
    y = bn_relu(X, running_mean=0 * C, running_var=-C, training=False)
    want = torch.batch_norm(X, None, None, 0 * C, -C, False, 0.1, 1e-5, False)
    assert y.isnan().all()
    assert want.isnan().all()
