"""--config, --dry-run and the learning rate that it shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")
from train_runs import refused, same, train

from fasttricks import models
from fasttricks.train import cli, command, data, loop, parts, preview
from fasttricks.train.average import Average
from fasttricks.train.objective import Objective
from fasttricks.train.recipe import DTYPES, Recipe

pytestmark = pytest.mark.filterwarnings("always::fasttricks.train.images.DataWarning")


def test_a_configuration_with_overrides(tree: Path, tmp_path: Path, capsys: object) -> None:
    """Options from a file, the command line above it; the saved configuration gives the run again, bit for bit."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"data: {tree}\nmodel: resnet18d\nwidth: 4\nimage_size: 32\naugment: digits\nlr: 5e-2\nbatch-size: 8\n"
        "bias_decay: true\nlinear_lr: false\nlabel_smoothing: 0.1\nworkers: null\nepochs: 9\n"
    )
    assert cli.main(["train", "--config", str(path), "--epochs", "2", "--out", str(tmp_path / "a")]) == 0
    recipe = json.loads((tmp_path / "a" / "recipe.json").read_text())
    assert (recipe["epochs"], recipe["lr"], recipe["linear_lr"], recipe["no_bias_decay"]) == (2, 0.05, False, False)
    saved = str(tmp_path / "a" / "config.yaml")
    assert cli.main(["train", "--out", str(tmp_path / "b"), "--config", saved]) == 0
    assert json.loads((tmp_path / "b" / "recipe.json").read_text()) == recipe
    first, again = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("a", "b"))
    assert same(first["model"], again["model"])
    assert same(first["optimizer"], again["optimizer"])

    def refused_config(text: str) -> str:
        path.write_text(text)
        return refused(capsys, "--config", path)

    assert "expected a mapping" in refused_config("- 1")
    assert "is not valid YAML" in refused_config("a: [")
    assert "lr: expected one value" in refused_config("lr: [1, 2]")
    assert "No such file" in refused(capsys, "--config", tmp_path / "none.yaml")
    assert f"--config {path}: --learning-rate: not among the options" in refused_config("learning_rate: 1")
    assert f"--config {path}: argument --epochs: invalid int value: 'many'" in refused_config("epochs: many")
    assert "invalid choice: 'middling'" in refused_config("recipe: middling")


def test_dry_run(tree: Path, tmp_path: Path, capsys: object) -> None:
    out = tmp_path / "run"
    more = ["--epochs", "8", "--batch-size", "8", "--warmup-epochs", "1"]
    assert train(tree, out, *more, "--dry-run") == 0
    printed = " ".join(capsys.readouterr().out.split())
    model = models.build("resnet18d", 3, width=4)
    assert f"parameters {sum(p.numel() for p in model.parameters()):,}" in printed
    assert "3 per epoch, 24 in 8 epochs" in printed
    assert re.search(r"memory per process [0-9.]+ [kM]B, of which: [0-9.]+ kB parameters", printed)
    assert not out.exists()
    recipe = Recipe(model="resnet50d")
    assert preview.multiply_adds(recipe, 1000) == 4_328_824_832
    assert preview.curve([0.0, 0.5, 1.0, 0.5, 0.0]) == "▁▅█▅▁"
    assert preview.curve([1.0] * 1000, 4) == "████"


@pytest.mark.parametrize("fields", [{}, {"fused": False}, {"precision": "bf16", "channels_last": True}], ids=str)
def test_the_memory_of_the_preview_is_that_of_a_run(fields: dict[str, Any]) -> None:
    """What a forward pass on the CPU keeps; and the state of the optimizer after a step."""
    recipe = Recipe(model="resnet18d", width=8, image_size=40, batch_size=6, ema=0.5, label_smoothing=0.1, **fields)
    found = preview.memory(recipe, 5, 1)
    cpu = torch.device("cpu")
    model = parts.model_of(recipe, 5, cpu).train()
    images = torch.randn(6, 3, 40, 40).to(DTYPES[recipe.precision])
    if recipe.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    labels, criterion = torch.randint(5, (6,)), Objective(0.1, 1.0)
    kept = preview.saved_bytes(model, images, labels, criterion)
    assert found["saved for the backward pass"] == pytest.approx(kept, rel=0.01)
    optimizer = parts.optimizer_of(recipe, model)
    criterion(model(images), labels).backward()
    optimizer.step()
    state = sum(
        t.numel() * t.element_size()
        for of_parameter in optimizer.state.values()
        for t in of_parameter.values()
        if isinstance(t, torch.Tensor)
    )
    assert found["momentum"] + found.get("fp32 masters", 0) == pytest.approx(state, rel=0.01)
    assert found["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    averaged = Average(model, 0.5).module.state_dict().values()
    assert found["average"] == sum(t.nbytes for t in averaged if t.is_floating_point())


def test_the_memory_of_parts() -> None:
    """Ranks divide the batch, accumulation does not multiply it, and half precision halves it."""
    key = "saved for the backward pass"
    recipe = Recipe(model="resnet50d", width=16, image_size=64, batch_size=32)
    whole = preview.memory(recipe, 10, 1)[key]
    assert preview.memory(recipe, 10, 4)[key] == pytest.approx(whole / 4, rel=0.01)
    assert preview.memory(recipe.model_copy(update={"accumulate": 4}), 10, 1)[key] == whole
    assert preview.memory(recipe.model_copy(update={"precision": "fp16"}), 10, 1)[key] < 0.6 * whole
    assert whole < preview.memory(recipe.model_copy(update={"fused": False}), 10, 1)[key]


def test_the_learning_rates_of_the_preview_are_those_of_the_run(tree: Path, tmp_path: Path) -> None:
    """Each step's, across a warmup that ends within an epoch."""
    steps: list[float] = []
    printed: list[list[float]] = []

    class Watched(loop.Trainer):
        def fit(self) -> list[dict[str, Any]]:
            printed.append(self.learning_rates())
            return super().fit()

        def _receive(self, batch: data.Batch, training: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
            if training:
                steps.append(self.optimizer.param_groups[0]["lr"])
            return super()._receive(batch, training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "Trainer", Watched)
        more = ["--epochs", "4", "--batch-size", "8", "--warmup-epochs", "0.67", "--schedule", "cosine"]
        assert train(tree, tmp_path / "run", *more) == 0
    assert steps == pytest.approx(printed[0], rel=1e-12)
    assert len(set(steps)) > 6
