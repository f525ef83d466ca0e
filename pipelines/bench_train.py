"""How fast is training, and what do its tricks buy? All figures from one run.

At the paper's size (224x400 images, the store's grid, batch 1, 128 channels, EfficientNet-B0):
lifting against Simple-BEV's dense form, the pretraining head against its dense form, each with
peak memory, and how much of a training step is spent waiting for data. With a GPU also images/s at
batch 16 and the step with the teacher in the loop. Each part runs in a process of its own.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from itertools import count
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from occfeat_pipelines.benchmark import ARRAYS, DEVICE, apart, peak_memory, say_machine, some_frames
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.settings import Size
from occfeat_train.augment import NO_AUGMENT, draw, network_inputs
from occfeat_train.config import TrainConfig
from occfeat_train.data.dataset import FrameDataset
from occfeat_train.distributed import Process
from occfeat_train.geometry import volume_centres
from occfeat_train.models.lifts.base import Lift
from occfeat_train.models.lifts.simplebev import SimpleBEVLift, in_image, project
from occfeat_train.network import Network
from occfeat_train.objectives.occfeat import OccFeatHead, cosine_sum, occupancy_sum
from occfeat_train.runs.job import Job
from occfeat_train.runs.log import RunLog
from occfeat_train.runs.run import Run
from occfeat_train.train import Trainer

BATCH = 16 if DEVICE.type == "cuda" else 1
RANDOM = ["model.encoder_weights=random", f"pretrain.batch={BATCH}", "data.workers=2"]
CONFIG = TrainConfig.load(None, [*RANDOM, "run.log_every=1"])
CHANNELS, IMAGE_HW, STRIDE = CONFIG.model.channels, CONFIG.model.image_size, 8
Figures = tuple[float, float]  # seconds and bytes


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--store", default="targets.zarr", help="A targets store with features.")
@click.option("--rounds", default=3, help="Interleaved repetitions; figures are medians.")
def main(store: str, rounds: int) -> None:
    """Print the benchmark."""
    say_machine()
    compare("lifting, forward + backward", lift, (SimpleBEVLift, DenseLift), store, rounds)
    compare("head and loss, forward + backward", head, (OccFeatHead, DenseHead), store, rounds)
    if DEVICE.type == "cuda":
        compare("step at batch 1, teacher in the loop", step, (False, True), store, rounds)
        seconds, peak = apart(step, store, False, BATCH)
        speed = f"{BATCH * len(open_store(store).attrs['cameras']) / seconds:.0f} images/s"
        print(f"step at batch {BATCH}: {1e3 * seconds:.0f} ms, {speed}, peak {peak / 1e6:.0f} MB")
    seconds, share = apart(waiting, store, CONFIG)
    print(
        f"pretraining at batch {BATCH}, settings of the paper, {CONFIG.data.workers} workers: "
        f"{seconds:.2f} s a step, {share:.1%} of it waiting for data"
    )


def compare(title: str, part: Callable, ways: tuple, store: str, rounds: int) -> None:
    """Measure a part in two ways in turn, and print both and their ratio."""
    figures = np.array([[apart(part, store, way) for way in ways] for _ in range(rounds)])
    print(title)
    for way, (seconds, peak) in zip(ways, np.median(figures, axis=0), strict=True):
        name = getattr(way, "__name__", str(way))
        print(f"  {name:14} {seconds * 1e3:8.0f} ms   peak {peak / 1e6:7.0f} MB")
    slower, larger = np.median(figures[:, 1] / np.maximum(figures[:, 0], 1e-9), axis=0)
    print(f"  the second takes {slower:.1f} times the time and {larger:.1f} times the memory")


def timed(run: Callable[[], None]) -> Figures:
    """Median seconds of ``run``, and its peak memory above what was there before it."""
    on_gpu, seconds = DEVICE.type == "cuda", []
    peak = torch.cuda.max_memory_allocated if on_gpu else peak_memory
    before = peak()
    for _ in range(6):
        started = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:])), peak() - before


def batch_of(store: str, size: int) -> tuple[dict, dict]:
    """Network inputs and the collated batch of the first frames, on the device."""
    dataset = FrameDataset(store, some_frames(open_store(store), size), ARRAYS)
    batch = dataset.collate([dataset[i] for i in range(size)])
    draws = draw(NO_AUGMENT, 0, 0, batch["frame"], batch["K"].shape[1])
    batch = {name: values.to(DEVICE) for name, values in batch.items()}
    return network_inputs(batch, draws, IMAGE_HW, 0.0), batch


def lift(store: str, make: type[Lift]) -> Figures:
    """Forward and backward of a lift."""
    inputs, _ = batch_of(store, 1)
    module = make(open_store(store).grid, CHANNELS).to(DEVICE)
    shape = (*inputs["K"].shape[:2], CHANNELS, *(side // STRIDE for side in IMAGE_HW))
    features = torch.randn(shape, device=DEVICE, requires_grad=True)

    def run() -> None:
        volume = module(features, inputs["K"], inputs["cam_T_bev"], IMAGE_HW)
        volume.backward(volume.detach())

    return timed(run)


class DenseLift(SimpleBEVLift):
    """Simple-BEV's form: sample a whole volume per camera, mask, average where not zero."""

    def forward(self, features: Tensor, K: Tensor, cam_T_bev: Tensor, image_hw: Size) -> Tensor:
        """As :meth:`SimpleBEVLift.forward`, for one sample."""
        _, N, C, _, _ = features.shape
        centres = volume_centres(self.grid, K.device)
        u, v, depth = (a.T for a in project(centres, K[0], cam_T_bev[0]))  # (N, V)
        uv = torch.stack([u, v], dim=-1) / depth.clamp(min=1e-6)[..., None]
        grid = (2 * uv / uv.new_tensor(image_hw[::-1]) - 1).clamp(-2, 2)[:, None]
        volumes = F.grid_sample(features[0], grid, padding_mode="border", align_corners=False)
        volumes = volumes.view(N, C, -1) * in_image(u, v, depth, image_hw)[:, None]
        seen = (volumes.abs() > 0).float()
        mean = (volumes * seen).sum(0) / (1e-6 + seen.sum(0))
        nz, nx, ny = self.grid.shape
        return mean.view(C, nx, ny, nz).permute(3, 0, 1, 2).reshape(1, nz * C, nx, ny)


