"""One scene of the demo drive: its place on the map, streets, buildings, traffic and ego path."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from occfeat_targets.demo_world import scenery
from occfeat_targets.demo_world.ground import StaticGround
from occfeat_targets.demo_world.layout import KINDS, Layout, build_layout
from occfeat_targets.demo_world.motion import Actor, Path, in_the_way, lane_path
from occfeat_targets.demo_world.primitives import SolidBuilder, Solids
from occfeat_targets.demo_world.rig import KEYFRAME_SECONDS, quaternion_from_euler
from occfeat_targets.demo_world.street import Street
from occfeat_targets.demo_world.traffic import populate

MAP_SIZE = (2979.5, 2118.1)
FIRST_STATIC_ID = 100_000
_START_US = 1_532_402_900_000_000


@dataclass(frozen=True)
class Plan:
    """What a demo world is made of: everything else follows from these four values."""

    scenes: int
    samples: int
    seed: int
    version: str


@dataclass
class Scene:
    """A scene, fixed but for the time.

    ``origin`` (x, y) and ``yaw`` place the scene frame in the global frame. ``actors``
    are annotated things, ids from 1; ``solids`` what stands still and is not annotated, ids from
    FIRST_STATIC_ID; ``sun`` (3,) unit vector towards the sun, global; ``style`` (4,) in 0..1.
    """

    plan: Plan
    index: int
    origin: tuple[float, float]
    yaw: float
    layout: Layout
    ego_path: Path
    ego_speed: float
    wobble: float
    actors: list[Actor]
    solids: Solids
    ground: StaticGround
    sun: np.ndarray
    style: np.ndarray

    def timestamp(self, sample: int) -> int:
        """Timestamp of a keyframe (that of its lidar turn), microseconds."""
        jitter = (self.index * 7919 + sample * 104_729) % 4001 - 2000
        return _START_US + self.index * 120_000_000 + jitter + int(sample * KEYFRAME_SECONDS * 1e6)

    def seconds(self, timestamp: int) -> float:
        """Scene time of a timestamp, in seconds; 0 at the first keyframe."""
        return (timestamp - self.timestamp(0)) / 1e6

    def ego_pose(self, timestamp: int) -> tuple[list[float], list[float]]:
        """Global pose of the car: translation (3,) metres and quaternion wxyz (4,)."""
        time = self.seconds(timestamp)
        x, y, heading = self.to_global(self.ego_path.pose(self.ego_speed * time))
        pitch = self.wobble * (0.4 + math.sin(2.3 * time + self.index))
        roll = self.wobble * 0.7 * math.sin(1.7 * time + 2 * self.index)
        return [x, y, 0.0], quaternion_from_euler(heading, pitch, roll)

    def to_global(self, pose: tuple[float, float, float]) -> tuple[float, float, float]:
        """Global (x, y, heading) of a pose in the scene frame."""
        x, y = self.xy_global(np.array(pose[:2]))
        return float(x), float(y), pose[2] + self.yaw

    def xy_global(self, xy: np.ndarray) -> np.ndarray:
        """Global coordinates (..., 2) of scene points (..., 2)."""
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        return np.stack(
            [
                self.origin[0] + cos * xy[..., 0] - sin * xy[..., 1],
                self.origin[1] + sin * xy[..., 0] + cos * xy[..., 1],
            ],
            axis=-1,
        )


def cell_of(plan: Plan, index: int) -> tuple[tuple[float, float], float]:
    """Centre (x, y) of a scene's own cell of the map and the radius around it that it may use."""
    columns = max(1, math.ceil(math.sqrt(plan.scenes * MAP_SIZE[0] / MAP_SIZE[1])))
    rows = math.ceil(plan.scenes / columns)
    width, height = MAP_SIZE[0] / columns, MAP_SIZE[1] / rows
    centre = ((index % columns + 0.5) * width, (index // columns + 0.5) * height)
    return centre, min(min(width, height) / 2 - 16, 200.0)


@lru_cache(maxsize=2)
def build_scene(plan: Plan, index: int) -> Scene:
    """Draw a scene at random from the plan's seed; the same for the same arguments."""
    rng = np.random.default_rng([plan.seed, index, 1])
    origin, radius = cell_of(plan, index)
    kind = KINDS[index % len(KINDS)]
    yaw = float(rng.uniform(-math.pi, math.pi))
    layout = build_layout(rng, kind, radius)
    duration = (plan.samples - 1) * KEYFRAME_SECONDS + 0.1
    top = (4.0, 6.0) if kind == "turn" else (3.0, 12.0)
    speed = min(float(rng.uniform(*top)), 2 * (radius - 75) / duration)
    path = _ego_path(layout, speed * duration, rng)
    style = rng.random(4)
    elevation, azimuth = rng.uniform(0.6, 1.05), rng.uniform(-math.pi, math.pi)
    sun = np.array(
        [
            math.cos(azimuth) * math.cos(elevation),
            math.sin(azimuth) * math.cos(elevation),
            math.sin(elevation),
        ]
    )
    actors = populate(layout, rng, path, speed)
    times = np.arange(-0.25, duration + 0.25, 0.25)
    ego = [path.pose(speed * time) for time in times]
    actors = [
        actor
        for actor in actors
        if not any(in_the_way(actor, time, pose) for time, pose in zip(times, ego, strict=True))
    ]
    scene = Scene(
        plan,
        index,
        origin,
        yaw,
        layout,
        path,
        speed,
        0.012 * (index % 3),
        actors,
        SolidBuilder().build(),
        None,
        sun,
        style,
    )
    scene.solids = _static_solids(scene, rng, radius)
    sun_scene = _turn(sun, -yaw)
    scene.ground = StaticGround(layout, radius + 45, style, _buildings_of(scene), sun_scene)
    return scene


def _turn(vector: np.ndarray, yaw: float) -> np.ndarray:
    cos, sin = math.cos(yaw), math.sin(yaw)
    return np.array(
        [cos * vector[0] - sin * vector[1], sin * vector[0] + cos * vector[1], vector[2]]
    )


def _ego_path(layout: Layout, length: float, rng: np.random.Generator) -> Path:
    """The ego car's path: straight through, along the arc, or a turn at the junction."""
    section = layout.streets[0].section
    lane = section.lane_centre(0)
    if layout.kind == "turn":
        across = layout.streets[1].section
        radius = 9.0
        if rng.random() < 0.4:  # right turn, from and to the outermost lanes
            radius = 3.5 + section.lane / 2
            lane, turned = (
                section.lane_centre(section.lanes - 1),
                across.lane_centre(across.lanes - 1),
            )
            corner, curvature = -turned - radius, -1 / radius
        else:
            corner, curvature = across.lane_centre(0) - radius, 1 / radius
        before = max(4.0, 0.35 * length)
        return Path(
            (corner - before, -lane, 0.0),
            ((before, 0.0), (radius * math.pi / 2, curvature), (1.0, 0.0)),
        )
    if layout.kind == "curve":
        return lane_path(layout.streets[0], -length / 2, -lane, True)
    start = -length * 0.6 - (22.0 if layout.kind == "cross" and length < 60 else 0.0)
    return Path((start, -lane, 0.0))


def _static_solids(scene: Scene, rng: np.random.Generator, radius: float) -> Solids:
    """Buildings, trees, lamps and street furniture, in the global frame."""
    out = SolidBuilder()
    ids = iter(range(FIRST_STATIC_ID, 10 * FIRST_STATIC_ID))

    def begin(x: float, y: float, heading: float) -> None:
        out.begin(*scene.to_global((x, y, heading)), next(ids))

    placed: list[np.ndarray] = []
    layout = scene.layout
    for street in layout.streets:
        for side in (-1, 1):
            _row_of_buildings(begin, out, rng, layout, street, side, placed)
    _far_buildings(begin, out, rng, layout, radius, placed)
    for street in layout.streets:
        for side in (-1, 1):
            _kerbside(begin, out, rng, layout, street, side, scene.style)
    for street, s0, s1 in layout.islands:
        for s in np.arange(s0 + 3, s1 - 2, 7.5):
            begin(*street.xy(s, 0.0), 0.0)
            scenery.add_tree(
                out,
                float(rng.uniform(3.6, 5)),
                float(rng.uniform(0.9, 1.3)),
                _leaves(rng),
                float(rng.random()),
            )
    return out.build()


def _buildings_of(scene: Scene) -> list[tuple[np.ndarray, float]]:
    """Footprints (4, 2) in the scene frame and heights of the larger buildings, for shadows."""
    solids = scene.solids
    large = np.flatnonzero(solids.half[:, :2].min(axis=1) > 3.0)
    corners = solids.corners()[large][:, [0, 4, 6, 2], :2] - np.array(scene.origin)
    cos, sin = math.cos(-scene.yaw), math.sin(-scene.yaw)
    turned = np.stack(
        [
            cos * corners[..., 0] - sin * corners[..., 1],
            sin * corners[..., 0] + cos * corners[..., 1],
        ],
        axis=-1,
    )
    tops = solids.centre[large, 2] + solids.half[large, 2]
    return list(zip(turned, tops, strict=True))


def _free(xy: np.ndarray, layout: Layout) -> bool:
    """Whether no point (N, 2) lies on a street, a sidewalk or in a parking lot."""
    for street in layout.streets:
        s, t = street.st(xy)
        begin = street.start if len(layout.streets) == 1 else 0.0
        if np.any(
            (np.abs(t) < street.section.edge + 0.05) & (s > begin - 8) & (s < street.end + 1)
        ):
            return False
    for street, s0, s1, t0, t1 in layout.lots:
        s, t = street.st(xy)
        if np.any((s > s0 - 1) & (s < s1 + 1) & (t > t0 - 1) & (t < t1 + 1)):
            return False
    return True


def _footprint(x, y, heading, length, depth) -> np.ndarray:
    """Points (49, 2) covering a building's footprint."""
    a, b = np.meshgrid(np.linspace(-0.5, 0.5, 7) * length, np.linspace(-0.5, 0.5, 7) * depth)
    cos, sin = math.cos(heading), math.sin(heading)
    return np.stack([x + cos * a - sin * b, y + sin * a + cos * b], axis=-1).reshape(-1, 2)


_WALLS = (
    (0.58, 0.33, 0.25),
    (0.72, 0.66, 0.55),
    (0.62, 0.62, 0.62),
    (0.48, 0.28, 0.22),
    (0.82, 0.78, 0.70),
    (0.42, 0.46, 0.52),
    (0.70, 0.55, 0.42),
    (0.55, 0.60, 0.56),
)


def _row_of_buildings(begin, out, rng, layout, street: Street, side: int, placed) -> None:
    """Buildings along one side of a street, facing it."""
    s = street.start + float(rng.uniform(0, 4)) - (10 if len(layout.streets) == 1 else 0)
    setback = float(rng.choice([0.0, 0.5, 3.0]))
    while s < street.end:
        length, depth = float(rng.uniform(11, 26)), float(rng.uniform(11, 17))
        height = float(rng.uniform(7, 20) if rng.random() < 0.8 else rng.uniform(22, 42))
        middle = s + length / 2
        # On the inner side of an arc the straight front would cut into the sidewalk.
        sag = abs(street.curvature) * length * length / 8 + 0.1
        t = side * (street.section.edge + setback + sag + depth / 2)
        x, y = street.xy(middle, t)
        heading = street.heading_at(middle) + (math.pi if side > 0 else 0.0)
        points = _footprint(x, y, heading, length, depth)
        if _free(points, layout) and not _overlaps(points, placed):
            placed.append(points)
            wall = np.array(_WALLS[int(rng.integers(len(_WALLS)))]) * rng.uniform(0.85, 1.12)
            trim = np.full(3, rng.uniform(0.35, 0.85)) * [1.0, 0.98, 0.94]
            begin(x, y, heading)
            scenery.add_building(
                out, length, depth, height, tuple(wall), tuple(trim), float(rng.random())
            )
            s += length + (0.0 if rng.random() < 0.55 else float(rng.uniform(2, 9)))
        else:
            s += 3.0


def _overlaps(points: np.ndarray, placed) -> bool:
    return any(
        np.min(np.sum((points[:, None] - other[None]) ** 2, axis=-1)) < 2.0
        for other in placed
        if np.sum((points[24] - other[24]) ** 2) < 1600
    )


def _far_buildings(begin, out, rng, layout, radius, placed) -> None:
    """Buildings that close the streets' ends, and a few towers behind the first row."""
    for street in layout.streets:
        ends = [street.end + 9] + ([street.start - 9] if len(layout.streets) == 1 else [])
        for s in ends:
            for t in (-13.0, 13.0):
                x, y = street.xy(s, t)
                begin(x, y, street.heading_at(s) + math.pi / 2)
                scenery.add_building(
                    out,
                    26.0,
                    12.0,
                    float(rng.uniform(9, 24)),
                    _WALLS[int(rng.integers(len(_WALLS)))],
                    (0.6, 0.58, 0.55),
                    float(rng.random()),
                )
    for _ in range(26):
        angle, distance = rng.uniform(-math.pi, math.pi), rng.uniform(50, radius + 10)
        length, depth = rng.uniform(14, 26, 2)
        points = _footprint(
            distance * math.cos(angle), distance * math.sin(angle), angle, length, depth
        )
        if _free(points, layout) and not _overlaps(points, placed):
            placed.append(points)
            begin(*points[24], angle)
            scenery.add_building(
                out,
                float(length),
                float(depth),
                float(rng.uniform(22, 60)),
                _WALLS[int(rng.integers(len(_WALLS)))],
                (0.5, 0.5, 0.5),
                float(rng.random()),
            )


def _leaves(rng: np.random.Generator) -> tuple[float, float, float]:
    green = rng.uniform(0.8, 1.15)
    return (float(0.24 * green * rng.uniform(0.8, 1.5)), float(0.37 * green), float(0.13 * green))


def _kerbside(begin, out, rng, layout, street: Street, side: int, style) -> None:
    """Trees, lamps, shelters and signals on one sidewalk."""
    section = street.section
    junction = len(layout.streets) > 1
    start = street.start + (9.5 if junction else 3)
    kerb = side * (section.road + section.parking + 0.55)
    turned = street.heading + (math.pi if side > 0 else 0.0)
    spacing = float(rng.uniform(8, 16))
    for s in np.arange(start, street.end - 2, spacing):
        if any(s0 - 2 < s < s1 + 2 for owner, s0, s1 in layout.crossings if owner is street):
            continue
        if rng.random() < 0.35 + 0.6 * style[3]:
            begin(*street.xy(s, kerb), 0.0)
            scenery.add_tree(
                out,
                float(rng.uniform(5, 9)),
                float(rng.uniform(1.3, 2.1)),
                _leaves(rng),
                float(rng.random()),
            )
    for s in np.arange(start + spacing / 2, street.end - 2, 2 * spacing):
        begin(*street.xy(s, kerb), turned + street.curvature * s)
        scenery.add_lamp(out, 7.5)
    if section.walk > 3.2 and rng.random() < 0.7:
        s = street.start + float(rng.uniform(20, 60))
        begin(*street.xy(s, side * (section.edge - 1.0)), turned + street.curvature * s)
        scenery.add_shelter(out)
    if junction and side < 0:
        begin(*street.xy(street.start + 8.2, section.edge - 1.4), street.heading)
        scenery.add_signal(out, street.corner is not None)
