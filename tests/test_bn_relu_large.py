"""bn_relu on more than 2^31 elements: the last sample equals the op on that sample alone."""

from __future__ import annotations

import os

import pytest
import torch

from fasttricks.backends import not_loaded

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("memory")]  # one at a time: each needs gigabytes
MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(MEMORY < 20 << 30, reason=f"needs 20 GiB of memory, this machine has {MEMORY / 2**30:.1f}")
@pytest.mark.skipif("cpu" in not_loaded, reason="the CPU library is not loaded")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_more_than_2_to_the_31_elements(layout: torch.memory_format) -> None:
    shape = (3, 2, 16384, 21846)  # 2,147,500,032 elements, 4.3 GB in half
    ops = torch.ops.fasttricks
    x = torch.zeros(shape, dtype=torch.float16).contiguous(memory_format=layout)
    x[-1, :, -4:] = torch.randn(2, 4, shape[3]).half()
    x[0, :, 0] = 1.0
    weight, bias = torch.tensor([1.5, -0.5]), torch.tensor([0.25, 0.5])
    mean, var = ops.bn_stats(x)
    tail = x[-1:, :, -4:].double()
    total = tail.sum((0, 2, 3)) + shape[3]
    torch.testing.assert_close(mean.double(), total / (x.numel() // 2), rtol=1e-5, atol=0)
    square = tail.square().sum((0, 2, 3)) + shape[3]
    torch.testing.assert_close(var.double(), square / (x.numel() // 2) - mean.double().square(), rtol=1e-4, atol=0)
    y = ops.bn_relu_apply(x, weight, bias, mean, var, 1e-5)
    last = x[-1:].clone(memory_format=torch.preserve_format)
    assert torch.equal(y[-1:, :, -4:], ops.bn_relu_apply(last, weight, bias, mean, var, 1e-5)[:, :, -4:])
    y[-1, :, :-4], y[:-1] = 0, 0  # reused as dy, zero except at the end
    dweight, dbias = ops.bn_relu_backward_reduce(y, x, None, weight, bias, mean, var, 1e-5)
    torch.testing.assert_close(dbias.double(), y[-1, :, -4:].double().sum((1, 2)), rtol=1e-5, atol=0)
    means = dweight / (x.numel() // 2), dbias / (x.numel() // 2)
    dx = ops.bn_relu_backward_apply(y, x, None, weight, bias, mean, var, 1e-5, *means, False)[0]
    part = ops.bn_relu_backward_apply(
        y[-1:].clone(memory_format=torch.preserve_format),
        last,
        *(None, weight, bias, mean, var, 1e-5, *means, False),
    )[0]
    assert torch.equal(dx[-1:, :, -4:], part[:, :, -4:])
