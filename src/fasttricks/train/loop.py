"""The training loop: epochs of steps, validation, logs and checkpoints, on one process or under torchrun."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2

from .. import keep_freed_memory, optim
from . import checkpoint, distributed, graph, parts
from .augment import normalise
from .average import Average
from .bad_files import BadFiles
from .checkpoint import CheckpointError
from .clock import Clock
from .data import Batch, TrainSampler, ValSampler, loader
from .distributed import World
from .errors import Interrupted, TrainingError
from .faults import BadBatch
from .images import Samples
from .objective import Objective
from .prefetch import prefetched
from .recipe import DTYPES, Recipe, Run
from .report import CsvLog
from .sampling import PartialEpoch
from .signals import Stop, leave_signals_to_the_trainer
from .step import Step

MOST_WAITING = 0.25  # of an epoch, for images, without a word


@dataclasses.dataclass
class Partial:
    """What this rank has done of the current epoch."""

    steps: int = 0
    seconds: float = 0.0
    loss: float = 0.0  # sum over the images
    hits: int = 0
    skipped: int = 0
    in_a_row: int = 0  # steps skipped since the last one that was not


class Trainer:
    """One run of a recipe on a training and a validation set.

    Writes to ``run.out``: log.csv (a row per epoch), tensorboard/, last.pt (after every epoch and every
    ``run.save_every`` steps) and best.pt (the epoch with the best top-1).

    Raises:
        TrainingError: the batch cannot be divided among the ranks, or training failed.
        CheckpointError: ``run.resume`` is not a checkpoint of this model and these classes.
    """

    def __init__(self, recipe: Recipe, run: Run, train_set: Samples, val_set: Samples, world: World, console: Console):
        self.recipe, self.run, self.world, self.console = recipe, run, world, console
        self.device = world.device
        if self.device.type == "cpu":
            keep_freed_memory()
        if recipe.batch_size % world.size or recipe.batch_size // world.size < 2:
            raise TrainingError(
                f"batch {recipe.batch_size} cannot be divided into at least 2 images for each of "
                f"{world.size} processes; give another --batch-size"
            )
        self.local_batch = recipe.batch_size // world.size
        self.classes = train_set.classes
        self._open_loaders(train_set, val_set)
        self.epoch = self.step = 0
        self.partial = Partial()
        self.best_top1 = -1.0

        # the same weights on all ranks, then other random numbers on each
        torch.manual_seed(recipe.seed)
        self.model = parts.model_of(recipe, len(self.classes), self.device)
        if recipe.sync_bn and world.size > 1:
            self.model = distributed.synchronised(self.model, self.device)
        self._seed(recipe.seed + world.rank)
        self.optimizer = parts.optimizer_of(recipe, self.model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, parts.schedule_of(recipe, self.steps_per_epoch)
        )
        self.scaler = optim.LossScaler() if recipe.precision == "fp16" else None
        if self.scaler is not None:
            self.scaler.scale(torch.zeros((), device=self.device))  # moves it to the device
        self.mixup = v2.MixUp(alpha=recipe.mixup, num_classes=len(self.classes)) if recipe.mixup > 0 else None
        self.ema = Average(self.model, recipe.ema) if recipe.ema > 0 else None
        self.clock = Clock(self.device)
        # the host waits for the device when it looks at the loss
        self.look_every = 1 if self.device.type == "cpu" else run.log_every
        teacher = parts.teacher_of(recipe, self.classes, self.device)
        if run.resume is not None:
            self._restore(run.resume)
        replica: nn.Module = self.model
        if world.size > 1:  # after _restore: it copies the weights of rank 0 to the others
            devices = [self.device.index] if self.device.type == "cuda" else None
            replica = DistributedDataParallel(self.model, device_ids=devices)
        self.training_step = Step(
            torch.compile(replica) if run.compile else replica,
            Objective(recipe.label_smoothing, recipe.temperature),
            self.optimizer,
            scaler=self.scaler,
            teacher=teacher,
            average=self.ema,
            ranks=world.size > 1,
            device=self.device,
        )
        self.training_step.mark = self.clock.end
        self.graphed = self._graphed()

    def _open_loaders(self, train_set: Samples, val_set: Samples) -> None:
        recipe, run, world = self.recipe, self.run, self.world
        pin = self.device.type == "cuda"
        sampler = TrainSampler(train_set, world.size, world.rank, shuffle=True, seed=recipe.seed, drop_last=True)
        per_step = self.local_batch * recipe.accumulate
        self.steps_per_epoch = len(sampler) // per_step
        if not self.steps_per_epoch:
            raise TrainingError(
                f"--batch-size {recipe.batch_size} with --accumulate {recipe.accumulate} takes "
                f"{recipe.effective_batch} images per step; the training set has {len(train_set)}"
            )
        self.train_sampler = PartialEpoch(sampler, self.steps_per_epoch * per_step)
        self.train_loader = loader(
            train_set, self.train_sampler, self.local_batch, workers=run.workers, drop_last=True, pin=pin
        )
        val_sampler = ValSampler(len(val_set), world.rank, world.size)
        self.bad_files = BadFiles(run.max_bad_files, {True: len(sampler), False: len(val_sampler)})
        self.val_loader = loader(
            val_set, val_sampler, max(self.local_batch, 64), workers=run.workers, drop_last=False, pin=pin
        )
        for each in (self.train_loader, self.val_loader):
            # its own generator: how often a loader draws from it depends on the number of workers
            each.generator = torch.Generator()
            each.worker_init_fn = leave_signals_to_the_trainer

    def _graphed(self) -> graph.GraphedStep | None:
        if self.run.cuda_graph is False or (self.run.cuda_graph is None and self.device.type != "cuda"):
            return None
        reason = graph.unsupported(self.device, self.world.size, self.optimizer)
        if reason is not None:
            self._say(f"no CUDA graph: {reason}")
            return None
        return graph.GraphedStep(self.training_step, graph.CUDARecorder(), self._say)

    @staticmethod
    def _seed(seed: int) -> None:
        """Seeds the generators that transforms and models may use: those of torch, numpy and Python."""
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002  (transforms of other libraries use the global generator)
        random.seed(seed)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return float(self.scheduler.base_lrs[0]) * self.scheduler.lr_lambdas[0](step)

    def learning_rates(self) -> list[float]:
        """The learning rates of all steps of the run."""
        return [self.learning_rate(step) for step in range(self.recipe.epochs * self.steps_per_epoch)]

    def check_output(self) -> None:
        """Makes the output folder.

        Raises:
            CheckpointError: it cannot be written, or there is no space for the checkpoints.
        """
        size = checkpoint.size_of(self.model, self.recipe.precision != "fp32", self.ema is not None)
        checkpoint.check_space(self.run.out, size)

    def fit(self) -> list[dict[str, Any]]:
        """Trains until ``recipe.epochs`` epochs are done. Returns the new rows of log.csv.

        Raises:
            TrainingError: the loss or the weights are not finite, too many steps in a row were skipped, or the loss
                scale collapsed. last.pt and best.pt are not overwritten.
            Interrupted: SIGINT or SIGTERM arrived; last.pt holds the last step.
        """
        out, rows, started = self.run.out, [], time.perf_counter()
        log = tensorboard = None
        if self.world.first:
            log = CsvLog(out / "log.csv", self.epoch)
            tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=self.step or None)
        try:
            with Stop(self.world) as self.stop:
                while self.epoch < self.recipe.epochs:
                    row = self.train_epoch(tensorboard)
                    self._check_weights()
                    row |= self.validate()
                    self.epoch += 1
                    self.partial = Partial()
                    row["epoch"], row["bad_files"] = self.epoch, len(self._all_bad_files())
                    rows.append(row)
                    # The row comes first, and a resumed run drops it: without it, a process that ends between the two
                    # would leave a checkpoint of an epoch that has no row.
                    if log:
                        log.append(row)
                    self._save_epoch(row["val_top1"], row["val_loss"])
                    if tensorboard:
                        for name, value in row.items():
                            if name not in ("epoch", "step"):
                                tensorboard.add_scalar(f"epoch/{name}", value, self.epoch)
                        tensorboard.flush()
                        self._print(row, self._remaining(len(rows), time.perf_counter() - started))
                    if self.epoch < self.recipe.epochs:
                        self._stop_if_requested()
            if rows:
                self._summarise(rows, time.perf_counter() - started)
        finally:
            if tensorboard:
                tensorboard.close()
        return rows

    def train_epoch(self, tensorboard: SummaryWriter | None) -> dict[str, Any]:
        """One pass over the training set, or the rest of one; returns its columns of the log."""
        recipe, done, accumulate = self.recipe, self.partial, self.recipe.accumulate
        self.train_sampler.start(self.epoch, done.steps * self.local_batch * accumulate)
        self.training_step.model.train()
        images_per_step = self.local_batch * accumulate
        # these stay on the device: sums of loss and hits, skipped steps, and those skipped in a row
        loss_sum = torch.full((), done.loss, dtype=torch.float64, device=self.device)
        hits_sum = torch.full((), done.hits, dtype=torch.int64, device=self.device)
        skipped = torch.full((), done.skipped, dtype=torch.int64, device=self.device)
        in_a_row = torch.full((), done.in_a_row, dtype=torch.int64, device=self.device)
        bad_batch = BadBatch(every_step=self.look_every == 1)
        started = time.perf_counter() - done.seconds
        begun_at = done.steps
        waited_before = self.clock.seconds()["data"]

        def account(steps: int) -> None:
            self.partial = Partial(
                steps, time.perf_counter() - started, loss_sum.item(), int(hits_sum), int(skipped), int(in_a_row)
            )

        with self._progress() as progress:
            task = progress.add_task("", total=self.steps_per_epoch, completed=begun_at, info="")
            received = map(self._mixed, prefetched(self.train_loader, self._receive, self.device))
            self.clock.start()
            for i, batches in enumerate(zip(*[received] * accumulate, strict=True), begun_at + 1):
                self.clock.end("data")
                last, look = i == self.steps_per_epoch, i % self.look_every == 0 or i == self.steps_per_epoch
                if self.graphed is not None:
                    loss, hits = self.graphed(batches)
                    self.clock.end("graph" if self.graphed.captured else "optimizer")
                    bad_batch.look(self.step + 1, batches, loss)
                    if look:
                        self._check_loss(bad_batch)
                else:
                    loss, hits = self.training_step.gradients(batches)
                    bad_batch.look(self.step + 1, batches, loss)
                    if look:  # before the update: the weights that are kept are those that gave the loss
                        self._check_loss(bad_batch)
                    self.training_step.update()
                self.scheduler.step()
                self.step += 1
                loss_sum += loss.double() * images_per_step
                hits_sum += hits
                if self.scaler is not None:
                    overflow = self.scaler.found_inf > 0
                    skipped += overflow
                    in_a_row = torch.where(overflow, in_a_row + 1, 0)
                    if look:
                        self._check_scale(int(in_a_row))
                if self.world.first and (i % self.run.log_every == 0 or last):
                    speed = (i - begun_at) * recipe.effective_batch / (time.perf_counter() - started - done.seconds)
                    progress.update(task, completed=i, info=f"loss {loss.item():.3f}  {speed:.0f} img/s")
                    if tensorboard:
                        tensorboard.add_scalar("step/loss", loss.item(), self.step)
                        tensorboard.add_scalar("step/lr", self.learning_rate(self.step - 1), self.step)
                        if self.scaler is not None:
                            tensorboard.add_scalar("step/loss_scale", self.scaler.get_scale(), self.step)
                due = self.run.save_every and self.step % self.run.save_every == 0
                stop = self.stop.requested()
                if due or stop:
                    if not look:
                        self._check_loss(bad_batch)
                    self._check_weights()
                    account(i)
                    self._save()
                if stop:
                    raise self._interruption(stop)
                self.clock.start()
        account(self.steps_per_epoch)
        waited = self.clock.seconds()["data"] - waited_before  # also frees the events of the epoch
        done = self.partial
        if self.epoch == 0 and waited > MOST_WAITING * done.seconds:
            self._say(
                f"data is the bottleneck: {100 * waited / done.seconds:.0f}% of the first epoch waited for images; "
                "more --workers or fasttricks pack may help, and fasttricks bench-data measures it"
            )
        totals = torch.tensor([done.loss, done.hits], dtype=torch.float64, device=self.device)
        total_loss, hits_of_all = self.world.sum(totals).tolist()
        count = self.steps_per_epoch * recipe.effective_batch
        return {
            "step": self.step,
            "lr": self.learning_rate(self.step - 1),
            "train_loss": total_loss / count,
            "train_top1": 100 * hits_of_all / count,
            "img_per_s": count / done.seconds,
            "train_seconds": done.seconds,
            "loss_scale": self.scaler.get_scale() if self.scaler is not None else 1.0,
            "skipped_steps": done.skipped,
        }

    def _stop_if_requested(self) -> None:
        if signal := self.stop.requested():
            raise self._interruption(signal)

    def _interruption(self, signal: int) -> Interrupted:
        where = f"step {self.step}" if self.partial.steps else f"epoch {self.epoch}"
        return Interrupted(
            f"stopped by {Signals(signal).name} after {where}; the same command with --resume continues from "
            f"{self.run.out / 'last.pt'}",
            signal,
        )

    def _receive(self, batch: Batch, training: bool = True) -> tuple[Tensor, Tensor]:
        """Reports unreadable files; returns normalised images and labels on the device."""
        self.bad_files.report(batch, training)
        averaged = not training and self.ema is not None  # the averages are fp32
        dtype = torch.float32 if averaged else DTYPES[self.recipe.precision]
        pixels = batch.images.to(self.device, non_blocking=True)  # 8 bits cross, a quarter of the bytes
        shift = None if batch.shift is None else batch.shift.to(self.device, non_blocking=True)
        images = normalise(pixels, shift, dtype)
        labels = batch.labels.to(self.device, non_blocking=True)
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels

    def _mixed(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return batch if self.mixup is None else self.mixup(*batch)

    def _check_loss(self, bad_batch: BadBatch) -> None:
        """Stops if the loss is not finite. A smaller loss scale would not help: the forward pass itself overflowed,
        and the running statistics include it."""
        if not bool(self.training_step.broken > 0):
            return
        steps = [step for step, mine in self.world.gather((bad_batch.step, bad_batch.mine)) if mine]
        step = min(steps, default=self.step + 1)
        name = "not-finite.pt" if self.world.size == 1 else f"not-finite-{self.world.rank}.pt"
        kept = ""
        if bad_batch.mine:
            bad_batch.save(
                self.run.out / name,
                epoch=self.epoch,
                recipe=self.recipe.model_dump(),
                classes=self.classes,
                model=self.model.state_dict(),
                loss_scale=self.scaler.get_scale() if self.scaler is not None else 1.0,
            )
            kept = f"; its batch and the weights are in {self.run.out / name}"
        raise self._failure(f"the loss of step {step} is not finite{kept}", step)

    def _check_weights(self) -> None:
        """Stops before a checkpoint is overwritten with weights that are not finite."""
        if not checkpoint.all_finite(self.model):
            raise self._failure("a weight or a running statistic is not finite")

    def _check_scale(self, in_a_row: int) -> None:
        """Stops if the loss scale cannot recover."""
        assert self.scaler is not None
        if in_a_row >= self.run.max_skipped_steps:
            raise self._failure(f"{in_a_row} steps in a row were skipped because gradients were not finite")
        scale = self.scaler.get_scale()
        if scale < self.run.min_loss_scale:
            raise self._failure(f"the loss scale fell to {scale:g}, below {self.run.min_loss_scale:g}")

    def _failure(self, what: str, step: int | None = None) -> TrainingError:
        step = self.step if step is None else step
        last = self.run.out / "last.pt"
        kept = f"{last} holds an earlier state" if last.exists() else "there is no checkpoint yet"
        return TrainingError(
            f"{what} (epoch {self.epoch + 1}, step {step}, learning rate {self.learning_rate(max(step - 1, 0)):g}); "
            f"{kept}. Try a smaller --lr or a longer --warmup-epochs"
            + (", or --precision fp32" if self.recipe.precision != "fp32" else "")
        )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss, top-1 and top-5 in percent over the validation images of all ranks, with the averaged weights if there
        are any."""
        self.world.broadcast(list(self.model.buffers()))  # the running statistics of rank 0 are those of checkpoints
        model: nn.Module = self.model
        if self.ema is not None:
            model = self.ema.module
            self.world.broadcast(list(model.buffers()))
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        for images, labels in prefetched(self.val_loader, partial(self._receive, training=False), self.device):
            if not len(images):
                continue
            logits = model(images).float()
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            sums += torch.stack([loss.double(), hits[:, 0].sum(), hits.sum(), sums.new_tensor(len(images))])
        loss_sum, top1, top5, count = self.world.sum(sums).tolist()
        if count == 0:
            raise TrainingError("no image of the validation set can be read")
        return {"val_loss": loss_sum / count, "val_top1": 100 * top1 / count, "val_top5": 100 * top5 / count}

    def _all_bad_files(self) -> set[str]:
        return set().union(*self.world.gather(self.bad_files.names))

    def _save_epoch(self, top1: float, loss: float) -> None:
        """Writes last.pt after an epoch, and best.pt if the epoch is the best and its loss is finite."""
        better = math.isfinite(loss) and top1 > self.best_top1
        if better:
            self.best_top1 = top1
        self._save(best=better)

    def _save(self, best: bool = False) -> None:
        """Writes last.pt, and best.pt before it: after a crash between the two, the epoch is repeated and both are
        written again."""
        rng = self.world.gather(checkpoint.rng_state())
        progress = self.world.gather(dataclasses.asdict(self.partial))
        bad_files = sorted(self._all_bad_files())
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
            "averaged_steps": self.ema.steps if self.ema is not None else 0,
            "bad_files": bad_files,
            "rng": rng,
            "progress": progress,
        }
        for name in ("best.pt", "last.pt") if best else ("last.pt",):
            checkpoint.save(self.run.out / name, state)

    def _restore(self, path: Path) -> None:
        """Restores the state of the run when the checkpoint was written."""
        state = checkpoint.load(path)
        # checkpoints of earlier versions lack newer fields, whose defaults turn them off
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
            # without an average in the checkpoint, it starts from the weights
            checkpoint.load_model(self.ema.module, state.get("ema") or state["model"], path)
            self.ema.steps = state.get("averaged_steps", 0)
        self.epoch, self.step, self.best_top1 = state["epoch"], state["step"], state["best_top1"]
        self.bad_files.names = set(state.get("bad_files", ()))
        progress = [Partial(**each) for each in state.get("progress", [{}] * len(state["rng"]))]
        self._restore_progress(progress, path, theirs)
        if len(state["rng"]) == self.world.size:
            checkpoint.set_rng_state(state["rng"][self.world.rank])
        else:
            self._say(
                f"resuming {len(state['rng'])} processes with {self.world.size}: "
                "the results will differ from those of the uninterrupted run"
            )
        steps = f" and {self.partial.steps} steps of the next" if self.partial.steps else ""
        self._say(f"resumed {path} after epoch {self.epoch}{steps}")

    def _restore_progress(self, progress: list[Partial], path: Path, theirs: dict[str, Any]) -> None:
        """The position within the epoch, which must be one of this run's steps."""
        if not progress[0].steps:
            return
        for name in ("batch_size", "accumulate", "seed"):
            if getattr(self.recipe, name) != theirs[name]:
                raise CheckpointError(
                    f"--resume: {path} is in the middle of an epoch with {name} {theirs[name]}, this run has "
                    f"{getattr(self.recipe, name)}; change it between epochs"
                )
        if len(progress) == self.world.size:
            self.partial = progress[self.world.rank]
            return
        # another number of ranks: the first carries the sums of all
        sums = {name: sum(getattr(each, name) for each in progress) for name in ("loss", "hits")}
        if not self.world.first:
            sums = dict.fromkeys(sums, 0)
        self.partial = dataclasses.replace(progress[0], **sums)

    def _restore_optimizer(self, state: dict[str, Any]) -> None:
        """Restores momentum and master weights, and keeps the settings of this run (--lr, --momentum, ...)."""
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
        """An estimate of the remaining time, from ``epochs`` that took ``seconds``."""
        return _duration((self.recipe.epochs - self.epoch) * seconds / epochs)

    def _summarise(self, rows: list[dict[str, Any]], seconds: float) -> None:
        """Prints the time of the parts of this process. On CUDA, the host waits for data while the device computes."""
        spent_on = self.clock.seconds()
        training = sum(row["train_seconds"] for row in rows)
        shares = ", ".join(f"{name} {100 * spent / training:.0f}%" for name, spent in spent_on.items() if spent)
        self._say(
            f"{_duration(seconds)} for {len(rows)} epoch{'s' if len(rows) > 1 else ''}: training {_duration(training)} "
            f"({shares}), validation and checkpoints {_duration(seconds - training)}"
        )
        if bad := rows[-1]["bad_files"]:
            self._say(f"{bad} file{'s' if bad > 1 else ''} could not be read; the warnings above name them")

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
