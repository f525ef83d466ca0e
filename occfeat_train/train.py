"""The training loop, for pretraining and finetuning alike. Read :func:`train` first.

Everything random follows from the seed and the position, never from what ran before: a run that
was killed and resumed ends with the same weights as one that was not (on a CPU, bit for bit).
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from occfeat_targets.store.schema import open_store
from occfeat_train.augment import draw, network_inputs
from occfeat_train.data import FrameDataset, ShardSampler, make_loader, select_frames
from occfeat_train.distributed import Process, all_reduce_sum, barrier, pick_precision
from occfeat_train.jobs import Job, build_network, split_names
from occfeat_train.objectives import Network
from occfeat_train.runlog import RunLog, require_board
from occfeat_train.runs import Run, RunError

LEAST_SCALE = 2.0**-10
"""Float16 losses are scaled, at first by 2^16, and a gradient that is not finite halves the scale:
below this, 27 steps were in vain and training stops."""


class NonFiniteLoss(RuntimeError):
    """The loss is infinite or not a number; the message names step and frames."""


@dataclass(frozen=True)
class Position:
    """How far training has come."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    finished: bool = False

    def next(self, steps_per_epoch: int, total_steps: int) -> Position:
        """The position after one more step."""
        epoch, step_in_epoch = divmod(self.step + 1, steps_per_epoch)
        return Position(epoch, step_in_epoch, self.step + 1, self.step + 1 == total_steps)


