"""The class of each stored lidar return (nuScenes-lidarseg), and those of returns that the store
leaves out, so that a metric can count them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from occfeat_targets.geometry import in_image, project, transform
from occfeat_targets.outputs.base import FrameInputs, Output
from occfeat_targets.outputs.points import within_reach
from occfeat_targets.sources.base import FrameRecord
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.schema import ArraySpec
from occfeat_targets.store.semantics import CLASSES, class_numbers, colours_of

_UNSET = 255


class Lidarseg(Output):
    """Class numbers as in the attribute ``lidarseg_classes``."""

    def specs(self) -> tuple[ArraySpec, ...]:
        """See :class:`Output`."""
        n, classes = self.layout.max_points, len(self.layout.lidarseg_classes)
        ragged: Any = {"rows": "n_points", "chunk": min(8192, n), "setting": "lidar.max_points"}
        doc = "index into `lidarseg_classes` of each of `points`"
        left_out = "returns by class that `points` leaves out: on the ego car or too far"
        axes = {"lidarseg_class": classes}
        return (
            ArraySpec("lidarseg", "uint8", {"point": n}, doc, _UNSET, **ragged),
            ArraySpec("lidarseg_left_out", "int32", axes, left_out, -1),
        )

    def compute(self, frame: FrameInputs) -> dict[str, np.ndarray]:
        """``lidarseg`` uint8 (P,), in the order of ``points``, and ``lidarseg_left_out`` int32 (K,)
        of K classes. Raises ValueError, naming the file: missing, or not of this lidar file."""
        path, n = frame.record.lidarseg_path, len(self.layout.lidarseg_classes)
        labels = frame.source.read_lidarseg(Path(path))
        rows, kept = frame.sweeps[0]
        if len(labels) != len(rows):
            raise ValueError(
                f"{path} has {len(labels)} classes, its lidar file {len(rows)} returns"
            )
        if labels.max(initial=0) >= n:
            raise ValueError(f"{path} has class {labels.max()}, there are {n}")
        xyz_ego = transform(frame.record.ego_T_sweep[0], rows[:, :3])
        kept = kept & within_reach(xyz_ego, self.layout.grid)
        left_out = np.bincount(labels[~kept], minlength=n).astype(np.int32)
        return {"lidarseg": labels[kept], "lidarseg_left_out": left_out}

    def faults(self, record: FrameRecord) -> Iterator[str]:
        """See :class:`Output`."""
        if self.layout.sweeps > 1:
            yield "only a keyframe's returns have classes: lidarseg wants lidar.sweeps=1"
        if not record.lidarseg_path:
            yield "its returns have no classes for the output lidarseg (see nuScenes-lidarseg)"
        elif not Path(record.lidarseg_path).is_file():
            yield f"{record.lidarseg_path} is missing"

    def check(self, store: TargetStore, frame: dict[str, Any]) -> Iterator[str]:
        """See :class:`Output`."""
        if frame["lidarseg"].max(initial=0) >= len(self.layout.lidarseg_classes):
            yield "lidarseg holds numbers of no class"
        if frame["lidarseg_left_out"].min(initial=0) < 0:
            yield "lidarseg_left_out is negative"

    def draw_camera(self, axis: Any, store: TargetStore, frame: dict[str, Any], c: int) -> None:
        """The returns in camera c, each in the colour of its class."""
        xyz = frame["points"][:, :3] * store.attrs["point_step_m"]
        K, cam_T_ego = (frame[name][c : c + 1].astype(np.float64) for name in ("K", "cam_T_ego"))
        uv, depth = (values[0] for values in project(K, cam_T_ego, xyz))
        seen = in_image(uv, depth, self.layout.image_size)
        axis.scatter(*uv[seen].T, c=self._colours(frame)[seen], s=0.6, linewidths=0)

    def draw_bev(self, axis: Any, store: TargetStore, frame: dict[str, Any]) -> None:
        """The returns likewise, and a legend of the classes that are there."""
        xyz = frame["points"][:, :3] * store.attrs["point_step_m"]
        axis.scatter(xyz[:, 1], xyz[:, 0], c=self._colours(frame), s=0.8, linewidths=0)
        numbers = class_numbers(self.layout.lidarseg_classes)[frame["lidarseg"]]
        for i, name in enumerate(CLASSES):
            if (numbers == i).any():
                axis.scatter([], [], c=colours_of(np.array([i])), label=f"return: {name}")

    def _colours(self, frame: dict[str, Any]) -> np.ndarray:
        return colours_of(class_numbers(self.layout.lidarseg_classes)[frame["lidarseg"]])
