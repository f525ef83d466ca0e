"""Lidar returns of a stored frame to the rows of a lidar network; done by reading processes.

Frames of points: *ego*, as stored; the *lidar's*, x right, y forward, z up, in which the published
networks work; and the *cloud*, the lidar's turned, mirrored and scaled by augmentation: it is what
the network sees, and positions, features and targets all follow it. (WaffleIron's code turns
positions and features by two independent angles, and mirrors positions alone: here they agree.)

A *row* is a return that is kept: of each cube of the lidar's frame one, at random in training, the
first as stored elsewhere (WaffleIron's ``voxelize``); then in training as many as the settings
allow, those nearest to a random one; and of those the ones within reach.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from scipy.spatial import KDTree

from occfeat_targets.store.files import StoreError
from occfeat_train.models.lidar_settings import PLANES, LidarSettings


@dataclass(frozen=True)
class CloudWork:
    """See ``data.dataset.Work``. Of R rows of a frame of P stored returns, by name, all rows of a
    batch one after another:

    - ``row_point`` int64 (R,): which of the batch's ``points`` a row is;
    - ``row_features`` float32 (R, 5), see ``lidar_settings.FEATURES``, in the cloud's frame,
      metres, intensity normalised; ``row_neighbours`` int64 (R, K), rows, nearest first;
      ``row_cells`` int64 (R, 3), flat (B, cells of a plane) indices by plane;
    - ``n_rows`` int64 (B,); ``cloud_T_ego`` float32 (B, 4, 4);
    - ``camera`` int64 (B,): the only one whose rows are there, -1 for all; ``seed`` int64 (B,) of
      what else is random;
    - not in training, ``nearest_row`` int64 (P,): the row nearest to each of ``points``.
    """

    settings: LidarSettings
    point_step_m: float
    image_hw: tuple[int, int]
    """Of the stored images, whose calibration a frame has."""
    seed: int
    training: bool
    one_camera: bool
    """Whether only rows in one random camera are kept (ScaLR)."""

    def sample(self, sample: dict[str, Any], epoch: int) -> dict[str, Any]:
        """From ``points``, ``ego_T_lidar``, ``K`` and ``cam_T_ego`` of a frame. StoreError: outside
        of training, none of its returns is within reach."""
        rng = np.random.default_rng([self.seed, epoch, sample["frame"], 1])
        settings, points = self.settings, sample["points"]
        xyz_ego = points[:, :3] * self.point_step_m
        lidar_T_ego = np.linalg.inv(sample["ego_T_lidar"].astype(np.float64))
        xyz_lidar = move(lidar_T_ego, xyz_ego)
        order = rng.permutation(len(points)) if self.training else np.arange(len(points))
        kept = voxelise(xyz_lidar, settings.voxel_m, order)
        camera = -1
        if self.one_camera:
            seen = in_cameras(xyz_ego[kept], sample["K"], sample["cam_T_ego"], self.image_hw)
            if (some := np.flatnonzero(seen.sum(axis=1) > 1)).size:  # batch norms want two
                camera = int(rng.choice(some))
                kept = kept[seen[camera]]
        cloud_T_lidar = np.eye(4)
        if self.training:
            kept = kept[nearest_to_one(xyz_lidar[kept], settings.max_rows, rng)]
            cloud_T_lidar = draw_motion(settings, rng)
        cloud_T_ego = cloud_T_lidar @ lidar_T_ego
        xyz = move(cloud_T_ego, xyz_ego[kept])
        reach = np.array(settings.reach_m)
        inside = ((xyz >= -reach) & (xyz < reach)).all(axis=1)
        kept, xyz = kept[inside], xyz[inside]
        mean, deviation = settings.intensity
        intensity = (points[kept, 3] - mean) / deviation
        features = np.column_stack([intensity, xyz, np.linalg.norm(xyz, axis=1)])
        made = {
            "row_point": kept.astype(np.int64),
            "row_features": features.astype(np.float32),
            "row_neighbours": neighbours(xyz, settings.neighbours),
            "row_cells": plane_cells(xyz, settings),
            "cloud_T_ego": cloud_T_ego.astype(np.float32),
            "camera": camera,
            "seed": int(rng.integers(2**63 - 1)),
        }
        if not self.training:
            if len(points) and not len(xyz):
                raise StoreError(
                    f"frame {sample['frame']}: none of its {len(points)} lidar returns lies within "
                    f"lidar.reach_m {list(settings.reach_m)}: raise that"
                )
            made["nearest_row"] = nearest(move(cloud_T_ego, xyz_ego), xyz)
        return made

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch, as described above."""
        n_rows = [len(sample["row_point"]) for sample in samples]
        first_row = [0, *accumulate(n_rows)]
        first_point = [0, *accumulate(len(sample["points"]) for sample in samples)]
        x, y, z = self.settings.cells
        plane = np.array([x * y, x * z, y * z])
        offsets = {
            "row_point": first_point,
            "row_neighbours": first_row,
            "row_cells": [b * plane for b in range(len(samples))],
            "row_features": [np.float32(0)] * len(samples),
        }
        if "nearest_row" in samples[0]:
            offsets["nearest_row"] = first_row
        batch = {
            name: torch.from_numpy(
                np.concatenate([s[name] + first for s, first in zip(samples, firsts, strict=False)])
            )
            for name, firsts in offsets.items()
        }
        whole = {name: [sample[name] for sample in samples] for name in ("camera", "seed")}
        batch |= {name: torch.tensor(values) for name, values in whole.items()}
        batch["cloud_T_ego"] = torch.from_numpy(np.stack([s["cloud_T_ego"] for s in samples]))
        return batch | {"n_rows": torch.tensor(n_rows)}


