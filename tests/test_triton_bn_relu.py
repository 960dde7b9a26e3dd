"""bn_relu and bn_add_relu in Triton: values against float64, bytes, determinism, offsets.

Without a GPU the kernels need TRITON_INTERPRET=1, set before the process starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS, assert_bn_close, assert_bn_statistics, poisoned_memory, relative_error, triton_device
from triton_meter import metered

DEVICE = triton_device()

from fasttricks.kernels import bn_relu as implementation  # noqa: E402
from fasttricks.kernels import launch as launching  # noqa: E402
from fasttricks.ops.bn_relu import unpack_mask  # noqa: E402

ops = torch.ops.fasttricks_triton
EPS = 1e-5
# planes and channels that are multiples of 8 or not, several tiles; for other shapes see test_bn_relu.py
SHAPES = ((2, 3, 5, 7), (4, 8, 4, 4), (5, 16, 12, 16))


def tensors(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> dict[str, torch.Tensor]:
    def activation() -> torch.Tensor:
        return (torch.randn(shape) * 1.5 + 0.7).to(dtype).to(DEVICE).contiguous(memory_format=layout)

    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (torch.randn(shape[1], dtype=parameter, device=DEVICE) for _ in range(2))
    return {"x": activation(), "residual": activation(), "dy": activation(), "weight": weight, "bias": bias}


def composition(
    t: dict[str, torch.Tensor], to: Callable[[torch.Tensor], torch.Tensor], residual: bool, training: bool,
    mask: torch.Tensor | None,
) -> list[torch.Tensor]:  # fmt: skip
    """y and all gradients by torch's ops on inputs mapped by `to`; mask: that of the ReLU, None: computed."""
    x, r, w, b = (to(t[k]).requires_grad_() for k in ("x", "residual", "weight", "bias"))
    mean, var = to(t["running_mean"]), to(t["running_var"])
    z = F.batch_norm(x, None if training else mean, None if training else var, w, b, training, 0.0, EPS)
    if residual:
        z = z + r
    y = F.relu(z) if mask is None else z * mask
    grads = torch.autograd.grad(y, [x, w, b, *([r] if residual else [])], to(t["dy"]))
    return [y.detach(), *grads]


def assert_close_to_torch(
    t: dict[str, torch.Tensor], y: torch.Tensor, gradients: Sequence[torch.Tensor], residual: bool, training: bool
) -> None:
    dx, dresidual, dweight, dbias = gradients
    results = {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias, **({"dresidual": dresidual} if residual else {})}
    assert_bn_close(results, lambda to: composition(t, to, residual, training, ~(y <= 0)))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["bn_relu", "bn_add_relu"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, residual: bool, training: bool
) -> None:
    t = tensors(shape, dtype, layout)
    t["running_mean"], t["running_var"] = torch.randn_like(t["weight"]), torch.rand_like(t["weight"]) + 0.5
    parameters = t["weight"], t["bias"]
    extra = (t["residual"],) if residual else ()
    mask = None
    with poisoned_memory():
        if training:
            forward = ops.bn_add_relu_forward if residual else ops.bn_relu_forward
            y, mean, var, *rest = forward(t["x"], *extra, *parameters, EPS)
        else:
            mean, var = t["running_mean"], t["running_var"]
            apply = ops.bn_add_relu_apply if residual else ops.bn_relu_apply
            out = apply(t["x"], *extra, *parameters, mean, var, EPS)
            y, *rest = out if residual else (out,)
        mask = rest[0] if residual else None
        gradients = ops.bn_relu_backward(t["dy"], t["x"], mask, *parameters, mean, var, EPS, training, residual)
    if mask is not None:
        assert torch.equal(unpack_mask(mask, y), ~(y <= 0)), "the saved mask is that of y"
    assert y.stride() == t["x"].stride()
    assert gradients[0].stride() == t["x"].stride()
    assert_close_to_torch(t, y, gradients, residual, training)
    if training:
        assert_bn_statistics(mean, var, t["x"])


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_statistics_far_from_zero_are_exact(layout: torch.memory_format) -> None:
    x = (torch.randn(8, 4, 16, 16, device=DEVICE) + 1e4).contiguous(memory_format=layout)
    y, _, var = ops.bn_relu_forward(x, None, None, EPS)
    assert relative_error(var.cpu(), x.double().var((0, 2, 3), unbiased=False).cpu()) < 1e-4
    exact = F.relu(F.batch_norm(x.double(), None, None, training=True, eps=EPS))
    assert (y - exact).abs().max() < 1e-2
    constant = torch.full((1, 1, 3, 3), 100.0, device=DEVICE)
    assert ops.bn_relu_forward(constant, None, None, EPS)[0].abs().max() < 1e-3


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_nan_passes_and_stays_in_its_channel(layout: torch.memory_format) -> None:
    x = torch.randn(2, 3, 4, 4, device=DEVICE).contiguous(memory_format=layout)
    x[1, 1, 2, 2] = math.nan
    for weight in (torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE)):
        y, mean, var, mask = ops.bn_add_relu_forward(x, torch.ones_like(x), weight, None, EPS)
        assert y[:, 1].isnan().all()
        assert y[:, ::2].isfinite().all()
        assert unpack_mask(mask, y)[:, 1].all()
        dx, *_ = ops.bn_relu_backward(torch.ones_like(x), x, mask, weight, None, mean, var, EPS, True, True)
        assert dx[:, 1].isnan().all()
    eval_y = ops.bn_relu_apply(
        x, torch.zeros(3, device=DEVICE), None, torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE), EPS
    )
    assert eval_y.isnan().sum() == 1, "with given statistics only the element itself is NaN"


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_zero_weight_is_exact(layout: torch.memory_format) -> None:
    t = tensors((3, 8, 4, 4), torch.float32, layout)
    zero = torch.zeros(8, device=DEVICE)
    y, mean, var, mask = ops.bn_add_relu_forward(t["x"], t["residual"], zero, None, EPS)
    assert torch.equal(y, t["residual"].relu())
    dx, dr, dw, _ = ops.bn_relu_backward(t["dy"], t["x"], mask, zero, None, mean, var, EPS, True, True)
    assert (dx == 0).all()
    assert torch.equal(dr, t["dy"] * (t["residual"] > 0))
    xhat = F.batch_norm(t["x"].double(), None, None, training=True, eps=EPS)
    assert relative_error(dw.cpu(), (dr * xhat).sum((0, 2, 3)).cpu()) < 1e-5
    y, mean, var = ops.bn_relu_forward(t["x"], zero, None, EPS)
    dx, _, dw, db = ops.bn_relu_backward(t["dy"], t["x"], None, zero, None, mean, var, EPS, True, False)
    assert all((o == 0).all() for o in (y, dx, dw, db))


