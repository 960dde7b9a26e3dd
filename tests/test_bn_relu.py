"""bn_relu and bn_add_relu: values and gradients against float64, layouts, statistics, special values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BN_SHAPES,
    DTYPES,
    INTERPRETED,
    assert_bn_close,
    bn_affine,
    bn_cases,
    bn_layouts,
    bn_tensor,
    poisoned_memory,
    relative_error,
)

import fasttricks
from fasttricks import bn_add_relu, bn_relu


@dataclass
class Inputs:
    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    dy: torch.Tensor

    def leaves(self, to: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> list[torch.Tensor | None]:
        made = (self.x, self.residual, self.weight, self.bias)
        return [None if t is None else to(t.detach()).requires_grad_() for t in made]


def inputs(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, residual: bool, half_weights: bool = False
) -> Inputs:
    def dense() -> torch.Tensor:
        return bn_tensor(shape, dtype, layout)

    weight, bias = bn_affine(shape[1], dtype)
    if half_weights:
        weight, bias = weight.to(dtype), bias.to(dtype)
    return Inputs(dense(), dense() if residual else None, weight, bias, dense())


def ours(given: Inputs, **rest: object) -> tuple[torch.Tensor, list[torch.Tensor]]:
    x, residual, weight, bias = given.leaves()
    y = bn_relu(x, weight, bias, **rest) if residual is None else bn_add_relu(x, residual, weight, bias, **rest)
    return y, list(torch.autograd.grad(y, [t for t in (x, residual, weight, bias) if t is not None], given.dy))


def unfused(
    given: Inputs, y: torch.Tensor, to: Callable[[torch.Tensor], torch.Tensor], stats: tuple | None = None,
    eps: float = 1e-5,
) -> list[torch.Tensor]:  # fmt: skip
    """y and the gradients by torch's ops on inputs mapped by `to`, with the ReLU mask of y."""
    x, residual, weight, bias = given.leaves(to)
    mean, var = (None, None) if stats is None else (s.to(weight.dtype) if weight is not None else s for s in stats)
    z = F.batch_norm(x, mean, var, weight, bias, stats is None, 0.1, eps)
    z = z if residual is None else z + residual
    dz = torch.where(y <= 0, 0, to(given.dy)).to(z.dtype)
    return [F.relu(z), *torch.autograd.grad(z, [t for t in (x, residual, weight, bias) if t is not None], dz)]


def assert_close_to_torch(
    given: Inputs, y: torch.Tensor, grads: list[torch.Tensor], stats: tuple | None = None, eps: float = 1e-5
) -> None:
    names = [name for name in ("x", "residual", "weight", "bias") if getattr(given, name) is not None]
    results = {"y": y, **{f"d{name}": grad for name, grad in zip(names, grads, strict=True)}}
    assert_bn_close(results, lambda to: unfused(given, y, to, stats, eps))


def check(given: Inputs, **rest: object) -> None:
    y, grads = ours(given, **rest)
    stats = None if rest.get("training", True) else (rest["running_mean"], rest["running_var"])
    assert_close_to_torch(given, y, grads, stats, rest.get("eps", 1e-5))
    assert y.dtype == given.x.dtype
    assert y.stride() == given.x.stride()
    assert grads[0].stride() == given.x.stride()


