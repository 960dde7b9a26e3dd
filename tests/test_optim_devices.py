"""Optimizers on a GPU: without one on fake tensors, which have devices but no values, and with one in CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fasttricks
from fasttricks.optim import FusedLARS, FusedSGD, LossScaler

CARD, CPU = torch.device("cuda", 0), torch.device("cpu")
OPTIONS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4, "max_grad_norm": 1.0}
on_a_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def fake() -> Iterator[None]:
    """Tensors without values: reading one on the host raises."""
    with FakeTensorMode():
        yield


class Copies(TorchDispatchMode):
    """Records every copy between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if name.startswith(("aten._to_copy", "aten.copy_")):
            source = args[1] if name.startswith("aten.copy_") else args[0]
            if source.device != result.device:
                self.seen.append((source.device.type, result.device.type))
        return result


def parameters(*devices: torch.device) -> list[nn.Parameter]:
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return [nn.Parameter(torch.ones(4, 3, dtype=d, device=where)) for where in devices for d in dtypes]


def give_grads(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = torch.ones_like(p)


def step(optimizer: Any, params: list[nn.Parameter], scaler: LossScaler) -> Copies:
    give_grads(params)
    scaler.scale(torch.ones((), device=params[0].device))
    with Copies() as copies:
        scaler.step(optimizer)
        scaler.update()
    return copies


@pytest.mark.parametrize("kind", [FusedSGD, FusedLARS])
@pytest.mark.parametrize("lr", ["float", "tensor"])
def test_a_step_stays_on_its_device(fake: None, kind: type, lr: str) -> None:
    """Check, clipping, step and update copy nothing to the host, which would wait, nor from it."""
    params = parameters(CARD)
    optimizer, scaler = kind(params, lr=0.1, **OPTIONS), LossScaler(8.0)
    if lr == "tensor":  # the constructor would read it
        optimizer.param_groups[0]["lr"] = torch.full((), 0.1, device=CARD)
    step(optimizer, params, scaler)
    for _ in range(2):
        assert not step(optimizer, params, scaler).seen
    scaler.unscale_(optimizer)
    with Copies() as copies:
        scaler.step(optimizer)
        scaler.update()
    assert not copies.seen
    for p in params:
        assert all(t.device == CARD for t in optimizer.state[p].values())
    assert scaler.found_inf.device == scaler.loss_scale.device == CARD


def test_the_copy_detector_sees_copies(fake: None) -> None:
    with Copies() as copies:
        torch.ones((), device=CARD).to(CPU)
        torch.ones((), device=CARD).copy_(torch.ones(()))
    assert copies.seen == [("cuda", "cpu"), ("cpu", "cuda")]
    with pytest.raises(Exception, match=r"data.dependent|item|local_scalar"):
        torch.ones((), device=CARD).item()


def test_an_lr_on_the_host_is_copied_and_never_read(fake: None) -> None:
    params = parameters(CARD)
    optimizer, scaler = FusedSGD(params, lr=0.1, **OPTIONS), LossScaler(8.0)
    optimizer.param_groups[0]["lr"] = torch.full((), 0.1)
    for _ in range(2):
        assert set(step(optimizer, params, scaler).seen) == {("cpu", "cuda")}


@pytest.mark.parametrize("kind", [FusedSGD, FusedLARS])
def test_one_group_can_span_two_devices(fake: None, kind: type) -> None:
    params = parameters(CARD, CPU)
    optimizer, scaler = kind(params, lr=0.1, **OPTIONS), LossScaler(8.0)
    for _ in range(2):
        step(optimizer, params, scaler)
    for p in params:
        state = optimizer.state[p]
        assert set(state) == {"momentum_buffer", "step"} | ({"master"} if p.dtype.itemsize == 2 else set())
        assert all(t.device == p.device for t in state.values())


def test_state_follows_parameters(fake: None) -> None:
    """A checkpoint from the CPU loaded for a GPU; parameters that model.to(device) moved between steps."""
    here, there = parameters(CPU), parameters(CARD)
    optimizer, other = FusedSGD(here, lr=0.1, momentum=0.9), FusedSGD(there, lr=0.5)
    give_grads(here)
    optimizer.step()
    # without the counts, which state_dict() reads on the host
    state = {i: {k: v for k, v in optimizer.state[p].items() if k != "step"} for i, p in enumerate(here)}
    group = {**optimizer.param_groups[0], "params": list(range(len(here)))}
    other.load_state_dict({"state": state, "param_groups": [group]})

    def settled() -> None:
        for p in there:
            kept = {n: t for n, t in other.state[p].items() if n != "step"}
            assert set(kept) == {"momentum_buffer"} | ({"master"} if p.dtype.itemsize == 2 else set())
            assert all(t.device == CARD for t in other.state[p].values())
            assert all(t.dtype is (torch.float64 if p.dtype is torch.float64 else torch.float32) for t in kept.values())

    settled()
    for p in there:
        other.state[p] = {name: t.to(CPU) for name, t in other.state[p].items()}
    give_grads(there)
    other.step()
    settled()


def reference(start: list[Tensor], rates: list[float], skipped: list[bool]) -> list[Tensor]:
    """Parameters after torch.optim.SGD in float64 with gradients of one, a step per rate that is not skipped."""
    params = [nn.Parameter(t.double().cpu()) for t in start]
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=False)
    for rate, skip in zip(rates, skipped, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        for p in params:
            p.grad = torch.ones_like(p)
        if not skip:
            optimizer.step()
    return [p.detach() for p in params]


@on_a_card
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_captured_step_reads_lr_scale_and_found_inf_at_replay(name: str) -> None:
    with fasttricks.backend(name):
        captured_steps()


def captured_steps() -> None:
    params = parameters(CARD)
    start = [p.detach().clone() for p in params]
    lr = torch.full((), 0.1, device=CARD)
    optimizer = FusedSGD(params, lr=lr, momentum=0.9)
    optimizer.grad_scale, optimizer.found_inf = torch.full((), 4.0, device=CARD), torch.zeros((), device=CARD)
    for p in params:
        p.grad = torch.full_like(p, 4.0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    rates, skipped = [0.1, 0.1, 0.5, 0.25], [False, False, True, False]
    for rate, skip in zip(rates[1:], skipped[1:], strict=True):
        lr.fill_(rate)
        optimizer.found_inf.fill_(2.0 * skip)
        graph.replay()
    for got, want in zip(optimizer.master_params(), reference(start, rates, skipped), strict=True):
        torch.testing.assert_close(got.detach().double().cpu(), want, rtol=1e-6, atol=1e-6)


@on_a_card
@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("kind", [FusedSGD, FusedLARS])
def test_a_step_on_a_card_does_not_synchronise(kind: type, name: str) -> None:
    params = parameters(CARD)
    optimizer, scaler = kind(params, lr=0.1, **OPTIONS), LossScaler(8.0)
    with fasttricks.backend(name):
        step(optimizer, params, scaler)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(optimizer, params, scaler)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_a_card
def test_one_group_spans_a_card_and_the_cpu() -> None:
    params = parameters(CARD, CPU)
    start = [p.detach().clone() for p in params]
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9)
    for _ in range(3):
        give_grads(params)
        optimizer.step()
    want = reference(start, [0.1] * 3, [False] * 3)
    for got, right in zip(optimizer.master_params(), want, strict=True):
        torch.testing.assert_close(got.detach().double().cpu(), right, rtol=1e-6, atol=1e-6)
