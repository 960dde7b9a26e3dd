"""Recipes: the settings of He et al. 2018, presets for small data, and overrides from the command line.

    baseline    section 2.1 of the paper: batch 256, learning rate 0.1, fp32, eager modules
    efficient   section 3: batch 1024, the learning rate scaled with it, warmup of 5 epochs, zero gamma, no decay of
                biases, gamma and beta, fp16 with fp32 master weights, and this package's fused modules
    refined     section 5 on top of efficient: cosine decay, label smoothing 0.1, mixup 0.2, and distillation if a
                teacher is given

All use Xavier-uniform weights, Nesterov momentum 0.9, weight decay 1e-4 and 120 epochs. Without cosine decay, the
learning rate is divided by 10 after 30, 60 and 90 epochs. In shorter runs, warmup and milestones keep their
proportions. Every trick is a field.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from .data import Augment

Precision = Literal["fp32", "fp16", "bf16"]
RecipeName = Literal["baseline", "efficient", "refined"]

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class RecipeError(ValueError):
    """The settings contradict each other; the message names them."""


class Recipe(BaseModel):
    """Everything that the trained weights depend on. Units: epochs, images, and fractions of 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: RecipeName = "efficient"
    model: str = "resnet50d"
    width: int | None = Field(default=None, ge=2, multiple_of=2)
    fused: bool = True
    channels_last: bool = False
    image_size: int = Field(default=224, ge=8)
    augment: Augment = "imagenet"

    epochs: int = Field(default=120, ge=1)
    batch_size: int = Field(default=256, ge=1)  # of one forward and backward pass, over all ranks
    accumulate: int = Field(default=1, ge=1)  # passes per step
    optimizer: Literal["sgd", "lars"] = "sgd"
    lr: float = Field(default=0.1, gt=0, allow_inf_nan=False)  # for a batch of 256 if linear_lr is set
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(default=1e-4, ge=0, allow_inf_nan=False)
    schedule: Literal["step", "cosine"] = "step"
    precision: Precision = "fp32"

    linear_lr: bool = False
    warmup_epochs: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    zero_gamma: bool = False
    no_bias_decay: bool = False
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    teacher: str | None = None
    temperature: float = Field(default=20.0, gt=0, allow_inf_nan=False)
    ema: float = Field(default=0.0, ge=0, lt=1)  # decay of the average per step; 0 keeps no average
    xavier: bool = True
    sync_bn: bool = False

    seed: int = Field(default=0, ge=0)

    @property
    def effective_batch(self) -> int:
        """Images per step."""
        return self.batch_size * self.accumulate


