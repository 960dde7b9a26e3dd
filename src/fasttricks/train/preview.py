"""What ``fasttricks train --dry-run`` prints: size, memory, steps and learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..models import build
from . import parts
from .objective import Objective
from .recipe import DTYPES, Recipe

_BARS = "▁▂▃▄▅▆▇█"


def multiply_adds(recipe: Recipe, classes: int) -> int:
    """Multiply-adds of one image in evaluation: convolutions and matrix products of the eager model."""
    with torch.device("meta"):
        model = build(recipe.model, classes, width=recipe.width, fused=False)
    image = torch.empty(1, 3, recipe.image_size, recipe.image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image)
    return counter.get_total_flops() // 2


def memory(recipe: Recipe, classes: int, ranks: int, teacher: nn.Module | None = None) -> dict[str, int]:
    """Bytes that each process needs during a step, computed on the meta device.

    Not included: temporaries of single operators, such as workspaces of convolutions, and what the allocator reserves.
    """
    meta = torch.device("meta")
    with meta:
        model = parts.model_of(recipe, classes, meta).train()
    numel = sum(p.numel() for p in model.parameters())
    state = [t for t in model.state_dict().values() if t.is_floating_point()]
    found = {
        "parameters": _bytes(model.parameters()) + _bytes(model.buffers()),
        "gradients": _bytes(model.parameters()),
        "momentum": 4 * numel if recipe.momentum else 0,
        "fp32 masters": sum(4 * p.numel() for p in model.parameters() if p.dtype != torch.float32),
        "average": sum(4 * t.numel() for t in state) if recipe.ema else 0,
        "teacher": _bytes(teacher.state_dict().values()) if teacher is not None else 0,
    }
    size, local_batch = recipe.image_size, recipe.batch_size // ranks
    images = torch.empty(local_batch, 3, size, size, dtype=DTYPES[recipe.precision], device=meta)
    if recipe.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.empty(local_batch, dtype=torch.int64, device=meta)
    found["saved for the backward pass"] = saved_bytes(model, images, labels, Objective(recipe.label_smoothing, 1.0))
    return {name: size for name, size in found.items() if size}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def saved_bytes(model: nn.Module, images: Tensor, labels: Tensor, criterion: nn.Module) -> int:
    """Bytes of the tensors that a forward pass keeps for the backward pass, without parameters and buffers."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        criterion(model(images), labels)
    return sum(storage.nbytes() for storage in kept.values())


def _readable(size: float) -> str:
    unit = 0
    while size >= 1000 and unit < 3:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {('B', 'kB', 'MB', 'GB')[unit]}"


def curve(values: list[float], width: int = 60) -> str:
    """A picture in one line of text: the means of ``width`` equal parts, as bars of eight heights from 0."""
    width = min(width, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    top = max(means)
    return "".join(_BARS[round((len(_BARS) - 1) * mean / top)] for mean in means)


def show(
    recipe: Recipe, classes: int, ranks: int, teacher: nn.Module | None, rates: list[float], console: Console
) -> None:
    """Prints the preview.

    Args:
        ranks: number of processes.
        rates: the learning rate of each step.
    """
    with torch.device("meta"):
        model = parts.model_of(recipe, classes, torch.device("meta"))
    needed = memory(recipe, classes, ranks, teacher)
    madds = multiply_adds(recipe, classes)
    steps = len(rates) // recipe.epochs
    lines = [
        f"parameters          {sum(p.numel() for p in model.parameters()):,}",
        f"multiply-adds       {madds / 1e9:.4g} G per image ({recipe.image_size}x{recipe.image_size}), forward",
        # the backward pass has two products for each one of the forward pass
        f"in the whole run    {3 * madds * recipe.effective_batch * len(rates) / 1e15:.4g} P, forward and backward",
        f"memory per process  {_readable(sum(needed.values()))}, of which:",
        *(f"  {_readable(size):<18}{name}" for name, size in needed.items()),
        f"steps               {steps:,} per epoch, {len(rates):,} in {recipe.epochs} epochs",
        f"learning rate       at most {max(rates):.4g}, {rates[-1]:.4g} in the last step",
        f"                    {curve(rates)}",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
