"""benchmarks/step_traffic.py: one training step's bytes, launches and saved bytes, against formulas."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing of Triton is in it", allow_module_level=True)

import step_traffic
from resnet50d import layers
from step_traffic import BATCH, Metered, Step, along_the_residual, metered, saved_bytes, steps

pytestmark = pytest.mark.xdist_group("step_traffic")  # one process meters the layers once


@pytest.fixture(scope="module")
def ops() -> Metered:
    return Metered()


@pytest.fixture(scope="module")
def made(ops: Metered) -> dict[str, Step]:
    return {step.side: step for step in steps()}


def test_ops_move_what_their_formulas_say(ops: Metered) -> None:
    checked = set()
    for layer in layers(BATCH):
        if layer.kind not in ("bn_relu", "bn_add_relu"):
            continue
        add, mask = (layer.bytes, layer.elements / 8) if layer.kind == "bn_add_relu" else (0, 0)
        kept = ops.kept(layer.shape, layer.kind == "bn_add_relu")
        reads = [2 - share for share in kept]
        forward, backward = metered(layer, ops)
        assert forward.bytes == pytest.approx((reads[0] + 1) * layer.bytes + add + mask, rel=0.02)
        assert backward.bytes == pytest.approx((2 * reads[1] + 1) * layer.bytes + add + reads[1] * mask, rel=0.02)
        # also that of the running statistics
        assert (forward.launches, backward.launches) == (2 if kept[0] else 4, 1 if kept[1] else 3)
        checked.add(tuple("all" if share == 1 else "part" if share else "none" for share in kept))
    assert checked == {("all", "all"), ("all", "part"), ("part", "part")}, "all variants are in it"


def test_a_second_gradient_keeps_as_much(ops: Metered) -> None:
    for layer in layers(BATCH):
        if layer.kind == "bn_add_relu" and layer.forked and not layer.projection:
            (_, kept), second = ops.kept(layer.shape, True, two=True), layer.bytes / (4 if layer.pooled else 1)
            cost = ops.bn_with_second_gradient(layer.shape, layer.pooled)
            formula = (6 - 2 * kept) * layer.bytes + second + layer.elements / 8
            assert cost.bytes == pytest.approx(formula, rel=0.03)
            assert cost.launches == (1 if kept else 3)


def test_two_batch_norms_keep_as_much_as_they_should(ops: Metered) -> None:
    shares = []
    for layer in layers(BATCH):
        if not layer.projection:
            continue
        second = "full" if layer.forked else ""
        kept, (forward, backward) = ops.kept_of_pair(layer.shape, second), ops.bn_add_bn(layer.shape, second)
        assert forward.bytes == pytest.approx((5 - 2 * kept[0]) * layer.bytes + layer.elements / 8, rel=0.02)
        assert backward.bytes == pytest.approx((10 - 4 * kept[1]) * layer.bytes + layer.elements / 8, rel=0.02)
        # also those of the running statistics
        assert (forward.launches, backward.launches) == (3 if kept[0] else 7, 1 if kept[1] else 3)
        shares.append(tuple(share > 0 for share in kept))
    assert shares == [(True, False), (True, True), (True, True), (True, True)]


def test_bytes_of_a_step(made: dict[str, Step]) -> None:
    """The goal of ops along the residual is 55% of eager's bytes."""
    share = {side: step.bytes / made["eager"].bytes for side, step in made.items()}
    assert share["each op by itself"] <= 0.67
    assert share["along the residual"] <= 0.55
    normalised = sum(layer.bytes for layer in layers(BATCH) if layer.kind.startswith("bn"))
    assert 13 * normalised < made["eager"].bytes < 16 * normalised + 3e9


def test_saved_bytes_are_those_of_inputs_outputs_and_masks(made: dict[str, Step]) -> None:
    """Of eager the input of each BatchNorm and the output of each ReLU; of ours the input, and a bit per element."""
    found = [layer for layer in layers(BATCH) if layer.kind.startswith("bn")]
    inputs = sum(layer.bytes for layer in found)
    outputs = sum(layer.bytes for layer in found if layer.kind != "bn")
    masks = sum(layer.elements / 8 for layer in found if layer.kind == "bn_add_relu")
    assert made["eager"].saved == pytest.approx(inputs + outputs, rel=1e-3)
    assert made["each op by itself"].saved == pytest.approx(inputs + masks, rel=1e-3)


def test_saved_bytes_grow_with_the_batch() -> None:
    one, two, three = (saved_bytes(True, batch) for batch in (1, 2, 3))
    assert three - two == two - one > 0


def test_every_layer_moves_less_along_the_residual(ops: Metered) -> None:
    """Together with the shortcut's BatchNorm and the additions that it makes unnecessary."""
    shares = []
    for passes in (metered, along_the_residual):
        of_kind: dict[str, float] = {}
        for layer in layers(BATCH):
            moved = sum(cost.bytes for cost in passes(layer, ops))
            of_kind[layer.kind] = of_kind.get(layer.kind, 0.0) + moved
        shares.append(of_kind)
    alone, along = shares
    assert along["bn_relu"] == alone["bn_relu"]
    for kind in ("bn", "fork", "pool"):
        assert along[kind] < alone[kind]
    joined = ("bn_add_relu", "bn", "fork")
    assert sum(along[kind] for kind in joined) < 0.8 * sum(alone[kind] for kind in joined)


def test_lines(made: dict[str, Step], capsys: pytest.CaptureFixture[str]) -> None:
    step_traffic.show(list(made.values()))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4
    assert "batch 256" in said[0]
