"""What a stored thing is: how its arrays are computed, checked and drawn. An output is one module
with one class; what several need of a keyframe, :class:`FrameInputs` computes once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from occfeat_targets.geometry import transform
from occfeat_targets.images import decode_jpeg, resize
from occfeat_targets.sources import SOURCES
from occfeat_targets.sources.base import Dataset, FrameRecord, MapLayers, Source
from occfeat_targets.store.colours import Paint
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.schema import ArraySpec
from occfeat_targets.store.settings import Settings, Size
from occfeat_targets.teachers.base import Teacher, dense_features


class LidarSettings(Settings):
    """Which lidar returns make the occupancy."""

    near_m: float = Field(default=2.2, ge=0)
    """Returns with |x| and |y| below this, in the sensor frame, are dropped (hits on the ego
    car; a square, as nuscenes-devkit's ``remove_close``). 0 keeps everything."""
    sweeps: int = Field(default=1, ge=1)
    """Sweeps to accumulate, ego-motion compensated: the keyframe's and the ones before it."""
    max_points: int = Field(default=40960, ge=1)
    """Room for this many returns per sweep; a frame with more is an error."""


@dataclass(frozen=True)
class Layout:
    """What all outputs of a store have in common."""

    grid: VoxelGrid
    cameras: tuple[str, ...]
    box_classes: tuple[str, ...]
    vehicle_classes: tuple[str, ...]
    map_classes: tuple[str, ...]
    """Empty without a map."""
    image_size: Size
    """Of the stored images."""
    max_points: int
    """Most returns of a frame, all sweeps together."""
    sweeps: int
    feature_dim: int
    """Channels C of the teacher; 0 without one, then no features are stored."""
    feature_hw: Size = (1, 1)
    """Cells of the teacher's feature map of an image."""
    lidarseg_classes: tuple[str, ...] = ()
    """Empty if lidar returns have no classes."""

    @property
    def max_voxels(self) -> int:
        """A point occupies one voxel: this can't overflow."""
        return min(self.max_points, self.grid.n_voxels)

    @property
    def camera_bits(self) -> str:
        """Dtype that has a bit for each camera, and one more: all bits set is no real value."""
        n = len(self.cameras)
        return "uint8" if n < 8 else "uint16" if n < 16 else "uint32"


@dataclass
class FrameInputs:
    """What several outputs need of one keyframe: each computed when first asked for, and kept."""

    record: FrameRecord
    layout: Layout
    near_m: float
    """``lidar.near_m``."""
    teacher: Teacher
    teacher_size: Size
    """(height, width) that the teacher sees."""
    full_size: bool = False
    """Whether the stored images are made of the originals at full size."""
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """What the outputs before gave of it."""

    @cached_property
    def source(self) -> Source:
        """The dataset that the keyframe is of."""
        return SOURCES(self.record.source)()

    @cached_property
    def sweeps(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each sweep's returns, float32 (M, 4), x, y, z in its sensor's frame and intensity, and
        which of them are not on the ego car, bool (M,).
        Raises ValueError, naming the file, if one is missing, truncated or not finite."""
        sweeps = []
        for path in self.record.sweep_paths:
            rows = self.source.read_lidar(Path(path))
            if rows.shape[1:] != (4,):
                raise ValueError(f"{path}: read_lidar gave shape {rows.shape}, should be (M, 4)")
            if bad := np.count_nonzero(~np.isfinite(rows).all(axis=1)):
                raise ValueError(f"{path} has {bad} points with NaN or infinite coordinates")
            if bad := np.count_nonzero((rows[:, 3] < 0) | (rows[:, 3] > 255)):
                raise ValueError(f"{path} has {bad} points with an intensity outside 0..255")
            sweeps.append((rows, ~(np.abs(rows[:, :2]) < self.near_m).all(axis=1)))
        return sweeps

    @cached_property
    def lidar(self) -> tuple[np.ndarray, np.ndarray]:
        """Lidar returns of all sweeps that are not on the ego car: float64 (M, 3) metres in ego;
        float32 (M,) intensity 0..255. Raises ValueError: see :attr:`sweeps`."""
        xyz_ego, intensity = [], []
        for (rows, far), ego_T_sensor in zip(self.sweeps, self.record.ego_T_sweep, strict=True):
            xyz_ego.append(transform(ego_T_sensor, rows[far, :3]))
            intensity.append(rows[far, 3])
        return np.concatenate(xyz_ego), np.concatenate(intensity)

    @cached_property
    def voxel_index(self) -> np.ndarray:
        """Occupied voxels, uint32 (V,), ascending (paper §3.2)."""
        return self.layout.grid.occupied(self.lidar[0])

    @cached_property
    def images(self) -> list[Image.Image]:
        """The cameras' images, RGB, each decoded once: at least as large as teacher and store need.
        Without ``full_size`` that may be a fraction of the file's size: on a real keyframe stored
        images then differ by 0.4 of 255 levels from those resized from full size. Raises
        ValueError, naming the file, if one is missing or damaged."""
        (a, b), (c, d), record = self.teacher_size, self.layout.image_size, self.record
        sizes = record.image_hw if self.full_size else [(max(a, c), max(b, d))] * len(record.K)
        return [decode_jpeg(Path(p), hw) for p, hw in zip(record.image_paths, sizes, strict=True)]

    @cached_property
    def feature_maps(self) -> torch.Tensor:
        """The teacher's features, float32 (N, C, h, w), CPU. Raises TeacherError: wrong shape."""
        images = [resize(image, self.teacher_size) for image in self.images]
        return dense_features(self.teacher, images, self.teacher_size)

    @cached_property
    def map(self) -> MapLayers:
        """The map of the frame's location."""
        return self.source.read_map(self.record.map_path)


class Output:
    """One stored thing, by its settings (of class ``Settings``) and the store's layout. Subclasses
    override what concerns them."""

    Settings: type[Settings] = Settings
    paint: Paint
    """How features are coloured: there once something is to be drawn."""

    def __init__(self, settings: Any, layout: Layout):
        self.settings, self.layout = settings, layout

    def specs(self) -> tuple[ArraySpec, ...]:
        """Its arrays."""
        raise NotImplementedError

    def compute(self, frame: FrameInputs) -> dict[str, np.ndarray]:
        """Its arrays of one keyframe, by name, trimmed to what is valid; those that only count rows
        of others need not be given. Raises ValueError, saying what is wrong with the keyframe."""
        return {}

    def of_records(self, dataset: Dataset) -> dict[str, np.ndarray]:
        """Its arrays that follow from the tables alone, whole: name to (frames, ...)."""
        return {}

    def faults(self, record: FrameRecord) -> Iterator[str]:
        """What would make :meth:`compute` fail and can be seen without work."""
        return iter(())

    def check(self, store: TargetStore, frame: dict[str, Any]) -> Iterator[str]:
        """What is wrong with its arrays of one stored frame (:meth:`TargetStore.frame`)."""
        return iter(())

    def compare(self, stored: dict[str, Any], again: dict[str, np.ndarray]) -> Iterator[str]:
        """How its arrays of a stored frame differ from what :meth:`compute` gives now."""
        for spec in self.specs():
            if spec.name in again and not np.array_equal(stored[spec.name], again[spec.name]):
                yield f"{spec.name} differs from the recomputed one"

    def draw_camera(self, axis: Any, store: TargetStore, frame: dict[str, Any], c: int) -> None:
        """Draw it into camera c's picture, a matplotlib axis in pixels."""

    def draw_bev(self, axis: Any, store: TargetStore, frame: dict[str, Any]) -> None:
        """Draw it as seen from above, into a matplotlib axis of y (to the left) and x."""
