"""BEV masks of the map's classes: cells whose centre lies in a polygon, or near a line."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import Field

from occfeat_targets.geometry import inverse_rigid, transform
from occfeat_targets.outputs.base import FrameInputs, Output
from occfeat_targets.outputs.masks import bev_image, draw_line, fill_polygon
from occfeat_targets.sources.base import MapLayers, MapMode
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.schema import ArraySpec
from occfeat_targets.store.settings import Settings

_COLOURS = {
    "road": "#c9c9c9",
    "sidewalk": "#e8c9a0",
    "crosswalk": "#7db8e8",
    "parking": "#b9d99a",
    "divider": "#e0a020",
}


class MapSettings(Settings):
    """Map masks."""

    mode: MapMode = "auto"
    """``auto`` stores masks if the dataset has a map, ``required`` insists, ``never`` does not."""
    line_width_m: float = Field(default=1.5, gt=0)
    """A cell is of a line (a divider) if its centre lies within half of this of it. The default
    is the width that nuscenes-devkit's two-pixel lines paint at 0.5 m per cell."""


class Map(Output):
    """A mask of each of the map's classes; classes may overlap."""

    Settings = MapSettings

    def specs(self) -> tuple[ArraySpec, ...]:
        """See :class:`Output`."""
        n, (X, Y) = len(self.layout.map_classes), self.layout.grid.bev_shape
        axes = {"map_class": n, "x": X, "y": Y}
        return (ArraySpec("map", "uint8", axes, "masks by `map_classes`", 255, chunk=n),)

    def compute(self, frame: FrameInputs) -> dict[str, np.ndarray]:
        """``map`` uint8 (K, X, Y). Raises ValueError, naming the map's file: it is unreadable."""
        width, grid = self.settings.line_width_m, self.layout.grid
        masks = map_masks(frame.map, frame.record.global_T_ego, width, grid)
        return {"map": np.stack([masks[name] for name in self.layout.map_classes]).astype(np.uint8)}

    def check(self, store: TargetStore, frame: dict[str, Any]) -> Iterator[str]:
        """See :class:`Output`."""
        if frame["map"].max(initial=0) > 1:
            yield "map holds values other than 0 and 1"

    def draw_bev(self, axis: Any, store: TargetStore, frame: dict[str, Any]) -> None:
        """Each class in its colour, later ones on top."""
        names = self.layout.map_classes
        colours = [_COLOURS.get(name, f"C{i}") for i, name in enumerate(names)]
        bev_image(axis, store.grid, list(zip(frame["map"] == 1, colours, names, strict=True)))


def map_masks(
    layers: MapLayers, global_T_ego: np.ndarray, line_width_m: float, grid: VoxelGrid
) -> dict[str, np.ndarray]:
    """BEV mask of each map class, bool (X, Y), from the polygons and lines of the frame's location
    in the global frame; ``line_width_m`` is the full width of a drawn line."""
    ego_T_global = inverse_rigid(global_T_ego)
    reach = math.hypot(*(max(abs(lo), abs(hi)) for lo, hi, _ in (grid.x, grid.y)))
    centre = global_T_ego[:2, 3]

    def to_ego(xy_global: np.ndarray) -> np.ndarray:
        # The map is flat: its points lie on the global ground plane, z = 0.
        xyz_global = np.pad(xy_global, [(0, 0), (0, 1)])
        return transform(ego_T_global, xyz_global)[:, :2]

    masks = {name: np.zeros(grid.bev_shape, dtype=bool) for name in (*layers.areas, *layers.lines)}
    for name, polygons in layers.areas.items():
        for rings in polygons.near(centre, reach):
            masks[name] |= fill_polygon([to_ego(ring) for ring in rings], grid)
    for name, lines in layers.lines.items():
        for (line,) in lines.near(centre, reach + line_width_m):
            draw_line(masks[name], to_ego(line), line_width_m, grid)
    return masks
