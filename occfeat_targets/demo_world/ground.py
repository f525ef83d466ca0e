"""The ground: one painting of the map's polygons, at a resolution that fits the distance.

The same polygons are written to the map expansion, so labels and pictures agree to a texel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from occfeat_targets.demo_world.layout import Layout
from occfeat_targets.demo_world.surface import Material

SHADOW = 128


@dataclass
class Raster:
    """A square texture of the scene frame around ``centre`` (x, y) up to ``reach``, metres.

    ``values`` (n, n) uint8, row along y: a Material, and the bit SHADOW in the shadow of things.
    """

    values: np.ndarray
    centre: tuple[float, float]
    reach: float

    def sample(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Values at scene points x, y (N,), which outside are those of the nearest border."""
        count = len(self.values)
        per_metre = np.float32(count / (2 * self.reach))
        column = (x - np.float32(self.centre[0] - self.reach)) * per_metre
        row = (y - np.float32(self.centre[1] - self.reach)) * per_metre
        column, row = (np.clip(c, 0, count - 1).astype(np.int32) for c in (column, row))
        return self.values[row, column]


def paint_ground(
    layout: Layout, shadows: np.ndarray, centre: tuple[float, float], texel: float, reach: float
) -> Raster:
    """Paint a square of the scene frame.

    Args:
        layout: the scene's streets.
        shadows: (P, n, 2) outlines of the shadows of things, scene frame, metres.
        centre: (x, y) of the square, metres.
        texel: size of a texel in metres.
        reach: half the size of the square in metres.
    """
    count = int(2 * reach / texel)
    corner = np.array(centre) - reach
    ground = Image.new("L", (count, count), int(Material.TERRAIN))
    shade = Image.new("L", (count, count), 0)
    paint, darken = ImageDraw.Draw(ground), ImageDraw.Draw(shade)

    def texels(points: np.ndarray) -> list[tuple[float, float]]:
        # Pillow cuts coordinates to whole texels: round first.
        return [tuple(p) for p in np.rint((points - corner) / texel - 0.5).tolist()]

    def fill(draw: ImageDraw.ImageDraw, points: np.ndarray, value: int) -> None:
        if (points.max(axis=0) > corner).all() and (points.min(axis=0) < corner + 2 * reach).all():
            draw.polygon(texels(points), fill=int(value))

    for polygon in layout.polygons["walkway"]:
        fill(paint, polygon.exterior, Material.SIDEWALK)
    for polygon in layout.polygons["drivable_area"] + layout.polygons["carpark_area"]:
        rim = texels(np.vstack([polygon.exterior, polygon.exterior[:2]]))
        paint.line(rim, fill=int(Material.KERB), width=max(1, round(0.36 / texel)))
    for polygon in layout.polygons["drivable_area"]:
        fill(paint, polygon.exterior, Material.ASPHALT)
        for hole in polygon.holes:
            fill(paint, hole, Material.KERB)
    for polygon in layout.polygons["carpark_area"]:
        fill(paint, polygon.exterior, Material.PARKING)
    for material, points in layout.paint:
        fill(paint, points, material)
    for outline in shadows:
        fill(darken, outline, SHADOW)
    return Raster(np.asarray(ground) | np.asarray(shade), centre, reach)


@dataclass
class Ground:
    """The ground of one keyframe: rasters from the finest, around the car, to the coarsest."""

    rasters: list[Raster]

    def values(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Raster values (N,) uint8 at scene points x, y (N,) float32."""
        out = np.empty(x.shape, dtype=np.uint8)
        rest = np.arange(len(x))
        for raster in self.rasters:
            dx, dy = x[rest] - np.float32(raster.centre[0]), y[rest] - np.float32(raster.centre[1])
            inside = np.maximum(np.abs(dx), np.abs(dy)) < raster.reach
            if raster is self.rasters[-1]:
                inside[:] = True
            chosen, rest = rest[inside], rest[~inside]
            out[chosen] = raster.sample(x[chosen], y[chosen])
        return out
