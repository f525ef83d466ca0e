"""Layout of a scene: two crossing streets as the map's polygons, which the ground is painted from.

Scene frame: origin at the centre of the junction, x along the main street, y to its left, metres.
Traffic keeps to the right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from occfeat_targets.demo_world.surface import Material

_FILLET = 3.5
_LINE = 0.06
#: Where the crosswalk of an arm begins and ends, and its stop line, metres from the junction.
CROSSWALK, STOP_LINE = (4.3, 7.5), 8.4


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
class Arm:
    """One arm of the junction, in its own coordinates (s, t): s from the junction's centre
    outwards in direction ``heading`` (radians), t to the left; metres.

    It has a road from ``start`` and sidewalks from ``corner`` to ``end``; traffic drives outwards
    where t < 0. ``lot`` (s0, s1, side) is where a parking lot lies behind a sidewalk, or None.
    """

    section: Section
    heading: float
    start: float
    corner: float
    end: float
    lot: tuple[float, float, int] | None

    def xy(self, s, t) -> np.ndarray:
        """Scene coordinates (..., 2) of arm coordinates s, t (...,)."""
        s, t = np.broadcast_arrays(np.asarray(s, float), np.asarray(t, float))
        cos, sin = math.cos(self.heading), math.sin(self.heading)
        return np.stack([cos * s - sin * t, sin * s + cos * t], axis=-1)

    def rectangle(self, s0: float, s1: float, t0: float, t1: float) -> np.ndarray:
        """Polygon (4, 2) between s0 and s1, t0 and t1 (in any order), counter-clockwise."""
        t0, t1 = min(t0, t1), max(t0, t1)
        return self.xy([s0, s1, s1, s0], [t0, t0, t1, t1])


@dataclass(frozen=True)
class Polygon:
    """A polygon with holes: ``exterior`` (N, 2) and ``holes``, each (M, 2), metres, not closed."""

    exterior: np.ndarray
    holes: tuple[np.ndarray, ...] = ()


@dataclass
class Layout:
    """Streets of one scene with their map layers.

    ``arms`` from +x counter-clockwise, the main street's are those of even number; ``polygons``
    and ``lines`` map a layer's name in the map expansion to its shapes; ``paint`` lists (material,
    polygon (N, 2)) in painting order for what the map does not hold as areas; ``bays`` (x, y,
    heading) of parking places; ``islands`` (arm, s0, s1) on the median.
    """

    arms: list[Arm]
    polygons: dict[str, list[Polygon]]
    lines: dict[str, list[np.ndarray]] = field(
        default_factory=lambda: {"road_divider": [], "lane_divider": []}
    )
    paint: list[tuple[Material, np.ndarray]] = field(default_factory=list)
    bays: list[tuple[float, float, float]] = field(default_factory=list)
    islands: list[tuple[Arm, float, float]] = field(default_factory=list)

    def add(self, layer: str, *exteriors: np.ndarray) -> None:
        """Append polygons without holes to a map layer."""
        self.polygons[layer] += [Polygon(exterior) for exterior in exteriors]


def build_layout(rng: np.random.Generator, radius: float) -> Layout:
    """Draw the streets of one scene at random; they end ``radius`` metres from its origin."""
    lane, lanes = float(rng.uniform(3.2, 3.7)), int(rng.integers(1, 3))
    walk = rng.uniform((3.0, 2.6), (5.0, 3.6))
    main = Section(lane, lanes, 1.8, 2.4, float(walk[0]))
    side = Section(lane, int(rng.integers(1, lanes + 1)), 0.0, 2.3, float(walk[1]))
    arms = []
    for number in range(4):
        section, other = (main, side) if number % 2 == 0 else (side, main)
        lot_start = float(rng.uniform(26, 40))
        lot = (lot_start, lot_start + 27, int(rng.choice([-1, 1])))
        arms.append(
            Arm(
                section,
                number * math.pi / 2,
                other.road,
                other.edge,
                radius,
                lot if section is main else None,
            )
        )
    layers = ("road_segment", "drivable_area", "walkway", "ped_crossing", "carpark_area")
    layout = Layout(arms, {layer: [] for layer in layers})
    layout.add("road_segment", arms[0].rectangle(-side.road, side.road, -main.road, main.road))
    for arm in arms:
        hw = arm.section.road
        layout.add("road_segment", arm.rectangle(arm.start, arm.end, -hw, hw))
        _crosswalk(layout, arm)
        _lines(layout, arm)
        for flip in (-1, 1):
            _kerbside(layout, arm, flip, rng)
    _drivable_area(layout)
    return layout


def _drivable_area(layout: Layout) -> None:
    """The carriageways with rounded corners and the islands as holes; the sidewalks' corners."""
    angle = np.linspace(-math.pi / 2, -math.pi, 9)
    outline = []
    for arm in layout.arms:
        road, edge = arm.section.road, arm.section.edge
        s = arm.start + _FILLET * (1 + np.cos(angle))
        t = road + _FILLET * (1 + np.sin(angle))
        outline += [arm.xy([arm.end, arm.end], [-road, road]), arm.xy(s, t)]
        # From the arc around the outside, back to where the arc began.
        s, t = [*s, arm.start, arm.corner, arm.corner], [*t, edge, edge, road]
        layout.add("walkway", arm.xy(s, t)[::-1])
    holes = []
    for arm, s0, s1 in layout.islands:
        half = arm.section.median / 2 - 0.2
        holes.append(arm.rectangle(s0, s1, -half, half)[::-1])
        inner = arm.rectangle(s0 + 0.2, s1 - 0.2, 0.2 - half, half - 0.2)
        layout.paint.append((Material.ISLAND, inner))
    layout.polygons["drivable_area"].append(Polygon(np.concatenate(outline), tuple(holes)))


