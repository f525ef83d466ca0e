"""How fast is training, and what do its tricks buy? All figures from one run.

    python pipelines/bench_train.py                       # targets.zarr, demo-world
    python pipelines/bench_train.py --store /fast/targets.zarr --dataroot /data/sets/nuscenes

At the paper's size (six 224x400 images, the store's grid, batch 1, 128 channels, EfficientNet-B0):
lifting against Simple-BEV's dense form, the pretraining head against its dense form, each with
peak memory; the loader against a bare read and against decoding the dataset's own images; and
how much of a training step is spent waiting for data. With a GPU also images/s at batch 16 and
the step with the teacher in the loop. Each timed part runs in a process of its own, so that
memory peaks are its own. Machines are noisy: compare figures of one run only.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from bench_loader import loader_speed, usable
from torch import nn
from torch.nn import functional as F

from occfeat_targets.store.schema import open_store
from occfeat_train.augment import draw, network_inputs
from occfeat_train.config import NO_AUGMENT, ModelConfig, TrainConfig
from occfeat_train.data import FrameDataset, collate
from occfeat_train.geometry import volume_centres
from occfeat_train.losses import cosine_sum, occupancy_sum
from occfeat_train.models.lift_simplebev import SimpleBEVLift
from occfeat_train.models.occfeat_head import OccFeatHead
from occfeat_train.objectives import Network, OccFeat

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHANNELS, IMAGE_HW, FEATURE_HW = 128, (224, 400), (28, 50)
ARRAYS = ("images", "voxel_index", "features", "feature_cameras")


@click.command()
@click.option("--store", default="targets.zarr", show_default=True, help="A targets store.")
@click.option(
    "--dataroot",
    default="demo-world",
    show_default=True,
    type=click.Path(exists=True, path_type=Path),
    help="The dataset the store was built from, for its original images.",
)
@click.option("--rounds", default=3, show_default=True, help="Interleaved repetitions.")
@click.option("--part", hidden=True, help="Run one part here and print JSON.")
def main(store: str, dataroot: Path, rounds: int, part: str | None) -> None:
    """Print the benchmark."""
    if part:
        print(json.dumps(PARTS[part](store)))
        return
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU {platform.machine()}"
    print(f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, {rounds} rounds, medians")
    for title, ours, dense in (
        ("lifting, forward + backward", "lift", "lift-dense"),
        ("OccFeat head and loss, forward + backward", "head", "head-dense"),
    ):
        compare(title, ours, dense, store, rounds)
    if DEVICE.type == "cuda":
        compare("step, batch 1, teacher in the loop", "step", "step-teacher", store, rounds)
        large = measure("step-16", store)
        print(
            f"step at batch 16, bfloat16: {large['seconds'] * 1e3:.0f} ms, "
            f"{16 * 6 / large['seconds']:.0f} images/s, peak {large['peak_mb']:.0f} MB"
        )
    waiting(store)
    loader_speed(store, dataroot, workers=2, samples=400, repetitions=7)


def compare(title: str, ours: str, other: str, store: str, rounds: int) -> None:
    """Measure two parts in turn and print both and their ratio."""
    runs = [(measure(ours, store), measure(other, store)) for _ in range(rounds)]
    print(title)
    for name, side in ((ours, 0), (other, 1)):
        seconds = np.median([pair[side]["seconds"] for pair in runs])
        peak = np.median([pair[side]["peak_mb"] for pair in runs])
        print(f"  {name:14} {seconds * 1e3:8.0f} ms   peak {peak:7.0f} MB")
    faster = np.median([b["seconds"] / a["seconds"] for a, b in runs])
    leaner = np.median([b["peak_mb"] / a["peak_mb"] for a, b in runs])
    print(f"  {other} takes {faster:.1f} times the time and {leaner:.1f} times the memory")


def measure(part: str, store: str) -> dict[str, float]:
    """Run one part in its own process."""
    command = [sys.executable, __file__, "--part", part, "--store", store, "--dataroot", "."]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise click.ClickException(f"part {part} failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def timed(run: Callable[[], None], repeats: int) -> dict[str, float]:
    """Median seconds of ``run`` and its peak memory above what was there before it."""
    before = _peak_mb(reset=True)
    run()
    seconds = []
    for _ in range(repeats):
        _synchronise()
        started = time.perf_counter()
        run()
        _synchronise()
        seconds.append(time.perf_counter() - started)
    return {"seconds": float(np.median(seconds)), "peak_mb": _peak_mb() - before}


def _synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _peak_mb(reset: bool = False) -> float:
    if DEVICE.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def _batch(store: str, size: int, config: TrainConfig) -> tuple[dict, dict]:
    """Network inputs and the collated batch of the first frames, on the device."""
    frames = np.resize(usable(open_store(store)), size)
    dataset = FrameDataset(store, frames, ARRAYS)
    batch = collate([dataset[i] for i in range(size)])
    batch = {name: values.to(DEVICE) for name, values in batch.items()}
    draws = draw(NO_AUGMENT, 0, 0, batch["frame"].cpu(), 6)
    return network_inputs(batch, draws, config.model.image_size, 0.0), batch


def _lift(store: str, lift: nn.Module, repeats: int) -> dict[str, float]:
    inputs, _ = _batch(store, 1, TrainConfig())
    lift = lift.to(DEVICE)
    features = torch.randn(1, 6, CHANNELS, *FEATURE_HW, device=DEVICE, requires_grad=True)

    def run() -> None:
        volume = lift(features, inputs["K"], inputs["cam_T_bev"], IMAGE_HW)
        volume.backward(volume.detach())

    return timed(run, repeats)


class DenseLift(SimpleBEVLift):
    """Simple-BEV's form: sample a whole volume per camera, mask, average where not zero."""

    def forward(
        self,
        features: torch.Tensor,
        K: torch.Tensor,
        cam_T_bev: torch.Tensor,
        image_hw: tuple[int, int],
    ) -> torch.Tensor:
        """As :meth:`SimpleBEVLift.forward`, for one sample."""
        _, N, C, _, _ = features.shape
        height, width = image_hw
        centres = volume_centres(self.grid, K.device)
        uvw = torch.einsum("nij,vj->nvi", K[0] @ cam_T_bev[0, :, :3], centres)
        depth = uvw[..., 2]
        uv = uvw[..., :2] / depth.clamp(min=1e-6)[..., None]
        inside = (uv >= 0).all(-1) & (uv[..., 0] < width) & (uv[..., 1] < height) & (depth > 0)
        grid = (2 * uv / uv.new_tensor([width, height]) - 1).clamp(-2, 2)
        volumes = F.grid_sample(
            features[0], grid[:, None], align_corners=False, padding_mode="border"
        ).view(N, C, -1)
        volumes = volumes * inside[:, None]
        seen = (volumes.abs() > 0).float()
        mean = (volumes * seen).sum(0) / (1e-6 + seen.sum(0))
        nz, nx, ny = self.grid.shape
        return mean.view(C, nx, ny, nz).permute(3, 0, 1, 2).reshape(1, nz * C, nx, ny)


