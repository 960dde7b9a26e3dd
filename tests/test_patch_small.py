"""fasttricks.fuse on small tensors, whose pairs call their modules: min_elements, and its default on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_patch import WHOLE, Block, X, pair_of, same, taken
from torch import nn

import fasttricks
from fasttricks.nn import run


@pytest.mark.parametrize("name", ["bn_relu", "bn_add_relu", "avgpool_conv1x1"])
def test_a_pair_on_few_elements_calls_its_modules(name: str) -> None:
    """The inputs of the pairs have 6 channels and 8x8, 4x4 and 8x8 pixels an image."""
    pixels = 16 if name == "bn_add_relu" else 64
    _, plain = pair_of(Block)
    alone = {kind: kind == name for kind in WHOLE}
    fused = fasttricks.fuse(copy.deepcopy(plain), min_elements=3 * 6 * pixels, **alone)
    for images, count in ((2, 0), (3, 1), (5, 1)):
        assert taken(copy.deepcopy(fused), torch.randn(images, *X[1:]).double()) == ({name: 1} if count else {})
    same(fused, plain, lambda: torch.randn(2, *X[1:]).double(), 1e-10)
    assert taken(fasttricks.fuse(fused), torch.randn(1, *X[1:]).double()) == WHOLE


def test_by_default_batchnorms_of_few_elements_call_their_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where autograd records; pools do not, and with recompute, whose user wants the memory, none."""
    monkeypatch.setattr(run, "SMALL_ON_CPU", 3 * 6 * 64)
    _, plain = pair_of(Block)
    fused, recomputing = fasttricks.fuse(copy.deepcopy(plain)), fasttricks.fuse(copy.deepcopy(plain), recompute=True)
    few, enough = (torch.randn(images, *X[1:]).double() for images in (2, 12))
    pool = {"avgpool_conv1x1": 1}
    assert taken(copy.deepcopy(fused), few) == pool
    assert taken(copy.deepcopy(fused), enough) == WHOLE
    assert taken(copy.deepcopy(recomputing), few) == WHOLE
    with torch.no_grad():
        assert taken(copy.deepcopy(fused), few) == WHOLE
    same(fused, plain, lambda: torch.randn(2, *X[1:]).double(), 1e-10)
    norm = fasttricks.fuse(pytest.importorskip("timm.layers").BatchNormAct2d(6))
    assert [taken(norm, torch.randn(n, 6, 8, 8)) for n in (2, 3)] == [{}, {"bn_relu": 1}]


def test_compiled_graphs_hold_the_op_for_every_size() -> None:
    made: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = fasttricks.fuse(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()), min_elements=4 * 6 * 64)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for images in (2, 9, 3):
        compiled(torch.randn(images, *X[1:]))
    assert len(made) == 1
    assert any("bn_relu_forward" in str(node.target) for node in made[0].graph.nodes)


def test_timms_norm_with_few_elements_or_other_dimensions() -> None:
    norm = fasttricks.fuse(pytest.importorskip("timm.layers").BatchNormAct2d(6), min_elements=200)
    plain = fasttricks.unfuse(copy.deepcopy(norm))
    for shape, count in (((2, 6, 4, 4), {}), ((3, 6, 4, 4), {"bn_relu": 1})):
        x = torch.randn(shape)
        plain.train()(x)
        assert taken(norm.train(), x) == count
        torch.testing.assert_close(norm.eval()(x), plain.eval()(x))
    for module in (norm, plain):
        with pytest.raises(AssertionError, match="expected 4D input"):
            module(torch.randn(2, 6, 4))
