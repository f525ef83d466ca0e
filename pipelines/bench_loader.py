"""The part of ``bench_train.py`` that measures the loader and its limits.

Samples/s of the trainer's own loader (features, voxels, camera bits, images; global shuffle), of
one that only preads the very same bytes and decodes the same stored JPEGs, and of one that decodes
and resizes the dataset's original images instead. Repetitions are interleaved and the ratios are
medians over them; the page cache is warm.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import click
import cv2
import numpy as np
from torch.utils.data import DataLoader, Dataset

from occfeat_targets.store.schema import CAMERAS, TargetStore, open_store
from occfeat_train.data import FrameDataset, FrameReader, ShardSampler, decode_images, make_loader

ARRAYS = ("features", "voxel_index", "feature_cameras", "images")
BATCH = 4


def loader_speed(
    store: str, dataroot: Path, workers: int, samples: int, repetitions: int
) -> dict[str, float]:
    """Print samples/s of each loader; returns their medians."""
    ours = FrameDataset(store, np.resize(usable(open_store(store)), samples), ARRAYS)
    few = samples // 4 // BATCH * BATCH  # these take long
    loaders = {
        "occfeat loader": _loader(ours, workers),
        "bare pread + JPEG decode": _loader(PreadDataset(ours), workers),
        "original images": _loader(OriginalImages(ours, dataroot, few), workers),
    }
    speeds: dict[str, list[float]] = {name: [] for name in loaders}
    for loader in loaders.values():
        _samples_per_s(loader, 0)  # starts the workers
    for repetition in range(repetitions):
        for name, loader in loaders.items():
            speeds[name].append(_samples_per_s(loader, 1 + repetition))
    for name, values in speeds.items():
        ratio = np.median(np.divide(speeds["occfeat loader"], values))
        print(
            f"{name:<26}{np.median(values):>8.1f} samples/s ({min(values):.1f}-{max(values):.1f})"
            f"   occfeat / this {ratio:.2f}"
        )
    return {name: float(np.median(values)) for name, values in speeds.items()}


def usable(store: TargetStore) -> np.ndarray:
    """Numbers of the frames that have targets."""
    return np.flatnonzero(store.per_frame["n_voxels"] > 0)


def _loader(dataset: Dataset, workers: int) -> DataLoader:
    sampler = ShardSampler(len(dataset), BATCH, seed=0)
    return make_loader(dataset, sampler, workers, "forkserver", pin_memory=False)


def _samples_per_s(loader: DataLoader, epoch: int) -> float:
    loader.batch_sampler.set_epoch(epoch)
    start = time.perf_counter()
    n = sum(len(batch["frame"]) for batch in loader)
    return n / (time.perf_counter() - start)


class PreadDataset(Dataset):
    """The limit: reads the byte ranges that hold a frame's chunks, decodes nothing but images."""

    def __init__(self, dataset: FrameDataset):
        self.frames, reader = dataset.frames, dataset.reader
        self.hw = reader.store.attrs["config"]["images"]["size"]
        self.rest = reader.read(int(self.frames[0]), ("K", "cam_T_ego"))
        self.offset = reader.store.per_frame["image_offset"]
        self.ranges = {i: _ranges(reader, int(i)) for i in np.unique(self.frames)}
        self.grid_voxels = reader.store.grid.n_voxels
        self.feature_dim = reader.store.attrs["teacher"]["dim"]
        self.files: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        """A sample of the shapes of the real one, but of compressed bytes."""
        i = self.frames[position]
        read = {name: self._pread(*self.ranges[i][name]) for name in ARRAYS}
        features = read["features"][: len(read["features"]) // self.feature_dim * self.feature_dim]
        return {
            "frame": int(i),
            "grid_voxels": self.grid_voxels,
            "features": features.reshape(-1, self.feature_dim).view(np.int8),
            "voxel_index": read["voxel_index"],
            "feature_cameras": read["feature_cameras"],
            "images": decode_images(read["images"], self.offset[i], self.hw),
            **self.rest,
        }

    def _pread(self, file: str, spans: list[tuple[int, int]]) -> np.ndarray:
        if file not in self.files:
            self.files[file] = os.open(file, os.O_RDONLY)
        parts = [os.pread(self.files[file], *span) for span in spans]
        return np.frombuffer(b"".join(parts) if len(parts) > 1 else parts[0], np.uint8)


def _ranges(reader: FrameReader, i: int) -> dict[str, tuple[str, list[tuple[int, int]]]]:
    """File and (length, start) of the bytes that the reader reads for each array of frame i."""
    table, ranges = reader.store.per_frame, {}
    for name in ARRAYS:
        array = reader._sharded[name]
        rows = table["image_offset"][i, -1] if name == "images" else table["n_voxels"][i]
        key = array._key(i)
        entries = array._entries(key, i)[: -(-rows // array._chunk_rows)]
        ranges[name] = (f"{reader.url}/{key}", [tuple(entry[::-1]) for entry in entries.tolist()])
    return ranges


class OriginalImages(Dataset):
    """As without a store of images: 1600x900 JPEGs, OpenCV, INTER_AREA; the rest from the store."""

    def __init__(self, dataset: FrameDataset, dataroot: Path, n: int):
        self.frames, self.reader = dataset.frames[:n], dataset.reader
        self.names = tuple(name for name in dataset.names if name != "images")
        height, width = self.reader.store.attrs["config"]["images"]["size"]
        self.size = (width, height)
        folders = [sorted((dataroot / "samples" / camera).glob("*.jpg")) for camera in CAMERAS]
        self.files = [tuple(map(str, files)) for files in zip(*folders, strict=False)]
        if not self.files:
            raise click.UsageError(f"{dataroot} has no images in samples/CAM_*")

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        """A sample like the real one; for speed any of the dataset's images do."""
        cv2.setNumThreads(1)
        i = int(self.frames[position])
        images = np.empty((len(CAMERAS), self.size[1], self.size[0], 3), np.uint8)
        for image, file in zip(images, self.files[i % len(self.files)], strict=True):
            small = cv2.resize(cv2.imread(file), self.size, interpolation=cv2.INTER_AREA)
            cv2.cvtColor(small, cv2.COLOR_BGR2RGB, dst=image)
        grid_voxels = self.reader.store.grid.n_voxels
        rest = self.reader.read(i, self.names)
        return {"frame": i, "grid_voxels": grid_voxels, "images": images, **rest}
