"""Surfaces: materials with the lidar's intensity, and colours as tables of rectangles on faces."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np

Colour = tuple[float, float, float]


class Material(IntEnum):
    """Material of a surface; those before METAL are ground surfaces."""

    TERRAIN = 0
    ASPHALT = 1
    SIDEWALK = 2
    KERB = 3
    CROSSING = 4
    CROSSING_STRIPE = 5
    PARKING = 6
    PARKING_LINE = 7
    LANE_LINE = 8
    DIVIDER_LINE = 9
    ISLAND = 10
    METAL = 11
    GLASS = 12
    MASONRY = 13
    FOLIAGE = 14
    BARK = 15
    CLOTH = 16
    RUBBER = 17
    PLASTIC = 18
    NOTHING = 19


#: Ground materials found inside a drivable area (its paint included).
ROAD_MATERIALS = (
    Material.ASPHALT,
    Material.CROSSING,
    Material.CROSSING_STRIPE,
    Material.LANE_LINE,
    Material.DIVIDER_LINE,
)
#: Ground materials found inside a walkway.
WALKWAY_MATERIALS = (Material.SIDEWALK, Material.KERB)
#: Ground materials found inside a parking area.
PARKING_MATERIALS = (Material.PARKING, Material.PARKING_LINE)
#: Mean lidar intensity, 0..255, indexed by material.
INTENSITY = np.array(
    [22, 9, 26, 30, 9, 62, 12, 55, 60, 48, 24, 40, 7, 34, 20, 16, 24, 6, 90, 0], np.float32
)
#: Colours, 0..1, indexed by ground material.
GROUND_COLOURS = np.array(
    [
        (0.39, 0.42, 0.30),
        (0.31, 0.31, 0.325),
        (0.60, 0.585, 0.56),
        (0.70, 0.69, 0.66),
        (0.29, 0.29, 0.305),
        (0.88, 0.88, 0.86),
        (0.27, 0.26, 0.255),
        (0.80, 0.80, 0.78),
        (0.86, 0.86, 0.84),
        (0.82, 0.66, 0.18),
        (0.30, 0.38, 0.21),
    ],
    np.float32,
)

DARK = (0.05, 0.05, 0.055)
GREY = (0.35, 0.35, 0.36)
WHITE = (0.93, 0.93, 0.90)
RED = (0.68, 0.03, 0.04)
PANE = (0.10, 0.12, 0.14)
WINDOW = (0.19, 0.24, 0.29)
FRAME = (0.62, 0.60, 0.56)
SKIN = (0.76, 0.55, 0.42)
FRONT, REAR, SIDES, ENDS, WALLS = (0,), (1,), (2, 3), (0, 1), (0, 1, 2, 3)


class Decal(NamedTuple):
    """A rectangle (or the ellipse in it) of another colour on some faces of a solid.

    ``u`` (from, to) is the distance from the face's middle line, 0..1, so that left equals right;
    ``v`` (from, to) the height, 0..1. With a ``period`` (metres, 0: none) along u or v they count
    within each repetition instead.
    """

    faces: tuple[int, ...]
    u: tuple[float, float]
    v: tuple[float, float]
    colour: Colour
    period: tuple[float, float] = (0.0, 0.0)
    ellipse: bool = False


def _windows(width: float, u: float, v: tuple[float, float]) -> tuple[Decal, ...]:
    """Windows with frames in storeys of 3.2 m, one every ``width`` metres."""
    period = (width, 3.2)
    return (
        Decal(WALLS, (0.0, 1.0), (0.95, 1.0), FRAME, period),
        Decal(WALLS, (0.0, u + 0.05), (v[0] - 0.03, v[1] + 0.02), FRAME, period),
        Decal(WALLS, (0.02, u), v, WINDOW, period),
    )


PATTERNS: dict[str, tuple[Decal, ...]] = {
    "plain": (),
    "car": (
        Decal(WALLS, (0.0, 1.0), (0.0, 0.16), DARK),
        Decal(SIDES, (0.43, 0.79), (-0.8, 0.75), DARK, ellipse=True),
        Decal(SIDES, (0.06, 0.07), (0.18, 1.0), GREY),
        Decal(FRONT, (0.0, 0.55), (0.30, 0.66), DARK),
        Decal(FRONT, (0.58, 1.0), (0.58, 0.84), WHITE),
        Decal(REAR, (0.62, 1.0), (0.55, 0.88), RED),
        Decal(ENDS, (0.0, 0.29), (0.34, 0.52), WHITE),
    ),
    "cabin": (
        Decal(SIDES, (0.05, 0.88), (0.06, 0.86), PANE),
        Decal(ENDS, (0.0, 0.88), (0.05, 0.92), PANE),
    ),
    "bus": (
        Decal(WALLS, (0.0, 1.0), (0.80, 1.0), WHITE),
        Decal(WALLS, (0.0, 1.0), (0.0, 0.07), DARK),
        Decal(SIDES, (0.0, 0.92), (0.42, 0.78), PANE, (1.45, 0.0)),
        Decal((3,), (0.60, 0.78), (0.05, 0.78), PANE),
        Decal(FRONT, (0.0, 0.9), (0.34, 0.80), PANE),
        Decal(FRONT, (0.0, 0.6), (0.85, 0.95), (0.95, 0.62, 0.10)),
        Decal(FRONT, (0.72, 1.0), (0.12, 0.22), WHITE),
        Decal(REAR, (0.0, 0.9), (0.55, 0.80), PANE),
        Decal(REAR, (0.72, 1.0), (0.12, 0.22), RED),
    ),
    "cargo": (
        Decal(SIDES, (0.9, 1.0), (0.0, 1.0), FRAME, (0.6, 0.0)),
        Decal(WALLS, (0.0, 1.0), (0.0, 0.04), DARK),
        Decal(REAR, (0.0, 0.02), (0.0, 1.0), DARK),
        Decal(REAR, (0.78, 1.0), (0.0, 0.12), RED),
    ),
    "cab": (
        Decal(WALLS, (0.0, 1.0), (0.0, 0.06), DARK),
        Decal(SIDES, (0.0, 0.5), (0.55, 0.88), PANE),
        Decal(FRONT, (0.0, 0.88), (0.55, 0.88), PANE),
        Decal(FRONT, (0.0, 0.6), (0.2, 0.45), DARK),
        Decal(FRONT, (0.66, 1.0), (0.10, 0.20), WHITE),
    ),
    "wheel": (Decal(SIDES, (-0.6, 0.6), (0.2, 0.8), GREY, ellipse=True),),
    "face": (Decal(FRONT, (0.0, 1.0), (0.0, 0.72), SKIN),),
    "bands": (
        Decal(WALLS, (0.0, 1.0), (0.30, 0.50), WHITE),
        Decal(WALLS, (0.0, 1.0), (0.64, 0.80), WHITE),
    ),
    "signal": (
        Decal(FRONT, (-0.7, 0.7), (0.69, 0.95), RED, ellipse=True),
        Decal(FRONT, (-0.7, 0.7), (0.37, 0.63), (0.30, 0.25, 0.05), ellipse=True),
        Decal(FRONT, (-0.7, 0.7), (0.05, 0.31), (0.05, 0.25, 0.12), ellipse=True),
    ),
    "flats": _windows(2.6, 0.55, (0.28, 0.80)),
    "shops": _windows(3.3, 0.75, (0.20, 0.82)),
    "offices": _windows(1.9, 0.92, (0.25, 0.85)),
}
FACADES = ("flats", "shops", "offices")
#: Strength of the grain of a material and its texels per metre.
GRAIN = {
    Material.MASONRY: (0.06, 15.0),
    Material.FOLIAGE: (0.30, 40.0),
    Material.BARK: (0.10, 30.0),
}


def _make_noise(size: int = 512) -> np.ndarray:
    """Tileable noise (size, size) float32 in -1..1 with detail of 1 to 32 texels."""
    rng = np.random.default_rng(20_190_318)
    total = np.zeros((size, size))
    for period in (1, 2, 4, 8, 32):
        coarse = rng.standard_normal((size // period, size // period))
        layer = np.kron(coarse, np.ones((period, period)))
        for axis in (0, 1):  # a running mean over one period makes blocks smooth
            layer = sum(np.roll(layer, shift, axis) for shift in range(period)) / period
        total += layer / layer.std()
    return np.clip(total / (2.2 * total.std()), -1, 1).astype(np.float32)


_NOISE = _make_noise()


def noise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Noise in -1..1 at texel coordinates a, b (same shape); repeats every 512 texels."""
    return _NOISE[a.astype(np.int32) & 511, b.astype(np.int32) & 511]


