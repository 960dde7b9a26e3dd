"""sgd's CUDA kernels without a GPU: launches, thread orders, pieces of tensors, sanitizers, planted faults."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this file tests no Triton kernel", allow_module_level=True)

import emulated
import run_sgd


def test_every_order_of_threads_gives_the_same_bits() -> None:
    """Norms, clipping, LARS, a first and a second step, over mixed dtypes."""
    library, given, results = emulated.load(), run_sgd.state(), []
    for schedule in emulated.SCHEDULES:
        with library.schedule(**schedule):
            results.append(run_sgd.run(torch.ops.fasttricks_emulated, run_sgd.copy(given)))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_misaligned_tensors_give_the_same_bits() -> None:
    emulated.load()

    def moved(t: torch.Tensor) -> torch.Tensor:
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)

    given = run_sgd.state()
    other = {name: [moved(t) for t in tensors] for name, tensors in given.items()}
    results = [run_sgd.run(torch.ops.fasttricks_emulated, s) for s in (given, other)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def plain_step(params: list[torch.Tensor], steps: list[torch.Tensor], found_inf: torch.Tensor | None = None) -> None:
    buffers, lr = [torch.zeros_like(p) for p in params], torch.full((), 0.5)
    tail = ([0.9], [0.0], [0.0], [False], [False], [0.0], 0.0, False, 0.0, None, found_inf, None, None)
    grads = [torch.ones_like(p) for p in params]
    torch.ops.fasttricks_emulated.sgd_step(params, grads, buffers, steps, [], [len(params)], [lr], *tail)


def test_many_tensors_take_several_launches() -> None:
    library = emulated.load()
    params, steps = [torch.ones(3) for _ in range(900)], [torch.zeros(()) for _ in range(900)]
    with library.metered() as meter:
        plain_step(params, steps)
    assert meter.launches == 2
    assert all((p == 0.5).all() for p in params)
    assert all(s == 1 for s in steps)


@pytest.mark.parametrize("schedule", emulated.SCHEDULES, ids=str)
def test_every_block_sees_a_first_step_and_it_is_counted_once(schedule: dict) -> None:
    library = emulated.load()
    params, steps = [torch.ones(100_000), torch.ones(0)], [torch.zeros(()), torch.full((), 7.0)]
    with library.schedule(**schedule):
        plain_step(params, steps)
        assert (params[0] == 0.5).all()
        assert [float(s) for s in steps] == [1, 8]
        plain_step(params, steps, found_inf=torch.ones(()))
        assert (params[0] == 0.5).all()
        assert [float(s) for s in steps] == [1, 8]
        plain_step(params, steps, found_inf=torch.zeros(()))
        assert [float(s) for s in steps] == [2, 9]


def test_a_check_is_one_launch_and_two_with_norms() -> None:
    library, ops, grads = emulated.load(), torch.ops.fasttricks_emulated, [torch.randn(9000), torch.randn(5)]
    with library.metered() as meter:
        ops.sgd_check(grads, [], [], torch.zeros(()), None, None)
    assert meter.launches == 1
    with library.metered() as meter:
        ops.sgd_check(grads, [], [], torch.zeros(()), torch.empty(2, dtype=torch.float64), None)
    assert meter.launches == 2


def test_squares_are_summed_in_float32_where_that_is_safe() -> None:
    """Eight at a time, and in float64 where they would overflow or vanish: at 1/64 of the rate on many cards."""
    emulated.load()

    def square_of(value: float) -> float:
        sums = torch.empty(1, dtype=torch.float64)
        torch.ops.fasttricks_emulated.sgd_check([torch.full((8,), value)], [], [], torch.zeros(()), sums, None)
        return float(sums) / 8

    near_one = 1 + 2.0**-12
    assert square_of(near_one) == 1 + 2.0**-11  # the square has a 2^-24, too
    for value in (1e25, 1e-25, 3e38, 1e-40):
        exact = float(torch.tensor(value)) ** 2
        assert abs(square_of(value) / exact - 1) < 1e-12
    assert square_of(0.0) == 0


# ---- other builds ----


@pytest.mark.parametrize("kind", ["plain", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("asan", "tsan"))])
def test_steps_are_right_in_every_build(kind: str) -> None:
    assert emulated.run("run_sgd.py", emulated.Build(kind)) == ""


@pytest.mark.long
def test_a_tensor_in_several_pieces_is_stepped_once(tmp_path: Path) -> None:
    """As tensors beyond 2^31 values; in this build, beyond 8192."""
    csrc = emulated.changed(tmp_path, "sgd_plan.h", "kSgdPiece = int64_t{1} << 31;", "kSgdPiece = kSgdBlock;")
    assert emulated.run("run_sgd.py", emulated.Build(csrc=csrc, ops=("sgd",))) == ""


# fault -> text of sgd.cuh, its replacement, build, expected output
FAULTS = {
    "barrier after the scalars removed": (
        "  __syncthreads();\n  const SgdScalars s",
        "  const SgdScalars s",
        "plain",
        "wrong",
    ),
    "values past the last one read": (
        "j < count ? load(p + j)",
        "j <= count ? load(p + j)",
        "asan",
        "heap-buffer-overflow",
    ),
    "a step counted before all have seen it": (
        "} else if (atomicAdd(bits, 1u) + 1 == end - begin) {",
        "} else if (atomicAdd(bits, 1u) + 1 == 1 + 0 * (end - begin)) {",
        "plain",
        "wrong",
    ),
    "sums of warps never written": (
        "  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;\n",
        "  if (threadIdx.x == 0) scratch[threadIdx.x / 32] = v;\n",
        "plain",
        "wrong",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, tmp_path: Path) -> None:
    *change, kind, said = FAULTS[fault]
    build = emulated.Build(kind, emulated.changed(tmp_path, "sgd.cuh", *change), ("sgd",))
    assert said in emulated.run("run_sgd.py", build)
