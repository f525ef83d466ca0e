"""Voxels as a picture in three dimensions: from behind ego, its right, and above."""

from typing import Any

import numpy as np

from occfeat_targets.store.grid import VoxelGrid

_AZIMUTH, _ELEVATION = np.radians(30), np.radians(38)
_FACES = {  # corners of the three sides of a unit cube that are seen, and how bright they are
    1.0: ((0, 0, 1), (1, 0, 1), (1, 1, 1), (0, 1, 1)),
    0.8: ((0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1)),
    0.6: ((0, 0, 0), (1, 0, 0), (1, 0, 1), (0, 0, 1)),
}


def draw_voxels(
    axis: Any, grid: VoxelGrid, index: np.ndarray, colours: np.ndarray | None, title: str
) -> None:
    """Cubes at flat indices (V,), by RGB (V, 3), or by height, into a matplotlib axis."""
    from matplotlib.collections import PolyCollection

    lower = np.stack(np.unravel_index(index.astype(np.int64), grid.shape), axis=1)[:, [1, 2, 0]]
    if colours is None:
        colours = height_colours(lower[:, 2], grid)
    # All cubes are of one size, so the far ones can be painted first, whole.
    order = np.argsort(lower * grid.cell_size @ _towards())
    lower, colours = lower[order], colours[order]
    sides = [lower[:, None] + np.array(corners) for corners in _FACES.values()]
    polygons: Any = np.stack(sides, axis=1).reshape(-1, 4, 3) * grid.cell_size + grid.lower
    faces = (colours[:, None] * np.array([*_FACES])[:, None]).reshape(-1, 3)
    (x_lo, x_hi, _), (y_lo, y_hi, _) = grid.x, grid.y
    floor = [(x_lo, y_lo), (x_hi, y_lo), (x_hi, y_hi), (x_lo, y_hi), (x_lo, y_lo)]
    axis.plot(*_on_screen(np.array([(x, y, grid.z[0]) for x, y in floor])).T, color="0.7")
    axis.add_collection(PolyCollection(list(_on_screen(polygons)), facecolors=faces, linewidths=0))
    ego = _on_screen(np.array([[0.0, 0, 0], [x_hi / 10, 0, 0]]))
    axis.annotate(
        "",
        ego[1],
        ego[0],
        arrowprops={"color": "deepskyblue", "width": 2, "headwidth": 8, "headlength": 8},
    )
    axis.set_aspect("equal")
    axis.set_axis_off()
    axis.set_title(title, fontsize=10)


def height_colours(z: np.ndarray, grid: VoxelGrid) -> np.ndarray:
    """RGB (V, 3) of voxels by the number of their layer (V,)."""
    from matplotlib import colormaps

    return colormaps["viridis"](z / max(1, grid.z[2] - 1))[:, :3]


def _towards() -> np.ndarray:
    """Unit vector from the scene to who looks at it."""
    flat = np.cos(_ELEVATION)
    return np.array([-np.cos(_AZIMUTH) * flat, -np.sin(_AZIMUTH) * flat, np.sin(_ELEVATION)])


def _on_screen(xyz: np.ndarray) -> np.ndarray:
    """Points (..., 3) in ego as (..., 2), metres, right and up."""
    right = np.array([np.sin(_AZIMUTH), -np.cos(_AZIMUTH), 0])
    return xyz @ np.stack([right, np.cross(_towards(), right)], axis=1)
