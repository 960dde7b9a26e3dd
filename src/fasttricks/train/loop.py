"""The training loop: epochs of steps, validation, logs and checkpoints, on one process or under torchrun."""

from __future__ import annotations

import copy
import math
import random
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2

from .. import optim
from ..models import build, names, xavier_
from ..nn import zero_init_last
from . import checkpoint
from .checkpoint import CheckpointError
from .clock import Clock
from .data import Batch, DataWarning, Images, TrainSampler, ValSampler, loader
from .distributed import World
from .objective import Objective, keep_norms_in_fp32, load_teacher, logits_of
from .recipe import DTYPES, MILESTONES, Recipe, Run
from .report import CsvLog


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and what was kept."""


class Trainer:
    """One run of a recipe on a training and a validation set.

    Writes into ``run.out``: log.csv (a row per epoch), tensorboard/, last.pt (after every epoch) and best.pt (the epoch
    of the best top-1 so far).

    Raises:
        TrainingError: the batch does not divide among the ranks, or training went wrong.
        CheckpointError: ``run.resume`` is no checkpoint of this model and these classes.
    """

    def __init__(self, recipe: Recipe, run: Run, train_set: Images, val_set: Images, world: World, console: Console):
        self.recipe, self.run, self.world, self.console = recipe, run, world, console
        self.device = world.device
        if recipe.batch_size % world.size or recipe.batch_size // world.size < 2:
            raise TrainingError(
                f"batch {recipe.batch_size} does not divide into at least 2 images for each of "
                f"{world.size} processes; give another --batch-size"
            )
        local_batch = recipe.batch_size // world.size
        self.classes = train_set.classes

        pin = self.device.type == "cuda"
        self.train_sampler = TrainSampler(
            train_set, world.size, world.rank, shuffle=True, seed=recipe.seed, drop_last=True
        )
        val_sampler = ValSampler(len(val_set), world.rank, world.size)
        self.train_loader = loader(
            train_set, self.train_sampler, local_batch, workers=run.workers, drop_last=True, pin=pin
        )
        self.val_loader = loader(
            val_set, val_sampler, max(local_batch, 64), workers=run.workers, drop_last=False, pin=pin
        )
        self.steps_per_epoch = len(self.train_loader)
        self.epoch = self.step = 0
        self.best_top1 = -1.0
        self.bad_files: set[str] = set()

        # The same weights on every rank, then generators of its own for each.
        torch.manual_seed(recipe.seed)
        self.model = self._build_model()
        self._seed(recipe.seed + world.rank)
        self.optimizer = self._build_optimizer()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._schedule())
        self.scaler = optim.LossScaler() if recipe.precision == "fp16" else None
        self.mixup = v2.MixUp(alpha=recipe.mixup, num_classes=len(self.classes)) if recipe.mixup > 0 else None
        self.criterion = Objective(recipe.label_smoothing, recipe.temperature)
        self.teacher = self._load_teacher(recipe.teacher) if recipe.teacher is not None else None
        self.ema = self._average() if recipe.ema > 0 else None
        self.clock = Clock(self.device)
        if run.resume is not None:
            self._restore(run.resume)
        # After the weights are final: it hands rank 0's to the others.
        self.replica: nn.Module = self.model
        if world.size > 1:
            devices = [self.device.index] if self.device.type == "cuda" else None
            self.replica = DistributedDataParallel(self.model, device_ids=devices)

    @staticmethod
    def _seed(seed: int) -> None:
        """Every generator that a transform or a model may draw from: torch's, numpy's and Python's."""
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002  (its global generator is what transforms of others use)
        random.seed(seed)

    def _build_model(self) -> nn.Module:
        recipe = self.recipe
        try:
            model = build(recipe.model, len(self.classes), width=recipe.width, fused=recipe.fused, aux_logits=True)
        except (ValueError, ImportError) as error:
            raise TrainingError(f"--model: {error}") from error
        self._check_image_size(model)
        if recipe.xavier and recipe.model not in names():  # own models start so by themselves
            xavier_(model)
        if recipe.zero_gamma:
            try:
                zero_init_last(model)
            except ValueError as error:
                raise TrainingError(f"--zero-gamma: {recipe.model}: {error}") from error
        if recipe.precision != "fp32":
            keep_norms_in_fp32(model, DTYPES[recipe.precision])
        if recipe.channels_last:
            model.to(memory_format=torch.channels_last)
        return model.to(self.device)

    def _check_image_size(self, model: nn.Module) -> None:
        """A step without data: many models have a smallest image, and some only one size."""
        size = self.recipe.image_size
        try:
            copy.deepcopy(model).to("meta").train()(torch.empty(2, 3, size, size, device="meta"))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise TrainingError(
                f"--model {self.recipe.model} does not take images of {size}x{size}: {error}"
            ) from error

    def _load_teacher(self, name: str) -> nn.Module:
        try:
            teacher = load_teacher(name, self.classes)
        except (ValueError, ImportError, OSError) as error:
            raise TrainingError(f"--teacher {name}: {error}") from error
        if self.recipe.precision != "fp32":
            keep_norms_in_fp32(teacher, DTYPES[self.recipe.precision])
        if self.recipe.channels_last:
            teacher.to(memory_format=torch.channels_last)
        return teacher.to(self.device)

    def _average(self) -> AveragedModel:
        """The moving average of weights and running statistics, in fp32, in which small changes are not lost."""
        decay = self.recipe.ema

        def mean(average: Tensor, new: Tensor, steps: Tensor | int) -> Tensor:
            # torch's own function would round the new weights to their half precision once more
            return average.lerp(new.to(average.dtype), 1 - decay) if average.is_floating_point() else new

        average = AveragedModel(self.model, avg_fn=mean, use_buffers=True)
        average.module.float()
        return average

    def _build_optimizer(self) -> torch.optim.Optimizer:
        recipe = self.recipe
        groups = optim.param_groups(self.model, recipe.weight_decay, no_bias_decay=recipe.no_bias_decay)
        lr = optim.linear_scaled_lr(recipe.lr, recipe.batch_size) if recipe.linear_lr else recipe.lr
        options: dict[str, Any] = {"lr": lr, "momentum": recipe.momentum, "nesterov": recipe.nesterov}
        if recipe.optimizer == "lars":
            return optim.FusedLARS(groups, **options)
        if recipe.fused or recipe.precision != "fp32":  # half weights need the masters of FusedSGD
            return optim.FusedSGD(groups, **options)
        return torch.optim.SGD(groups, **options)

    def _schedule(self) -> Any:
        recipe = self.recipe
        total, warmup = recipe.epochs * self.steps_per_epoch, round(recipe.warmup_epochs * self.steps_per_epoch)
        if recipe.schedule == "cosine":
            return optim.warmup_cosine(warmup, total)
        return optim.warmup_step(warmup, [int(total * fraction) for fraction in MILESTONES])

    def learning_rates(self) -> list[float]:
        """The learning rate of each step of the whole run."""
        factor, rate = self.scheduler.lr_lambdas[0], float(self.scheduler.base_lrs[0])
        return [rate * factor(step) for step in range(self.recipe.epochs * self.steps_per_epoch)]

    def fit(self) -> list[dict[str, Any]]:
        """Train until ``recipe.epochs`` epochs are done. Returns the rows that went into log.csv.

        Raises:
            TrainingError: the loss or the weights are not finite, too many steps in a row were skipped, or the loss
                scale collapsed. last.pt and best.pt stay those of the last good epoch.
        """
        out, rows, started = self.run.out, [], time.perf_counter()
        log = tensorboard = None
        if self.world.first:
            log = CsvLog(out / "log.csv", self.epoch)
            tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=self.step if self.epoch else None)
        try:
            while self.epoch < self.recipe.epochs:
                row = self.train_epoch(tensorboard)
                if not checkpoint.all_finite(self.model):
                    raise self._failure("a weight or a running statistic is not finite")
                row |= self.validate()
                self.epoch += 1
                row["epoch"], row["bad_files"] = self.epoch, self._count_bad_files()
                rows.append(row)
                # The row first: if the process ends before the checkpoint is written, a resumed run drops it again.
                if log:
                    log.append(row)
                self._save(row["val_top1"], row["val_loss"])
                if tensorboard:
                    for name, value in row.items():
                        if name not in ("epoch", "step"):
                            tensorboard.add_scalar(f"epoch/{name}", value, self.epoch)
                    tensorboard.flush()
                    self._print(row, self._remaining(len(rows), time.perf_counter() - started))
            if rows:
                self._summarise(rows, time.perf_counter() - started)
        finally:
            if tensorboard:
                tensorboard.close()
        return rows

    def train_epoch(self, tensorboard: SummaryWriter | None) -> dict[str, Any]:
        """One pass over the training set; returns its columns of the log."""
        self.train_sampler.set_epoch(self.epoch)
        self.replica.train()
        # Sums stay on the device: loss, hits, images; steps skipped, skipped in a row; whether a loss was not finite.
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        in_a_row, not_finite = skipped.clone(), torch.zeros((), dtype=torch.bool, device=self.device)
        look_every = 1 if self.device.type == "cpu" else self.run.log_every
        lr = self.scheduler.get_last_lr()[0]
        started = time.perf_counter()
        with self._progress() as progress:
            task = progress.add_task("", total=self.steps_per_epoch, info="")
            self.clock.start()
            for i, batch in enumerate(self.train_loader, 1):
                images, labels = self._receive(batch)
                self.clock.end("data")
                lr = self.scheduler.get_last_lr()[0]
                loss, logits = self._step(images, labels)
                self.step += 1
                hits = (logits.argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))).sum()
                sums += torch.stack([loss.double() * len(images), hits.double(), sums.new_tensor(len(images))])
                not_finite |= ~torch.isfinite(loss)
                if self.scaler is not None:
                    overflow = self.scaler.found_inf > 0
                    skipped += overflow
                    in_a_row = torch.where(overflow, in_a_row + 1, 0)
                if i % look_every == 0 or i == self.steps_per_epoch:
                    self._check(bool(not_finite), int(in_a_row))
                if self.world.first and (i % self.run.log_every == 0 or i == self.steps_per_epoch):
                    speed = i * self.recipe.batch_size / (time.perf_counter() - started)
                    progress.update(task, completed=i, info=f"loss {loss.item():.3f}  {speed:.0f} img/s")
                    if tensorboard:
                        tensorboard.add_scalar("step/loss", loss.item(), self.step)
                        tensorboard.add_scalar("step/lr", lr, self.step)
                        if self.scaler is not None:
                            tensorboard.add_scalar("step/loss_scale", self.scaler.get_scale(), self.step)
                self.clock.start()
        seconds = time.perf_counter() - started
        total_loss, hit, count = self.world.sum(sums).tolist()
        return {
            "step": self.step,
            "lr": lr,
            "train_loss": total_loss / count,
            "train_top1": 100 * hit / count,
            "img_per_s": count / seconds,
            "train_seconds": seconds,
            "loss_scale": self.scaler.get_scale() if self.scaler is not None else 1.0,
            "skipped_steps": int(skipped),
        }

    def _step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Forward, backward and update; returns the loss and the logits, detached, in fp32."""
        self.optimizer.zero_grad(set_to_none=True)
        outputs = self.replica(images)
        taught = None
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(images)
        loss = self.criterion(outputs, labels, taught)
        self.clock.end("forward")
        if self.scaler is None:
            loss.backward()
            self.clock.end("backward")
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.clock.end("backward")
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.clock.end("optimizer")
        return loss.detach(), logits_of(outputs).detach().float()

    def _receive(self, batch: Batch, training: bool = True) -> tuple[Tensor, Tensor]:
        """Report the files that could not be read; images and labels on the device, mixed up in training."""
        for fault in batch.bad:
            path = fault.partition(": ")[0]
            if path not in self.bad_files:
                self.bad_files.add(path)
                instead = "the next image takes its place" if training else "left out of the accuracy"
                warnings.warn(f"cannot read {fault}; {instead}", DataWarning, stacklevel=2)
        averaged = not training and self.ema is not None  # its weights are fp32
        dtype = torch.float32 if averaged else DTYPES[self.recipe.precision]
        images = batch.images.to(self.device, dtype, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if training and self.mixup is not None:
            images, labels = self.mixup(images, labels)
        return images, labels

    def _check(self, not_finite: bool, in_a_row: int) -> None:
        """Stop if continuing is pointless. A forward pass that is not finite has entered the running statistics
        already, so a smaller loss scale does not help; an overflow of the backward pass alone is skipped."""
        if not_finite:
            raise self._failure("the loss is not finite")
        if self.scaler is None:
            return
        if in_a_row >= self.run.max_skipped_steps:
            raise self._failure(f"{in_a_row} steps in a row were skipped for gradients that are not finite")
        scale = self.scaler.get_scale()
        if scale < self.run.min_loss_scale:
            raise self._failure(f"the loss scale fell to {scale:g}, below {self.run.min_loss_scale:g}")

    def _failure(self, what: str) -> TrainingError:
        kept = f"{self.run.out / 'last.pt'} holds epoch {self.epoch}" if self.epoch else "no epoch had ended yet"
        return TrainingError(
            f"{what} in epoch {self.epoch + 1}, step {self.step}, at learning rate "
            f"{self.scheduler.get_last_lr()[0]:g}; {kept}. Try a smaller --lr or a longer --warmup-epochs"
            + (", or --precision fp32" if self.recipe.precision != "fp32" else "")
        )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss, top-1 and top-5 (percent) over the validation images of all ranks; of the averaged weights if the
        recipe keeps an average."""
        self.world.broadcast(list(self.model.buffers()))  # running statistics: rank 0's are those that are saved
        model: nn.Module = self.model
        if self.ema is not None:
            model = self.ema.module
            self.world.broadcast(list(model.buffers()))
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        for batch in self.val_loader:
            images, labels = self._receive(batch, training=False)
            if not len(images):
                continue
            logits = model(images).float()
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            sums += torch.stack([loss.double(), hits[:, 0].sum(), hits.sum(), sums.new_tensor(len(images))])
        loss_sum, top1, top5, count = self.world.sum(sums).tolist()
        if count == 0:
            raise TrainingError("no image of the validation set can be read any more")
        return {"val_loss": loss_sum / count, "val_top1": 100 * top1 / count, "val_top5": 100 * top5 / count}

    def _count_bad_files(self) -> int:
        return len(set().union(*self.world.gather(self.bad_files)))

    def _save(self, top1: float, loss: float) -> None:
        """last.pt, and best.pt if this epoch is the best and its loss is a number."""
        better = math.isfinite(loss) and top1 > self.best_top1
        if better:
            self.best_top1 = top1
        rng = self.world.gather(checkpoint.rng_state())
        if not self.world.first:
            return
        state = {
            "format": checkpoint.FORMAT,
            "recipe": self.recipe.model_dump(),
            "classes": self.classes,
            "epoch": self.epoch,
            "step": self.step,
            "best_top1": self.best_top1,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "averaged_steps": int(self.ema.n_averaged) if self.ema is not None else 0,
            "rng": rng,
        }
        checkpoint.save(self.run.out / "last.pt", state)
        if better:
            checkpoint.save(self.run.out / "best.pt", state)

    def _restore(self, path: Path) -> None:
        """Put everything back to the end of the checkpoint's epoch."""
        state = checkpoint.load(path)
        # A checkpoint of an earlier version lacks the newer fields, which are off by default.
        mine, theirs = self.recipe.model_dump(), Recipe(**state["recipe"]).model_dump()
        for name in ("model", "width", "precision", "optimizer"):
            if mine[name] != theirs[name]:
                raise CheckpointError(
                    f"--resume: {path} is a checkpoint of {name} {theirs[name]!r}, this run has {mine[name]!r}"
                )
        if state["classes"] != self.classes:
            raise CheckpointError(
                f"--resume: {path} was trained on {len(state['classes'])} classes "
                f"({', '.join(state['classes'][:5])}, ...), the data has {len(self.classes)} "
                f"({', '.join(self.classes[:5])}, ...)"
            )
        changed = [f"{name} {theirs[name]} -> {mine[name]}" for name in mine if mine[name] != theirs[name]]
        if changed:
            self._say(f"resuming with other settings than the checkpoint's: {', '.join(changed)}")
        checkpoint.load_model(self.model, state["model"], path)
        self._restore_optimizer(state)
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            # A run that kept no average yet starts it from the checkpoint's weights.
            checkpoint.load_model(self.ema.module, state.get("ema") or state["model"], path)
            self.ema.n_averaged.fill_(state.get("averaged_steps", 0))
        self.epoch, self.step, self.best_top1 = state["epoch"], state["step"], state["best_top1"]
        if len(state["rng"]) == self.world.size:
            checkpoint.set_rng_state(state["rng"][self.world.rank])
        else:
            self._say(
                f"resuming {len(state['rng'])} processes with {self.world.size}: "
                "not bit for bit what the uninterrupted run would give"
            )
        self._say(f"resumed {path} after epoch {self.epoch}")

    def _restore_optimizer(self, state: dict[str, Any]) -> None:
        """Moments and masters from the checkpoint, the settings of this run (--lr, --momentum, ... given anew)."""
        names = ("initial_lr", "momentum", "nesterov", "weight_decay")
        settings = [{name: group[name] for name in names} for group in self.optimizer.param_groups]
        rates = list(self.scheduler.base_lrs)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scheduler.base_lrs = rates
        shape = self.scheduler.lr_lambdas[0](self.scheduler.last_epoch)
        for group, own, rate in zip(self.optimizer.param_groups, settings, rates, strict=True):
            group.update(own, lr=rate * shape)
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _progress(self) -> Progress:
        return Progress(
            TextColumn(f"epoch {self.epoch + 1}/{self.recipe.epochs}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[info]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not (self.world.first and self.console.is_terminal),
        )

    def _remaining(self, epochs: int, seconds: float) -> str:
        """When the run will end, as ``epochs`` of it took ``seconds``."""
        return _duration((self.recipe.epochs - self.epoch) * seconds / epochs)

    def _summarise(self, rows: list[dict[str, Any]], seconds: float) -> None:
        """Where the time of this process went. On CUDA the host waits for data while the device computes."""
        parts = self.clock.seconds()
        training = sum(row["train_seconds"] for row in rows)
        shares = ", ".join(f"{name} {100 * spent / training:.0f}%" for name, spent in parts.items())
        self._say(
            f"{_duration(seconds)} for {len(rows)} epoch{'s' if len(rows) > 1 else ''}: training {_duration(training)} "
            f"({shares}), validation and checkpoints {_duration(seconds - training)}"
        )

    def _print(self, row: dict[str, Any], remaining: str) -> None:
        text = (
            f"epoch {row['epoch']:3d}/{self.recipe.epochs}  lr {row['lr']:.4g}  loss {row['train_loss']:.4f}  "
            f"val loss {row['val_loss']:.4f}  top-1 {row['val_top1']:.2f}  top-5 {row['val_top5']:.2f}  "
            f"{row['img_per_s']:.0f} img/s  {remaining} to go"
        )
        if self.scaler is not None:
            text += f"  scale {row['loss_scale']:g}  skipped {row['skipped_steps']}"
        self._say(text)

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
