"""One scene of the demo drive, and its world frozen at the time of a keyframe.

Moving things stand still within a keyframe: the cameras fire up to 43 ms before the lidar, from
where the car is at that moment, but everything else is where it is at the keyframe's timestamp. So
lidar returns, images and boxes of one keyframe agree exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np

from occfeat_targets.demo_world import solids, things
from occfeat_targets.demo_world.layout import (
    SHADOW,
    Arm,
    Layout,
    Raster,
    build_layout,
    paint_ground,
)
from occfeat_targets.demo_world.rig import KEYFRAME_SECONDS, Sensor, quaternion_from_euler
from occfeat_targets.demo_world.solids import Solids, place, shadow_outlines
from occfeat_targets.demo_world.surface import FACADES
from occfeat_targets.demo_world.traffic import Actor, Pose, in_the_way, populate
from occfeat_targets.geometry import rigid

MAP_SIZE = (2979.5, 2118.1)
ANNOTATED_WITHIN = 100.0
_START_US = 1_532_402_900_000_000
_WALLS = (
    (0.58, 0.33, 0.25),
    (0.72, 0.66, 0.55),
    (0.62, 0.62, 0.62),
    (0.48, 0.28, 0.22),
    (0.82, 0.78, 0.70),
    (0.42, 0.46, 0.52),
)


@dataclass(frozen=True)
class Plan:
    """What a demo world is made of: everything else follows from these four values."""

    scenes: int
    samples: int
    seed: int
    version: str


@dataclass(frozen=True)
class Drive:
    """The ego car's way: ``before`` metres straight on, a left turn by 90 degrees, straight on.

    ``start`` is the pose at the first keyframe, with heading 0; ``radius`` of the turn in metres;
    ``speed`` m/s.
    """

    start: Pose
    speed: float
    before: float = math.inf
    radius: float = 1.0

    def pose(self, time: float) -> Pose:
        """Pose ``time`` seconds after the first keyframe."""
        x, y, _ = self.start
        distance = self.speed * time
        turned = min(max((distance - self.before) / self.radius, 0.0), math.pi / 2)
        after = max(distance - self.before - turned * self.radius, 0.0)
        x += min(distance, self.before) + self.radius * math.sin(turned)
        return x, y + self.radius * (1 - math.cos(turned)) + after, turned


@dataclass
class Scene:
    """A scene, fixed but for the time.

    ``origin`` (x, y) and ``yaw`` place the scene frame in the global frame. ``actors`` are
    annotated things, ids from 1; ``sun`` (3,) is the unit vector towards the sun, global;
    ``solids`` what stands still and is not annotated, ids from FIRST_STATIC_ID, global; ``ground``
    the coarse texture of the whole scene with the shadows of buildings.
    """

    index: int
    origin: tuple[float, float]
    yaw: float
    layout: Layout
    drive: Drive
    actors: list[Actor]
    sun: np.ndarray
    solids: Solids | None = None
    ground: Raster | None = None

    def timestamp(self, sample: int) -> int:
        """Timestamp of a keyframe (that of its lidar turn), microseconds."""
        jitter = (self.index * 7919 + sample * 104_729) % 4001 - 2000
        return _START_US + self.index * 120_000_000 + jitter + int(sample * KEYFRAME_SECONDS * 1e6)

    def seconds(self, timestamp: int) -> float:
        """Scene time of a timestamp, in seconds; 0 at the first keyframe."""
        return (timestamp - self.timestamp(0)) / 1e6

    @property
    def log(self) -> str:
        """Name of the scene's log file, the prefix of its sensor files."""
        return f"n000-2018-07-24-{11 + self.index // 60:02d}-{self.index % 60:02d}-00+0000"

    def file_name(self, sample: int, sensor: Sensor) -> str:
        """File of one sensor in one keyframe, relative to the dataroot."""
        ending = "jpg" if sensor.intrinsics else "pcd.bin"
        timestamp = self.timestamp(sample) - sensor.early_us
        return f"samples/{sensor.channel}/{self.log}__{sensor.channel}__{timestamp}.{ending}"

    def ego_pose(self, timestamp: int) -> tuple[list[float], list[float]]:
        """Global pose of the car: translation (3,) metres and quaternion wxyz (4,)."""
        time, wobble = self.seconds(timestamp), 0.012 * (self.index % 3)
        x, y, heading = self.to_global(self.drive.pose(time))
        pitch = wobble * (0.4 + math.sin(2.3 * time + self.index))
        roll = wobble * 0.7 * math.sin(1.7 * time + 2 * self.index)
        return [x, y, 0.0], quaternion_from_euler(heading, pitch, roll)

    def to_global(self, pose: Pose) -> Pose:
        """Global (x, y, heading) of a pose in the scene frame."""
        x, y = self.xy_global(np.array(pose[:2]))
        return float(x), float(y), pose[2] + self.yaw

    def xy_global(self, xy: np.ndarray) -> np.ndarray:
        """Global coordinates (..., 2) of scene points (..., 2)."""
        return xy @ self.scene_R_global + self.origin

    def xy_scene(self, xy: np.ndarray) -> np.ndarray:
        """Scene coordinates (..., 2) of global points (..., 2)."""
        return (xy - self.origin) @ self.scene_R_global.T

    @property
    def scene_R_global(self) -> np.ndarray:
        """Rotation (2, 2) from the global frame to the scene frame."""
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        return np.array([[cos, sin], [-sin, cos]])


