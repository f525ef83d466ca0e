"""From a targets store to batches: which frames, in which order, read by whom.

Workers read and decode, nothing more: int8 and uint8 travel as they are and become floats on the
device, where augmentation happens too. A batch of B frames is a dict of tensors. Always there:

- ``frame`` int64 (B,): frame numbers in the store.
- ``K`` float32 (B, N=6, 3, 3): intrinsics of the stored images; ``cam_T_ego`` float32
  (B, N, 4, 4), metres.

By name, as the dataset was asked to:

- ``images`` uint8 (B, N, H, W, 3): RGB.
- ``voxel_index`` arrives as ``voxel`` (V,): the occupied voxels of all frames one after another,
  flat (B, Z, X, Y) indices, ascending; int32, or int64 if a batch has 2^31 voxels.
- ``features`` int8 (V, C), ``feature_scale`` float16 (V,), ``feature_cameras`` uint8 (V,): in the
  order of ``voxel``; bit c of the last = camera c sees the voxel, 0 = no feature target.
- ``points`` int16 (P, 4): lidar in ego, all frames one after another, x, y, z in steps of the
  store's ``point_step_m`` and intensity; ``point_count`` int64 (B,), how many each frame has.
- ``vehicle_boxes`` float32 (M, 8): in ego, likewise; ``vehicle_count`` int64 (B,).
- ``vehicle``, ``vehicle_visible`` uint8 (B, X, Y), ``map`` uint8 (B, 5, X, Y) and every other
  array of the store with a fixed shape: stacked.
"""

from __future__ import annotations

