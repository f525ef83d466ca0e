"""BEV masks: which cells' centres lie in a polygon or near a line; and how a mask is drawn."""

from itertools import pairwise
from typing import Any

import numpy as np

from occfeat_targets.store.grid import VoxelGrid


def fill_polygon(rings: list[np.ndarray], grid: VoxelGrid) -> np.ndarray:
    """Cells whose centre lies inside a polygon with holes: bool (X, Y). Even-odd rule over all
    rings (exterior and holes, each (K, 2) metres in ego, open or closed): every row of cells (fixed
    x) is crossed by some edges, and each crossing toggles the cells on its far side."""
    start = np.concatenate(rings)
    end = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    x, y = grid.bev_centres()
    low, high = np.minimum(start[:, 0], end[:, 0]), np.maximum(start[:, 0], end[:, 0])
    reached = (low <= x[-1]) & (high > x[0])
    start, end = start[reached], end[reached]
    row, edge = np.nonzero((start[:, 0] <= x[:, None]) != (end[:, 0] <= x[:, None]))
    (x1, y1), (x2, y2) = start[edge].T, end[edge].T
    crossing = y1 + (x[row] - x1) * (y2 - y1) / (x2 - x1)
    column = np.searchsorted(y, crossing)
    toggles = np.zeros((len(x), len(y) + 1), dtype=np.int32)
    np.add.at(toggles, (row, column), 1)
    return toggles.cumsum(axis=1)[:, :-1] % 2 == 1


def draw_line(mask: np.ndarray, line: np.ndarray, width_m: float, grid: VoxelGrid) -> None:
    """Set the cells of ``mask``, bool (X, Y), whose centre is within ``width_m`` / 2 of a polyline,
    float64 (K, 2), metres, ego frame."""
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


def bev_image(axis: Any, grid: VoxelGrid, layers: list[tuple[np.ndarray, str, str]]) -> None:
    """Draw ``layers`` (masks (X, Y) with colour and label), lowest first, in a matplotlib axis of y
    (to the left) and x, with a legend entry each; what none covers stays."""
    from matplotlib.colors import to_rgba

    picture = np.zeros((*grid.bev_shape, 4))
    for mask, colour, label in layers:
        picture[mask] = to_rgba(colour)
        axis.scatter([], [], c=colour, marker="s", label=label)
    (x_lo, x_hi, _), (y_lo, y_hi, _) = grid.x, grid.y
    # x up, y to the left, as a driver sees a map: only the picture is turned, never the array.
    axis.imshow(picture, origin="lower", extent=(y_lo, y_hi, x_lo, x_hi))
