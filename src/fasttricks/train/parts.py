"""The parts of a run, from its recipe: model, teacher, optimizer and schedule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import optim
from ..models import build, names, xavier_
from ..nn import zero_init_last
from .errors import TrainingError
from .objective import keep_norms_in_fp32, load_teacher
from .recipe import DTYPES, MILESTONES, Recipe


def model_of(recipe: Recipe, classes: int, device: torch.device) -> nn.Module:
    """The model with its initial weights.

    Raises:
        TrainingError: no such model, or it does not take images of this size.
    """
    try:
        model = build(recipe.model, classes, width=recipe.width, fused=recipe.fused, aux_logits=True)
    except (ValueError, ImportError) as error:
        raise TrainingError(f"--model: {error}") from error
    _check_image_size(model, recipe)
    if recipe.xavier and recipe.model not in names():  # the package's own models are initialised so already
        xavier_(model)
    if recipe.zero_gamma:
        try:
            zero_init_last(model)
        except ValueError as error:
            raise TrainingError(f"--zero-gamma: {recipe.model}: {error}") from error
    return _placed(model, recipe, device)


def teacher_of(recipe: Recipe, classes: list[str], device: torch.device) -> nn.Module | None:
    """The model to distil from, or None.

    Raises:
        TrainingError: it cannot be loaded.
    """
    if recipe.teacher is None:
        return None
    try:
        teacher = load_teacher(recipe.teacher, classes)
    except (ValueError, ImportError, OSError) as error:
        raise TrainingError(f"--teacher {recipe.teacher}: {error}") from error
    return _placed(teacher, recipe, device)


def _placed(model: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    if recipe.precision != "fp32":
        keep_norms_in_fp32(model, DTYPES[recipe.precision])
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    return model.to(device)


def _check_image_size(model: nn.Module, recipe: Recipe) -> None:
    """A forward pass without data: many models have a smallest image, and some only one size."""
    size = recipe.image_size
    try:
        copy.deepcopy(model).to("meta").train()(torch.empty(2, 3, size, size, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise TrainingError(f"--model {recipe.model} does not take images of {size}x{size}: {error}") from error


def optimizer_of(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer. Half-precision weights need FusedSGD, which keeps their fp32 masters."""
    groups = optim.param_groups(model, recipe.weight_decay, no_bias_decay=recipe.no_bias_decay)
    lr = optim.linear_scaled_lr(recipe.lr, recipe.effective_batch) if recipe.linear_lr else recipe.lr
    options: dict[str, Any] = {"lr": lr, "momentum": recipe.momentum, "nesterov": recipe.nesterov}
    if recipe.optimizer == "lars":
        return optim.FusedLARS(groups, **options)
    if recipe.fused or recipe.precision != "fp32":
        return optim.FusedSGD(groups, **options)
    return torch.optim.SGD(groups, **options)


def schedule_of(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """The factor of the learning rate in each step."""
    total, warmup = recipe.epochs * steps_per_epoch, round(recipe.warmup_epochs * steps_per_epoch)
    if recipe.schedule == "cosine":
        return optim.warmup_cosine(warmup, total)
    return optim.warmup_step(warmup, [int(total * fraction) for fraction in MILESTONES])
