"""The training loop, for pretraining and finetuning alike. Read :func:`train` first.

Everything random follows from the seed and the position, never from what ran before: a run that
was killed and resumed ends with the same weights as one that was not (on a CPU, bit for bit).
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from occfeat_targets.store.files import StoreError
from occfeat_targets.store.reader import open_store
from occfeat_train.data.order import ShardSampler, select_frames, split_names
from occfeat_train.data.workers import make_loader
from occfeat_train.distributed import (
    Process,
    all_reduce_sum,
    any_process,
    barrier,
    note,
    peak_memory_gb,
    pick_precision,
    stop_signals,
)
from occfeat_train.network import Network, build_network, frames_for, prepare
from occfeat_train.objectives.base import Batch
from occfeat_train.optimiser import make_optimiser, make_schedule
from occfeat_train.runs.job import Job
from occfeat_train.runs.log import RunLog
from occfeat_train.runs.run import Run, RunError
from occfeat_train.runs.trackers import require_tracker
from occfeat_train.tasks.base import Task
from occfeat_train.validate import validate

LEAST_SCALE = 2.0**-10
"""Float16 losses are scaled, at first by 2^16, and a gradient that is not finite halves the scale:
below this, 27 steps were in vain and training stops."""


class NonFiniteLoss(RuntimeError):
    """The loss is infinite or not a number; the message names step and frames."""


def train(job: Job, run: Run, process: Process, resume: bool) -> bool:
    """Train, or go on training, and leave checkpoints and a log in the run directory.

    The directory is made here, when nothing is left to go wrong before work starts, unless the run
    is to ``resume``. Returns whether it came to its end; False after Ctrl-C or SIGTERM. Raises
    StoreError, RunError, ConfigError, WeightsError before any work; StoreError also for a damaged
    frame; NonFiniteLoss, in all processes, before the step that would have spread it.
    """
    trainer = Trainer(job, process)
    alone = run.locked() if process.is_main else nullcontext()
    with ExitStack() as held:
        if resume:
            held.enter_context(alone)
        report = trainer.begin(run if resume and run.checkpoints() else None)
        if not resume:
            held.enter_context(alone)
            if process.is_main:
                run.create(job.describe(trainer.store))
        elif process.is_main:
            trainer.lengthen(run)
        barrier()
        first, total, tracker = trainer.position.step, trainer.total_steps, job.config.run.tracker
        log = RunLog(run.path, process.is_main, total, first, tracker)
        log.say(f"{run.path}: {trainer.describe()}\n{report}")
        with stop_signals(process.is_main) as stop, closing(log):
            return trainer.fit(run, log, stop)


class Trainer:
    """One process's part of a training. StoreError, RunError, ConfigError: it can't be trained."""

    def __init__(self, job: Job, process: Process):
        config, plan = job.config, job.plan
        # Not a check of the settings: a run that was tracked can be evaluated anywhere.
        require_tracker(config.run.tracker)
        self.job, self.process, self.store = job, process, open_store(job.store)
        splits = split_names(config.data.train_split, "train")
        self.frames = select_frames(self.store, splits, job.fraction, job.fraction_unit)
        self.steps_per_epoch = len(self.frames) // (plan.batch * plan.accumulate)
        self.total_steps = self.steps_per_epoch * plan.epochs
        self.position = Position()
        self.held_out = self._held_out() if config.run.validate_every else []
        batch = f"{job.kind}.batch"
        if plan.batch % process.world:
            raise RunError(
                f"{batch} is {plan.batch} over all processes, which {process.world} processes "
                "can't share evenly: choose a multiple"
            )
        if self.steps_per_epoch == 0:
            raise RunError(
                f"{len(self.frames)} frames are less than one step of {batch} {plan.batch} x "
                f"{job.kind}.accumulate {plan.accumulate}: lower one of them"
            )

    def _held_out(self) -> list[int]:
        splits = split_names(self.job.config.data.eval_split, "val")
        try:
            return select_frames(self.store, splits)
        except StoreError as error:
            raise StoreError(f"{error}; --set run.validate_every=0 looks at none") from error

    def begin(self, run: Run | None = None) -> str:
        """Make the network and what trains it, as in the newest checkpoint of a run to go on with;
        returns a report of where its weights came from. Raises what ``build_network`` does."""
        torch.manual_seed(self.job.config.run.seed)
        network, report = build_network(self.job, self.store, load_weights=run is None)
        arrays = network.objective.arrays
        if self.held_out and isinstance(network.objective, Task):
            arrays += network.objective.eval_arrays
        if lacking := [name for name in arrays if name not in self.store.specs]:
            raise StoreError(
                f"{self.store.url} has no {', '.join(lacking)}, which {self.job.title} needs: "
                "rebuild it with that"
            )
        size, stored = (
            self.job.config.model.image_size,
            self.store.attrs["config"]["images"]["size"],
        )
        larger = any(ours > theirs for ours, theirs in zip(size, stored, strict=True))
        if larger and network.objective.sensor == "camera":
            note(
                f"model.image_size {list(size)} is more than the {list(stored)} of the store's "
                "images, which are enlarged: that costs time and adds no detail"
            )
        device = self.process.device
        self.learner = make_learner(self.job, network.to(device), self.total_steps, device)
        if run:
            state, position = run.load()
            self.learner.load_state_dict(state)
            step, total = position["step"], self.total_steps
            if step > total:
                raise RunError(f"{run.path} has done {step} steps, more than the {total} asked for")
            self.position = replace(Position(**position), finished=step == total)
            report = f"resumed after step {step}"
        return report

    def lengthen(self, run: Run) -> None:
        """Let a run, if it was asked to go on for longer than it was to, say so of itself."""
        run.set_epochs(self.job.kind, self.job.plan.epochs)
        if self.position.step and run.position()["finished"] != self.position.finished:
            run.save(self.learner.state_dict(), asdict(self.position))

    def describe(self) -> str:
        """One line for the log."""
        plan, scenes = self.job.plan, len({self.store.scene(i) for i in self.frames})
        dtype, why = pick_precision(self.job.config.run.precision, self.process.device)
        return (
            f"{self.job.title} on {len(self.frames)} frames of "
            f"{scenes} scene{'s' * (scenes != 1)}, batch "
            f"{plan.batch} x {plan.accumulate}, {plan.epochs} epochs of {self.steps_per_epoch} "
            f"steps, lr {plan.lr:g}; {self.process.describe()}; "
            f"{str(dtype).removeprefix('torch.')} ({why})"
        )

    def fit(self, run: Run, log: RunLog, stop: Callable[[], bool]) -> bool:
        """Epochs and steps from ``position`` on; returns whether all were done. Ends early, with a
        checkpoint, once ``stop`` of any process says that it was asked to."""
        process, plan = self.process, self.job.plan
        settings, data = self.job.config.run, self.job.config.data
        network = self.learner.network
        dataset = frames_for(self.job, network, self.frames, network.objective.arrays, True)
        batch, on_gpu = plan.batch, process.device.type == "cuda"
        sampler = ShardSampler(len(dataset), batch, settings.seed, process.rank, process.world)
        loader = make_loader(dataset, sampler, data.workers, data.start_method, pin_memory=on_gpu)
        model: nn.Module = self.learner.network.train()
        if process.world > 1:
            devices = [process.device] if on_gpu else None
            model = DistributedDataParallel(model, device_ids=devices)
        saved_at = time.monotonic()
        while not self.position.finished:
            first = self.position.step_in_epoch
            sampler.set_epoch(self.position.epoch, done=first * plan.accumulate)
            batches = iter(loader)
            for _ in range(first, self.steps_per_epoch):
                started = time.monotonic()
                micro = list(islice(batches, plan.accumulate))
                waited = time.monotonic() - started
                # By the main process's clock: others' may differ.
                is_due = process.is_main and started - saved_at >= 60 * settings.save_minutes
                stopping, saving = any_process(stop(), is_due, device=process.device)
                losses, more = self.step(model, micro)
                epoch, step = self.position.epoch, self.position.step + 1
                self.position = Position(
                    *divmod(step, self.steps_per_epoch), step, step == self.total_steps
                )
                is_logged = step % settings.log_every == 0 or self.position.finished
                log.show(epoch, plan.epochs, losses if is_logged else {})
                if is_logged:
                    seconds = time.monotonic() - started
                    more |= {"epoch": epoch + 1, "seconds": seconds, "waited": waited / seconds}
                    more |= {"samples_per_second": plan.batch * plan.accumulate / seconds}
                    more |= {"peak_memory_gb": peak_memory_gb(process.device)}
                    log.write(step, losses | more)
                if not stopping:
                    self.look(log)
                if stopping or saving or self.position.finished:
                    if process.is_main:
                        run.save(self.learner.state_dict(), asdict(self.position))
                    barrier()
                    saved_at = time.monotonic()
                if stopping:
                    return self.position.finished
        return True

    def look(self, log: RunLog) -> None:
        """Log how the network does on the evaluation split, if an epoch ends at which it should."""
        every, now, epochs = self.job.config.run.validate_every, self.position, self.job.plan.epochs
        if not every or now.step_in_epoch or (now.epoch % every and not now.finished):
            return
        values = validate(self.job, self.learner.network, self.held_out, self.process)
        named = {f"held_out_{name}": value for name, value in values.items()}
        log.write(now.step, {"epoch": now.epoch, **named})
        said = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
        log.say(f"epoch {now.epoch}/{epochs}, {len(self.held_out)} held-out frames: {said}")

    def step(self, model: Any, micro: list[Batch]) -> tuple[dict[str, float], dict[str, float]]:
        """One optimiser step of this process's micro-batches by the network, or DDP around it.
        Returns the step's numbers over all processes: loss and its terms; gradient norm and
        learning rate. Raises NonFiniteLoss, in all processes; nothing was changed."""
        config, process, step = self.job.config, self.process, self.position.step
        learner, device = self.learner, process.device
        own_seed = np.random.SeedSequence((config.run.seed, step, process.rank))
        torch.manual_seed(int(own_seed.generate_state(1)[0]))
        dtype, _ = pick_precision(config.run.precision, device)
        network, epoch = learner.network, self.position.epoch
        prepared = (prepare(batch, self.job, network, epoch, device) for batch in micro)
        inputs, targets = zip(*prepared, strict=True)
        # Every loss term is a mean over the whole step: count first, over micro-batches and
        # processes.
        counted = torch.stack([network.objective.counts(t) for t in targets]).sum(dim=0)
        counts = all_reduce_sum(counted.to(device)).tolist()
        share = 1 / (len(micro) * process.world)

        learner.optimiser.zero_grad(set_to_none=True)
        losses = []
        for i in range(len(micro)):
            is_last = i + 1 == len(micro)
            with model.no_sync() if process.world > 1 and not is_last else nullcontext():
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss, terms = model(inputs[i], targets[i], counts, share)
                # DDP averages gradients over processes; the losses are parts of a sum.
                learner.scaler.scale(loss * process.world).backward()
            losses.append(torch.stack([loss, *terms.values()]).detach())
        total = all_reduce_sum(sum(losses, torch.zeros_like(losses[0]))).tolist()
        if not math.isfinite(total[0]):
            raise NonFiniteLoss(_blame(step, micro, losses))

        lr = learner.optimiser.param_groups[0]["lr"]
        parts = len(micro) if self.job.plan.clip == "sum" else 1
        norm, is_sound = learner.update(config.run.clip_norm, parts)
        if not is_sound:
            raise NonFiniteLoss(_blame(step, micro, losses))
        losses_by_name = dict(zip(["loss", *terms], total, strict=True))
        return losses_by_name, {"gradient_norm": norm, "lr": lr}


@dataclass(frozen=True)
class Position:
    """How far training has come."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    finished: bool = False


