"""Paths along streets, and the things that drive, walk or stand in a scene."""

from __future__ import annotations

import math
from dataclasses import dataclass

from occfeat_targets.demo_world.street import Street


@dataclass(frozen=True)
class Path:
    """A planar path of pieces with constant curvature.

    ``start`` (x, y, heading) in the scene frame; ``pieces`` (length in metres, curvature in 1/m);
    the first piece also reaches backwards and the last one forwards without end.
    """

    start: tuple[float, float, float]
    pieces: tuple[tuple[float, float], ...] = ((1.0, 0.0),)

    def pose(self, distance: float) -> tuple[float, float, float]:
        """Pose (x, y, heading) after a distance in metres (may be negative)."""
        x, y, heading = self.start
        rest = distance
        for number, (length, curvature) in enumerate(self.pieces):
            last = number == len(self.pieces) - 1
            step = rest if last else min(rest, length)
            x, y, heading = _advance(x, y, heading, step, curvature)
            rest -= step
            if rest <= 0:
                break
        return x, y, heading


def _advance(x, y, heading, step, curvature):
    if curvature:
        turned = heading + curvature * step
        return (
            x + (math.sin(turned) - math.sin(heading)) / curvature,
            y - (math.cos(turned) - math.cos(heading)) / curvature,
            turned,
        )
    return x + step * math.cos(heading), y + step * math.sin(heading), heading


def lane_path(street: Street, s: float, t: float, forward: bool) -> Path:
    """Path along a street at lateral position ``t``, starting at ``s``, towards +s or -s."""
    x, y = street.xy(s, t)
    heading = street.heading_at(s) + (0.0 if forward else math.pi)
    curvature = street.curvature / (1 - street.curvature * t)
    return Path((float(x), float(y), heading), ((1.0, curvature if forward else -curvature),))


@dataclass(frozen=True)
class Actor:
    """An annotated thing.

    ``size`` (width, length, height) metres as in nuScenes; ``offset`` metres along the path at time
    0 and ``speed`` m/s; ``rider`` for two-wheelers; ``gait`` True if it walks.
    """

    object_id: int
    category: str
    attribute: str
    size: tuple[float, float, float]
    path: Path
    offset: float
    speed: float
    colour: tuple[float, float, float]
    seed: float
    rider: bool = False
    gait: bool = False

    def pose(self, time: float) -> tuple[float, float, float]:
        """Pose (x, y, heading) in the scene frame, ``time`` seconds after the first keyframe."""
        return self.path.pose(self.offset + self.speed * time)


def in_the_way(actor: Actor, time: float, ego: tuple[float, float, float]) -> bool:
    """Whether an actor's box comes close to the ego car, whose pose is (x, y, heading)."""
    x, y, heading = actor.pose(time)
    dx, dy = x - ego[0], y - ego[1]
    cos, sin = math.cos(ego[2]), math.sin(ego[2])
    along, across = cos * dx + sin * dy - 1.4, -sin * dx + cos * dy
    turn = heading - ego[2]
    width, length = actor.size[0] / 2, actor.size[1] / 2
    reach = abs(length * math.cos(turn)) + abs(width * math.sin(turn))
    breadth = abs(length * math.sin(turn)) + abs(width * math.cos(turn))
    return abs(along) < reach + 3.6 and abs(across) < breadth + 1.15
