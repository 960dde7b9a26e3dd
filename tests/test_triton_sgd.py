"""sgd in Triton: launches, tables, entries and blocks, misaligned tensors, bytes. For values see test_sgd.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import triton.language as tl
from cases import triton_device
from triton_meter import metered

DEVICE = triton_device()

from fasttricks.kernels import launch as launching  # noqa: E402
from fasttricks.kernels import sgd  # noqa: E402
from fasttricks.kernels import sgd_kernels as kernels  # noqa: E402

HALF = torch.float16


class State:
    """Parameters of `sizes`, two in three of them half, and the other arguments of sgd_check and sgd_step."""

    def __init__(self, sizes: list[int], dtypes: tuple[torch.dtype, ...] = (HALF, torch.float32, HALF)) -> None:
        self.params = [torch.randn(n).to(dtypes[i % len(dtypes)]).to(DEVICE) for i, n in enumerate(sizes)]
        self.grads = [torch.randn_like(p) for p in self.params]
        self.masters = [p.float() for p in self.params if p.dtype == HALF]
        self.buffers = [torch.full_like(p, math.nan, dtype=torch.float32) for p in self.params]
        self.steps = [torch.zeros((), device=DEVICE) for _ in self.params]
        self.lr, self.found_inf = torch.tensor(0.1, device=DEVICE), torch.zeros((), device=DEVICE)
        self.squares = [torch.empty(len(sizes), dtype=torch.float64, device=DEVICE) for _ in range(2)]

    def check(self) -> None:
        sgd.sgd_check(self.grads, self.params, self.masters, self.found_inf, *self.squares)

    def step(self) -> None:
        """With clipping and LARS."""
        lists = self.params, self.grads, self.buffers, self.steps, self.masters
        tail = ([0.9], [0.0], [1e-2], [True], [False], [1e-2], 0.0, False, 3.0, None, self.found_inf, *self.squares)
        sgd.sgd_step(*lists, [len(self.params)], [self.lr], *tail)

    def results(self) -> list[torch.Tensor]:
        self.check()
        self.step()
        self.step()
        return [*self.params, *self.masters, *self.buffers, *self.steps, *self.squares]

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> State:
        """The same state with every tensor replaced by move(tensor)."""
        other = State.__new__(State)
        other.__dict__ = dict(self.__dict__)
        for name in ("params", "grads", "masters", "buffers", "steps", "squares"):
            setattr(other, name, [move(t) for t in getattr(self, name)])
        return other


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched, in order."""
    names: list[str] = []
    launch = launching.launch

    def noted(kernel: object, *rest: object) -> None:
        names.append(kernel.__name__)
        launch(kernel, *rest)

    monkeypatch.setattr(launching, "launch", noted)
    return names


def test_the_table_is_written_once(launched: list[str]) -> None:
    state = State([9000, 5, 0, 64], dtypes=(HALF,))
    state.check()
    assert launched == ["sgd_table_kernel", *["sgd_check_kernel"] * 4, "sgd_norms_kernel"]
    state.step()
    del launched[:]
    state.step()
    # tensors of odd lengths take a launch of their own
    assert launched == ["sgd_step_kernel", "sgd_step_kernel", "sgd_count_kernel"]
    state.grads = [g.clone() for g in state.grads]
    del launched[:]
    state.step()
    assert launched[0] == "sgd_table_kernel"
    assert [float(s) for s in state.steps] == [3, 3, 3, 3]


