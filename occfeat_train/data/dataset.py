"""Frames of a targets store, and batches of them.

Workers read and decode, nothing more: int8 and uint8 travel as they are and become floats on the
device, where augmentation happens too. A batch of B frames is a dict of tensors. Always there:

- ``frame`` int64 (B,): frame numbers in the store.
- ``K`` float32 (B, N, 3, 3): intrinsics of the stored images of the N cameras, which the store's
  attribute ``cameras`` names; ``cam_T_ego`` float32 (B, N, 4, 4), metres.

By name, as the dataset was asked to:

- ``images`` uint8 (B, N, H, W, 3): RGB.
- ``voxel_index`` arrives as ``voxel`` (V,): the occupied voxels of all frames one after another,
  flat (B, Z, X, Y) indices, ascending; int32, or int64 if a batch has 2^31 voxels.
- ``features`` int8 (V, C), ``feature_scale`` float16 (V,), ``feature_cameras`` uint8 (V,): in the
  order of ``voxel``; bit c of the last = camera c sees the voxel, 0 = no feature target.
- ``points`` int16 (P, 4): lidar in ego, all frames one after another, x, y, z in steps of the
  store's ``point_step_m`` and intensity.
- ``vehicle_boxes`` float32 (M, 8): in ego, likewise.
- With each of these the array that counts its rows, such as ``n_points`` int64 (B,).
- ``vehicle``, ``vehicle_visible`` uint8 (B, X, Y), ``map`` uint8 (B, K, X, Y) of K classes and
  every other array of the store with a fixed shape: stacked.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from occfeat_targets.store.schema import (
    FAILED,
    JPEG_HOLE,
    StoreError,
    TargetStore,
    absolute,
    open_store,
)
from occfeat_targets.store.shards import ShardedArray

_COUNTED_BY = {
    "voxel_index": "n_voxels",
    "features": "n_voxels",
    "feature_scale": "n_voxels",
    "feature_cameras": "n_voxels",
    "points": "n_points",
    "vehicle_boxes": "n_vehicles",
}
"""The ragged arrays and what says how many rows of a frame are valid."""


class FrameReader:
    """Reads frames of a store, which it opens when first needed, again in each process."""

    def __init__(self, url: str):
        self.url = absolute(url)
        self._pid: int | None = None

    def __reduce__(self):
        return FrameReader, (self.url,)

    @property
    def store(self) -> TargetStore:
        """The store, opened by this very process: nothing open is shared across a fork.

        Raises:
            StoreError: as :func:`occfeat_targets.store.schema.open_store`.
        """
        if self._pid != os.getpid():
            self._store, self._pid = open_store(self.url), os.getpid()
            self._sharded = {
                spec.name: ShardedArray(self.url, self._store.array(spec.name))
                for spec in self._store.specs
                if spec.chunk is not None
            }
        return self._store

    def read(self, i: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Arrays of frame i, without frame axis, trimmed to what is valid.

        ``images`` is decoded: uint8 (N, H, W, 3), RGB.

        Raises:
            StoreError: naming store, frame, scene and sample, for an array that the store lacks,
                a frame that failed in the build, and whatever is missing or damaged.
        """
        store = self.store
        failed = store.per_frame["n_voxels"][i] == FAILED
        try:
            if failed:
                raise StoreError("it has no targets, it failed when the store was built")
            return {name: self._read(i, name) for name in names}
        except Exception as error:  # remote filesystems raise what they like
            sample = f"{store.scene(i)}, sample {store.token(i)}"
            raise StoreError(f"{self.url}: frame {i} ({sample}): {error}") from error

    def _read(self, i: int, name: str) -> np.ndarray:
        per_frame = self._store.per_frame
        if name in per_frame:
            return per_frame[name][i]
        if name not in self._sharded:
            raise StoreError(f"the store has no {name!r}, it was built without")
        if name == "images":
            offset = per_frame["image_offset"][i]
            jpegs, attrs = self._sharded[name].read(i, offset[-1]), self._store.attrs
            hw, cameras = attrs["config"]["images"]["size"], attrs["cameras"]
            return decode_images(jpegs, offset, hw, cameras)
        count = _COUNTED_BY.get(name)
        values = self._sharded[name].read(i, count and per_frame[count][i])
        if name == "voxel_index" and (values >= self._store.grid.n_voxels).any():
            # On a GPU this would be an assertion in some kernel, long after.
            raise StoreError("voxel_index has voxels outside of the grid: the store is damaged")
        return values