def test_any_strides_of_dy_are_accepted() -> None:
    x = torch.randn(2, 8, 4, 4, device=DEVICE)
    mean, var = ops.bn_stats(x)
    dy = torch.randn_like(x)
    want = ops.bn_relu_backward(dy, x, None, None, None, mean, var, EPS, True, False)
    wide = torch.cat([dy, dy], 1)[:, :8]
    for strided in (wide, dy.contiguous(memory_format=torch.channels_last), dy.mT.contiguous().mT):
        got = ops.bn_relu_backward(strided, x, None, None, None, mean, var, EPS, True, False)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    ones = torch.ones((), device=DEVICE).expand(x.shape)
    got = ops.bn_relu_backward(ones, x, None, None, None, mean, var, EPS, True, False)
    want = ops.bn_relu_backward(torch.ones_like(x), x, None, None, None, mean, var, EPS, True, False)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_empty_input_has_zero_gradients() -> None:
    for shape in ((0, 4, 3, 3), (2, 4, 0, 3)):
        x = torch.ones(shape, device=DEVICE)
        y, mean, var, mask = ops.bn_add_relu_forward(x, x, None, None, EPS)
        assert y.shape == x.shape
        assert mask.numel() == 0
        dx, dr, dw, db = ops.bn_relu_backward(x, x, mask, None, None, mean, var, EPS, True, True)
        assert dx.shape == dr.shape == x.shape
        assert torch.equal(dw, torch.zeros_like(dw))
        assert torch.equal(db, torch.zeros_like(db))
        running = torch.rand(4, device=DEVICE), torch.rand(4, device=DEVICE)
        before = [r.clone() for r in running]
        ops.bn_update_stats_(*running, mean, var, torch.zeros((), dtype=torch.float64, device=DEVICE))
        assert all(torch.equal(a, b) for a, b in zip(running, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_running_statistics_equal_torch(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 2, 2, dtype=dtype, device=DEVICE)
    running_mean, running_var = torch.rand(5, dtype=dtype, device=DEVICE), torch.rand(5, dtype=dtype, device=DEVICE)
    want_mean, want_var = running_mean.clone(), running_var.clone()
    F.batch_norm(x, want_mean, want_var, training=True, momentum=0.3)
    count = torch.tensor(12.0, dtype=torch.float64, device=DEVICE)
    ops.bn_update_stats_(running_mean, running_var, *ops.bn_stats(x), count, None, 0.3)
    torch.testing.assert_close(running_mean, want_mean)
    torch.testing.assert_close(running_var, want_var)


def test_synchronised_backward_in_halves_equals_the_whole() -> None:
    t = tensors((4, 6, 3, 3), torch.float32, torch.contiguous_format)
    _, mean, var, mask = ops.bn_add_relu_forward(t["x"], t["residual"], t["weight"], t["bias"], EPS)
    arguments = t["dy"], t["x"], mask, t["weight"], t["bias"], mean, var, EPS
    dx, dr, dw, db = ops.bn_relu_backward(*arguments, True, True)
    sums = ops.bn_relu_backward_reduce(*arguments)
    assert torch.equal(sums[0], dw)
    assert torch.equal(sums[1], db)
    half = ops.bn_relu_backward_apply(*arguments, *(s / 36 for s in sums), True)
    assert relative_error(half[0].cpu(), dx.cpu()) < 1e-6
    assert torch.equal(half[1], dr)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_64_bit_offsets_give_the_same_bits(layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    t = tensors((5, 10, 4, 9), torch.float16, layout)

    def everything() -> list[torch.Tensor]:
        y, mean, var, mask = ops.bn_add_relu_forward(t["x"], t["residual"], t["weight"], t["bias"], EPS)
        arguments = t["dy"], t["x"], mask, t["weight"], t["bias"], mean, var, EPS
        return [y, mean, var, mask, *ops.bn_relu_backward(*arguments, True, True)]

    first, second = everything(), everything()
    monkeypatch.setattr(launching, "WIDE_FROM", 0)
    for other in (second, everything()):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_sums_in_many_splits_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "programs", lambda device: 40)
    monkeypatch.setattr(implementation, "STATS_TILE", 64)
    monkeypatch.setattr(implementation, "BACKWARD_TILE", 64)
    for layout in LAYOUTS:
        t = tensors((7, 3, 11, 5), torch.float32, layout)
        mean, var = ops.bn_stats(t["x"])
        assert_bn_statistics(mean, var, t["x"])
        grads = ops.bn_relu_backward(t["dy"], t["x"], None, t["weight"], t["bias"], mean, var, EPS, True, False)
        y = ops.bn_relu_apply(t["x"], t["weight"], t["bias"], mean, var, EPS)
        assert_close_to_torch({**t, "running_mean": mean, "running_var": var}, y, grads, False, True)


@pytest.mark.parametrize("channels", [24, 8, 256])
def test_several_tiles_per_program_give_the_same_bits(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one program share their channels; results do not depend on the number of tiles."""
    t = tensors((7, channels, 9, 5), torch.float16, torch.channels_last)
    mean, var = ops.bn_stats(t["x"])
    parameters = t["weight"], t["bias"], mean, var, EPS

    def both() -> list[torch.Tensor]:
        y, mask = ops.bn_add_relu_apply(t["x"], t["residual"], *parameters)
        sums = torch.ones_like(mean), torch.ones_like(mean)
        backward = ops.bn_relu_backward_apply(t["dy"], t["x"], mask, *parameters, *sums, True)
        return [y, mask, *backward]

    monkeypatch.setattr(launching, "programs", lambda device: 10**9)
    want = both()
    monkeypatch.setattr(launching, "programs", lambda device: 1)
    monkeypatch.setattr(implementation, "APPLY_GROUPS", 16)
    shape = implementation.Shape.of(t["x"], torch.channels_last)
    assert shape.elementwise(1)[2]["LOOPS"] == implementation.APPLY_LOOPS
    assert all(torch.equal(a, b) for a, b in zip(both(), want, strict=True))


@pytest.mark.skipif(not launching.INTERPRETED, reason="only the interpreter counts bytes")
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("residual", "zero", "forward_n", "backward_n"),
    [
        (False, False, 3, 5),
        (True, False, 4 + 1 / 16, 6 + 1 / 8),
        (True, True, 3 + 1 / 16, 5 + 1 / 8),
        (False, True, 2, 3),
    ],
    ids=["bn_relu", "bn_add_relu", "bn_add_relu-zero", "bn_relu-zero"],
)
def test_bytes_equal_the_formula(
    layout: torch.memory_format, residual: bool, zero: bool, forward_n: float, backward_n: float
) -> None:
    """Of activations and masks, in units of the bytes of x; zero: all weights are 0, which saves reads of x."""
    t = tensors((4, 16, 8, 8), torch.float16, layout)
    weight = torch.zeros_like(t["weight"]) if zero else t["weight"]
    unit = t["x"].numel() * 2
    with metered() as meter:
        if residual:
            y, mean, var, mask = ops.bn_add_relu_forward(t["x"], t["residual"], weight, t["bias"], EPS)
            masks = (mask,)
        else:
            y, mean, var = ops.bn_relu_forward(t["x"], weight, t["bias"], EPS)
            mask, masks = None, ()
        moved, _, launches = meter.take(t["x"], t["residual"], y, *masks)
        assert (moved, launches) == (forward_n * unit, 3)
        dx, dresidual, *_ = ops.bn_relu_backward(
            t["dy"], t["x"], mask, weight, t["bias"], mean, var, EPS, True, residual
        )
        moved, _, launches = meter.take(t["x"], t["dy"], dx, dresidual, *masks)
        assert (moved, launches) == (backward_n * unit, 3)
