"""What bn_relu and bn_add_relu refuse: the public functions and the raw ops of each backend, in the same words."""

from __future__ import annotations

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
    ({"eps": -1.0}, ValueError, "eps is -1.*; accepted: 0 or more, finite"),
    ({"eps": float("nan")}, ValueError, "eps is nan; accepted"),
    ({"momentum": float("inf")}, ValueError, "momentum is inf; accepted: a finite number"),
    (
        {"momentum": None, "running_mean": C, "running_var": C},
        ValueError,
        "momentum is None and num_batches_tracked is None; accepted: one of the two given",
    ),
    ({"num_batches_tracked": torch.tensor(0.0)}, TypeError, "num_batches_tracked has dtype float32; accepted: int64"),
]


@pytest.mark.parametrize(("change", "error", "message"), PUBLIC)
def test_public_functions(backend: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": X, "weight": C, "bias": C, **change}
    with pytest.raises(error, match=f"bn_relu: .*{message}"):
        bn_relu(**arguments)


RAW = [p for p in PUBLIC if not isinstance(p[0].get("x"), list) and "training" not in p[0]]


@pytest.mark.parametrize(("change", "error", "message"), RAW)
def test_raw_forward_op(backend: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    if backend == "reference":
        with pytest.raises(error, match=message):  # it has no raw ops: its checks are the public function's
            bn_relu(**{"x": X, **change})
        return
    ops = getattr(torch.ops, backends.namespaces[backend])
    with pytest.raises((error, RuntimeError), match=f"bn_relu_forward: .*{message}"):
        ops.bn_relu_forward(**{"x": X, "weight": C, "bias": C, "eps": 1e-5, **change})


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


def test_raw_ops(backend: str) -> None:
    if backend == "reference":
        assert backends.why_not("reference", X.device) is None
        return
    ops = getattr(torch.ops, backends.namespaces[backend])
    wrong: tuple[type[Exception], ...] = (ValueError, TypeError, RuntimeError)
    count = torch.tensor(4.0, dtype=torch.float64)
    with pytest.raises(wrong, match="bn_add_relu_forward: residual has shape"):
        ops.bn_add_relu_forward(X, X[:1], None, None, 1e-5)
    with pytest.raises(wrong, match="bn_relu_backward: mask has shape"):
        ops.bn_relu_backward(X, X, torch.zeros(5, dtype=torch.uint8), None, None, C, C, 1e-5, True, True)
    with pytest.raises(wrong, match="need_dresidual is true and mask is None"):
        ops.bn_relu_backward(X, X, None, None, None, C, C, 1e-5, True, True)
    with pytest.raises(wrong, match="bn_relu_backward: dy has dtype float64; accepted: float32"):
        ops.bn_relu_backward(X.double(), X, None, None, None, C, C, 1e-5, True, False)
    with pytest.raises(wrong, match=r"bn_update_stats_: running_mean has shape \(1,\); accepted: \(3,\)"):
        ops.bn_update_stats_(torch.zeros(1), torch.ones(3), C, C, count)
    with pytest.raises(wrong, match="bn_update_stats_: count has dtype int64; accepted: float64"):
        ops.bn_update_stats_(torch.zeros(3), torch.ones(3), C, C, count.long())


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
