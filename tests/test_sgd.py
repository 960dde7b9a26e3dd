"""sgd_check and sgd_step against torch.optim.SGD(foreach=False, fused=False) and float64."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import DTYPES, HALF
from torch import Tensor

import fasttricks
from fasttricks.backends import not_loaded
from fasttricks.ops.sgd import sgd_check, sgd_step

TAILS = (0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 1025)
MODES = [
    {},
    {"weight_decay": 1e-2},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 1e-2},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    {"momentum": 0.9, "maximize": True, "weight_decay": 1e-2},
]


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


class Reference:
    """torch.optim.SGD on fp32 masters (fp64 for fp64), whose results are expected."""

    def __init__(self, params: list[Tensor], lr: float, **options: object) -> None:
        self.masters = [p.detach().to(master_dtype(p.dtype), copy=True).requires_grad_() for p in params]
        self.optimizer = torch.optim.SGD(self.masters, lr=lr, foreach=False, fused=False, **options)

    def step(self, grads: list[Tensor], scale: float = 1.0) -> None:
        for m, g in zip(self.masters, grads, strict=True):
            m.grad = g.to(m.dtype) * torch.tensor(1 / scale, dtype=m.dtype)
        self.optimizer.step()

    def buffers(self) -> list[Tensor]:
        return [self.optimizer.state[m]["momentum_buffer"] for m in self.masters]


class Ours:
    """The lists of tensors for sgd_step."""

    def __init__(self, params: list[Tensor], lr: float, **options: object) -> None:
        self.params = params
        self.masters = [p.to(torch.float32) for p in params if p.dtype in HALF]
        moving = params if options.get("momentum") else []
        # NaN, since a first step must not read its buffer
        self.buffers = [torch.full_like(p, math.nan, dtype=master_dtype(p.dtype)) for p in moving]
        self.steps = [torch.zeros(()) for _ in moving]
        self.lr, self.options = lr, options

    def step(self, grads: list[Tensor], scale: float | None = None, **more: object) -> None:
        scaled = {} if scale is None else {"grad_scale": torch.tensor(scale)}
        lists = (self.params, grads, self.buffers, self.steps, self.masters)
        sgd_step(*lists, lr=self.lr, **self.options, **scaled, **more)

    def state(self) -> list[Tensor]:
        return [*self.params, *self.masters, *self.buffers, *self.steps]


def bits(tensors: list[Tensor]) -> list[Tensor]:
    """Copies as bytes, so that NaN equals NaN."""
    return [t.detach().clone().contiguous().reshape(-1).view(torch.uint8) for t in tensors]


def assert_close(got: Tensor, want: Tensor, ulps: float = 2.0, operands: float = 1.0) -> None:
    """Asserts equality up to `ulps` units in the last place of the largest value, or of the operands if they cancel."""
    if want.numel() == 0:
        assert got.shape == want.shape
        return
    step = torch.finfo(want.dtype).eps * max(operands, want.double().abs().max().item())
    assert (got.double() - want.double()).abs().max().item() <= ulps * step


def run_modes(backend: str, exact: bool) -> None:
    """Three steps of every mode, over all lengths and dtypes in one call; parameters are rounded masters."""
    for options in MODES:
        params = [torch.randn(n).to(dtype) for dtype in DTYPES for n in TAILS]
        reference, ours = Reference(params, 0.1, **options), Ours(params, 0.1, **options)
        for _ in range(3):
            grads = [torch.randn(p.shape).to(p.dtype) for p in params]
            reference.step(grads, 256.0)
            ours.step(grads, 256.0)
        masters = iter(ours.masters)
        for p, m in zip(params, reference.masters, strict=True):
            mine = next(masters) if p.dtype in HALF else p
            assert torch.equal(mine, m.detach()) if exact else assert_close(mine, m.detach()) is None
            assert torch.equal(p, mine.to(p.dtype))
        if options.get("momentum"):
            for got, want in zip(ours.buffers, reference.buffers(), strict=True):
                assert torch.equal(got, want) if exact else assert_close(got, want, operands=1 / 256) is None
            assert all(s == 3 for s in ours.steps)


def test_every_element_moves(backend: str) -> None:
    params = [torch.zeros(n, dtype=dtype) for dtype in DTYPES for n in TAILS]
    masters = [p.float() for p in params if p.dtype in HALF]
    sgd_step(params, [torch.ones_like(p) for p in params], masters=masters, lr=1.0)
    assert all((p == -1).all() for p in [*params, *masters])


# if the CPU has them, torch's kernels use fused multiply-adds
HAS_FMA = torch.backends.cpu.get_cpu_capability() != "DEFAULT"


def test_modes_and_tails_equal_torch(backend: str) -> None:
    run_modes(backend, exact=backend == "cpu" and HAS_FMA)


@pytest.mark.skipif("cpu" in not_loaded, reason="the CPU library is not loaded")
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_isa_equals_torch(isa: str) -> None:
    """In a process that forces one instruction set. The generic one rounds twice in one of 2^29 sums."""
    order = ["generic", "avx2", "avx512"]
    if order.index(isa) > order.index(torch.ops.fasttricks.cpu_isa()):
        pytest.skip(f"this CPU has no {isa}")
    code = (
        "import torch, test_sgd, test_sgd_check\n"
        f"torch.manual_seed({torch.initial_seed()})\n"
        f"assert torch.ops.fasttricks.cpu_isa() == {isa!r}\n"
        f"test_sgd.run_modes('cpu', exact={isa != 'generic' and HAS_FMA})\n"
        "test_sgd_check.run_check('cpu'); test_sgd_check.run_norms('cpu')\n"
        "for size in (1e-42, 1.0, 3e38): test_sgd_check.test_norms_of_every_magnitude('cpu', size)\n"
    )
    path = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    env = {**os.environ, "PYTHONPATH": path, "FASTTRICKS_CPU_ISA": isa, "FASTTRICKS_BACKEND": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", [1.0, 2.0, 0.5, math.inf, math.nan])
def test_found_inf_changes_nothing(backend: str, value: float) -> None:
    """Any found_inf except 0, such as a sum over devices, leaves every bit unchanged, on the first step and later."""
    params = [torch.randn(n).to(dtype) for dtype in DTYPES for n in (17, 1025)]
    ours = Ours(params, 0.1, momentum=0.9, dampening=0.5)
    grads = [torch.randn(p.shape).to(p.dtype) for p in params]
    bad = [torch.full_like(g, math.inf) for g in grads]
    for taken in range(3):
        before = bits(ours.state())
        ours.step(bad, 4.0, found_inf=torch.tensor(value))
        assert all(torch.equal(a, b) for a, b in zip(before, bits(ours.state()), strict=True))
        assert all(s == taken for s in ours.steps)
        ours.step(grads, 4.0, found_inf=torch.zeros(()))
    assert all(p.isfinite().all() for p in [*params, *ours.buffers])


def test_any_strides_of_gradients_and_state(backend: str) -> None:
    """Channels-last gradients of contiguous parameters and the reverse; transposed, sliced and expanded ones."""
    last = torch.channels_last
    cases: list[tuple[Tensor, Tensor]] = []
    for dtype in DTYPES:
        p = torch.randn(4, 3, 2, 2).to(dtype)
        cases += [
            (p.clone(), torch.randn(4, 3, 2, 2).to(dtype).contiguous(memory_format=last)),
            (p.contiguous(memory_format=last), torch.randn(4, 3, 2, 2).to(dtype)),
            (p.clone(), torch.randn(4, 3, 4, 2).to(dtype)[:, :, ::2]),
            (p.clone(), torch.randn(1, 3, 1, 1).to(dtype).expand(4, 3, 2, 2)),
            (torch.randn(6, 9).to(dtype).t(), torch.randn(9, 6).to(dtype)),
            (torch.randn(8, 9).to(dtype)[::2, 1:8], torch.randn(4, 7).to(dtype)),
            (torch.randn(100, 1, 1).to(dtype), torch.randn(100, 1, 1).to(dtype).as_strided((100, 1, 1), (1, 100, 100))),
            (
                torch.randn(5, 7, 1, 1).to(dtype),
                torch.randn(5, 7, 1, 1).to(dtype).as_strided((5, 7, 1, 1), (7, 1, 7, 7)),
            ),
            (torch.randn(()).to(dtype), torch.randn(()).to(dtype)),
            (torch.randn(40, 30, 3, 3).to(dtype), torch.randn(40, 30, 3, 3).to(dtype).contiguous(memory_format=last)),
        ]
    params, grads = [c[0] for c in cases], [c[1] for c in cases]
    options = {"momentum": 0.9, "weight_decay": 1e-2}
    reference, ours = Reference(params, 0.1, **options), Ours(params, 0.1, **options)
    # as loaded from a checkpoint in another layout
    ours.buffers = [
        b.contiguous(memory_format=last) if b.ndim == 4 and i % 2 else b for i, b in enumerate(ours.buffers)
    ]
    ours.masters = [
        m.contiguous(memory_format=last) if m.ndim == 4 and i % 3 else m for i, m in enumerate(ours.masters)
    ]
    strides = [p.stride() for p in params]
    for _ in range(3):
        reference.step(grads)
        ours.step(grads)
    assert [p.stride() for p in params] == strides
    for p, m in zip(params, reference.masters, strict=True):
        assert_close(p, m.detach().to(p.dtype), ulps=1.0 if p.dtype in HALF else 2.0)


def test_nothing_outside_a_sliced_parameter_is_written(backend: str) -> None:
    whole = torch.full((8, 9), 7.0)
    sgd_step([whole[::2, 1:8]], [torch.ones(4, 7)], lr=1.0)
    assert whole.sum() == 7 * 72 - 28
    assert (whole[::2, 1:8] == 6).all()


def test_gradients_may_have_another_dtype(backend: str) -> None:
    for dtype, grad_dtype in itertools.product(DTYPES, DTYPES):
        p, g = torch.randn(37).to(dtype), torch.randn(37).to(grad_dtype)
        reference, ours = Reference([p], 0.1, momentum=0.9), Ours([p], 0.1, momentum=0.9)
        for _ in range(2):
            reference.step([g])
            ours.step([g])
        assert_close(p, reference.masters[0].detach().to(dtype), ulps=1.0)


def test_groups_in_one_call_equal_one_call_each(backend: str) -> None:
    """Groups with different options, one of them empty."""
    options = [
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
        {"lr": 0.5},
        {"lr": 0.2},
        {"lr": 0.3, "momentum": 0.5, "dampening": 0.2, "maximize": True},
    ]
    sizes = [3, 2, 0, 3]
    params = [torch.randn(5).to(d) for d in (*DTYPES, *DTYPES)]
    grads = [torch.randn(5).to(p.dtype) for p in params]
    alone = [p.clone() for p in params]
    wants, start = [], 0
    for option, size in zip(options, sizes, strict=True):
        part = slice(start, start + size)
        start += size
        if size:
            ours = Ours(alone[part], **option)
            for _ in range(2):
                ours.step(grads[part])
            wants += ours.params
    moving = [*params[:3], *params[5:]]
    buffers = [torch.full_like(p, math.nan, dtype=master_dtype(p.dtype)) for p in moving]
    steps, masters = [torch.zeros(()) for _ in moving], [p.float() for p in params if p.dtype in HALF]

    def each(name: str, default: object) -> list:
        return [o.get(name, default) for o in options]

    for _ in range(2):
        sgd_step(
            params,
            grads,
            buffers,
            steps,
            masters,
            group_sizes=sizes,
            lr=[torch.tensor(0.1, dtype=torch.float64), 0.5, 0.2, 0.3],
            momentum=each("momentum", 0.0),
            dampening=each("dampening", 0.0),
            weight_decay=each("weight_decay", 0.0),
            nesterov=each("nesterov", False),
            maximize=each("maximize", False),
        )
    assert all(torch.equal(a, b) for a, b in zip(params, wants, strict=True))


def test_each_parameter_has_its_own_first_step(backend: str) -> None:
    """g = lr = 1, momentum = dampening = 0.5: p is -1, -2, -3 and the buffer 1, also if a parameter starts later."""
    params = [torch.zeros(3), torch.zeros(3)]
    buffers, steps = [torch.full((3,), math.nan) for _ in params], [torch.zeros(()) for _ in params]
    options = {"lr": 1.0, "momentum": 0.5, "dampening": 0.5}
    for i in range(4):
        n = 1 if i == 0 else 2
        sgd_step(params[:n], [torch.ones(3)] * n, buffers[:n], steps[:n], **options)
        assert (params[0] == -(i + 1)).all()
        assert (buffers[0] == 1).all()
        if i:
            assert (params[1] == -i).all()
            assert (buffers[1] == 1).all()


def test_masters_follow_changed_parameters(backend: str) -> None:
    """Where a half parameter no longer equals its rounded master, the master is set to it, element by element."""
    for dtype in HALF:
        p = torch.randn(100).to(dtype)
        ours = Ours([p], 0.0)
        fine = ours.masters[0]
        fine += 0.1 * torch.finfo(dtype).eps * fine  # rounds to the same parameter
        assert torch.equal(fine.to(dtype), p)
        kept = fine.clone()
        p[::3] = torch.arange(34).to(dtype)
        ours.step([torch.zeros(100, dtype=dtype)])
        assert torch.equal(p[::3], torch.arange(34).to(dtype))
        assert torch.equal(fine[::3], torch.arange(34.0))
        untouched = torch.ones(100, dtype=torch.bool)
        untouched[::3] = False
        assert torch.equal(fine[untouched], kept[untouched])


def test_special_values_round_as_in_torch(backend: str) -> None:
    """Overflow to infinity, subnormals, ties and NaN when the master is rounded."""
    values = torch.tensor(
        [65519.0, 65520.0, 7e4, 3e-8, 2.98e-8, 5.96e-8, 1e-7, 6.1e-5, 1.0004883, 1.00146484, 0.0, math.nan]
    )
    values = torch.cat([values, -values, torch.tensor([3.4e38, 1e-40, math.inf])])
    for dtype in HALF:
        p = torch.zeros(len(values), dtype=dtype)
        sgd_step([p], [-values], masters=[torch.zeros(len(values))], lr=1.0)
        torch.testing.assert_close(p, values.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_parameters_that_share_memory_are_stepped_in_order(backend: str) -> None:
    """A parameter given twice is stepped twice; views of one tensor are stepped one after another."""
    n = 200_000
    once = torch.randn(n)
    want = once - 0.5 * torch.ones(n) - 0.5 * torch.full((n,), 2.0)
    sgd_step([once, once], [torch.ones(n), torch.full((n,), 2.0)], lr=0.5)
    assert_close(once, want)
    whole = torch.randn(n)
    want = whole.clone()
    want[: n // 2] -= 0.5
    want[n // 4 :] -= 0.5
    sgd_step([whole[: n // 2], whole[n // 4 :]], [torch.ones(n // 2), torch.ones(n - n // 4)], lr=0.5)
    assert_close(whole, want)


def test_empty_lists_are_accepted(backend: str) -> None:
    sgd_step([], [], lr=0.1)
    found = torch.zeros(())
    sgd_check([], found)
    assert found == 0


def samples() -> dict[str, list[tuple]]:
    """Arguments of the raw ops for opcheck; see test_registration.py."""
    params = [torch.randn(5, 3).to(d) for d in DTYPES] + [torch.randn(4, 6).t(), torch.randn(0)]
    grads = [torch.randn(p.shape).to(p.dtype) for p in params]
    buffers = [torch.zeros_like(p, dtype=master_dtype(p.dtype)) for p in params]
    steps, masters = [torch.zeros(()) for _ in params], [p.float() for p in params if p.dtype in HALF]
    squares = torch.ones(len(params), dtype=torch.float64)
    n = len(params)
    lr = torch.tensor(0.1)
    one = ([n], [lr], [0.9], [0.0], [1e-4], [True], [False], [0.0], 0.0, False, 0.0, None, None, None, None)
    two = ([2, n - 2], [lr, lr.double()], [0.0, 0.9], [0.0, 0.1], [0.0, 1e-4], [False, False], [True, False])
    two = (*two, [1e-3, 0.0], 0.0, True, 1.0, torch.tensor(8.0), torch.zeros(()), squares, squares.clone())
    return {
        "sgd_check": [
            (grads, [], [], torch.zeros(()), None, None),
            (grads, params, masters, torch.zeros(()), squares.clone(), squares.clone()),
        ],
        "sgd_step": [
            (params, grads, buffers, steps, masters, *one),
            (params, grads, buffers[2:], steps[2:], masters, *two),
        ],
    }


def test_backends_agree() -> None:
    """The reference and the kernels give the same, with LARS and clipping."""
    results = []
    torch.manual_seed(torch.initial_seed())
    params = [torch.randn(6, 5).to(d) for d in (*DTYPES, *DTYPES)]
    grads = [torch.randn(6, 5).to(p.dtype) for p in params]
    for name in ("auto", "reference"):
        with fasttricks.backend(name):
            mine = [p.clone() for p in params]
            buffers = [torch.zeros_like(p, dtype=master_dtype(p.dtype)) for p in mine]
            steps, masters = [torch.zeros(()) for _ in mine], [p.float() for p in mine if p.dtype in HALF]
            for _ in range(3):
                found = torch.zeros(())
                squares = [torch.zeros(len(mine), dtype=torch.float64) for _ in range(2)]
                sgd_check(grads, found, grad_sq=squares[0], params=mine, masters=masters, weight_sq=squares[1])
                sgd_step(
                    mine,
                    grads,
                    buffers,
                    steps,
                    masters,
                    lr=0.5,
                    momentum=0.9,
                    weight_decay=0.01,
                    group_sizes=[3, 5],
                    trust_coefficient=[0.1, 0.0],
                    lr_in_momentum=True,
                    max_norm=2.0,
                    grad_scale=torch.tensor(8.0),
                    found_inf=found,
                    grad_sq=squares[0],
                    weight_sq=squares[1],
                )
            results.append([*masters, *[p for p in mine if p.dtype not in HALF], *buffers])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
