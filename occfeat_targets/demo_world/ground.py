"""The ground: one painting of the map's polygons, at a resolution that fits the distance.

The same polygons are written to the map expansion, so labels and pictures agree to a texel.
Textures are rasters in the scene frame: row = (y - y0) / texel, column = (x - x0) / texel. Values
are Material numbers; the highest bit marks shadow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from occfeat_targets.demo_world.layout import Layout
from occfeat_targets.demo_world.materials import Material, ground_palette

SHADOW = 128
_SHADOW_LIGHT = 0.56


@dataclass
class Raster:
    """A square raster of the scene frame: ``values`` (n, n), texel in metres, corner (x0, y0)."""

    values: np.ndarray
    texel: float
    x0: float
    y0: float

    def sample(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Values at scene points x, y (same shape); outside, those of the nearest border texel."""
        last = len(self.values) - 1
        column = np.clip((x - np.float32(self.x0)) * np.float32(1 / self.texel), 0, last)
        row = np.clip((y - np.float32(self.y0)) * np.float32(1 / self.texel), 0, last)
        return self.values[row.astype(np.int32), column.astype(np.int32)]


def paint_map(layout: Layout, x0: float, y0: float, texel: float, count: int) -> Image.Image:
    """Paint the ground materials of a square window of the scene frame, (count, count) uint8."""
    image = Image.new("L", (count, count), int(Material.TERRAIN))
    draw = ImageDraw.Draw(image)

    def texels(points: np.ndarray) -> np.ndarray:
        return (points - (x0, y0)) / texel - 0.5

    def fill(points: np.ndarray, material: int) -> None:
        place = texels(points)
        if (place.max(axis=0) < 0).any() or (place.min(axis=0) > count).any():
            return
        # Pillow cuts coordinates to whole texels: round first.
        draw.polygon([tuple(p) for p in np.rint(place).tolist()], fill=int(material))

    def rim(points: np.ndarray, width: float) -> None:
        place = [tuple(p) for p in np.rint(texels(np.vstack([points, points[:2]]))).tolist()]
        draw.line(place, fill=int(Material.KERB), width=max(1, round(width / texel)))

    polygons = layout.polygons
    for polygon in polygons["walkway"]:
        fill(polygon.exterior, Material.SIDEWALK)
    for layer in ("drivable_area", "carpark_area"):
        for polygon in polygons.get(layer, []):
            rim(polygon.exterior, 0.36)
    for polygon in polygons["drivable_area"]:
        fill(polygon.exterior, Material.ASPHALT)
        for hole in polygon.holes:
            fill(hole, Material.KERB)
    for polygon in polygons.get("carpark_area", []):
        fill(polygon.exterior, Material.PARKING)
    for material, points in layout.paint:
        fill(points, material)
    return image


def hull(points: np.ndarray) -> list[tuple[float, float]]:
    """Convex hull of points (N, 2), counter-clockwise."""
    ordered = sorted(map(tuple, points.tolist()))

    def half(sequence):
        chain: list[tuple[float, float]] = []
        for p in sequence:
            while (
                len(chain) > 1
                and (
                    (chain[-1][0] - chain[-2][0]) * (p[1] - chain[-2][1])
                    - (chain[-1][1] - chain[-2][1]) * (p[0] - chain[-2][0])
                )
                <= 0
            ):
                chain.pop()
            chain.append(p)
        return chain[:-1]

    return half(ordered) + half(ordered[::-1])