def albedo(solids, index: int, point: np.ndarray, face: np.ndarray) -> np.ndarray:
    """Surface colours of points on one solid.

    Args:
        solids: all Solids.
        index: which one.
        point: (3, n) float32 points on the solid, in its frame, metres.
        face: (n,) which face each is on, as ``solids.surface_normals`` numbers them.

    Returns:
        (n, 3) float32 colours in 0..1, before light and haze.
    """
    half, taper = solids.half[index].astype(np.float32), solids.taper[index].astype(np.float32)
    out = np.tile(solids.colour[index], (point.shape[1], 1))
    strength, fine = GRAIN.get(solids.material[index], (0.0, 0.0))
    if strength:
        x, y, z = point * np.float32(fine)
        out *= (1 + strength * (noise(x, y) + noise(y + 90, z) + noise(z + 200, x)))[:, None]
    decals = PATTERNS[str(solids.pattern[index])]
    if not decals:
        return out
    height = point[2] + half[2]
    up = height / (2 * half[2])
    # Along a side or an end, measured from its middle; both may lean.
    is_side = (face == 2) | (face == 3)
    middle = np.where(is_side, (taper[1] - taper[0]) * up / 2, 0)
    wide = np.where(is_side, half[0] - (taper[0] + taper[1]) * up / 2, half[1] - taper[2] * up)
    along = np.where(is_side, point[0], point[1]) - middle
    for decal in decals:
        u, v, tone = np.abs(along) / wide, up, 1.0
        column = row = 0.0
        if decal.period[0]:
            column = np.floor(along / np.float32(decal.period[0]))
            u = np.abs(along / np.float32(decal.period[0]) - column - 0.5) * 2
        if decal.period[1]:
            row = np.floor(height / np.float32(decal.period[1]))
            v = height / np.float32(decal.period[1]) - row
            tone = 1 + 0.4 * noise(7 * column + index, 13 * row)[:, None]
        if decal.ellipse:
            (u0, u1), (v0, v1) = decal.u, decal.v
            inside = ((2 * u - u0 - u1) / (u1 - u0)) ** 2 + ((2 * v - v0 - v1) / (v1 - v0)) ** 2 < 1
        else:
            inside = (u >= decal.u[0]) & (u < decal.u[1]) & (v >= decal.v[0]) & (v < decal.v[1])
        chosen = inside & np.isin(face, decal.faces)
        out[chosen] = (np.float32(decal.colour) * tone * np.ones_like(out))[chosen]
    return out
