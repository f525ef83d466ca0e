"""How fast is the trainer's loader, and what are its limits? All figures from one run.

Samples/s of the loader of a pretraining (features, voxels, camera bits, images; global shuffle), of
one that only preads the very same bytes and decodes the same stored JPEGs, and of one that decodes
and resizes the dataset's original images instead (if OpenCV is there, as with the extra
``targets``). Repetitions are interleaved, ratios are medians; the page cache is warm.
"""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np

from occfeat_pipelines.benchmark import ARRAYS, say_machine, some_frames
from occfeat_targets.store.reader import open_store
from occfeat_train.data.dataset import FrameDataset, decode_images
from occfeat_train.data.order import ShardSampler
from occfeat_train.data.workers import make_loader

BATCH = 4


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--store", default="targets.zarr", help="A targets store on a local disk.")
@click.option("--dataroot", default="demo-world", help="The dataset it was built from.")
@click.option("--workers", default=2, help="Reading processes.")
@click.option("--samples", default=400, help="Of one repetition.")
@click.option("--repetitions", default=7)
def main(store: str, dataroot: str, workers: int, samples: int, repetitions: int) -> None:
    """Print the benchmark."""
    say_machine()
    frames = some_frames(open_store(store), samples)
    kinds = {"occfeat loader": FrameDataset, "bare pread + JPEG decode": BarePread}
    datasets = {name: kind(store, frames, ARRAYS) for name, kind in kinds.items()}
    if find_spec("cv2"):
        few = frames[: max(BATCH, samples // 4)]  # these take long
        datasets["original images"] = OriginalImages(store, few, dataroot)
    samplers = {name: ShardSampler(len(d), BATCH, seed=0) for name, d in datasets.items()}
    loaders = {
        name: make_loader(d, samplers[name], workers, "forkserver", pin_memory=False)
        for name, d in datasets.items()
    }
    speeds: dict[str, list[float]] = {name: [] for name in loaders}
    for epoch in range(1 + repetitions):
        for name, loader in loaders.items():
            samplers[name].set_epoch(epoch)
            start = time.perf_counter()
            n = sum(len(batch["frame"]) for batch in loader)
            speeds[name].append(n / (time.perf_counter() - start))
    _, *ours = speeds["occfeat loader"]
    for name, (_, *values) in speeds.items():  # the first epoch started the workers
        each = f"{np.median(values):>8.1f} samples/s ({min(values):.1f}-{max(values):.1f})"
        print(f"{name:<26}{each}   occfeat / this {np.median(np.divide(ours, values)):.2f}")


class BarePread(FrameDataset):
    """The limit: reads the byte ranges that hold a frame's chunks, decodes nothing but images."""

    def __getitem__(self, position: int) -> dict[str, Any]:
        """A sample like the real one, but of compressed bytes."""
        i, store = int(self.frames[position]), self.reader.store
        sample: dict[str, Any] = {"frame": i}
        sample |= {name: store.per_frame[name][i] for name in ("K", "cam_T_ego")}
        for name in ARRAYS:
            key, ranges = store.sharded[name].ranges(i, store.n_rows(i, name))
            with open(f"{self.reader.url}/{key}", "rb", buffering=0) as file:  # but for checksums
                parts = [os.pread(file.fileno(), length - 4, at) for at, length in ranges]
            sample[name] = np.frombuffer(b"".join(parts), np.uint8)
        size, cameras = store.attrs["config"]["images"]["size"], store.attrs["cameras"]
        offset = store.per_frame["image_offset"][i]
        return sample | {"images": decode_images(sample["images"], offset, size, cameras)}


class OriginalImages(FrameDataset):
    """As without a store of images: whole JPEGs, OpenCV, INTER_AREA; the rest from the store."""

    def __init__(self, url: str, frames: list[int], dataroot: str):
        super().__init__(url, frames, ARRAYS)
        store = open_store(url)
        self.size = store.attrs["config"]["images"]["size"][::-1]
        folders = [Path(dataroot) / "samples" / camera for camera in store.attrs["cameras"]]
        self.files = list(zip(*(sorted(map(str, f.glob("*.jpg"))) for f in folders), strict=False))
        if not self.files:
            raise click.UsageError(f"{dataroot} has no images in samples/CAMERA")

    def __getitem__(self, position: int) -> dict[str, Any]:
        """A sample like the real one; for speed any of the dataset's images do."""
        import cv2

        cv2.setNumThreads(1)
        i, images = int(self.frames[position]), []
        for file in self.files[i % len(self.files)]:
            small = cv2.resize(cv2.imread(file), self.size, interpolation=cv2.INTER_AREA)
            images.append(cv2.cvtColor(small, cv2.COLOR_BGR2RGB))
        rest = self.reader.read(i, [name for name in self.names if name != "images"])
        return {"frame": i, "images": np.stack(images)} | rest


if __name__ == "__main__":
    main()
