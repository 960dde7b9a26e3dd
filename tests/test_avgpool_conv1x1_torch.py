"""avgpool_conv1x1 under autograd, torch.compile and autocast; AvgPoolConv1x1."""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from cases import AVGPOOL_CONV1X1_MODES, INTERPRETED, LAYOUTS
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from fasttricks.nn.avgpool_conv1x1 import AvgPoolConv1x1
from fasttricks.ops.avgpool_conv1x1 import avgpool_conv1x1
from fasttricks.reference.avgpool_conv1x1 import avgpool_conv1x1 as reference


def arguments(dtype: torch.dtype = torch.float64, layout: torch.memory_format = torch.contiguous_format, **sizes: int):
    c, o, h, w = (sizes.get(k, d) for k, d in (("c", 3), ("o", 4), ("h", 5), ("w", 4)))
    x = torch.randn(2, c, h, w, dtype=dtype).contiguous(memory_format=layout)
    return [t.requires_grad_() for t in (x, torch.randn(o, c, 1, 1, dtype=dtype), torch.randn(o, dtype=dtype))]


# ---- autograd ----


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("stride", "ceil_mode"), AVGPOOL_CONV1X1_MODES)
def test_gradcheck(backend: str, layout: torch.memory_format, stride: int, ceil_mode: bool) -> None:
    def op(*tensors):
        return avgpool_conv1x1(*tensors, stride=stride, ceil_mode=ceil_mode)

    sizes = {"c": 2, "o": 3, "h": 3, "w": 4}
    assert torch.autograd.gradcheck(op, arguments(layout=layout, **sizes), fast_mode=INTERPRETED)
    assert torch.autograd.gradgradcheck(op, arguments(layout=layout, **sizes), fast_mode=True)


def test_only_requested_gradients_are_computed(backend: str) -> None:
    for wanted in itertools.product((True, False), repeat=3):
        if not any(wanted):
            continue
        tensors = arguments()
        for t, needed in zip(tensors, wanted, strict=True):
            t.requires_grad_(needed)
        avgpool_conv1x1(*tensors).pow(2).sum().backward()
        want = [t.detach().clone().requires_grad_(needed) for t, needed in zip(tensors, wanted, strict=True)]
        reference(*want).pow(2).sum().backward()
        for ours, theirs, needed in zip(tensors, want, wanted, strict=True):
            if needed:
                torch.testing.assert_close(ours.grad, theirs.grad)
            else:
                assert ours.grad is None


def test_gradient_penalty_equals_unfused(backend: str) -> None:
    """A loss of the gradient, with create_graph=True."""
    tensors = arguments()
    losses = []
    for op in (avgpool_conv1x1, reference):
        leaves = [t.detach().requires_grad_() for t in tensors]
        (dx,) = torch.autograd.grad(op(*leaves).pow(3).sum(), leaves[0], create_graph=True)
        losses.append(torch.autograd.grad(dx.pow(2).sum(), leaves))
    for ours, theirs in zip(*losses, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_saves_x_and_weight_and_no_pooled_tensor(backend: str) -> None:
    x, weight, bias = arguments(torch.float32, c=8, h=8, w=8)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        avgpool_conv1x1(x, weight, bias)
    if backend == "reference":
        assert any(t.shape == (2, 8, 4, 4) for t in saved)  # the fused op does not keep it
    else:
        assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr()}


def test_no_grad_and_inference_mode_need_no_graph(backend: str) -> None:
    tensors = arguments()
    want = reference(*tensors).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = avgpool_conv1x1(*tensors)
        assert not y.requires_grad
        torch.testing.assert_close(y, want)


