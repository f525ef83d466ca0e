"""Surfaces: materials with the lidar's intensity, and colours as tables of rectangles on faces."""

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from occfeat_targets.demo_world.solids import Colour, Solids


class Material(IntEnum):
    """Material of a surface, with its mean lidar ``intensity``, 0..255, and ``colour``, 0..1.

    Those before METAL are ground surfaces; the others are coloured by their things.
    """

    intensity: float
    colour: Colour

    def __new__(cls, value: int, intensity: float, colour: Colour = (0.0, 0.0, 0.0)):
        """A member with its number and properties."""
        member = int.__new__(cls, value)
        member._value_, member.intensity, member.colour = value, intensity, colour
        return member

    TERRAIN = 0, 22, (0.39, 0.42, 0.30)
    ASPHALT = 1, 9, (0.31, 0.31, 0.325)
    SIDEWALK = 2, 26, (0.60, 0.585, 0.56)
    KERB = 3, 30, (0.70, 0.69, 0.66)
    CROSSING = 4, 9, (0.29, 0.29, 0.305)
    CROSSING_STRIPE = 5, 62, (0.88, 0.88, 0.86)
    PARKING = 6, 12, (0.27, 0.26, 0.255)
    PARKING_LINE = 7, 55, (0.80, 0.80, 0.78)
    LANE_LINE = 8, 60, (0.86, 0.86, 0.84)
    DIVIDER_LINE = 9, 48, (0.82, 0.66, 0.18)
    ISLAND = 10, 24, (0.30, 0.38, 0.21)
    METAL = 11, 40
    GLASS = 12, 7
    MASONRY = 13, 34
    FOLIAGE = 14, 20
    BARK = 15, 16
    CLOTH = 16, 24
    RUBBER = 17, 6
    PLASTIC = 18, 90
    NOTHING = 19, 0


DARK, GREY, WHITE = (0.05, 0.05, 0.055), (0.35, 0.35, 0.36), (0.93, 0.93, 0.90)
RED, SKIN = (0.68, 0.03, 0.04), (0.76, 0.55, 0.42)
PANE, WINDOW, FRAME = (0.10, 0.12, 0.14), (0.19, 0.24, 0.29), (0.62, 0.60, 0.56)
# Faces of a solid, as surface_normals numbers them.
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


def _facade(width: float, u: float, low: float, high: float) -> tuple[Decal, ...]:
    """Windows with frames in storeys of 3.2 m, one every ``width`` metres."""
    return (
        Decal(WALLS, (0.0, u + 0.05), (low - 0.03, high + 0.02), FRAME, (width, 3.2)),
        Decal(WALLS, (0.02, u), (low, high), WINDOW, (width, 3.2)),
    )


PATTERNS: dict[str, tuple[Decal, ...]] = {
    "plain": (),
    "car": (
        Decal(WALLS, (0.0, 1.0), (0.0, 0.16), DARK),
        Decal(SIDES, (0.43, 0.79), (-0.8, 0.75), DARK, ellipse=True),
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
        Decal(SIDES, (0.0, 0.92), (0.42, 0.78), PANE, (1.45, 0.0)),
        Decal(ENDS, (0.0, 0.9), (0.40, 0.80), PANE),
        Decal(FRONT, (0.72, 1.0), (0.12, 0.22), WHITE),
        Decal(REAR, (0.72, 1.0), (0.12, 0.22), RED),
    ),
    "cargo": (
        Decal(SIDES, (0.9, 1.0), (0.0, 1.0), FRAME, (0.6, 0.0)),
        Decal(REAR, (0.0, 0.02), (0.0, 1.0), DARK),
        Decal(REAR, (0.78, 1.0), (0.0, 0.12), RED),
    ),
    "cab": (
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
    "flats": _facade(2.6, 0.55, 0.28, 0.80),
    "shops": _facade(3.3, 0.75, 0.20, 0.82),
    "offices": _facade(1.9, 0.92, 0.25, 0.85),
}
FACADES = ("flats", "shops", "offices")
# Strength of the grain of a material and its texels per metre.
_GRAIN = {Material.MASONRY: (0.06, 15), Material.FOLIAGE: (0.30, 40), Material.BARK: (0.10, 30)}


def _make_noise(size: int) -> np.ndarray:
    """Tileable noise (size, size) float32 in -1..1 with detail of 1 to 32 texels."""
    rng = np.random.default_rng(20_190_318)
    total = np.zeros((size, size))
    for period in (1, 2, 4, 8, 32):
        layer = np.kron(rng.standard_normal((size // period,) * 2), np.ones((period, period)))
        for axis in (0, 1):  # a running mean over one period smooths the blocks
            layer = np.mean([np.roll(layer, shift, axis) for shift in range(period)], axis=0)
        total += layer / layer.std()
    return np.clip(total / (2.2 * total.std()), -1, 1).astype(np.float32)


_NOISE = _make_noise(512)


def noise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Noise in -1..1 at texel coordinates a, b (same shape); repeats every 512 texels."""
    return _NOISE[a.astype(np.int32) & 511, b.astype(np.int32) & 511]


def albedo(solids: Solids, index: int, point: np.ndarray, face: np.ndarray) -> np.ndarray:
    """Surface colours (n, 3) float32 in 0..1 of one solid, before light and haze.

    ``point`` (3, n) float32 on the solid, in its frame, metres; ``face`` (n,) which face each is
    on, as ``surface_normals`` numbers them.
    """
    half, taper = solids.half[index].astype(np.float32), solids.taper[index].astype(np.float32)
    out = np.tile(solids.colour[index], (point.shape[1], 1))
    if solids.material[index] in _GRAIN:
        strength, fine = _GRAIN[solids.material[index]]
        x, y, z = point * np.float32(fine)
        out *= (1 + strength * (noise(x, y) + noise(y + 90, z) + noise(z + 200, x)))[:, None]
    decals = PATTERNS[str(solids.pattern[index])]
    if not decals:
        return out
    height = point[2] + half[2]
    up = height / (2 * half[2])
    # Along a side or an end, from its middle line; a taper moves the line and narrows the face.
    side = (face == 2) | (face == 3)
    middle = np.where(side, (taper[1] - taper[0]) * up / 2, 0)
    wide = np.where(side, half[0] - (taper[0] + taper[1]) * up / 2, half[1] - taper[2] * up)
    along = np.where(side, point[0], point[1]) - middle
    for decal in decals:
        u, v, tone = np.abs(along) / wide, up, None
        if decal.period[0]:
            column = along / np.float32(decal.period[0])
            u = np.abs(column - np.floor(column) - np.float32(0.5)) * 2
        if decal.period[1]:
            row = height / np.float32(decal.period[1])
            v = row - np.floor(row)
            if decal.colour == WINDOW:  # rooms differ
                tone = 1 + 0.4 * noise(7 * np.floor(column) + index, 13 * np.floor(row))
        (u0, u1), (v0, v1) = decal.u, decal.v
        # Distance from the rectangle's middle: 1 on its border.
        du, dv = np.abs(2 * u - u0 - u1) / (u1 - u0), np.abs(2 * v - v0 - v1) / (v1 - v0)
        inside = np.hypot(du, dv) < 1 if decal.ellipse else np.maximum(du, dv) < 1
        inside &= np.isin(range(6), decal.faces)[face]
        out[inside] = decal.colour
        if tone is not None:
            out[inside] *= tone[inside, None]
    return out
