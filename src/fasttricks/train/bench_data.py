"""``fasttricks bench-data``: images per second that can be read, beside those that a model takes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table

from . import parts
from .data import TrainSampler, loader
from .images import Samples
from .objective import Objective
from .recipe import DTYPES, Recipe
from .step import Step


def reading_speed(samples: Samples, batch: int, workers: int, seconds: float) -> float:
    """Images per second that `workers` processes read and augment, for at least `seconds` after the first batch."""
    sampler = TrainSampler(samples, 1, 0, shuffle=True)
    batches = loader(samples, sampler, batch, workers=workers, drop_last=False, pin=False)
    started, count, epoch = None, 0, 0
    while True:
        sampler.set_epoch(epoch)
        for read in batches:
            if started is None:  # the workers have started
                started = time.perf_counter()
                continue
            count += len(read.images)
            elapsed = time.perf_counter() - started
            if elapsed >= seconds:
                return count / elapsed
        epoch += 1


def training_speed(recipe: Recipe, classes: int, device: torch.device, seconds: float) -> float:
    """Images per second of training steps on a batch that is on the device already."""
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    model = parts.model_of(recipe, classes, device).train()
    shape = (recipe.batch_size, 3, recipe.image_size, recipe.image_size)
    images = torch.randn(shape, device=device).to(DTYPES[recipe.precision], memory_format=layout)
    labels = torch.randint(classes, (recipe.batch_size,), device=device)
    optimizer = parts.optimizer_of(recipe, model)
    step = Step(model, Objective(0.0, 1.0), optimizer, device=device)
    started, count = None, 0
    while True:
        step([(images, labels)])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if started is None:
            started = time.perf_counter()
            continue
        count += recipe.batch_size
        elapsed = time.perf_counter() - started
        if elapsed >= seconds:
            return count / elapsed


def show(
    sources: Mapping[str, Samples],
    recipe: Recipe,
    *,
    workers: Sequence[int],
    device: torch.device,
    seconds: float,
    console: Console,
) -> None:
    """Prints the speed of reading each source with each number of workers, and the speed of the model.

    Args:
        sources: by name; all with the same number of classes.
        recipe: its model, image and batch size, precision and memory format are used.
    """
    classes = max(len(samples.classes) for samples in sources.values())
    training = training_speed(recipe, classes, device, seconds)
    table = Table(title=f"{recipe.image_size}x{recipe.image_size} pixels, batch {recipe.batch_size}")
    table.add_column("data", overflow="fold")
    for column in ("images", "workers", "img/s read", f"img/s of {recipe.model}", "bottleneck"):
        table.add_column(column, justify="right")
    for name, samples in sources.items():
        for number in workers:
            speed = reading_speed(samples, recipe.batch_size, number, seconds)
            bottleneck = "data" if speed < training else "model"
            table.add_row(name, str(len(samples)), str(number), f"{speed:.0f}", f"{training:.0f}", bottleneck)
    console.print(table)
    console.print(f"{recipe.model} trains in {recipe.precision} on {device.type}", highlight=False)