def move(a_T_b: np.ndarray, xyz: np.ndarray) -> np.ndarray:
    """Points (M, 3) of frame b in frame a."""
    return xyz @ a_T_b[:3, :3].T + a_T_b[:3, 3]


def voxelise(xyz: np.ndarray, edge_m: float, order: np.ndarray) -> np.ndarray:
    """Which points (M, 3) to keep, ascending: of each cube the first in ``order`` (M,). Cubes count
    from the cloud's lower corner, as WaffleIron's."""
    if not len(xyz):
        return order
    cube = np.floor((xyz - xyz.min(axis=0)) / edge_m).astype(np.int64)
    _, ny, nz = cube.max(axis=0) + 1
    flat = (cube[:, 0] * ny + cube[:, 1]) * nz + cube[:, 2]
    return np.sort(order[np.unique(flat[order], return_index=True)[1]])


def nearest_to_one(xyz: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Indices, ascending, of at most so many points (M, 3): those nearest to a random one."""
    if len(xyz) <= most:
        return np.arange(len(xyz))
    distance = np.linalg.norm(xyz - xyz[rng.integers(len(xyz))], axis=1)
    return np.sort(np.argpartition(distance, most - 1)[:most])


def in_cameras(
    xyz_ego: np.ndarray, K: np.ndarray, cam_T_ego: np.ndarray, image_hw: tuple[int, int]
) -> np.ndarray:
    """Which cameras see points (M, 3): bool (N, M). Farther than 1 m in front, and inside of the
    image; what stands between is ignored (ScaLR, SLidR)."""
    seen = []
    for intrinsics, pose in zip(K.astype(np.float64), cam_T_ego.astype(np.float64), strict=True):
        xyz = move(pose, xyz_ego)
        depth = xyz[:, 2]
        u, v, _ = (xyz @ intrinsics.T / np.where(depth > 1, depth, 1)[:, None]).T
        inside = (u >= 0) & (u < image_hw[1]) & (v >= 0) & (v < image_hw[0])
        seen.append((depth > 1) & inside)
    return np.stack(seen)


def draw_motion(settings: LidarSettings, rng: np.random.Generator) -> np.ndarray:
    """A random turn about z, mirroring and scale: (4, 4)."""
    angle = np.radians(settings.rotate_deg) * rng.uniform(-1, 1)
    mirrored, factor = rng.integers(3), rng.uniform(*settings.scale)
    sign = np.ones(3)
    if settings.flip and mirrored < 2:
        sign[mirrored] = -1
    cos, sin = np.cos(angle), np.sin(angle)
    motion = np.eye(4)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    motion[:3, :3] = factor * sign[:, None] * turn
    return motion


def neighbours(xyz: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` nearest others of each point (M, 3), nearest first, int64 (M, count): itself
    where there are not so many."""
    found = np.repeat(np.arange(len(xyz))[:, None], count, axis=1)
    near = min(count, len(xyz) - 1)
    if near > 0:
        index = np.asarray(KDTree(xyz).query(xyz, k=near + 1)[1])
        # A point may not be its own first: another one can lie at the same place.
        others = index != np.arange(len(xyz))[:, None]
        others[others.all(axis=1), -1] = False
        found[:, :near] = index[others].reshape(-1, near)
    return found.astype(np.int64)


def plane_cells(xyz: np.ndarray, settings: LidarSettings) -> np.ndarray:
    """The cell of each point (M, 3) within reach on each of :data:`PLANES`, int64 (M, 3), flat."""
    shape = np.array(settings.cells)
    cell = np.floor((xyz + settings.reach_m) / settings.cell_m).astype(np.int64)
    cell = np.minimum(cell, shape - 1)  # rounding
    return np.stack([cell[:, a] * shape[b] + cell[:, b] for a, b in PLANES], axis=1)


def nearest(xyz: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The nearest of rows (R, 3) to each point (M, 3), int64 (M,)."""
    return np.asarray(KDTree(rows).query(xyz, k=1)[1], dtype=np.int64)
