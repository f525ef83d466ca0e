"""Layout of a scene, two crossing streets as the map's polygons, and the painting of its ground.

All coordinates are global, metres. Traffic keeps to the right. The polygons that are painted are
those of the map expansion, so labels and pictures agree to a texel.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from occfeat_targets.demo_world.solids import Pose
from occfeat_targets.demo_world.things import Material

#: Where the crosswalk of an arm begins and ends, and its stop line, metres from the junction.
CROSSWALK, STOP_LINE = (4.3, 7.5), 8.4
_FILLET = 3.5
SHADOW = 128


class Section(NamedTuple):
    """Cross-section of a street, metres; ``road`` to ``edge`` are distances from its middle."""

    lanes: int  # per direction
    lane: float  # width of a lane
    median: float  # width of the median
    road: float  # where the carriageway ends
    kerb: float  # where the parking places end
    edge: float  # where the sidewalk ends

    def lane_centre(self, lane: int) -> float:
        """Distance of a lane's centre from the centre line; lane 0 is the innermost."""
        return self.median / 2 + self.lane * (lane + 0.5)


@dataclass(frozen=True)
class Arm:
    """One arm of the junction, in its own coordinates (s, t), metres.

    s runs from ``origin`` outwards in direction ``heading``, t to its left. Traffic drives outwards
    where t < 0.
    """

    section: Section
    origin: tuple[float, float]  # the junction's centre (x, y)
    heading: float  # radians
    start: float  # where the road begins along s
    corner: float  # where the sidewalks begin
    end: float  # where all ends

    def xy(self, s, t) -> np.ndarray:
        """Global coordinates (..., 2) of arm coordinates s, t (...,)."""
        s, t = np.broadcast_arrays(np.asarray(s, float), np.asarray(t, float))
        cos, sin = math.cos(self.heading), math.sin(self.heading)
        x, y = self.origin
        return np.stack([x + cos * s - sin * t, y + sin * s + cos * t], axis=-1)

    def pose(self, s: float, t: float, turn: float = 0.0) -> Pose:
        """Pose at (s, t), turned from the arm's direction by ``turn`` radians."""
        x, y = self.xy(s, t)
        return float(x), float(y), self.heading + turn

    def rectangle(self, s0: float, s1: float, t0: float, t1: float) -> np.ndarray:
        """Polygon (4, 2) between s0 and s1, t0 and t1 (in any order), counter-clockwise."""
        t0, t1 = min(t0, t1), max(t0, t1)
        return self.xy([s0, s1, s1, s0], [t0, t0, t1, t1])


@dataclass
class Layout:
    """Streets of one scene with their map layers.

    ``polygons`` and ``lines`` map a layer's name in the map expansion to its shapes (N, 2), not
    closed; ``paint`` is what the map does not hold as areas, (material, polygon (N, 2)), in
    painting order.
    """

    arms: list[Arm]  # counter-clockwise, the main street's are those of even number
    polygons: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    lines: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    paint: list[tuple[Material, np.ndarray]] = field(default_factory=list)
    bays: list[Pose] = field(default_factory=list)  # parking places
    holes: list[np.ndarray] = field(default_factory=list)  # of the drivable area: islands (4, 2)

    def mark(self, material: Material, arm: Arm, *sides: float) -> None:
        """Paint a rectangle on an arm (s0, s1, t0, t1) that the map does not hold."""
        self.paint.append((material, arm.rectangle(*sides)))


def _section(lanes: int, lane: float, median: float, walk: float) -> Section:
    road = median / 2 + lane * lanes
    return Section(lanes, lane, median, road, road + 2.4, road + 2.4 + walk)