def _head(store: str, make: type[OccFeatHead], repeats: int) -> dict[str, float]:
    opened = open_store(store)
    _, batch = _batch(store, 1, TrainConfig())
    head = make(CHANNELS, opened.grid.shape[0], opened.attrs["teacher"]["dim"]).to(DEVICE)
    bev = torch.randn(1, CHANNELS, *opened.grid.bev_shape, device=DEVICE, requires_grad=True)
    voxel, valid = batch["voxel"].long(), batch["feature_cameras"] > 0

    def run() -> None:
        logits, features = head(bev, voxel)
        loss = occupancy_sum(logits, voxel) / logits.numel()
        loss = loss + 0.01 * cosine_sum(features, batch["features"], valid) / valid.sum()
        loss.backward()

    return timed(run, repeats)


class DenseHead(OccFeatHead):
    """The paper's form: every layer on the dense volume, features of every voxel."""

    def forward(self, bev: torch.Tensor, voxel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`OccFeatHead.forward`, for one sample."""
        rows = self.mix(bev)[0].permute(1, 2, 0)
        volume = self.unsplat(rows).unflatten(-1, (self.heights, -1)).permute(2, 0, 1, 3)
        volume = self.reduce(F.softplus(self.expand(volume)))  # (Z, X, Y, C)
        features = self.features(volume).flatten(0, 2)
        return self.occupancy(volume)[None, ..., 0], features[voxel]


def _step(store: str, batch_size: int, teacher: bool, repeats: int) -> dict[str, float]:
    """A whole optimiser step on the device, in bfloat16 on a GPU."""
    config = TrainConfig(model=ModelConfig(encoder_weights="random"))
    opened = open_store(store)
    inputs, batch = _batch(store, batch_size, config)
    network = Network(config, OccFeat(config, opened)).to(DEVICE).train()
    targets = network.objective.targets(batch, torch.zeros(batch_size))
    counts = network.objective.counts(targets).tolist()
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    dinov2 = _teacher() if teacher else None
    half = torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda")

    def run() -> None:
        optimiser.zero_grad(set_to_none=True)
        with half:
            if dinov2:
                with torch.inference_mode():
                    dinov2(F.interpolate(inputs["images"].flatten(0, 1), (252, 448)))
            loss, _ = network(inputs, targets, counts, 1.0)
        loss.backward()
        optimiser.step()

    return timed(run, repeats)


def _teacher() -> nn.Module:
    """ViT-S/14 with random weights: what it computes does not change what it costs."""
    from transformers import Dinov2Config, Dinov2Model

    shape = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    return Dinov2Model(shape).to(DEVICE).eval()


def waiting(store: str) -> None:
    """Print how much of a training step is spent waiting for data."""
    batch = 16 if DEVICE.type == "cuda" else 1
    settings = [
        "model.encoder_weights=random",
        f"pretrain.batch={batch}",
        "pretrain.epochs=100",  # it is ended after some steps
        "run.log_every=1",
        "data.workers=2",
    ]
    overrides = [text for setting in settings for text in ("--set", setting)]
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        command = [sys.executable, "-m", "occfeat_train", "pretrain", "--store", store]
        command += ["--config", "paper", "--run-dir", str(run), *overrides]
        said, log = Path(directory) / "said", run / "log.jsonl"
        with said.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 8):
            time.sleep(0.1)
        if process.poll() is not None:
            raise click.ClickException(
                f"the training that was to be timed ended:\n{said.read_text()}"
            )
        process.terminate()
        process.wait()
        lines = [json.loads(line) for line in log.read_text().splitlines()][1:]
    seconds = sum(line["seconds"] for line in lines)
    share = sum(line["waited"] * line["seconds"] for line in lines) / seconds
    print(
        f"pretraining at batch {batch}, settings of the paper, 2 workers: "
        f"{seconds / len(lines):.2f} s a step, {share:.1%} of it waiting for data"
    )


PARTS: dict[str, Callable[[str], dict[str, float]]] = {
    "lift": lambda store: _lift(store, SimpleBEVLift(open_store(store).grid), 7),
    "lift-dense": lambda store: _lift(store, DenseLift(open_store(store).grid), 3),
    "head": lambda store: _head(store, OccFeatHead, 5),
    "head-dense": lambda store: _head(store, DenseHead, 3),
    "step": lambda store: _step(store, 1, False, 10),
    "step-teacher": lambda store: _step(store, 1, True, 10),
    "step-16": lambda store: _step(store, 16, False, 10),
}

if __name__ == "__main__":
    main()