class Run(BaseModel):
    """Where a run reads and writes, how it executes and when it stops: the weights do not depend on it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    data_dir: Path | None = None
    out: Path
    resume: Path | None = None
    workers: int = Field(default=0, ge=0)
    device: str = "cpu"
    compile: bool = False
    cuda_graph: bool | None = None  # None: on CUDA, if possible
    save_every: int | None = Field(default=None, ge=1)  # steps between checkpoints within an epoch
    log_every: int = Field(default=10, ge=1)  # steps between TensorBoard points and, on CUDA, checks of the loss
    max_skipped_steps: int = Field(default=30, ge=1)
    min_loss_scale: float = Field(default=2.0**-10, gt=0)
    max_bad_files: float = Field(default=0.1, ge=0, le=1)  # share of the images that may be unreadable


_EFFICIENT = {
    "fused": True,
    "batch_size": 1024,
    "linear_lr": True,
    "warmup_epochs": 5.0,
    "zero_gamma": True,
    "no_bias_decay": True,
    "precision": "fp16",
}

RECIPES: dict[str, dict[str, Any]] = {
    "baseline": {"recipe": "baseline", "fused": False},
    "efficient": {"recipe": "efficient", **_EFFICIENT},
    "refined": {"recipe": "refined", **_EFFICIENT, "schedule": "cosine", "label_smoothing": 0.1, "mixup": 0.2},
}

PAPER_EPOCHS = 120  # the warmup of the recipes is relative to it

# The step schedule divides the learning rate by 10 after these fractions of the epochs.
MILESTONES = (0.25, 0.5, 0.75)

_DIGITS = {"width": 24, "image_size": 40, "augment": "digits", "epochs": 20}

# changes to recipes for other data than ImageNet: {preset: {recipe: fields}}; digits-cpu is for two CPU cores
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "imagenet": {"baseline": {}, "efficient": {}, "refined": {}},
    "digits-cpu": {
        # the baseline's 0.1 at a batch of 256, in proportion
        "baseline": {**_DIGITS, "batch_size": 32, "lr": 0.0125},
        "efficient": {**_DIGITS, "batch_size": 128},
        "refined": {**_DIGITS, "batch_size": 128},
    },
}

# models with another image size than 224x224
MODEL_SIZES = {"inception_v3": 299, "nasnetalarge": 331}

# The batch sizes of the recipes are for 1.28 million images. For smaller data sets all are halved until the largest,
# 1024, gives at least FEWEST_STEPS per epoch.
FEWEST_STEPS = 10
SMALLEST_BATCH = 8


def asked_fields(recipe: str, preset: str, given: dict[str, Any]) -> dict[str, Any]:
    """Fields of :class:`Recipe`: the recipe's, then the preset's, then those of ``given``."""
    fields = {**RECIPES[recipe], **PRESETS[preset][recipe], **given}
    size = MODEL_SIZES.get(fields.get("model", "").rpartition("/")[2])
    return fields if size is None else {**fields, "image_size": given.get("image_size", size)}


def resolve(
    recipe: str, preset: str, given: dict[str, Any], *, train_images: int, device: str
) -> tuple[Recipe, list[str]]:
    """Applies recipe, preset and explicit settings in this order, then fits the result to the data and the device.

    Args:
        recipe, preset: keys of RECIPES and PRESETS.
        given: fields of :class:`Recipe` that the user set.
        train_images: size of the training set.
        device: "cpu" or "cuda".

    Returns:
        The recipe as it will run, and a sentence for each change that the user did not ask for.

    Raises:
        pydantic.ValidationError: a field out of its range.
        RecipeError: the explicit batch is larger than the training set, the training set has fewer than 2 images, or no
            epoch or no milestone of the step schedule is left after the warmup.
    """
    preset_fields = PRESETS[preset][recipe]
    asked = Recipe(**asked_fields(recipe, preset, given))
    notes: list[str] = []
    changes: dict[str, Any] = {}

    if train_images < 2:
        raise RecipeError(f"the training set has {train_images} image(s); batch normalisation needs at least 2")
    if "batch_size" in given:
        if asked.effective_batch > train_images:
            times = f" with --accumulate {asked.accumulate}" if asked.accumulate > 1 else ""
            raise RecipeError(
                f"--batch-size {asked.batch_size}{times} is larger than the training set of {train_images} images: "
                f"no step would run; give at most {train_images}"
            )
    else:
        batch = fit_batch(asked.batch_size, train_images) if "batch_size" not in preset_fields else asked.batch_size
        batch = min(batch, train_images)
        if batch != asked.batch_size:
            changes["batch_size"] = batch
            note = f"batch {asked.batch_size} is the paper's for ImageNet; {train_images} images get batch {batch}"
            if not asked.linear_lr and "lr" not in given:
                changes["lr"] = asked.lr * batch / asked.batch_size
                note += f" and the learning rate in proportion, {changes['lr']:g}"
            notes.append(note)
    if device == "cuda" and "channels_last" not in given:
        changes["channels_last"] = True  # tensor cores compute convolutions in this layout
    if device == "cpu" and asked.precision != "fp32" and "precision" not in given:
        changes["precision"] = "fp32"
        notes.append(
            f"recipe {recipe} means {asked.precision} with fp32 master weights, which a CPU computes several "
            f"times slower than fp32: computing in fp32 (--precision {asked.precision} forces it)"
        )
    if "warmup_epochs" not in given:
        # the warmup of a recipe is for PAPER_EPOCHS
        changes["warmup_epochs"] = asked.warmup_epochs * asked.epochs / PAPER_EPOCHS
        if 0 < changes["warmup_epochs"] != asked.warmup_epochs:
            notes.append(
                f"warmup of {changes['warmup_epochs']:.3g} epochs: {asked.warmup_epochs:g} of {PAPER_EPOCHS} in "
                f"recipe {recipe}, in proportion to {asked.epochs}"
            )
    else:
        notes += _check_warmup(asked)
    return asked.model_copy(update=changes), notes


def _check_warmup(recipe: Recipe) -> list[str]:
    """Returns a sentence if the warmup hides some milestones of the step schedule.

    Raises:
        RecipeError: the warmup lasts as long as the run, or hides all milestones.
    """
    warmup, epochs = recipe.warmup_epochs, recipe.epochs
    if warmup >= epochs:
        raise RecipeError(f"--warmup-epochs {warmup:g} leaves no epoch of --epochs {epochs} to train; give less")
    if recipe.schedule != "step":
        return []
    milestones = [fraction * epochs for fraction in MILESTONES]
    hidden = [milestone for milestone in milestones if milestone <= warmup]
    if len(hidden) == len(milestones):
        raise RecipeError(
            f"--warmup-epochs {warmup:g}: the step schedule of --epochs {epochs} divides the learning rate after "
            f"{', '.join(f'{m:g}' for m in milestones)} epochs, all of them within the warmup; give less than "
            f"{milestones[0]:g}, more --epochs, or --schedule cosine"
        )
    if hidden:
        return [
            f"--warmup-epochs {warmup:g} reaches past epoch {hidden[-1]:g}, after which the learning rate is already "
            f"divided by {10 ** len(hidden)}: it drops at the end of the warmup"
        ]
    return []


def fit_batch(batch: int, images: int) -> int:
    """Halves ``batch`` as often as 1024 must be halved to give FEWEST_STEPS steps per epoch, down to SMALLEST_BATCH."""
    reference = 1024
    while reference * FEWEST_STEPS > images and batch > SMALLEST_BATCH:
        reference, batch = reference // 2, batch // 2
    return batch