@pytest.mark.parametrize("residual", [False, True], ids=["relu", "add_relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@bn_cases(BN_SHAPES)
def test_values_and_gradients(
    backend: str, shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, residual: bool
) -> None:
    with poisoned_memory():
        check(inputs(shape, layout, dtype, residual))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["relu", "add_relu"])
@pytest.mark.parametrize("layout", bn_layouts((0, 0, 0, 0)), ids=["nchw", "nhwc"])
def test_evaluation_uses_constant_statistics(
    backend: str, layout: torch.memory_format, dtype: torch.dtype, residual: bool
) -> None:
    """dx has no terms of the batch, dweight and dbias use the running statistics, a second call gives the same."""
    given = inputs((3, 7, 5, 6), layout, dtype, residual)
    wide = given.weight.dtype
    stats = {"running_mean": torch.randn(7).to(wide), "running_var": torch.rand(7).add(0.3).to(wide)}
    before = {k: v.clone() for k, v in stats.items()}
    check(given, training=False, eps=1e-3, **stats)
    check(given, training=False, eps=1e-3, **stats)
    for name, value in stats.items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_parameters_and_running_statistics(backend: str, dtype: torch.dtype) -> None:
    """As after model.half(): y, gradients and running statistics are half, too."""
    given = inputs((4, 6, 5, 5), torch.contiguous_format, dtype, True, half_weights=True)
    mean, var = torch.zeros(6, dtype=dtype), torch.ones(6, dtype=dtype)
    y, grads = ours(given, running_mean=mean, running_var=var)
    for got, want in zip([y, *grads], unfused(given, y, torch.Tensor.double), strict=True):
        assert got.dtype == dtype
        assert relative_error(got, want) < 2 * torch.finfo(dtype).eps
    assert mean.dtype == var.dtype == dtype
    assert relative_error(mean, 0.1 * given.x.double().mean((0, 2, 3))) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(4, 6, 7, 9), (9, 5, 1, 1)])
def test_without_weight_or_bias(backend: str, weight: bool, bias: bool, shape: tuple[int, ...]) -> None:
    given = inputs(shape, torch.contiguous_format, torch.float32, True)
    given.weight, given.bias = given.weight if weight else None, given.bias if bias else None
    check(given)


@pytest.mark.parametrize("layout", bn_layouts((0, 0, 0, 0)), ids=["nchw", "nhwc"])
@pytest.mark.parametrize("residual", [False, True], ids=["relu", "add_relu"])
@pytest.mark.parametrize("zeros", ["all", "some"])
def test_zero_gamma_is_exact(backend: str, layout: torch.memory_format, residual: bool, zeros: str) -> None:
    """y = relu(bias + residual), dx is exactly zero, dweight is not."""
    given = inputs((4, 6, 5, 7), layout, torch.float32, residual)
    gone = torch.ones(6, dtype=torch.bool) if zeros == "all" else torch.arange(6) % 2 == 0
    given.weight[gone] = 0
    given.bias[gone] += 1  # else y may be zero in a whole channel
    with poisoned_memory():
        check(given)
        y, grads = ours(given)
    shifted = given.bias[:, None, None].expand_as(given.x)
    want = F.relu(shifted if given.residual is None else shifted + given.residual)
    assert torch.equal(y[:, gone], want[:, gone])
    assert (grads[0][:, gone] == 0).all()
    assert (grads[-2][gone] != 0).any()  # dweight: training can leave zero


def test_zero_preactivations_have_zero_gradients(backend: str) -> None:
    """gamma = beta = residual = 0: the gradient of the ReLU at zero is zero."""
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    weight, bias = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    y = bn_add_relu(x, torch.zeros_like(x), weight, bias)
    assert (y == 0).all()
    for g in torch.autograd.grad(y.sum(), [x, weight, bias]):
        assert (g == 0).all()


