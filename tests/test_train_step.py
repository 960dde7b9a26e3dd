"""One training step: accumulated gradients, no waiting for the device, CUDA graphs, torch.compile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("torchvision")
from cases import relative_error
from rich.console import Console
from train_runs import rows, same, train

from fasttricks import models, optim
from fasttricks.nn import AvgPoolConv1x1, BatchNormReLU2d
from fasttricks.train import data, graph, loop, parts
from fasttricks.train.average import Average
from fasttricks.train.distributed import World
from fasttricks.train.objective import Objective
from fasttricks.train.recipe import Recipe, Run
from fasttricks.train.step import Step


def without_norms(classes: int = 3) -> nn.Module:
    """A network whose loss of a batch is the mean of those of its parts."""
    return nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.ReLU(), nn.Flatten(1), nn.LazyLinear(classes))


def step_of(model: nn.Module, optimizer: str, **options: Any) -> Step:
    groups = optim.param_groups(model, 1e-2)
    made = {"FusedSGD": optim.FusedSGD, "FusedLARS": optim.FusedLARS, "SGD": torch.optim.SGD}[optimizer]
    updates = made(groups, lr=0.1, momentum=0.9, nesterov=True)
    return Step(model, Objective(0.1, 20.0), updates, device=torch.device("cpu"), **options)


# ---- accumulation ----


@pytest.mark.parametrize("optimizer", ["FusedSGD", "FusedLARS", "SGD"])
def test_accumulated_batches_are_one_large_batch(optimizer: str) -> None:
    results = []
    model = without_norms().double()
    images, labels = torch.randn(4, 12, 3, 9, 7, dtype=torch.float64), torch.randint(3, (4, 12))
    model(images[0])
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for passes in (1, 3, 6):
        model.load_state_dict(start)
        average = Average(model, 0.7)
        step = step_of(model, optimizer, average=average)
        outputs = [
            step(list(zip(x.chunk(passes), y.chunk(passes), strict=True))) for x, y in zip(images, labels, strict=True)
        ]
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        means = torch.cat([p.flatten() for p in average.module.parameters()])
        results.append((torch.stack([loss for loss, _ in outputs]), weights, means, [int(hits) for _, hits in outputs]))
    for losses, weights, means, hits in results[1:]:
        assert relative_error(losses, results[0][0]) < 1e-12
        assert relative_error(weights, results[0][1]) < 1e-12
        assert relative_error(means, results[0][2]) < 1e-6  # averages are of fp32 weights
        assert hits == results[0][3]


def test_an_overflow_in_one_pass_skips_the_step() -> None:
    model = without_norms().half()
    batches = [(torch.randn(4, 3, 9, 7).half(), torch.randint(3, (4,))) for _ in range(3)]
    model(batches[0][0])
    before = [p.detach().clone() for p in model.parameters()]
    scaler = optim.LossScaler(init_scale=2.0**30)
    step = step_of(model, "FusedSGD", scaler=scaler)
    for bad in range(3):
        factors = iter([1.0 if i == bad else 1e-12 for i in range(3)])
        step.criterion = lambda logits, *_: logits.float().square().sum() * next(factors)  # noqa: B023
        step(batches)
        assert scaler.found_inf == 1
        assert same(before, [p.detach() for p in model.parameters()])
    assert scaler.get_scale() == 2.0**27
    assert not step.broken  # the losses themselves were finite


def test_the_effective_batch_counts(tree: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the learning rate, the steps and the log."""

    def tiny(*_: object) -> nn.Module:
        model = without_norms()
        model(torch.zeros(1, 3, 32, 32))
        return model

    monkeypatch.setattr(parts, "model_of", tiny)
    options = ["--recipe", "efficient", "--no-zero-gamma", "--epochs", "3"]
    assert train(tree, tmp_path / "one", *options, "--batch-size", "12") == 0
    assert train(tree, tmp_path / "parts", *options, "--batch-size", "4", "--accumulate", "3") == 0
    assert "batch 12 = 4 x 3 passes, 2 steps per epoch" in capsys.readouterr().out
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "parts"), strict=True):
        for name in ("step", "lr", "train_loss", "train_top1", "val_loss"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-6), name
    a, b = (torch.load(tmp_path / out / "last.pt", weights_only=True)["model"] for out in ("one", "parts"))
    assert all(relative_error(b[name], a[name]) < 1e-6 for name in a)


