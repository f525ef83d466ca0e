"""Who is in the streets: parked, waiting and moving vehicles, people, cones and barriers.

A pose is (x, y, heading) in the scene frame, metres and radians.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from occfeat_targets.demo_world.layout import CROSSWALK, STOP_LINE, Arm, Layout
from occfeat_targets.demo_world.surface import Colour
from occfeat_targets.demo_world.things import MODELS, Model

Pose = tuple[float, float, float]

#: What drives in the lanes, what is parked, and how often.
_MOVING = {
    "vehicle.car": 0.68,
    "vehicle.truck": 0.09,
    "vehicle.bus.rigid": 0.08,
    "vehicle.motorcycle": 0.06,
    "vehicle.bicycle": 0.05,
    "vehicle.construction": 0.02,
    "vehicle.trailer": 0.02,
}
_PARKED = {"vehicle.car": 0.93, "vehicle.motorcycle": 0.04, "vehicle.emergency.police": 0.03}
_VEHICLE_COLOURS = (
    (0.85, 0.85, 0.86),
    (0.07, 0.07, 0.08),
    (0.45, 0.46, 0.48),
    (0.62, 0.64, 0.66),
    (0.52, 0.05, 0.06),
    (0.07, 0.14, 0.36),
    (0.16, 0.22, 0.20),
    (0.72, 0.66, 0.52),
    (0.76, 0.40, 0.08),
)
_CLOTHES = (
    (0.66, 0.12, 0.12),
    (0.13, 0.22, 0.46),
    (0.12, 0.12, 0.13),
    (0.80, 0.78, 0.74),
    (0.20, 0.42, 0.24),
    (0.76, 0.56, 0.16),
)


@dataclass(frozen=True)
class Actor:
    """An annotated thing, which keeps its direction and its ``speed`` in m/s.

    ``start`` is its pose at the first keyframe, ``scale`` its size relative to the nominal one of
    its ``model``.
    """

    object_id: int
    category: str
    attribute: str
    model: Model
    scale: float
    colour: Colour
    start: Pose
    speed: float

    @property
    def size(self) -> tuple[float, float, float]:
        """Width, length, height of the box in metres, as in nuScenes."""
        return tuple(round(self.scale * extent, 3) for extent in self.model.size)

    def pose(self, time: float) -> Pose:
        """Pose ``time`` seconds after the first keyframe."""
        x, y, heading = self.start
        step = self.speed * time
        return x + step * math.cos(heading), y + step * math.sin(heading), heading


def in_the_way(actor: Actor, time: float, ego: Pose) -> bool:
    """Whether an actor's box comes close to the ego car."""
    x, y, heading = actor.pose(time)
    cos, sin = math.cos(ego[2]), math.sin(ego[2])
    dx, dy = x - ego[0], y - ego[1]
    along, across = cos * dx + sin * dy - 1.4, -sin * dx + cos * dy
    turn = heading - ego[2]
    width, length = actor.size[0] / 2, actor.size[1] / 2
    reach = abs(length * math.cos(turn)) + abs(width * math.sin(turn))
    breadth = abs(length * math.sin(turn)) + abs(width * math.cos(turn))
    return abs(along) < reach + 3.6 and abs(across) < breadth + 1.15


