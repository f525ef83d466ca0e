"""The seam between a dataset and everything else: plain records of its keyframes. Whatever can be
turned into :class:`FrameRecord` objects can be built into a store. Workers get these and never load
a dataset's tables; of its module they use the readers of lidar and map, see :class:`Source`."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from pydantic import Field

from occfeat_targets.store.settings import Settings


class SourceError(ValueError):
    """The dataroot is not usable; the message says what was found and what is wanted."""


class FrameError(ValueError):
    """A frame can't be processed; the message names scene, sample and file."""


class FramesSettings(Settings):
    """Which keyframes of the dataroot."""

    scenes: tuple[str, ...] = ()
    """Scene names to keep; empty keeps all."""
    splits: tuple[str, ...] = ()
    """Official splits to keep (``mini_train``, ``val``, …); empty keeps all."""
    limit: int | None = Field(default=None, ge=1)
    """Keep the first so many keyframes of those."""


@dataclass(frozen=True)
class Boxes:
    """Annotated boxes of one keyframe, in the ego frame."""

    category: tuple[str, ...]
    """Class names, (n,), all of the dataset's ``box_classes``."""
    box: np.ndarray
    """float64 (n, 7): centre x, y, z, length, width, height in metres, yaw in radians."""
    visibility: np.ndarray
    """uint8 (n,): nuScenes visibility 1 (0-40 %) to 4 (80-100 %); 0 = not annotated."""


@dataclass(frozen=True)
class FrameRecord:
    """One keyframe of a rig with N cameras: files, calibration, poses and boxes. The ego frame is
    the vehicle's at the lidar keyframe's timestamp. Sweeps are newest first."""

    token: str
    """32 hex digits. A dataset with other names can take their MD5."""
    scene: str
    split: str
    timestamp_us: int
    map_path: str
    """File for :meth:`Source.read_map`; empty if the frame has no map."""
    image_paths: tuple[str, ...]
    """JPEG files (N,), in the order of the dataset's ``cameras``."""
    image_hw: tuple[tuple[int, int], ...]
    """Height and width of each original image."""
    K: np.ndarray
    """float64 (N, 3, 3), of the original images, continuous pixels."""
    cam_T_ego: np.ndarray
    """float64 (N, 4, 4), each through its camera's own ego pose."""
    sweep_paths: tuple[str, ...]
    """Files (S,) for :meth:`Source.read_lidar`; the first one is the keyframe's."""
    ego_T_sweep: np.ndarray
    """float64 (S, 4, 4): sensor frame of each sweep at its own time to ego."""
    global_T_ego: np.ndarray
    """float64 (4, 4)."""
    boxes: Boxes
    source: str = ""
    """Name of its :class:`Source` in the registry: ``build.read_dataset`` fills it in."""
    lidarseg_path: str = ""
    """File for :meth:`Source.read_lidarseg`; empty if the returns have no classes."""

    def __str__(self) -> str:
        return f"{self.scene}, sample {self.token}"

    def misfits(self, n_cameras: int) -> Iterator[str]:
        """What of it has the wrong shape: mistakes of its source."""
        n, sweeps, boxes = n_cameras, len(self.sweep_paths), len(self.boxes.category)
        if not sweeps:
            yield "sweep_paths is empty: it has no lidar"
        found = {
            "image_paths": (self.image_paths, (n,)),
            "image_hw": (self.image_hw, (n, 2)),
            "K": (self.K, (n, 3, 3)),
            "cam_T_ego": (self.cam_T_ego, (n, 4, 4)),
            "ego_T_sweep": (self.ego_T_sweep, (sweeps, 4, 4)),
            "global_T_ego": (self.global_T_ego, (4, 4)),
            "boxes.box": (self.boxes.box, (boxes, 7)),
            "boxes.visibility": (self.boxes.visibility, (boxes,)),
        }
        for name, (values, shape) in found.items():
            if np.shape(values) != shape:
                yield f"{name} has shape {np.shape(values)}, should be {shape}"


@dataclass(frozen=True)
class Dataset:
    """The selected keyframes of a dataset, in the order of its tables, and what they share."""

    records: list[FrameRecord]
    name: str
    version: str
    reader: str
    """Version of the program that read the tables."""
    scenes: tuple[str, ...]
    splits: tuple[str, ...]
    cameras: tuple[str, ...]
    """At most 16."""
    box_classes: tuple[str, ...]
    vehicle_classes: tuple[str, ...]
    """Those of ``box_classes`` that the vehicle masks show."""
    map_classes: tuple[str, ...]
    """Keys of what :meth:`Source.read_map` returns, in this order; empty without a map."""
    lidarseg_classes: tuple[str, ...] = ()
    """What the numbers of :meth:`Source.read_lidarseg` mean, at most 255; empty without any."""


@dataclass(frozen=True)
class Shapes:
    """Polygons (exterior ring and holes) or lines (one ring each)."""

    rings: list[list[np.ndarray]]
    """Per shape: float64 (K, 2) arrays, metres, global frame."""

    @cached_property
    def bounds(self) -> np.ndarray:
        """Bounding boxes, float64 (n, 4): x min, y min, x max, y max."""
        outer = [(*shape[0].min(axis=0), *shape[0].max(axis=0)) for shape in self.rings]
        return np.array(outer, dtype=np.float64).reshape(-1, 4)

    def near(self, xy: np.ndarray, reach_m: float) -> Iterator[list[np.ndarray]]:
        """Shapes whose bounds come within ``reach_m`` of a point (x, y), global frame."""
        low, high = self.bounds[:, :2] - reach_m, self.bounds[:, 2:] + reach_m
        within = ((low <= xy) & (xy <= high)).all(axis=1)
        return (self.rings[i] for i in np.flatnonzero(within))


@dataclass(frozen=True)
class MapLayers:
    """One location's map, on the global ground plane z = 0."""

    areas: dict[str, Shapes]
    """Polygons of the map classes that are areas."""
    lines: dict[str, Shapes]
    """Polylines of those that are drawn as lines."""


MapMode = Literal["auto", "required", "never"]
"""Whether to store map masks: if the dataset has a map; or insist on it; or not."""


class Source(Protocol):
    """One dataset: found by name in ``sources.SOURCES``, or given as ``package.module:name``."""

    def detect(self, dataroot: Path) -> bool:
        """Whether the directory looks like this dataset."""
        ...

    def read(
        self,
        dataroot: Path,
        version: str | None,
        frames: FramesSettings,
        sweeps: int,
        map_mode: MapMode,
    ) -> Dataset:
        """Read the tables: the selected keyframes, each with up to ``sweeps`` lidar sweeps. Raises
        SourceError: unusable dataroot, unknown version, scene or split, or no such map."""
        ...

    def n_returns(self, path: Path) -> int:
        """Number of returns in a lidar file, by its size or header alone. Raises ValueError, saying
        what is wrong with the file, such as ``is missing``."""
        ...

    def read_lidar(self, path: Path) -> np.ndarray:
        """Returns of one lidar file: float32 (M, 4), x, y, z in metres in the sensor frame, and
        intensity 0..255. Raises ValueError, naming the file, if it is missing or damaged."""
        ...

    def read_lidarseg(self, path: Path) -> np.ndarray:
        """Class of each return of the keyframe's lidar file, uint8 (M,), in its order; never called
        where no record has a ``lidarseg_path``. Raises ValueError, naming the file."""
        ...

    def read_map(self, path: str) -> MapLayers:
        """Map of one location; called for each frame, so cache it. Raises ValueError, naming the
        file, if it is missing or not such a map."""
        ...
