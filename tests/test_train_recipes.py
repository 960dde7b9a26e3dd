"""Recipes and the loss, compared with the paper's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
import torchvision
from train_runs import SMALL, refused, train, write_tree

from fasttricks.train import cli
from fasttricks.train.objective import Objective, load_teacher
from fasttricks.train.recipe import RECIPES, RecipeError, fit_batch, resolve

pytestmark = pytest.mark.filterwarnings("always::fasttricks.train.images.DataWarning")


def test_recipes_are_the_papers() -> None:
    recipe, notes = resolve("efficient", "imagenet", {}, train_images=1_281_167, device="cuda")
    assert (recipe.batch_size, recipe.precision, recipe.warmup_epochs) == (1024, "fp16", 5)
    assert recipe.linear_lr
    assert recipe.zero_gamma
    assert recipe.no_bias_decay
    assert recipe.channels_last
    assert notes == []
    recipe, notes = resolve("baseline", "imagenet", {}, train_images=1_281_167, device="cuda")
    assert (recipe.batch_size, recipe.precision, recipe.lr, recipe.epochs) == (256, "fp32", 0.1, 120)
    assert not recipe.zero_gamma
    assert notes == []
    recipe, _ = resolve("refined", "imagenet", {}, train_images=1_281_167, device="cuda")
    assert (recipe.schedule, recipe.label_smoothing, recipe.mixup, recipe.temperature) == ("cosine", 0.1, 0.2, 20)
    assert recipe.teacher is None
    assert RECIPES.keys() == {"baseline", "efficient", "refined"}


@pytest.mark.parametrize("epochs", [1, 6, 20, 240])
def test_the_warmup_of_a_recipe_scales_with_the_epochs(epochs: int) -> None:
    recipe, notes = resolve("efficient", "imagenet", {"epochs": epochs}, train_images=1_281_167, device="cuda")
    assert recipe.warmup_epochs == pytest.approx(epochs / 24)
    assert ["in proportion" in note for note in notes] == [True]


def test_a_warmup_that_hides_milestones() -> None:
    """All of them, or the whole run: an error; some of them: a sentence; none, or a cosine: nothing."""

    def resolved(**given: object) -> list[str]:
        return resolve("efficient", "imagenet", given, train_images=1_281_167, device="cuda")[1]

    with pytest.raises(RecipeError, match=r"--warmup-epochs 5: .*1\.5, 3, 4\.5 epochs"):
        resolved(epochs=6, warmup_epochs=5)
    with pytest.raises(RecipeError, match="leaves no epoch of --epochs 6"):
        resolved(epochs=6, warmup_epochs=6, schedule="cosine")
    assert ["divided by 100" in note for note in resolved(epochs=6, warmup_epochs=4)] == [True]
    assert resolved(epochs=6, warmup_epochs=1) == []
    assert resolved(epochs=6, warmup_epochs=5, schedule="cosine") == []


def test_small_data_and_cpus_change_the_recipe_and_say_so() -> None:
    """A data set smaller than the batch is never zero steps."""
    recipe, notes = resolve("efficient", "imagenet", {}, train_images=1000, device="cpu")
    assert recipe.batch_size == fit_batch(1024, 1000) == 64
    assert recipe.precision == "fp32"
    assert len(notes) == 2
    assert "several times slower than fp32" in notes[1]
    assert not recipe.channels_last
    recipe, notes = resolve("efficient", "imagenet", {"precision": "fp16"}, train_images=1000, device="cpu")
    assert recipe.precision == "fp16"
    with pytest.raises(RecipeError, match="no step would run"):
        resolve("baseline", "imagenet", {"batch_size": 65}, train_images=64, device="cpu")


def test_a_model_without_residual_blocks_and_with_an_auxiliary_head(tree: Path, tmp_path: Path, capsys: object) -> None:
    """The recipe's zero gamma is left out and not reported; images are of the model's own size."""
    out = tmp_path / "run"
    more = ["--epochs", "1", "--batch-size", "12", "--model", "inception_v3", "--width", "2", "--augment", "digits"]
    assert cli.main(["train", "--data", str(tree), "--out", str(out), *more]) == 0
    printed = capsys.readouterr().out
    assert "inception_v3 has no known residual block" in printed
    assert "at 299x299" in printed
    assert "AuxLogits.fc.weight" in torch.load(out / "last.pt", weights_only=True)["model"]
    assert not json.loads((out / "recipe.json").read_text())["zero_gamma"]


def test_objective_is_the_papers() -> None:
    """Against the sums written out, in float64; gradients by its own derivative."""
    torch.manual_seed(0)
    z, r, a = (torch.randn(5, 7, dtype=torch.float64) for _ in range(3))
    labels, t, eps = torch.randint(7, (5,)), 3.0, 0.1
    q = torch.full((5, 7), eps / 7, dtype=torch.float64)
    q[range(5), labels] += 1 - eps

    def entropy(p: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return -(p * (logits.exp() / logits.exp().sum(1, keepdim=True)).log()).sum(1).mean()

    hard = entropy(q, z)
    soft = t**2 * entropy((r / t).exp() / (r / t).exp().sum(1, keepdim=True), z / t)
    loss = Objective(eps, t)
    torch.testing.assert_close(loss(z, labels), hard, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss(z, labels, r), hard + soft, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss((z, a, None), labels), hard + 0.3 * entropy(q, a), rtol=1e-12, atol=0)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z, labels, r), z)
    want = ((z.softmax(1) - q) + t * ((z / t).softmax(1) - (r / t).softmax(1))) / 5
    assert (gradient - want).norm() / want.norm() < 1e-12


def test_teachers(tree: Path, tmp_path: Path, capsys: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of another model, of other classes, an own name, and a library's with published weights."""
    teacher = tmp_path / "teacher"
    more = ["--epochs", "1", "--batch-size", "8"]
    assert train(tree, teacher, *more, "--ema", "0.5") == 0
    student = ["--recipe", "refined", "--teacher", str(teacher / "best.pt"), "--out", str(tmp_path / "student")]
    assert cli.main(["train", "--data", str(tree), *SMALL, *more, *student, "--model", "resnet18b"]) == 0
    files = ["--png", str(tmp_path / "c.png"), "--html", str(tmp_path / "c.html")]
    assert cli.main(["report", str(tmp_path / "student"), *files]) == 0
    assert "distillation" in " ".join(capsys.readouterr().out.split())
    base = ["--data", tree, "--out", tmp_path / "run", *SMALL, *more]
    assert "no published weights" in refused(capsys, *base, "--teacher", "resnet18d")
    assert "no checkpoint at" in refused(capsys, *base, "--teacher", tmp_path / "none.pt")
    assert "are for 1000 classes, asked for 3" in refused(capsys, *base, "--teacher", "torchvision/squeezenet1_1")
    assert "are for 1000 classes, asked for 3" in refused(capsys, *base, "--teacher", "timm/resnet18")
    other = write_tree(tmp_path / "other", ("cat", "dog"))
    printed = refused(capsys, "--data", other, *base[2:], "--teacher", teacher / "best.pt")
    assert "trained on 3 classes" in printed
    # A file in torchvision's cache stands for the download.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    (tmp_path / "hub" / "hub" / "checkpoints").mkdir(parents=True)
    theirs = torchvision.models.squeezenet1_1()
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    torch.save(theirs.state_dict(), tmp_path / "hub" / "hub" / "checkpoints" / url.rpartition("/")[2])
    taught = load_teacher("torchvision/squeezenet1_1", [str(i) for i in range(1000)])
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(taught(x), theirs.eval()(x))
    assert not any(p.requires_grad for p in taught.parameters())