def build_layout(rng: np.random.Generator, origin: tuple[float, float], radius: float) -> Layout:
    """Draw the streets of one scene at random; they end ``radius`` metres from ``origin``."""
    yaw = float(rng.uniform(-math.pi, math.pi))
    lane, lanes = float(rng.uniform(3.2, 3.7)), int(rng.integers(1, 3))
    main = _section(lanes, lane, 1.8, float(rng.uniform(3.0, 5.0)))
    side = _section(int(rng.integers(1, lanes + 1)), lane, 0.0, float(rng.uniform(2.6, 3.6)))
    layout = Layout([])
    outline = []
    for number in range(4):
        own, other = (main, side) if number % 2 == 0 else (side, main)
        arm = Arm(own, origin, yaw + number * math.pi / 2, other.road, other.edge, radius)
        layout.arms.append(arm)
        outline += [arm.xy([arm.end, arm.end], [-own.road, own.road]), _corner(layout, arm)]
        _road(layout, arm)
        for flip in (-1, 1):
            _kerbside(layout, arm, flip, rng)
    layout.polygons["drivable_area"].append(np.concatenate(outline))
    junction = layout.arms[0].rectangle(-side.road, side.road, -main.road, main.road)
    layout.polygons["road_segment"].append(junction)
    return layout


def _corner(layout: Layout, arm: Arm) -> np.ndarray:
    """The sidewalk at the corner to the left of an arm; returns its kerb (N, 2), a rounded line."""
    road, edge = arm.section.road, arm.section.edge
    angle = np.linspace(-math.pi / 2, -math.pi, 9)
    s = arm.start + _FILLET * (1 + np.cos(angle))
    t = road + _FILLET * (1 + np.sin(angle))
    outer = arm.xy([arm.start, arm.corner, arm.corner], [edge, edge, road])
    layout.polygons["walkway"].append(np.concatenate([arm.xy(s, t), outer])[::-1])
    return arm.xy(s, t)


def _road(layout: Layout, arm: Arm) -> None:
    """An arm's road: crosswalk, stop line, dividers and, on a median, raised islands."""
    section, hw, (s0, s1) = arm.section, arm.section.road, np.add(arm.start, CROSSWALK)
    layout.polygons["road_segment"].append(arm.rectangle(arm.start, arm.end, -hw, hw))
    layout.polygons["ped_crossing"].append(arm.rectangle(s0, s1, -hw, hw))
    layout.mark(Material.CROSSING, arm, s0, s1, -hw, hw)
    count = int(2 * hw / 1.1)
    for t in (np.arange(count) + 0.5) * 2 * hw / count - hw:
        layout.mark(Material.CROSSING_STRIPE, arm, s0 + 0.1, s1 - 0.1, t - 0.27, t + 0.27)
    stop = arm.start + STOP_LINE
    layout.mark(Material.LANE_LINE, arm, stop, stop + 0.4, section.median / 2 + 0.1, hw - 0.1)
    s = first = stop + 0.6
    while section.median and s + 36 < arm.end:
        half = section.median / 2 - 0.2
        layout.holes.append(arm.rectangle(s, s + 22, -half, half)[::-1])
        layout.mark(Material.ISLAND, arm, s + 0.2, s + 21.8, 0.2 - half, half - 0.2)
        _double_line(layout, arm, s + 22, s + 36)
        s += 36
    _double_line(layout, arm, s, arm.end)
    offsets = section.median / 2 + section.lane * np.arange(1, section.lanes)
    for t in [*-offsets, *offsets]:
        layout.lines["lane_divider"].append(arm.xy([first, arm.end], t))
        for dash in np.arange(first, arm.end - 3, 9.0):
            layout.mark(Material.LANE_LINE, arm, dash, dash + 3, t - 0.07, t + 0.07)


def _double_line(layout: Layout, arm: Arm, s0: float, s1: float) -> None:
    layout.lines["road_divider"].append(arm.xy([s0, s1], 0.0))
    for t in (-0.16, 0.16):
        layout.mark(Material.DIVIDER_LINE, arm, s0, s1, t - 0.07, t + 0.07)


