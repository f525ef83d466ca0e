"""Settings of the lidar network, and what it and those who make its rows agree on."""

from typing import Annotated

import numpy as np
from pydantic import Field, field_validator

from occfeat_targets.store.settings import Settings

PLANES = ((0, 1), (0, 2), (1, 2))
"""Axes of the three planes that the network projects points on, in the order of its layers."""
FEATURES = 5
"""Of a row: intensity, x, y, z, distance from the lidar."""
_Metres = Annotated[float, Field(gt=0)]


class LidarSettings(Settings):
    """The lidar network; how returns become its rows; and how they are augmented in training."""

    size: str = "48-384"
    """Layers and channels: ScaLR's are 48-256, 48-384 and 48-768."""
    batch_norm: bool = False
    """Batch norms in the layers, as WaffleIron has them, in place of ScaLR's layer norms."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth of all layers; ScaLR's finetuning has 0.2."""
    reach_m: tuple[_Metres, _Metres, _Metres] = (64.0, 64.0, 8.0)
    """Rows lie within these distances of the lidar along its x, y and z (ScaLR)."""
    cell_m: float = Field(default=0.5, gt=0)
    """Edge of the cells of the three planes (ScaLR)."""
    voxel_m: float = Field(default=0.1, gt=0)
    """Edge of the cubes of which one return is kept."""
    neighbours: int = Field(default=16, ge=1)
    """Nearest other rows that a row's embedding looks at."""
    max_rows: int = Field(default=20000, ge=1)
    """In training; elsewhere all."""
    intensity: tuple[float, _Metres] = (18.742355, 22.04632)
    """Mean and standard deviation by which intensities, 0..255, are normalised (ScaLR)."""
    rotate_deg: float = Field(default=180.0, ge=0, le=180)
    """Turn clouds by up to this angle either way."""
    flip: bool = True
    """Mirror x or y or neither, each with probability 1/3."""
    scale: tuple[_Metres, _Metres] = (0.9, 1.1)
    """Scale clouds by a factor drawn from here."""

    @field_validator("scale")
    @classmethod
    def _is_a_range(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if scale[0] > scale[1]:
            raise ValueError(f"must be [low, high], got {list(scale)}")
        return scale

    @property
    def cells(self) -> tuple[int, int, int]:
        """How many along x, y and z."""
        x, y, z = (int(np.ceil(2 * reach / self.cell_m - 1e-6)) for reach in self.reach_m)
        return x, y, z

    @field_validator("size")
    @classmethod
    def _is_a_size(cls, size: str) -> str:
        depth, _, width = size.partition("-")
        if not (depth.isdecimal() and width.isdecimal() and int(depth) and int(width)):
            raise ValueError(f"must be LAYERS-CHANNELS such as 48-384, got {size!r}")
        return size

    @property
    def depth(self) -> int:
        """Layers."""
        return int(self.size.partition("-")[0])

    @property
    def width(self) -> int:
        """Channels."""
        return int(self.size.partition("-")[2])