def test_negative_gamma_keeps_its_sign(backend: str) -> None:
    """The example of inplace_abn issue 92, which used the absolute value of gamma."""
    stats = {"running_mean": torch.tensor([13.97]), "running_var": torch.tensor([313.7588])}
    y = bn_relu(
        torch.full((1, 1, 1, 1), -9.333), torch.tensor([-0.0059]), torch.tensor([0.1408]), training=False, **stats
    )
    torch.testing.assert_close(y.item(), 0.148562, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", bn_layouts((0, 0, 0, 0)), ids=["nchw", "nhwc"])
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_nan_passes_the_relu_and_its_gradient(backend: str, layout: torch.memory_format, weight: float) -> None:
    """One NaN makes its channel NaN, forward and backward, and no other channel, even if gamma is zero."""
    x = torch.randn(3, 4, 5, 5).contiguous(memory_format=layout)
    x[1, 2, 3, 4] = float("nan")
    x.requires_grad_()
    y = bn_relu(x, torch.full((4,), weight), torch.ones(4))
    y.sum().backward()
    assert y[:, 2].isnan().all()
    assert x.grad[:, 2].isnan().all()
    others = [0, 1, 3]
    assert y[:, others].isfinite().all()
    assert x.grad[:, others].isfinite().all()


def test_relu_of_special_values_is_torchs(backend: str) -> None:
    """Values NaN, 0, -0, 1 have the gradients 1, 0, 0, 1."""
    x = torch.tensor([float("nan"), 0.0, -0.0, 1.0]).view(4, 1, 1, 1).requires_grad_()
    for residual in (None, torch.zeros(4, 1, 1, 1)):
        rest = {"running_mean": torch.zeros(1), "running_var": torch.ones(1), "training": False, "eps": 0.0}
        y = bn_relu(x, **rest) if residual is None else bn_add_relu(x, residual, **rest)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert y.isnan().flatten().tolist() == [True, False, False, False]
        assert y.flatten()[1:].tolist() == [0, 0, 1]
        assert grad.flatten().tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("layout", bn_layouts((0, 0, 0, 0)), ids=["nchw", "nhwc"])
def test_gradient_mask_is_that_of_y(backend: str, layout: torch.memory_format) -> None:
    """Half outputs that round to zero pass no gradient: the mask is that of y as it is stored."""
    x = (torch.randn(8, 5, 9, 9) * 1e-4).half().contiguous(memory_format=layout).requires_grad_()
    stats = {"running_mean": torch.zeros(5), "running_var": torch.ones(5), "training": False}
    weight = torch.full((5,), 3e-4)
    for y in (bn_relu(x, weight, **stats), bn_add_relu(x, torch.zeros_like(x), weight, **stats)):
        dy = torch.ones_like(y)
        (grad,) = torch.autograd.grad(y, x, dy * 4096)
        assert 0 < (y == 0).float().mean() < 1
        assert torch.equal(grad != 0, y > 0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (0, 4)])
@pytest.mark.parametrize("residual", [False, True], ids=["relu", "add_relu"])
def test_empty_input_has_zero_gradients(backend: str, training: bool, shape: tuple[int, ...], residual: bool) -> None:
    """Outputs are empty, gradients of the parameters zero, running statistics unchanged."""
    given = inputs(shape, torch.contiguous_format, torch.float32, residual)
    stats = {"running_mean": torch.full((4,), 2.0), "running_var": torch.full((4,), 3.0)}
    y, grads = ours(given, training=training, **stats)
    assert y.shape == shape
    assert grads[0].shape == shape
    assert grads[-1].tolist() == grads[-2].tolist() == [0, 0, 0, 0]
    assert stats["running_mean"].tolist() == [2] * 4
    assert stats["running_var"].tolist() == [3] * 4


def test_one_value_per_channel_is_refused_in_training(backend: str) -> None:
    """It is accepted in evaluation; two values suffice in training."""
    with pytest.raises(ValueError, match=r"x has shape \(1, 4, 1, 1\): Expected more than 1 value per channel"):
        bn_relu(torch.randn(1, 4, 1, 1))
    for shape in ((1, 4, 1, 2), (2, 4, 1, 1)):
        x = torch.randn(shape)
        # two close values differ from their rounded mean in few digits
        assert relative_error(bn_relu(x), F.relu(F.batch_norm(x.double(), None, None, None, None, True))) < 1e-3
    y = bn_relu(torch.randn(1, 4, 1, 1), running_mean=torch.zeros(4), running_var=torch.ones(4), training=False)
    assert y.isfinite().all()


