"""What a targets store is made of: frozen dataclasses, read from YAML and ``--set key=value``.

Everything here changes the stored bytes and is recorded in the store; how a build is run
(workers, scheduler, where dataroot and store lie) is not, so a build may be continued elsewhere.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from occfeat_common.settings import from_plain, load_settings, require, to_plain
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.schema import CORRUPTIONS, SEVERITIES, point_step_m

CORRUPTED = tuple(f"{name}-{severity}" for name in CORRUPTIONS for severity in SEVERITIES)
"""What ``images.corruption`` can be besides ``none``."""
MAP_MODES = ("auto", "required", "never")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LidarConfig:
    """Which lidar returns make the occupancy."""

    near_m: float = 2.2
    """Returns with |x| and |y| below this, in the sensor frame, are dropped (hits on the ego
    car; a square, as nuscenes-devkit's ``remove_close``). 0 keeps everything."""
    sweeps: int = 1
    """Sweeps to accumulate, ego-motion compensated: the keyframe's and the ones before it."""
    max_points: int = 40960
    """Room for this many returns per sweep; a frame with more is an error."""

    def __post_init__(self) -> None:
        require(self.near_m >= 0, "lidar.near_m", "must be >= 0 metres", self.near_m)
        require(self.sweeps >= 1, "lidar.sweeps", "must be >= 1", self.sweeps)
        require(self.max_points >= 1, "lidar.max_points", "must be >= 1", self.max_points)


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen image model whose features are the targets."""

    name: str = "facebook/dinov2-small"
    """DINOv2 hub id or local directory, ``random:SEED`` (same ViT-S/14, random weights, for
    demos and tests), ``package.module:factory`` for a plug-in, or ``none`` for a store without
    features: enough to finetune and evaluate on, and built much faster."""
    input_size: tuple[int, int] = (252, 448)
    """Image height and width the teacher sees; multiples of its patch size."""
    precision: str = "auto"
    """``auto`` is float32 on CPU and bfloat16 on CUDA."""

    def __post_init__(self) -> None:
        _require_size("teacher.input_size", self.input_size)
        require(
            self.precision in PRECISIONS,
            "teacher.precision",
            f"must be one of {', '.join(PRECISIONS)}",
            self.precision,
        )


@dataclass(frozen=True)
class ImagesConfig:
    """The images stored for the trainer."""

    size: tuple[int, int] = (288, 512)
    """Stored height and width."""
    quality: int = 95
    """JPEG quality, 1 to 100."""
    corruption: str = "none"
    """One of nuScenes-C's, such as ``fog-easy`` (see ``corruptions``), laid on the stored images
    and on nothing else: voxels, labels and what a teacher sees stay clean."""
    corruption_seed: int = 0
    """Of the corruption's random numbers. CameraCrash's dead cameras depend on nothing else."""

    def __post_init__(self) -> None:
        _require_size("images.size", self.size)
        require(1 <= self.quality <= 100, "images.quality", "must be 1 to 100", self.quality)
        near = difflib.get_close_matches(self.corruption, CORRUPTED, n=1)
        require(
            self.corruption in ("none", *CORRUPTED),
            "images.corruption",
            f"must be none or one of {', '.join(CORRUPTIONS)} with -{', -'.join(SEVERITIES)} "
            f"behind it{f' (did you mean {near[0]}?)' if near else ''}",
            self.corruption,
        )
        require(
            self.corruption_seed >= 0,
            "images.corruption_seed",
            "must be >= 0",
            self.corruption_seed,
        )


@dataclass(frozen=True)
class LabelsConfig:
    """BEV labels for finetuning."""

    map: str = "auto"
    """``auto`` stores map masks if the map expansion is there, ``required`` insists on it,
    ``never`` does not."""
    divider_width_m: float = 1.5
    """A cell is a divider if its centre lies within half of this of the line. The default is
    the width that nuscenes-devkit's two-pixel lines paint at 0.5 m per cell."""
    max_vehicles: int = 256
    """Room for this many vehicle boxes a frame; a frame with more is an error."""

    def __post_init__(self) -> None:
        require(
            self.map in MAP_MODES, "labels.map", f"must be one of {', '.join(MAP_MODES)}", self.map
        )
        require(
            self.divider_width_m > 0, "labels.divider_width_m", "must be > 0", self.divider_width_m
        )
        require(self.max_vehicles >= 1, "labels.max_vehicles", "must be >= 1", self.max_vehicles)


@dataclass(frozen=True)
class FramesConfig:
    """Which keyframes of the dataroot."""

    scenes: tuple[str, ...] = ()
    """Scene names to keep; empty keeps all."""
    splits: tuple[str, ...] = ()
    """Official splits to keep (``mini_train``, ``val``, …); empty keeps all."""
    limit: int | None = None
    """Keep the first so many keyframes of those."""

    def __post_init__(self) -> None:
        require(self.limit is None or self.limit >= 1, "frames.limit", "must be >= 1", self.limit)


@dataclass(frozen=True)
class TargetsConfig:
    """Everything that decides the bytes of a targets store."""

    grid: VoxelGrid = field(default_factory=VoxelGrid)
    lidar: LidarConfig = field(default_factory=LidarConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    frames: FramesConfig = field(default_factory=FramesConfig)
    block_frames: int = 32
    """Frames of one block: one task, one file of every large array, one unit of resuming."""
    train_preset: str = ""
    """Name of the trainer preset this store is meant for; the trainer uses it unless told
    otherwise. The demo sets it."""

    def __post_init__(self) -> None:
        require(self.block_frames >= 1, "block_frames", "must be >= 1", self.block_frames)
        point_step_m(self.grid)

    def to_dict(self) -> dict:
        """Plain nested dict of lists and scalars, as stored in the root attributes."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: dict) -> TargetsConfig:
        """Inverse of :meth:`to_dict`; missing keys keep their defaults.

        Raises:
            ConfigError: naming the key, on an unknown key, a value of the wrong type, or one
                out of range.
        """
        return from_plain(cls, values)


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> TargetsConfig:
    """Config from a YAML file (or the defaults) with ``section.key=value`` overrides on top.

    Raises:
        ConfigError: on unreadable YAML, an unknown key or an impossible value.
    """
    return load_settings(TargetsConfig, path, overrides)


def _require_size(name: str, size: tuple[int, int]) -> None:
    require(len(size) == 2 and min(size) >= 1, name, "must be [height, width]", list(size))
