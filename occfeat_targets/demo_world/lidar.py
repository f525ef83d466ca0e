"""Lidar: the same solids and ground as the images, met by the beams of one turn."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from occfeat_targets.demo_world.materials import Material, intensity_table
from occfeat_targets.demo_world.primitives import Solids, intersect
from occfeat_targets.demo_world.rig import (
    LIDAR_MAX_RANGE,
    LIDAR_RANGE_NOISE,
    LIDAR_SENSOR,
    lidar_directions,
)
from occfeat_targets.demo_world.world import World, global_T_ego


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
    d = np.asarray(directions, dtype=np.float32)
    azimuth = np.arctan2(d[:, 1], d[:, 0])
    order = np.argsort(azimuth, kind="stable")
    azimuth, d = azimuth[order], np.ascontiguousarray(d[order].T)
    with np.errstate(divide="ignore"):
        nearest = np.where(d[2] < 0, np.float32(-origin[2]) / d[2], np.float32(np.inf))
    nearest[nearest > max_range] = np.inf
    which = np.where(np.isfinite(nearest), -2, -1).astype(np.int32)
    solids = world.solids
    for index, slices in _azimuth_slices(solids, origin, azimuth, max_range):
        if solids.lidar_only[index] and not ego_car:
            continue
        rotation = solids.local_R_global(index)
        start = rotation @ (origin - solids.centre[index])
        cos, sin = np.float32(rotation[0, 0]), np.float32(rotation[0, 1])
        for part in slices:
            x, y, z = d[:, part]
            t = intersect(solids, index, start, (cos * x + sin * y, cos * y - sin * x, z))
            nearer = (t < nearest[part]) & (t <= max_range)
            nearest[part][nearer] = t[nearer]
            which[part][nearer] = index
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    nearest, which = nearest[back], which[back]
    object_id = np.concatenate([solids.object_id, [0, -1]]).astype(np.int32)[which]
    material = _materials(world, origin, np.asarray(directions, np.float32), nearest, which)
    return nearest, object_id, material


def _azimuth_slices(
    solids: Solids, origin: np.ndarray, azimuth: np.ndarray, max_range: float
) -> Iterator[tuple[int, list[slice]]]:
    """For every solid within range, the slices of rays, sorted by azimuth, that may meet it."""
    offset = solids.centre[:, :2] - origin[:2]
    distance = np.hypot(offset[:, 0], offset[:, 1])
    radius = np.hypot(solids.half[:, 0], solids.half[:, 1]) * 1.001 + 1e-3
    middle = np.arctan2(offset[:, 1], offset[:, 0])
    spread = np.arcsin(np.minimum(radius / np.maximum(distance, 1e-9), 1.0)) + 1e-3
    low, high = middle - spread, middle + spread
    turn = 2 * np.pi
    # Three copies of the window, for those that reach over the seam at plus or minus pi.
    bounds = [np.searchsorted(azimuth, [low + k * turn, high + k * turn]) for k in (-1, 0, 1)]
    for index in np.flatnonzero(distance - radius < max_range):
        if distance[index] <= radius[index]:
            yield int(index), [slice(0, len(azimuth))]
        else:
            parts = [slice(*ends[:, index]) for ends in bounds if ends[0, index] < ends[1, index]]
            if parts:
                yield int(index), parts


def _materials(world: World, origin, d, distance, which) -> np.ndarray:
    table = np.concatenate([world.solids.material, [0, int(Material.NOTHING)]]).astype(np.uint8)
    material = table[which]
    ground = np.flatnonzero(which == -2)
    xy = origin[:2] + distance[ground, None].astype(np.float64) * d[ground, :2]
    material[ground] = ground_material(world, xy)
    return material


def ground_material(world: World, xy: np.ndarray) -> np.ndarray:
    """Materials (N,) uint8 of the ground at global points (N, 2)."""
    scene = world.scene
    cos, sin = math.cos(scene.yaw), math.sin(scene.yaw)
    dx, dy = xy[:, 0] - scene.origin[0], xy[:, 1] - scene.origin[1]
    return world.ground.material(
        (cos * dx + sin * dy).astype(np.float32), (-sin * dx + cos * dy).astype(np.float32)
    )


def sweep(world: World, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One lidar turn at the keyframe's time.

    Returns:
        points (N, 5) float32: x, y, z in the lidar frame in metres, intensity 0..255, ring 0..31;
        object_id (N,) int32 as in cast_rays.
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
    points[:, 3] = np.clip(np.round(intensity_table()[material[kept]] * spread[kept]), 0, 255)
    points[:, 4] = ring[kept]
    return points, object_id[kept]
