"""BEV masks of the map as nuscenes-devkit's ``get_map_mask`` draws them, to be scored under the
protocol ``devkit`` beside published numbers: whole cells are filled up to and on rounded corners,
lines are drawn through truncated ones, 3 cells wide. ``--set 'outputs={map_devkit: {}}'`` stores
them; nothing is trained on them."""

import math
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np

from occfeat_targets.geometry import yaw
from occfeat_targets.outputs.base import FrameInputs, Output
from occfeat_targets.sources.base import FrameRecord, MapLayers
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.schema import ArraySpec

_LIBRARIES = ("cv2", "shapely")  # nuscenes-devkit's own, for equal masks
_EVEN_INVALID = ("road",)
"""The devkit leaves out polygons that cross themselves, but for drivable areas."""


class MapDevkit(Output):
    """A mask of each of the map's classes, beside that of ``outputs.map``."""

    def specs(self) -> tuple[ArraySpec, ...]:
        """See :class:`Output`."""
        n, (X, Y) = len(self.layout.map_classes), self.layout.grid.bev_shape
        axes = {"map_class": n, "x": X, "y": Y}
        doc = "masks by `map_classes`, as nuscenes-devkit draws them"
        return (ArraySpec("map_devkit", "uint8", axes, doc, 255, chunk=n),)

    def compute(self, frame: FrameInputs) -> dict[str, np.ndarray]:
        """``map_devkit`` uint8 (K, X, Y). Raises ValueError, naming the map's file: unreadable."""
        from shapely.errors import GEOSException

        try:
            masks = devkit_masks(frame.map, frame.record.global_T_ego, self.layout.grid)
        except GEOSException as error:  # the devkit fails there too
            problem = f"{frame.record.map_path}: a road crosses itself here ({error})"
            raise ValueError(f"{problem}: leave map_devkit out of `outputs`") from error
        return {"map_devkit": np.stack([masks[name] for name in self.layout.map_classes])}

    def faults(self, record: FrameRecord) -> Iterator[str]:
        """See :class:`Output`. Raises ModuleNotFoundError: what draws is not installed."""
        for name in _LIBRARIES:
            import_module(name)
        if not record.map_path:
            yield "it has no map for the output map_devkit: leave that out of `outputs`"

    def check(self, store: TargetStore, frame: dict[str, Any]) -> Iterator[str]:
        """See :class:`Output`."""
        if frame["map_devkit"].max(initial=0) > 1:
            yield "map_devkit holds values other than 0 and 1"


def devkit_masks(
    layers: MapLayers, global_T_ego: np.ndarray, grid: VoxelGrid
) -> dict[str, np.ndarray]:
    """Mask of each map class, uint8 (X, Y): what nuscenes-devkit 1.2's ``get_map_mask`` gives for
    the grid's extent around ego, at ego's heading (its tilt is ignored), turned from (y, x).

    As there, shape after shape, so that a polygon's hole erases what those before it painted; and
    clipped, turned and scaled by the same steps, for rounding must not differ. Unlike there, a line
    that leaves the grid and comes back is no error.
    """
    import cv2
    from shapely import LineString, Polygon

    to_cells = _Patch(global_T_ego, grid)
    X, Y = grid.bev_shape
    masks = {name: np.zeros((Y, X), np.uint8) for name in (*layers.areas, *layers.lines)}
    for name, polygons in layers.areas.items():
        for exterior, *holes in polygons.near(to_cells.centre, to_cells.reach):
            shape = Polygon(exterior, [hole for hole in holes if len(hole)])
            if not shape.is_valid and name not in _EVEN_INVALID:
                continue
            parts = to_cells(shape)
            outer = [_rounded(part.exterior) for part in parts]
            inner = [_rounded(hole) for part in parts for hole in part.interiors]
            cv2.fillPoly(masks[name], outer, 1)  # type: ignore
            cv2.fillPoly(masks[name], inner, 0)  # type: ignore
    for name, lines in layers.lines.items():
        for (line,) in lines.near(to_cells.centre, to_cells.reach):
            for part in to_cells(LineString(line)):
                corners = np.array(part.coords).astype(np.int32)
                cv2.polylines(masks[name], [corners], False, 1, thickness=2)  # type: ignore
    return {name: np.ascontiguousarray(mask.T) for name, mask in masks.items()}


def _rounded(ring: Any) -> np.ndarray:
    return np.array(ring.coords).round().astype(np.int32)


class _Patch:
    """The grid's extent on the ground, and how a shape of the global frame comes into its cells."""

    def __init__(self, global_T_ego: np.ndarray, grid: VoxelGrid):
        from shapely import affinity, box

        (x_lo, x_hi, X), (y_lo, y_hi, Y) = grid.x, grid.y
        self.half = np.array([x_hi - x_lo, y_hi - y_lo]) / 2
        self.cells_per_m = (X / (x_hi - x_lo), Y / (y_hi - y_lo))
        angle = float(yaw(global_T_ego))
        cos, sin = math.cos(angle), math.sin(angle)
        middle = np.array([x_lo + x_hi, y_lo + y_hi]) / 2  # of the grid, in ego
        self.centre = global_T_ego[:2, 3] + np.array([[cos, -sin], [sin, cos]]) @ middle
        self.reach = float(np.hypot(*self.half))
        self.degrees = math.degrees(angle)
        around = box(*(self.centre - self.half), *(self.centre + self.half))
        self.outline = affinity.rotate(around, self.degrees, origin=tuple(self.centre))
        self.local = box(*-self.half, *self.half)

    def __call__(self, shape: Any) -> list[Any]:
        """The parts of a polygon or line that lie inside, x and y in cells from the lower bound."""
        from shapely import affinity, get_parts

        kind = shape.geom_type
        shape = shape.intersection(self.outline)
        shape = affinity.rotate(shape, -self.degrees, origin=tuple(self.centre))
        shape = affinity.translate(shape, *-self.centre).intersection(self.local)
        shape = affinity.scale(
            affinity.translate(shape, *self.half), *self.cells_per_m, origin=(0, 0)
        )
        return [part for part in get_parts(shape) if part.geom_type == kind and not part.is_empty]
