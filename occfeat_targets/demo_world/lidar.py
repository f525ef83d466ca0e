"""Lidar: the same solids and ground as the images, met by the beams of one turn."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from occfeat_targets.demo_world.ground import SHADOW
from occfeat_targets.demo_world.rig import (
    LIDAR_MAX_RANGE,
    LIDAR_RANGE_NOISE,
    LIDAR_SENSOR,
    lidar_directions,
)
from occfeat_targets.demo_world.scene import World, global_T_ego
from occfeat_targets.demo_world.solids import Solids, intersect
from occfeat_targets.demo_world.surface import INTENSITY, Material


def cast_rays(
    world: World,
    origin: np.ndarray,
    directions: np.ndarray,
    max_range: float = 2000.0,
    ego_car: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nearest surface along rays.

    Args:
        world: the frozen world of a keyframe.
        origin: (3,) common start of the rays, global, metres.
        directions: (N, 3) unit vectors, global.
        max_range: metres; what is farther is not hit.
        ego_car: whether the rays can hit the ego car's own body.

    Returns:
        range (N,) float32 metres, inf where nothing is hit; object_id (N,) int32, -1 nothing,
        0 ground, else the thing's id; material (N,) uint8, a Material.
    """
    origin = np.asarray(origin, dtype=np.float64)
    azimuth = np.arctan2(directions[:, 1], directions[:, 0])
    order = np.argsort(azimuth, kind="stable")
    d = np.ascontiguousarray(directions[order].T.astype(np.float32))
    with np.errstate(divide="ignore"):
        nearest = np.where(d[2] < 0, np.float32(-origin[2]) / d[2], np.float32(np.inf))
    nearest[nearest > max_range] = np.inf
    which = np.where(np.isfinite(nearest), -2, -1).astype(np.int32)
    solids = world.solids
    for index, part in _azimuth_slices(solids, origin, azimuth[order], max_range):
        if solids.lidar_only[index] and not ego_car:
            continue
        rotation = solids.local_R_global(index)
        start = rotation @ (origin - solids.centre[index])
        t = intersect(solids, index, start, rotation.astype(np.float32) @ d[:, part])
        nearer = (t < nearest[part]) & (t <= max_range)
        nearest[part][nearer] = t[nearer]
        which[part][nearer] = index
    distance, hit = np.empty_like(nearest), np.empty_like(which)
    distance[order], hit[order] = nearest, which
    # Ground = -2 and nothing = -1 index the tables from their ends.
    object_id = np.concatenate([solids.object_id, [0, -1]]).astype(np.int32)[hit]
    material = np.concatenate([solids.material, [0, Material.NOTHING]]).astype(np.uint8)[hit]
    on_ground = hit == -2
    xy = origin[:2] + distance[on_ground, None].astype(np.float64) * directions[on_ground, :2]
    material[on_ground] = ground_material(world, xy)
    return distance, object_id, material


def _azimuth_slices(
    solids: Solids, origin: np.ndarray, azimuth: np.ndarray, max_range: float
) -> Iterator[tuple[int, slice]]:
    """For every solid within range, the slices of rays, sorted by azimuth, that may meet it."""
    offset = solids.centre[:, :2] - origin[:2]
    distance = np.hypot(offset[:, 0], offset[:, 1])
    radius = np.hypot(solids.half[:, 0], solids.half[:, 1]) * 1.001 + 1e-3
    middle = np.arctan2(offset[:, 1], offset[:, 0])
    spread = np.arcsin(np.minimum(radius / np.maximum(distance, 1e-9), 1.0)) + 1e-3
    spread[distance <= radius] = np.pi  # the origin is inside or close: any ray may meet it
    for index in np.flatnonzero(distance - radius < max_range):
        # Three copies of the window, for those that reach over the seam at plus or minus pi.
        for turn in (-2 * np.pi, 0.0, 2 * np.pi):
            window = middle[index] + turn + spread[index] * np.array([-1, 1])
            first, last = np.searchsorted(azimuth, window)
            if first < last:
                yield int(index), slice(first, last)


def ground_material(world: World, xy: np.ndarray) -> np.ndarray:
    """Materials (N,) uint8 of the ground at global points (N, 2)."""
    x, y = world.scene.xy_scene(xy).T.astype(np.float32)
    return world.ground.values(x, y) & (SHADOW - 1)


def sweep(world: World, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One lidar turn at the keyframe's time.

    Returns:
        points (N, 5) float32: x, y, z in the lidar frame in metres, intensity 0..255, ring 0..31;
        object_id (N,) int32 and material (N,) uint8 of what each return hit, as in cast_rays.
    """
    global_T_lidar = global_T_ego(world, world.timestamp) @ LIDAR_SENSOR.ego_T_sensor()
    directions, ring = lidar_directions()
    turned = directions @ global_T_lidar[:3, :3].T
    distance, object_id, material = cast_rays(
        world, global_T_lidar[:3, 3], turned, LIDAR_MAX_RANGE, ego_car=True
    )
    noise = rng.normal(0, LIDAR_RANGE_NOISE, len(distance)).clip(-0.028, 0.028)
    spread = rng.uniform(0.7, 1.3, len(distance))
    kept = np.isfinite(distance)
    measured = distance[kept].astype(np.float64) + noise[kept]
    points = np.empty((int(kept.sum()), 5), dtype=np.float32)
    points[:, :3] = directions[kept] * measured[:, None]
    points[:, 3] = np.clip(np.round(INTENSITY[material[kept]] * spread[kept]), 0, 255)
    points[:, 4] = ring[kept]
    return points, object_id[kept], material[kept]
