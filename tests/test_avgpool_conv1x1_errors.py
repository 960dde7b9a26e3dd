"""Wrong arguments of avgpool_conv1x1: the public function and the raw ops of every backend refuse the same ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fasttricks import backends
from fasttricks.nn.avgpool_conv1x1 import AvgPoolConv1x1
from fasttricks.ops.avgpool_conv1x1 import avgpool_conv1x1

# the changed argument, and the error message after the name of the op
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.ones(3, 4, 4)}, r"x has shape \(3, 4, 4\); accepted: 4 dimensions \(N, C, H, W\)"),
    ({"x": torch.ones(2, 7, 6, 6)}, r"weight has shape \(4, 3, 1, 1\) and x .*7.*; accepted: weight of shape \(Cout"),
    ({"x": torch.ones(2, 3, 6, 6, dtype=torch.int64)}, r"x has dtype int64; accepted: float16, bfloat16"),
    ({"x": torch.ones(2, 3, 6, 6, dtype=torch.cfloat)}, "x has dtype .*; accepted: float16, bfloat16"),
    ({"x": torch.ones(2, 3, 1, 6)}, r"x has shape \(2, 3, 1, 6\).* 0 x 3: Output size is too small"),
    ({"x": torch.ones(2, 3, 6, 1)}, r"x has shape \(2, 3, 6, 1\).* 3 x 0: Output size is too small"),
    ({"x": torch.ones(2, 3, 0, 6), "ceil_mode": True}, "Output size is too small; accepted: H and W of at least 1"),
    ({"weight": torch.ones(4, 3, 3, 3)}, r"weight has shape \(4, 3, 3, 3\) .*no groups, no other kernel size"),
    ({"weight": torch.ones(4, 1, 1, 1)}, r"weight has shape \(4, 1, 1, 1\) .*no groups, no other kernel size"),
    ({"weight": torch.ones(0, 3, 1, 1)}, r"weight has shape \(0, 3, 1, 1\) .*none of them zero"),
    ({"weight": torch.ones(4, 3)}, r"weight has shape \(4, 3\)"),
    ({"weight": torch.ones(4, 3, 1, 1).half()}, r"weight has dtype float16; accepted: .*float32"),
    ({"weight": torch.ones(4, 3, 1, 1, device="meta")}, "weight is on meta; accepted: the device of x, c"),
    ({"bias": torch.ones(5)}, r"bias has shape \(5,\); accepted: \(4,\)"),
    ({"bias": torch.ones(4).double()}, r"bias has dtype float64; accepted: .*float32"),
    ({"bias": torch.ones(4, device="meta")}, "bias is on meta; accepted: the device of x, c"),
    ({"stride": 3}, "stride is 3; accepted: 1, 2"),
]
# what the dispatcher casts or refuses by itself
WRONG_OF_PYTHON: list[tuple[dict[str, Any], str]] = [
    ({"x": [1.0]}, "x is a list; accepted: a tensor"),
    ({"weight": None}, "weight is a NoneType; accepted: a tensor"),
    ({"bias": 1.0}, "bias is a float; accepted: a tensor"),
    ({"stride": True}, "stride is True; accepted: 1, 2"),
    ({"stride": 2.0}, r"stride is 2\.0; accepted: 1, 2"),
    ({"ceil_mode": 1}, "ceil_mode is 1; accepted: True, False"),
]
WRONG_DY: list[tuple[torch.Tensor, str]] = [
    (torch.ones(2, 4, 6, 6), r"dy has shape \(2, 4, 6, 6\); accepted: \(2, 4, 3, 3\)"),
    (torch.ones(2, 4, 3), r"dy has shape \(2, 4, 3\); accepted: \(2, 4, 3, 3\)"),
    (torch.ones(2, 4, 3, 3).half(), r"dy has dtype float16; accepted: .*float32"),
    (torch.ones(2, 4, 3, 3, device="meta"), "dy is on meta; accepted: the device of x, c"),
]


def right() -> dict[str, Any]:
    x, weight, bias = torch.ones(2, 3, 6, 6), torch.ones(4, 3, 1, 1), torch.ones(4)
    return {"x": x, "weight": weight, "bias": bias, "stride": 2, "ceil_mode": False}


def placed(given: Any) -> Any:
    """A tensor made at import goes to the device of the test's new ones."""
    moves = isinstance(given, torch.Tensor) and given.device.type == "cpu"
    return given.to(torch.empty(0).device) if moves else given


def raw(backend: str) -> Any:
    return getattr(torch.ops, backends.namespaces[backend.split("-")[0]])


def refusal(run: Callable[[], object]) -> Exception:
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        run()
    return caught.value


@pytest.mark.parametrize(("change", "message"), WRONG + WRONG_OF_PYTHON)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_function(backend: str, change: dict[str, Any], message: str, requires_grad: bool) -> None:
    given = right() | {name: placed(value) for name, value in change.items()}
    if requires_grad and isinstance(given["weight"], torch.Tensor):
        given["weight"].requires_grad_()
    options = {name: given.pop(name) for name in ("stride", "ceil_mode")}
    error = refusal(lambda: avgpool_conv1x1(*given.values(), **options))
    assert re.match("avgpool_conv1x1: .*" + message, str(error))
    assert isinstance(error, TypeError) == bool(re.search("dtype|; accepted: a tensor|ceil_mode is", str(error)))


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_raw_ops(backend: str, change: dict[str, Any], message: str) -> None:
    if backend == "reference":
        return  # it has no raw ops
    given = right() | {name: placed(value) for name, value in change.items()}
    error = refusal(lambda: raw(backend).avgpool_conv1x1_forward(*given.values()))
    assert re.search("avgpool_conv1x1_forward: .*" + message, str(error)), error
    if "bias" in change:
        return
    del given["bias"]
    dy = torch.ones(2, 4, 3, 3)
    error = refusal(lambda: raw(backend).avgpool_conv1x1_backward(dy, *given.values(), True, True, True))
    assert re.search("avgpool_conv1x1_backward: .*" + message, str(error)), error


@pytest.mark.parametrize(("dy", "message"), WRONG_DY)
def test_gradient_of_the_output(backend: str, dy: torch.Tensor, message: str) -> None:
    if backend == "reference":
        return
    x, weight, _, stride, ceil_mode = right().values()
    error = refusal(
        lambda: raw(backend).avgpool_conv1x1_backward(placed(dy), x, weight, stride, ceil_mode, True, True, True)
    )
    assert re.search("avgpool_conv1x1_backward: .*" + message, str(error)), error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 4), "in_channels is 0"), ((3, 0), "out_channels is 0"), ((3, 4, 3), "stride is 3; accepted: 1, 2")],
)
def test_the_module(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"AvgPoolConv1x1: {message}"):
        AvgPoolConv1x1(*arguments)
