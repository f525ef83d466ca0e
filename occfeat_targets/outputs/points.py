"""The lidar returns themselves: the trainer turns the BEV frame, and asks where rays end."""

import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from occfeat_targets.outputs.base import FrameInputs, Output
from occfeat_targets.sources import SOURCES
from occfeat_targets.sources.base import FrameRecord
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.schema import ArraySpec


class Points(Output):
    """Returns in ego as int16 steps, and their intensity."""

    def specs(self) -> tuple[ArraySpec, ...]:
        """See :class:`Output`."""
        n = self.layout.max_points
        doc = "lidar in ego: x, y, z in steps of attribute `point_step_m`, intensity"
        axes = {"point": n, "xyzi": 4}
        ragged: Any = {"rows": "n_points", "chunk": min(8192, n), "setting": "lidar.max_points"}
        return (
            ArraySpec("n_points", "int32", {}, "stored lidar returns", -1),
            ArraySpec("points", "int16", axes, doc, -32768, **ragged),
        )

    def compute(self, frame: FrameInputs) -> dict[str, np.ndarray]:
        """``points`` int16 (P, 4). Raises ValueError, naming the file: it is missing or damaged."""
        return {"points": pack_points(*frame.lidar, self.layout.grid)}

    def faults(self, record: FrameRecord) -> Iterator[str]:
        """See :class:`Output`."""
        source = SOURCES(record.source)()
        room = self.layout.max_points // self.layout.sweeps
        for path in record.sweep_paths:
            try:
                if (n := source.n_returns(Path(path))) > room:
                    yield f"{path} holds {n} lidar returns: raise lidar.max_points"
            except ValueError as error:
                yield f"{path} {error}"

    def check(self, store: TargetStore, frame: dict[str, Any]) -> Iterator[str]:
        """See :class:`Output`. The points must fill the stored voxels, up to their rounding: one
        within a step of a cell's edge may belong to either side (flat ground often lies there)."""
        xyz, step = frame["points"][:, :3].astype(np.float64), store.attrs["point_step_m"]
        around = [(xyz + corner) * step for corner in product((-1, 1), repeat=3)]
        near = np.unique(np.concatenate([store.grid.occupied(points) for points in around]))
        if lost := len(np.setdiff1d(frame["voxel_index"], near)):
            yield f"{lost} of {len(frame['voxel_index'])} voxels hold no stored point"
        if extra := len(np.setdiff1d(_surely_occupied(store.grid, around), frame["voxel_index"])):
            yield f"{extra} voxels that hold stored points are missing"

    def draw_bev(self, axis: Any, store: TargetStore, frame: dict[str, Any]) -> None:
        """Returns inside the grid, coloured by height."""
        xyz = frame["points"][:, :3] * store.attrs["point_step_m"]
        xyz = xyz[store.grid.flat_index(xyz)[1]]
        y, x, z = xyz[:, 1], xyz[:, 0], xyz[:, 2]
        shown = axis.scatter(y, x, c=z, s=0.5, cmap="viridis", vmin=-1, vmax=4)
        axis.figure.colorbar(
            shown, ax=axis, location="bottom", shrink=0.6, label="lidar: z, up (m)"
        )


def _surely_occupied(grid: VoxelGrid, around: list[np.ndarray]) -> np.ndarray:
    """Voxels of the points whose surroundings (M, 3), their corners, all lie in one voxel."""
    inside = np.all([grid.flat_index(points)[1] for points in around], axis=0)
    cells = np.stack([grid.flat_index(points[inside])[0] for points in around])
    return np.unique(cells[0, (cells == cells[0]).all(axis=0)])


def point_step_m(grid: VoxelGrid) -> float:
    """Length of one int16 step of ``points``: 2 mm, or more for grids beyond 65 m. Raises
    ValueError if the grid reaches so far that a step would exceed 1 cm."""
    reach = max(abs(bound) for lo, hi, _ in (grid.x, grid.y, grid.z) for bound in (lo, hi))
    step_mm = 2 * math.ceil(reach / (2e-3 * 32767))
    if step_mm > 10:
        raise ValueError(f"grid reaches {reach} m; int16 points allow at most 327 m at 1 cm")
    return step_mm / 1000


def pack_points(xyz_ego: np.ndarray, intensity: np.ndarray, grid: VoxelGrid) -> np.ndarray:
    """Points as int16 (P, 4): x, y, z in steps of ``point_step_m(grid)``, and intensity. Returns
    farther than 32767 steps on any axis are left out: they lie outside the grid (not of every
    turned one: the trainer's rotation may miss a few at its corners)."""
    steps, fits = np.rint(xyz_ego / point_step_m(grid)), within_reach(xyz_ego, grid)
    return np.column_stack([steps[fits], np.rint(intensity[fits])]).astype(np.int16)


def within_reach(xyz_ego: np.ndarray, grid: VoxelGrid) -> np.ndarray:
    """Which returns (M, 3), metres in ego, :func:`pack_points` keeps: bool (M,)."""
    return (np.abs(np.rint(xyz_ego / point_step_m(grid))) <= 32767).all(axis=1)