@dataclass
class Learner:
    """What a checkpoint holds."""

    network: Network
    optimiser: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    scaler: torch.amp.GradScaler

    def state_dict(self) -> dict:
        """Tensors and plain values only, so that loading needs no unpickling."""
        return {name: part.state_dict() for name, part in self._parts()}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of :meth:`state_dict`."""
        for name, part in self._parts():
            if state[name]:  # empty: a scaler that was off, on a GPU with bfloat16
                part.load_state_dict(state[name])

    def _parts(self) -> list[tuple[str, object]]:
        parts = [(name, getattr(self, name)) for name in self.__dataclass_fields__]
        return [(name, part) for name, part in parts if part is not None]


def train(job: Job, run: Run, process: Process, resume: bool) -> bool:
    """Train, or go on training, and leave checkpoints and a log in the run directory.

    Args:
        job: what to train, see :class:`Job`.
        run: its directory; made here, when nothing is left to go wrong before work starts.
        process: this process, see ``distributed``.
        resume: whether to go on with the run instead of making it.

    Returns:
        Whether it came to its end; False after Ctrl-C or SIGTERM.

    Raises:
        StoreError, RunError, ConfigError, WeightsError: before any work; StoreError also for a
            frame that turns out to be damaged.
        NonFiniteLoss: in all processes, before the step that would have spread it.
    """
    store = open_store(job.store)
    config, plan = job.config, job.plan
    require_board(config)
    frames = select_frames(
        store, split_names(config.data.train_split, "train"), job.fraction, job.fraction_unit
    )
    steps_per_epoch = len(frames) // (plan.batch * plan.accumulate)
    _check_batch(job, len(frames), steps_per_epoch, process.world)

    goes_on = resume and bool(run.checkpoints())
    torch.manual_seed(config.run.seed)
    network, report = build_network(job, store, load_weights=not goes_on)
    learner = make_learner(
        job, network.to(process.device), steps_per_epoch * plan.epochs, process.device
    )
    position = Position()
    if goes_on:
        state, saved = run.load()
        learner.load_state_dict(state)
        del state
        position, report = Position(**saved), f"resumed after step {saved['step']}"
    elif process.is_main and not resume:
        run.create(job.describe(store))
    barrier()

    dtype, why = pick_precision(config.run.precision, process.device)
    with run.locked() if process.is_main else nullcontext():
        log = RunLog(
            run.path, process.is_main, steps_per_epoch * plan.epochs, position.step, config
        )
        scenes = {store.scene(i) for i in frames}
        log.say(
            f"{run.path}: {job.title} on {len(frames)} frames of {len(scenes)} scene(s), "
            f"batch {plan.batch} x {plan.accumulate}, {plan.epochs} epochs of {steps_per_epoch} "
            f"steps, lr {plan.lr:g}; {process.describe()}; "
            f"{str(dtype).removeprefix('torch.')} ({why})\n{report}"
        )
        with stop_signals(process.is_main) as stop, closing(log):
            return _fit(job, run, process, learner, position, frames, steps_per_epoch, log, stop)


def _fit(
    job: Job,
    run: Run,
    process: Process,
    learner: Learner,
    position: Position,
    frames: list[int],
    steps_per_epoch: int,
    log: RunLog,
    stop: Callable[[], bool],
) -> bool:
    """Epochs and steps from ``position`` on; returns whether all were done."""
    config, plan, network = job.config, job.plan, learner.network
    sampler = ShardSampler(len(frames), plan.batch, config.run.seed, process.rank, process.world)
    loader = make_loader(
        FrameDataset(job.store, frames, ("images", *network.objective.arrays)),
        sampler,
        config.data.workers,
        config.data.start_method,
        pin_memory=process.device.type == "cuda",
    )
    model = _parallel(network, process)
    network.train()
    total_steps = steps_per_epoch * plan.epochs
    saved_at = time.monotonic()
    while not position.finished:
        sampler.set_epoch(position.epoch, done=position.step_in_epoch * plan.accumulate)
        batches = iter(loader)
        for _ in range(position.step_in_epoch, steps_per_epoch):
            started = time.monotonic()
            micro = list(islice(batches, plan.accumulate))
            waited = time.monotonic() - started
            # Asked by any process: to stop; by the main one's clock: to save.
            is_due = process.is_main and started - saved_at >= 60 * config.run.save_minutes
            values, (stopping, saving) = train_step(
                job, model, learner, micro, position, process, flags=(stop(), is_due)
            )
            epoch, position = position.epoch, position.next(steps_per_epoch, total_steps)
            log.advance()
            if position.step % config.run.log_every == 0 or position.finished:
                seconds = time.monotonic() - started
                values |= {"epoch": epoch, "seconds": seconds, "waited": waited / seconds}
                log.write(position.step, values)
            if stopping or saving or position.finished:
                if process.is_main:
                    run.save(learner.state_dict(), asdict(position))
                barrier()
                saved_at = time.monotonic()
            if stopping:
                return position.finished
    return True


def train_step(
    job: Job,
    model: nn.Module,
    learner: Learner,
    micro: list[dict[str, torch.Tensor]],
    position: Position,
    process: Process,
    flags: tuple[bool, ...],
) -> tuple[dict[str, float], list[bool]]:
    """One optimiser step on this process's micro-batches.

    Returns:
        The step's numbers over all processes (loss, its terms, gradient norm, learning rate),
        and which flags any process had set.
    """
    torch.manual_seed(_step_seed(job.config.run.seed, position.step, process.rank))
    dtype, _ = pick_precision(job.config.run.precision, process.device)
    network, device = learner.network, process.device
    inputs, targets = zip(
        *(prepare(b, job, network, position.epoch, device) for b in micro), strict=True
    )
    # Every loss term is a mean over the whole step: count first, over micro-batches and processes.
    counts = sum(network.objective.counts(t) for t in targets)
    shared = all_reduce_sum(torch.cat([counts, counts.new_tensor(flags)]).to(device)).cpu()
    counts, flagged = shared[: len(counts)].tolist(), shared[len(counts) :].bool().tolist()
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
    total = all_reduce_sum(sum(losses)).tolist()
    if not math.isfinite(total[0]):
        raise NonFiniteLoss(_blame(position.step, micro, losses))

    lr = learner.optimiser.param_groups[0]["lr"]
    norm, is_sound = _update(learner, job.config.run.clip_norm)
    if not is_sound:
        raise NonFiniteLoss(_blame(position.step, micro, losses))
    values = dict(zip(["loss", *terms], total, strict=True))
    return values | {"gradient_norm": norm, "lr": lr}, flagged


def _update(learner: Learner, clip_norm: float) -> tuple[float, bool]:
    """Clip and step; returns the gradient's norm and whether training can go on.

    A gradient that is not finite changes no weights. In float16 that may happen now and then: the
    scaler lowers its scale, and gives up on gradients too large for any.
    """
    scaler, scale = learner.scaler, learner.scaler.get_scale()
    scaler.unscale_(learner.optimiser)
    # Read before the optimiser steps, so that a GPU does that while the next batch is prepared
    # (but in float16, where the scaler waits for it).
    norm = nn.utils.clip_grad_norm_(learner.network.parameters(), clip_norm).item()
    if not scaler.is_enabled() and not math.isfinite(norm):
        return norm, False
    scaler.step(learner.optimiser)
    scaler.update()
    new_scale = scaler.get_scale()
    if learner.scheduler and new_scale >= scale:  # else the step was skipped
        learner.scheduler.step()
    return norm, new_scale >= LEAST_SCALE


def prepare(
    batch: dict[str, torch.Tensor],
    job: Job,
    network: Network,
    epoch: int,
    device: torch.device,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A collated batch moved to the device and augmented: network inputs and targets."""
    config = job.config
    frames, n_cameras = batch["frame"], batch["K"].shape[1]
    draws = draw(config.augment, config.run.seed, epoch, frames, n_cameras)
    batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
    with torch.no_grad():
        inputs = network_inputs(batch, draws, config.model.image_size, config.augment.shift)
        return inputs, network.objective.targets(batch | {"seed": draws.seed}, draws.angle)