@pytest.mark.parametrize("layout", bn_layouts((0, 0, 0, 0)), ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_mean_and_small_deviation_are_exact(
    backend: str, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    """E[x^2] - E[x]^2 would cancel: mean 5, deviation 0.1 in half."""
    x = (5 + 0.1 * torch.randn(2, 64, 32, 32)).to(dtype).contiguous(memory_format=layout)
    y = bn_relu(x, bias=torch.full((64,), 20.0))
    want = F.batch_norm(x.double(), None, None, None, None, True) + 20
    assert relative_error(y, want) < torch.finfo(dtype).eps
    assert abs((y.double() - 20).std().item() - 1) < (0.002 if dtype == torch.float16 else 0.02)


@pytest.mark.parametrize("layout", bn_layouts((0, 0, 0, 0)), ids=["nchw", "nhwc"])
def test_large_means_and_constant_channels_do_not_cancel(backend: str, layout: torch.memory_format) -> None:
    """A mean of 1e4 with a deviation of 1; channels with a single value."""
    x = (torch.randn(8, 4, 16, 16) + 1e4).contiguous(memory_format=layout)
    want = F.relu(F.batch_norm(x.double(), None, None, None, None, True))
    assert (bn_relu(x).double() - want).abs().max() < 1e-2
    y = bn_relu(torch.full((1, 1, 3, 3), 100.0).contiguous(memory_format=layout))
    assert y.abs().max() < 1e-3


def test_half_inputs_do_not_overflow_the_sums(backend: str) -> None:
    """A sum of squares of 2.4e10, a running variance of 1e6 and a count beyond 65504 are not rounded to half."""
    sign = torch.where(torch.rand(64, 1, 64, 64) < 0.5, -1.0, 1.0)
    sign.view(-1)[: sign.numel() // 2], sign.view(-1)[sign.numel() // 2 :] = 1.0, -1.0
    mean, var = torch.zeros(1), torch.ones(1)
    y = bn_relu((300 * sign).half(), running_mean=mean, running_var=var)
    assert (y - F.relu(sign)).abs().max() < 1e-3
    torch.testing.assert_close(var.item(), 9000.0 * 262144 / 262143 + 0.9, rtol=1e-5, atol=0)
    x = torch.full((1, 1, 1, 1), 2.0).half()
    stats = {"running_mean": torch.zeros(1), "running_var": torch.tensor([1e6]), "training": False}
    assert bn_relu(x, torch.tensor([1000.0]), **stats).item() == 2.0


@pytest.mark.parametrize("channels", [1, 3, 7, 65, 96, 127, 2049])
@pytest.mark.parametrize("size", [1, 7, 10, 40])
def test_nhwc_with_any_channel_count(channels: int, size: int) -> None:
    n = 2 if channels * size * size > 1e6 else 4
    check(inputs((n, channels, size, size), torch.channels_last, torch.float32, False))


@pytest.mark.parametrize(
    "make",
    [
        lambda y, z: y.sum(),
        lambda y, z: (torch.cat([y, z], 1) * torch.arange(1.0, y.shape[1] + z.shape[1] + 1)[:, None, None]).sum(),
        lambda y, z: (y.transpose(2, 3) * torch.arange(1.0, y.shape[2] + 1)).sum(),
        lambda y, z: (y[:, ::2] * 3).sum() + y[:, 1].square().sum(),
    ],
    ids=["stride 0", "cat", "transposed", "sliced"],
)
@pytest.mark.parametrize("layout", bn_layouts((0, 0, 0, 0)), ids=["nchw", "nhwc"])
@pytest.mark.parametrize("residual", [False, True], ids=["relu", "add_relu"])
def test_any_strides_of_dy_are_accepted(
    backend: str, make: object, layout: torch.memory_format, residual: bool
) -> None:
    """dy expanded, from a concatenation, transposed or sliced; dx keeps the layout of x."""
    given = inputs((2, 6, 5, 4), layout, torch.float32, residual)
    other = torch.randn(2, 3, 5, 4)
    results = []
    for fused in (True, False):
        x, r, weight, bias = given.leaves(torch.clone if fused else torch.Tensor.double)
        if fused:
            y = bn_relu(x, weight, bias) if r is None else bn_add_relu(x, r, weight, bias)
        else:
            z = F.batch_norm(x, None, None, weight, bias, True)
            y = F.relu(z if r is None else z + r)
        leaves = [t for t in (x, r, weight, bias) if t is not None]
        results.append(torch.autograd.grad(make(y, other.to(y.dtype)), leaves))
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 1e-5
    assert results[0][0].stride() == given.x.stride()


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (6, 8, 1, 1), (1, 8, 5, 1)])
@pytest.mark.parametrize("layout", bn_layouts((0, 0, 0, 0)), ids=["nchw", "nhwc"])
def test_ambiguous_layouts_are_accepted(backend: str, shape: tuple[int, ...], layout: torch.memory_format) -> None:
    """Tensors that are contiguous in both layouts, as x and as residual."""
    given = inputs(shape, layout, torch.float32, True)
    given.residual = given.residual.contiguous(memory_format=torch.channels_last)
    check(given)


def test_two_values_per_channel(backend: str) -> None:
    """dx cancels: its error is relative to the largest term, weight / sqrt(var + eps) * dy."""
    given = inputs((2, 8, 1, 1), torch.contiguous_format, torch.float32, True)
    y, grads = ours(given)
    exact, *exact_grads = unfused(given, y, torch.Tensor.double)
    assert relative_error(y, exact) < 1e-5
    scale = (given.weight.abs() * (given.x.double().var((0, 2, 3), correction=0) + 1e-5).rsqrt()).max()
    for got, want in zip(grads, exact_grads, strict=True):
        assert (got - want).norm() < 1e-5 * max(given.dy.norm() * max(scale, 1), want.norm())


@pytest.mark.parametrize("residual", [False, True], ids=["relu", "add_relu"])
def test_any_strides_of_x_are_accepted(backend: str, residual: bool) -> None:
    for x in (torch.randn(4, 5, 6, 7).transpose(2, 3), torch.randn(4, 12, 5, 5)[:, ::2], torch.randn(6, 5, 4, 4)[::2]):
        given = Inputs(
            x, torch.randn(x.shape) if residual else None, torch.randn(x.shape[1]), None, torch.randn(x.shape)
        )
        assert_close_to_torch(given, *ours(given))


def test_same_bits_on_every_run_and_thread_count() -> None:
    given = inputs((8, 24, 14, 14), torch.channels_last, torch.float32, True)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            y, grads = ours(given)
            results.append([y, *grads])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
@pytest.mark.parametrize("layout", bn_layouts((0, 0, 0, 0)), ids=["nchw", "nhwc"])
def test_running_statistics_equal_torch(backend: str, momentum: float, layout: torch.memory_format) -> None:
    x = (torch.randn(5, 6, 4, 3) * 3 + 7).contiguous(memory_format=layout)
    got = [torch.randn(6), torch.rand(6)]
    want = [t.double() for t in got]
    before = [t.clone() for t in got]
    bn_relu(x, running_mean=got[0], running_var=got[1], momentum=momentum)
    F.batch_norm(x.double(), *want, None, None, True, momentum)
    for g, w, b in zip(got, want, before, strict=True):
        assert relative_error(g, w) < 1e-6
        assert momentum != 0 or torch.equal(g, b)


def test_running_variance_far_below_eps_is_kept() -> None:
    """The op saves var, not 1 / sqrt(var + eps): a variance of 1e-8 keeps all digits under an eps of 1e-5."""
    x = 1e-4 * torch.randn(16, 3, 8, 8)
    var = torch.zeros(3)
    bn_relu(x, running_mean=torch.zeros(3), running_var=var, momentum=1.0)
    assert relative_error(var, x.double().var((0, 2, 3))) < 1e-6


def test_raw_update_of_running_statistics(raw_ops: Any) -> None:
    """A count of 1 keeps the biased variance, a count of 0 changes nothing; strided tensors are updated in place."""
    update = raw_ops.bn_update_stats_
    mean, var, one = torch.zeros(6)[::2], torch.ones(6)[::2], torch.ones(3)
    update(mean, var, one, one, torch.tensor(1.0, dtype=torch.float64), None, 0.5)
    assert mean.tolist() == [0.5] * 3
    assert var.tolist() == [1.0] * 3
    update(mean, var, one * 9, one * 9, torch.tensor(0.0, dtype=torch.float64), None, 0.5)
    assert mean.tolist() == [0.5] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_raw_update_from_half_statistics_is_float32(raw_ops: Any, dtype: torch.dtype) -> None:
    mean, var, batch = torch.zeros(3), torch.ones(3), torch.ones(3, dtype=dtype)
    raw_ops.bn_update_stats_(mean, var, batch, 3 * batch, torch.tensor(7.0, dtype=torch.float64), None, 0.3)
    torch.testing.assert_close(mean, torch.full_like(mean, 0.3))
    torch.testing.assert_close(var, torch.full_like(var, 0.7 + 0.3 * 3.5))


def test_negative_variance_gives_nan_as_in_torch(backend: str) -> None:
    x, zeros, ones = torch.randn(2, 3, 4, 4), torch.zeros(3), torch.ones(3)
    y = bn_relu(x, running_mean=zeros, running_var=-ones, training=False)
    assert y.isnan().all()
    assert torch.batch_norm(x, None, None, zeros, -ones, False, 0.1, 1e-5, False).isnan().all()


@pytest.mark.parametrize("residual", [False, True], ids=["relu", "add_relu"])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(backend: str, residual: bool, training: bool) -> None:
    """First and second derivatives; inputs are moved away from the kink of the ReLU."""
    stats = {"running_mean": torch.randn(3).double(), "running_var": torch.rand(3).double() + 0.5}
    x, r = (torch.randn(3, 3, 2, 2).double().requires_grad_() for _ in range(2))
    weight, bias = (torch.rand(3).double().add(0.5).requires_grad_() for _ in range(2))
    leaves = [x, r, weight, bias] if residual else [x, weight, bias]
    with torch.no_grad():
        for _ in range(20):
            z = F.batch_norm(x, *(None, None) if training else stats.values(), weight, bias, training)
            z = z + r if residual else z
            near = z.abs() < 1e-2
            if not near.any():
                break
            (r if residual else x).add_(near * 0.05)

    def f(*given: torch.Tensor) -> torch.Tensor:
        rest = {"training": training, "momentum": 0.0, **stats}
        return bn_add_relu(*given, **rest) if residual else bn_relu(*given, **rest)

    assert torch.autograd.gradcheck(f, leaves, fast_mode=INTERPRETED)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=INTERPRETED)


