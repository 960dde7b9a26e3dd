"""avgpool_conv1x1 under torch.func, forward-mode AD, FLOP counters, dynamic shapes and torch.jit.trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import AVGPOOL_CONV1X1_MODES
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

from fasttricks.nn import AvgPoolConv1x1
from fasttricks.ops.avgpool_conv1x1 import avgpool_conv1x1

Op = Callable[..., torch.Tensor]


def unfused(x, weight, bias=None, *, stride: int = 2, ceil_mode: bool = False) -> torch.Tensor:
    pooled = F.avg_pool2d(x, 2, 2, ceil_mode=ceil_mode, count_include_pad=False) if stride == 2 else x
    return F.conv2d(pooled, weight, bias)


def arguments(n: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = (torch.randn(n, 3, 5, 4), torch.randn(4, 3, 1, 1), torch.randn(4))
    return tuple(t.double() for t in made)  # type: ignore[return-value]


def transforms() -> dict[str, Callable[[Op, tuple[torch.Tensor, ...]], object]]:
    def loss(op: Op) -> Callable[..., torch.Tensor]:
        return lambda *tensors: op(*tensors).pow(3).sum()

    def tangents(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(t.flip(0) for t in tensors)

    every = (0, 1, 2)
    return {
        "grad": lambda op, a: grad(loss(op), every)(*a),
        "vjp": lambda op, a: (lambda y, pull: (y, pull(y.sin())))(*vjp(op, *a)),
        "jvp": lambda op, a: jvp(op, a, tangents(a)),
        "jvp of weight only": lambda op, a: jvp(lambda w: op(a[0], w, a[2]), (a[1],), (tangents(a)[1],)),
        "jvp of jvp": lambda op, a: jvp(lambda *b: jvp(loss(op), b, tangents(a))[1], a, tangents(a)),
        "jacrev": lambda op, a: jacrev(op, every)(*a),
        "jacfwd": lambda op, a: jacfwd(op, every)(*a),
        "hessian": lambda op, a: hessian(loss(op), (1, 2))(*a),
        "vmap": lambda op, a: vmap(op, (0, None, None))(torch.stack([a[0], a[0] + 1]), *a[1:]),
        "vmap over weights": lambda op, a: vmap(op, (None, 0, None))(a[0], torch.stack([a[1], 2 * a[1]]), a[2]),
        "per-sample gradients": lambda op, a: vmap(grad(lambda w, x: op(x[None], w).pow(2).sum()), (None, 0))(
            a[1], a[0]
        ),
    }


@pytest.mark.parametrize(("stride", "ceil_mode"), AVGPOOL_CONV1X1_MODES)
@pytest.mark.parametrize("name", transforms())
def test_torch_func_equals_unfused(backend: str, name: str, stride: int, ceil_mode: bool) -> None:
    a = arguments()
    ours, theirs = (
        transforms()[name](lambda *tensors, op=op: op(*tensors, stride=stride, ceil_mode=ceil_mode), a)
        for op in (avgpool_conv1x1, unfused)
    )
    torch.testing.assert_close(ours, theirs)


def test_torch_func_on_the_module_equals_autograd(backend: str) -> None:
    x = torch.randn(2, 3, 6, 6)
    module = AvgPoolConv1x1(3, 4, bias=True)
    state = {k: v.detach() for k, v in module.named_parameters()}
    gradients = grad(lambda s: functional_call(module, s, (x,)).pow(2).sum())(state)
    module(x).pow(2).sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_forward_mode_equals_unfused(backend: str) -> None:
    """Dual tensors without torch.func, with and without reverse mode over them."""
    x, weight, bias = arguments()
    v = torch.randn_like(x)
    for requires_grad in (False, True):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, v)
            results = []
            for op in (avgpool_conv1x1, unfused):
                w = weight.clone().requires_grad_(requires_grad)
                tangent = forward_ad.unpack_dual(op(dual, w, bias)).tangent
                assert tangent is not None
                results.append([tangent.detach()])
                if requires_grad:
                    results[-1] += torch.autograd.grad(tangent.pow(2).sum(), w)
        torch.testing.assert_close(*results)
    assert torch.autograd.gradcheck(avgpool_conv1x1, (x.requires_grad_(), weight, bias), check_forward_ad=True)


def test_forward_over_reverse_equals_unfused(backend: str) -> None:
    """The graph is recorded outside the forward-mode level; dy is a dual tensor."""
    x, weight, bias = arguments()
    tangents = []
    for op in (avgpool_conv1x1, unfused):
        leaf = x.clone().requires_grad_()
        y = op(leaf, weight, bias)
        with forward_ad.dual_level():
            dy = forward_ad.make_dual(torch.ones_like(y), y.detach())
            (dx,) = torch.autograd.grad(y, leaf, dy)
            tangents.append(forward_ad.unpack_dual(dx).tangent)
    assert tangents[0] is not None
    torch.testing.assert_close(*tangents)


def test_batched_gradients_equal_unfused(backend: str) -> None:
    x, weight, bias = arguments()
    weight.requires_grad_()
    results = []
    for op in (avgpool_conv1x1, unfused):
        y = op(x, weight, bias)
        dy = torch.linspace(-1, 1, 3 * y.numel(), dtype=y.dtype).reshape(3, *y.shape)
        results.append(torch.autograd.grad(y, weight, dy, is_grads_batched=True))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", transforms())
def test_torch_func_on_the_raw_op_equals_unfused(raw_ops: Any, name: str) -> None:
    """Without a rule of its own the op would have a zero tangent."""
    a = arguments()

    def op(x, weight, bias=None) -> torch.Tensor:
        return raw_ops.avgpool_conv1x1_forward(x, weight, bias, 2, True)

    ours, theirs = transforms()[name](op, a), transforms()[name](lambda *b: unfused(*b, ceil_mode=True), a)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_raw_backward_has_a_forward_mode_derivative(raw_ops: Any, requires_grad: bool) -> None:
    x, weight, _ = arguments()
    dy, v = torch.randn(2, 4, 2, 2).double(), torch.randn_like(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(requires_grad), v)
        _, dweight, _ = raw_ops.avgpool_conv1x1_backward(dy, dual, weight, 2, False, False, True, False)
        tangent = forward_ad.unpack_dual(dweight).tangent
    want = torch.einsum("nohw,nchw->oc", dy, F.avg_pool2d(v, 2))
    assert tangent is not None
    torch.testing.assert_close(tangent[:, :, 0, 0], want)


def test_raw_backward_can_be_differentiated(raw_ops: Any) -> None:
    x, weight, _ = arguments()
    dy = torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    dx, dweight, _ = raw_ops.avgpool_conv1x1_backward(dy, x, weight.requires_grad_(), 2, False, True, True, False)
    ours = torch.autograd.grad(dx.pow(2).sum() + dweight.pow(2).sum(), (dy, weight))
    leaf = x.clone().requires_grad_()
    gradients = torch.autograd.grad(unfused(leaf, weight), (leaf, weight), dy, create_graph=True)
    theirs = torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), (dy, weight))
    torch.testing.assert_close(ours, theirs)


def test_no_graph_is_recorded_if_no_input_requires_grad(backend: str) -> None:
    x, weight, bias = arguments()
    assert avgpool_conv1x1(x, weight, bias).grad_fn is None
    with torch.no_grad():
        assert avgpool_conv1x1(x.requires_grad_(), weight, bias).grad_fn is None
    assert avgpool_conv1x1(x, weight, bias).grad_fn is not None


# ---- counters and compilers ----


@pytest.mark.parametrize("wanted", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize(("stride", "ceil_mode"), AVGPOOL_CONV1X1_MODES)
def test_flops_are_those_of_the_convolution(
    backend: str, stride: int, ceil_mode: bool, wanted: tuple[bool, bool]
) -> None:
    counts = []
    for op in (avgpool_conv1x1, unfused):
        x, weight, bias = (t.clone() for t in arguments(3))
        x.requires_grad_(wanted[0]), weight.requires_grad_(wanted[1])
        with FlopCounterMode(display=False) as forward:
            y = op(x, weight, bias, stride=stride, ceil_mode=ceil_mode)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0


def test_dynamic_batch_sizes_compile_at_most_twice(backend: str) -> None:
    module = AvgPoolConv1x1(3, 4, bias=True)
    for dynamic in (None, True):
        torch._dynamo.reset()
        compiles: list[object] = []

        def count(graph, inputs, compiles=compiles):
            compiles.append(graph)
            return graph.forward

        compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=count)
        for n in range(2, 12):
            x = torch.randn(n, 3, 6, 6, requires_grad=True)
            y = compiled(x)
            assert y.shape == (n, 4, 3, 3)
            y.sum().backward()
        assert len(compiles) <= 2, dynamic


def test_dynamic_image_sizes_compile(backend: str) -> None:
    """aot_autograd traces forward and backward with SymInt sizes."""
    torch._dynamo.reset()
    compiled = torch.compile(avgpool_conv1x1, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, h, w in ((2, 6, 6), (3, 9, 7), (5, 12, 11)):
        leaves = [torch.randn(s, requires_grad=True) for s in ((n, 3, h, w), (4, 3, 1, 1))]
        copies = [t.detach().clone().requires_grad_() for t in leaves]
        y, want = compiled(*leaves, ceil_mode=True), unfused(*copies, ceil_mode=True)
        torch.testing.assert_close(y, want)
        for ours, theirs in zip(
            torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(want.sum(), copies), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


def test_transforms_compile(backend: str) -> None:
    a = arguments()
    for name in ("grad", "jvp", "vmap"):
        torch._dynamo.reset()
        ours = torch.compile(lambda *b, name=name: transforms()[name](avgpool_conv1x1, b), backend="eager")(*a)
        torch.testing.assert_close(ours, transforms()[name](unfused, a))


def test_jit_trace_records_an_op_and_no_python_function(backend: str) -> None:
    """A graph with a Python function could not be saved."""
    x, weight, bias = (t.detach() for t in arguments())
    traced = torch.jit.trace(lambda x: avgpool_conv1x1(x, weight, bias), x)
    torch.testing.assert_close(traced(x + 1), unfused(x + 1, weight, bias))
    assert "PythonOp" not in str(traced.graph)
