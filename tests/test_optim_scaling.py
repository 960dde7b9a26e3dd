"""Loss scaling by torch.amp.GradScaler and LossScaler: overflow, unscale_, clipping, no synchronisation."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttricks.optim import FusedLARS, FusedSGD, LossScaler


def scalers(scale: float) -> list[Any]:
    return [torch.amp.GradScaler("cpu", init_scale=scale), LossScaler(scale)]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_an_overflow_changes_nothing_on_any_step(which: int, dtype: torch.dtype, dampening: float) -> None:
    """A skipped step changes no bit of parameter, master or momentum; the step after it may be the first one."""
    for grads in ((math.inf, 1.0), (1.0, math.inf, 1.0)):
        p = nn.Parameter(torch.ones(16, dtype=dtype))
        optimizer = FusedSGD([p], lr=0.1, momentum=0.9, dampening=dampening)
        scaler = scalers(8.0)[which]
        scaler.scale(torch.zeros(()))
        for g in grads:
            p.grad = torch.full((16,), g * 8.0, dtype=dtype)
            before = [t.detach().clone() for t in (p, *optimizer.master_params())]
            buffer = optimizer.state[p].get("momentum_buffer")
            buffer = None if buffer is None else buffer.clone()
            scaler.step(optimizer)
            scaler.update()
            if math.isinf(g):
                for a, b in zip(before, (p, *optimizer.master_params()), strict=True):
                    assert torch.equal(a, b)
                if buffer is None:  # a buffer that was never written is not saved
                    assert "momentum_buffer" not in optimizer.state_dict()["state"].get(0, {})
                else:
                    assert torch.equal(buffer, optimizer.state[p]["momentum_buffer"])
        assert scaler.get_scale() == 4.0
        state = optimizer.state[p]
        assert state["step"] == len(grads) - 1
        last = 2.0  # 1 * 8, divided by the scale, which is 4 now
        want = last if len(grads) == 2 else 0.9 * 1.0 + (1 - dampening) * last
        torch.testing.assert_close(state["momentum_buffer"], torch.full((16,), want))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_after_an_overflow_equal_unskipped_steps(which: int, dtype: torch.dtype) -> None:
    """Gradients inf, 1 give p = 0.9, buf = 1; gradients 1, inf, 1 give p = 0.71, buf = 1.9; the scale is then 4."""
    for factors, want_p, want_buf in (((math.inf, 1.0), 0.9, 1.0), ((1.0, math.inf, 1.0), 0.71, 1.9)):
        p = nn.Parameter(torch.ones(16, dtype=dtype))
        optimizer, scaler = FusedSGD([p], lr=0.1, momentum=0.9), scalers(8.0)[which]
        for factor in factors:
            optimizer.zero_grad()
            scaler.scale((p * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        torch.testing.assert_close(next(optimizer.master_params()).detach().float(), torch.full((16,), want_p))
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], torch.full((16,), want_buf))
        assert scaler.get_scale() == 4.0


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_unscales_gradients_once(which: int, copied: Callable[[Any], Any]) -> None:
    optimizer = copied(FusedSGD([nn.Parameter(torch.ones(3))], lr=0.1))
    p = optimizer.param_groups[0]["params"][0]
    scaler = scalers(8.0)[which]
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))


@pytest.mark.parametrize("which", [0, 1])
def test_unscale_clip_and_step(which: int) -> None:
    """g = 8 at a scale of 8, clipped to 0.5 over four values: p = 0.975. With NaN: p unchanged, scale 8 -> 4."""
    for factor, want, scale in ((1.0, 0.975, 8.0), (math.nan, 1.0, 4.0)):
        p = nn.Parameter(torch.ones(4))
        optimizer, scaler = FusedSGD([p], lr=0.1), scalers(8.0)[which]
        scaler.scale((p * factor).sum()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([p], 0.5)
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(p.detach(), torch.full((4,), want))
        assert scaler.get_scale() == scale


def test_grad_scaler_refuses_to_unscale_fp16() -> None:
    """docs/migrating.md states this rule of torch.amp.GradScaler; its step() accepts the same gradients."""
    p = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer, scaler = FusedSGD([p], lr=0.1, max_grad_norm=1.0), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(p.sum()).backward()
    with pytest.raises(ValueError, match="FP16 gradients"):
        scaler.unscale_(optimizer)
    optimizer, scaler = FusedSGD([p], lr=0.1, max_grad_norm=1.0), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)  # clipped in the step: the norm of four ones is 2
    torch.testing.assert_close(next(optimizer.master_params()).detach(), torch.full((4,), 0.95))


def test_unscaled_half_gradients_are_on_the_masters() -> None:
    """fp16 gradients that would vanish when unscaled do not: unscale_, clip_grad_norm_(master_params()), step."""
    tiny = 2.0**-26  # unless scaled, below the smallest subnormal of fp16
    p, q = nn.Parameter(torch.ones(4, dtype=torch.float16)), nn.Parameter(torch.ones(4))
    optimizer, scaler = FusedSGD([p, q], lr=1.0), LossScaler(2.0**16)
    scaler.scale(((p.float() + q) * tiny).sum()).backward()
    assert (p.grad == tiny * 2**16).all()
    scaler.unscale_(optimizer)
    masters = list(optimizer.master_params())
    assert (masters[0].grad == tiny).all()
    assert (q.grad == tiny).all()
    norm = torch.nn.utils.clip_grad_norm_(masters, tiny)
    assert norm.item() == pytest.approx(tiny * math.sqrt(8))
    expected = masters[0].grad.clone()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(masters[0], 1 - expected, rtol=0, atol=0)
    assert masters[0].grad is None
    other = torch.optim.SGD([p], lr=1.0)
    with pytest.raises(ValueError, match="half gradients of SGD; accepted: those of FusedSGD"):
        LossScaler().unscale_(other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_clipping_half_parameters_after_unscale_is_refused(dtype: torch.dtype) -> None:
    """The error says that the unscaled gradients are on the masters; the step changes nothing."""
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer, scaler = FusedSGD([p], lr=1.0), LossScaler(8.0)
    scaler.scale(p.sum()).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_([p], 0.5)
    with pytest.raises(RuntimeError, match=r"clip optimizer\.master_params\(\) \(or give max_grad_norm\), not model"):
        scaler.step(optimizer)
    assert (p == 1).all()


def test_master_gradients_must_be_fresh() -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = FusedSGD([p], lr=1.0)
    p.sum().backward()
    next(iter(optimizer.master_params()))
    p.sum().backward()  # accumulates into a gradient that was already copied
    with pytest.raises(RuntimeError, match="a gradient changed after"):
        optimizer.step()
    optimizer.zero_grad()
    p.sum().backward()
    optimizer.step()
    assert (p == 0).all()
    p.sum().backward()
    list(optimizer.master_params())
    p.grad = torch.full((4,), 3.0).half()  # a new gradient replaces the copy
    optimizer.step()
    assert (p == -3).all()


def test_max_grad_norm_equals_clip_grad_norm(backend: str) -> None:
    """Two groups, scaled or not, in fp16 and fp32."""
    for dtype in (torch.float16, torch.float32):
        for scaler in (None, *scalers(1024.0)):
            mine = [nn.Parameter(torch.randn(n).to(dtype)) for n in (3, 40, 1025)]
            theirs = [nn.Parameter(p.detach().float()) for p in mine]
            groups = [{"params": mine[:1], "weight_decay": 0.1}, {"params": mine[1:]}]
            ours = FusedSGD(groups, lr=0.1, momentum=0.9, max_grad_norm=1.0)
            groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:]}]
            reference = torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=False)
            for _ in range(3):
                for a, b in zip(mine, theirs, strict=True):
                    a.grad = torch.randn(a.shape).to(dtype)
                    b.grad = a.grad.float().clone()
                    if scaler is not None:
                        a.grad = a.grad * 1024
                norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
                reference.step()
                if scaler is None:
                    ours.step()
                else:
                    scaler.scale(torch.zeros(()))
                    scaler.step(ours)
                    scaler.update()
                assert ours.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
            for a, b in zip(ours.master_params(), theirs, strict=True):
                torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-6, atol=1e-6)


def test_max_grad_norm_skips_non_finite_gradients() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = FusedSGD([p], lr=0.1, momentum=0.9, max_grad_norm=1.0)
    p.grad = torch.tensor([1.0, math.nan, 1.0, 1.0])
    optimizer.step()
    assert (p == 1).all()
    assert optimizer.state[p]["step"] == 0


def test_found_inf_above_one_skips_the_step() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = FusedSGD([p], lr=0.1)
    p.grad = torch.ones(4)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(2.0), torch.tensor(1.0)
    optimizer.step()
    assert (p == 1).all()


def test_a_static_scale_never_changes() -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer, scaler = FusedSGD([p], lr=0.1), LossScaler(128.0, dynamic=False)
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 128
        assert bool(scaler.found_inf) == math.isinf(factor)
    torch.testing.assert_close(next(optimizer.master_params()).detach(), torch.full((4,), 0.8))


def test_loss_scaler_equals_grad_scaler() -> None:
    """Through overflows and growth; each loads the state of the other."""
    options = {"init_scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3}
    ours, theirs = LossScaler(**options), torch.amp.GradScaler("cpu", **options)
    params = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizers = [FusedSGD([params[0]], lr=0.01), torch.optim.SGD([params[1]], lr=0.01, foreach=False)]
    for i in range(20):
        factor = math.inf if i in (0, 5, 6, 13) else 1.0
        for p, o, s in zip(params, optimizers, (ours, theirs), strict=True):
            o.zero_grad()
            s.scale((p * factor).sum()).backward()
            s.step(o)
            s.update()
        assert ours.get_scale() == theirs.get_scale()
        assert torch.equal(params[0], params[1])
    assert ours.state_dict() == theirs.state_dict()
    fresh = LossScaler()
    fresh.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(fresh.state_dict())
    assert fresh.state_dict() == theirs.state_dict()
    with pytest.raises(ValueError, match="lacks growth_factor"):
        fresh.load_state_dict({"scale": 1.0, "backoff_factor": 0.5, "growth_interval": 1, "_growth_tracker": 0})


def test_loss_scaler_skips_the_optimizer_that_overflowed() -> None:
    """The overflow shrinks the scale, also with torch's fused and plain optimizers."""
    params = [nn.Parameter(torch.ones(4)) for _ in range(4)]
    optimizers = [
        FusedSGD(params[:1], lr=0.1),
        FusedLARS(params[1:2], lr=0.1, adapt_1d=True),
        torch.optim.Adam(params[2:3], lr=0.1, fused=True),
        torch.optim.SGD(params[3:], lr=0.1),
    ]
    for bad in range(4):
        scaler = LossScaler(8.0)
        before = [p.detach().clone() for p in params]
        optimizers[bad].zero_grad()
        scaler.scale((params[bad] * math.inf).sum()).backward()
        scaler.step(optimizers[bad])
        scaler.update()
        assert scaler.get_scale() == 4
        assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
        for i, o in enumerate(optimizers):
            o.zero_grad()
            scaler.scale(params[i].sum()).backward()
            scaler.step(o)
        scaler.update()
        assert all((a != b).all() for a, b in zip(before, params, strict=True))
        assert scaler.found_inf == 0