import atexit
import ctypes
import io
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import partial
from itertools import pairwise
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from occfeat_targets.store.schema import (
    CAMERAS,
    FAILED,
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

_COUNT_KEYS = {"points": "point_count", "vehicle_boxes": "vehicle_count"}

_HOLE = bytes(512)
"""JPEG data never has this many zero bytes in a row; a lost disk block does."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


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

        ``images`` is decoded: uint8 (N=6, H, W, 3), RGB.

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
            hw = self._store.attrs["config"]["images"]["size"]
            return decode_images(self._sharded[name].read(i, offset[-1]), offset, hw)
        count = _COUNTED_BY.get(name)
        values = self._sharded[name].read(i, count and per_frame[count][i])
        if name == "voxel_index" and (values >= self._store.grid.n_voxels).any():
            # On a GPU this would be an assertion in some kernel, long after.
            raise StoreError("voxel_index has voxels outside of the grid: the store is damaged")
        return values


def decode_images(jpegs: np.ndarray, offset: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """The cameras' images of a frame.

    Args:
        jpegs: uint8, the JPEGs one after another.
        offset: int (N + 1,), where each begins and the last ends.
        hw: (H, W) that each must have.

    Returns:
        uint8 (N, H, W, 3), RGB.

    Raises:
        StoreError: naming the camera, when its image is broken or of another size.
    """
    images = np.empty((len(offset) - 1, *hw, 3), np.uint8)
    for camera, (start, end), image in zip(CAMERAS, pairwise(offset), images, strict=True):
        jpeg = jpegs[start:end].tobytes()
        try:
            decoded = Image.open(io.BytesIO(jpeg), formats=("JPEG",))
            if _HOLE in jpeg:  # the decoder would paint it grey and say nothing
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
        frames: frame numbers in the store, as from :func:`select_frames`.
        names: arrays to read besides ``K`` and ``cam_T_ego``.
    """

    def __init__(self, url: str, frames: Sequence[int], names: tuple[str, ...]):
        self.frames = np.asarray(frames, dtype=np.int64)
        self.names = (*names, "K", "cam_T_ego")
        self.reader = FrameReader(url)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        """The arrays of one frame, with its number and the grid's, for :func:`collate`."""
        frame = int(self.frames[position])
        grid_voxels = self.reader.store.grid.n_voxels
        return {"frame": frame, "grid_voxels": grid_voxels} | self.reader.read(frame, self.names)


def collate(samples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """A batch, as described at the top, of samples of a :class:`FrameDataset`."""
    batch = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if name == "frame":
            batch[name] = torch.tensor(values)
        elif name == "grid_voxels":
            continue
        elif name == "voxel_index":
            batch["voxel"] = _concatenate(_number_voxels(values, samples[0]["grid_voxels"]))
        elif name in _COUNTED_BY:
            batch[name] = _concatenate(values)
        else:
            batch[name] = _concatenate([value[None] for value in values])
        if name in _COUNT_KEYS:
            batch[_COUNT_KEYS[name]] = torch.tensor([len(value) for value in values])
    return batch


def _number_voxels(index: list[np.ndarray], grid_voxels: int) -> list[np.ndarray]:
    """Flat (Z, X, Y) indices of each frame to flat (B, Z, X, Y) ones."""
    dtype = np.int32 if len(index) * grid_voxels <= 2**31 else np.int64
    return [values.astype(dtype) + dtype(b * grid_voxels) for b, values in enumerate(index)]


def _concatenate(arrays: list[np.ndarray]) -> torch.Tensor:
    """Along the first axis."""
    return torch.from_numpy(np.concatenate(arrays))


def frame_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The shuffle of an epoch: int64 (n,), a permutation of 0..n-1.

    A pure function of its arguments. Sorts Philox's raw output, which numpy promises never to
    change; it makes no such promise for ``Generator.permutation``.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.argsort(bits.random_raw(n), kind="stable")


class ShardSampler:
    """The batches of positions that one rank trains on in an epoch; a batch sampler.

    All ranks walk through the same shuffled order in global batches of ``batch`` frames, of which
    each takes its own slice: what a global batch holds does not depend on the number of ranks.
    What does not fill a last global batch is left out, until the next epoch's order.

    Args:
        n: length of the dataset.
        batch: frames of one forward pass of all ranks together.
        seed: of the shuffle, not negative.
        rank: this process among ``world``.

    Raises:
        ValueError: when the ranks cannot share a batch evenly, or n is less than one batch.
    """

    def __init__(self, n: int, batch: int, seed: int, rank: int = 0, world: int = 1):
        if batch < 1 or batch % world:
            raise ValueError(f"a global batch of {batch} frames cannot be shared by {world} ranks")
        if n < batch:
            raise ValueError(f"{n} frames do not fill one global batch of {batch}")
        self.n, self.batch, self.seed = n, batch, seed
        self.rank, self.world = rank, world
        self.set_epoch(0)

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """What the next ``iter()`` yields: that epoch's batches after the first ``done``."""
        self.epoch, self.done = epoch, done

    def __len__(self) -> int:
        """Batches that the next ``iter()`` yields."""
        return max(0, self.n // self.batch - self.done)

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.n // self.batch
        order = frame_order(self.n, self.seed, self.epoch)[: batches * self.batch]
        return iter(order.reshape(batches, self.world, -1)[self.done :, self.rank].tolist())


class EvalSampler:
    """Positions rank, rank + world, ... below n, in order, ``batch`` at a time; a batch sampler.

    The ranks together read each position exactly once: nothing is padded or left out.
    """

    def __init__(self, n: int, batch: int, rank: int = 0, world: int = 1):
        mine = range(rank, n, world)
        self._batches = [list(mine[i : i + batch]) for i in range(0, len(mine), batch)]

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)


def make_loader(
    dataset: FrameDataset,
    batches: ShardSampler | EvalSampler,
    workers: int,
    start_method: str,
    pin_memory: bool,
) -> DataLoader:
    """A loader of collated batches; iterate it once per epoch.

    Workers stay for the next epoch, whose batches are read from ``batches`` when its iteration
    begins. An epoch may be abandoned: what was read ahead is thrown away.

    Args:
        dataset: what to read.
        batches: positions in the dataset, batch by batch.
        workers: processes; 0 reads in this one.
        start_method: of the workers: "forkserver", "spawn" or "fork".
        pin_memory: whether to copy batches to pinned memory, for asynchronous copies to a GPU.
    """
    loader = partial(
        DataLoader,
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else each epoch draws from the global random state
    )
    if workers == 0:
        return loader()
    context = multiprocessing.get_context(start_method)
    if start_method == "forkserver":  # imports once, not once per worker
        context.set_forkserver_preload(["__main__", __name__])
        previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the server inherits
        forkserver.ensure_running()
        signal.signal(signal.SIGTERM, previous)
    return loader(
        num_workers=workers,
        multiprocessing_context=context,
        persistent_workers=True,
        worker_init_fn=_start_worker,
    )


def _start_worker(worker: int) -> None:
    """Set up a worker process."""
    # Ctrl-C reaches workers too, and torchrun and Slurm send SIGTERM to all processes; but it is
    # the main process that decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # torch's workers watch their parent process, which under forkserver is the server: after a
    # kill -9 of the main process both would stay for ever.
    Thread(target=_exit_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    # Keep freed memory. Else glibc gives a whole batch back each time, and the page faults to get
    # it again take about a sixth of a worker's time.
    with suppress(AttributeError, OSError):  # no glibc, no such problem
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


@atexit.register
def _end_workers() -> None:
    """Kill the workers that are left when this process exits, say after an error.

    multiprocessing would end them by SIGTERM, which they ignore, and then wait for them for ever.
    """
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _exit_with(main_process: BaseProcess) -> None:
    """Wait until the main process is gone, then go too."""
    main_process.join()
    os._exit(1)


def select_frames(
    store: TargetStore,
    splits: tuple[str, ...],
    fraction: str | float = 1,
    unit: Literal["scene", "frame"] = "scene",
) -> list[int]:
    """Frames of some splits that did not fail in the build, or a fraction of their labels.

    Of n scenes in table order, scene i (from 0) stays iff floor((i + 1) f) > floor(i f): for
    f = 1/k every k-th, the rule of SLidR and ALSO (1 % of 700 scenes: the 100th, 200th, ...
    700th). If none stays, the first does.

    Args:
        store: an open store.
        splits: names, as in its attribute ``splits``.
        fraction: in (0, 1], as decimal number or text, so that 0.1 means exactly 1/10.
        unit: what the fraction counts: scenes having frames in the splits, or frames.

    Returns:
        Frame numbers, ascending.

    Raises:
        ValueError: for a fraction outside of (0, 1] or an unknown unit.
        StoreError: when nothing is left.
    """
    share = Fraction(str(fraction))
    if not 0 < share <= 1:
        raise ValueError(f"the label fraction must be above 0 and at most 1, got {fraction}")
    if unit not in ("scene", "frame"):
        raise ValueError(f"the fraction's unit must be 'scene' or 'frame', got {unit!r}")
    names, table = store.attrs["splits"], store.per_frame
    wanted = [k for k, name in enumerate(names) if name in splits]
    frames = np.flatnonzero(np.isin(table["split"], wanted))
    scene = table["scene"][frames]  # in the order of attribute `scenes`, the table's
    if unit == "scene":
        frames = frames[np.isin(scene, _every_kth(np.unique(scene), share))]
    else:
        frames = _every_kth(frames, share)
    frames = frames[table["n_voxels"][frames] != FAILED]
    if not len(frames):
        raise StoreError(
            f"{store.url} has no usable frames of {', '.join(splits)}; "
            f"its splits are: {', '.join(names)}"
        )
    return frames.tolist()


def _every_kth(items: np.ndarray, share: Fraction) -> np.ndarray:
    """Those i with floor((i + 1) share) > floor(i share), or the first."""
    top, bottom = share.as_integer_ratio()
    kept = [i for i in range(len(items)) if (i + 1) * top // bottom > i * top // bottom]
    return items[kept or [0]] if len(items) else items
