"""What ``fasttricks train --dry-run`` prints: the size of the model, the steps and the learning rate."""

from __future__ import annotations

from itertools import pairwise

import torch
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..models import build
from .recipe import Recipe

_BARS = "▁▂▃▄▅▆▇█"


def multiply_adds(recipe: Recipe, classes: int) -> int:
    """Multiply-adds of one image in evaluation: convolutions and matrix products of the eager model."""
    with torch.device("meta"):
        model = build(recipe.model, classes, width=recipe.width, fused=False)
    image = torch.empty(1, 3, recipe.image_size, recipe.image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image)
    return counter.get_total_flops() // 2


def curve(values: list[float], width: int = 60) -> str:
    """A picture in one line of text: the means of ``width`` equal parts, as bars of eight heights from 0."""
    width = min(width, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    top = max(means)
    return "".join(_BARS[round((len(_BARS) - 1) * mean / top)] for mean in means)


def show(recipe: Recipe, model: nn.Module, classes: int, rates: list[float], console: Console) -> None:
    """Prints the preview.

    Args:
        model: the model that would be trained.
        rates: the learning rate of each step.
    """
    madds = multiply_adds(recipe, classes)
    steps = len(rates) // recipe.epochs
    lines = [
        f"parameters          {sum(p.numel() for p in model.parameters()):,}",
        f"multiply-adds       {madds / 1e9:.4g} G per image ({recipe.image_size}x{recipe.image_size}), forward",
        # the backward pass has two products for each one of the forward pass
        f"in the whole run    {3 * madds * recipe.batch_size * len(rates) / 1e15:.4g} P, forward and backward",
        f"steps               {steps:,} per epoch, {len(rates):,} in {recipe.epochs} epochs",
        f"learning rate       at most {max(rates):.4g}, {rates[-1]:.4g} in the last step",
        f"                    {curve(rates)}",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