def test_loss_scaler_refuses_calls_out_of_order() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer, scaler = FusedSGD([p], lr=0.1), LossScaler(8.0)
    with pytest.raises(RuntimeError, match="without a step"):
        scaler.update()
    scaler.scale(p.sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="called already"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="stepped already"):
        scaler.step(optimizer)
    scaler.update(2.0)
    assert scaler.get_scale() == 2
    for wrong in ({"init_scale": 0}, {"growth_factor": 1.0}, {"backoff_factor": 1.0}, {"growth_interval": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LossScaler(**wrong)
    with pytest.raises(TypeError, match="outputs is int"):
        scaler.scale(3)


def test_a_disabled_scaler_does_nothing() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer, scaler = FusedSGD([p], lr=0.1), LossScaler(enabled=False)
    loss = p.sum()
    assert scaler.scale(loss) is loss
    loss.backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.9))
    assert scaler.state_dict() == {}
    assert scaler.get_scale() == 1


def test_loss_scaler_takes_a_closure() -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer, scaler = FusedSGD([p], lr=0.1), LossScaler(8.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.sum()
        scaler.scale(loss).backward()
        return loss

    assert scaler.step(optimizer, closure).item() == 4
    torch.testing.assert_close(next(optimizer.master_params()).detach(), torch.full((4,), 0.9))


@pytest.mark.parametrize("kind", [FusedSGD, FusedLARS])
def test_nothing_is_read_on_the_host(backend: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """step and update call no .item(), bool(), float() or tolist() of a tensor."""
    params = [nn.Parameter(torch.ones(4, 4, dtype=d)) for d in (torch.float16, torch.float32)]
    optimizer = kind(params, lr=torch.tensor(0.1), momentum=0.9, max_grad_norm=1.0)
    scaler = LossScaler(8.0)

    def refuse(*_: Any) -> None:
        raise AssertionError("the host waits for the device")

    seen: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(sum(p.float().sum() for p in params)).backward()
        with monkeypatch.context() as patch, Watch():
            for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu"):
                patch.setattr(Tensor, name, refuse)
            scaler.step(optimizer)
            scaler.update()
    assert not [s for s in seen if "_local_scalar_dense" in s or "nonzero" in s]
    if backend == "cpu":  # a check and a step each
        assert sum("fasttricks" in s for s in seen) == 2 * 2