def make_learner(job: Job, network: Network, total_steps: int, device: torch.device) -> Learner:
    """Optimiser and schedule: Adam at a constant rate for pretraining, AdamW with a linear
    one-cycle for finetuning (paper §4.1; Simple-BEV's ``pct_start`` and torch's divisors)."""
    plan, half = job.plan, pick_precision(job.config.run.precision, device)[0] == torch.float16
    scheduler = None
    if job.kind == "pretrain":
        optimiser = torch.optim.Adam(network.parameters(), plan.lr, weight_decay=plan.weight_decay)
    else:
        optimiser = torch.optim.AdamW(network.parameters(), plan.lr, weight_decay=plan.weight_decay)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimiser,
            plan.lr,
            total_steps + 1,  # it is stepped once more after the last step
            pct_start=max(0.05, 1.5 / (total_steps + 1)),  # torch wants more than one step up
            anneal_strategy="linear",
            cycle_momentum=False,
        )
    return Learner(network, optimiser, scheduler, torch.amp.GradScaler(device.type, enabled=half))


def _parallel(network: Network, process: Process) -> nn.Module:
    if process.world == 1:
        return network
    devices = [process.device] if process.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=devices)


def _check_batch(job: Job, n_frames: int, steps_per_epoch: int, world: int) -> None:
    batch = job.plan.batch
    if batch % world:
        raise RunError(
            f"{job.kind}.batch is {batch} over all processes, which {world} processes can't "
            "share evenly: choose a multiple"
        )
    if steps_per_epoch == 0:
        raise RunError(
            f"{n_frames} frames are less than one step of {job.kind}.batch {batch} x "
            f"{job.kind}.accumulate {job.plan.accumulate}: lower one of them"
        )


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


def _blame(step: int, micro: list[dict[str, torch.Tensor]], losses: list[torch.Tensor]) -> str:
    guilty = [
        frame
        for batch, loss in zip(micro, losses, strict=True)
        if not loss.isfinite().all()
        for frame in batch["frame"].tolist()
    ]
    everything = [frame for batch in micro for frame in batch["frame"].tolist()]
    where = f"frames {guilty or everything} of this process" + ("" if guilty else " or another's")
    return (
        f"the loss or gradient of step {step + 1} is not finite, from {where}; nothing was changed "
        "by that step. Lower the learning rate, or go on with --resume --set run.precision=float32"
    )


@contextmanager
def stop_signals(tell: bool) -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C and SIGTERM instead of dying: yields a function that says whether one came.

    A second Ctrl-C is obeyed at once. With ``tell``, the first signal is answered on the terminal.
    """
    received = []

    def note(number: int, _frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if tell and not received:  # not by print, which the signal may have interrupted
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, unsaved\n")
        received.append(number)

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
