"""Layout of a scene: the map's polygons and lines, which the ground is painted from too.

All coordinates are scene coordinates (see ``street``), metres.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from occfeat_targets.demo_world.materials import Material
from occfeat_targets.demo_world.street import Section, Street

KINDS = ("cross", "straight", "turn", "curve")


@dataclass(frozen=True)
class Polygon:
    """A polygon with holes: ``exterior`` (N, 2) and ``holes``, each (M, 2), metres, not closed."""

    exterior: np.ndarray
    holes: tuple[np.ndarray, ...] = ()


@dataclass
class Layout:
    """Streets of one scene with their map layers.

    ``polygons`` and ``lines`` map a layer's name in the map expansion to its shapes; ``paint``
    lists (material, polygon (N, 2)) in painting order for what the map does not hold as areas
    (stripes, lines, planting); ``bays`` (x, y, heading) of parking places; ``crossings`` (street,
    s0, s1); ``islands`` (street, s0, s1).
    """

    kind: str
    streets: list[Street]
    polygons: dict[str, list[Polygon]] = field(default_factory=dict)
    lines: dict[str, list[np.ndarray]] = field(default_factory=dict)
    segments: list[tuple[Polygon, bool]] = field(default_factory=list)
    paint: list[tuple[Material, np.ndarray]] = field(default_factory=list)
    bays: list[tuple[float, float, float]] = field(default_factory=list)
    crossings: list[tuple[Street, float, float]] = field(default_factory=list)
    islands: list[tuple[Street, float, float]] = field(default_factory=list)
    lots: list[tuple[Street, float, float, float, float]] = field(default_factory=list)

    def add_polygon(self, layer: str, exterior: np.ndarray, holes=()) -> None:
        """Append a polygon to a map layer."""
        self.polygons.setdefault(layer, []).append(Polygon(exterior, tuple(holes)))

    def add_line(self, layer: str, points: np.ndarray) -> None:
        """Append a line to a map layer."""
        self.lines.setdefault(layer, []).append(points)


def build_layout(rng: np.random.Generator, kind: str, radius: float) -> Layout:
    """Draw the streets of one scene at random.

    Args:
        rng: source of all random choices.
        kind: one of KINDS.
        radius: metres; all streets end within this distance of the scene's origin.

    Returns:
        The layout, with every map layer filled.
    """
    lane = float(rng.uniform(3.2, 3.7))
    lanes = int(rng.integers(1, 3))
    main = Section(
        lane,
        lanes,
        1.8 if kind in ("cross", "straight") or rng.random() < 0.5 else 0.0,
        float(rng.choice([2.3, 2.5])),
        float(rng.uniform(2.6, 5.0)),
    )
    side = Section(lane, int(rng.integers(1, lanes + 1)), 0.0, 2.3, float(rng.uniform(2.4, 3.6)))
    if kind in ("cross", "turn"):
        layout = _junction(kind, main, side, radius)
    else:
        curvature = float(rng.choice([-1, 1]) / rng.uniform(140, 220)) if kind == "curve" else 0.0
        street = Street(main, (0.0, 0.0), 0.0, curvature, -radius, radius)
        layout = Layout(kind, [street])
        _add_single(layout, street)
    for street in layout.streets:
        _furnish(layout, street, rng)
    _cut_islands(layout)
    return layout


def _junction(kind: str, main: Section, side: Section, radius: float) -> Layout:
    """Four arms around the origin, counter-clockwise from +x; the main arms own the corners."""
    fillet = 3.5
    arms = []
    for number in range(4):
        section, other = (main, side) if number % 2 == 0 else (side, main)
        arms.append(
            Street(
                section,
                (0.0, 0.0),
                number * math.pi / 2,
                0.0,
                other.road,
                radius - 1,
                fillet if number % 2 == 0 else None,
            )
        )
    layout = Layout(kind, arms)
    outline = []
    for number, arm in enumerate(arms):
        following = arms[(number + 1) % 4].section.road
        hw = arm.section.road
        outline.append(arm.xy([arm.end, arm.end], [-hw, hw]))
        outline.append(arm.xy(*_fillet(following, hw, fillet)))
    layout.add_polygon("drivable_area", np.concatenate(outline))
    box = arms[0].rectangle(-side.road, side.road, -main.road, main.road)
    layout.segments.append((Polygon(box), True))
    for arm in arms:
        hw = arm.section.road
        layout.segments.append((Polygon(arm.rectangle(arm.start, arm.end, -hw, hw)), False))
    return layout


def _fillet(a: float, b: float, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Quarter arc (s, t) around a corner at (a, b), from (a + radius, b) to (a, b + radius)."""
    angle = np.linspace(-math.pi / 2, -math.pi, 9)
    return a + radius + radius * np.cos(angle), b + radius + radius * np.sin(angle)