def _kerbside(layout: Layout, arm: Arm, flip: int, rng: np.random.Generator) -> None:
    """One side's sidewalk and parking places; ``flip`` 1 is the left, -1 the right.

    The strip between road and sidewalk is cut into parking and widened sidewalk by turns.
    """
    section, walkways = arm.section, layout.polygons["walkway"]
    t0, t1 = flip * section.road, flip * section.kerb
    walkways.append(arm.rectangle(arm.corner, arm.end, t1, flip * section.edge))
    s, s0 = arm.corner, arm.start + 13
    while s0 < arm.end - 16:
        walkways.append(arm.rectangle(s, s0, t0, t1))
        count = min(int(rng.integers(2, 8)), int((arm.end - 3 - s0) / 6))
        s = s0 + 6 * count
        layout.polygons["carpark_area"].append(arm.rectangle(s0, s, t0, t1))
        borders = np.linspace(s0, s, count + 1)
        for border in np.clip(borders, s0 + 0.06, s - 0.06):
            layout.mark(Material.PARKING_LINE, arm, border - 0.06, border + 0.06, t0, t1)
        turn = math.pi if flip > 0 else 0.0  # as the traffic on this side
        layout.bays += [arm.pose(m, (t0 + t1) / 2, turn) for m in (borders[1:] + borders[:-1]) / 2]
        s0 = s + float(rng.uniform(3, 9))
    walkways.append(arm.rectangle(s, arm.end, t0, t1))


@dataclass
class Raster:
    """A square texture around ``centre`` (x, y) up to ``reach``, metres."""

    values: np.ndarray
    """(n, n) uint8, row along y: a Material, and the bit SHADOW in the shadow of things."""
    centre: tuple[float, float]
    reach: float

    def sample(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Values (N,) uint8 at points x, y (N,); outside, those of the border."""
        last, per_metre = len(self.values) - 1, np.float32(len(self.values) / (2 * self.reach))
        column = (x - np.float32(self.centre[0] - self.reach)) * per_metre
        row = (y - np.float32(self.centre[1] - self.reach)) * per_metre
        column, row = (c.clip(0, last).astype(np.int32) for c in (column, row))
        return self.values[row, column]


def paint_ground(
    layout: Layout, shadows: np.ndarray, centre: tuple[float, float], texel: float, reach: float
) -> Raster:
    """Paint the square of the ground around ``centre`` (x, y) up to ``reach``, metres, with texels
    of ``texel``; ``shadows`` (P, n, 2) are the outlines of the shadows of things."""
    size = (int(2 * reach / texel), int(2 * reach / texel))
    corner = np.array(centre) - reach
    ground, shade = Image.new("L", size, int(Material.TERRAIN)), Image.new("L", size, 0)
    paint, darken = ImageDraw.Draw(ground), ImageDraw.Draw(shade)

    def texels(points: np.ndarray) -> list[tuple[float, float]]:
        # Pillow cuts coordinates to whole texels: round first.
        return [tuple(p) for p in np.rint((points - corner) / texel - 0.5).tolist()]

    def fill(draw: ImageDraw.ImageDraw, value: int, *polygons: np.ndarray) -> None:
        for points in polygons:
            low, high = points.min(axis=0), points.max(axis=0)
            if (high > corner).all() and (low < corner + 2 * reach).all():
                draw.polygon(texels(points), fill=int(value))

    roads, parking = layout.polygons["drivable_area"], layout.polygons["carpark_area"]
    fill(paint, Material.SIDEWALK, *layout.polygons["walkway"])
    for points in roads + parking:
        rim = texels(np.vstack([points, points[:2]]))
        paint.line(rim, fill=int(Material.KERB), width=max(1, round(0.36 / texel)))
    fill(paint, Material.ASPHALT, *roads)
    fill(paint, Material.KERB, *layout.holes)
    fill(paint, Material.PARKING, *parking)
    for material, points in layout.paint:
        fill(paint, material, points)
    fill(darken, SHADOW, *shadows)
    return Raster(np.asarray(ground) | np.asarray(shade), centre, reach)


def sample_ground(rasters: list[Raster], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Values (N,) uint8 at points x, y (N,) of the first raster that reaches there.

    Rasters go from the finest, around the car, to the coarsest, which serves all the rest.
    """
    values = rasters[-1].sample(x, y)
    for raster in rasters[-2::-1]:
        dx, dy = (np.abs(c - np.float32(m)) for c, m in zip((x, y), raster.centre, strict=True))
        inside = np.maximum(dx, dy) < raster.reach
        values[inside] = raster.sample(x[inside], y[inside])
    return values