class _Crowd:
    """Collects actors and numbers them from 1."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.actors: list[Actor] = []

    def add(
        self, category: str, start: Pose, attribute: str, speed: float = 0.0, variant: str = ""
    ) -> None:
        """Add something of a category, at random scale and colour."""
        rng = self.rng
        human = category.startswith("human")
        models = MODELS["human.pedestrian" if human else category, variant]
        model = models[int(rng.choice(len(models), p=[model.share for model in models]))]
        spread = {"human.pedestrian.child": (0.63, 0.80), "human.pedestrian.adult": (0.90, 1.09)}
        palette = _CLOTHES if human else _VEHICLE_COLOURS
        self.actors.append(
            Actor(
                len(self.actors) + 1,
                category,
                attribute,
                model,
                float(rng.uniform(*spread.get(category, (0.96, 1.05)))),
                model.colour or palette[int(rng.integers(len(palette)))],
                start,
                speed,
            )
        )

    def vehicle(self, shares: dict[str, float], start: Pose, state: str, speed: float) -> None:
        """Add a vehicle; ``state`` is "moving", "stopped" or "parked"."""
        category = str(self.rng.choice(list(shares), p=list(shares.values())))
        if (category, "rider") not in MODELS:
            self.add(category, start, f"vehicle.{state}", speed)
        elif state == "parked":
            self.add(category, start, "cycle.without_rider")
        else:
            self.add(category, start, "cycle.with_rider", speed, "rider")

    def person(self, start: Pose, speed: float) -> None:
        """Add an adult or, seldom, a child."""
        category = "human.pedestrian." + ("child" if self.rng.random() < 0.08 else "adult")
        if speed:
            self.add(category, start, "pedestrian.moving", speed, "walker")
        else:
            self.add(category, start, "pedestrian.standing")


def populate(
    layout: Layout, rng: np.random.Generator, ego_speed: float, ego_turns: bool
) -> list[Actor]:
    """Draw the annotated things of a scene at random.

    Args:
        layout: the scene's streets.
        rng: source of all random choices.
        ego_speed: of the ego car in m/s, which the traffic around it keeps.
        ego_turns: whether the ego car turns at the junction: then all others wait for it.

    Returns:
        Actors with ids 1, 2, ...; some may be in the ego car's way: the caller drops them.
    """
    crowd = _Crowd(rng)
    occupancy = float(rng.uniform(0.45, 0.85))
    for x, y, heading in layout.bays:
        if rng.random() < occupancy:
            turn = (math.pi if rng.random() < 0.08 else 0.0) + float(rng.normal(0, 0.015))
            crowd.vehicle(_PARKED, (x, y, heading + turn), "parked", 0.0)
    for number, arm in enumerate(layout.arms):
        main = number % 2 == 0
        for lane in range(arm.section.lanes):
            speed = ego_speed if main else 6.0
            _outwards(crowd, arm, lane, speed + (float(rng.uniform(0, 2.5)) if lane else 0.0))
            _inwards(crowd, arm, lane, 0.0 if ego_turns or not main else ego_speed)
        _on_sidewalks(crowd, arm)
        _on_crosswalk(crowd, arm)
    _roadworks(crowd, layout.arms[int(rng.integers(2)) * 2])
    return crowd.actors


def _along(arm: Arm, s: float, t: float, outwards: bool) -> Pose:
    """Pose at (s, t) of an arm, along it."""
    x, y = arm.xy(s, t)
    return float(x), float(y), arm.heading + (0.0 if outwards else math.pi)


def _places(rng: np.random.Generator, begin: float, end: float, gap) -> Iterator[float]:
    """Random places from ``begin`` to ``end`` with distances uniform in ``gap`` (from, to)."""
    s = begin + float(rng.uniform(0, gap[0]))
    while s < end:
        yield s
        s += float(rng.uniform(*gap))


def _outwards(crowd: _Crowd, arm: Arm, lane: int, speed: float) -> None:
    """Vehicles that drive away from the junction."""
    t = -arm.section.lane_centre(lane)
    for s in _places(crowd.rng, arm.start + 16, arm.end - 8, (13, 42)):
        crowd.vehicle(_MOVING, _along(arm, s, t, True), "moving", speed)


def _inwards(crowd: _Crowd, arm: Arm, lane: int, speed: float) -> None:
    """Vehicles that drive towards the junction; with no speed, a queue behind the stop line."""
    t = arm.section.lane_centre(lane)
    line = arm.start + STOP_LINE + 7
    end = arm.end - 8 if speed else line + 13.6 * crowd.rng.uniform(0, 3)
    for s in _places(crowd.rng, line, end, (13, 42) if speed else (13.5, 15)):
        crowd.vehicle(_MOVING, _along(arm, s, t, False), "moving" if speed else "stopped", speed)


def _on_sidewalks(crowd: _Crowd, arm: Arm) -> None:
    """People and parked bicycles on both sidewalks."""
    rng, section = crowd.rng, arm.section
    for side in (-1, 1):
        for s in _places(rng, arm.start + 3, arm.end - 5, (2, 22)):
            t = side * float(rng.uniform(section.road + section.parking + 1.3, section.edge - 0.5))
            speed = float(rng.uniform(0.8, 1.6)) if rng.random() < 0.8 else 0.0
            crowd.person(_along(arm, s, t, bool(rng.random() < 0.5)), speed)
            if rng.random() < 0.12:
                bicycle = _along(arm, s + 2.4, side * (section.edge - 0.4), True)
                crowd.add("vehicle.bicycle", bicycle, "cycle.without_rider")


def _on_crosswalk(crowd: _Crowd, arm: Arm) -> None:
    """People who walk across a street."""
    rng = crowd.rng
    for _ in range(int(rng.integers(1, 4))):
        s = arm.start + float(rng.uniform(CROSSWALK[0] + 0.6, CROSSWALK[1] - 0.6))
        x, y, heading = _along(arm, s, float(rng.uniform(-1, 1)) * arm.section.road, True)
        heading += math.copysign(math.pi / 2, rng.uniform(-1, 1))
        crowd.person((x, y, heading), float(rng.uniform(0.9, 1.5)))


def _roadworks(crowd: _Crowd, arm: Arm) -> None:
    """A short row of cones and barriers at the outer edge of the road."""
    s = arm.start + float(crowd.rng.uniform(15, 60))
    t = float(crowd.rng.choice([-1, 1])) * (arm.section.road - 0.4)
    for number in range(5):
        pose = _along(arm, s + 2.2 * number, t, True)
        crowd.add("movable_object.trafficcone", pose, "")
    for number in range(2):
        pose = _along(arm, s + 13 + 2.6 * number, t, True)
        crowd.add("movable_object.barrier", pose, "")
