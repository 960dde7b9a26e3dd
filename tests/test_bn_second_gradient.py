"""bn_relu_backward with a second gradient of y: that of a second user of y, or of the 2x2 means of y."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BN_BLOCK_DTYPES,
    BN_BLOCK_SHAPES,
    BN_POOLED_SHAPES,
    BN_SECONDS,
    HALF,
    INTERPRETED,
    LAYOUTS,
    assert_bn_close,
    bn_add_gradients,
    bn_affine,
    bn_cases,
    bn_second_shape,
    bn_tensor,
    bn_wide,
    poisoned_memory,
)

residuals = pytest.mark.parametrize("residual", [False, True], ids=["relu", "add_relu"])
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])


@dataclass
class Call:
    """A forward pass, and what its backward pass needs but the gradients of y."""

    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    mean: torch.Tensor
    var: torch.Tensor
    y: torch.Tensor
    mask: torch.Tensor | None
    training: bool

    def backward(
        self, ops: Any, dy: torch.Tensor, dy2: torch.Tensor | None = None, need_dresidual: bool | None = None
    ) -> tuple[torch.Tensor, ...]:
        """dx, dresidual (empty if not needed), dweight, dbias."""
        need = self.residual is not None if need_dresidual is None else need_dresidual
        statistics = self.mean, self.var, 1e-5, self.training
        with poisoned_memory():
            return ops.bn_relu_backward(dy, self.x, self.mask, self.weight, self.bias, *statistics, need, dy2)


def forward(
    ops: Any, x: torch.Tensor, residual: torch.Tensor | None, affine: tuple[Any, Any], training: bool = True
) -> Call:
    channels, wide = x.shape[1], bn_wide(x.dtype)
    given = (x, *affine) if residual is None else (x, residual, *affine)
    if training:
        op = ops.bn_relu_forward if residual is None else ops.bn_add_relu_forward
        y, mean, var, *mask = op(*given, 1e-5)
    else:
        mean, var = torch.randn(channels).to(wide), torch.rand(channels).add(0.3).to(wide)
        op = ops.bn_relu_apply if residual is None else ops.bn_add_relu_apply
        outputs = op(*given, mean, var, 1e-5)
        y, *mask = (outputs,) if residual is None else outputs
    return Call(x, residual, *affine, mean, var, y, mask[0] if mask else None, training)


def draw(
    ops: Any, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, residual: bool,
    training: bool = True,
) -> Call:  # fmt: skip
    x, other = (bn_tensor(shape, dtype, layout) for _ in range(2))
    return forward(ops, x, other if residual else None, bn_affine(shape[1], dtype), training)


def assert_same(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    for name, a, b in zip(("dx", "dresidual", "dweight", "dbias"), got, want, strict=True):
        assert a.dtype == b.dtype, name
        assert a.stride() == b.stride(), name
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


@residuals
@pytest.mark.parametrize("dtype", BN_BLOCK_DTYPES, ids=str)
@bn_cases((*BN_BLOCK_SHAPES, *BN_POOLED_SHAPES))
def test_same_bits_as_adding_first(
    raw_ops: Any, shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, residual: bool
) -> None:
    for training in (True, False):
        call = draw(raw_ops, shape, dtype, layout, residual, training)
        dy = bn_tensor(shape, dtype, layout)
        for second in BN_SECONDS if shape in BN_POOLED_SHAPES else ("full",):
            dy2 = bn_tensor(bn_second_shape(shape, second), dtype, layout)
            want = call.backward(raw_ops, bn_add_gradients(dy, dy2))
            assert_same(call.backward(raw_ops, dy, dy2), want)
            dx, _, *sums = call.backward(raw_ops, dy, dy2, need_dresidual=False)
            assert_same((dx, want[1], *sums), want)


@residuals
@layouts
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", BN_BLOCK_DTYPES, ids=str)
@pytest.mark.parametrize("second", ["full", "floor", "ceil"])
def test_gradients_equal_those_of_torch(
    raw_ops: Any, second: str, dtype: torch.dtype, training: bool, layout: torch.memory_format, residual: bool
) -> None:
    """Those of y and of avg_pool2d(y), which autograd adds, in float64."""
    shape = (3, 6, 7, 9)
    call = draw(raw_ops, shape, dtype, layout, residual, training)
    dy, dy2 = bn_tensor(shape, dtype, layout), bn_tensor(bn_second_shape(shape, second), dtype, layout)

    def by_torch(to: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        tensors = [t for t in (call.x, call.residual, call.weight, call.bias) if t is not None]
        leaves = [to(t).requires_grad_() for t in tensors]
        statistics = (None, None) if training else (to(call.mean), to(call.var))
        z = F.batch_norm(leaves[0], *statistics, *leaves[-2:], training)
        z = z + leaves[1] if residual else z
        y = torch.where(call.y <= 0, 0, z)
        users = [y, y if second == "full" else F.avg_pool2d(y, 2, ceil_mode=second == "ceil", count_include_pad=False)]
        return list(torch.autograd.grad(users, leaves, [to(dy), to(dy2)]))

    dx, dresidual, *sums = call.backward(raw_ops, dy, dy2)
    got = [dx, dresidual, *sums] if residual else [dx, *sums]
    names = ["dx", "dresidual", "dweight", "dbias"] if residual else ["dx", "dweight", "dbias"]
    assert_bn_close(dict(zip(names, got, strict=True)), by_torch)
    assert dx.stride() == call.x.stride()


@layouts
@pytest.mark.parametrize("second", BN_SECONDS)
@pytest.mark.parametrize("zeros", ["all", "some"])
def test_zero_gamma_is_exact(raw_ops: Any, layout: torch.memory_format, second: str, zeros: str) -> None:
    """dx is exactly zero; the gradients of the residual and of the parameters are not."""
    shape = (3, 6, 5, 7)
    weight, bias = bn_affine(6, torch.float32)
    gone = torch.ones(6, dtype=torch.bool) if zeros == "all" else torch.arange(6) % 2 == 0
    weight[gone] = 0
    call = forward(raw_ops, *(bn_tensor(shape, torch.float32, layout) for _ in range(2)), (weight, bias))
    dy = bn_tensor(shape, torch.float32, layout)
    dy2 = bn_tensor(bn_second_shape(shape, second), torch.float32, layout)
    dx, dresidual, dweight, _ = call.backward(raw_ops, dy, dy2)
    assert (dx[:, gone] == 0).all()
    assert torch.equal(dresidual, torch.where(call.y <= 0, 0, bn_add_gradients(dy, dy2)))
    assert (dweight != 0).all()
    assert (call.backward(raw_ops, dy, dy2, need_dresidual=False)[0][:, gone] == 0).all()


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@residuals
def test_without_weight_or_bias(raw_ops: Any, weight: bool, bias: bool, residual: bool) -> None:
    affine = bn_affine(5, torch.float32)
    x, other, dy, dy2 = (bn_tensor((4, 5, 6, 6), torch.float32) for _ in range(4))
    chosen = (affine[0] if weight else None, affine[1] if bias else None)
    call = forward(raw_ops, x, other if residual else None, chosen)
    assert_same(call.backward(raw_ops, dy, dy2), call.backward(raw_ops, dy + dy2))


def strided(shape: tuple[int, ...], layout: torch.memory_format) -> dict[str, torch.Tensor]:
    n, c, h, w = shape
    other = LAYOUTS[layout is LAYOUTS[0]]
    return {
        "other layout": torch.randn(shape).contiguous(memory_format=other),
        "transposed": torch.randn(n, c, w, h).transpose(2, 3),
        "sliced": torch.randn(n, c + 3, h, w).contiguous(memory_format=layout)[:, 1 : c + 1],
        "cropped": torch.randn(n, c, h + 1, 2 * w).contiguous(memory_format=layout)[:, :, 1:, ::2],
        "expanded": torch.randn(()).expand(shape),
        "one sample": torch.randn(1, c, h, w).contiguous(memory_format=layout).expand(shape),
    }


@residuals
@layouts
@pytest.mark.parametrize("second", ["full", "floor"])
@pytest.mark.parametrize("name", sorted(strided((1, 1, 1, 1), torch.contiguous_format)))
def test_any_strides_are_accepted(
    raw_ops: Any, name: str, second: str, layout: torch.memory_format, residual: bool
) -> None:
    shape = (2, 4, 6, 5)
    call = draw(raw_ops, shape, torch.float32, layout, residual)
    dy, dy2 = strided(shape, layout)[name], strided(bn_second_shape(shape, second), layout)[name]
    assert_same(call.backward(raw_ops, dy, dy2), call.backward(raw_ops, bn_add_gradients(dy, dy2)))


@residuals
@layouts
def test_both_gradients_may_be_the_same_tensor(raw_ops: Any, layout: torch.memory_format, residual: bool) -> None:
    call = draw(raw_ops, (2, 5, 4, 6), torch.float32, layout, residual)
    dy = bn_tensor((2, 5, 4, 6), torch.float32, layout)
    before = dy.clone()
    assert_same(call.backward(raw_ops, dy, dy), call.backward(raw_ops, dy + dy))
    assert torch.equal(dy, before)


@residuals
@layouts
def test_the_mean_of_no_window_adds_nothing(raw_ops: Any, layout: torch.memory_format, residual: bool) -> None:
    """A pool that drops odd edges drops a single row or column whole."""
    for shape in ((3, 4, 1, 1), (2, 4, 1, 6), (2, 4, 6, 1)):
        call = draw(raw_ops, shape, torch.float32, layout, residual)
        dy, dy2 = bn_tensor(shape, torch.float32, layout), torch.empty(bn_second_shape(shape, "floor"))
        assert dy2.numel() == 0
        assert_same(call.backward(raw_ops, dy, dy2), call.backward(raw_ops, dy))


@layouts
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_a_special_value_reaches_its_window_only(raw_ops: Any, layout: torch.memory_format, special: float) -> None:
    """Not the pixels of the odd edges, which are in no window."""
    x = bn_tensor((2, 3, 5, 7), torch.float32, layout)
    call = forward(raw_ops, x, 100 + x.abs(), (None, None), training=False)  # all pass the ReLU
    dy2 = torch.zeros(2, 3, 2, 3)
    dy2[1, 2, 1, 2] = special
    dx, dresidual, *_ = call.backward(raw_ops, torch.ones_like(x), dy2)
    window = torch.zeros(x.shape, dtype=torch.bool)
    window[1, 2, 2:4, 4:6] = True
    for got in (dx, dresidual):
        assert torch.equal(~got.isfinite(), window)
    dy2.fill_(special)
    edges = call.backward(raw_ops, torch.ones_like(x), dy2)[1].isfinite()
    assert edges[:, :, 4].all()
    assert edges[:, :, :, 6].all()
    assert not edges[:, :, :4, :6].any()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_sum_is_rounded_once_and_may_overflow(raw_ops: Any, dtype: torch.dtype) -> None:
    """A quarter of a mean's gradient is not rounded to half before it is added; the sum is, as one of two halves is."""
    x = bn_tensor((1, 2, 2, 2), dtype)
    call = forward(raw_ops, x, 100 + x.abs(), (None, None), training=False)
    tiny, large = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, torch.finfo(dtype).max
    # (dy, dy2 of the means, dy + dy2 / 4 rounded)
    cases = [(tiny, 2 * tiny, 2 * tiny), (0.0, 4 * tiny, tiny), (large, large, float("inf"))]
    if INTERPRETED and dtype == torch.bfloat16:
        cases = cases[-1:]  # the interpreter flushes subnormal bfloat16 to zero
    for first, second, want in cases:
        dy, dy2 = torch.full_like(x, first), torch.full((1, 2, 1, 1), second, dtype=dtype)
        assert (call.backward(raw_ops, dy, dy2)[1] == want).all(), (first, second)