def head(store: str, make: type[OccFeatHead]) -> Figures:
    """Forward and backward of a pretraining head and its losses."""
    opened, (_, batch) = open_store(store), batch_of(store, 1)
    module = make(CHANNELS, opened.grid.shape[0], opened.attrs["teacher"]["dim"]).to(DEVICE)
    bev = torch.randn(1, CHANNELS, *opened.grid.bev_shape, device=DEVICE, requires_grad=True)
    voxel, valid = batch["voxel"].long(), batch["feature_cameras"] > 0

    def run() -> None:
        logits, features = module(bev, voxel)
        loss = occupancy_sum(logits, voxel) / logits.numel()
        loss = loss + 0.01 * cosine_sum(features, batch["features"], valid) / valid.sum()
        loss.backward()

    return timed(run)


class DenseHead(OccFeatHead):
    """The paper's form: every layer on the dense volume, features of every voxel."""

    def forward(self, bev: Tensor, voxel: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`OccFeatHead.forward`, for one sample."""
        assert self.occupancy is not None and self.features is not None
        rows = self.mix(bev)[0].permute(1, 2, 0)
        volume = self.unsplat(rows).unflatten(-1, (self.heights, -1)).permute(2, 0, 1, 3)
        volume = self.reduce(F.softplus(self.expand(volume)))  # (Z, X, Y, C)
        assert self.occupancy and self.features
        features = self.features(volume).flatten(0, 2)
        return self.occupancy(volume)[None, ..., 0], features[voxel]


def step(store: str, with_teacher: bool, size: int = 1) -> Figures:
    """A whole optimiser step in bfloat16."""
    from transformers import Dinov2Config, Dinov2Model

    inputs, batch = batch_of(store, size)
    objective = Job("pretrain", store, CONFIG).objective(open_store(store))
    network = Network(CONFIG.model, objective).to(DEVICE).train()
    targets = objective.targets(batch, torch.zeros(size))
    counts = objective.counts(targets).tolist()
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    # ViT-S/14 with random weights: what it computes does not change what it costs.
    shape = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    dinov2 = Dinov2Model(shape).to(DEVICE).eval() if with_teacher else None

    def run() -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            if dinov2:
                with torch.inference_mode():
                    dinov2(F.interpolate(inputs["images"].flatten(0, 1), (252, 448)))
            loss, _ = network(inputs, targets, counts, 1.0)
        loss.backward()
        optimiser.step()

    return timed(run)


def waiting(store: str, config: TrainConfig) -> Figures:
    """Seconds of a step of a real training, and the share of it spent waiting for data."""
    steps = count()
    with tempfile.TemporaryDirectory() as directory:
        run, job = Run(Path(directory)), Job("pretrain", store, config)
        trainer = Trainer(job, Process(0, 1, DEVICE))
        trainer.begin()
        run.create(job.describe(trainer.store))
        with closing(RunLog(run.path, True, trainer.total_steps, 0, False)) as log:
            trainer.fit(run, log, lambda: next(steps) == 9)
        _, *lines = map(json.loads, (run.path / "log.jsonl").read_text().splitlines())
    seconds = sum(line["seconds"] for line in lines)
    waited = sum(line["waited"] * line["seconds"] for line in lines)
    return seconds / len(lines), waited / seconds


if __name__ == "__main__":
    main()
