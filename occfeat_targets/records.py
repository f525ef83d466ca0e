"""Plain records: the seam between a dataset and everything else.

Whatever can be turned into :class:`FrameRecord` objects can be built into a store; workers get
these and never load a dataset's tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


class FrameError(ValueError):
    """A frame can't be processed; the message names scene, sample and file."""


@dataclass(frozen=True)
class Boxes:
    """Annotated boxes of one keyframe, in the ego frame."""

    category: tuple[str, ...]
    """nuScenes category names, (n,)."""
    box: np.ndarray
    """float64 (n, 7): centre x, y, z, length, width, height in metres, yaw in radians."""
    visibility: np.ndarray
    """uint8 (n,): nuScenes visibility 1 (0-40 %) to 4 (80-100 %); 0 = not annotated."""


@dataclass(frozen=True)
class FrameRecord:
    """One keyframe: files, calibration, poses and boxes.

    The ego frame is the vehicle frame at the LIDAR_TOP keyframe's timestamp. Cameras are in the
    order of ``schema.CAMERAS``. Sweeps are newest first; the first one is the keyframe's.
    """

    token: str
    scene: str
    split: str
    timestamp_us: int
    map_path: str
    """Map-expansion JSON of the frame's location; empty if the dataset has none."""
    image_paths: tuple[str, ...]
    image_hw: tuple[tuple[int, int], ...]
    """Height and width of each original image."""
    K: np.ndarray
    """float64 (6, 3, 3), of the original images."""
    cam_T_ego: np.ndarray
    """float64 (6, 4, 4), each through its camera's own ego pose."""
    sweep_paths: tuple[str, ...]
    ego_T_sweep: np.ndarray
    """float64 (S, 4, 4): sensor frame of each sweep at its own time to ego."""
    global_T_ego: np.ndarray
    """float64 (4, 4)."""
    boxes: Boxes

    def __str__(self) -> str:
        return f"{self.scene}, sample {self.token}"


@dataclass(frozen=True)
class Source:
    """The selected keyframes of a dataset, in scene-table order, and where they came from."""

    records: list[FrameRecord]
    dataset: str
    version: str
    reader: str
    """Version of the program that read the dataset: nuscenes-devkit's."""
    scenes: tuple[str, ...]
    splits: tuple[str, ...]
    has_map: bool