def _cell(plan: Plan, index: int) -> tuple[tuple[float, float], float]:
    """Centre (x, y) of a scene's own cell of the map and the radius around it that it may use."""
    columns = max(1, math.ceil(math.sqrt(plan.scenes * MAP_SIZE[0] / MAP_SIZE[1])))
    rows = math.ceil(plan.scenes / columns)
    width, height = MAP_SIZE[0] / columns, MAP_SIZE[1] / rows
    centre = ((index % columns + 0.5) * width, (index // columns + 0.5) * height)
    return centre, min(min(width, height) / 2 - 17, 200.0)


@lru_cache(maxsize=2)
def build_scene(plan: Plan, index: int) -> Scene:
    """Draw a scene at random from the plan's seed; the same for the same arguments."""
    rng = np.random.default_rng([plan.seed, index, 1])
    origin, radius = _cell(plan, index)
    yaw = float(rng.uniform(-math.pi, math.pi))
    layout = build_layout(rng, radius)
    duration = (plan.samples - 1) * KEYFRAME_SECONDS + 0.1
    drive = _drive(layout, rng, index % 4 == 2, duration, radius)
    ego = [(time, drive.pose(time)) for time in np.arange(-0.25, duration + 0.25, 0.25)]
    actors = [
        actor
        for actor in populate(layout, rng, drive.speed, drive.before < math.inf)
        if not any(in_the_way(actor, time, pose) for time, pose in ego)
    ]
    elevation, azimuth = rng.uniform(0.6, 1.05), rng.uniform(-math.pi, math.pi)
    level = math.cos(elevation)
    sun = np.array([math.cos(azimuth) * level, math.sin(azimuth) * level, math.sin(elevation)])
    scene = Scene(index, origin, yaw, layout, drive, actors, sun)
    ids = count(solids.FIRST_STATIC_ID)
    scene.solids = solids.join(
        place(parts, scene.to_global(pose), next(ids), colour, scale)
        for parts, pose, colour, scale in _scenery(layout, rng, radius)
    )
    shadows = scene.xy_scene(shadow_outlines(scene.solids, sun)[scene.solids.is_building])
    scene.ground = paint_ground(layout, shadows, (0.0, 0.0), 0.2, radius + 45)
    return scene


def _drive(
    layout: Layout, rng: np.random.Generator, turns: bool, duration: float, radius: float
) -> Drive:
    """A drive of ``duration`` seconds along the main street, or by a turn off it."""
    main, side = layout.arms[0].section, layout.arms[1].section
    speed = float(rng.uniform(4, 6) if turns else rng.uniform(6, 12))
    speed = min(speed, 2 * (radius - 75) / duration)
    length = speed * duration
    if not turns:
        start = -0.6 * length - float(rng.uniform(5, 35))
        return Drive((start, -main.lane_centre(0), 0.0), speed)
    before = max(4.0, 0.35 * length)
    pose = (side.lane_centre(0) - 9.0 - before, -main.lane_centre(0), 0.0)
    return Drive(pose, speed, before, 9.0)


def _scenery(layout: Layout, rng: np.random.Generator, radius: float) -> Iterator[tuple]:
    """What stands along the streets: yields (parts, pose in the scene frame, colour, scale)."""
    for number, arm in enumerate(layout.arms):
        # The main street's buildings own the corners.
        first = arm.corner + (0.5 if number % 2 == 0 else 24)
        for side in (-1, 1):
            yield from _buildings(arm, side, first, rng)
            yield from _kerb(arm, side, rng)
        yield _building(rng, arm.pose(arm.end + 8, 0.0, math.pi / 2), (44.0, 12.0), (3, 8))
        # A few towers behind the first row.
        for s, t in rng.uniform((60, 55), (radius - 10, radius - 10), (6, 2)):
            yield _building(rng, arm.pose(s, t), rng.uniform(14, 26, 2), (7, 19))
    for island in layout.holes:
        for share in (0.15, 0.5, 0.85):
            xy = island[:2].mean(axis=0) * share + island[2:].mean(axis=0) * (1 - share)
            yield _tree(rng, (*xy, 0.0), (0.50, 0.70))


def _building(rng: np.random.Generator, pose: Pose, footprint, storeys: tuple[int, int]) -> tuple:
    """A building with its front along its x axis, ``footprint`` (length, depth) in metres."""
    wall = np.array(_WALLS[rng.integers(len(_WALLS))]) * rng.uniform(0.85, 1.12)
    parts = things.building(FACADES[rng.integers(len(FACADES))])
    return parts, pose, wall, (*footprint, 3.2 * rng.integers(*storeys))


def _buildings(arm: Arm, side: int, s: float, rng: np.random.Generator) -> Iterator[tuple]:
    """Buildings along one side of an arm from ``s`` on."""
    setback = float(rng.choice([0.1, 0.5, 3.0]))
    while s < arm.end - 11:
        length, depth = min(float(rng.uniform(11, 26)), arm.end - s), float(rng.uniform(11, 17))
        t = side * (arm.section.edge + setback + depth / 2)
        pose = arm.pose(s + length / 2, t, math.pi if side > 0 else 0.0)
        storeys = (3, 7) if rng.random() < 0.8 else (7, 14)
        yield _building(rng, pose, (length, depth), storeys)
        s += length + (0.0 if rng.random() < 0.55 else float(rng.uniform(2, 9)))


def _kerb(arm: Arm, side: int, rng: np.random.Generator) -> Iterator[tuple]:
    """Trees and lamps on one sidewalk."""
    t, turn = side * (arm.section.kerb + 0.55), math.pi if side > 0 else 0.0
    spacing, trees = float(rng.uniform(8, 16)), rng.uniform(0.35, 0.95)
    for s in np.arange(arm.start + 9.5, arm.end - 2, spacing):
        if rng.random() < trees:
            yield _tree(rng, arm.pose(s, t), (0.75, 1.25))
    for s in np.arange(arm.start + 9.5 + spacing / 2, arm.end - 2, 2 * spacing):
        yield things.LAMP, arm.pose(s, t, turn), None, 1.0


def _tree(rng: np.random.Generator, pose: Pose, sizes: tuple[float, float]) -> tuple:
    """A tree of ``sizes`` (from, to) relative to the nominal one."""
    leaves = rng.uniform((0.17, 0.30, 0.10), (0.39, 0.43, 0.15))
    height, spread = rng.uniform(*sizes), rng.uniform(*sizes) * 0.9
    turned = (*pose[:2], rng.uniform(-math.pi, math.pi))
    return things.TREE, turned, leaves, (spread, spread, height)


class Placed(NamedTuple):
    """An actor at the keyframe's time: global box ``centre`` (3,) metres and ``yaw`` radians."""

    actor: Actor
    centre: tuple[float, float, float]
    yaw: float


@dataclass
class World:
    """Everything that a keyframe's sensors see.

    ``timestamp`` microseconds; ``solids`` in the global frame; ``lit`` (P,) float32, how much sun
    each gets (0 in the shadow of a building); ``ground`` rasters as for sample_ground; ``placed``
    the annotated things within 100 m of the car.
    """

    scene: Scene
    timestamp: int
    solids: Solids
    lit: np.ndarray
    ground: list[Raster]
    placed: list[Placed]


def frame_world(plan: Plan, scene_index: int, sample: int) -> World:
    """The frozen world of one keyframe; the same for the same arguments.

    Raises:
        IndexError: there is no such scene or sample.
    """
    if not (0 <= scene_index < plan.scenes and 0 <= sample < plan.samples):
        raise IndexError(
            f"the demo world has {plan.scenes} scenes of {plan.samples} samples, so no sample "
            f"{sample} of scene {scene_index}"
        )
    scene = build_scene(plan, scene_index)
    timestamp = scene.timestamp(sample)
    time = scene.seconds(timestamp)
    ego = scene.drive.pose(time)
    ego_body = place(things.EGO_BODY, scene.to_global(ego), solids.EGO_ID)
    placed, groups = [], [scene.solids, ego_body]
    for actor in scene.actors:
        x, y, heading = actor.pose(time)
        beyond = max(abs(x), abs(y)) > scene.layout.arms[0].end - 7  # where buildings stand
        if math.dist((x, y), ego[:2]) > ANNOTATED_WITHIN or beyond:
            continue
        pose = scene.to_global((x, y, heading))
        placed.append(Placed(actor, (*pose[:2], actor.size[2] / 2), pose[2]))
        groups.append(place(actor.model.parts, pose, actor.object_id, actor.colour, actor.scale))
    everything = solids.join(groups)
    xy = scene.xy_scene(everything.centre[:, :2])
    shaded = (scene.ground.sample(*xy.T) >= SHADOW) & (everything.centre[:, 2] < 5)
    lit = np.where(shaded & ~everything.is_building, 0.0, 1.0).astype(np.float32)
    shadows = scene.xy_scene(shadow_outlines(everything, scene.sun))
    levels = ((0.0125, 18.0), (0.04, 62.0))
    fine = [paint_ground(scene.layout, shadows, ego[:2], *level) for level in levels]
    return World(scene, timestamp, everything, lit, [*fine, scene.ground], placed)


def global_T_ego(world: World, timestamp: int) -> np.ndarray:
    """The car's pose at a time in microseconds, (4, 4) float64."""
    translation, rotation = world.scene.ego_pose(timestamp)
    return rigid(rotation, translation)