@dataclass
class Learner:
    """What learns: the network and what trains it, all that a checkpoint holds."""

    network: Network
    optimiser: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    scaler: torch.amp.GradScaler

    def state_dict(self) -> dict:
        """Tensors and plain values only, so that loading needs no unpickling."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of :meth:`state_dict`."""
        for name, part in self._parts().items():
            if state[name]:  # empty: a scaler that was off, on a GPU with bfloat16
                part.load_state_dict(state[name])

    def update(self, clip_norm: float, parts: int = 1) -> tuple[float, bool]:
        """Clip and step; returns the gradient's norm and whether training can go on.

        The gradient is the mean of ``parts`` whose sum is clipped at ``clip_norm``: a share of that
        sum, to which Adam's steps are the same (but for its epsilon).

        A gradient that is not finite changes no weights. In float16 that may happen now and then:
        the scaler lowers its scale, and gives up on gradients too large for any.
        """
        scaler, scale = self.scaler, self.scaler.get_scale()
        scaler.unscale_(self.optimiser)
        # Read before the optimiser steps, so that a GPU does that while the next batch is prepared
        # (but in float16, where the scaler waits for it).
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), clip_norm / parts).item()
        if not scaler.is_enabled() and not math.isfinite(norm):
            return norm, False
        scaler.step(self.optimiser)
        scaler.update()
        new_scale = scaler.get_scale()
        if self.scheduler and new_scale >= scale:  # else the step was skipped
            self.scheduler.step()
        return norm, new_scale >= LEAST_SCALE

    def _parts(self) -> dict[str, Any]:
        return {name: part for name, part in vars(self).items() if part is not None}


def make_learner(job: Job, network: Network, total_steps: int, device: torch.device) -> Learner:
    """Optimiser and schedule: by default Adam at a constant rate for pretraining, AdamW with a
    linear one-cycle for finetuning (paper §4.1; Simple-BEV's ``pct_start``, torch's divisors)."""
    plan, half = job.plan, pick_precision(job.config.run.precision, device)[0] == torch.float16
    optimiser = make_optimiser(network, plan.optimiser, plan.lr, plan.weight_decay)
    scheduler = make_schedule(optimiser, plan.optimiser, plan.lr, total_steps, plan.epochs)
    return Learner(network, optimiser, scheduler, torch.amp.GradScaler(device.type, enabled=half))


def _blame(step: int, micro: list[Batch], losses: list[torch.Tensor]) -> str:
    frames = [batch["frame"].tolist() for batch in micro]
    broken = [f for f, loss in zip(frames, losses, strict=True) if not loss.isfinite().all()]
    where = f"frames {[*chain(*(broken or frames))]} of this process"
    where += "" if broken else " or another's"
    return (
        f"the loss or gradient of step {step + 1} is not finite, from {where}; nothing was changed "
        "by that step. Lower the learning rate, or go on with --resume --set run.precision=float32"
    )
