"""BEV labels: vehicle boxes, map polygons and lines to masks, by where the cell's centre lies."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from occfeat_targets.geometry import inverse_rigid, transform
from occfeat_targets.map_layers import MapLayers
from occfeat_targets.records import Boxes
from occfeat_targets.store.grid import VoxelGrid

INVISIBLE = 1
"""nuScenes visibility 0-40 %: such vehicles are masked out of loss and metric (Simple-BEV)."""


def vehicle_boxes(boxes: Boxes) -> np.ndarray:
    """The boxes of any ``vehicle.*`` category.

    Returns:
        float32 (n, 8): centre x, y, z, length, width, height (m), yaw (rad) in ego, visibility.
    """
    keep = np.array([c.startswith("vehicle.") for c in boxes.category], dtype=bool)
    return np.column_stack([boxes.box[keep], boxes.visibility[keep]]).astype(np.float32)


def vehicle_masks(vehicles: np.ndarray, grid: VoxelGrid) -> tuple[np.ndarray, np.ndarray]:
    """BEV masks of vehicles.

    Args:
        vehicles: (n, 8) from :func:`vehicle_boxes`.
        grid: the voxel grid.

    Returns:
        ``(vehicle, visible)``, uint8 (X, Y) each: 1 where a cell's centre lies inside a
        footprint; and 0 where only vehicles of visibility 1 lie, else 1.
    """
    seen = np.zeros(grid.bev_shape, dtype=bool)
    unseen = np.zeros(grid.bev_shape, dtype=bool)
    for vehicle in vehicles.astype(np.float64):
        mask = unseen if vehicle[7] == INVISIBLE else seen
        mask |= fill_polygon([footprint(vehicle)], grid)
    return (seen | unseen).astype(np.uint8), (seen | ~unseen).astype(np.uint8)


def footprint(box: np.ndarray) -> np.ndarray:
    """Corners (4, 2) of a box (>= 7,) on the ground plane, counter-clockwise, metres, ego.

    The ego car's tilt is ignored: it shrinks a footprint by less than 0.1 % at 2 degrees.
    """
    x, y, _, length, width, _, yaw = box[:7]
    corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * [length / 2, width / 2]
    cos, sin = np.cos(yaw), np.sin(yaw)
    return corners @ np.array([[cos, sin], [-sin, cos]]) + (x, y)


def map_masks(
    layers: MapLayers, global_T_ego: np.ndarray, divider_width_m: float, grid: VoxelGrid
) -> np.ndarray:
    """BEV masks of the map classes, uint8 (5, X, Y) in the order of ``schema.MAP_CLASSES``.

    Args:
        layers: polygons and divider lines of the frame's location, in the global frame.
        global_T_ego: float64 (4, 4).
        divider_width_m: full width of a drawn divider.
        grid: the voxel grid.
    """
    ego_T_global = inverse_rigid(global_T_ego)
    reach = np.hypot(*(max(abs(lo), abs(hi)) for lo, hi, _ in (grid.x, grid.y)))
    centre = global_T_ego[:2, 3]

    def to_ego(xy_global: np.ndarray) -> np.ndarray:
        # The map is flat: its points lie on the global ground plane, z = 0.
        xyz_global = np.pad(xy_global, [(0, 0), (0, 1)])
        return transform(ego_T_global, xyz_global)[:, :2]

    masks = np.zeros((len(layers.polygons) + 1, *grid.bev_shape), dtype=bool)
    for mask, polygons in zip(masks, layers.polygons, strict=False):
        for rings in polygons.near(centre, reach):
            mask |= fill_polygon([to_ego(ring) for ring in rings], grid)
    for (line,) in layers.dividers.near(centre, reach + divider_width_m):
        draw_line(masks[-1], to_ego(line), divider_width_m, grid)
    return masks.astype(np.uint8)


def fill_polygon(rings: list[np.ndarray], grid: VoxelGrid) -> np.ndarray:
    """Cells whose centre lies inside a polygon with holes: bool (X, Y).

    Even-odd rule over all rings (exterior and holes, each (K, 2) metres in ego, open or closed).
    Every row of cells (fixed x) is crossed by some edges; each crossing toggles the cells on its
    far side.
    """
    start = np.concatenate(rings)
    end = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    x, y = grid.bev_centres()
    reached = (np.minimum(start[:, 0], end[:, 0]) <= x[-1]) & (
        np.maximum(start[:, 0], end[:, 0]) > x[0]
    )
    start, end = start[reached], end[reached]
    row, edge = np.nonzero((start[:, 0] <= x[:, None]) != (end[:, 0] <= x[:, None]))
    (x1, y1), (x2, y2) = start[edge].T, end[edge].T
    crossing = y1 + (x[row] - x1) * (y2 - y1) / (x2 - x1)
    column = np.searchsorted(y, crossing)
    toggles = np.zeros((len(x), len(y) + 1), dtype=np.int32)
    np.add.at(toggles, (row, column), 1)
    return toggles.cumsum(axis=1)[:, :-1] % 2 == 1


def draw_line(mask: np.ndarray, line: np.ndarray, width_m: float, grid: VoxelGrid) -> None:
    """Set the cells of ``mask`` (X, Y) whose centre is within ``width_m`` / 2 of a polyline.

    Args:
        mask: bool (X, Y), changed in place.
        line: float64 (K, 2), metres, ego frame.
        width_m: full width of the drawn line.
        grid: the voxel grid.
    """
    x, y = grid.bev_centres()
    half = width_m / 2
    for a, b in pairwise(line):
        (x0, y0), (x1, y1) = np.minimum(a, b) - half, np.maximum(a, b) + half
        rows = slice(*np.searchsorted(x, [x0, x1 + 1e-9]))
        columns = slice(*np.searchsorted(y, [y0, y1 + 1e-9]))
        dx, dy = x[rows, None] - a[0], y[None, columns] - a[1]
        ab = b - a
        along = np.clip((dx * ab[0] + dy * ab[1]) / max(ab @ ab, 1e-12), 0, 1)
        distance = np.hypot(dx - along * ab[0], dy - along * ab[1])
        mask[rows, columns] |= distance <= half