def _add_single(layout: Layout, street: Street) -> None:
    hw = street.section.road
    polygon = street.rectangle(street.start, street.end, -hw, hw)
    layout.add_polygon("drivable_area", polygon)
    layout.segments.append((Polygon(polygon), False))


def _furnish(layout: Layout, street: Street, rng: np.random.Generator) -> None:
    """Crossings, parking, sidewalks, islands and road paint of one street or arm."""
    hw = street.section.road
    junction = len(layout.streets) > 1
    if junction:
        first = street.start + 3.5 + 0.8
        spans = [(first, first + 3.2)]
        inner = first + 3.2 + 5
    else:
        middle = float(rng.uniform(6, 16))
        spans = [(middle, middle + 3.6), (middle - 75, middle - 71.4), (middle + 70, middle + 73.6)]
        inner = street.start + 4
    for s0, s1 in spans:
        layout.crossings.append((street, s0, s1))
        layout.add_polygon("ped_crossing", street.rectangle(s0, s1, -hw, hw))
        layout.paint.append((Material.CROSSING, street.rectangle(s0, s1, -hw, hw)))
        stripes = int(2 * hw / 1.1)
        for number in range(stripes):
            t = -hw + (number + 0.5) * 2 * hw / stripes
            layout.paint.append(
                (Material.CROSSING_STRIPE, street.rectangle(s0 + 0.1, s1 - 0.1, t - 0.27, t + 0.27))
            )
    parking = {side: _parking_ranges(street, inner, spans, rng) for side in (-1, 1)}
    for side in (-1, 1):
        _sidewalk(layout, street, side, parking[side])
    if street.section.median and not street.curvature:
        _plan_islands(layout, street, spans)
    _road_lines(layout, street, spans, junction)
    # Only on arms of the main street: lots of neighbouring arms could overlap.
    if not street.curvature and (street.corner is not None or not junction):
        _parking_lot(layout, street, rng)


def _parking_ranges(street: Street, inner: float, spans, rng) -> list[tuple[float, float]]:
    """Stretches (s0, s1) of kerbside parking, clear of crossings."""
    ranges = []
    s = inner
    while s < street.end - 14:
        length = 6.0 * int(rng.integers(2, 8))
        stop = min(s + length, street.end - 3)
        clear = all(stop < s0 - 5 or s > s1 + 5 for s0, s1 in spans)
        if clear and rng.random() < 0.8:
            ranges.append((s, stop))
        s = stop + float(rng.uniform(3, 9)) if clear else s + 6
    return ranges


def _sidewalk(layout: Layout, street: Street, side: int, parking) -> None:
    """One sidewalk, its edge stepping back at parking stretches, and the bays there."""
    section = street.section
    hw, back = section.road, section.edge
    s, t = [], []
    if street.corner is not None:
        arc_s, arc_t = _fillet(street.start, hw, street.corner)
        s += [street.start, *arc_s[::-1]]
        t += [back, *arc_t[::-1]]
        start = street.start + street.corner
    else:
        junction = len(layout.streets) > 1
        start = layout.streets[0].section.edge if junction else street.start
        s += [start, start]
        t += [back, hw]
    for s0, s1 in parking:
        s += [s0, s0, s1, s1]
        t += [hw, hw + section.parking, hw + section.parking, hw]
        _bays(layout, street, side, s0, s1)
    s += [street.end, street.end]
    t += [hw, back]
    # Cut every stretch: on an arc the straight joins would leave the true edge.
    cut_s, cut_t = [], []
    for a, b, ta, tb in zip(s, s[1:] + s[:1], t, t[1:] + t[:1], strict=True):
        count = 2 + int(abs(b - a) / 2) if street.curvature else 2
        cut_s += list(np.linspace(a, b, count)[:-1])
        cut_t += list(np.linspace(ta, tb, count)[:-1])
    layout.add_polygon("walkway", street.xy(cut_s, side * np.array(cut_t)))


def _bays(layout: Layout, street: Street, side: int, s0: float, s1: float) -> None:
    section = street.section
    t0, t1 = section.road, section.road + section.parking
    layout.add_polygon(
        "carpark_area",
        street.rectangle(s0, s1, min(side * t0, side * t1), max(side * t0, side * t1)),
    )
    count = max(1, round((s1 - s0) / 6))
    step = (s1 - s0) / count
    for number in range(count + 1):
        s = min(max(s0 + number * step, s0 + 0.06), s1 - 0.06)
        layout.paint.append(
            (
                Material.PARKING_LINE,
                street.rectangle(
                    s - 0.06, s + 0.06, min(side * t0, side * t1), max(side * t0, side * t1)
                ),
            )
        )
    for number in range(count):
        s = s0 + (number + 0.5) * step
        x, y = street.xy(s, side * (t0 + t1) / 2)
        heading = street.heading_at(s) + (math.pi if side > 0 else 0.0)
        layout.bays.append((float(x), float(y), heading))


