"""torch.library.opcheck and a full-graph compile of every op; an op without samples fails.

The ops are those of the library or, with TRITON_INTERPRET=1, those in Triton.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from test_sgd import samples as sgd_samples

import fasttricks
from fasttricks.backends import namespaces, not_loaded

BACKEND = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "cpu"
if BACKEND in not_loaded:
    pytest.skip(f"{BACKEND}: {not_loaded[BACKEND]}", allow_module_level=True)
OPS = getattr(torch.ops, namespaces[BACKEND])

# they take no tensors, so there is nothing to trace or differentiate
NO_TENSORS = {"cpu_isa", "cuda_why_not"}


def names(namespace: str) -> list[str]:
    prefix = f"{namespace}::"
    found = [n.removeprefix(prefix) for n in torch._C._dispatch_get_all_op_names() if n.startswith(prefix)]
    return sorted(set(found) - NO_TENSORS)


def x(*shape: int, layout: torch.memory_format = torch.contiguous_format, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape).contiguous(memory_format=layout).requires_grad_(grad)


def channel(c: int = 3, grad: bool = False) -> torch.Tensor:
    return torch.rand(c).add(0.5).requires_grad_(grad)


LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = ((2, 3, 5, 4), (2, 1, 4, 4), (3, 3, 1, 1), (0, 3, 4, 4))


def activations(grad: bool = False) -> list[torch.Tensor]:
    """Both layouts, shapes that are contiguous in both, an empty tensor, a transposed one and a slice."""
    made = [x(*shape, layout=layout, grad=grad) for shape in SHAPES for layout in LAYOUTS]
    made.append(torch.randn(2, 3, 4, 5).transpose(2, 3).requires_grad_(grad))
    made.append(torch.randn(2, 6, 5, 4)[:, ::2].requires_grad_(grad))
    return made


def in_turn(modes: Iterable[Any]) -> list[tuple[torch.Tensor, Any]]:
    """The first of the activations with every mode, each of the others with one."""
    first, *others = activations()
    modes = list(modes)
    return [*((first, mode) for mode in modes), *zip(others, itertools.cycle(modes), strict=False)]


def running() -> list[tuple]:
    """Running statistics of three channels and momenta: none, both kinds of average, statistics in half."""
    number = torch.tensor(3)
    half = (channel().half(), channel().half())
    return [(), (channel(), channel()), (channel(), channel(), number, None), (*half, number.clone(), 0.3)]


def bn_relu_forward() -> list[tuple]:
    plain = [(a, channel(a.shape[1], True), channel(a.shape[1], True), 1e-5) for a in activations(True)]
    moving = [(x(2, 3, 5, 4, grad=True), channel(grad=True), None, 1e-5, *r) for r in running()]
    return [*plain, (x(2, 3, 5, 4, grad=True), None, None, 1e-5), *moving]


def bn_add_relu_forward() -> list[tuple]:
    plain = [
        (a, torch.randn_like(a).requires_grad_(), channel(a.shape[1], True), channel(a.shape[1], True), 1e-5)
        for a in activations(True)
    ]
    moving = [(x(2, 3, 5, 4), x(2, 3, 5, 4, grad=True), channel(grad=True), None, 1e-5, *r) for r in running()]
    return plain + moving


def bn_relu_apply() -> list[tuple]:
    return [
        (a, channel(c, True), channel(c, True), channel(c), channel(c), 1e-5)
        for a in activations(True)
        for c in [a.shape[1]]
    ]


def bn_add_relu_apply() -> list[tuple]:
    return [
        (a, torch.randn_like(a).requires_grad_(), channel(c, True), channel(c, True), channel(c), channel(c), 1e-5)
        for a in activations(True)
        for c in [a.shape[1]]
    ]


def ceil_modes(given: list[tuple]) -> list[tuple]:
    """The first with both, the others with one; the smallest image has no mean without ceil_mode."""
    return [(*given[0], True), *((*g, (k + k // 2) % 2 == 1 or min(g[0].shape[2:]) == 1) for k, g in enumerate(given))]


def bn_add_relu_pool_forward() -> list[tuple]:
    no_statistics = (None, None, None, 0.1)
    return ceil_modes([(*g[:5], *(g[5:] + no_statistics[len(g) - 5 :])) for g in bn_add_relu_forward()])


def bn_add_relu_pool_apply() -> list[tuple]:
    return ceil_modes(bn_add_relu_apply())


def both_batchnorms(a: torch.Tensor, grad: bool) -> tuple:
    """x and residual, then the four parameters of their BatchNorms."""
    return (a, torch.randn_like(a).requires_grad_(grad), *(channel(a.shape[1], grad) for _ in range(4)))


def bn_add_bn_relu_forward() -> list[tuple]:
    plain = [(*both_batchnorms(a, True), 1e-5, 1e-3) for a in activations(True)]
    given = (x(2, 3, 5, 4, grad=True), x(2, 3, 5, 4), channel(grad=True), None, None, channel(grad=True), 1e-5, 1e-3)
    no_statistics = (None, None, None, 0.1)
    moving = [
        (*given, *(r + no_statistics[len(r) :]), *other) for r, other in zip(running(), running()[::-1], strict=True)
    ]
    return plain + moving


def bn_add_bn_relu_apply() -> list[tuple]:
    return [
        (*both_batchnorms(a, True), *(channel(a.shape[1]) for _ in range(4)), 1e-5, 1e-3) for a in activations(True)
    ]


def bn_add_bn_relu_backward() -> list[tuple]:
    made = []
    for a, (training, second) in in_turn(itertools.product((True, False), range(3))):
        dy, _, mask, *_ = with_mask(a)
        given = (dy, a, torch.randn_like(a), mask, *(channel(a.shape[1]) for _ in range(6)), 1e-5, 1e-3)
        made.append((*given, training, (None, *seconds(a))[second]))
    return made


def seconds(a: torch.Tensor) -> list[torch.Tensor]:
    """Second gradients of y: of its shape, and of its 2x2 means, the last of which is cut off at an odd edge."""
    n, c, h, w = a.shape
    return [torch.randn_like(a), torch.randn(n, c, (h + 1) // 2, (w + 1) // 2)]


def backward_arguments(a: torch.Tensor) -> tuple:
    c = a.shape[1]
    return (torch.randn_like(a), a, None, channel(c), channel(c), channel(c), channel(c), 1e-5)


def with_mask(a: torch.Tensor) -> tuple:
    mask = torch.randint(0, 256, ((a.numel() + 7) // 8,), dtype=torch.uint8)
    dy, a, _, *rest = backward_arguments(a)
    return (dy, a, mask, *rest)


def bn_relu_backward() -> list[tuple]:
    plain = [(*backward_arguments(a), training, False) for a in activations() for training in (True, False)]
    masked = [(*with_mask(a), True, need) for a, need in in_turn((True, False))]
    added = [
        (*with_mask(a), training, True, seconds(a)[second])
        for a, (training, second) in in_turn(itertools.product((True, False), range(2)))
    ]
    return plain + masked + added


def bn_relu_backward_reduce() -> list[tuple]:
    return [f(a) for f in (backward_arguments, with_mask) for a in activations()]


def bn_relu_backward_apply() -> list[tuple]:
    return [
        (*f(a), channel(a.shape[1]), channel(a.shape[1]), f is with_mask)
        for f in (backward_arguments, with_mask)
        for a in activations()
    ]


def avgpool_conv1x1_forward() -> list[tuple]:
    """All activations in one mode, the first one in all modes."""
    some = [a for a in activations(True) if min(a.shape[2:]) > 1]
    modes = [(bias, stride, ceil) for bias in (False, True) for stride, ceil in ((1, False), (2, False), (2, True))]
    calls = [(a, True, 2, True) for a in some] + [(some[0], *mode) for mode in modes]
    return [
        (a, torch.randn(4, a.shape[1], 1, 1, requires_grad=True), channel(4, True) if bias else None, stride, ceil_mode)
        for a, bias, stride, ceil_mode in calls
    ]


def avgpool_conv1x1_backward() -> list[tuple]:
    made = []
    for a, weight, _, stride, ceil_mode in avgpool_conv1x1_forward():
        dy = torch.randn_like(OPS.avgpool_conv1x1_forward(a, weight, None, stride, ceil_mode))
        given = (dy, a.detach(), weight.detach(), stride, ceil_mode, True, True, ceil_mode)
        made += [given, (*given, True)]
    return made


SAMPLES: dict[str, Callable[[], list[tuple]]] = {
    "bn_relu_forward": bn_relu_forward,
    "bn_add_relu_forward": bn_add_relu_forward,
    "bn_relu_apply": bn_relu_apply,
    "bn_add_relu_apply": bn_add_relu_apply,
    "bn_add_relu_pool_forward": bn_add_relu_pool_forward,
    "bn_add_relu_pool_apply": bn_add_relu_pool_apply,
    "bn_add_bn_relu_forward": bn_add_bn_relu_forward,
    "bn_add_bn_relu_apply": bn_add_bn_relu_apply,
    "bn_add_bn_relu_backward": bn_add_bn_relu_backward,
    "bn_stats": lambda: [(a,) for a in activations()],
    "bn_relu_backward": bn_relu_backward,
    "bn_relu_backward_reduce": bn_relu_backward_reduce,
    "bn_relu_backward_apply": bn_relu_backward_apply,
    "bn_update_stats_": lambda: [
        (channel(), channel(), channel(), channel(), torch.tensor(count, dtype=torch.float64), *rest)
        for count in (0.0, 2.0, 100.0)
        for rest in ((), (None, 0.1), (torch.tensor(4), None))
    ],
    "avgpool_conv1x1_forward": avgpool_conv1x1_forward,
    "avgpool_conv1x1_backward": avgpool_conv1x1_backward,
    "sgd_check": lambda: sgd_samples()["sgd_check"],
    "sgd_step": lambda: sgd_samples()["sgd_step"],
}


def test_every_op_has_samples() -> None:
    assert sorted(SAMPLES) == names(namespaces[BACKEND])


@pytest.mark.skipif("cpu" in not_loaded or "triton" in not_loaded, reason="needs the CPU library and Triton")
def test_triton_schemas_equal_those_of_the_library() -> None:
    for name in names("fasttricks_triton"):
        mine, theirs = (
            getattr(getattr(torch.ops, namespace), name).default._schema
            for namespace in ("fasttricks_triton", "fasttricks")
        )
        for schema in (lambda s: s.arguments, lambda s: s.returns):
            assert [(str(a.type), a.is_write) for a in schema(mine)] == [
                (str(a.type), a.is_write) for a in schema(theirs)
            ], name
        assert [a.name for a in mine.arguments] == [a.name for a in theirs.arguments], name


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_opcheck_passes(name: str) -> None:
    for arguments in SAMPLES[name]():
        torch.library.opcheck(getattr(OPS, name).default, arguments)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_full_graph_compile_equals_eager(name: str) -> None:
    """One graph, for the first sample of each op."""
    op = getattr(OPS, name).default
    arguments = SAMPLES[name]()[0]

    def copy(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.detach().clone()
        return [copy(v) for v in value] if isinstance(value, list) else value

    torch._dynamo.reset()  # the lambda below is the same for all ops
    eager, traced = [copy(a) for a in arguments], [copy(a) for a in arguments]
    want = op(*eager)
    got = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")(*traced)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(traced, eager, rtol=0, atol=0)  # including arguments that the op mutates


def test_info_has_the_version_of_the_package() -> None:
    from importlib.metadata import version

    assert fasttricks.info()["fasttricks"] == version("fasttricks")
