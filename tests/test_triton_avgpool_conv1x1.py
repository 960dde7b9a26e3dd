"""avgpool_conv1x1 in Triton: determinism, offsets, splits, bytes. For values see test_avgpool_conv1x1.py."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, poisoned_memory, relative_error, triton_device
from triton_meter import metered

DEVICE = triton_device()

from fasttricks.kernels import avgpool_conv1x1 as implementation  # noqa: E402
from fasttricks.kernels import launch as launching  # noqa: E402

ops = torch.ops.fasttricks_triton


def tensors(n: int, c: int, h: int, w: int, o: int, layout: torch.memory_format) -> list[torch.Tensor]:
    """x, weight, bias and dy, for floor mode."""
    x, dy = (
        torch.randn(shape, device=DEVICE).half().contiguous(memory_format=layout)
        for shape in ((n, c, h, w), (n, o, h // 2, w // 2))
    )
    weight, bias = torch.randn(o, c, 1, 1, device=DEVICE).half(), torch.randn(o, device=DEVICE).half()
    return [x, weight, bias, dy]


def results(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    y = ops.avgpool_conv1x1_forward(x, weight, bias, 2, False)
    return [y, *ops.avgpool_conv1x1_backward(dy, x, weight, 2, False, True, True, True)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_64_bit_offsets_give_the_same_bits(layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((3, 40, 8, 16, 24), (2, 17, 7, 9, 33)):
        given = tensors(*shape, layout)
        first, second = results(*given), results(*given)
        with monkeypatch.context() as patch:
            patch.setattr(launching, "WIDE_FROM", 0)
            wide = results(*given)
        for other in (second, wide):
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_sums_in_many_splits_are_right(layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over the pixels in several parts, the last of them shorter."""
    monkeypatch.setattr(launching, "programs", lambda device: 64)
    x, weight, _, dy = tensors(6, 9, 34, 34, 20, layout)
    shape = implementation.Shape.of(x, weight, 2, False)
    splits, steps = implementation._splits(shape, 1, 32, x.device)
    assert splits > 2
    assert splits * steps * 32 > shape.pixels + 32
    _, dweight, dbias = ops.avgpool_conv1x1_backward(dy, x, weight, 2, False, False, True, True)
    pooled = F.avg_pool2d(x.double(), 2)
    exact = torch.einsum("nohw,nchw->oc", dy.double(), pooled)
    assert relative_error(dweight[:, :, 0, 0].cpu(), exact.cpu()) < 1e-3
    assert relative_error(dbias.cpu(), dy.double().sum((0, 2, 3)).cpu()) < 1e-3


def test_only_what_is_needed_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _, dy = tensors(1, 4, 4, 4, 4, torch.contiguous_format)
    names: list[str] = []
    monkeypatch.setattr(launching, "launch", lambda kernel, *rest: names.append(kernel.__name__))
    for need in itertools.product((False, True), repeat=3):
        del names[:]
        out = implementation.avgpool_conv1x1_backward(dy, x, weight, 2, False, *need)
        assert [t.numel() > 0 for t in out] == list(need)
        want = ["avgpool_conv1x1_input_kernel"] * need[0]
        want += ["avgpool_conv1x1_weight_kernel", "avgpool_conv1x1_sum_kernel"] * need[1]
        assert names == want + ["avgpool_conv1x1_bias_kernel", "avgpool_conv1x1_sum_kernel"] * need[2]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("ceil_mode", [False, True], ids=["floor", "ceil"])
def test_gradient_of_the_pooled_tensor(layout: torch.memory_format, ceil_mode: bool) -> None:
    """It is not spread; of stride 1 it is dx."""
    for dtype, limit in ((torch.float64, 1e-15), (torch.float16, 1e-3)):
        for n, c, h, w, o in ((2, 17, 7, 9, 33), (3, 8, 1, 5, 16), (2, 24, 4, 6, 40), (0, 3, 4, 4, 5)):
            if h == 1 and not ceil_mode:
                continue
            x = torch.randn(n, c, h, w, dtype=dtype, device=DEVICE).contiguous(memory_format=layout)
            weight = torch.randn(o, c, 1, 1, dtype=dtype, device=DEVICE)
            dy = torch.randn_like(ops.avgpool_conv1x1_forward(x, weight, None, 2, ceil_mode))
            with poisoned_memory():
                dx, dweight, dbias = ops.avgpool_conv1x1_backward(dy, x, weight, 2, ceil_mode, True, True, False, True)
            exact = torch.einsum("nohw,oc->nchw", dy.double(), weight[:, :, 0, 0].double())
            assert dx.shape == exact.shape
            assert n == 0 or dx.is_contiguous(memory_format=layout)
            assert relative_error(dx.cpu(), exact.cpu()) <= limit
            whole = ops.avgpool_conv1x1_backward(dy, x, weight, 2, ceil_mode, False, True, False)
            assert torch.equal(dweight, whole[1])
            assert dbias.numel() == 0
            dy = torch.randn(n, o, h, w, dtype=dtype, device=DEVICE)
            plain, pooled = (
                ops.avgpool_conv1x1_backward(dy, x, weight, 1, ceil_mode, True, False, False, pooled_dx)[0]
                for pooled_dx in (False, True)
            )
            assert torch.equal(plain, pooled)


@pytest.mark.skipif(not launching.INTERPRETED, reason="only the interpreter counts bytes")
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_bytes_equal_the_formula(layout: torch.memory_format) -> None:
    """Each operand is read once per tile of the other one, each result written once."""
    n, c, h, w, o = 2, 192, 16, 16, 320
    x, weight, _, dy = tensors(n, c, h, w, o, layout)
    shape = implementation.Shape.of(x, weight, 2, False)

    def tiles(size: int, tile: int) -> int:
        return -(-size // tile)

    def size(t: torch.Tensor) -> int:
        return t.numel() * t.element_size()

    with metered() as meter:
        y = ops.avgpool_conv1x1_forward(x, weight, None, 2, False)
        tile = implementation.output_tiles(shape, o, spread=False)[0]
        want = tiles(o, tile.n) * size(x) + tiles(shape.pixels, tile.m) * size(weight) + size(y)
        assert meter.take(x, weight, y) == (want, 0, 1)
        dx, *_ = ops.avgpool_conv1x1_backward(dy, x, weight, 2, False, True, False, False)
        tile = implementation.output_tiles(shape, c, spread=True)[0]
        want = tiles(c, tile.n) * size(dy) + tiles(shape.pixels, tile.m) * size(weight) + size(dx)
        assert meter.take(dy, weight, dx) == (want, 0, 1)
        dpooled, *_ = ops.avgpool_conv1x1_backward(dy, x, weight, 2, False, True, False, False, True)
        tile = implementation.output_tiles(shape.after_pool, c, spread=False)[0]
        want = tiles(c, tile.n) * size(dy) + tiles(shape.pixels, tile.m) * size(weight) + size(dpooled)
        assert meter.take(dy, weight, dpooled) == (want, 0, 1)
        _, dweight, _ = ops.avgpool_conv1x1_backward(dy, x, weight, 2, False, False, True, False)
        tile = implementation.weight_tiles(shape)[0]
        want = tiles(c, tile.n) * size(dy) + tiles(o, tile.m) * size(x) + size(dweight)
        assert meter.take(dy, x, dweight) == (want, 2 * 2 * size(dweight), 2), "one partial sum, written, then read"
        *_, dbias = ops.avgpool_conv1x1_backward(dy, x, weight, 2, False, False, False, True)
        assert meter.take(dy, dbias) == (size(dy) + size(dbias), 2 * 2 * size(dbias), 2)
