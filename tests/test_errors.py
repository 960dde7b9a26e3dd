"""Bad arguments of every op: each error names the op, the argument, what was given and what is accepted.

One test runs the rows of the tables below on the public functions and on the raw ops of every backend. Every argument
also refuses text, and every tensor integers and another device.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from conftest import BACKENDS
from torch import Tensor

import fasttricks
from fasttricks import backends
from fasttricks.nn import AvgPoolConv1x1
from fasttricks.reference import sgd as reference

# argument -> rows of a bad value, the message after the argument's name and, if needed, other arguments of the call
Table = dict[str, list[tuple[Any, ...]]]
# errors about types and dtypes are TypeErrors
WRONG_TYPE = re.compile(r" has (dtype|layout) | (is|has) an? \w+; |; accepted: True, False$")

INT, HALF, FLOAT, DOUBLE, COMPLEX = torch.int32, torch.float16, torch.float32, torch.float64, torch.complex64


IS_EXPANDED = "is expanded: its elements share memory; accepted: a tensor that can be written"


def ones(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
    return torch.ones(shape, dtype=dtype)


# ---- bn_relu, bn_add_relu ----

OF_BATCHNORM = ("weight", "bias", "mean", "var", "running_mean", "running_var")
RUNNING = ("running_mean", "running_var", "residual_running_mean", "residual_running_var")
OF_CHANNELS = (*OF_BATCHNORM, *(f"residual_{name}" for name in OF_BATCHNORM), "mean_dweight", "mean_dbias")


def good_bn_relu() -> dict[str, Any]:
    given: dict[str, Any] = {name: ones(3) for name in OF_CHANNELS}
    given |= {name: ones(2, 3, 4, 4) for name in ("x", "dy", "residual")} | {"dy2": ones(2, 3, 2, 2)}
    given |= {"mask": torch.zeros(12, dtype=torch.uint8), "count": torch.tensor(32.0, dtype=DOUBLE), "group": None}
    for prefix in ("", "residual_"):
        given |= {f"{prefix}eps": 1e-5, f"{prefix}momentum": 0.1, f"{prefix}num_batches_tracked": torch.tensor(0)}
    return given | {"training": True, "need_dresidual": True, "pool": False, "ceil_mode": False}


def bad_bn_relu(op: str) -> Table:
    channels = [
        (ones(4), r"has shape \(4,\); accepted: \(3,\), the channels of"),
        (ones(1), r"has shape \(1,\); accepted: \(3,\)"),
        (ones(3, 2), r"has shape \(3, 2\); accepted: \(3,\)"),
        (ones(3).long(), "has dtype int64; accepted: float16, bfloat16, float32"),
    ]
    if op != "bn_update_stats_":
        channels.append((ones(3, dtype=DOUBLE), "has dtype float64; accepted: float16, bfloat16, float32"))
    like_x = [
        (ones(2, 3, 4, 2), r"has shape \(2, 3, 4, 2\); accepted: .*the shape of x"),
        (ones(2, 3, 4, 4, 2), r"has shape \(2, 3, 4, 4, 2\); accepted: .*the shape of x"),
        (ones(2, 3, 4, 4).long(), "has dtype int64; accepted: .*float32"),
    ]
    bad: Table = dict.fromkeys(OF_CHANNELS, channels) | dict.fromkeys(("residual", "dy"), like_x)
    bad |= {
        "x": [
            (ones(3), r"has shape \(3,\); accepted: 2 to 5 dimensions \(N, C, ...\)"),
            (ones(2, 3, 4, 4).long(), "has dtype int64; accepted: float16, bfloat16, float32, float64"),
        ],
        "dy2": [
            (ones(2, 3, 4, 2), r"has shape \(2, 3, 4, 2\); accepted: .*, the shape of x, or that of its 2x2 means"),
            (ones(2, 3, 1, 2), r"has shape \(2, 3, 1, 2\); accepted: .*, the shape of x, or that of its 2x2 means"),
            (ones(2, 3, 2, 2, dtype=HALF), "has dtype float16; accepted: float32"),
        ],
        "mask": [(torch.zeros(12, 2, dtype=torch.uint8), r"has shape \(12, 2\); accepted: \(12,\), a bit for each")],
        "count": [(ones(2, dtype=DOUBLE), r"has shape \(2,\); accepted: \(\), a number")],
    }
    for prefix in ("", "residual_"):
        batches = f"{prefix}num_batches_tracked"
        bad[f"{prefix}eps"] = [
            (-1.0, "is -1.*; accepted: a finite number >= 0"),
            (math.nan, "is -?nan; accepted: a finite number >= 0"),
        ]
        bad[f"{prefix}momentum"] = [
            (math.inf, "is inf; accepted: a finite number"),
            (None, f"is None and {batches} is None; accepted: one of the two", {batches: None}),
        ]
        bad[batches] = [
            (torch.tensor([0, 0]), r"has shape \(2,\); accepted: \(\), a number"),
            (torch.tensor(0.0), "has dtype float32; accepted: int64"),
        ]
    if op == "bn_add_relu" or "pool" in op:
        small = "so that the pooled output would be {}: Output size is too small; accepted: H and W of at least {}"
        bad["x"] += [
            (ones(*shape), message, {"residual": ones(*shape), "pool": True, "ceil_mode": ceil_mode})
            for shape, ceil_mode, message in (
                ((2, 3, 4), False, r"has shape \(2, 3, 4\); accepted: 4 dimensions \(N, C, H, W\)"),
                ((2, 3, 1, 4), False, r"has shape \(2, 3, 1, 4\), " + small.format("0 x 2", 2)),
                ((2, 3, 3, 0), True, r"has shape \(2, 3, 3, 0\), " + small.format("2 x 0", 1)),
            )
        ]
    if op.endswith("_forward") or op in ("bn_relu", "bn_add_relu"):
        one = r"has shape \(1, 3.*: Expected more than 1 value per channel for batch statistics; accepted: two or more"
        shapes = [(1, 3, 1, 1)] if "pool" in op else [(1, 3), (1, 3, 1, 1)]
        bad["x"] += [(ones(*shape), one, {"residual": ones(*shape), "ceil_mode": True}) for shape in shapes]
        for name in RUNNING:
            bad[name] = [*channels, (None, "is None and the other is not; accepted: both, or neither")]
    for name in RUNNING:
        bad[name] = [*bad[name], (torch.ones(1).expand(3), IS_EXPANDED)]
    if op in ("bn_relu_backward", "bn_relu_backward_apply"):
        bad["need_dresidual"] = [(True, "is true and mask is None; accepted: the mask that", {"mask": None})]
    if op == "bn_update_stats_":  # the others are compared with mean
        bad["mean"] = [(ones(3, 2), r"has shape \(3, 2\); accepted: \(C,\)"), channels[3]]
    return bad


def bad_public_bn_relu() -> Table:
    return {
        "x": [([1.0], "is a list; accepted: a tensor")],
        "residual": [(None, "is a NoneType; accepted: a tensor")],
        "weight": [(1.0, "is a float; accepted: a tensor or None")],
        "bias": [([0.0], "is a list; accepted: a tensor or None")],
        "training": [
            (
                False,
                "is False and running_mean, running_var are None; accepted: both given",
                {"running_mean": None, "running_var": None},
            ),
            (1, "is 1; accepted: True, False"),
        ],
        "pool": [(1, "is 1; accepted: True, False")],
        "ceil_mode": [(None, "is None; accepted: True, False"), (1, "is 1; accepted: True, False", {"pool": True})],
    }


# ---- avgpool_conv1x1 ----


def good_avgpool_conv1x1() -> dict[str, Any]:
    given = {"x": ones(2, 3, 6, 6), "weight": ones(4, 3, 1, 1), "bias": ones(4), "dy": ones(2, 4, 3, 3)}
    flags = dict.fromkeys(("need_dx", "need_dweight", "need_dbias", "pooled_dx"), True)
    return {**given, "stride": 2, "ceil_mode": False, **flags}


def bad_avgpool_conv1x1(op: str) -> Table:
    return {
        "x": [
            (ones(3, 4, 4), r"has shape \(3, 4, 4\); accepted: 4 dimensions \(N, C, H, W\)"),
            (ones(2, 3, 6, 6).long(), "has dtype int64; accepted: float16, bfloat16"),
            (ones(2, 3, 6, 6, dtype=COMPLEX), "has dtype .*; accepted: float16, bfloat16"),
            (ones(2, 3, 1, 6), r"has shape \(2, 3, 1, 6\).* 0 x 3: Output size is too small; accepted: H and W"),
            (ones(2, 3, 6, 1), r"has shape \(2, 3, 6, 1\).* 3 x 0: Output size is too small; accepted: H and W"),
            (ones(2, 3, 0, 6), "has shape .*too small; accepted: H and W of at least 1", {"ceil_mode": True}),
        ],
        "weight": [
            (ones(4, 3, 1, 1), r"has .* and x \(2, 7, 6, 6\); accepted: weight .*Cout", {"x": ones(2, 7, 6, 6)}),
            (ones(4, 3, 3, 3), r"has shape \(4, 3, 3, 3\) .*; accepted: .*no groups, no other kernel size"),
            (ones(4, 1, 1, 1), r"has shape \(4, 1, 1, 1\) .*; accepted: .*no groups, no other kernel size"),
            (ones(0, 3, 1, 1), r"has shape \(0, 3, 1, 1\) .*; accepted: .*none of them zero"),
            (ones(4, 3), r"has shape \(4, 3\) .*; accepted: "),
            (ones(4, 3, 1, 1, dtype=HALF), "has dtype float16; accepted: .*float32"),
        ],
        "bias": [
            (ones(5), r"has shape \(5,\); accepted: \(4,\)"),
            (ones(4, dtype=DOUBLE), "has dtype float64; accepted: .*float32"),
        ],
        "stride": [(3, "is 3; accepted: 1, 2")],
        "dy": [
            (ones(2, 4, 6, 6), r"has shape \(2, 4, 6, 6\); accepted: \(2, 4, 3, 3\)"),
            (ones(2, 4, 3), r"has shape \(2, 4, 3\); accepted: \(2, 4, 3, 3\)"),
            (ones(2, 4, 3, 3, dtype=HALF), "has dtype float16; accepted: .*float32"),
        ],
    }


def bad_public_avgpool_conv1x1() -> Table:
    """What the dispatcher casts or refuses before a raw op sees it."""
    return {
        "x": [([1.0], "is a list; accepted: a tensor")],
        "weight": [(None, "is a NoneType; accepted: a tensor")],
        "bias": [(1.0, "is a float; accepted: a tensor")],
        "stride": [(True, "is True; accepted: 1, 2"), (2.0, r"is 2\.0; accepted: 1, 2")],
        "ceil_mode": [(1, "is 1; accepted: True, False")],
    }


# ---- sgd_step, sgd_check ----


def good_sgd_step() -> dict[str, Any]:
    """An fp32 parameter and an fp16 one, with momentum."""
    return {
        "params": [ones(3), ones(4, dtype=HALF)],
        "grads": [ones(3), ones(4)],
        "momentum_buffers": [ones(3), ones(4)],
        "steps": [torch.zeros(()), torch.zeros(())],
        "masters": [ones(4)],
        "group_sizes": [2],
        "lr": [torch.tensor(0.1)],
        **{name: [0.0] for name in ("dampening", "weight_decay", "trust_coefficient")},
        **{"momentum": [0.9], "nesterov": [False], "maximize": [False]},
        **{"eps": 0.0, "lr_in_momentum": False, "max_norm": 0.0},
        **{"grad_scale": ones(), "found_inf": torch.zeros(())},
        **{"grad_sq": ones(2, dtype=DOUBLE), "weight_sq": ones(2, dtype=DOUBLE)},
    }


PER_GROUP = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "trust_coefficient")


def bad_sgd_step(op: str) -> Table:
    half, expanded = ones(4, dtype=HALF), torch.ones(1).expand
    one = "has 0 values; accepted: (1|one value), "
    good = good_sgd_step()
    bad: Table = {name: [([], one), (good[name] * 2, one.replace("0", "2"))] for name in PER_GROUP}
    bad["lr"] += [
        ([torch.zeros(2)], r"has shape \(2,\); accepted: one element"),
        ([torch.zeros((), dtype=HALF)], "has dtype float16; accepted: float32"),
    ]
    bad["momentum"] += [([-0.1], "is -0.1; accepted: a finite number >= 0")]
    bad["dampening"] += [([math.nan], "is -?nan; accepted: a finite number")]
    bad["weight_decay"] += [([math.inf], "is inf; accepted: a finite number >= 0")]
    bad["trust_coefficient"] += [([-1.0], "is -1.*; accepted: a finite number >= 0")]
    return bad | {
        "params": [([expanded(3), half], IS_EXPANDED)],
        "grads": [
            ([], "has 0 tensors; accepted: 2, one for each"),
            ([ones(2), ones(4)], r"has shape \(2,\); accepted: \(3,\), the parameter's"),
            ([ones(3, dtype=COMPLEX), ones(4)], "has dtype .*; accepted: float16, bfloat16, float32, float64"),
        ],
        "masters": [
            ([], "has 0 tensors; accepted: "),
            ([ones(4), ones(4)], "has 2 tensors; accepted: 1, one for each"),
            ([half], "has dtype float16; accepted: float32"),
            ([ones(5)], r"has shape \(5,\); accepted: \(4,\), the parameter's"),
            ([expanded(4)], IS_EXPANDED),
        ],
        "momentum_buffers": [
            ([], "has 0 tensors; accepted: ", {"steps": []}),
            ([ones(3, dtype=HALF), ones(4)], "has dtype float16; accepted: float32"),
            ([ones(4), ones(4)], r"has shape \(4,\); accepted: \(3,\), the parameter's"),
            ([expanded(3), ones(4)], IS_EXPANDED),
        ],
        "steps": [
            ([torch.zeros(())], "has 1 tensors; accepted: "),
            ([torch.zeros(2), torch.zeros(())], r"has shape \(2,\); accepted: one element"),
        ],
        "group_sizes": [
            ([3], "add up to 3; accepted: 2, the number of params"),
            ([-1, 3], "has -1; accepted: at least 0", {name: good[name] * 2 for name in PER_GROUP}),
        ],
        "eps": [(-1.0, "is -1.*; accepted: a finite number >= 0")],
        "max_norm": [
            (math.inf, "is inf; accepted: a finite number >= 0"),
            (-1.0, "is -1.*; accepted: a finite number >= 0"),
        ],
        "grad_sq": [
            (None, "is None; accepted.* with max_norm", {"max_norm": 1.0}),
            (None, "(or weight_sq )?is None; accepted.* with .*trust_coefficient", {"trust_coefficient": [1.0]}),
            (ones(1, dtype=DOUBLE), r"has shape \(1,\); accepted: \(2,\) or longer, contiguous", {"max_norm": 1.0}),
            (ones(2), "has dtype float32; accepted: float64"),
        ],
        "weight_sq": [(ones(4, dtype=DOUBLE)[::2], r"has shape \(2,\); accepted: \(2,\) or longer, contiguous")],
        "found_inf": [
            (torch.zeros(2), r"has shape \(2,\); accepted: one element"),
            (torch.zeros((), dtype=DOUBLE), "has dtype float64; accepted: float32"),
        ],
        "grad_scale": [(ones(dtype=HALF), "has dtype float16; accepted: float32")],
    }


def bad_public_sgd_step() -> Table:
    bad: Table = {name: [("0.1", "is a str; accepted: a number")] for name in ("lr", "momentum", "weight_decay")}
    for name in ("params", "grads", "masters"):
        bad[name] = [([1.0, *good_sgd_step()[name][1:]], "is a float; accepted: a tensor")]
    return bad | {"max_norm": [(0, "is 0; accepted: None, or a finite number > 0")]}


def good_sgd_check() -> dict[str, Any]:
    given: dict[str, Any] = {"grads": [ones(3)], "params": [ones(3), ones(4, dtype=HALF)], "masters": [ones(4)]}
    return given | {"found_inf": torch.zeros(()), "grad_sq": ones(1, dtype=DOUBLE), "weight_sq": ones(2, dtype=DOUBLE)}


def bad_sgd_check(op: str) -> Table:
    return {
        "found_inf": [
            (torch.zeros(2), r"has shape \(2,\); accepted: one element"),
            (torch.zeros((), dtype=HALF), "has dtype float16; accepted: float32"),
        ],
        "masters": [
            ([], "has 0 tensors; accepted: "),
            ([ones(4, dtype=HALF)], "has dtype float16; accepted: float32"),
            ([ones(5)], r"has shape \(5,\); accepted: \(4,\), the parameter's"),
        ],
        "grad_sq": [
            (ones(2, dtype=DOUBLE), r"has shape \(2,\); accepted: \(1,\), contiguous"),
            (ones(1), "has dtype float32; accepted: float64"),
        ],
        "weight_sq": [
            (ones(3, dtype=DOUBLE), r"has shape \(3,\); accepted: \(2,\), contiguous"),
            (ones(2), "has dtype float32; accepted: float64"),
        ],
    }


def bad_public_sgd_check() -> Table:
    return {"found_inf": [(1.0, "is a float; accepted: a tensor")]}


# ---- the ops ----


class Family(NamedTuple):
    """Good arguments by name, and the rows of an op; bad_public: what only the public function can refuse."""

    good: Callable[[], dict[str, Any]]
    bad: Callable[[str], Table]
    bad_public: Callable[[], Table]


FAMILIES = {
    "bn_": Family(good_bn_relu, bad_bn_relu, bad_public_bn_relu),
    "avgpool_conv1x1": Family(good_avgpool_conv1x1, bad_avgpool_conv1x1, bad_public_avgpool_conv1x1),
    "sgd_step": Family(good_sgd_step, bad_sgd_step, bad_public_sgd_step),
    "sgd_check": Family(good_sgd_check, bad_sgd_check, bad_public_sgd_check),
}


def family(op: str) -> Family:
    return next(found for prefix, found in FAMILIES.items() if op.startswith(prefix))


# (kind, op) -> the names of its arguments
ARGUMENTS = {
    ("public", name): list(inspect.signature(function).parameters)
    for name, function in vars(fasttricks).items()
    if getattr(function, "__module__", "").startswith("fasttricks.ops.")
}
NAMESPACE = "fasttricks_triton" if "cpu" in backends.not_loaded else "fasttricks"
ARGUMENTS |= {
    ("raw", schema.name.partition("::")[2]): [argument.name for argument in schema.arguments]
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith(f"{NAMESPACE}::") and not schema.name.endswith(("::cpu_isa", "::cuda_why_not"))
}
# the argument whose device all tensors of a call share; for all other ops it is x
FIRST = {"bn_update_stats_": "mean", "sgd_step": "params", "sgd_check": "found_inf"}
# the reference has raw ops for SGD only
CALLS = [
    (backend, kind, op)
    for backend in BACKENDS
    for kind, op in ARGUMENTS
    if kind == "public" or not backend.startswith("reference") or hasattr(reference, op)
]


def run(backend: str, kind: str, op: str, arguments: dict[str, Any]) -> None:
    if kind == "public":
        getattr(fasttricks, op)(**arguments)
    else:
        ops = reference if backend == "reference" else getattr(torch.ops, backends.namespaces[backend])
        getattr(ops, op)(**arguments)


def good(kind: str, op: str) -> dict[str, Any]:
    given = family(op).good()
    if (kind, op) == ("public", "sgd_step"):
        given["max_norm"] = None
    return {name: given[name] for name in ARGUMENTS[kind, op]}


def bad(kind: str, op: str, argument: str) -> Iterator[tuple[Any, ...]]:
    """The rows of the tables, and those of every argument and every tensor; of a list the first element is bad."""
    value = good(kind, op)[argument]
    first, *rest = value if isinstance(value, list) else [value]

    def with_first(new: Any) -> Any:
        return [new, *rest] if isinstance(value, list) else new

    yield with_first("1e-5"), "((is|has) a str|is '1e-5'); accepted: "
    if isinstance(first, Tensor):
        yield with_first(first.to(INT)), "has dtype int32; accepted: "
        if argument != FIRST.get(op, "x"):
            rest = [t.to("meta") for t in rest]
            yield with_first(first.to("meta")), "is on meta; accepted: the device of .*, c"
    yield from family(op).bad(op).get(argument, [])
    if kind == "public":
        yield from family(op).bad_public().get(argument, [])


def tensors(arguments: dict[str, Any]) -> list[Tensor]:
    lists = [value if isinstance(value, list) else [value] for value in arguments.values()]
    return [t for values in lists for t in values if isinstance(t, Tensor)]


@pytest.mark.parametrize(("backend", "kind", "op"), CALLS, indirect=["backend"])
def test_good_arguments_are_accepted(backend: str, kind: str, op: str) -> None:
    run(backend, kind, op, good(kind, op))


@pytest.mark.parametrize(
    ("backend", "kind", "op", "argument"),
    [(*call, argument) for call in CALLS for argument in ARGUMENTS[call[1:]]],
    indirect=["backend"],
)
def test_bad_arguments_are_refused(backend: str, kind: str, op: str, argument: str) -> None:
    """Whether or not gradients are required; no tensor of the call changes."""
    modes = (False,) if op.startswith("sgd") else (False, True)
    for (value, message, *others), requires_grad in itertools.product(bad(kind, op, argument), modes):
        given = good(kind, op)
        before = [t.clone() for t in tensors(given)]
        arguments = {name: v for name, v in {**given, **dict(*others), argument: value}.items() if name in given}
        for name, t in arguments.items():
            if requires_grad and name in ("x", "weight", "dy") and isinstance(t, Tensor) and t.is_floating_point():
                t.requires_grad_()
        with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            run(backend, kind, op, arguments)
        check_error(caught.value, backend, kind, op, argument, message)
        assert all(torch.equal(a, b) for a, b in zip(before, tensors(given), strict=True))


def check_error(error: Exception, backend: str, kind: str, op: str, argument: str, message: str) -> None:
    text = str(error)
    if kind == "raw" and backend != "reference" and "a str" in message:  # the dispatcher checks types by the schema
        assert re.search(rf"{op}.* Expected a value of type '.*' for argument '{argument}' but instead found", text)
        return
    assert re.search(rf"(^|fasttricks\w*::){op}: {argument}(\[0\])? ({message})", text), text
    if kind == "public" or not isinstance(error, RuntimeError):  # the checks of C++ raise RuntimeError
        assert isinstance(error, TypeError if WRONG_TYPE.search(text) else ValueError), repr(error)


def test_every_op_has_tables_of_its_arguments() -> None:
    assert [op for _, op in ARGUMENTS if not op.startswith(tuple(FAMILIES))] == []
    for found in FAMILIES.values():
        calls = {call: names for call, names in ARGUMENTS.items() if family(call[1]) is found}
        arguments = {name for names in calls.values() for name in names}
        assert set(found.good()) == arguments
        assert {name for _, op in calls for name in found.bad(op)} | set(found.bad_public()) <= arguments


# ---- errors of another kind ----


@pytest.mark.parametrize("op", ["bn_relu", "bn_add_relu", "bn_add_bn_relu"])
def test_expanded_statistics_are_accepted_where_they_are_read_only(backend: str, op: str) -> None:
    given = good("public", op)
    for name in RUNNING:
        if name in given:
            given[name] = torch.ones(1).expand(3)
    assert getattr(fasttricks, op)(**{**given, "training": False}).shape == given["x"].shape


@pytest.mark.parametrize("op", ["sgd_step", "sgd_check"])
@pytest.mark.parametrize("kind", ["public", "raw"])
def test_sparse_gradients_are_refused(backend: str, kind: str, op: str) -> None:
    """By the dispatcher if the op is C++ or Triton."""
    given = good(kind, op)
    given["grads"][0] = ones(3).to_sparse()
    with pytest.raises((TypeError, NotImplementedError, RuntimeError), match=r"grads\[0\] has layout|Sparse"):
        run(backend, kind, op, given)


def test_a_refused_backend_is_named_by_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.devices, "cuda", ("cuda",))  # the emulated kernels, once loaded, take more
    there = [torch.ones(3, device="meta")]
    with fasttricks.backend("cuda"):
        with pytest.raises(RuntimeError, match=r"fasttricks\.sgd_step: backend 'cuda'"):
            fasttricks.sgd_step(there, there, lr=0.1)
        with pytest.raises(RuntimeError, match=r"fasttricks\.sgd_check: backend 'cuda'"):
            fasttricks.sgd_check(there, torch.zeros((), device="meta"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 4), "in_channels is 0"), ((3, 0), "out_channels is 0"), ((3, 4, 3), "stride is 3; accepted: 1, 2")],
)
def test_the_module_refuses(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"AvgPoolConv1x1: {message}"):
        AvgPoolConv1x1(*arguments)
