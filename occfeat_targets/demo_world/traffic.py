"""Who is in the streets: parked, waiting and moving vehicles, people, cones and barriers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from occfeat_targets.demo_world.layout import CROSSWALK, STOP_LINE, Arm, Layout
from occfeat_targets.demo_world.solids import Pose
from occfeat_targets.demo_world.things import MODELS, Colour, Model

# What drives in the lanes, what is parked, and how often.
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
_COLOURS = (
    (0.85, 0.85, 0.86),
    (0.07, 0.07, 0.08),
    (0.45, 0.46, 0.48),
    (0.52, 0.05, 0.06),
    (0.07, 0.14, 0.36),
    (0.16, 0.30, 0.22),
    (0.72, 0.62, 0.45),
)
_SCALES = {"human.pedestrian.child": (0.63, 0.80), "human.pedestrian.adult": (0.90, 1.09)}


@dataclass(frozen=True)
class Actor:
    """An annotated thing, which keeps its direction and speed."""

    object_id: int
    category: str
    attribute: str
    model: Model
    scale: float  # relative to the model's nominal size
    colour: Colour
    start: Pose  # at the first keyframe
    speed: float  # m/s

    @property
    def size(self) -> tuple[float, float, float]:
        """Width, length, height of the box in metres, as in nuScenes."""
        width, length, height = (round(self.scale * extent, 3) for extent in self.model.size)
        return width, length, height

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
    cos, sin = abs(math.cos(heading - ego[2])), abs(math.sin(heading - ego[2]))
    width, length = actor.size[0] / 2, actor.size[1] / 2
    reach, breadth = length * cos + width * sin, length * sin + width * cos
    return abs(along) < reach + 3.6 and abs(across) < breadth + 1.15


class _Crowd:
    """Collects actors and numbers them from 1."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.actors: list[Actor] = []

    def add(self, category: str, start: Pose, attribute: str = "", speed: float = 0.0) -> None:
        """Add something of a category, at random scale and colour."""
        key = "human.pedestrian" if category.startswith("human") else category
        if attribute in ("cycle.with_rider", "pedestrian.moving"):
            key += ".moving"
        models = MODELS[key]
        model = models[self.rng.choice(len(models), p=[model.share for model in models])]
        scale = float(self.rng.uniform(*_SCALES.get(category, (0.96, 1.05))))
        colour = model.colour or _COLOURS[self.rng.integers(len(_COLOURS))]
        number = len(self.actors) + 1
        self.actors.append(Actor(number, category, attribute, model, scale, colour, start, speed))

    def vehicle(self, start: Pose, state: str, speed: float = 0.0) -> None:
        """Add a vehicle; ``state`` is "moving", "stopped" or "parked"."""
        shares = _PARKED if state == "parked" else _MOVING
        category = str(self.rng.choice(list(shares), p=list(shares.values())))
        attribute = f"vehicle.{state}"
        if f"{category}.moving" in MODELS:
            attribute = "cycle.without_rider" if state == "parked" else "cycle.with_rider"
        self.add(category, start, attribute, speed)

    def person(self, start: Pose, speed: float) -> None:
        """Add an adult or, seldom, a child."""
        category = "human.pedestrian." + ("child" if self.rng.random() < 0.08 else "adult")
        self.add(category, start, "pedestrian." + ("moving" if speed else "standing"), speed)


def populate(
    layout: Layout, rng: np.random.Generator, ego_speed: float, ego_turns: bool
) -> list[Actor]:
    """Draw the annotated things of a scene at random, with ids 1, 2, ...

    The traffic around the ego car keeps its speed (m/s); if it turns at the junction, all others
    wait for it. Some may still be in its way: the caller drops them.
    """
    crowd = _Crowd(rng)
    occupancy = float(rng.uniform(0.45, 0.85))
    for bay in layout.bays:
        if rng.random() < occupancy:
            crowd.vehicle(bay, "parked")
    for number, arm in enumerate(layout.arms):
        main = number % 2 == 0
        for lane in range(arm.section.lanes):
            speed = (ego_speed if main else 6.0) + (float(rng.uniform(0, 2.5)) if lane else 0.0)
            _in_lane(crowd, arm, lane, speed, ego_speed if main and not ego_turns else 0.0)
        for side in (-1, 1):  # people and parked bicycles on the sidewalks
            for s in _places(rng, arm.start + 3, arm.end - 5, (3, 24)):
                t = side * float(rng.uniform(arm.section.kerb + 1.3, arm.section.edge - 0.5))
                speed = float(rng.uniform(0.8, 1.6)) if rng.random() < 0.8 else 0.0
                crowd.person(arm.pose(s, t, math.pi * int(rng.integers(2))), speed)
                if rng.random() < 0.12:
                    bicycle = arm.pose(s + 2.4, side * (arm.section.edge - 0.4))
                    crowd.add("vehicle.bicycle", bicycle, "cycle.without_rider")
        for _ in range(int(rng.integers(1, 4))):  # people who walk across the street
            s = arm.start + float(rng.uniform(CROSSWALK[0] + 0.6, CROSSWALK[1] - 0.6))
            turn = math.copysign(math.pi / 2, rng.uniform(-1, 1))
            pose = arm.pose(s, float(rng.uniform(-1, 1)) * arm.section.road, turn)
            crowd.person(pose, float(rng.uniform(0.9, 1.5)))
    # A short row of cones and barriers at the outer edge of the road.
    arm = layout.arms[2 * int(rng.integers(2))]
    s, t = arm.start + float(rng.uniform(15, 60)), rng.choice([-1, 1]) * (arm.section.road - 0.4)
    for number in range(5):
        crowd.add("movable_object.trafficcone", arm.pose(s + 2.2 * number, t))
    for number in range(2):
        crowd.add("movable_object.barrier", arm.pose(s + 13 + 2.6 * number, t))
    return crowd.actors


def _places(rng: np.random.Generator, begin: float, end: float, gap) -> Iterator[float]:
    """Random places from ``begin`` to ``end`` with distances uniform in ``gap`` (from, to)."""
    s = begin + float(rng.uniform(0, gap[0]))
    while s < end:
        yield s
        s += float(rng.uniform(*gap))


def _in_lane(crowd: _Crowd, arm: Arm, lane: int, outwards: float, inwards: float) -> None:
    """Vehicles in a lane of both directions at their speeds; at 0 they queue at the stop line."""
    t = arm.section.lane_centre(lane)
    for s in _places(crowd.rng, arm.start + 16, arm.end - 8, (13, 42)):
        crowd.vehicle(arm.pose(s, -t), "moving", outwards)
    line = arm.start + STOP_LINE + 7
    end = arm.end - 8 if inwards else line + 13.6 * crowd.rng.uniform(0, 3)
    for s in _places(crowd.rng, line, end, (13, 42) if inwards else (13.5, 15)):
        crowd.vehicle(arm.pose(s, t, math.pi), "moving" if inwards else "stopped", inwards)