def decode_images(
    jpegs: np.ndarray, offset: np.ndarray, hw: tuple[int, int], cameras: Sequence[str]
) -> np.ndarray:
    """The cameras' images of a frame.

    Args:
        jpegs: uint8, the JPEGs one after another.
        offset: int (N + 1,), where each begins and the last ends.
        hw: (H, W) that each must have.
        cameras: their N names.

    Returns:
        uint8 (N, H, W, 3), RGB.

    Raises:
        StoreError: naming the camera, when its image is broken or of another size.
    """
    images = np.empty((len(offset) - 1, *hw, 3), np.uint8)
    for camera, (start, end), image in zip(cameras, pairwise(offset), images, strict=True):
        jpeg = jpegs[start:end].tobytes()
        try:
            decoded = Image.open(io.BytesIO(jpeg), formats=("JPEG",))
            if JPEG_HOLE in jpeg:  # the decoder would paint it grey and say nothing
                raise ValueError("it has a hole of zero bytes")
            if decoded.mode != "RGB" or decoded.size != (hw[1], hw[0]):
                raise ValueError(f"it is {decoded.mode} {decoded.height}x{decoded.width}")
            image[:] = np.asarray(decoded)
        except (OSError, SyntaxError, ValueError) as error:  # the first two are Pillow's
            raise StoreError(f"cannot decode the image of {camera}: {error}") from error
    return images


class FrameDataset(Dataset):
    """Chosen frames and arrays of a store.

    Holds plain data, so that it can be sent to workers.

    Args:
        url: path or URL of the store.
        frames: frame numbers in the store, as from ``order.select_frames``.
        names: arrays to read besides ``K`` and ``cam_T_ego``.
    """

    def __init__(self, url: str, frames: Sequence[int], names: tuple[str, ...]):
        self.frames = np.asarray(frames, dtype=np.int64)
        self.names = (*names, "K", "cam_T_ego")
        self.reader = FrameReader(url)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        """The arrays of one frame, and ``frame``, its number in the store."""
        frame = int(self.frames[position])
        return {"frame": frame} | self.reader.read(frame, self.names)

    def collate(self, samples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        """A batch, as described at the top, of some of this dataset's samples."""
        batch = {"frame": torch.tensor([sample["frame"] for sample in samples])}
        for name in self.names:
            values = [sample[name] for sample in samples]
            counted_by = _COUNTED_BY.get(name)
            if counted_by is None:
                batch[name] = _concatenate([value[None] for value in values])
                continue
            batch[counted_by] = torch.tensor([len(value) for value in values])
            if name == "voxel_index":
                name, values = "voxel", number_voxels(values, self.reader.store.grid.n_voxels)
            batch[name] = _concatenate(values)
        return batch


def number_voxels(index: list[np.ndarray], grid_voxels: int) -> list[np.ndarray]:
    """Flat (Z, X, Y) indices of each frame, uint32 (V,), to flat (B, Z, X, Y) ones of a batch."""
    dtype = np.int32 if len(index) * grid_voxels <= 2**31 else np.int64
    return [values.astype(dtype) + dtype(b * grid_voxels) for b, values in enumerate(index)]


def _concatenate(arrays: list[np.ndarray]) -> torch.Tensor:
    """Along the first axis."""
    return torch.from_numpy(np.concatenate(arrays))