def test_many_tensors_of_many_blocks_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """More entries than a block searches at once, tables with several launches, and small blocks."""
    if launching.INTERPRETED:
        monkeypatch.setattr(kernels, "SEARCH", tl.constexpr(16))
    state = State([24 if i % 7 else i % 5 for i in range(40 if launching.INTERPRETED else 280)])
    small = State([500, 499, 16, 0, 257])
    wants = [s.moved(torch.clone).results() for s in (state, small)]
    exact = [torch.stack([g.double().square().sum() for g in s.grads]) for s in (state, small)]
    monkeypatch.setattr(sgd, "BLOCK", 64)
    monkeypatch.setattr(sgd, "TILE", 32)
    sgd.plan.cache_clear()
    try:
        for s, want, square in zip((state, small), wants, exact, strict=True):
            got = s.moved(torch.clone)
            got.check()
            torch.testing.assert_close(got.squares[0], square, rtol=1e-12, atol=0)
            got.squares = [q.clone() for q in want[-2:]]  # they were summed in another order
            got.step()
            got.step()
            mine = [*got.params, *got.masters, *got.buffers, *got.steps]
            assert all(torch.equal(a, b) for a, b in zip(mine, want, strict=False))
    finally:
        sgd.plan.cache_clear()


def test_misaligned_tensors_give_the_same_bits() -> None:
    state = State([4096, 64, 8])

    def off(t: torch.Tensor) -> torch.Tensor:
        return torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)

    wants, gots = state.moved(torch.clone).results(), state.moved(off).results()
    assert all(torch.equal(a, b) for a, b in zip(wants, gots, strict=True))


def test_a_count_given_twice_is_counted_twice() -> None:
    state = State([8, 8], dtypes=(torch.float32,))
    state.check()
    state.steps = [state.steps[0]] * 2
    state.step()
    assert state.steps[0] == 2
    assert all(b.isfinite().all() for b in state.buffers), "both were first steps"


def test_any_layout_of_a_momentum_buffer_is_kept() -> None:
    p = torch.randn(4, 3, 2, 2, device=DEVICE)
    buffer = torch.zeros_like(p).contiguous(memory_format=torch.channels_last)
    tail = ([0.9], [0.0], [0.0], [False], [False], [0.0], 0.0, False, 0.0, None, None, None, None)
    lists = [p], [torch.ones_like(p)], [buffer], [torch.ones((), device=DEVICE)], []
    sgd.sgd_step(*lists, [1], [torch.tensor(0.5, device=DEVICE)], *tail)
    assert (buffer == 1).all()
    assert buffer.is_contiguous(memory_format=torch.channels_last)


def test_values_beyond_2_to_the_31_are_checked() -> None:
    """Runs the last two blocks of a gradient, whose other pages are never touched."""
    grad = torch.empty(2**31 + 9000, dtype=HALF, device=DEVICE)
    grad[-3 * sgd.BLOCK :] = 0
    grad[-1] = math.inf
    found_inf = torch.zeros((), device=DEVICE)
    call = sgd.Call([sgd.Item((False, 0, 0, False), grad.numel(), 0, 0, (grad, *[None] * 4))], (), (0.0, 0.0))
    ((_, (blocks,), arguments, constants),) = call.launches()
    outputs = {"found_inf": found_inf, "partial": None}
    for block, want in ((blocks - 2, 0), (blocks - 1, 1)):
        given = {**outputs, **arguments, "first_block": block}
        launching.launch(kernels.sgd_check_kernel, (1,), given, {**constants, "WEIGHT": False}, sgd.WARPS)
        assert found_inf == want


@pytest.mark.skipif(not launching.INTERPRETED, reason="only the interpreter counts bytes")
def test_bytes_equal_the_formula() -> None:
    """A step moves 22 bytes per half value, 20 per fp32 value, 4 less if it is the first; a check reads once."""
    for dtype, check, step in ((HALF, 2, 22), (torch.float32, 4, 20)):
        state = State([4096, 999], dtypes=(dtype,))
        count = 4096 + 999
        big = [*state.params, *state.grads, *state.masters, *state.buffers]
        with metered() as meter:
            sgd.sgd_check(state.grads, [], [], state.found_inf, None, None)
            assert meter.take(*big)[0] == check * count
            state.check()
            assert meter.take(*big)[0] == (2 * check + (4 if dtype == HALF else 0)) * count, "weights with masters"
            state.step()
            assert meter.take(*big)[0] == (step - 4) * count, "a first step does not read the buffer"
            state.step()
            assert meter.take(*big)[0] == step * count
            state.found_inf.fill_(1)
            state.step()
            assert meter.take(*big)[0] == 0
