"""bn_add_relu with pool=True: y and its 2x2 means, values and gradients of both against float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BN_BLOCK_DTYPES,
    BN_POOLED_SHAPES,
    INTERPRETED,
    LAYOUTS,
    allowed,
    assert_bn_close,
    bn_add_gradients,
    bn_affine,
    bn_cases,
    bn_second_shape,
    bn_tensor,
    bn_wide,
    poisoned_memory,
    relative_error,
)
from torch import Tensor, distributed, func

from fasttricks import avgpool_conv1x1, bn_add_relu
from fasttricks.ops.bn_outputs import unpack_mask

EPS = 1e-5
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
dtypes = pytest.mark.parametrize("dtype", BN_BLOCK_DTYPES, ids=str)


def fits(shape: tuple[int, ...], ceil_mode: bool) -> bool:
    """Whether there is a mean: without ceil_mode a single row or column is dropped."""
    return ceil_mode or min(shape[2:]) > 1


# (shape, layout), with ceil_mode
cases = [bn_cases(BN_POOLED_SHAPES), pytest.mark.parametrize("ceil_mode", [False, True], ids=["floor", "ceil"])]


def all_cases(test: Callable[..., None]) -> Callable[..., None]:
    for mark in cases:
        test = mark(test)
    return test


def means(y: Tensor, ceil_mode: bool) -> Tensor:
    return F.avg_pool2d(y, 2, ceil_mode=ceil_mode, count_include_pad=False)


def assert_means(pooled: Tensor, y: Tensor, ceil_mode: bool) -> None:
    """pooled is the mean of y as it is stored, with the dtype and layout of y."""
    want, peer = means(y.double(), ceil_mode), means(y, ceil_mode)
    assert pooled.dtype == y.dtype
    assert pooled.shape == want.shape
    layout = torch.contiguous_format if y.is_contiguous() else torch.channels_last
    assert pooled.is_contiguous(memory_format=layout)
    assert relative_error(pooled, want) <= allowed(relative_error(peer, want), y.dtype)


@dtypes
@all_cases
def test_raw_outputs(
    raw_ops: Any, shape: tuple[int, ...], layout: torch.memory_format, ceil_mode: bool, dtype: torch.dtype
) -> None:
    """All but the means as the op without them, running statistics too."""
    if not fits(shape, ceil_mode):
        return
    x, residual = (bn_tensor(shape, dtype, layout) for _ in range(2))
    affine = bn_affine(shape[1], dtype)
    moved = [[torch.zeros(shape[1]), torch.ones(shape[1]), torch.tensor(3)] for _ in range(2)]
    with poisoned_memory():
        y, pooled, mean, var, mask = raw_ops.bn_add_relu_pool_forward(
            x, residual, *affine, EPS, *moved[0], 0.3, ceil_mode
        )
    plain = raw_ops.bn_add_relu_forward(x, residual, *affine, EPS, *moved[1], 0.3)
    assert_means(pooled, y, ceil_mode)
    assert y.stride() == x.stride()

    def by_torch(to: Callable[[Tensor], Tensor]) -> list[Tensor]:
        z = F.batch_norm(to(x), None, None, *(to(t) for t in affine), True, 0.1, EPS) + to(residual)
        return [F.relu(z)]

    assert_bn_close({"y": y}, by_torch)
    assert torch.equal(unpack_mask(mask, x), ~(y <= 0))
    for got, want in zip((mean, var, *moved[0]), (*plain[1:3], *moved[1]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert moved[0][2] == 4

    with poisoned_memory():
        y, pooled, mask = raw_ops.bn_add_relu_pool_apply(x, residual, *affine, mean, var, EPS, ceil_mode)
    assert_means(pooled, y, ceil_mode)
    assert_bn_close({"y": y}, by_torch)
    assert torch.equal(unpack_mask(mask, x), ~(y <= 0))


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]


@dtypes
@all_cases
def test_gradients_of_both_outputs(
    backend: str, shape: tuple[int, ...], layout: torch.memory_format, ceil_mode: bool, dtype: torch.dtype
) -> None:
    if fits(shape, ceil_mode):
        check_gradients(shape, layout, ceil_mode, dtype)


@pytest.mark.parametrize("of", ["both", "y", "pooled"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@layouts
def test_gradients_of_one_output_and_in_evaluation(
    backend: str, layout: torch.memory_format, training: bool, of: str
) -> None:
    check_gradients((2, 7, 5, 4), layout, True, torch.float32, training, of)


def check_gradients(
    shape: tuple[int, ...], layout: torch.memory_format, ceil_mode: bool, dtype: torch.dtype, training: bool = True,
    of: str = "both",
) -> None:  # fmt: skip
    x, residual, dy = (bn_tensor(shape, dtype, layout) for _ in range(3))
    weight, bias = bn_affine(shape[1], dtype)
    dpooled = bn_tensor(bn_second_shape(shape, "ceil" if ceil_mode else "floor"), dtype, layout)
    wide = bn_wide(dtype)
    running = [torch.randn(shape[1]).to(wide), torch.rand(shape[1]).add(0.3).to(wide)]
    kept = [t.clone() for t in running]

    given = leaves(x, residual, weight, bias)
    with poisoned_memory():
        outputs = bn_add_relu(*given, *running, training=training, pool=True, ceil_mode=ceil_mode)
        chosen = {"both": (0, 1), "y": (0,), "pooled": (1,)}[of]
        grads = torch.autograd.grad([outputs[i] for i in chosen], given, [(dy, dpooled)[i] for i in chosen])
    y, pooled = outputs
    assert_means(pooled, y, ceil_mode)
    assert all(torch.equal(a, b) != training for a, b in zip(running, kept, strict=True))

    total = {"both": lambda: bn_add_gradients(dy, dpooled), "y": lambda: dy}.get(
        of, lambda: bn_add_gradients(torch.zeros_like(dy), dpooled)
    )()

    def by_torch(to: Callable[[Tensor], Tensor]) -> list[Tensor]:
        made = [to(t).requires_grad_() for t in (x, residual, weight, bias)]
        constant = (None, None) if training else tuple(t.to(made[2].dtype) for t in kept)
        z = F.batch_norm(made[0], *constant, made[2], made[3], training, 0.1, EPS) + made[1]
        dz = torch.where(y <= 0, 0, to(total)).to(z.dtype)
        return [F.relu(z), *torch.autograd.grad(z, made, dz)]

    names = ("y", "dx", "dresidual", "dweight", "dbias")
    assert_bn_close(dict(zip(names, [y, *grads], strict=True)), by_torch)


@layouts
@pytest.mark.parametrize("zeros", ["all", "some"])
def test_zero_gamma_is_exact(backend: str, layout: torch.memory_format, zeros: str) -> None:
    x, residual = (bn_tensor((4, 6, 5, 7), torch.float32, layout).requires_grad_() for _ in range(2))
    weight, bias = bn_affine(6, torch.float32)
    gone = torch.ones(6, dtype=torch.bool) if zeros == "all" else torch.arange(6) % 2 == 0
    weight[gone] = 0
    with poisoned_memory():
        y, pooled = bn_add_relu(x, residual, weight, bias, pool=True, ceil_mode=True)
        (dx,) = torch.autograd.grad([y.sum(), pooled.sum()], x)
    assert torch.equal(y[:, gone], F.relu(bias[:, None, None] + residual)[:, gone])
    assert_means(pooled, y, True)
    assert (dx[:, gone] == 0).all()
    assert (dx[:, ~gone] != 0).any() == (zeros == "some")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@layouts
def test_special_values_reach_their_window_alone(backend: str, layout: torch.memory_format, value: float) -> None:
    residual = torch.randn(2, 3, 6, 4).contiguous(memory_format=layout)
    residual[1, 2, 3, 1] = value
    x = torch.randn(2, 3, 6, 4).contiguous(memory_format=layout)
    _, pooled = bn_add_relu(x, residual, pool=True)
    expected = torch.zeros(pooled.shape, dtype=torch.bool)
    expected[1, 2, 1, 0] = True
    assert torch.equal(~pooled.isfinite(), expected)


@layouts
def test_an_empty_batch(backend: str, layout: torch.memory_format) -> None:
    x, residual = (torch.randn(0, 3, 5, 4).contiguous(memory_format=layout).requires_grad_() for _ in range(2))
    weight, mean, var = torch.ones(3, requires_grad=True), torch.full((3,), 2.0), torch.full((3,), 3.0)
    y, pooled = bn_add_relu(x, residual, weight, None, mean, var, pool=True)
    (y.sum() + pooled.sum()).backward()
    assert y.shape == x.grad.shape == residual.grad.shape == (0, 3, 5, 4)
    assert pooled.shape == (0, 3, 2, 2)
    assert weight.grad.tolist() == [0] * 3
    assert mean.tolist() == [2] * 3
    assert var.tolist() == [3] * 3


def test_any_strides_and_dtypes_of_the_inputs(backend: str) -> None:
    """Transposed and sliced tensors, a residual that broadcasts or has another dtype."""
    x = torch.randn(4, 5, 6, 7)
    for a, r in (
        (x.transpose(2, 3), torch.randn(4, 5, 7, 6)),
        (torch.randn(4, 12, 5, 5)[:, ::2], torch.randn(4, 6, 5, 5).contiguous(memory_format=torch.channels_last)),
        (x, torch.randn(5, 1, 1)),
        (x.half(), torch.randn(4, 5, 6, 7)),
    ):
        given, peers = leaves(a, r), leaves(a.double(), r.double())
        y, pooled = bn_add_relu(*given, pool=True, ceil_mode=True)
        assert y.dtype == torch.float32
        exact = F.relu(F.batch_norm(peers[0], None, None, None, None, True) + peers[1])
        assert relative_error(pooled, means(exact, True)) < 1e-5
        dy, dpooled = torch.randn_like(y), torch.randn_like(pooled)
        grads = torch.autograd.grad([y, pooled], given, [dy, dpooled])
        wants = torch.autograd.grad([exact, means(exact, True)], peers, [dy.double(), dpooled.double()])
        for got, want in zip(grads, wants, strict=True):
            assert relative_error(got, want) < (2e-3 if got.dtype == torch.float16 else 1e-4)


@pytest.mark.parametrize("shape", [(3, 3, 5, 5), (2, 5, 9, 3), (1, 24, 14, 14), (5, 1, 7, 7)])
@layouts
def test_same_bits_on_every_thread_count(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    """Threads share bytes of the mask, as the windows of an image row rarely end on one."""
    x, residual = (bn_tensor(shape, torch.float32, layout).requires_grad_() for _ in range(2))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            y, pooled = bn_add_relu(x, residual, pool=True, ceil_mode=True)
            results.append([y, pooled, *torch.autograd.grad(y.sum() + pooled.square().sum(), [x, residual])])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.skipif(INTERPRETED, reason="the CPU kernels")
@layouts
def test_a_large_image_is_pooled_in_several_runs(layout: torch.memory_format) -> None:
    x, residual = (bn_tensor((1, 2, 101, 131), torch.float32, layout) for _ in range(2))
    for ceil_mode in (False, True):
        y, pooled = bn_add_relu(x, residual, pool=True, ceil_mode=ceil_mode)
        assert_means(pooled, y, ceil_mode)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(backend: str, training: bool, ceil_mode: bool) -> None:
    """First and second derivatives; inputs are moved away from the kink of the ReLU."""
    stats = {"running_mean": torch.randn(2).double(), "running_var": torch.rand(2).double() + 0.5}
    x, r = (torch.randn(2, 2, 3, 3).double().requires_grad_() for _ in range(2))
    weight, bias = (torch.rand(2).double().add(0.5).requires_grad_() for _ in range(2))
    with torch.no_grad():
        for _ in range(20):
            z = F.batch_norm(x, *(None, None) if training else stats.values(), weight, bias, training) + r
            if not (near := z.abs() < 1e-2).any():
                break
            r.add_(near * 0.05)

    def f(*given: Tensor) -> tuple[Tensor, Tensor]:
        return bn_add_relu(*given, training=training, momentum=0.0, pool=True, ceil_mode=ceil_mode, **stats)

    assert torch.autograd.gradcheck(f, [x, r, weight, bias], fast_mode=INTERPRETED)
    assert torch.autograd.gradgradcheck(f, [x, r, weight, bias], fast_mode=INTERPRETED)


TRANSFORMS: dict[str, Callable[[Callable, Tensor], Any]] = {
    "grad": lambda f, x: func.grad(lambda t: sum(part.square().sum() for part in f(t)))(x),
    "jvp": lambda f, x: func.jvp(f, (x,), (x.sin(),))[1],
    "vmap": lambda f, x: func.vmap(f)(torch.stack([x, 2 * x.sin()])),
    "functionalize": lambda f, x: func.functionalize(f)(x),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func_equals_unfused(backend: str, name: str, training: bool) -> None:
    x, r = torch.randn(2, 3, 4, 3, 3).double()[:, 0]
    stats = () if training else (torch.randn(4).double(), torch.rand(4).double() + 0.5)
    weight, bias = torch.rand(4).double() + 0.5, torch.randn(4).double()

    def fused(t: Tensor) -> tuple[Tensor, Tensor]:
        return bn_add_relu(t[None], r[None], weight, bias, *stats, training=training, pool=True, ceil_mode=True)

    def unfused(t: Tensor) -> tuple[Tensor, Tensor]:
        z = F.batch_norm(t[None], *(stats or (None, None)), weight, bias, training)
        y = F.relu(z + r)
        return y, means(y, True)

    torch.testing.assert_close(TRANSFORMS[name](fused, x), TRANSFORMS[name](unfused, x), rtol=1e-9, atol=1e-9)


def test_batched_gradients_equal_one_by_one(backend: str) -> None:
    x, r = (torch.randn(2, 3, 4, 5).double().requires_grad_() for _ in range(2))
    y, pooled = bn_add_relu(x, r, pool=True)
    dys, dpooleds = torch.randn(3, *y.shape).double(), torch.randn(3, *pooled.shape).double()
    got = torch.autograd.grad([y, pooled], [x, r], [dys, dpooleds], retain_graph=True, is_grads_batched=True)
    for i in range(3):
        want = torch.autograd.grad([y, pooled], [x, r], [dys[i], dpooleds[i]], retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a[i], b)


@layouts
def test_a_third_reader_of_y(backend: str, layout: torch.memory_format) -> None:
    """y is pooled by another op as well, which hands its gradient over in a call of backward()."""
    x, r = (bn_tensor((2, 4, 5, 6), torch.float64, layout) for _ in range(2))
    weight, kernel = torch.rand(4).double(), torch.randn(3, 4, 1, 1).double()

    def loss(fused: bool, given: list[Tensor]) -> Tensor:
        if fused:
            y, pooled = bn_add_relu(*given[:3], pool=True)
            third = avgpool_conv1x1(y, given[3], ceil_mode=True)
        else:
            y = F.relu(F.batch_norm(given[0], None, None, given[2], None, True) + given[1])
            pooled, third = means(y, False), F.conv2d(means(y, True), given[3])
        return y.square().sum() + pooled.pow(3).sum() + third.cos().sum()

    results = []
    for fused in (True, False):
        given = leaves(x, r, weight, kernel)
        loss(fused, given).backward()
        results.append([t.grad for t in given])
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 1e-12


def test_only_inputs_and_bits_are_saved_for_backward() -> None:
    x, r = (torch.randn(4, 8, 16, 16, requires_grad=True) for _ in range(2))
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        bn_add_relu(x, r, torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True), pool=True)
    big = [(t.dtype, t.numel()) for t in saved if t.numel() > 8 and t.data_ptr() != x.data_ptr()]
    assert big == [(torch.uint8, x.numel() // 8)]


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_full_graph_compile_equals_eager(ceil_mode: bool) -> None:
    x, r = (torch.randn(2, 3, 5, 6) for _ in range(2))

    def f(*given: Tensor) -> tuple[Tensor, Tensor]:
        y, pooled = bn_add_relu(*given, pool=True, ceil_mode=ceil_mode)
        return y.square(), pooled + 1

    results = []
    for call in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        given = leaves(x, r)
        y, pooled = call(*given)
        results.append([y, pooled, *torch.autograd.grad([y.sum(), pooled.cos().sum()], given)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_no_grad_and_autocast(backend: str) -> None:
    """The same bits without a gradient; under autocast the dtype of x stays."""
    x, r = torch.randn(2, 2, 3, 4, 4)
    want = bn_add_relu(x.requires_grad_(), r, pool=True)
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            got = bn_add_relu(x, r, pool=True)
        assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(got, want, strict=True))


def test_statistics_of_a_process_group(tmp_path: Path) -> None:
    """y by the op across processes, here of one, and the means of it; in evaluation the group plays no role."""
    x, r, weight = torch.randn(3, 4, 5, 4), torch.randn(3, 4, 5, 4), torch.rand(4) + 0.5
    dy, dpooled = torch.randn_like(x), torch.randn(3, 4, 3, 2)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        for training in (True, False):
            results = []
            for group in (None, distributed.group.WORLD):
                given, running = leaves(x, r, weight), [torch.zeros(4), torch.ones(4)]
                options = {"training": training, "group": group, "pool": True, "ceil_mode": True}
                outputs = bn_add_relu(*given, None, *running, **options)
                results.append([*outputs, *torch.autograd.grad(outputs, given, [dy, dpooled]), *running])
            for got, want in zip(*results, strict=True):
                torch.testing.assert_close(got, want)
    finally:
        distributed.destroy_process_group()
