"""An output in one file: ``--set 'outputs={"heights:Heights": {"ground_m": 0.5}}'``."""

import numpy as np

from occfeat_targets.outputs.base import Output
from occfeat_targets.store.schema import ArraySpec
from occfeat_targets.store.settings import Settings


class HeightsSettings(Settings):
    ground_m: float = 0.0
    """Heights are above this, in the ego frame."""


class Heights(Output):
    """Lowest and highest return of each voxel, and how many voxels reach below the ground."""

    Settings = HeightsSettings

    def specs(self):
        n = self.layout.max_voxels
        axes, doc = {"voxel": n, "low_high": 2}, "heights of the voxel's returns above ground, m"
        return (
            ArraySpec("heights", "float32", axes, doc, np.nan, rows="n_voxels", chunk=min(1024, n)),
            ArraySpec("n_below", "int32", {}, "voxels with a return below the ground", -1),
        )

    def compute(self, frame):
        xyz_ego, _ = frame.lidar
        voxel, inside = self.layout.grid.flat_index(xyz_ego)
        row, z = np.searchsorted(frame.voxel_index, voxel), xyz_ego[inside, 2]
        low = np.full(len(frame.voxel_index), np.inf)
        high = -low
        np.minimum.at(low, row, z)
        np.maximum.at(high, row, z)
        heights = (np.stack([low, high], axis=1) - self.settings.ground_m).astype(np.float32)
        return {"heights": heights, "n_below": np.array(np.sum(heights[:, 0] < 0), np.int32)}

    def check(self, store, frame):
        centre = store.grid.centres(frame["voxel_index"])[:, 2] - self.settings.ground_m
        reach = store.grid.cell_size[2] / 2 + 1e-4
        if not (np.abs(frame["heights"] - centre[:, None]) <= reach).all():
            yield "heights leave their voxels"
        if (frame["heights"][:, 0] > frame["heights"][:, 1]).any():
            yield "heights: the lowest is above the highest"

    def draw_bev(self, axis, store, frame):
        x, y, _ = store.grid.centres(frame["voxel_index"]).T
        axis.scatter(y, x, c=frame["heights"][:, 1], s=2, label="heights")
