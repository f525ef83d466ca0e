"""Who is on the streets: parked, waiting and moving vehicles, people, cones and barriers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from occfeat_targets.demo_world.layout import Layout
from occfeat_targets.demo_world.motion import Actor, Path, lane_path
from occfeat_targets.demo_world.street import Street

_PAINTS = (
    (0.85, 0.85, 0.86),
    (0.07, 0.07, 0.08),
    (0.45, 0.46, 0.48),
    (0.62, 0.64, 0.66),
    (0.52, 0.05, 0.06),
    (0.07, 0.14, 0.36),
    (0.16, 0.22, 0.20),
    (0.72, 0.66, 0.52),
    (0.10, 0.32, 0.52),
    (0.76, 0.40, 0.08),
)
_CLOTHES = (
    (0.66, 0.12, 0.12),
    (0.13, 0.22, 0.46),
    (0.12, 0.12, 0.13),
    (0.80, 0.78, 0.74),
    (0.20, 0.42, 0.24),
    (0.76, 0.56, 0.16),
    (0.42, 0.27, 0.46),
    (0.35, 0.38, 0.42),
)


class _Crowd:
    """Collects actors and numbers them from 1."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.actors: list[Actor] = []

    def add(
        self,
        category: str,
        attribute: str,
        size,
        path: Path,
        offset: float = 0.0,
        speed: float = 0.0,
        rider: bool = False,
        gait: bool = False,
        colour=None,
    ) -> None:
        palette = _CLOTHES if category.startswith("human") else _PAINTS
        colour = colour or palette[int(self.rng.integers(len(palette)))]
        self.actors.append(
            Actor(
                len(self.actors) + 1,
                category,
                attribute,
                tuple(round(float(v), 3) for v in size),
                path,
                offset,
                speed,
                colour,
                float(self.rng.random()),
                rider,
                gait,
            )
        )

    def vehicle(
        self, category: str, attribute: str, path: Path, speed: float = 0.0, rider: bool = False
    ) -> None:
        size, colour = _vehicle_size(self.rng, category)
        self.add(category, attribute, size, path, 0.0, speed, rider, colour=colour)


def populate(layout: Layout, rng: np.random.Generator, ego: Path, ego_speed: float) -> list[Actor]:
    """Draw the annotated things of a scene at random.

    Args:
        layout: the scene's streets.
        rng: source of all random choices.
        ego: path of the ego car, whose lane's traffic keeps the car's speed.
        ego_speed: m/s.

    Returns:
        Actors with ids 1, 2, ...; some may be in the ego car's way: the caller drops them.
    """
    crowd = _Crowd(rng)
    occupancy = float(rng.uniform(0.45, 0.85))
    for x, y, heading in layout.bays:
        if rng.random() < occupancy:
            turn = heading + (math.pi if rng.random() < 0.08 else 0.0) + rng.normal(0, 0.015)
            category = _pick(
                rng,
                ("vehicle.car", 0.93),
                ("vehicle.motorcycle", 0.04),
                ("vehicle.emergency.police", 0.03),
            )
            attribute = (
                "cycle.without_rider" if category == "vehicle.motorcycle" else "vehicle.parked"
            )
            crowd.vehicle(category, attribute, Path((x, y, turn)))
    for street in layout.streets:
        _driving(crowd, layout, street, ego_speed)
        _walking(crowd, street, len(layout.streets) > 1)
    for street, s0, s1 in layout.crossings:
        _crossing(crowd, street, s0, s1)
    _roadworks(crowd, layout.streets[0])
    return crowd.actors


def _pick(rng: np.random.Generator, *choices: tuple[str, float]) -> str:
    weights = np.array([weight for _, weight in choices])
    return choices[int(rng.choice(len(choices), p=weights / weights.sum()))][0]


def _vehicle_size(rng: np.random.Generator, category: str):
    """Size (width, length, height) in metres and colour (None: any) of a vehicle."""
    scale = rng.uniform(0.95, 1.05)
    fixed = {
        "vehicle.bus.rigid": ((2.75, 11.2, 3.25), None),
        "vehicle.truck": ((2.35, 7.0, 2.95), None),
        "vehicle.construction": ((2.5, 6.6, 3.05), (0.90, 0.62, 0.06)),
        "vehicle.trailer": ((2.5, 9.5, 3.5), None),
        "vehicle.motorcycle": ((0.80, 2.10, 1.45), None),
        "vehicle.bicycle": ((0.62, 1.75, 1.25), None),
        "vehicle.emergency.police": ((1.95, 4.9, 1.60), (0.88, 0.89, 0.92)),
    }
    if category in fixed:
        size, colour = fixed[category]
        return [scale * v for v in size], colour
    body = rng.random()
    if body < 0.6:  # saloon or hatchback
        size = (rng.uniform(1.78, 1.92), rng.uniform(4.2, 4.9), rng.uniform(1.44, 1.54))
    elif body < 0.88:  # sport utility
        size = (rng.uniform(1.86, 2.0), rng.uniform(4.4, 5.0), rng.uniform(1.62, 1.74))
    else:  # van
        size = (rng.uniform(1.95, 2.1), rng.uniform(4.9, 5.5), rng.uniform(1.9, 2.25))
    return size, None


