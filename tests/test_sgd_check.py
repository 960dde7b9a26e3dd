"""sgd_check: non-finite values, and norms against float64; clipping with sgd_check and sgd_step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import DTYPES, HALF

from fasttricks.ops.sgd import sgd_check, sgd_step

TAILS = (1, 7, 8, 9, 15, 16, 17, 31, 33, 1025)


def run_check(backend: str) -> None:
    """An infinity or NaN is found at any place, for all lengths and dtypes; the largest finite value is not one."""
    for dtype, n in itertools.product(DTYPES, TAILS):
        found = torch.zeros(())
        grads = [torch.full((5,), torch.finfo(dtype).max, dtype=dtype), -torch.rand(n).to(dtype)]
        sgd_check(grads, found)
        assert found == 0
        for value, place in zip((math.inf, -math.inf, math.nan), (0, n // 2, n - 1), strict=True):
            bad = grads[1].clone()
            bad[place] = value
            found = torch.zeros(())
            sgd_check([grads[0], bad, grads[0]], found)
            assert found == 1, (dtype, n, value, place)
    found = torch.ones(())
    sgd_check([torch.ones(3)], found)
    assert found == 1  # it is never cleared


def test_check_finds_every_non_finite_value(backend: str) -> None:
    run_check(backend)


def run_norms(backend: str) -> None:
    grads = [torch.randn(n).to(dtype) for dtype in DTYPES for n in (*TAILS, 40000)]
    grads.append(torch.randn(6, 5, 4, 3)[:, ::2].transpose(1, 3))
    params = [torch.randn(g.shape).to(g.dtype) for g in grads]
    masters = [p.float() + torch.finfo(p.dtype).eps * 0.01 * p.float() for p in params if p.dtype in HALF]
    found = torch.zeros(())
    grad_sq = torch.full((len(grads),), math.nan, dtype=torch.float64)
    weight_sq = grad_sq.clone()
    sgd_check(grads, found, grad_sq=grad_sq, params=params, masters=masters, weight_sq=weight_sq)
    assert found == 0
    torch.testing.assert_close(grad_sq, torch.stack([g.double().square().sum() for g in grads]), rtol=1e-6, atol=0)
    rest = iter(masters)
    weights = [next(rest) if p.dtype in HALF else p for p in params]
    torch.testing.assert_close(weight_sq, torch.stack([w.double().square().sum() for w in weights]), rtol=1e-6, atol=0)


def test_norms_equal_float64(backend: str) -> None:
    run_norms(backend)


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-20, 1.0, 1e18, 1e25, 3e38])
def test_norms_of_every_magnitude(backend: str, size: float) -> None:
    """Also of finite gradients and weights whose squares overflow or underflow fp32."""
    for dtype, n in itertools.product((torch.float32, torch.bfloat16), (1, 17, 20_000)):
        grads = [(torch.rand(n) * 0.9 + 0.1).to(dtype) * size, torch.randn(n).to(dtype), torch.zeros(n, dtype=dtype)]
        found, squares = torch.zeros(()), [torch.zeros(3, dtype=torch.float64) for _ in range(2)]
        masters = [g.float() for g in grads if dtype in HALF]
        sgd_check(grads, found, grad_sq=squares[0], params=grads, masters=masters, weight_sq=squares[1])
        want = torch.stack([g.double().square().sum() for g in grads])
        assert found == 0
        for got in squares:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_a_norm_beyond_float64_is_an_overflow(backend: str) -> None:
    grads = [torch.full((3,), 1e200, dtype=torch.float64), torch.ones(3)]
    for measured in (False, True):
        found = torch.zeros(())
        sgd_check(grads, found, grad_sq=torch.zeros(2, dtype=torch.float64) if measured else None)
        assert found == float(measured)


def test_norms_do_not_depend_on_threads() -> None:
    grads = [torch.randn(300_001), torch.randn(70_000).half(), torch.randn(999)]
    squares = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = torch.empty(3, dtype=torch.float64)
            sgd_check(grads, torch.zeros(()), grad_sq=out)
            squares.append(out)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*squares)


def test_clipping_equals_clip_grad_norm(backend: str) -> None:
    for scale, max_norm in itertools.product((1.0, 64.0), (0.5, 1e6)):
        grads = [torch.randn(n) for n in (1, 17, 1025)]
        params = [torch.randn(g.shape) for g in grads]
        leaves = [p.clone().requires_grad_() for p in params]
        for leaf, g in zip(leaves, grads, strict=True):
            leaf.grad = g.clone()
        norm = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
        torch.optim.SGD(leaves, lr=0.3, foreach=False).step()
        found, squares = torch.zeros(()), torch.zeros(3, dtype=torch.float64)
        scaled = [g * scale for g in grads]
        sgd_check(scaled, found, grad_sq=squares)
        assert squares.sum().sqrt().item() / scale == pytest.approx(norm.item(), rel=1e-6)
        sgd_step(params, scaled, lr=0.3, grad_scale=torch.tensor(scale), grad_sq=squares, max_norm=max_norm)
        for p, leaf in zip(params, leaves, strict=True):
            torch.testing.assert_close(p, leaf.detach(), rtol=1e-6, atol=1e-6)
