"""The optimizers with other scalers, Lightning, Accelerate, timm, averages of weights, model zoos."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fasttricks.models import build
from fasttricks.optim import FusedLARS, FusedSGD, LossScaler, param_groups, warmup_cosine, warmup_step


def overflow(module: nn.Module) -> None:
    """Makes the next backward pass through the module give infinities."""

    def spoil(grad: Tensor) -> Tensor:
        handle.remove()
        return torch.full_like(grad, math.inf)

    handle = next(module.parameters()).register_hook(spoil)


# ---- scalers ----


@pytest.mark.parametrize("kind", [FusedSGD, FusedLARS])
def test_scaled_and_unscale_are_all_a_scaler_needs(kind: type) -> None:
    """A step within scaled() takes scaled gradients and reports overflow; unscale_() unscales them before."""
    for unscale in (False, True):
        p, q = (nn.Parameter(torch.linspace(1, 2, 6).view(2, 3).half()) for _ in range(2))
        optimizer, plain = (kind([t], lr=0.1, momentum=0.9) for t in (p, q))
        scale = torch.tensor(64.0)
        for factor in (1.0, math.inf, 2.0):
            p.grad, q.grad = torch.full_like(p, 64 * factor), torch.full_like(q, factor)
            flag = torch.zeros(())
            before = p.detach().clone()
            if unscale:
                optimizer.unscale_(scale, flag)
                with optimizer.scaled(None, flag, check=False):
                    optimizer.step()
            else:
                with optimizer.scaled(scale, flag):
                    optimizer.step()
            assert bool(flag) == math.isinf(factor)
            assert scale == 64
            if math.isinf(factor):
                assert torch.equal(p, before)
            else:
                plain.step()
                assert torch.equal(next(optimizer.master_params()), next(plain.master_params()))
        optimizer.zero_grad()
        optimizer.step()  # outside scaled(), an ordinary step


def test_grad_norm_is_unscaled_after_the_scale_changes() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer, scaler = FusedSGD([p], lr=0.1, max_grad_norm=10.0), LossScaler(8.0, growth_interval=1)
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 16
    assert optimizer.grad_norm == 2


def test_grad_scaler_unscales_before_the_step() -> None:
    """With unscale_in_step=False GradScaler unscales, and skips the step on overflow, as with torch.optim.SGD."""
    params = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizers: list[Any] = [
        FusedSGD([params[0]], lr=0.1, momentum=0.9, unscale_in_step=False),
        torch.optim.SGD([params[1]], lr=0.1, momentum=0.9, foreach=False),
    ]
    for p, o in zip(params, optimizers, strict=True):
        scaler, steps = torch.amp.GradScaler("cpu", init_scale=8.0), []
        o.register_step_post_hook(lambda *_, steps=steps: steps.append(1))
        for factor in (1.0, math.inf, 2.0):
            o.zero_grad()
            scaler.scale((p * factor).sum()).backward()
            scaler.unscale_(o)
            nn.utils.clip_grad_norm_([p], 0.5)
            scaler.step(o)
            scaler.update()
        assert len(steps) == 2
        assert scaler.get_scale() == 4
    assert torch.equal(*params)


# ---- frameworks ----


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(6, 3, 2, 2), torch.arange(6) % 3) for _ in range(count)]


def test_lightning_clips_in_16_mixed() -> None:
    """With gradient_clip_val, which Lightning refuses for optimizers that unscale in the step."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.plugins import MixedPrecision

    def run(make: Any) -> list[Tensor]:
        torch.manual_seed(0)
        net = Net()

        class Task(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def training_step(self, batch: Any, index: int) -> Tensor:
                if index == 1:
                    overflow(self.net)
                return nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1])

            def configure_optimizers(self) -> Any:
                return make(net.parameters())

        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        # precision="16-mixed" would require a GPU
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))
        plugin.autocast_context_manager = lambda: torch.autocast("cpu", torch.bfloat16)  # type: ignore[method-assign]
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            gradient_clip_val=0.1,
            plugins=[plugin],
            enable_model_summary=False,
            **quiet,
        )
        trainer.fit(Task(), torch.utils.data.DataLoader(data, batch_size=None))
        return [p.detach() for p in net.parameters()]

    data: Any = batches()
    options = {"lr": 0.1, "momentum": 0.9}
    want = run(lambda p: torch.optim.SGD(p, **options, foreach=False))
    got = run(lambda p: FusedSGD(p, **options, unscale_in_step=False))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        run(lambda p: FusedSGD(p, **options))


