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
- ``boxes`` float32 (M, 8), ``box_class`` uint8 (M,): in ego, likewise.
- With each of these the array that counts its rows, such as ``n_points`` int64 (B,).
- ``vehicle``, ``vehicle_visible`` uint8 (B, X, Y), ``map`` uint8 (B, K, X, Y) of K classes and
  every other array of the store with a fixed shape: stacked.
"""

import io
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from occfeat_targets.store.files import StoreError, absolute
from occfeat_targets.store.reader import TargetStore, open_store
from occfeat_targets.store.schema import JPEG_HOLE


class FrameReader:
    """Reads frames of a store, which it opens when first needed, again in each process; with
    ``check``, their checksums are looked at."""

    def __init__(self, url: str, check: bool = True):
        self.url, self.check = absolute(url), check
        self._pid: int | None = None

    def __reduce__(self):
        return FrameReader, (self.url, self.check)

    @property
    def store(self) -> TargetStore:
        """Opened by this very process: nothing open is shared across a fork. StoreError: as
        :func:`occfeat_targets.store.reader.open_store`."""
        if self._pid != os.getpid():
            self._store, self._pid = open_store(self.url), os.getpid()
            self._store.check_reads = self.check
        return self._store

    def read(self, i: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        """As :meth:`TargetStore.read`, but fit for a GPU; ``images`` uint8 (N, H, W, 3), RGB.

        Raises StoreError, naming store, frame, scene and sample, for an array that the store lacks,
        a frame that failed in the build, and whatever is missing or damaged.
        """
        store = self.store
        frame = store.read(i, names)
        try:
            if "images" in frame:
                offset, attrs = store.per_frame["image_offset"][i], store.attrs
                size, cameras = attrs["config"]["images"]["size"], attrs["cameras"]
                frame["images"] = decode_images(frame["images"], offset, size, cameras)
            if (frame.get("voxel_index", np.zeros(0)) >= store.grid.n_voxels).any():
                # On a GPU this would be an assertion in some kernel, long after.
                raise StoreError("voxel_index has voxels outside of the grid: the store is damaged")
        except StoreError as error:
            store.require_same()
            raise StoreError(f"{self.url}: {store.describe(i)}: {error}") from error
        return frame


def decode_images(
    jpegs: np.ndarray, offset: np.ndarray, hw: tuple[int, int], cameras: Sequence[str]
) -> np.ndarray:
    """Images of a frame, uint8 (N, ``*hw``, 3), RGB, of the N cameras of these names.

    ``jpegs`` are uint8, one after another; ``offset`` int (N + 1,) says where each begins and the
    last ends; ``hw`` is the (H, W) that each must have. Raises StoreError, naming the camera, when
    its image is broken or of another size.
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


class Work(Protocol):
    """What reading processes do beyond reading, such as finding neighbours. Plain data."""

    def sample(self, sample: dict[str, Any], epoch: int) -> dict[str, Any]:
        """What is made of the arrays of one frame."""
        ...

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """That of a batch, from samples that have it."""
        ...


class FrameDataset(Dataset):
    """Frames ``frames`` of the store at a path or URL, of which it reads the arrays ``names``
    besides ``K`` and ``cam_T_ego``, see :class:`FrameReader`, and does its ``work``. Holds plain
    data, so that it can be sent to workers."""

    def __init__(
        self,
        url: str,
        frames: Sequence[int],
        names: Sequence[str],
        check: bool = True,
        work: Work | None = None,
    ):
        self.frames = np.asarray(frames, dtype=np.int64)
        self.names = tuple(dict.fromkeys((*names, "K", "cam_T_ego")))
        self.reader, self.work = FrameReader(url, check), work

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The arrays of one frame, and ``frame``, its number in the store. Positions beyond the
        last are those of later epochs, see ``order.ShardSampler``."""
        epoch, position = divmod(position, len(self))
        frame = int(self.frames[position])
        sample = {"frame": frame} | self.reader.read(frame, self.names)
        return sample | self.work.sample(sample, epoch) if self.work else sample

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch, as described at the top, of some of this dataset's samples."""
        store = self.reader.store
        batch = {"frame": torch.tensor([sample["frame"] for sample in samples])}
        for name in self.names:
            values = [sample[name] for sample in samples]
            counted_by = store.specs[name].rows
            if counted_by is None or name == "images":
                batch[name] = torch.from_numpy(np.stack(values))
                continue
            batch[counted_by] = torch.tensor([len(value) for value in values])
            if name == "voxel_index":
                name, values = "voxel", number_voxels(values, store.grid.n_voxels)
            batch[name] = torch.from_numpy(np.concatenate(values))
        return batch | self.work.collate(samples) if self.work else batch


def number_voxels(index: list[np.ndarray], grid_voxels: int) -> list[np.ndarray]:
    """Flat (Z, X, Y) indices of each frame, uint32 (V,), to flat (B, Z, X, Y) ones of a batch."""
    dtype = np.int32 if len(index) * grid_voxels <= 2**31 else np.int64
    return [values.astype(dtype) + dtype(b * grid_voxels) for b, values in enumerate(index)]
