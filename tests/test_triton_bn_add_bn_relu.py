"""bn_add_bn_relu in Triton: values against float64, exact zeros, offsets, splits, bytes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS, assert_bn_close, poisoned_memory, relative_error, triton_device
from triton_meter import metered

DEVICE = triton_device()

from fasttricks.kernels import bn_relu as implementation  # noqa: E402
from fasttricks.kernels import launch as launching  # noqa: E402
from fasttricks.ops.bn_relu import unpack_mask  # noqa: E402

ops = torch.ops.fasttricks_triton
EPS = 1e-5, 1e-3
# planes and channels that are multiples of 8 or not, odd sizes, one pixel, several tiles
SHAPES = ((2, 3, 5, 7), (4, 8, 4, 4), (6, 3, 1, 1), (2, 8, 3, 5), (2, 5, 7, 7), (5, 16, 12, 16))
INPUTS = ("x", "residual", "weight", "bias", "residual_weight", "residual_bias")


def tensors(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> dict[str, torch.Tensor]:
    parameter = torch.promote_types(dtype, torch.float32)
    given = {name: torch.randn(shape[1], dtype=parameter, device=DEVICE) for name in INPUTS[2:]}
    for name, shift in (("x", 0.7), ("residual", -0.4), ("dy", 0.2)):
        values = torch.randn(shape, device=DEVICE) * 1.5 + shift
        given[name] = values.to(dtype).contiguous(memory_format=layout)
    return given


def forward(t: dict[str, torch.Tensor], *moved: object) -> list[torch.Tensor]:
    """y, the four statistics, mask."""
    return list(ops.bn_add_bn_relu_forward(*(t[name] for name in INPUTS), *EPS, *moved))


def backward(
    t: dict[str, torch.Tensor], mask: torch.Tensor, statistics: list[torch.Tensor], training: bool = True,
    dy2: torch.Tensor | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """dx, dresidual, dweight, dresidual_weight, dbias."""
    given = (t["dy"], t["x"], t["residual"], mask, t["weight"], t["residual_weight"])
    return list(ops.bn_add_bn_relu_backward(*given, *statistics, *EPS, training, dy2))


def composition(
    t: dict[str, torch.Tensor], to: Callable[[torch.Tensor], torch.Tensor], statistics: list[torch.Tensor] | None,
    through: torch.Tensor,
) -> list[torch.Tensor]:  # fmt: skip
    """y and all gradients by torch's ops on inputs mapped by `to`.

    statistics: None: those of the batch; through: the ReLU's mask.
    """
    x, r, w, b, rw, rb = (to(t[name]).requires_grad_() for name in INPUTS)
    mean, var, r_mean, r_var = (None,) * 4 if statistics is None else (to(s) for s in statistics)
    training = statistics is None
    z = F.batch_norm(x, mean, var, w, b, training, 0.0, EPS[0])
    y = (z + F.batch_norm(r, r_mean, r_var, rw, rb, training, 0.0, EPS[1])) * through
    return [y.detach(), *torch.autograd.grad(y, [x, r, w, rw, b], to(t["dy"]))]


def assert_close_to_torch(
    t: dict[str, torch.Tensor], y: torch.Tensor, gradients: list[torch.Tensor], statistics: list[torch.Tensor] | None
) -> None:
    names = ("dx", "dresidual", "dweight", "dresidual_weight", "dbias")
    results = {"y": y, **dict(zip(names, gradients, strict=True))}
    assert_bn_close(results, lambda to: composition(t, to, statistics, ~(y <= 0)))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, training: bool) -> None:
    t = tensors(shape, dtype, layout)
    with poisoned_memory():
        if training:
            y, *statistics, mask = forward(t)
        else:
            statistics = [torch.rand_like(t["weight"]) + 0.5 for _ in range(4)]
            y, mask = ops.bn_add_bn_relu_apply(*(t[name] for name in INPUTS), *statistics, *EPS)
        dx, dresidual, dweight, dresidual_weight, dbias = backward(t, mask, statistics, training)
    assert torch.equal(unpack_mask(mask, y), ~(y <= 0)), "the saved mask is that of y"
    assert y.stride() == dx.stride() == dresidual.stride() == t["x"].stride()
    gradients = [dx, dresidual, dweight, dresidual_weight, dbias]
    assert_close_to_torch(t, y, gradients, None if training else statistics)
    if training:
        for name, mean, var in (("x", *statistics[:2]), ("residual", *statistics[2:])):
            assert all(torch.equal(a, b) for a, b in zip(ops.bn_stats(t[name]), (mean, var), strict=True))


def test_none_of_the_parameters_is_ones_and_zeros() -> None:
    t = tensors((3, 5, 3, 5), torch.float32, torch.contiguous_format)
    plain = {"weight": torch.ones(5), "bias": torch.zeros(5)}
    plain |= {f"residual_{name}": value for name, value in plain.items()}
    want = forward({**t, **{name: value.to(DEVICE) for name, value in plain.items()}})
    got = forward({**t, **dict.fromkeys(plain)})
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    statistics, mask = got[1:5], got[5]
    first = backward({**t, "weight": None, "residual_weight": None}, mask, statistics)
    second = backward({**t, "weight": torch.ones(5), "residual_weight": torch.ones(5)}, mask, statistics)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_zero_weight_is_exact(layout: torch.memory_format) -> None:
    """Without the term of x, the op is bn_relu of the residual."""
    t = tensors((3, 8, 4, 4), torch.float32, layout)
    t["weight"], t["bias"] = torch.zeros(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    y, *statistics, mask = forward(t)
    of_residual = t["residual_weight"], t["residual_bias"]
    want, mean, var = ops.bn_relu_forward(t["residual"], *of_residual, EPS[1])
    assert torch.equal(y, want)
    dx, dresidual, dweight, dresidual_weight, dbias = backward(t, mask, statistics)
    assert (dx == 0).all()
    dr, _, dw, db = ops.bn_relu_backward(t["dy"], t["residual"], None, *of_residual, mean, var, EPS[1], True, False)
    for got, same in ((dresidual, dr), (dresidual_weight, dw), (dbias, db)):
        assert torch.equal(got, same)
    xhat = F.batch_norm(t["x"].double(), None, None, training=True, eps=EPS[0])
    exact = (t["dy"] * (y > 0) * xhat).sum((0, 2, 3))
    assert relative_error(dweight.cpu(), exact.cpu()) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["x", "residual"])
def test_nan_passes_and_stays_in_its_channel(name: str, layout: torch.memory_format) -> None:
    t = tensors((2, 3, 4, 4), torch.float32, layout)
    t[name][1, 1, 2, 2] = math.nan
    for weight in (t["weight"], torch.zeros(3, device=DEVICE)):
        y, *statistics, mask = forward({**t, "weight": weight})
        assert y[:, 1].isnan().all()
        assert y[:, ::2].isfinite().all()
        assert unpack_mask(mask, y)[:, 1].all()
        dx, dresidual, *_ = backward({**t, "weight": weight}, mask, statistics)
        assert (dx if name == "x" else dresidual)[:, 1].isnan().all()
        assert dx[:, ::2].isfinite().all()
        assert dresidual[:, ::2].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(3, 8, 7, 7), (2, 3, 4, 6), (4, 5, 1, 1)], ids=str)
def test_second_gradient_equals_adding_first(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    for dtype in (torch.float16, torch.float64):
        t = tensors(shape, dtype, layout)
        _, *statistics, mask = forward(t)
        n, c, h, w = shape
        for second in ((h, w), (h // 2, w // 2), ((h + 1) // 2, (w + 1) // 2)):
            dy2 = torch.randn(n, c, *second, device=DEVICE).to(dtype)
            bias = torch.zeros(c, device=DEVICE)
            whole = torch.full_like(mask, 255)  # the sum, as bn_relu_backward has it, which test_second_gradient checks
            both = ops.bn_relu_backward(
                t["dy"], t["x"], whole, t["weight"], bias, *statistics[:2], EPS[0], True, True, dy2
            )[1]
            want = backward({**t, "dy": both}, mask, statistics)
            with poisoned_memory():
                got = backward(t, mask, statistics, True, dy2)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), second


def test_empty_input_has_zero_gradients() -> None:
    for shape in ((0, 4, 3, 3), (2, 4, 0, 3)):
        t = tensors(shape, torch.float32, torch.contiguous_format)
        running = [torch.rand(4, device=DEVICE) for _ in range(4)]
        before = [r.clone() for r in running]
        y, *statistics, mask = forward(t, *running[:2], None, 0.1, *running[2:], None, 0.1)
        assert y.shape == shape
        assert mask.numel() == 0
        assert all(torch.equal(a, b) for a, b in zip(running, before, strict=True))
        dx, dresidual, *sums = backward(t, mask, statistics, True, torch.ones(shape, device=DEVICE))
        assert dx.shape == dresidual.shape == shape
        assert all(torch.equal(s, torch.zeros_like(s)) for s in sums)


def test_running_statistics_are_those_of_each_input() -> None:
    t = tensors((3, 5, 2, 2), torch.float32, torch.contiguous_format)
    mine = [[torch.rand(5, device=DEVICE), torch.rand(5, device=DEVICE), torch.tensor(3, device=DEVICE)] for _ in "ab"]
    want = [[t.clone() for t in of_one] for of_one in mine]
    forward(t, *mine[0], 0.3, *mine[1], None)
    for name, of_one, momentum in (("x", want[0], 0.3), ("residual", want[1], None)):
        ops.bn_relu_forward(t[name], None, None, 1e-5, *of_one, momentum)
    for a, b in zip(mine, want, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_any_strides_are_accepted() -> None:
    t = tensors((2, 8, 4, 4), torch.float32, torch.contiguous_format)
    want = forward(t)
    grads = backward(t, want[5], want[1:5])
    for name in ("residual", "dy"):
        for strided in (t[name].contiguous(memory_format=torch.channels_last), t[name].mT.contiguous().mT):
            other = {**t, name: strided}
            assert all(torch.equal(a, b) for a, b in zip(forward(other), want, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(backward(other, want[5], want[1:5]), grads, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_64_bit_offsets_give_the_same_bits(layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    t = tensors((5, 10, 4, 9), torch.float16, layout)

    def everything() -> list[torch.Tensor]:
        results = forward(t)
        return [*results, *backward(t, results[5], results[1:5])]

    first, second = everything(), everything()
    monkeypatch.setattr(launching, "WIDE_FROM", 0)
    for other in (second, everything()):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_sums_in_many_splits_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "programs", lambda device: 40)
    monkeypatch.setattr(implementation, "BACKWARD_TILE", 64)
    for layout in LAYOUTS:
        t = tensors((7, 3, 11, 5), torch.float32, layout)
        y, *statistics, mask = forward(t)
        assert_close_to_torch(t, y, backward(t, mask, statistics), None)


def test_several_tiles_per_program_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    t = tensors((7, 24, 9, 5), torch.float16, torch.channels_last)
    _, *statistics, _ = forward(t)

    def both() -> list[torch.Tensor]:
        y, mask = ops.bn_add_bn_relu_apply(*(t[name] for name in INPUTS), *statistics, *EPS)
        return [y, mask, *backward(t, mask, statistics)[:2]]

    monkeypatch.setattr(launching, "programs", lambda device: 1)
    monkeypatch.setattr(implementation, "APPLY_GROUPS", 16)
    with monkeypatch.context() as patch:
        patch.setattr(implementation, "APPLY_LOOPS", 1)
        want = both()
    shape = implementation.Shape.of(t["x"], torch.channels_last)
    assert shape.elementwise(1)[2]["LOOPS"] == implementation.APPLY_LOOPS > 1
    assert all(torch.equal(a, b) for a, b in zip(both(), want, strict=True))


@pytest.mark.skipif(not launching.INTERPRETED, reason="only the interpreter counts bytes")
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("zero", "forward_n", "backward_n"), [(False, 5, 8), (True, 4, 7)], ids=["", "zero"])
def test_bytes_equal_the_formula(layout: torch.memory_format, zero: bool, forward_n: int, backward_n: int) -> None:
    """Of activations and masks, in units of the bytes of x; zero: all weights of x are 0, which saves reads of it."""
    t = tensors((4, 16, 8, 8), torch.float16, layout)
    if zero:
        t["weight"].zero_()
    unit = t["x"].numel() * 2
    with metered() as meter:
        y, *statistics, mask = forward(t)
        moved, _, launches = meter.take(t["x"], t["residual"], y, mask)
        assert (moved, launches) == ((forward_n + 1 / 16) * unit, 5)
        dx, dresidual, *_ = backward(t, mask, statistics)
        moved, others, launches = meter.take(t["x"], t["residual"], t["dy"], mask, dx, dresidual)
        assert (moved, launches) == ((backward_n + 1 / 8) * unit, 3)
        for second in ((8, 8), (4, 4)):
            dy2 = torch.randn(4, 16, *second, device=DEVICE).half().contiguous(memory_format=layout)
            dx, dresidual, *_ = backward(t, mask, statistics, True, dy2)
            moved, with_dz, launches = meter.take(t["x"], t["residual"], t["dy"], dy2, mask, dx, dresidual)
            assert (moved, launches) == ((backward_n - 1 + dy2.numel() / y.numel() + 1 / 16) * unit, 3)
            assert with_dz - others == 2 * unit, "dz is written, then read"
