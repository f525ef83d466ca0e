"""One scene of the demo drive, and its world frozen at the time of a keyframe.

Moving things stand still within a keyframe: the cameras fire up to 43 ms before the lidar, from
where the car is at that moment, but everything else is where it is at the keyframe's timestamp. So
lidar returns, images and boxes of one keyframe agree exactly.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from occfeat_targets.demo_world import solids, things
from occfeat_targets.demo_world.layout import SHADOW, Layout, Raster, build_layout, paint_ground
from occfeat_targets.demo_world.rig import KEYFRAME_SECONDS, Sensor, quaternion_from_euler
from occfeat_targets.demo_world.solids import Pose, Solids, place, shadow_outlines
from occfeat_targets.demo_world.things import Material
from occfeat_targets.demo_world.traffic import Actor, in_the_way, populate
from occfeat_targets.geometry import rigid

MAP_SIZE = (2979.5, 2118.1)
ANNOTATED_WITHIN = 100.0
_TURN_RADIUS = 9.0
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
    """The ego car's way: ``before`` metres straight on, a left turn by 90 degrees, straight on."""

    start: Pose  # at the first keyframe
    speed: float  # m/s
    before: float = math.inf

    def pose(self, time: float) -> Pose:
        """Pose ``time`` seconds after the first keyframe."""
        x, y, heading = self.start
        distance = self.speed * time
        turned = min(max((distance - self.before) / _TURN_RADIUS, 0.0), math.pi / 2)
        after = max(distance - self.before - turned * _TURN_RADIUS, 0.0)
        ahead = min(distance, self.before) + _TURN_RADIUS * math.sin(turned)
        left = _TURN_RADIUS * (1 - math.cos(turned)) + after
        cos, sin = math.cos(heading), math.sin(heading)
        return x + cos * ahead - sin * left, y + sin * ahead + cos * left, heading + turned


@dataclass
class Scene:
    """A scene, fixed but for the time."""

    index: int
    layout: Layout
    drive: Drive
    actors: list[Actor]  # annotated things, ids from 1
    sun: np.ndarray  # (3,) unit vector towards the sun, global
    solids: Solids  # what stands still and is not annotated, ids from FIRST_STATIC_ID
    ground: Raster  # coarse texture of the whole scene with the shadows of buildings

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
        x, y, heading = self.drive.pose(time)
        pitch = wobble * (0.4 + math.sin(2.3 * time + self.index))
        roll = wobble * 0.7 * math.sin(1.7 * time + 2 * self.index)
        return [x, y, 0.0], quaternion_from_euler(heading, pitch, roll)

    def global_T_sensor(self, timestamp: int, sensor: Sensor) -> np.ndarray:
        """Pose of a sensor when it fires for the keyframe of a timestamp, (4, 4) float64."""
        xyz, wxyz = self.ego_pose(timestamp - sensor.early_us)
        ego_T_sensor = rigid(np.array(sensor.rotation), np.array(sensor.translation))
        return rigid(np.array(wxyz), np.array(xyz)) @ ego_T_sensor


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
    rng = np.random.default_rng([plan.seed, index, 5])
    origin, radius = _cell(plan, index)
    layout = build_layout(rng, origin, radius)
    duration = (plan.samples - 1) * KEYFRAME_SECONDS + 0.1
    drive = _drive(layout, rng, index % 4 == 2, duration)
    ego = [(time, drive.pose(time)) for time in np.arange(-0.25, duration + 0.25, 0.25)]
    actors = [
        actor
        for actor in populate(layout, rng, drive.speed, drive.before < math.inf)
        if not any(in_the_way(actor, time, pose) for time, pose in ego)
    ]
    elevation, azimuth = rng.uniform(0.6, 1.05), rng.uniform(-math.pi, math.pi)
    level = math.cos(elevation)
    sun = np.array([math.cos(azimuth) * level, math.sin(azimuth) * level, math.sin(elevation)])
    scenery = enumerate(_scenery(layout, rng), start=solids.FIRST_STATIC_ID)
    still = solids.join(place(object_id, *thing) for object_id, thing in scenery)
    shadows = shadow_outlines(still, sun)[still.material == Material.MASONRY]
    ground = paint_ground(layout, shadows, origin, 0.2, radius + 45)
    return Scene(index, layout, drive, actors, sun, still, ground)


def _drive(layout: Layout, rng: np.random.Generator, turns: bool, duration: float) -> Drive:
    """A drive of ``duration`` seconds along the main street, or by a turn off it."""
    arm, side = layout.arms[0], layout.arms[1].section
    speed = float(rng.uniform(4, 6) if turns else rng.uniform(6, 12))
    speed = min(speed, 2 * (arm.end - 75) / duration)
    length, t = speed * duration, -arm.section.lane_centre(0)
    if not turns:
        return Drive(arm.pose(-0.6 * length - float(rng.uniform(5, 35)), t), speed)
    before = max(4.0, 0.35 * length)
    return Drive(arm.pose(side.lane_centre(0) - _TURN_RADIUS - before, t), speed, before)


