"""bn_relu and bn_add_relu under torch.func, forward-mode AD, checkpointing, mixed dtypes, dynamic shapes and export."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import func, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fasttricks import bn_add_relu, bn_relu
from fasttricks.nn import BatchNormAddReLU2d, BatchNormReLU2d

X = torch.randn(3, 4, 2, 2).double()
WEIGHT, BIAS = torch.rand(4).double() + 0.5, torch.randn(4).double()
MEAN, VAR = torch.randn(4).double(), torch.rand(4).double() + 0.5


def pair(training: bool, residual: bool) -> tuple[Callable, Callable]:
    """(the fused function of x, torch's composition); neither changes running statistics."""
    r = torch.randn_like(X)

    def fused(x: torch.Tensor) -> torch.Tensor:
        rest = (WEIGHT, BIAS) if training else (WEIGHT, BIAS, MEAN, VAR)
        if residual:
            return bn_add_relu(x, r, *rest, training=training)
        return bn_relu(x, *rest, training=training)

    def unfused(x: torch.Tensor) -> torch.Tensor:
        z = F.batch_norm(x, *(None, None) if training else (MEAN, VAR), WEIGHT, BIAS, training)
        return F.relu(z + r if residual else z)

    return fused, unfused


TRANSFORMS: dict[str, Callable[[Callable], torch.Tensor]] = {
    "grad": lambda f: func.grad(lambda x: f(x).square().sum())(X),
    "vjp": lambda f: func.vjp(f, X)[1](X.cos())[0],
    "jvp": lambda f: func.jvp(f, (X,), (X.sin(),))[1],
    "jacrev": lambda f: func.jacrev(f)(X),
    "jacfwd": lambda f: func.jacfwd(f)(X),
    "hessian": lambda f: func.hessian(lambda x: f(x).square().sum())(X),
    "vmap": lambda f: func.vmap(f)(torch.stack([X, 2 * X.sin()])),
    "per sample": lambda f: func.vmap(func.grad(lambda x: f(x).square().sum()))(torch.stack([X, 2 * X.sin()])),
}


@pytest.mark.parametrize("residual", [False, True], ids=["relu", "add_relu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func_equals_unfused(backend: str, name: str, training: bool, residual: bool) -> None:
    fused, unfused = pair(training, residual)
    torch.testing.assert_close(TRANSFORMS[name](fused), TRANSFORMS[name](unfused), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward_mode_equals_unfused(backend: str, training: bool) -> None:
    fused, unfused = pair(training, True)
    with forward_ad.dual_level():
        got, want = (forward_ad.unpack_dual(f(forward_ad.make_dual(X, X.sin()))) for f in (fused, unfused))
    torch.testing.assert_close(got.primal, want.primal)
    torch.testing.assert_close(got.tangent, want.tangent)


def test_raw_backward_refuses_forward_mode(raw_ops: Any) -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, X)
        with pytest.raises(RuntimeError, match="bn_relu_backward has no derivative"):
            raw_ops.bn_relu_backward(dual, X, None, WEIGHT, BIAS, MEAN, VAR, 1e-5, True, False)


def test_running_statistics_change_under_grad_and_raise_under_vmap() -> None:
    norm, peer = BatchNormReLU2d(4).double(), nn.BatchNorm2d(4).double()
    func.grad(lambda x: norm(x).sum())(X)
    peer(X)
    torch.testing.assert_close(norm.state_dict(), peer.state_dict())
    with pytest.raises(RuntimeError, match="vmap: inplace"):
        func.vmap(norm)(torch.stack([X, X]))
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpoint_changes_running_statistics_as_in_torch(
    backend: str, momentum: float | None, reentrant: bool
) -> None:
    """The recomputation changes them again, even if it stops early at the last saved tensor."""
    fused = nn.Sequential(nn.Conv2d(4, 4, 1), BatchNormReLU2d(4, momentum=momentum)).double()
    unfused = nn.Sequential(copy.deepcopy(fused[0]), nn.BatchNorm2d(4, momentum=momentum).double(), nn.ReLU())
    for net in (fused, unfused):
        x = X.clone().requires_grad_()
        checkpoint(net, x, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(fused[1].state_dict(), unfused[1].state_dict())
    assert fused[1].num_batches_tracked == 2


@pytest.mark.parametrize(
    ("dtype", "other"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float32, torch.float64)],
)
@pytest.mark.parametrize("shape", [(3, 4, 2, 2), (1, 4, 1, 1), (2, 2)])
def test_residual_is_promoted_and_broadcast_as_in_torch(
    backend: str, dtype: torch.dtype, other: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, r, weight = X.to(dtype).requires_grad_(), torch.randn(shape).to(other).requires_grad_(), torch.ones(4)
    mean, var = torch.zeros(4), torch.ones(4)
    y = bn_add_relu(x, r, weight, None, mean, var)
    a, b = x.detach().double().requires_grad_(), r.detach().double().requires_grad_()
    want = F.batch_norm(a, None, None, weight.double(), None, True) + b
    assert y.dtype == torch.promote_types(dtype, other)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, r), dy)
    exact = torch.autograd.grad(want, (a, b), torch.where(y > 0, dy, 0).double())
    assert [g.dtype for g in grads] == [dtype, other]
    torch.testing.assert_close(y.double(), want.relu(), rtol=1e-3, atol=1e-3)
    for got, g in zip(grads, exact, strict=True):
        torch.testing.assert_close(got.double(), g, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_sizes_share_a_graph(momentum: float | None) -> None:
    torch._dynamo.reset()
    graphs: list[object] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> Callable:
        graphs.append(graph)
        return graph.forward

    norm = BatchNormAddReLU2d(4, momentum=momentum)
    peer = copy.deepcopy(norm)
    compiled = torch.compile(norm, dynamic=True, fullgraph=True, backend=count)
    for n in range(2, 12):
        x = torch.randn(n, 4, 3, 3)
        torch.testing.assert_close(compiled(x, x), peer(x, x), rtol=0, atol=0)
    assert len(graphs) <= 2
    torch.testing.assert_close(norm.state_dict(), peer.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_export_with_a_dynamic_batch(training: bool) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), BatchNormReLU2d(4)).train(training)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(net, (torch.randn(3, 4, 5, 5),), dynamic_shapes=({0: batch},)).module()
    x = torch.randn(7, 4, 5, 5)
    torch.testing.assert_close(exported(x), copy.deepcopy(net)(x))