@pytest.mark.parametrize("half", [False, True])
def test_fabric_steps_the_optimizer_that_it_wraps(half: bool) -> None:
    """Scaling, masters' gradients and norms of the wrapper, which copies attributes, are those of the optimizer."""
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    results, data = [], batches()
    for wrap in (False, True):
        torch.manual_seed(0)
        net: Any = Net().bfloat16() if half else Net()
        optimizer: Any = FusedSGD(net.parameters(), lr=0.1, momentum=0.9, max_grad_norm=0.5)
        if wrap:
            net, optimizer = fabric.setup(net, optimizer)
        scaler = LossScaler(64.0)
        for i, (x, y) in enumerate(data):
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(net(x.to(net.layers[1].weight.dtype)).float(), y)).backward()
            if i == 1:
                optimizer.load_state_dict(optimizer.state_dict())
            if i % 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(optimizer.master_params(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        results.append([optimizer.grad_norm, *optimizer.master_params()])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_accelerate_notices_skipped_steps() -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.optimizer import AcceleratedOptimizer

    accelerate.Accelerator(cpu=True)
    for unscale_in_step in (False, True):
        net = Net()
        inner = FusedSGD(net.parameters(), lr=0.1, momentum=0.9, unscale_in_step=unscale_in_step)
        # as from Accelerator.prepare() with mixed_precision="fp16", which would require a GPU
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        optimizer = AcceleratedOptimizer(inner, scaler=scaler)
        seen = []
        for i, (x, y) in enumerate(batches()):
            optimizer.zero_grad()
            if i == 1:
                overflow(net)
            scaler.scale(nn.functional.cross_entropy(net(x), y)).backward()
            before = [p.detach().clone() for p in net.parameters()]
            optimizer.step()
            seen.append(optimizer.step_was_skipped)
            unchanged = all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
            assert unchanged == (i == 1)
        assert seen == [False, not unscale_in_step, False, False]


@pytest.mark.parametrize("unscale", [False, True])
def test_accelerate_wraps_the_optimizer_of_a_half_model(unscale: bool) -> None:
    """LossScaler finds the optimizer within AcceleratedOptimizer, which GradScaler cannot unscale."""
    accelerate = pytest.importorskip("accelerate")
    accelerator, data, results = accelerate.Accelerator(cpu=True), batches(), []
    for wrap in (False, True):
        torch.manual_seed(0)
        net: Any = Net().half()
        inner = FusedSGD(net.parameters(), lr=0.1, momentum=0.9, max_grad_norm=0.5)
        optimizer: Any = accelerator.prepare(inner) if wrap else inner
        assert (type(optimizer) is FusedSGD) != wrap
        scaler, scales = LossScaler(64.0), []
        for i, (x, y) in enumerate(data):
            optimizer.zero_grad()
            if i == 1:
                overflow(net)
            scaler.scale(nn.functional.cross_entropy(net(x.half()).float(), y)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.loss_scale.clone())
        assert [float(s) for s in scales] == [64, 32, 32, 32]
        results.append([inner.grad_norm, *inner.master_params()])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_the_way_out_of_unscaling_fp16_is_named() -> None:
    """Before torch.amp.GradScaler refuses the gradients, with a message that names none."""
    net = Net().half()
    with pytest.warns(UserWarning, match=r"unscale_in_step is False .* fasttricks\.optim\.LossScaler"):
        optimizer = FusedSGD(net.parameters(), lr=0.1, unscale_in_step=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(net(torch.randn(6, 3, 2, 2).half()).float().sum()).backward()
    with pytest.raises(ValueError, match="unscale FP16"):
        scaler.step(optimizer)
    plain = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="gradients of SGD; accepted: those of FusedSGD"):
        LossScaler().unscale_(plain)


def test_timm_creates_it_by_name() -> None:
    """timm drops a prefix that ends in an underscore: "fasttricks_sgd" would be its own SGD."""
    timm_optim = pytest.importorskip("timm.optim")
    from timm.optim._optim_factory import default_registry

    default_registry.register(
        timm_optim.OptimInfo(
            name="fasttrickssgd", opt_class=FusedSGD, has_eps=False, has_momentum=True, defaults={"nesterov": True}
        )
    )
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = timm_optim.create_optimizer_v2(net, opt="fasttrickssgd", lr=0.1, weight_decay=1e-4, momentum=0.8)
    assert type(optimizer) is FusedSGD
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays[id(net[0].weight)] == 1e-4
    assert {decays[id(p)] for p in (net[0].bias, *net[1].parameters())} == {0.0}
    assert all(g["nesterov"] and g["momentum"] == 0.8 for g in optimizer.param_groups)
    net(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()


# ---- averages of half models ----


def half_net() -> Net:
    return Net().to(torch.bfloat16)


def test_master_state_is_the_state_dict_in_fp32() -> None:
    """It includes buffers and changes from outside, and shares no memory with the optimizer."""
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).half()
    optimizer = FusedSGD(net.parameters(), lr=1e-4)
    for _ in range(3):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    with torch.no_grad():
        net[0].bias[0] = 7.0  # from outside
    state = optimizer.master_state(net)
    assert list(state) == list(net.state_dict())
    for (name, p), master in zip(net.named_parameters(), optimizer.master_params(), strict=True):
        assert state[name].dtype is torch.float32
        assert torch.equal(state[name].half(), p)
        if name != "0.bias":
            assert torch.equal(state[name], master)
        assert state[name].data_ptr() != master.data_ptr()
    assert state["0.bias"][0] == 7
    wide = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    wide.load_state_dict(state)


@pytest.mark.parametrize("tool", ["torch", "timm"])
def test_an_average_of_masters_moves(tool: str) -> None:
    """At a decay of 0.9999 an average in bf16 does not move; that of the masters equals float64."""
    net = half_net()
    optimizer = FusedSGD(net.parameters(), lr=0.5)
    shadow = copy.deepcopy(net).float()
    if tool == "torch":
        ema: Any = AveragedModel(shadow, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
        stuck: Any = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
    else:
        utils = pytest.importorskip("timm.utils")
        ema, stuck = (utils.ModelEmaV3(m, decay=0.9999) for m in (shadow, net))
    start = {n: p.detach().double().clone() for n, p in net.named_parameters()}
    want: dict[str, Tensor] | None = None
    for _ in range(5):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        shadow.load_state_dict(optimizer.master_state(net))
        for average, model in ((ema, shadow), (stuck, net)):
            average.update_parameters(model) if tool == "torch" else average.update(model)
        now = {n: p.detach().double() for n, p in shadow.named_parameters()}
        if want is None:  # AveragedModel starts at its first update, ModelEmaV3 at the initial model
            want = now if tool == "torch" else start
        want = {n: 0.9999 * want[n] + 0.0001 * now[n] for n in now}
    assert want is not None
    for name, p in ema.module.named_parameters():
        assert (p.double() - want[name]).norm() <= 1e-6 * want[name].norm()
    weight = "layers.1.weight"
    moved = (want[weight] - (start[weight] - (0.5 if tool == "torch" else 0.0))).norm()
    error = (dict(stuck.module.named_parameters())[weight].double() - want[weight]).norm()
    assert error > 0.5 * moved


# ---- parameter groups of model zoos ----


def not_decayed(model: nn.Module) -> set[str]:
    groups = param_groups(model, 1e-4, named=True)
    assert [g["weight_decay"] for g in groups] == [1e-4, 0.0]
    return set(groups[1]["param_names"])


@pytest.mark.parametrize("name", ["torchvision/resnet50", "timm/resnet50d", "resnet50d", "resnet50d fused"])
def test_no_norm_layer_is_decayed_whatever_its_name(name: str) -> None:
    """torchvision calls the BatchNorm of a shortcut downsample.1."""
    import fasttricks

    source, _, which = name.partition("/")
    if source == "torchvision":
        import torchvision

        model = torchvision.models.get_model(which)
    elif source == "timm":
        model = pytest.importorskip("timm").create_model(which)
    else:
        model = build("resnet50d", fused=not name.endswith("fused"))
        if name.endswith("fused"):  # the eager blocks, fused in place
            fasttricks.fuse(model)
    want = {n for n, p in model.named_parameters() if p.ndim == 1}
    assert not_decayed(model) == want
    assert len(want) == (
        107 if source == "torchvision" else 111
    )  # weight and bias of 53 BatchNorms, 55 with a deep stem, and one bias
    assert any("downsample" in n or "shortcut" in n for n in want)


# ---- schedules per epoch ----


@pytest.mark.parametrize("schedule", [warmup_cosine(2, 6), warmup_step(2, [4, 5], 0.5)])
def test_a_schedule_can_count_epochs(schedule: Any) -> None:
    """If scheduler.step() is called once per epoch, the numbers of a schedule are epochs."""
    p = nn.Parameter(torch.ones(3))
    optimizer = FusedSGD([p], lr=0.4)
    scheduler = LambdaLR(optimizer, schedule)
    rates = []
    for _ in range(6):
        for _ in range(3):
            p.grad = torch.ones(3)
            optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert rates == [pytest.approx(0.4 * schedule(epoch)) for epoch in range(6)]
    assert rates[:2] == [pytest.approx(0.2), pytest.approx(0.4)]