def _scenery(layout: Layout, rng: np.random.Generator) -> Iterator[tuple]:
    """What stands along the streets: yields (parts, pose, colour, scale)."""
    for number, arm in enumerate(layout.arms):
        for side in (-1, 1):
            turn = math.pi if side > 0 else 0.0
            # The main street's buildings own the corners.
            s = arm.corner + (0.5 if number % 2 == 0 else 24)
            setback = float(rng.choice([0.1, 0.5, 3.0]))
            while s < arm.end - 11:
                length = min(float(rng.uniform(11, 26)), arm.end - s)
                depth = float(rng.uniform(11, 17))
                t = side * (arm.section.edge + setback + depth / 2)
                storeys = (3, 7) if rng.random() < 0.8 else (7, 14)
                yield _building(rng, arm.pose(s + length / 2, t, turn), (length, depth), storeys)
                s += length + (0.0 if rng.random() < 0.55 else float(rng.uniform(2, 9)))
            # Trees and lamps on the sidewalk.
            spacing, trees = float(rng.uniform(8, 16)), rng.uniform(0.35, 0.95)
            first, t = arm.start + 9.5, side * (arm.section.kerb + 0.55)
            for s in np.arange(first, arm.end - 2, spacing):
                if rng.random() < trees:
                    yield _tree(rng, arm.pose(s, t), (0.75, 1.25))
            for s in np.arange(first + spacing / 2, arm.end - 2, 2 * spacing):
                yield things.LAMP, arm.pose(s, t, turn), None, 1.0
        yield _building(rng, arm.pose(arm.end + 8, 0.0, math.pi / 2), (44.0, 12.0), (3, 8))
        # A few towers behind the first row.
        for s, t in rng.uniform((60, 55), (arm.end - 10, arm.end - 10), (6, 2)):
            yield _building(rng, arm.pose(s, t), rng.uniform(14, 26, 2), (7, 19))
    for island in layout.holes:
        for share in (0.15, 0.5, 0.85):
            xy = island[:2].mean(axis=0) * share + island[2:].mean(axis=0) * (1 - share)
            yield _tree(rng, (*xy, 0.0), (0.45, 0.60))


def _building(rng: np.random.Generator, pose: Pose, footprint, storeys: tuple[int, int]) -> tuple:
    """A building with its front along its x axis, ``footprint`` (length, depth) in metres."""
    wall = np.array(_WALLS[rng.integers(len(_WALLS))]) * rng.uniform(0.85, 1.12)
    parts = things.BUILDINGS[rng.integers(len(things.BUILDINGS))]
    return parts, pose, wall, (*footprint, 3.2 * rng.integers(*storeys))


def _tree(rng: np.random.Generator, pose: Pose, sizes: tuple[float, float]) -> tuple:
    """A tree of ``sizes`` (from, to) relative to the nominal one."""
    leaves = rng.uniform((0.17, 0.30, 0.10), (0.39, 0.43, 0.15))
    height = rng.uniform(*sizes)
    spread = height * rng.uniform(0.55, 0.9)
    turned = (*pose[:2], rng.uniform(-math.pi, math.pi))
    return things.TREE, turned, leaves, (spread, spread, height)


@dataclass
class World:
    """Everything that a keyframe's sensors see."""

    scene: Scene
    timestamp: int  # microseconds
    solids: Solids
    lit: np.ndarray  # (P,) bool, whether the sun reaches each of ``solids`` past the buildings
    ground: list[Raster]  # as for sample_ground
    placed: list[tuple[Actor, Pose]]  # the annotated things within 100 m of the car


def frame_world(plan: Plan, scene_index: int, sample: int) -> World:
    """The frozen world of one keyframe; the same for the same arguments."""
    scene = build_scene(plan, scene_index)
    arm = scene.layout.arms[0]
    timestamp = scene.timestamp(sample)
    time = scene.seconds(timestamp)
    ego = scene.drive.pose(time)
    placed, groups = [], [scene.solids, place(solids.EGO_ID, things.EGO_BODY, ego)]
    for actor in scene.actors:
        pose = actor.pose(time)
        beyond = math.dist(pose[:2], arm.origin) > arm.end - 7  # where buildings stand
        if beyond or math.dist(pose[:2], ego[:2]) > ANNOTATED_WITHIN:
            continue
        placed.append((actor, pose))
        groups.append(place(actor.object_id, actor.model.parts, pose, actor.colour, actor.scale))
    everything = solids.join(groups)
    x, y, z = everything.centre.T
    shaded = (scene.ground.sample(x, y) >= SHADOW) & (z < 5)
    lit = ~shaded | (everything.material == Material.MASONRY)
    shadows = shadow_outlines(everything, scene.sun)
    levels = ((0.0125, 18.0), (0.04, 62.0))
    fine = [paint_ground(scene.layout, shadows, ego[:2], *level) for level in levels]
    return World(scene, timestamp, everything, lit, [*fine, scene.ground], placed)