@pytest.mark.parametrize("training", [True, False])
@residuals
@layouts
def test_empty_input_has_zero_gradients(
    raw_ops: Any, layout: torch.memory_format, residual: bool, training: bool
) -> None:
    for shape in ((0, 4, 6, 6), (2, 4, 0, 5)):
        call = draw(raw_ops, shape, torch.float32, layout, residual, training)
        for second in BN_SECONDS:
            dx, _, dweight, dbias = call.backward(
                raw_ops, torch.empty(shape), torch.empty(bn_second_shape(shape, second))
            )
            assert dx.shape == shape
            assert dweight.tolist() == dbias.tolist() == [0] * shape[1]


@residuals
@layouts
def test_same_bits_on_every_run_and_thread_count(raw_ops: Any, layout: torch.memory_format, residual: bool) -> None:
    shape = (6, 24, 14, 14)
    call = draw(raw_ops, shape, torch.float32, layout, residual)
    dy = bn_tensor(shape, torch.float32, layout)
    before = torch.get_num_threads()
    try:
        for second in ("full", "floor"):
            dy2 = bn_tensor(bn_second_shape(shape, second), torch.float32, layout)
            results = []
            for threads in (1, 2, 3, 2):
                torch.set_num_threads(threads)
                results.append(call.backward(raw_ops, dy, dy2))
            for result in results[1:]:
                assert_same(result, results[0])
    finally:
        torch.set_num_threads(before)


def test_only_the_shape_of_y_and_that_of_its_means_are_accepted(raw_ops: Any) -> None:
    for shape, wrong in (
        ((2, 3, 6, 6), [(2, 3, 6, 3), (2, 3, 4, 3), (2, 3, 3), (2, 4, 3, 3), (1, 3, 3, 3), (2, 3, 2, 3), (2, 3, 36)]),
        ((2, 3, 7, 7), [(2, 3, 2, 3), (2, 3, 5, 4), (2, 3, 7, 4)]),
        ((2, 3, 8), [(2, 3, 4)]),
        ((2, 3, 4, 4, 4), [(2, 3, 2, 2, 2)]),
    ):
        x = torch.ones(shape)
        call = forward(raw_ops, x, x, (None, None), training=False)
        for given in wrong:
            with pytest.raises((RuntimeError, ValueError), match=r"dy2 has shape .*; accepted: .*the shape of x, or"):
                call.backward(raw_ops, x, torch.ones(given))
