"""``fasttricks bench-data``: images per second that can be read, beside those that a model takes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from ..models import build
from ..optim import FusedSGD
from .data import TrainSampler, loader
from .images import Samples
from .objective import Objective


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


def training_speed(name: str, classes: int, size: int, batch: int, device: torch.device, seconds: float) -> float:
    """Images per second of training steps on a batch that is on the device already."""
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model = build(name, classes).to(device).to(memory_format=layout).train()
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=layout)
    labels = torch.randint(classes, (batch,), device=device)
    optimizer, objective = FusedSGD(model.parameters(), lr=1e-3, momentum=0.9), Objective(0.0, 1.0)
    started, count = None, 0
    while True:
        optimizer.zero_grad()
        objective(model(images), labels).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if started is None:
            started = time.perf_counter()
            continue
        count += batch
        elapsed = time.perf_counter() - started
        if elapsed >= seconds:
            return count / elapsed


def show(
    samples: Samples,
    model: str,
    *,
    size: int,
    batch: int,
    workers: Sequence[int],
    device: torch.device,
    seconds: float,
    console: Console,
) -> None:
    """Prints the speed of reading for each number of workers, and the model's."""
    reading = {number: reading_speed(samples, batch, number, seconds) for number in workers}
    training = training_speed(model, len(samples.classes), size, batch, device, seconds)
    table = Table(title=f"{len(samples)} images at {size}x{size}, batch {batch}")
    for column in ("workers", "img/s read", f"img/s of {model} on {device.type}, fp32", "bottleneck"):
        table.add_column(column, justify="right")
    for number, speed in reading.items():
        table.add_row(str(number), f"{speed:.0f}", f"{training:.0f}", "data" if speed < training else "model")
    console.print(table)