# ---- compile, fake and meta tensors ----


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_full_graph_compile_equals_eager(backend: str, layout: torch.memory_format) -> None:
    module = AvgPoolConv1x1(3, 4, bias=True, ceil_mode=True)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    for h, w in ((6, 6), (7, 5)):
        x, traced = (t.requires_grad_() for t in [torch.randn(2, 3, h, w).contiguous(memory_format=layout)] * 2)
        traced = x.detach().clone().requires_grad_()
        y, y_compiled = module(x), compiled(traced)
        assert y.stride() == y_compiled.stride()
        torch.testing.assert_close(y_compiled, y)
        for out in (y, y_compiled):
            out.pow(2).sum().backward()
        torch.testing.assert_close(traced.grad, x.grad)
    torch.testing.assert_close(compiled.weight.grad, module.weight.grad)
    torch.testing.assert_close(compiled.bias.grad, module.bias.grad)


def test_compiled_backward_runs_the_op(backend: str) -> None:
    """It does not run the differentiable torch operations of create_graph=True."""
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _):
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    torch.compile(avgpool_conv1x1, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))(
        *arguments(torch.float32)
    ).sum().backward()
    assert len(graphs) == 2
    for code in graphs:
        assert bool(re.search(r"fasttricks\w*\.avgpool_conv1x1", code)) == (backend != "reference")


def test_meta_tensors_have_shape_dtype_and_strides(backend: str) -> None:
    for layout in LAYOUTS:
        x = torch.randn(2, 3, 6, 8).contiguous(memory_format=layout)
        weight = torch.randn(5, 3, 1, 1)
        want = avgpool_conv1x1(x, weight, ceil_mode=True)
        got = avgpool_conv1x1(x.to("meta"), weight.to("meta"), ceil_mode=True)
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        if backend != "reference":  # torch's meta convolution has other strides than its kernel
            assert got.stride() == want.stride()


# ---- autocast ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_a_convolution(backend: str, dtype: torch.dtype) -> None:
    """Output in the autocast dtype, gradients in the dtypes of the parameters."""
    tensors = arguments(torch.float32)
    with torch.autocast("cpu", dtype):
        y = avgpool_conv1x1(*tensors)
    assert y.dtype == dtype
    torch.testing.assert_close(y, reference(*(t.to(dtype) for t in tensors)), rtol=0.02, atol=0.05)
    y.float().pow(2).sum().backward()
    for t in tensors:
        assert t.grad is not None
        assert t.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype):  # half x, float32 parameters
        assert avgpool_conv1x1(tensors[0].to(dtype), *tensors[1:]).dtype == dtype
        assert avgpool_conv1x1(*arguments(torch.float64)).dtype == torch.float64  # torch does not cast float64
    with torch.autocast("cpu", dtype, enabled=False):
        assert avgpool_conv1x1(*tensors).dtype == torch.float32


# ---- the module ----


def test_module_equals_a_pool_and_a_convolution(backend: str) -> None:
    for bias, stride in itertools.product((False, True), (1, 2)):
        conv = nn.Conv2d(6, 9, 1, bias=bias)
        ours = AvgPoolConv1x1(6, 9, stride=stride, bias=bias)
        assert list(ours.state_dict()) == list(conv.state_dict())
        assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in conv.state_dict().items()}
        ours.load_state_dict(conv.state_dict())
        x = torch.randn(2, 6, 8, 8)
        torch.testing.assert_close(ours(x), conv(F.avg_pool2d(x, 2) if stride == 2 else x))


def test_module_is_initialised_as_conv2d() -> None:
    for bias in (False, True):
        torch.manual_seed(5)
        conv = nn.Conv2d(16, 24, 1, bias=bias)
        torch.manual_seed(5)
        ours = AvgPoolConv1x1(16, 24, bias=bias)
        assert all(torch.equal(a, b) for a, b in zip(conv.parameters(), ours.parameters(), strict=True))


def test_module_has_repr_dtype_and_device() -> None:
    assert repr(AvgPoolConv1x1(3, 4)) == "AvgPoolConv1x1(3, 4, stride=2, bias=False)"
    assert (
        repr(AvgPoolConv1x1(3, 4, stride=1, bias=True, ceil_mode=True))
        == "AvgPoolConv1x1(3, 4, stride=1, ceil_mode=True)"
    )
    module = AvgPoolConv1x1(3, 4, device="meta", dtype=torch.bfloat16)
    assert (module.weight.device.type, module.weight.dtype) == ("meta", torch.bfloat16)