def _crosswalk(layout: Layout, arm: Arm) -> None:
    """Crosswalk with stripes and the stop line before it."""
    hw = arm.section.road
    s0, s1 = arm.start + CROSSWALK[0], arm.start + CROSSWALK[1]
    area = arm.rectangle(s0, s1, -hw, hw)
    layout.add("ped_crossing", area)
    layout.paint.append((Material.CROSSING, area))
    count = int(2 * hw / 1.1)
    for t in (np.arange(count) + 0.5) * 2 * hw / count - hw:
        stripe = arm.rectangle(s0 + 0.1, s1 - 0.1, t - 0.27, t + 0.27)
        layout.paint.append((Material.CROSSING_STRIPE, stripe))
    s = arm.start + STOP_LINE
    stop = arm.rectangle(s, s + 0.4, arm.section.median / 2 + 0.1, hw - 0.1)
    layout.paint.append((Material.LANE_LINE, stop))


def _lines(layout: Layout, arm: Arm) -> None:
    """Dividers as map lines and as paint; raised islands on the median, if there is one."""
    section, s0 = arm.section, arm.start + STOP_LINE + 0.6
    s = s0
    while section.median and s + 36 < arm.end:
        layout.islands.append((arm, s, s + 22))
        _double_line(layout, arm, s + 22, s + 36)
        s += 36
    _double_line(layout, arm, s, arm.end)
    for number in range(1, section.lanes):
        for sign in (-1, 1):
            t = sign * (section.median / 2 + number * section.lane)
            layout.lines["lane_divider"].append(arm.xy([s0, arm.end], t))
            for dash in np.arange(s0, arm.end - 3, 9.0):
                line = arm.rectangle(dash, dash + 3, t - 0.075, t + 0.075)
                layout.paint.append((Material.LANE_LINE, line))


def _double_line(layout: Layout, arm: Arm, s0: float, s1: float) -> None:
    layout.lines["road_divider"].append(arm.xy([s0, s1], 0.0))
    for t in (-0.16, 0.16):
        line = arm.rectangle(s0, s1, t - 0.07, t + 0.07)
        layout.paint.append((Material.DIVIDER_LINE, line))


def _kerbside(layout: Layout, arm: Arm, flip: int, rng: np.random.Generator) -> None:
    """One side's sidewalk, kerbside parking and parking lot; ``flip`` 1 is the left, -1 the right.

    The strip between road and sidewalk is cut into parking and widened sidewalk by turns.
    """
    kerb, back = flip * arm.section.road, flip * (arm.section.road + arm.section.parking)
    edge = flip * arm.section.edge
    layout.add("walkway", arm.rectangle(arm.corner, arm.end, back, edge))
    towards = arm.heading + (math.pi if flip > 0 else 0.0)  # the traffic on this side
    s, stop = arm.corner, arm.start + 13
    while stop < arm.end - 16:
        layout.add("walkway", arm.rectangle(s, stop, kerb, back))
        s = stop + min(6 * int(rng.integers(2, 8)), arm.end - 3 - stop)
        _bays(layout, arm, (stop, s, kerb, back), 6.0, towards)
        stop = s + float(rng.uniform(3, 9))
    layout.add("walkway", arm.rectangle(s, arm.end, kerb, back))
    if arm.lot and arm.lot[2] == flip:
        s0, s1, _ = arm.lot
        layout.add("carpark_area", arm.rectangle(s0, s1, edge, edge + flip * 17))
        for near, turn in ((0.4, -1), (11.6, 1)):
            area = (s0 + 1, s1 - 1, edge + flip * near, edge + flip * (near + 5))
            heading = arm.heading + turn * flip * math.pi / 2
            _bays(layout, arm, area, 2.75, heading, add_area=False)


def _bays(layout: Layout, arm: Arm, area, width: float, heading: float, add_area=True) -> None:
    """Parking places of about ``width`` metres along the arm in ``area`` (s0, s1, t0, t1)."""
    s0, s1, t0, t1 = area
    if add_area:
        layout.add("carpark_area", arm.rectangle(*area))
    borders = np.linspace(s0, s1, 1 + max(1, round((s1 - s0) / width)))
    for s in np.clip(borders, s0 + _LINE, s1 - _LINE):
        line = arm.rectangle(s - _LINE, s + _LINE, t0, t1)
        layout.paint.append((Material.PARKING_LINE, line))
    for s in (borders[1:] + borders[:-1]) / 2:
        x, y = arm.xy(s, (t0 + t1) / 2)
        layout.bays.append((float(x), float(y), heading))
