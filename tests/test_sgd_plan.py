"""The launch plan of the SGD kernels: which tensors share a launch, and the bytes of its kernel parameters."""

from __future__ import annotations

import itertools
import random
from types import ModuleType
from typing import Any

import emulated
import pytest
import torch

from fasttricks.optim import param_groups

LIMIT, OLD_LIMIT = 32764, 4096  # bytes of kernel parameters since CUDA 12.1, and before
CHECK, STEP_FP32, STEP_HALF = 1, 4, 5  # pointers per entry: gradient; parameter, momentum and count; master


@pytest.fixture(scope="module")
def plans() -> ModuleType:
    return emulated.plans()


def plan(plans: ModuleType, numels: list[int], keys: list[int], pointers: int, limit: int = LIMIT) -> list[Any]:
    return plans.sgd_plan(list(map(plans.SgdTensor, numels, keys)), pointers, limit)


def check(plans: ModuleType, numels: list[int], keys: list[int], pointers: int, limit: int) -> list[Any]:
    """Asserts that each value and each block is in one entry, each group has one key, each table fits the limit."""
    launches = plan(plans, numels, keys, pointers, limit)
    done = [0] * len(numels)
    counted = [0] * len(numels)
    for launch in launches:
        assert launch.bytes <= limit
        assert launch.bytes == plans.sgd_layout(len(launch.entries), len(launch.group_starts), pointers).bytes
        blocks = 0
        for e in launch.entries:
            assert e.begin == done[e.tensor]  # in order, no gap
            assert 0 <= e.count <= plans.SGD_PIECE
            assert e.first_block == blocks
            blocks += max(1, -(-e.count // plans.SGD_BLOCK))
            done[e.tensor] += e.count
            counted[e.tensor] += e.last
            assert e.last == (done[e.tensor] == numels[e.tensor])
        assert blocks == launch.blocks
        assert launch.group_starts[0] == 0
        for start, end in itertools.pairwise([*launch.group_starts, len(launch.entries)]):
            assert len({keys[e.tensor] for e in launch.entries[start:end]}) == 1
        firsts = [e.first_block for e in launch.entries]
        for block in {0, blocks - 1, *random.sample(range(blocks), min(blocks, 50))}:
            e = launch.entries[plans.sgd_find(firsts, block)]
            assert 0 <= block - e.first_block < max(1, -(-e.count // plans.SGD_BLOCK))
    assert done == numels
    assert counted == [1] * len(numels)
    return launches


@pytest.mark.parametrize("limit", [LIMIT, OLD_LIMIT, 200])
@pytest.mark.parametrize("pointers", [CHECK, STEP_FP32, STEP_HALF])
def test_random_tensors_are_covered_once(plans: ModuleType, pointers: int, limit: int) -> None:
    random.seed(torch.initial_seed())
    edges = [0, 1, plans.SGD_BLOCK - 1, plans.SGD_BLOCK, plans.SGD_BLOCK + 1]
    numels = [random.choice([*edges, random.randrange(10**6)]) for _ in range(random.randrange(1, 300))]
    check(plans, numels, [random.randrange(4) for _ in numels], pointers, limit)


def test_tensors_beyond_32_bits_are_cut(plans: ModuleType) -> None:
    """Only the last piece counts the step, also if the pieces are in several launches."""
    numels = [5, 2 * plans.SGD_PIECE + 7, plans.SGD_PIECE]
    assert [e.count for e in check(plans, numels, [0, 0, 0], STEP_HALF, LIMIT)[0].entries] == [
        5,
        plans.SGD_PIECE,
        plans.SGD_PIECE,
        7,
        plans.SGD_PIECE,
    ]
    assert len(check(plans, numels, [0, 0, 0], STEP_HALF, 200)) > 1


def test_arrays_of_a_table_do_not_overlap(plans: ModuleType) -> None:
    """They are aligned to their elements."""
    for entries, groups, pointers in ((1, 1, 1), (7, 3, 5), (604, 4, 5)):
        layout = plans.sgd_layout(entries, groups, pointers)
        at = [layout.groups, layout.pointers, layout.counts, layout.first_blocks, layout.tensors, layout.bytes]
        sizes = [groups * 48, entries * pointers * 8, entries * 4, entries * 4, entries * 2]
        assert [b - a for a, b in itertools.pairwise(at)] == sizes
        assert all(offset % align == 0 for offset, align in zip(at, (8, 8, 4, 4, 2), strict=False))


def test_impossible_limits_give_no_plan(plans: ModuleType) -> None:
    assert plan(plans, [3], [0], STEP_HALF, 100) == []
    assert plan(plans, [1] * (2**16 + 1), [0] * (2**16 + 1), CHECK) == []
    assert plan(plans, [], [], CHECK) == []


# model of torchvision, its tensors, launches of a step with 4,096 bytes of kernel parameters
MODELS = [("resnet50", 161, 4), ("vgg16", 32, 2), ("vgg16_bn", 58, 2), ("densenet201", 604, 11)]


@pytest.mark.parametrize(("name", "count", "before"), MODELS)
@pytest.mark.parametrize("batch_norm", [torch.float16, torch.float32])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_step_of_a_network_is_two_launches(
    plans: ModuleType, name: str, count: int, before: int, batch_norm: torch.dtype, groups: int
) -> None:
    """One for the check and one for the step, in fp16 with masters and momentum, in one or two parameter groups."""
    build: Any = getattr(pytest.importorskip("torchvision").models, name)
    with torch.device("meta"):
        model = build().half()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.to(batch_norm)
    numels, keys = [], []
    for i, group in enumerate(param_groups(model, 1e-4, no_bias_decay=groups == 2)):
        for p in group["params"]:
            numels.append(p.numel())
            keys.append(2 * i + (p.dtype is torch.float16))
    assert len(numels) == count
    launches = [check(plans, numels, keys, pointers, LIMIT) for pointers in (CHECK, STEP_HALF)]
    assert sum(map(len, launches)) == 2
    old = [check(plans, numels, keys, pointers, OLD_LIMIT) for pointers in (CHECK, STEP_HALF)]
    assert sum(map(len, old)) == before
