"""bn_add_bn_relu: relu(bn(x) + bn(residual)), values and gradients of the raw ops against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BN_BLOCK_DTYPES,
    BN_BLOCK_SHAPES,
    BN_POOLED_SHAPES,
    BN_SECONDS,
    LAYOUTS,
    assert_bn_close,
    assert_bn_statistics,
    bn_add_gradients,
    bn_affine,
    bn_cases,
    bn_layouts,
    bn_second_shape,
    bn_tensor,
    bn_wide,
    poisoned_memory,
)

from fasttricks.ops.bn_outputs import unpack_mask

EPS, RESIDUAL_EPS = 1e-5, 1e-2
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
GRADIENTS = ("dx", "dresidual", "dweight", "dresidual_weight", "dbias")

Statistics = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class Inputs:
    x: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    residual_weight: torch.Tensor | None
    residual_bias: torch.Tensor | None
    dy: torch.Tensor

    @property
    def tensors(self) -> tuple[Any, ...]:
        return self.x, self.residual, self.weight, self.bias, self.residual_weight, self.residual_bias


def draw(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Inputs:
    x, residual, dy = (bn_tensor(shape, dtype, layout) for _ in range(3))
    return Inputs(x, residual, *bn_affine(shape[1], dtype), *bn_affine(shape[1], dtype), dy)


@dataclass
class Result:
    """Of a forward and a backward pass."""

    y: torch.Tensor
    statistics: Statistics
    mask: torch.Tensor
    gradients: tuple[torch.Tensor, ...]


def run(ops: Any, given: Inputs, statistics: Statistics | None = None, dy2: torch.Tensor | None = None) -> Result:
    """statistics: constant ones; None: those of the batch."""
    training = statistics is None
    with poisoned_memory():
        if statistics is None:
            y, *found, mask = ops.bn_add_bn_relu_forward(*given.tensors, EPS, RESIDUAL_EPS)
            statistics = (found[0], found[1], found[2], found[3])
        else:
            y, mask = ops.bn_add_bn_relu_apply(*given.tensors, *statistics, EPS, RESIDUAL_EPS)
        weights = given.weight, given.residual_weight
        gradients = ops.bn_add_bn_relu_backward(
            given.dy, given.x, given.residual, mask, *weights, *statistics, EPS, RESIDUAL_EPS, training, dy2
        )
    return Result(y, statistics, mask, gradients)


def of_torch(
    given: Inputs, y: torch.Tensor, statistics: Statistics | None, to: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """y and the gradients by torch's ops on inputs mapped by `to`, with the ReLU mask of y.

    Missing parameters are ones and zeros.
    """
    wide, channels = bn_wide(given.x.dtype), given.x.shape[1]
    made = [given.x, given.residual]
    made += [
        (torch.ones if i % 2 == 0 else torch.zeros)(channels, dtype=wide) if t is None else t
        for i, t in enumerate(given.tensors[2:])
    ]
    leaves = [to(t).requires_grad_() for t in made]
    x, residual, weight, bias, residual_weight, residual_bias = leaves
    constant = [None] * 4 if statistics is None else [to(t) for t in statistics]
    training = statistics is None
    z = F.batch_norm(x, *constant[:2], weight, bias, training, 0.1, EPS)
    z = z + F.batch_norm(residual, *constant[2:], residual_weight, residual_bias, training, 0.1, RESIDUAL_EPS)
    dz = torch.where(y <= 0, 0, to(given.dy)).to(z.dtype)
    dx, dresidual, dweight, dbias, dresidual_weight, _ = torch.autograd.grad(z, leaves, dz)
    return [F.relu(z), dx, dresidual, dweight, dresidual_weight, dbias]


def assert_close_to_torch(given: Inputs, result: Result, statistics: Statistics | None = None) -> None:
    got = {"y": result.y, **dict(zip(GRADIENTS, result.gradients, strict=True))}
    assert_bn_close(got, lambda to: of_torch(given, result.y, statistics, to))


def check(ops: Any, given: Inputs, statistics: Statistics | None = None) -> Result:
    result, dtype = run(ops, given, statistics), given.x.dtype
    assert_close_to_torch(given, result, statistics)
    dx, dresidual, *parameters = result.gradients
    for t in (result.y, dx, dresidual):
        assert t.dtype == dtype
        assert t.stride() == given.x.stride()
    for t in (*parameters, *result.statistics):
        assert t.dtype == bn_wide(dtype)
        assert t.shape == given.x.shape[1:2]
    assert torch.equal(unpack_mask(result.mask, given.x), ~(result.y <= 0))
    return result


def assert_same(got: Result, want: Result) -> None:
    pairs = {"y": (got.y, want.y), "mask": (got.mask, want.mask)}
    pairs |= {name: (a, b) for name, a, b in zip(GRADIENTS, got.gradients, want.gradients, strict=True)}
    for name, (a, b) in pairs.items():
        assert torch.equal(a, b), name
        assert a.stride() == b.stride(), name


def constant_statistics(channels: int, dtype: torch.dtype) -> Statistics:
    wide = bn_wide(dtype)
    mean, var = torch.randn(2, channels), torch.rand(2, channels).add(0.3)
    return mean[0].to(wide), var[0].to(wide), mean[1].to(wide), var[1].to(wide)


@pytest.mark.parametrize("dtype", BN_BLOCK_DTYPES, ids=str)
@bn_cases(BN_BLOCK_SHAPES)
def test_values_and_gradients(
    raw_ops: Any, shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    given = draw(shape, dtype, layout)
    result = check(raw_ops, given)
    assert_bn_statistics(*result.statistics[:2], given.x)
    assert_bn_statistics(*result.statistics[2:], given.residual)


@pytest.mark.parametrize("dtype", BN_BLOCK_DTYPES, ids=str)
@layouts
def test_evaluation_uses_constant_statistics(raw_ops: Any, layout: torch.memory_format, dtype: torch.dtype) -> None:
    statistics = constant_statistics(7, dtype)
    before = [t.clone() for t in statistics]
    check(raw_ops, draw((3, 7, 5, 6), dtype, layout), statistics)
    assert all(torch.equal(a, b) for a, b in zip(statistics, before, strict=True))


@pytest.mark.parametrize("missing", ["weight", "bias", "residual_weight", "residual_bias", "all"])
@pytest.mark.parametrize("shape", [(4, 6, 7, 9), (9, 5, 1, 1)])
def test_without_weight_or_bias(raw_ops: Any, missing: str, shape: tuple[int, ...]) -> None:
    given = draw(shape, torch.float32, torch.contiguous_format)
    names = ["weight", "bias", "residual_weight", "residual_bias"] if missing == "all" else [missing]
    check(raw_ops, replace(given, **dict.fromkeys(names)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_parameters(raw_ops: Any, dtype: torch.dtype) -> None:
    """As after model.half(): the sums are float32."""
    given = draw((4, 6, 5, 5), dtype, torch.contiguous_format)
    names = ("weight", "bias", "residual_weight", "residual_bias")
    check(raw_ops, replace(given, **{name: getattr(given, name).to(dtype) for name in names}))


@layouts
@pytest.mark.parametrize("zeros", ["all", "some"])
def test_zero_gamma_is_exact(raw_ops: Any, layout: torch.memory_format, zeros: str) -> None:
    """y = relu(bn(residual)) bit for bit where weight and bias are zero, dx is exactly zero, dweight is not."""
    given = draw((4, 6, 5, 7), torch.float32, layout)
    gone = torch.ones(6, dtype=torch.bool) if zeros == "all" else torch.arange(6) % 2 == 0
    assert given.weight is not None
    assert given.bias is not None
    given.weight[gone] = given.bias[gone] = 0
    result = check(raw_ops, given)
    alone, *_ = raw_ops.bn_relu_forward(given.residual, given.residual_weight, given.residual_bias, RESIDUAL_EPS)
    assert torch.equal(result.y[:, gone], alone[:, gone])
    dx, dresidual, dweight, *_ = result.gradients
    assert (dx[:, gone] == 0).all()
    assert (dweight[gone] != 0).all()
    assert (dresidual != 0).any((0, 2, 3)).all()
    dy2 = bn_tensor(given.x.shape, torch.float32, layout)
    assert (run(raw_ops, given, dy2=dy2).gradients[0][:, gone] == 0).all()


@layouts
def test_zero_gamma_of_the_residual_is_exact(raw_ops: Any, layout: torch.memory_format) -> None:
    given = draw((4, 6, 5, 7), torch.float32, layout)
    assert given.residual_weight is not None
    assert given.residual_bias is not None
    given.residual_weight[:] = given.residual_bias[:] = 0
    result = check(raw_ops, given)
    alone, *_ = raw_ops.bn_relu_forward(given.x, given.weight, given.bias, EPS)
    assert torch.equal(result.y, alone)
    assert (result.gradients[1] == 0).all()
    assert (result.gradients[3] != 0).all()


@pytest.mark.parametrize("dtype", BN_BLOCK_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*BN_BLOCK_SHAPES, *BN_POOLED_SHAPES], ids=str)
def test_a_second_gradient_gives_the_bits_of_adding_first(
    raw_ops: Any, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for layout in bn_layouts(shape):
        given = draw(shape, dtype, layout)
        statistics = None if shape in BN_POOLED_SHAPES else constant_statistics(shape[1], dtype)
        for second in BN_SECONDS if shape in BN_POOLED_SHAPES else ("full",):
            dy2 = bn_tensor(bn_second_shape(shape, second), dtype, layout)
            first = run(raw_ops, replace(given, dy=bn_add_gradients(given.dy, dy2)), statistics)
            assert_same(run(raw_ops, given, statistics, dy2), first)


@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
@layouts
def test_running_statistics_equal_torch(raw_ops: Any, layout: torch.memory_format, momentum: float | None) -> None:
    """Each BatchNorm has its own statistics, momentum and count; None: the cumulative average."""
    given = draw((5, 6, 4, 3), torch.float32, layout)
    momenta = (momentum, 0.3)
    got = [(torch.randn(6), torch.rand(6), torch.tensor(count)) for count in (3, 6)]
    want = [(mean.double(), var.double()) for mean, var, _ in got]
    moved = [t for statistics, m in zip(got, momenta, strict=True) for t in (*statistics, m)]
    _, mean, var, residual_mean, residual_var, _ = raw_ops.bn_add_bn_relu_forward(
        *given.tensors, EPS, RESIDUAL_EPS, *moved
    )
    assert [int(batches) for _, _, batches in got] == [4, 7]
    for x, m, exact, ours in zip((given.x, given.residual), momenta, want, got, strict=True):
        F.batch_norm(x.double(), *exact, None, None, True, 1 / 4 if m is None else m)
        for g, w in zip(ours[:2], exact, strict=True):
            torch.testing.assert_close(g.double(), w, rtol=1e-6, atol=1e-6)
    assert_bn_statistics(mean, var, given.x)
    assert_bn_statistics(residual_mean, residual_var, given.residual)


def test_either_batchnorm_may_have_no_running_statistics(raw_ops: Any) -> None:
    given = draw((5, 6, 4, 3), torch.float32, torch.contiguous_format)
    arguments = (*given.tensors, EPS, RESIDUAL_EPS)
    want = raw_ops.bn_add_bn_relu_forward(*arguments)
    for prefix in ("", "residual_"):
        moved = {f"{prefix}running_mean": torch.zeros(6), f"{prefix}running_var": torch.ones(6)}
        got = raw_ops.bn_add_bn_relu_forward(*arguments, **moved)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        exact = (given.residual if prefix else given.x).mean((0, 2, 3))
        torch.testing.assert_close(moved[f"{prefix}running_mean"], 0.1 * exact)


def strided(shape: tuple[int, ...], layout: torch.memory_format) -> dict[str, torch.Tensor]:
    n, c, h, w = shape
    other = LAYOUTS[layout is LAYOUTS[0]]
    return {
        "other layout": torch.randn(shape).contiguous(memory_format=other),
        "transposed": torch.randn(n, c, w, h).transpose(2, 3),
        "sliced": torch.randn(n, c + 3, h, w).contiguous(memory_format=layout)[:, 1 : c + 1],
        "cropped": torch.randn(n, c, h + 1, 2 * w).contiguous(memory_format=layout)[:, :, 1:, ::2],
        "one sample": torch.randn(1, c, h, w).contiguous(memory_format=layout).expand(shape),
    }


@layouts
@pytest.mark.parametrize("argument", ["x", "residual", "dy", "dy2"])
@pytest.mark.parametrize("name", sorted(strided((1, 1, 1, 1), torch.contiguous_format)))
def test_any_strides_are_accepted(raw_ops: Any, name: str, argument: str, layout: torch.memory_format) -> None:
    shape = (3, 4, 6, 5)
    t = strided(shape, layout)[name]
    given = draw(shape, torch.float32, layout)
    if argument == "dy2":
        assert_same(run(raw_ops, given, dy2=t), run(raw_ops, replace(given, dy=given.dy + t)))
        return
    given = replace(given, **{argument: t})
    result = run(raw_ops, given)
    assert_close_to_torch(given, result)
    if argument != "x":
        assert all(t.stride() == given.x.stride() for t in (result.y, *result.gradients[:2]))


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (6, 8, 1, 1), (1, 8, 5, 1)])
@layouts
def test_ambiguous_layouts_are_accepted(raw_ops: Any, shape: tuple[int, ...], layout: torch.memory_format) -> None:
    """Tensors that are contiguous in both layouts; x as in one, the residual as in the other."""
    given = draw(shape, torch.float32, layout)
    given.residual = given.residual.contiguous(memory_format=LAYOUTS[layout is LAYOUTS[0]])
    check(raw_ops, given)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (0, 4)])
def test_empty_input_has_zero_gradients(raw_ops: Any, shape: tuple[int, ...], training: bool) -> None:
    """Running statistics do not change; batches are counted."""
    given = draw(shape, torch.float32, torch.contiguous_format)
    result = run(raw_ops, given, None if training else constant_statistics(4, torch.float32))
    assert [t.shape for t in (result.y, *result.gradients[:2])] == [shape] * 3
    assert [t.tolist() for t in result.gradients[2:]] == [[0] * 4] * 3
    assert result.mask.numel() == 0
    moved = [torch.full((4,), 2.0), torch.full((4,), 3.0), torch.tensor(0), 0.1] * 2
    moved = [t.clone() if isinstance(t, torch.Tensor) else t for t in moved]
    raw_ops.bn_add_bn_relu_forward(*given.tensors, EPS, RESIDUAL_EPS, *moved)
    assert [moved[i].tolist() for i in (0, 1, 4, 5)] == [[2] * 4, [3] * 4] * 2
    assert moved[2] == moved[6] == 1


def test_one_value_per_channel_is_refused_in_training(raw_ops: Any) -> None:
    one = draw((1, 4, 1, 1), torch.float32, torch.contiguous_format)
    with pytest.raises((RuntimeError, ValueError), match="Expected more than 1 value per channel"):
        run(raw_ops, one)
    assert run(raw_ops, one, constant_statistics(4, torch.float32)).y.isfinite().all()


@layouts
@pytest.mark.parametrize("weight", [1.0, 0.0])
@pytest.mark.parametrize("place", ["x", "residual"])
def test_nan_passes_the_relu_and_its_gradient(
    raw_ops: Any, place: str, weight: float, layout: torch.memory_format
) -> None:
    """One NaN makes its channel NaN, forward and backward, and no other channel, even if gamma is zero."""
    given = draw((3, 4, 5, 5), torch.float32, layout)
    given.weight = given.residual_weight = torch.full((4,), weight)
    getattr(given, place)[1, 2, 3, 4] = float("nan")
    result = run(raw_ops, given)
    assert result.y[:, 2].isnan().all()
    assert result.gradients[place == "residual"][:, 2].isnan().all()
    others = [0, 1, 3]
    for t in (result.y, *result.gradients[:2]):
        assert t[:, others].isfinite().all()


def test_relu_of_special_values_is_torchs(raw_ops: Any) -> None:
    """Sums NaN, 0, -0, 1 have the gradients 1, 0, 0, 1."""
    x = torch.tensor([float("nan"), 0.0, -0.0, 1.0]).view(4, 1, 1, 1)
    zero, one = torch.zeros(1), torch.ones(1)
    for first, second in ((x, torch.zeros_like(x)), (torch.zeros_like(x), x)):
        y, mask = raw_ops.bn_add_bn_relu_apply(first, second, None, None, None, None, zero, one, zero, one, 0.0, 0.0)
        assert y.isnan().flatten().tolist() == [True, False, False, False]
        assert y.flatten()[1:].tolist() == [0, 0, 1]
        assert mask.tolist() == [0b1001]


@layouts
def test_gradient_mask_is_that_of_y(raw_ops: Any, layout: torch.memory_format) -> None:
    """Half outputs that round to zero pass no gradient: the mask is that of y as it is stored."""
    x, residual = ((torch.randn(8, 5, 9, 9) * 1e-4).half().contiguous(memory_format=layout) for _ in range(2))
    weight, dy = torch.full((5,), 3e-4), torch.ones(8, 5, 9, 9).half().contiguous(memory_format=layout)
    statistics = (torch.zeros(5), torch.ones(5)) * 2
    result = run(raw_ops, Inputs(x, residual, weight, None, weight, None, 4096 * dy), statistics)
    assert 0 < (result.y == 0).float().mean() < 1
    for gradient in result.gradients[:2]:
        assert torch.equal(gradient != 0, result.y > 0)


@layouts
def test_large_means_do_not_cancel(raw_ops: Any, layout: torch.memory_format) -> None:
    """Means of 1e4 with a deviation of 1."""
    given = draw((8, 4, 16, 16), torch.float32, layout)
    given.x += 1e4
    given.residual -= 1e4
    result = run(raw_ops, given)
    exact, *_ = of_torch(given, result.y, None, torch.Tensor.double)
    assert (result.y.double() - exact).abs().max() < 2e-2


@layouts
def test_same_bits_on_every_run_and_thread_count(raw_ops: Any, layout: torch.memory_format) -> None:
    given = draw((6, 24, 15, 15), torch.float32, layout)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(raw_ops, given))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same(result, results[0])
