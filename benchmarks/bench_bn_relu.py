"""bn_relu and bn_add_relu against eager relu(bn(x)) and relu(bn(x) + r), torch.compile of it and timm's BatchNormAct2d.

    pytest benchmarks/bench_bn_relu.py --benchmark-only -s -m "not more"

The shapes are those of ResNet-50's BatchNorms at batch 32 in float32; marked `more`: MobileNet, Inception-V3 and
DenseNet-121, batches of 1, 8 and 32, and bfloat16. Bytes of the formula: forward 3 N or 4 N, backward 5 N or 6 N.
Operations per element: statistics 4, apply 3; in the backward pass mask 3, sums 5, dx 6; and 2 more with a residual.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from shapes import OTHERS, RESNET50, RESNET50_ENDS
from sides import LAYOUTS, Inputs, compare
from torch import nn

from fasttricks.nn import BatchNormAddReLU2d, BatchNormReLU2d

try:
    from timm.layers import BatchNormAct2d
except ImportError:
    BatchNormAct2d = None

BATCH, ROUNDS, FLOPS = 32, 7, 21
PEERS = ("eager", "compiled", *(["timm"] if BatchNormAct2d else []), "eager, add", "compiled, add")
ratios: dict[str, dict[str, float]] = {peer: {} for peer in PEERS}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MORE = [
    (name, c, size, batch, dtype)
    for name, shapes in {"ResNet-50": RESNET50, **OTHERS}.items()
    for c, size in shapes
    for batch in (1, 8, 32)
    for dtype in DTYPES
    if name != "ResNet-50" or batch != BATCH or dtype != "float32"
]


class Eager(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = super().forward(x)
        return F.relu(y if residual is None else y + residual, inplace=True)


def draw(
    tensors: int, c: int, size: int, layout: str, batch: int = BATCH, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Activations, and the gradient of one."""
    *inputs, dy = (
        torch.randn(batch, c, size, size, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
        for _ in range(tensors + 1)
    )
    return [x.requires_grad_() for x in inputs], dy


def formula(copies: int, c: int, size: int, batch: int = BATCH, bytes_of_element: int = 4) -> int:
    return copies * batch * c * size * size * bytes_of_element


def measure(benchmark, c: int, size: int, layout: str, add: bool) -> None:
    torch._dynamo.reset()
    ours = BatchNormAddReLU2d(c) if add else BatchNormReLU2d(c)
    peers: dict[str, nn.Module] = {"eager": Eager(c), "compiled": torch.compile(Eager(c))}
    if BatchNormAct2d is not None and not add:
        peers["timm"] = BatchNormAct2d(c)
    moved, flops = formula(10 if add else 8, c, size), (FLOPS + 2 * add) * BATCH * c * size * size
    found = compare(benchmark, ours, peers, lambda: draw(1 + add, c, size, layout), ROUNDS, moved, flops)
    for name, ratio in found.items():
        ratios[f"{name}, add" if add else name][f"{c}x{size}x{size} {layout}"] = ratio


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("c", "size"), RESNET50)
def test_bn_relu(benchmark, c: int, size: int, layout: str) -> None:
    measure(benchmark, c, size, layout, add=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("c", "size"), RESNET50_ENDS)
def test_bn_add_relu(benchmark, c: int, size: int, layout: str) -> None:
    measure(benchmark, c, size, layout, add=True)


@pytest.mark.parametrize("peer", ratios)
def test_geometric_mean(benchmark, peer: str) -> None:
    """Records the mean of the ratios above; the time is that of computing it."""
    seen = ratios[peer]
    mean = benchmark(lambda: math.exp(sum(map(math.log, seen.values())) / len(seen)))
    benchmark.extra_info["geometric_mean"] = mean
    print(f"\ngeometric mean over {len(seen)} cases: {mean:.2f}x {peer}")


@pytest.mark.more
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("network", "c", "size", "batch", "dtype"), MORE)
def test_network(benchmark, network: str, c: int, size: int, batch: int, dtype: str, layout: str) -> None:
    kind = DTYPES[dtype]
    ours, eager = BatchNormReLU2d(c), Eager(c)
    moved = formula(8, c, size, batch, kind.itemsize)
    compare(benchmark, ours, {"eager": eager}, lambda: draw(1, c, size, layout, batch, kind), ROUNDS, moved)


@pytest.mark.more
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize(("c", "size"), RESNET50_ENDS)
def test_block_end(benchmark, c: int, size: int, batch: int, dtype: str, layout: str) -> None:
    kind = DTYPES[dtype]
    ours, eager = BatchNormAddReLU2d(c), Eager(c)
    moved = formula(10, c, size, batch, kind.itemsize)
    compare(benchmark, ours, {"eager": eager}, lambda: draw(2, c, size, layout, batch, kind), ROUNDS, moved)
