"""The world of one keyframe, frozen at the keyframe's time.

Moving things stand still within a keyframe: the cameras fire up to 43 ms before the lidar, from
where the car is at that moment, but everything else is where it is at the keyframe's timestamp. So
lidar returns, images and boxes of one keyframe agree exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from occfeat_targets.demo_world import shapes
from occfeat_targets.demo_world.ground import Ground, hull
from occfeat_targets.demo_world.motion import Actor
from occfeat_targets.demo_world.primitives import Kind, SolidBuilder, Solids, join
from occfeat_targets.demo_world.scene import FIRST_STATIC_ID, Plan, Scene, build_scene
from occfeat_targets.geometry import rigid

ANNOTATED_WITHIN = 100.0
EGO_ID = FIRST_STATIC_ID - 1


@dataclass(frozen=True)
class Placed:
    """An actor at the keyframe's time: global box ``centre`` (3,) metres and ``yaw`` radians."""

    actor: Actor
    centre: tuple[float, float, float]
    yaw: float


@dataclass
class World:
    """Everything that a keyframe's sensors see.

    ``solids`` in the global frame; ``ground`` in the scene frame; ``placed`` the annotated things
    within 100 m of the car; ``timestamp`` microseconds; ``lit`` (P,) float32, how much sun each
    solid gets (0 in the shadow of a building).
    """

    scene: Scene
    timestamp: int
    solids: Solids
    ground: Ground
    placed: list[Placed]
    lit: np.ndarray


def frame_world(plan: Plan, scene_index: int, sample: int) -> World:
    """The frozen world of one keyframe; the same for the same arguments.

    Raises:
        IndexError: there is no such scene or sample.
    """
    if not (0 <= scene_index < plan.scenes and 0 <= sample < plan.samples):
        raise IndexError(
            f"no sample {sample} of scene {scene_index}: the demo world has "
            f"{plan.scenes} scenes of {plan.samples} samples"
        )
    scene = build_scene(plan, scene_index)
    timestamp = scene.timestamp(sample)
    time = scene.seconds(timestamp)
    ego = scene.ego_path.pose(scene.ego_speed * time)
    out = SolidBuilder()
    placed = []
    for actor in scene.actors:
        x, y, heading = actor.pose(time)
        if math.hypot(x - ego[0], y - ego[1]) > ANNOTATED_WITHIN or not _on_street(scene, x, y):
            continue
        gx, gy, yaw = scene.to_global((x, y, heading))
        placed.append(Placed(actor, (gx, gy, actor.size[2] / 2), yaw))
        out.begin(gx, gy, yaw, actor.object_id)
        _add_actor(out, actor, time)
    moving = out.build()
    ego_parts = SolidBuilder()
    ego_parts.begin(*scene.to_global(ego), EGO_ID)
    shapes.add_ego_body(ego_parts)
    solids = join(join(moving, scene.solids), ego_parts.build())
    ground = Ground(scene.ground, ego[:2], _shadows(scene, solids, ego))
    return World(scene, timestamp, solids, ground, placed, _sunlit(scene, solids))


def _on_street(scene: Scene, x: float, y: float) -> bool:
    """False beyond the ends of the streets, where buildings stand."""
    for street in scene.layout.streets:
        s, t = street.st(np.array([x, y]))
        begin = street.start if len(scene.layout.streets) == 1 else -street.section.edge
        if begin + 3 < s < street.end - 6 and abs(t) < street.section.edge + 20:
            return True
    return False


def _add_actor(out: SolidBuilder, actor: Actor, time: float) -> None:
    if actor.category.startswith("human"):
        stride = math.sin(2 * math.pi * (0.9 * time + actor.seed)) if actor.gait else 0.0
        shapes.add_pedestrian(out, actor.size, actor.colour, actor.seed, stride)
    elif actor.category.startswith("vehicle"):
        shapes.add_vehicle(out, actor.category, actor.size, actor.colour, actor.seed, actor.rider)
    else:
        shapes.add_prop(out, actor.category, actor.size)


def _to_scene(scene: Scene, xy: np.ndarray) -> np.ndarray:
    """Scene coordinates (..., 2) of global points (..., 2)."""
    cos, sin = math.cos(scene.yaw), math.sin(scene.yaw)
    dx, dy = xy[..., 0] - scene.origin[0], xy[..., 1] - scene.origin[1]
    return np.stack([cos * dx + sin * dy, -sin * dx + cos * dy], axis=-1)


def _shadows(scene: Scene, solids: Solids, ego) -> list[list[tuple[float, float]]]:
    """Outlines of the shadows of everything near the car but buildings, in the scene frame."""
    near = np.hypot(*(_to_scene(scene, solids.centre[:, :2]) - ego[:2]).T) < 80
    small = solids.half[:, :2].max(axis=1) < 8
    chosen = np.flatnonzero(near & small)
    corners = solids.corners()[chosen]
    outlines = []
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    slide = scene.sun[:2] / scene.sun[2]
    for index, points in zip(chosen, corners, strict=True):
        if solids.kind[index] == Kind.ELLIPSOID:
            flat = _ellipsoid_shadow(solids, index, slide, ring)
        else:
            flat = points[:, :2] - slide * np.maximum(points[:, 2:], 0)
        outlines.append(hull(_to_scene(scene, flat)))
    return outlines


def _ellipsoid_shadow(solids: Solids, index: int, slide: np.ndarray, ring: np.ndarray):
    """Points (n, 2) around an ellipsoid's shadow: rings at three heights, slid along the sun."""
    cos, sin = math.cos(solids.yaw[index]), math.sin(solids.yaw[index])
    turn = np.array([[cos, -sin], [sin, cos]])
    rows = []
    for level in (-0.8, 0.0, 0.8):
        z = solids.centre[index, 2] + level * solids.half[index, 2]
        radius = math.sqrt(1 - level * level) * solids.half[index, :2]
        rows.append(solids.centre[index, :2] + (ring * radius) @ turn.T - slide * max(z, 0.0))
    return np.concatenate(rows)


def _sunlit(scene: Scene, solids: Solids) -> np.ndarray:
    """Share of sunlight on every solid (P,) float32: none where a building shades its place."""
    spots = _to_scene(scene, solids.centre[:, :2])
    dark = scene.ground.shade.sample(spots[:, 0].astype(np.float32), spots[:, 1].astype(np.float32))
    building = solids.half[:, :2].min(axis=1) > 3.0
    return np.where(dark & ~building & (solids.centre[:, 2] < 5), 0.0, 1.0).astype(np.float32)


def global_T_ego(world: World, timestamp: int) -> np.ndarray:
    """The car's pose at a time in microseconds, (4, 4) float64."""
    translation, rotation = world.scene.ego_pose(timestamp)
    return rigid(rotation, translation)
