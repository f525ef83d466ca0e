"""Streets and their own coordinates.

Scene frame: origin at the centre of the scene's cell of the map, x along the main street, y to its
left, metres. A street has its own coordinates (s, t): s along it, t to the left; it may be an arc.
Traffic keeps to the right: it moves towards +s where t < 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Section:
    """Cross-section of a street: widths in metres, lanes per direction."""

    lane: float
    lanes: int
    median: float
    parking: float
    walk: float

    @property
    def road(self) -> float:
        """Half width of the carriageway."""
        return self.median / 2 + self.lane * self.lanes

    @property
    def edge(self) -> float:
        """Distance from the centre line to the back of the sidewalk."""
        return self.road + self.parking + self.walk

    def lane_centre(self, lane: int) -> float:
        """Distance of a lane's centre from the centre line; lane 0 is the innermost."""
        return self.median / 2 + self.lane * (lane + 0.5)


@dataclass(frozen=True)
class Street:
    """A street or one arm of a junction, from s = ``start`` to s = ``end``.

    ``origin`` (2,) is the point s = 0, t = 0; ``heading`` radians there; ``curvature`` 1/m.
    ``corner`` is None, or for an arm that owns its junction corners the fillet radius.
    """

    section: Section
    origin: tuple[float, float]
    heading: float
    curvature: float
    start: float
    end: float
    corner: float | None = None

    def xy(self, s, t) -> np.ndarray:
        """Scene coordinates (N, 2) of street coordinates s, t (N,)."""
        s, t = np.broadcast_arrays(np.asarray(s, float), np.asarray(t, float))
        if self.curvature:
            angle = self.curvature * s
            along = (1 / self.curvature - t) * np.sin(angle)
            across = 1 / self.curvature - (1 / self.curvature - t) * np.cos(angle)
        else:
            along, across = s, t
        cos, sin = math.cos(self.heading), math.sin(self.heading)
        return np.stack(
            [
                self.origin[0] + cos * along - sin * across,
                self.origin[1] + sin * along + cos * across,
            ],
            axis=-1,
        )

    def st(self, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Street coordinates (s, t) of scene points (N, 2)."""
        dx, dy = xy[..., 0] - self.origin[0], xy[..., 1] - self.origin[1]
        cos, sin = math.cos(self.heading), math.sin(self.heading)
        along, across = cos * dx + sin * dy, -sin * dx + cos * dy
        if not self.curvature:
            return along, across
        radius = 1 / self.curvature
        sign = math.copysign(1.0, radius)
        s = np.arctan2(sign * along, sign * (radius - across)) * radius
        return s, radius - sign * np.hypot(along, radius - across)

    def heading_at(self, s: float) -> float:
        """Direction of +s at s, radians."""
        return self.heading + self.curvature * s

    def rectangle(self, s0: float, s1: float, t0: float, t1: float) -> np.ndarray:
        """Polygon (N, 2) of s0 <= s <= s1, t0 <= t <= t1, counter-clockwise, finely cut on arcs."""
        s = self._cut(s0, s1)
        return np.concatenate([self.xy(s, t0), self.xy(s[::-1], t1)])

    def line(self, s0: float, s1: float, t: float) -> np.ndarray:
        """Points (N, 2) along the street at one t."""
        return self.xy(self._cut(s0, s1), t)

    def _cut(self, s0: float, s1: float) -> np.ndarray:
        return np.linspace(s0, s1, 2 + int(abs(s1 - s0) / 2) if self.curvature else 2)
