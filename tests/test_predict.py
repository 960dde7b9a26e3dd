"""benchmarks/predict.py: its launches are those of the ops, its bytes those that the emulator counts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from cases import LAYOUTS
from cuda_cards import Card

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing of Triton is in it", allow_module_level=True)

import emulated
import predict
from resnet50d import Layer, eager, eager_optimizer, layers, parameter_sizes

BATCH = 256
CARDS = pytest.mark.parametrize("card", list(predict.LIMITS))


@pytest.fixture(scope="module")
def of_resnet() -> dict[str, list[predict.Row]]:
    return {card: predict.predict(limits, BATCH, True) for card, limits in predict.LIMITS.items()}


class EmulatedMachine(predict.Machine):
    """The card of the emulator: csrc/cuda/launch.cuh."""

    def __init__(self, nhwc: bool, shared: int) -> None:
        card = Card(90, 4, shared, shared - 1024)
        super().__init__(predict.Limits("emulated", card, 1e12, 1e12, 1e12, 1.0, 1e-6), nhwc)

    def resident(self, kernel: str, threads: int, dynamic_bytes: int) -> int:
        room = self.limits.geometry.shared_per_sm
        return max(1, min(3, room // (dynamic_bytes + 17 * 1024))) if dynamic_bytes else 3


def same(launches: tuple[predict.Launch, ...], meter: emulated.Meter, l2: bool = True) -> None:
    assert len(launches) == meter.launches + meter.cooperative_launches
    assert sum(launch.blocks for launch in launches) == meter.blocks
    assert sum(launch.dram for launch in launches) == pytest.approx(meter.dram, rel=0.05)
    assert not l2 or sum(launch.through_l2 for launch in launches) == pytest.approx(meter.moved, rel=0.05)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shared", [0, 228 << 10, 60 << 10], ids=["several launches", "one", "a part on the chip"])
@pytest.mark.parametrize("shape", [(8, 64, 28, 28), (16, 64, 14, 14), (12, 25, 35, 31)], ids=str)
def test_launches_and_bytes_of_bn_relu_are_those_of_the_op(
    shape: tuple[int, ...], shared: int, layout: torch.memory_format
) -> None:
    library, ops = emulated.load(), torch.ops.fasttricks_emulated
    machine = EmulatedMachine(layout == torch.channels_last, shared)
    x, z, dy = (torch.randn(shape).half().contiguous(memory_format=layout) for _ in range(3))
    running = (torch.zeros(shape[1]), torch.ones(shape[1]))
    vectors = shape[1] % 8 == 0  # else every element of NHWC reads its channel's parameters
    for residual in (False, True):
        forward, backward = machine.bn_launches(shape, residual)
        with library.shared_per_sm(shared), library.metered() as meter:
            if residual:
                _, mean, var, mask = ops.bn_add_relu_forward(x, z, None, None, 1e-5, *running)
            else:
                (_, mean, var), mask = ops.bn_relu_forward(x, None, None, 1e-5, *running), None
        same(forward, meter, vectors)
        with library.shared_per_sm(shared), library.metered() as meter:
            ops.bn_relu_backward(dy, x, mask, None, None, mean, var, 1e-5, True, residual)
        same(backward, meter, vectors)
        of_two = machine.bn_launches(shape, residual, second="full")[1]
        with library.shared_per_sm(shared), library.metered() as meter:
            ops.bn_relu_backward(dy, x, mask, None, None, mean, var, 1e-5, True, residual, z)
        same(of_two, meter, vectors)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("ceil_mode", [False, True], ids=["floor", "ceil"])
@pytest.mark.parametrize("shape", [(8, 64, 28, 28), (9, 40, 14, 14), (5, 24, 13, 13)], ids=str)
def test_launches_and_bytes_of_the_pooled_output_are_those_of_the_op(
    shape: tuple[int, ...], ceil_mode: bool, layout: torch.memory_format
) -> None:
    library, ops = emulated.load(), torch.ops.fasttricks_emulated
    x, z = (torch.randn(shape).half().contiguous(memory_format=layout) for _ in range(2))
    running = (torch.zeros(shape[1]), torch.ones(shape[1]), None, 0.1)
    with library.metered() as meter:
        ops.bn_add_relu_pool_forward(x, z, None, None, 1e-5, *running, ceil_mode)
    launches = EmulatedMachine(layout == torch.channels_last, 0).bn_pool_launches(shape, 2, ceil_mode)
    same(launches, meter, shape[1] % 8 == 0 and shape[2] % 2 == 0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("pooled", [False, True], ids=["full", "pooled"])
def test_launches_and_bytes_with_a_second_gradient_are_those_of_the_op(
    pooled: bool, layout: torch.memory_format
) -> None:
    library, ops, shape = emulated.load(), torch.ops.fasttricks_emulated, (8, 64, 28, 28)
    x, z, dy, dy2 = (torch.randn(shape).half().contiguous(memory_format=layout) for _ in range(4))
    for residual in (False, True):
        _, mean, var, mask = ops.bn_add_relu_forward(x, z, None, None, 1e-5)
        given = (mask if residual else None, None, None, mean, var, 1e-5, True, residual)
        second = torch.nn.functional.avg_pool2d(dy2, 2) if pooled else dy2
        with library.shared_per_sm(1024), library.metered() as meter:
            ops.bn_relu_backward(dy, x, *given, second)
        machine = EmulatedMachine(layout == torch.channels_last, 1024)
        launches = machine.bn_launches(shape, residual, second="pooled" if pooled else "full")[1]
        same(launches, meter, not pooled)  # pixels of a window load its gradient again, from L2


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("second", ["", "full", "pooled"])
@pytest.mark.parametrize("shared", [0, 228 << 10, 60 << 10], ids=["several launches", "one", "a part on the chip"])
@pytest.mark.parametrize("shape", [(8, 64, 28, 28), (8, 64, 14, 14)], ids=str)
def test_launches_and_bytes_of_two_batch_norms_are_those_of_the_op(
    shape: tuple[int, ...], shared: int, second: str, layout: torch.memory_format
) -> None:
    library, ops = emulated.load(), torch.ops.fasttricks_emulated
    x, z, dy, dy2 = (torch.randn(shape).half().contiguous(memory_format=layout) for _ in range(4))
    running = [(torch.zeros(64), torch.ones(64), None, 0.1) for _ in range(2)]
    forward, backward = EmulatedMachine(layout == torch.channels_last, shared).bn_add_bn_launches(shape, second)
    with library.shared_per_sm(shared), library.metered() as meter:
        _, *four, mask = ops.bn_add_bn_relu_forward(x, z, None, None, None, None, 1e-5, 1e-5, *running[0], *running[1])
    same(forward, meter)
    other = {"": None, "full": dy2, "pooled": torch.nn.functional.avg_pool2d(dy2, 2)}[second]
    with library.shared_per_sm(shared), library.metered() as meter:
        ops.bn_add_bn_relu_backward(dy, x, z, mask, None, None, *four, 1e-5, 1e-5, True, other)
    same(backward, meter, second != "pooled")  # pixels of a window load its gradient again, from L2


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shared", [1024, 228 << 10], ids=["tiles", "slab"])
def test_launches_and_bytes_of_avgpool_conv1x1_are_those_of_the_op(shared: int, layout: torch.memory_format) -> None:
    library, ops = emulated.load(), torch.ops.fasttricks_emulated
    machine = EmulatedMachine(layout == torch.channels_last, shared)
    x = torch.randn(2, 64, 32, 32).half().contiguous(memory_format=layout)
    weight, dy = torch.randn(256, 64, 1, 1).half(), torch.randn(2, 256, 16, 16).half()
    dy = dy.contiguous(memory_format=layout)
    predicted = machine.avgpool_launches(tuple(x.shape), 256)
    for name, run in {
        "forward": lambda: ops.avgpool_conv1x1_forward(x, weight, None, 2, True),
        "dx": lambda: ops.avgpool_conv1x1_backward(dy, x, weight, 2, True, True, False, False),
        "dweight": lambda: ops.avgpool_conv1x1_backward(dy, x, weight, 2, True, False, True, False),
    }.items():
        with library.shared_per_sm(shared), library.metered() as meter:
            run()
        same(predicted[name], meter)


def test_launches_and_bytes_of_sgd_are_those_of_the_op() -> None:
    library, ops = emulated.load(), torch.ops.fasttricks_emulated
    params = [torch.randn(n).half() for n in (20000, 33, 8192)]
    lists = [[torch.randn_like(p) for p in params], [torch.zeros(p.shape) for p in params]]
    steps, masters = [torch.ones(()) for _ in params], [p.float() for p in params]
    found_inf = torch.zeros(())
    with library.metered() as meter:
        ops.sgd_check(lists[0], [], [], found_inf, None, None)
        ops.sgd_step(
            *(params, *lists, steps, masters, [3], [torch.tensor(0.1)], [0.9], [0.0], [1e-4], [False], [False]),
            *([0.0], 0.0, False, 0.0, None, found_inf, None, None),
        )
    (row,) = EmulatedMachine(True, 0).sgd_rows([p.numel() for p in params])
    same(row.launches, meter)


@CARDS
def test_grids_are_the_planners_and_waves_are_whole(card: str, of_resnet: dict[str, list[predict.Row]]) -> None:
    plans, sm_count = emulated.plans(), predict.LIMITS[card].geometry.sm_count
    checked = 0
    for row in of_resnet[card]:
        for launch in row.launches:
            name = launch.kernel.split("<")[0]
            others = ("bn_finalize", "bn_add_bn_finalize", "bn_update", "bn_apply_pool", "bn_pool")
            if name.startswith("bn_") and not name.startswith(others):
                n, c, h, w = row.shape
                assert (
                    launch.blocks == plans.bn_tile(plans.bn_shape(n, c, h * w, True), launch.resident * sm_count).blocks
                )
                assert 0.95 <= launch.waves <= 1
                checked += 1
    assert checked > 100


@CARDS
def test_bytes_are_the_formulas(card: str, of_resnet: dict[str, list[predict.Row]]) -> None:
    for row in of_resnet[card]:
        if not row.op.startswith("bn"):
            continue
        n = 2 * row.shape[0] * row.shape[1] * row.shape[2] * row.shape[3]
        mask, add = (n / 16, n) if row.op.startswith("bn_add") else (0, 0)
        pooled, forward = n / 4 if "pool" in row.op else 0, row.op.endswith("forward")
        taken = [launch.dynamic for launch in row.launches if "slab" in launch.kernel]
        if row.op.startswith("bn_add_bn_relu"):
            assert len(row.launches) == ((1 if taken else 5) + 2 if forward else 1 if taken else 3)
            kept = min((2 if forward else 3) * n, sum(taken))
            if forward:
                assert row.bytes == 5 * n + mask - kept
            elif row.op.endswith("dy2"):
                assert row.bytes == pytest.approx(10 * n + mask - 4 * kept / 3)
            else:
                assert row.bytes == pytest.approx(8 * n - kept + (2 - kept / (3 * n)) * mask)
            continue
        assert len(row.launches) == (1 if taken else 3) + forward
        if forward:
            assert row.bytes == 3 * n + add + mask + pooled - min(n, sum(taken))
        elif row.op.endswith("dy2"):
            assert row.bytes == 6 * n + (pooled or n) + mask - min(2 * n, sum(taken))
        else:
            kept = min(2 * n, sum(taken))
            assert row.bytes == pytest.approx(5 * n + add - kept + (2 - kept / (2 * n)) * mask)
    (optimizer,) = [row for row in of_resnet[card] if row.op == "sgd"]
    assert optimizer.bytes == 24 * sum(parameter_sizes())


@CARDS
def test_no_launch_is_faster_than_its_card(card: str, of_resnet: dict[str, list[predict.Row]]) -> None:
    limits = predict.LIMITS[card]
    for row in of_resnet[card]:
        for launch in row.launches:
            assert launch.seconds >= limits.launch + max(launch.dram / limits.dram, launch.through_l2 / limits.l2)
    served = [row for row in of_resnet[card] if row.op.startswith("bn")]
    assert sum(row.seconds for row in served) < sum(row.eager_seconds for row in served)


def test_layers_of_resnet50d() -> None:
    found = layers(2)
    count = {kind: sum(layer.kind == kind for layer in found) for kind in ("bn_relu", "bn_add_relu", "bn", "pool")}
    assert count == {"bn_relu": 35, "bn_add_relu": 16, "bn": 4, "pool": 3}
    adding = [layer for layer in found if layer.kind == "bn_add_relu"]
    assert [sum(getattr(a, what) for a in adding) for what in ("projection", "forked", "pooled")] == [4, 15, 3]
    assert adding[-1].shape == (2, 2048, 7, 7)
    assert sum(parameter_sizes()) == 25_576_264


def test_what_eager_moves() -> None:
    n = 2 * 4 * 8 * 16 * 16
    of = {kind: eager(Layer("", kind, (4, 8, 16, 16))) for kind in ("bn_relu", "bn_add_relu", "bn", "pool", "fork")}
    assert {kind: (f.bytes / n, b.bytes / n) for kind, (f, b) in of.items()} == {
        **{"bn_relu": (5, 8), "bn_add_relu": (8, 8), "bn": (3, 5), "pool": (1.25, 1.25), "fork": (0, 3)},
    }
    assert eager_optimizer([10, 20]).bytes == 52 * 30
    assert eager_optimizer([10, 20]).launches == 5


def test_output_says_that_it_is_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "rows.json"
    monkeypatch.setattr("sys.argv", ["predict.py", "--card", "a100", "--batch", "4", "--json", str(target)])
    predict.main()
    said = capsys.readouterr().out
    assert said.count("predicted: no card has run this") == 2
    assert "A100, batch 4, NHWC" in said
    rows = json.loads(target.read_text())
    assert {row["predicted"] for row in rows} == {"predicted: no card has run this"}
    assert {row["op"].split()[0] for row in rows} == {"bn_relu", "bn_add_relu", "bn_add_bn_relu", "sgd"}


def test_an_unknown_card_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="card is 'v100'; accepted: a100, h100, b200, l40s"):
        predict.limits_of("v100")
    monkeypatch.setattr("sys.argv", ["predict.py", "--card", "rtx9090"])
    with pytest.raises(SystemExit):
        predict.main()
    assert "card is 'rtx9090'" in capsys.readouterr().err
    assert predict.limits_of("NVIDIA H100 80GB HBM3").name == "H100"