def _moving_category(rng: np.random.Generator) -> str:
    return _pick(
        rng,
        ("vehicle.car", 0.70),
        ("vehicle.truck", 0.09),
        ("vehicle.bus.rigid", 0.08),
        ("vehicle.motorcycle", 0.06),
        ("vehicle.bicycle", 0.04),
        ("vehicle.construction", 0.015),
        ("vehicle.trailer", 0.015),
    )


def _driving(crowd: _Crowd, layout: Layout, street: Street, ego_speed: float) -> None:
    """Vehicles in the lanes of a street or arm."""
    rng = crowd.rng
    section = street.section
    junction = len(layout.streets) > 1
    main = street.corner is not None or not junction
    for lane in range(section.lanes):
        for forward in (True, False):
            t = (-1 if forward else 1) * section.lane_centre(lane)
            # Arms: whoever comes towards the junction waits, unless it has the green light.
            waiting = junction and not forward and (not main or layout.kind == "turn")
            speed = ego_speed if main and lane == 0 else ego_speed + float(rng.uniform(-0.5, 2.5))
            if waiting:
                line = street.start + 3.5 + 0.8 + 3.2 + 1.6
                for s in _queue(rng, line):
                    category = _moving_category(rng)
                    crowd.vehicle(
                        category,
                        "cycle.with_rider" if _cycle(category) else "vehicle.stopped",
                        lane_path(street, s, t, False),
                        0.0,
                        True,
                    )
                continue
            begin = street.start + (16 if junction else 4)
            if junction and forward and not main:
                speed = 6.0
            s = begin + float(rng.uniform(0, 16))
            while s < street.end - 8:
                category = _moving_category(rng)
                crowd.vehicle(
                    category,
                    "cycle.with_rider" if _cycle(category) else "vehicle.moving",
                    lane_path(street, s, t, forward),
                    speed,
                    True,
                )
                s += float(rng.uniform(13, 42))


def _cycle(category: str) -> bool:
    return category in ("vehicle.motorcycle", "vehicle.bicycle")


def _queue(rng: np.random.Generator, line: float) -> Iterator[float]:
    """Centres of a few vehicles waiting behind a stop line, far enough apart for buses."""
    s = line + 6.5
    for _ in range(int(rng.integers(0, 4))):
        yield s
        s += float(rng.uniform(13.5, 15))


def _person(crowd: _Crowd, path: Path, speed: float) -> None:
    rng = crowd.rng
    child = rng.random() < 0.08
    height = rng.uniform(1.1, 1.4) if child else rng.uniform(1.58, 1.92)
    category = "human.pedestrian.child" if child else "human.pedestrian.adult"
    crowd.add(
        category,
        "pedestrian.moving" if speed else "pedestrian.standing",
        (0.32 * height + 0.03, 0.30 * height, height),
        path,
        0.0,
        speed,
        gait=speed > 0,
    )


def _walking(crowd: _Crowd, street: Street, junction: bool) -> None:
    """People and bicycles on both sidewalks."""
    rng = crowd.rng
    section = street.section
    inner, outer = section.road + section.parking + 1.3, section.edge - 0.5
    for side in (-1, 1):
        begin = street.start + (3 if junction else 0)
        s = begin + float(rng.uniform(0, 6))
        while s < street.end - 5:
            t = side * float(rng.uniform(inner, outer))
            speed = float(rng.uniform(0.8, 1.6)) if rng.random() < 0.8 else 0.0
            _person(crowd, lane_path(street, s, t, bool(rng.random() < 0.5)), speed)
            if rng.random() < 0.12:
                crowd.vehicle(
                    "vehicle.bicycle",
                    "cycle.without_rider",
                    lane_path(street, s + 2.4, side * (outer + 0.1), True),
                )
            s += float(rng.gamma(2.0, 5.0) + 1.2)


def _crossing(crowd: _Crowd, street: Street, s0: float, s1: float) -> None:
    """People on a crosswalk, walking across."""
    rng = crowd.rng
    for _ in range(int(rng.integers(1, 4))):
        up = bool(rng.random() < 0.5)
        s = float(rng.uniform(s0 + 0.6, s1 - 0.6))
        t = float(rng.uniform(-1, 1)) * street.section.road
        x, y = street.xy(s, t)
        heading = street.heading_at(s) + (math.pi / 2 if up else -math.pi / 2)
        _person(crowd, Path((float(x), float(y), heading)), float(rng.uniform(0.9, 1.5)))


def _roadworks(crowd: _Crowd, street: Street) -> None:
    """A short row of cones and barriers at the outer edge of the road."""
    rng = crowd.rng
    s = street.start + float(rng.uniform(25, 70))
    side = -1 if rng.random() < 0.5 else 1
    t = side * (street.section.road - 0.4)
    for number in range(5):
        crowd.add(
            "movable_object.trafficcone",
            "",
            (0.42, 0.42, 0.78),
            lane_path(street, s + 2.2 * number, t, True),
        )
    for number in range(2):
        crowd.add(
            "movable_object.barrier",
            "",
            (0.5, 1.9, 1.0),
            lane_path(street, s + 13 + 2.6 * number, t, True),
        )