# ---- no waiting for the device ----


class Copies(TorchDispatchMode):
    """Names the copies from the host to a device that wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            devices = {t.device for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)}
            if len(devices) > 1 and not (kwargs or {}).get("non_blocking"):
                self.found.append(str(func))
        return result


@pytest.mark.parametrize(
    "fields",
    [
        {"precision": "fp32"},
        {"precision": "fp16", "ema": 0.9, "accumulate": 2},
        {"precision": "bf16", "mixup": 0.2, "label_smoothing": 0.1},
        {"precision": "fp32", "fused": False},
        {"optimizer": "lars"},
    ],
    ids=str,
)
def test_an_epoch_waits_for_nothing_before_it_looks_at_the_loss(tree: Path, fields: dict[str, Any]) -> None:
    """On the meta device, whose tensors have no values: reading one (item, bool, cpu, ...) is an error."""
    recipe = Recipe(model="resnet18d", width=4, image_size=32, augment="digits", batch_size=4, **fields)
    run = Run(data=str(tree), out=Path("unused"), log_every=1000)
    sets = data.open_data(str(tree), None, augment="digits", size=32, seed=0)
    trainer = loop.Trainer(recipe, run, *sets, World(0, 1, torch.device("meta")), Console(quiet=True))
    trainer.stop = loop.Stop(trainer.world)
    with Copies() as copies, pytest.raises((RuntimeError, NotImplementedError), match="meta tensors"):
        trainer.train_epoch(None)
    assert copies.found == []
    assert trainer.step == trainer.steps_per_epoch - 1 == 24 // recipe.effective_batch - 1


# ---- CUDA graphs ----


class FakeRecorder:
    """Captures by remembering the step, and replays by running it on the captured inputs."""

    def __init__(self, step: Step, fault: str | None = None):
        self.step, self.fault = step, fault
        self.calls: list[str] = []

    def warm_up(self, run: Callable[[], Any]) -> Any:
        self.calls.append("warm-up")
        return run()

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.calls.append("capture")
        if self.fault is not None:
            raise RuntimeError(self.fault)
        average = self.step.average
        result = [torch.empty(()), torch.empty((), dtype=torch.int64)]

        def replay() -> None:
            self.calls.append("replay")
            steps = average.steps if average is not None else 0
            for mine, new in zip(result, run(), strict=True):
                mine.copy_(new)
            if average is not None:
                average.steps = steps  # the host counts nothing in a replay

        return replay, tuple(result)


def steps_with(make: Callable[[Step], Any], schedule: list[float]) -> tuple[list[Tensor], list[Tensor], Any]:
    """Losses and weights after some steps with these learning rates."""
    torch.manual_seed(0)
    model = models.build("resnet18d", 3, width=4)
    step = step_of(model, "FusedSGD", average=Average(model, 0.5))
    call = make(step)
    losses = []
    for rate in schedule:
        for group in step.optimizer.param_groups:
            group["lr"] = rate
        loss, _ = call([(torch.randn(4, 3, 32, 32), torch.randint(3, (4,))) for _ in range(2)])
        losses.append(loss.clone())
    tensors = [*model.state_dict().values(), *step.average.module.state_dict().values()]
    return losses, tensors, call


RATES = [0.01, 0.02, 0.03, 0.04, 0.05, 0.01, 0.002]


def test_a_captured_step_is_the_step() -> None:
    """Warm-up, one capture, and replays with new images, labels and learning rates."""
    said: list[str] = []
    recorders = []

    def graphed(step: Step) -> graph.GraphedStep:
        recorders.append(FakeRecorder(step))
        return graph.GraphedStep(step, recorders[0], said.append)

    want = steps_with(lambda step: step, RATES)
    got = steps_with(graphed, RATES)
    assert same(want[:2], got[:2])
    assert recorders[0].calls == ["warm-up"] * graph.WARMUP + ["capture"] + ["replay"] * (len(RATES) - graph.WARMUP)
    assert got[2].captured
    assert said == []


def test_a_step_that_cannot_be_captured_runs_eagerly() -> None:
    said: list[str] = []

    def graphed(step: Step) -> graph.GraphedStep:
        fault = "operation not permitted when stream is capturing\nmore lines"
        return graph.GraphedStep(step, FakeRecorder(step, fault), said.append)

    want = steps_with(lambda step: step, RATES)
    got = steps_with(graphed, RATES)
    assert same(want[:2], got[:2])
    assert not got[2].captured
    assert said == ["no CUDA graph: the step cannot be captured: operation not permitted when stream is capturing"]


def test_when_a_graph_is_tried() -> None:
    model = without_norms()
    model(torch.zeros(1, 3, 9, 9))
    fused, plain = (step_of(model, name).optimizer for name in ("FusedSGD", "SGD"))
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert graph.unsupported(cuda, 1, fused) is None
    assert graph.unsupported(cpu, 1, fused) == "it needs CUDA, the run is on cpu"
    assert "one process" in str(graph.unsupported(cuda, 2, fused))
    assert "SGD reads its learning rate on the host" in str(graph.unsupported(cuda, 1, plain))


def test_a_graph_that_is_asked_for_without_cuda(tree: Path, tmp_path: Path, capsys: Any) -> None:
    """The reason is printed, and the run goes on; by default nothing is printed on the CPU."""
    options = ["--batch-size", "8", "--epochs", "1"]
    assert train(tree, tmp_path / "asked", *options, "--cuda-graph") == 0
    assert "no CUDA graph: it needs CUDA, the run is on cpu" in capsys.readouterr().out
    assert train(tree, tmp_path / "default", *options) == 0
    assert "CUDA graph" not in capsys.readouterr().out


# ---- torch.compile ----


@pytest.mark.xdist_group("compiled_training")  # the second finds the first one's code in inductor's cache
@pytest.mark.parametrize("more", [[], ["--accumulate", "2"]], ids=" ".join)
def test_a_compiled_model_trains_as_the_eager_one(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    """With the fused operators in its graph, compiled once; the names in the checkpoint are those of the model."""

    def tiny(*_: object) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(3, 8, 3, stride=4, bias=False), BatchNormReLU2d(8), AvgPoolConv1x1(8, 6)),
            *(nn.Flatten(1), nn.Linear(96, 3)),
        )

    monkeypatch.setattr(parts, "model_of", tiny)
    options = ["--recipe", "efficient", "--no-zero-gamma", "--epochs", "2", "--batch-size", "8", *more]
    assert train(tree, tmp_path / "eager", *options) == 0
    torch.compiler.reset()
    with counters_of_graphs() as graphs:
        assert train(tree, tmp_path / "compiled", *options, "--compile") == 0
    assert graphs() == 1
    a, b = (torch.load(tmp_path / out / "last.pt", weights_only=True)["model"] for out in ("eager", "compiled"))
    assert list(a) == list(b)
    assert all(relative_error(b[name], a[name]) < 1e-4 for name in a)


@contextlib.contextmanager
def counters_of_graphs() -> Iterator[Callable[[], int]]:
    """How many graphs torch.compile has made since."""
    counters = torch._dynamo.utils.counters
    before = counters["stats"]["unique_graphs"]
    yield lambda: counters["stats"]["unique_graphs"] - before