def _parking_lot(layout: Layout, street: Street, rng: np.random.Generator) -> None:
    """A lot behind one sidewalk with two rows of bays across it."""
    side = int(rng.choice([-1, 1]))
    s0 = float(rng.uniform(26, 40)) if len(layout.streets) > 1 else float(rng.uniform(-20, 25))
    s1, t0, t1 = s0 + 27.0, street.section.edge, street.section.edge + 17.0
    if s1 > street.end - 4:
        return
    layout.lots.append((street, s0, s1, min(side * t0, side * t1), max(side * t0, side * t1)))
    layout.add_polygon("carpark_area", street.rectangle(*layout.lots[-1][1:]))
    for row, (near, far) in enumerate(((t0 + 0.4, t0 + 5.4), (t1 - 5.4, t1 - 0.4))):
        for number in range(10):
            s = s0 + 1 + number * 2.75
            if number < 9:
                x, y = street.xy(s + 1.375, side * (near + far) / 2)
                turn = math.pi / 2 if (row == 0) == (side < 0) else -math.pi / 2
                layout.bays.append((float(x), float(y), street.heading + turn))
            layout.paint.append(
                (
                    Material.PARKING_LINE,
                    street.rectangle(
                        s - 0.06,
                        s + 0.06,
                        min(side * near, side * far),
                        max(side * near, side * far),
                    ),
                )
            )


def _plan_islands(layout: Layout, street: Street, spans) -> None:
    """Raised islands on the median, clear of crossings."""
    s = spans[0][1] + 2.5 if len(layout.streets) > 1 else street.start + 12
    while s < street.end - 34:
        stop = s + 22
        if all(stop < s0 - 1.5 or s > s1 + 1.5 for s0, s1 in spans):
            layout.islands.append((street, s, stop))
            s = stop + 14
        else:
            s += 4


def _cut_islands(layout: Layout) -> None:
    """Turn islands into holes of the drivable area; plant them."""
    holes = []
    for street, s0, s1 in layout.islands:
        half = street.section.median / 2 - 0.2
        holes.append(street.rectangle(s0, s1, -half, half)[::-1])
        layout.paint.append(
            (Material.ISLAND, street.rectangle(s0 + 0.2, s1 - 0.2, 0.2 - half, half - 0.2))
        )
    whole = layout.polygons["drivable_area"][0]
    layout.polygons["drivable_area"][0] = Polygon(whole.exterior, tuple(holes))


def _road_lines(layout: Layout, street: Street, spans, junction: bool) -> None:
    """Dividers as map lines and as paint; stop lines at junctions and crossings."""
    section = street.section
    blocked = sorted([(s0 - 1.6, s1 + 1.6) for s0, s1 in spans])
    islands = sorted((s0, s1) for owner, s0, s1 in layout.islands if owner is street)
    begin = spans[0][1] + 1.6 if junction else street.start
    for s0, s1 in _gaps(begin, street.end, sorted(blocked + islands)):
        layout.add_line("road_divider", street.line(s0, s1, 0.0))
        for t in (-0.16, 0.16):
            layout.paint.append(
                (Material.DIVIDER_LINE, street.rectangle(s0, s1, t - 0.07, t + 0.07))
            )
    for s0, s1 in _gaps(begin, street.end, blocked):
        for number in range(1, section.lanes):
            for t in (-1, 1) * np.array(section.median / 2 + number * section.lane):
                layout.add_line("lane_divider", street.line(s0, s1, t))
                for dash in np.arange(s0, s1 - 3, 9.0):
                    layout.paint.append(
                        (Material.LANE_LINE, street.rectangle(dash, dash + 3, t - 0.075, t + 0.075))
                    )
    for s0, s1 in spans:
        stops = [(s1 + 0.9, 1)] if junction else [(s1 + 0.9, 1), (s0 - 1.3, -1)]
        for s, sign in stops:
            t = sorted((sign * (section.median / 2 + 0.1), sign * (section.road - 0.1)))
            layout.paint.append((Material.LANE_LINE, street.rectangle(s, s + 0.4, *t)))


def _gaps(begin: float, end: float, blocked) -> list[tuple[float, float]]:
    """Stretches of begin..end outside the blocked ones (sorted), at least 2 m long."""
    gaps, s = [], begin
    for s0, s1 in blocked:
        gaps.append((s, s0))
        s = max(s, s1)
    gaps.append((s, end))
    return [(a, b) for a, b in gaps if b - a >= 2]
