"""How bn_relu's launches fill a card: whole waves, even shares, one launch where the tensor stays on the chip."""

from __future__ import annotations

import itertools
import os
import random
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_cards import BATCH_NORMS, BATCHES, CARDS

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing of Triton is in it", allow_module_level=True)

import emulated
import predict


@pytest.fixture(scope="module")
def plans() -> ModuleType:
    return emulated.plans()


def first_units(tiling: Any) -> list[int]:
    return [tiling.first_unit(block) for block in range(tiling.blocks + 1)]


SHAPES = [
    pytest.param(card, nhwc, id=f"{card}-{'NHWC' if nhwc else 'NCHW'}") for card in CARDS for nhwc in (False, True)
]


@pytest.mark.parametrize(("card", "nhwc"), SHAPES)
def test_no_wave_is_left_unfilled(plans: ModuleType, card: str, nhwc: bool) -> None:
    """Whatever number of blocks a multiprocessor holds, and none has more than one unit of rows beyond its share.

    A block's share of the units of small tensors is below 20; there the unit that one block has and another has not
    spreads over the multiprocessors.
    """
    sm_count = CARDS[card].sm_count
    for (c, size), n, resident in itertools.product(BATCH_NORMS, BATCHES, (1, 2, 3, 4, 5, 8)):
        slots = sm_count * resident
        t = plans.bn_tile(plans.bn_shape(n, c, size * size, nhwc), slots)
        work = t.tiles * t.units
        waves = t.blocks / slots
        lost = 1 - waves / max(1, -(-t.blocks // slots))
        assert t.blocks <= slots
        assert lost <= 0.05 or t.blocks == work // 2, f"{waves} waves of {c} x {size} x {size}, batch {n}"
        shares = [b - a for a, b in itertools.pairwise(first_units(t))]
        assert max(shares) - min(shares) <= 1
        # blocks go to the multiprocessors in turn
        of_one = [sum(shares[sm::sm_count]) for sm in range(sm_count)]
        assert max(of_one) - min(of_one) <= max(1, resident)
        if work >= 40 * sm_count:
            assert 1 - work / sm_count / max(of_one) <= 0.05


@pytest.mark.parametrize(("card", "nhwc"), SHAPES)
def test_no_wave_of_the_pooled_output_is_left_unfilled(card: str, nhwc: bool) -> None:
    """Of the pass that writes y and its means, at the end of the stages of ResNet-50-D."""
    has = CARDS[card]
    machine = predict.Machine(predict.Limits(card, has, 1e12, 1e12, 1e12, 1.0, 1e-6), nhwc)
    for (c, size), n in itertools.product(((256, 56), (512, 28), (1024, 14)), BATCHES):
        (launch,) = (one for one in machine.bn_pool_launches((n, c, size, size)) if "pool" in one.kernel)
        assert launch.kernel.startswith("bn_apply_pool_pixels" if nhwc else "bn_apply_pool_lines")
        assert 0.95 <= launch.waves <= 1, (c, n)


@pytest.mark.parametrize(("card", "nhwc"), SHAPES)
def test_no_wave_at_the_end_of_a_block_is_left_unfilled(card: str, nhwc: bool) -> None:
    """Of the passes over two gradients and over two BatchNorms."""
    machine = predict.Machine(predict.Limits(card, CARDS[card], 1e12, 1e12, 1e12, 1.0, 1e-6), nhwc)
    for (c, size), n in itertools.product(((256, 56), (512, 28), (1024, 14), (2048, 7)), BATCHES):
        shape = (n, c, size, size)
        made = [launch for add in (True, False) for launch in machine.bn_launches(shape, add, second="full")[1]]
        for second in ("", "full"):
            made += itertools.chain(*machine.bn_add_bn_launches(shape, second))
        checked = [one for one in made if not one.kernel.startswith(("bn_finalize", "bn_add_bn_finalize", "bn_update"))]
        # two gradients: one launch or two; two BatchNorms: forward one or three, backward one or two
        assert 2 + 2 * 2 <= len(checked) <= 2 * 2 + 2 * 5
        for one in checked:
            least = 0.95 if c * size * size * n > 3e6 else 0.5
            assert least <= one.waves <= 1, (one.kernel, shape)


def test_blocks_share_tiles_as_the_reduction_expects(plans: ModuleType) -> None:
    """Every unit has one block, and no tile more blocks than it has places for partial results."""
    for _ in range(60):
        n, c, hw = random.randint(1, 300), random.choice((1, 3, 8, 24, 64, 100, 513)), random.choice((1, 4, 49, 200))
        nhwc, most = random.random() < 0.5, random.randint(1, 700)
        t = plans.bn_tile(plans.bn_shape(n, c, hw, nhwc), most)
        firsts, blocks = first_units(t), [t.block_of(unit) for unit in range(t.tiles * t.units)]
        assert (firsts[0], firsts[-1]) == (0, t.tiles * t.units)
        for block, (a, b) in enumerate(itertools.pairwise(firsts)):
            assert a < b
            assert set(blocks[a:b]) == {block}
        for tile in range(t.tiles):
            owners = set(blocks[tile * t.units : (tile + 1) * t.units])
            assert max(owners) - min(owners) + 1 == len(owners) <= t.parts


def test_dividers(plans: ModuleType) -> None:
    def numbers(bits: int) -> list[int]:
        edges = [2**k + d for k in range(bits) for d in (-1, 0, 1)]
        return [n for n in (*edges, *(random.getrandbits(random.randint(1, bits)) for _ in range(40))) if n >= 0]

    for divider, bits in ((plans.Divider, 31), (plans.LongDivider, 63)):
        dividends = [n for n in numbers(bits) if n < 2**bits]
        for by in sorted({d for d in numbers(bits - 1) if 0 < d < 2 ** (bits - 1)}):
            for n in (*random.sample(dividends, 20), by - 1, by, 2**bits - 1):
                assert divider(by).divide(n) == n // by, (divider, n, by)


def test_what_stays_on_the_chip(plans: ModuleType) -> None:
    """Everything with two blocks per multiprocessor or one, else a part with two; all blocks are resident."""
    of_h100 = set()
    for (card, has), (c, size), n, nhwc in itertools.product(CARDS.items(), BATCH_NORMS, BATCHES, (False, True)):
        taken, shape = 2 * n * c * size * size, plans.bn_shape(n, c, size * size, nhwc)
        for arrays in (1, 2, 3):
            # a thread of one block has a row more than one of another; the last rows of a tile need not be whole units
            room = has.shared_per_block - plans.BN_SLAB_STATIC
            plan = plans.bn_slab_plan(shape, has.sm_count, 2, arrays, room)
            assert plan.bytes <= room
            fits, most = plan.kept_rows == plan.rows, has.sm_count * room
            assert not fits or taken * arrays <= most
            assert fits or taken * arrays >= 0.85 * most, (card, c, size, n)
            if card == "H100" and fits and arrays == 1:
                of_h100.add((n, c, size))
            room = has.shared_per_sm // 2 - plans.BN_SLAB_STATIC
            part = plans.bn_slab_plan(shape, 2 * has.sm_count, 2, arrays, room)
            kept = part.tiling.blocks * part.bytes
            if not fits:
                assert part.kept_rows < part.rows
                assert room - part.bytes < part.bytes / part.kept_rows, "there is no room for another row"
                share = kept / (taken * arrays)
                assert plans.bn_slab_saves(part) or share < 1 / 30
                assert not plans.bn_slab_saves(part) or share > 1 / 34
    assert {(32, 256, 28), (64, 512, 14), (256, 512, 7)} <= of_h100


def test_launches_are_as_planned() -> None:
    """Of the emulated card: 4 multiprocessors with 3 blocks each, and a warp per channel in between."""
    library, ops = emulated.load(), torch.ops.fasttricks_emulated
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(8, 64, 28, 28, dtype=torch.float16).contiguous(memory_format=layout)
        with library.shared_per_sm(0), library.metered() as meter:
            ops.bn_relu_forward(x, None, None, 1e-5)
        assert (meter.launches, meter.blocks) == (3, 12 + 64 // 8 + 12)


@pytest.mark.parametrize("shape", [(6, 64, 14, 14), (5, 24, 7, 7), (1, 24, 56, 56), (40, 512, 2, 2)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shared", [0, 228 << 10, 60 << 10], ids=["three launches", "one", "a part on the chip"])
def test_bank_conflicts(shape: tuple[int, ...], layout: torch.memory_format, shared: int) -> None:
    """Of reductions, parameters and what is kept on the chip: a tenth more wavefronts than without any."""
    library, ops = emulated.load(), torch.ops.fasttricks_emulated
    x, z, dy = (torch.randn(shape).half().contiguous(memory_format=layout) for _ in range(3))
    weight = torch.ones(shape[1])
    with library.shared_per_sm(shared), library.metered(conflicts=True) as meter:
        _, mean, var, mask = ops.bn_add_relu_forward(x, z, weight, None, 1e-5)
        ops.bn_relu_backward(dy, x, mask, weight, None, mean, var, 1e-5, True, True)
    assert meter.least_wavefronts > 0
    assert meter.conflicts <= 1.1
