"""avgpool_conv1x1's CUDA kernels without a GPU: launch plans, bytes, thread orders, sanitizers, planted faults."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this file tests no Triton kernel", allow_module_level=True)

import emulated

import fasttricks
from fasttricks import backends

FORWARD, INPUT, WEIGHT = range(3)
# multiprocessors, shared memory per multiprocessor and per block (CUDA Programming Guide, "Compute Capabilities")
A100, H100, RTX4090 = (108, 164 << 10, 163 << 10), (132, 228 << 10, 227 << 10), (128, 100 << 10, 99 << 10)
EMULATED = (4, 228 << 10, 227 << 10)  # emulated_device() of csrc/cuda/launch.cuh
# (N, C, H, W, Cout, stride, ceil_mode): the shortcuts of ResNet-50-D that pool, at batch 256
RESNET = [(256, c, h, h, 2 * c, 2, 0) for c, h in ((256, 56), (512, 28), (1024, 14))]


Sizes = tuple[int, ...]


class Planner:
    """csrc/cuda/avgpool_conv1x1_plan.h, for sizes and cards as above."""

    def __init__(self) -> None:
        self.plans = emulated.plans()

    def plan(self, sizes: Sizes, product: int, size: int, device: tuple[int, int, int]) -> Any:
        return self.plans.avgpool_plan(
            self.plans.AvgPoolShape(*sizes), self.plans.AvgPoolProduct(product), size, device[0]
        )

    def slab(self, sizes: Sizes, device: tuple[int, int, int]) -> Any:
        return self.plans.avgpool_slab_plan(self.plans.AvgPoolShape(*sizes), *device)

    def offsets(self, sizes: Sizes, pixel: int, channel: int) -> Any:
        return self.plans.avgpool_offsets(self.plans.AvgPoolShape(*sizes), pixel, channel)

    def bias_splits(self, sizes: Sizes, device: tuple[int, int, int]) -> int:
        return self.plans.avgpool_bias_splits(self.plans.AvgPoolShape(*sizes), device[0])


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner()


def out_size(sizes: tuple[int, ...]) -> tuple[int, int]:
    _, _, h, w, _, stride, ceil_mode = sizes
    return tuple((s + (stride - 1 if ceil_mode else 0)) // stride for s in (h, w))  # type: ignore[return-value]


# ---- plans ----


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("product", [FORWARD, INPUT, WEIGHT])
def test_tiles_cover_the_product(planner: Planner, product: int, size: int) -> None:
    for sizes in (*RESNET, (1, 1, 2, 2, 1, 2, 0), (3, 33, 7, 9, 65, 2, 1), (2, 7, 3, 1, 600, 1, 0)):
        n, c, _, _, o, _, _ = sizes
        ho, wo = out_size(sizes)
        pixels = n * ho * wo
        rows, columns, depth = ((pixels, o, c), (pixels, c, o), (o, c, pixels))[product]
        side = 128 if size == 2 else 64  # the longer side of a tile: Cout of the weight's gradient
        m, k = (side, 64) if product == WEIGHT else (64, side)
        for device in (A100, H100, EMULATED):
            plan = planner.plan(sizes, product, size, device)
            assert (plan.tiles_m, plan.tiles_n, plan.depth) == (-(-rows // m), -(-columns // k), depth)
            assert plan.depth_per_split % (32 if size == 2 else 16) == 0
            assert (plan.splits - 1) * plan.depth_per_split < depth <= plan.splits * plan.depth_per_split
            assert plan.splits <= 65535
            if product == WEIGHT:  # enough blocks to fill the device, and no more partial sums than that
                blocks = plan.tiles_m * plan.tiles_n * plan.splits
                assert plan.splits == 1 or blocks <= 2 * device[0]
                assert sizes not in RESNET or blocks >= device[0]
            else:
                assert plan.splits == 1


def test_pixels_of_one_launch_fit_31_bits(planner: Planner) -> None:
    for ho, wo in ((1, 1), (28, 28), (1 << 15, 1 << 15), (1 << 15, (1 << 16) - 1)):
        images = planner.plans.avgpool_images(ho, wo)
        assert images >= 1
        assert images * ho * wo + 128 < 2**31
        assert images == 1 or (images + 1) * ho * wo > 2**31 - 256


def test_offsets_beyond_2_to_the_31_are_right(planner: Planner) -> None:
    """Those of the last pixel of tensors with more than 2^31 elements."""
    for sizes in ((256, 4096, 56, 56, 8192, 2, 0), (70, 8200, 113, 113, 9000, 2, 1), (1, 7, 40000, 40000, 9, 1, 0)):
        n, c, h, w, o, stride, _ = sizes
        ho, wo = out_size(sizes)
        i, j, channel = ho - 1, wo - 1, o - 1
        pixel = n * ho * wo - 1
        at = planner.offsets(sizes, pixel, channel)
        assert at.nhwc == (((n - 1) * h + i * stride) * w + j * stride) * c
        assert at.nchw == at.first_of_two == (n - 1) * c * h * w + i * stride * w + j * stride
        assert at.dy_nhwc == pixel * o + channel
        assert at.dy_nchw == ((n - 1) * o + channel) * ho * wo + i * wo + j
        assert max(at.nhwc, at.nchw) > 2**31
        # half a vector before: four pixels
        assert planner.offsets(sizes, pixel - 4, channel).second_of_two == at.nchw


def test_slabs_that_fit_read_x_once_or_twice(planner: Planner) -> None:
    for sizes in RESNET:
        for device in (A100, H100, RTX4090):
            plan, (sm_count, per_sm, per_block) = planner.slab(sizes, device), device
            assert plan.shared_bytes <= per_block
            needed = sizes[1] * 64 * 2 + 2 * 128 * 32 * 2
            if needed > per_block:
                assert (plan.groups, sizes[1]) == (0, 1024)
                continue
            assert plan.shared_bytes == needed
            assert plan.groups * plan.tiles_per_group >= plan.tiles_n
            assert (plan.groups - 1) * plan.tiles_per_group < plan.tiles_n
            # x is read once, or twice if there are too few pixels to fill the device
            assert plan.groups <= 2
            assert plan.groups == 1 or plan.tiles_m < 2 * sm_count * (per_sm // needed)
    assert planner.slab((1, 64, 8, 8, 128, 2, 0), H100).groups == 0  # one tile of columns: nothing would be read twice
    assert planner.slab((256, 4096, 14, 14, 8192, 2, 0), H100).groups == 0  # too many channels


def test_splits_of_the_bias_gradient_fit_the_grid(planner: Planner) -> None:
    for sizes in (*RESNET, (1, 1, 2, 2, 1, 2, 0), (1 << 20, 1, 28, 28, 1, 2, 0)):
        assert 1 <= planner.bias_splits(sizes, H100) <= 65535


# ---- bytes ----


@dataclass(frozen=True)
class Bytes:
    x: int
    weight: int
    y: int

    @property
    def least(self) -> int:
        """The traffic to and from DRAM with an ideal cache."""
        return self.x + self.weight + self.y


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("shortcut", RESNET, ids=lambda s: f"{s[1]}x{s[2]}")
def test_bytes_moved_are_within_5_percent_of_the_formula(
    planner: Planner, shortcut: tuple[int, ...], layout: torch.memory_format
) -> None:
    """Each operand is read once per tile of the other one, the result written once.

    The meter counts every read, also of data that another block has just brought into the L2 cache.
    """
    n, c, h, w, o, stride, _ = sizes = (2, *shortcut[1:])
    x = torch.randn(n, c, h, w, dtype=torch.float16).contiguous(memory_format=layout)
    weight = torch.randn(o, c, 1, 1, dtype=torch.float16)
    dy = torch.randn(n, o, h // 2, w // 2, dtype=torch.float16).contiguous(memory_format=layout)
    of = Bytes(2 * x.numel(), 2 * weight.numel(), 2 * dy.numel())
    library, ops = emulated.load(), torch.ops.fasttricks_emulated

    slab = planner.slab(sizes, EMULATED)
    assert slab.groups > 0
    with library.metered() as meter:
        ops.avgpool_conv1x1_forward(x, weight, None, stride, False)
    assert meter.launches == 1
    assert meter.stored == of.y
    assert meter.moved <= 1.05 * (slab.groups * of.x + slab.tiles_m * of.weight + of.y)
    print(f"forward: {meter.moved / of.least:.2f} times the least; x is read {slab.groups} times")

    plan = planner.plan(sizes, INPUT, 2, EMULATED)
    with library.metered() as meter:
        ops.avgpool_conv1x1_backward(dy, x, weight, stride, False, True, False, False)
    assert meter.launches == 1
    assert meter.stored == of.x
    assert meter.moved <= 1.05 * (plan.tiles_n * of.y + plan.tiles_m * of.weight + of.x)

    plan = planner.plan(sizes, WEIGHT, 2, EMULATED)
    with library.metered() as meter:
        ops.avgpool_conv1x1_backward(dy, x, weight, stride, False, False, True, False)
    assert meter.launches == 2
    partial = 2 * of.weight * plan.splits  # fp32; written, then read
    assert meter.moved <= 1.05 * (plan.tiles_n * of.y + plan.tiles_m * of.x + 2 * partial + of.weight)

    with library.metered() as meter:
        ops.avgpool_conv1x1_backward(dy, x, weight, stride, False, False, False, True)
    partial = 4 * o * planner.bias_splits(sizes, EMULATED)
    assert meter.moved <= 1.05 * (of.y + 2 * partial + 2 * o)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("shared", [0, 228 << 10], ids=["tiles", "slab"])
def test_bank_conflicts(layout: torch.memory_format, shared: int) -> None:
    """Of 16-bit products: a tenth more wavefronts than without any; results are stored to shared memory two by two."""
    library, ops = emulated.load(), torch.ops.fasttricks_emulated
    x = torch.randn(2, 64, 16, 16, dtype=torch.float16).contiguous(memory_format=layout)
    weight = torch.randn(256, 64, 1, 1, dtype=torch.float16)
    dy = torch.randn(2, 256, 8, 8, dtype=torch.float16).contiguous(memory_format=layout)
    runs = {
        "forward": lambda: ops.avgpool_conv1x1_forward(x, weight, None, 2, False),
        "dx": lambda: ops.avgpool_conv1x1_backward(dy, x, weight, 2, False, True, False, False),
        "dweight": lambda: ops.avgpool_conv1x1_backward(dy, x, weight, 2, False, False, True, False),
    }
    for name, run in runs.items():
        with library.shared_per_sm(shared), library.metered(conflicts=True) as meter:
            run()
        assert meter.least_wavefronts > 0
        assert meter.conflicts <= 1.1, name


def test_an_empty_batch_launches_nothing() -> None:
    library, ops = emulated.load(), torch.ops.fasttricks_emulated
    x, weight = torch.empty(0, 8, 4, 4), torch.randn(16, 8, 1, 1)
    with library.metered() as meter:
        ops.avgpool_conv1x1_forward(x, weight, None, 2, False)
        ops.avgpool_conv1x1_backward(torch.empty(0, 16, 2, 2), x, weight, 2, False, True, True, True)
    assert meter.launches == 0


# ---- orders, alignment ----


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_every_order_of_threads_gives_the_same_bits(layout: torch.memory_format) -> None:
    library, results = emulated.load(), []
    x = torch.randn(5, 40, 15, 14, dtype=torch.bfloat16).contiguous(memory_format=layout)
    weight, bias = torch.randn(265, 40, 1, 1, dtype=torch.bfloat16), torch.randn(265, dtype=torch.bfloat16)
    dy = torch.randn(5, 265, 8, 7, dtype=torch.bfloat16).contiguous(memory_format=layout)
    for schedule in emulated.SCHEDULES:
        with library.schedule(**schedule):
            ops = torch.ops.fasttricks_emulated
            y = ops.avgpool_conv1x1_forward(x, weight, bias, 2, True)
            results.append([y, *ops.avgpool_conv1x1_backward(dy, x, weight, 2, True, True, True, True)])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_misaligned_tensors_give_the_same_bits(layout: torch.memory_format, offset: int) -> None:
    """Pointers that allow accesses of 2, 4 or 8 bytes."""
    emulated.load()

    def moved(t: torch.Tensor) -> torch.Tensor:
        memory = torch.empty(t.numel() + offset, dtype=t.dtype)[offset:]
        assert memory.data_ptr() % 16 == 2 * offset
        return memory.as_strided(t.shape, t.stride()).copy_(t)

    x = torch.randn(3, 32, 8, 16, dtype=torch.float16).contiguous(memory_format=layout)
    weight, bias = torch.randn(40, 32, 1, 1, dtype=torch.float16), torch.randn(40, dtype=torch.float16)
    dy = torch.randn(3, 40, 4, 8, dtype=torch.float16).contiguous(memory_format=layout)
    results = []
    for x_, weight_, bias_, dy_ in ((x, weight, bias, dy), tuple(map(moved, (x, weight, bias, dy)))):
        with fasttricks.backend("cuda"):
            leaves = [t.detach().requires_grad_() for t in (x_, weight_, bias_)]
            y = fasttricks.avgpool_conv1x1(*leaves)
            results.append([y, *torch.autograd.grad(y, leaves, dy_)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- other builds ----


@pytest.mark.long
@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_sanitizers_find_nothing(kind: str) -> None:
    """In these builds a launch takes at most 1400 pixels, so that some tensors take several, as beyond 2^31 pixels."""
    assert emulated.run("run_avgpool_conv1x1.py", emulated.Build(kind)) == ""


# fault -> file, text, its replacement, build, expected output
FAULTS = {
    "barrier removed after a step of a slab": (
        "avgpool_conv1x1_tile.cuh",
        "    __syncthreads();  // this step's tile is there, and all have done with the other one\n",
        "",
        "plain",
        "wrong",
    ),
    "cp.async not waited for": (
        "avgpool_conv1x1_tile.cuh",
        "    copy_wait<0>();\n    __syncthreads();\n  }\n",
        "    __syncthreads();\n  }\n",
        "plain",
        "wrong",
    ),
    "pixels past the last one read": (
        "avgpool_conv1x1_tile.cuh",
        "if (at_outer < outer_end() && at_inner < inner_end())",
        "if (at_outer <= outer_end() && at_inner < inner_end())",
        "asan",
        "heap-buffer-overflow",
    ),
    "result overwritten while it is read": (
        "avgpool_conv1x1.cuh",
        "    __syncthreads();  // the result has been read\n",
        "",
        "tsan",
        "data race",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, tmp_path: Path) -> None:
    *change, kind, said = FAULTS[fault]
    build = emulated.Build(kind, emulated.changed(tmp_path, *change), ("avgpool_conv1x1",))
    assert said in emulated.run("run_avgpool_conv1x1.py", build)


# ---- what is left to torch ----


def test_auto_leaves_to_torch_what_it_is_predicted_to_do_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    op = importlib.import_module("fasttricks.ops.avgpool_conv1x1")
    monkeypatch.setattr(op, "namespace_for", lambda name, device: "fasttricks")
    device, capabilities = torch.device("cuda", 0), backends._capabilities

    def chosen(capability: tuple[int, int], size: int, channels: int) -> bool:
        monkeypatch.setitem(capabilities, device, capability)
        x = SimpleNamespace(device=device, is_cuda=True, shape=(2, channels, 8, 8), element_size=lambda: size)
        return op._chosen(x) == "fasttricks"

    with fasttricks.backend("auto"):
        assert chosen((8, 0), 2, 1024)
        assert chosen((9, 0), 2, 256)
        assert not chosen((9, 0), 2, 512)
        assert not chosen((12, 0), 2, 2048)
        assert not chosen((8, 6), 4, 64)
    for name in ("cuda", "reference"):  # where a backend is chosen, it is taken
        monkeypatch.setattr(backends, "_forced", name)
        assert chosen((10, 0), 2, 1024)
