"""avgpool_conv1x1 on more than 2^31 elements."""

from __future__ import annotations

import os

import pytest
import torch
from cases import LAYOUTS

import fasttricks
from fasttricks.backends import why_not
from fasttricks.ops.avgpool_conv1x1 import avgpool_conv1x1

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("memory")]  # one at a time: each needs gigabytes
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
KERNELS = [
    (name, device)
    for device in DEVICES
    for name in ("cpu", "cuda", "triton")
    if why_not(name, torch.device(device)) is None and (name, device) != ("triton", "cpu")  # interpreted: hours
]


def free(device: str) -> int:
    """Bytes of free memory."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("name", "device"), KERNELS)
def test_more_than_2_to_the_31_elements(name: str, device: str, layout: torch.memory_format) -> None:
    """The last sample lies beyond element 2^31 of x and dx. The others are zero, pages that the CPU never writes."""
    if free(device) < (needed := (8 if device == "cpu" else 16) << 30):
        pytest.skip(f"needs {needed >> 30} GiB of free memory, has {free(device) / 2**30:.1f}")
    n, c, h, w = 33, 32, 1024, 2048
    assert n * c * h * w > 2**31
    with torch.device(device):
        weight = torch.randn(1, c, 1, 1, dtype=torch.bfloat16)
        if layout == torch.channels_last:
            x = torch.zeros(n, h, w, c, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        else:
            x = torch.zeros(n, c, h, w, dtype=torch.bfloat16)
        x[-1] = torch.randn(c, h, w, dtype=torch.bfloat16)
    last = x[-1:].detach().clone().requires_grad_()
    with fasttricks.backend(name):
        y, y_last = avgpool_conv1x1(x.requires_grad_(), weight), avgpool_conv1x1(last, weight)
        assert torch.equal(y[-1:], y_last)
        assert not y[:-1].any()
        dy = torch.zeros_like(y)
        dy[-1] = torch.randn_like(dy[-1])
        (dx,) = torch.autograd.grad(y, x, dy)
        (dx_last,) = torch.autograd.grad(y_last, last, dy[-1:])
    assert torch.equal(dx[-1:], dx_last)
