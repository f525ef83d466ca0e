"""The voxel grid: half-open bounds, floor indices, cell centres, occupancy. Axes of a volume are
(Z, X, Y) and of a BEV map (X, Y), index 0 at the lower bound. The flat index of a voxel is
``(iz * nx + ix) * ny + iy``. All is in ego (x forward, y left, z up, metres)."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from pydantic import ConfigDict


@dataclass(frozen=True)
class VoxelGrid:
    """A regular grid over ``[lo, hi)`` on each ego axis, given as ``(lo, hi, cells)``. Raises
    ValueError, naming the axis, if bounds are not finite and ascending or the number of cells is no
    positive whole number; or if a flat index would not fit uint32."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    x: tuple[float, float, int] = (-50.0, 50.0, 200)
    y: tuple[float, float, int] = (-50.0, 50.0, 200)
    z: tuple[float, float, int] = (-4.5, 5.5, 8)

    def __post_init__(self) -> None:
        for name in "xyz":
            axis = getattr(self, name)
            if len(axis) != 3:
                raise ValueError(f"grid.{name} must be [lo, hi, cells], got {list(axis)}")
            lo, hi, cells = axis
            if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
                raise ValueError(f"grid.{name} needs finite bounds lo < hi, got [{lo}, {hi})")
            if int(cells) != cells or cells < 1:
                raise ValueError(f"grid.{name} needs a whole number of cells >= 1, got {cells}")
            object.__setattr__(self, name, (float(lo), float(hi), int(cells)))
        if self.n_voxels >= 2**32 - 1:
            raise ValueError(f"grid has {self.n_voxels} voxels; a flat index must fit uint32")

    @classmethod
    def from_dict(cls, axes: dict) -> Self:
        """Build from ``{"x": [lo, hi, cells], "y": ..., "z": ...}`` (the store's ``grid`` attr)."""
        return cls(tuple(axes["x"]), tuple(axes["y"]), tuple(axes["z"]))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of cells along (Z, X, Y)."""
        return self.z[2], self.x[2], self.y[2]

    @property
    def bev_shape(self) -> tuple[int, int]:
        """Number of cells along (X, Y)."""
        return self.x[2], self.y[2]

    @property
    def n_voxels(self) -> int:
        """Number of voxels of the volume."""
        return self.x[2] * self.y[2] * self.z[2]

    @property
    def lower(self) -> np.ndarray:
        """Lower bounds (x, y, z) in metres, float64 (3,)."""
        return np.array([self.x[0], self.y[0], self.z[0]])

    @property
    def cell_size(self) -> np.ndarray:
        """Edge lengths (x, y, z) of one voxel in metres, float64 (3,)."""
        return np.array([(hi - lo) / cells for lo, hi, cells in (self.x, self.y, self.z)])

    def flat_index(self, xyz_ego: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Voxels of points (M, 3), metres, ego: ``(index, inside)``, int64 (K,) flat indices of the
        K points inside the grid, in order, and bool (M,) which are; NaN and infinity are not."""
        with np.errstate(invalid="ignore"):  # NaN and inf fall outside below
            cell = np.floor((xyz_ego.astype(np.float64) - self.lower) / self.cell_size)
        cells = np.array([self.x[2], self.y[2], self.z[2]])
        inside = ((cell >= 0) & (cell < cells)).all(axis=1)
        ix, iy, iz = cell[inside].astype(np.int64).T
        return (iz * self.x[2] + ix) * self.y[2] + iy, inside

    def occupied(self, xyz_ego: np.ndarray) -> np.ndarray:
        """Voxels with a point (M, 3) inside (paper §3.2): ascending flat indices, uint32 (V,)."""
        # A bitmap beats sorting: the volume is small and most voxels are empty.
        occupancy = np.zeros(self.n_voxels, dtype=bool)
        occupancy[self.flat_index(xyz_ego)[0]] = True
        return np.flatnonzero(occupancy).astype(np.uint32)

    def centres(self, index: np.ndarray) -> np.ndarray:
        """Centres of voxels: flat indices (V,) to float64 (V, 3), metres, ego frame."""
        iz, ix, iy = np.unravel_index(np.asarray(index, dtype=np.int64), self.shape)
        return self.lower + (np.stack([ix, iy, iz], axis=1) + 0.5) * self.cell_size

    def bev_centres(self) -> tuple[np.ndarray, np.ndarray]:
        """Cell centres of the BEV map: float64 x (X,) and y (Y,), metres, ego frame."""
        (dx, dy, _), (lo_x, lo_y, _) = self.cell_size, self.lower
        return lo_x + (np.arange(self.x[2]) + 0.5) * dx, lo_y + (np.arange(self.y[2]) + 0.5) * dy