def test_frozen_inputs_get_no_gradient(backend: str) -> None:
    """A frozen weight, and an x that does not require grad, as in a first layer."""
    x, weight, bias = torch.randn(2, 3, 4, 4), torch.ones(3), torch.zeros(3, requires_grad=True)
    bn_relu(x, weight, bias).sum().backward()
    assert weight.grad is None
    assert x.grad is None
    assert bias.grad is not None
    r = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = bn_add_relu(x, r, weight, bias)
    y.sum().backward()
    assert torch.equal(r.grad, (y > 0).float())


def test_only_x_channels_and_bits_are_saved_for_backward() -> None:
    """Neither the normalised x nor the pre-activation is saved; with a residual one bit per element is."""
    x, r = torch.randn(4, 8, 16, 16, requires_grad=True), torch.randn(4, 8, 16, 16, requires_grad=True)
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    for residual in (False, True):
        saved: list[torch.Tensor] = []

        def pack(t: torch.Tensor, saved: list[torch.Tensor] = saved) -> torch.Tensor:
            saved.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            bn_add_relu(x, r, weight, bias) if residual else bn_relu(x, weight, bias)
        big = [t for t in saved if t.numel() > 8]
        assert sum(t.data_ptr() == x.data_ptr() for t in big) == 1
        rest = [t for t in big if t.data_ptr() != x.data_ptr()]
        assert [(t.dtype, t.numel()) for t in rest] == ([(torch.uint8, x.numel() // 8)] if residual else [])


def test_no_grad_and_inference_mode_give_the_same_bits(backend: str) -> None:
    x = torch.randn(2, 3, 4, 4)
    want = bn_relu(x)
    with torch.no_grad():
        assert torch.equal(bn_relu(x), want)
    with torch.inference_mode():
        assert torch.equal(bn_relu(x), want)


def test_autocast_keeps_dtypes(backend: str) -> None:
    """Under autocast y has the dtype of x, whatever that of the weights."""
    x = torch.randn(2, 3, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert bn_relu(x, torch.ones(3), torch.zeros(3)).dtype == torch.bfloat16
        assert bn_relu(x.float(), torch.ones(3), torch.zeros(3)).dtype == torch.float32


def test_info_names_the_backend() -> None:
    assert fasttricks.info()["backend"]["cpu"] == "cpu"