class StaticGround:
    """The part of the ground that no keyframe changes: coarse texture of the whole scene.

    ``far`` holds materials at 0.2 m, ``far_colour`` averaged colours (n, n, 3) uint8 at 0.2 m,
    building shadows included; ``palette`` (11, 3) float32.
    """

    def __init__(
        self, layout: Layout, radius: float, style: np.ndarray, buildings, sun: np.ndarray
    ):
        """Paint it; ``buildings`` are (footprint (4, 2), height), ``sun`` (3,), scene frame."""
        self.layout = layout
        self.palette = ground_palette(style)
        self.sun = sun
        self.building_shadows = [
            hull(np.concatenate([foot, foot - sun[:2] / sun[2] * height]))
            for foot, height in buildings
        ]
        texel, count = 0.1, 2 * int(radius / 0.1)
        fine = paint_map(layout, -radius, -radius, texel, count)
        shadow = Image.new("L", (count, count), 255)
        draw = ImageDraw.Draw(shadow)
        for outline in self.building_shadows:
            draw.polygon(
                [((x + radius) / texel, (y + radius) / texel) for x, y in outline],
                fill=int(255 * _SHADOW_LIGHT),
            )
        shade = np.asarray(shadow.reduce(2), dtype=np.float32) / 255
        levels = np.zeros((256, 3))
        levels[:11] = self.palette * 255
        channels = [
            np.asarray(fine.point(levels[:, c].round().astype(int).tolist()).reduce(2))
            for c in range(3)
        ]
        colour = np.stack([(channel * shade).astype(np.uint8) for channel in channels], axis=-1)
        self.far_colour = Raster(colour, 0.2, -radius, -radius)
        self.far = Raster(np.asarray(fine)[::2, ::2].copy(), 0.2, -radius, -radius)
        self.shade = Raster((shade < 0.8), 0.2, -radius, -radius)


class Ground:
    """The ground of one keyframe: fine textures around the ego car, coarse ones beyond.

    Coordinates are scene coordinates, metres.
    """

    def __init__(
        self,
        static: StaticGround,
        centre: tuple[float, float],
        outlines,
        levels=((0.0125, 18.0), (0.04, 62.0)),
    ):
        """Paint fine textures.

        Args:
            static: the scene's coarse ground.
            centre: (x, y) of the ego car.
            outlines: shadow outlines of things, lists of (x, y).
            levels: (texel, half width) in metres, finest first.
        """
        self.static = static
        self.centre = centre
        self.rasters = []
        self.reach = [half for _, half in levels]
        for texel, half in levels:
            x0, y0, count = centre[0] - half, centre[1] - half, int(2 * half / texel)
            image = paint_map(static.layout, x0, y0, texel, count)
            shadow = Image.new("1", (count, count), 0)
            draw = ImageDraw.Draw(shadow)
            for outline in [*static.building_shadows, *outlines]:
                place = (np.array(outline) - (x0, y0)) / texel
                if (place.max(axis=0) < 0).any() or (place.min(axis=0) > count).any():
                    continue
                draw.polygon([tuple(p) for p in place.tolist()], fill=1)
            values = np.asarray(image) | (np.asarray(shadow).astype(np.uint8) << 7)
            self.rasters.append(Raster(values, texel, x0, y0))

    def _levels(self, x, y):
        """Yields (raster or None for the coarse ground, selected points) from fine to coarse."""
        distance = np.maximum(
            np.abs(x - np.float32(self.centre[0])), np.abs(y - np.float32(self.centre[1]))
        )
        inner = np.float32(-1)
        for raster, reach in zip(self.rasters, self.reach, strict=True):
            outer = np.float32(reach - 0.1)
            yield raster, np.flatnonzero((distance > inner) & (distance <= outer))
            inner = outer
        yield None, np.flatnonzero(distance > inner)

    def material(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Materials (N,) uint8 at scene points x, y (N,)."""
        out = np.empty(x.shape, dtype=np.uint8)
        for raster, chosen in self._levels(x, y):
            source = raster or self.static.far
            out[chosen] = source.sample(x[chosen], y[chosen]) & (SHADOW - 1)
        return out

    def colour(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Colours (N, 3) float32 in 0..1 at scene points x, y (N,), shadows included."""
        out = np.empty((*x.shape, 3), dtype=np.float32)
        table = np.zeros((256, 3), dtype=np.float32)
        table[:11] = self.static.palette
        table[SHADOW:] = table[:SHADOW] * _SHADOW_LIGHT
        for raster, chosen in self._levels(x, y):
            if raster is None:
                out[chosen] = self.static.far_colour.sample(x[chosen], y[chosen]) * np.float32(
                    1 / 255
                )
            else:
                out[chosen] = table[raster.sample(x[chosen], y[chosen])]
        return out

    def shaded(self, x: float, y: float) -> bool:
        """Whether a scene point lies in the shadow of a building."""
        return bool(
            self.static.shade.sample(np.array([x], np.float32), np.array([y], np.float32))[0]
        )
