"""Colours of surfaces as functions of the place on a solid, and the noise they are made with."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Paint(IntEnum):
    """How a solid's surface is coloured."""

    PLAIN = 0
    CAR_BODY = 1
    CABIN = 2
    WHEEL = 3
    SPOKES = 4
    BUS = 5
    CARGO = 6
    TRUCK_CAB = 7
    HEAD = 8
    CONE = 9
    FACADE = 10
    FOLIAGE = 11
    SIGNAL = 12


FACE_FRONT, FACE_REAR, FACE_LEFT, FACE_RIGHT, FACE_TOP, FACE_BOTTOM = range(6)
_NOISE_SIZE = 512


def _box_mean(values: np.ndarray, width: int, axis: int) -> np.ndarray:
    """Mean of ``width`` neighbours along an axis of a tileable array."""
    wrapped = np.concatenate([values, np.take(values, range(width), axis)], axis)
    total = np.cumsum(wrapped, axis)
    count = values.shape[axis]
    upper = np.take(total, range(width, width + count), axis)
    return (upper - np.take(total, range(count), axis)) / width


def _make_noise(scales: tuple[tuple[int, float], ...]) -> np.ndarray:
    """Tileable noise (512, 512) float32 in -1..1; ``scales`` are (texels, weight) of its detail."""
    rng = np.random.default_rng(20_190_318)
    total = np.zeros((_NOISE_SIZE, _NOISE_SIZE))
    for period, weight in scales:
        coarse = rng.standard_normal((_NOISE_SIZE // period,) * 2)
        layer = np.kron(coarse, np.ones((period, period)))
        for _ in range(2 if period > 1 else 0):
            for axis in (0, 1):
                layer = _box_mean(layer, period, axis)
        total += weight * layer / layer.std()
    return np.clip(total / (2.2 * total.std()), -1, 1).astype(np.float32)


NOISE = _make_noise(((1, 0.55), (2, 0.5), (4, 0.45), (8, 0.4), (32, 0.35)))
CLOUDS = _make_noise(((16, 0.3), (32, 0.6), (64, 0.9), (128, 1.0)))


def noise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Noise in -1..1 at texel coordinates a, b (same shape); repeats every 512 texels."""
    mask = _NOISE_SIZE - 1
    return NOISE[a.astype(np.int32) & mask, b.astype(np.int32) & mask]


def cell_hash(a: np.ndarray, b: np.ndarray, seed: float) -> np.ndarray:
    """A random number in 0..1 for every integer cell (a, b), float32."""
    mixed = (
        a.astype(np.int64) * 374761393
        + b.astype(np.int64) * 668265263
        + int(seed * 1e6) * 1274126177
    )
    mixed = (mixed ^ (mixed >> 13)) * 1103515245
    return (((mixed ^ (mixed >> 16)) & 0xFFFF) / np.float32(65535)).astype(np.float32)


def albedo(
    paint: int,
    point: np.ndarray,
    face: np.ndarray,
    half: np.ndarray,
    colour: np.ndarray,
    seed: float,
) -> np.ndarray:
    """Surface colours.

    Args:
        paint: one of Paint.
        point: (3, n) float32 points on the solid, in its frame, metres.
        face: (n,) which face of the solid, FACE_*.
        half: (3,) half extents.
        colour: (2, 3) the solid's two colours.
        seed: 0..1, varies the pattern.

    Returns:
        (n, 3) float32 colours in 0..1, before light and haze.
    """
    out = np.broadcast_to(colour[0], (point.shape[1], 3)).astype(np.float32)
    painter = _PAINTERS.get(paint)
    if painter is not None:
        painter(out, point, face, half, colour, seed)
    return out


def _car_body(out, point, face, half, colour, seed):
    x, y, z = point
    axle, radius, waist = colour[1]
    height = (z + half[2]) / (2 * half[2])
    side = (face == FACE_LEFT) | (face == FACE_RIGHT)
    ground = z + waist - half[2]
    out[height < 0.16] = 0.06
    for wheel in (-axle, axle):
        out[side & ((x - wheel) ** 2 + (ground - radius) ** 2 < (radius + 0.06) ** 2)] = 0.03
    for seam in (-0.11 * half[0], 0.37 * half[0]):
        out[side & (np.abs(x - seam) < 0.012) & (height > 0.18)] *= 0.35
        out[side & (np.abs(x - seam + 0.16) < 0.09) & (np.abs(height - 0.80) < 0.03)] *= 0.5
    wide = np.abs(y) / half[1]
    front, rear = face == FACE_FRONT, face == FACE_REAR
    out[front & (wide < 0.55) & (height > 0.30) & (height < 0.66)] = 0.04
    out[front & (wide > 0.58) & (height > 0.58) & (height < 0.84)] = (0.93, 0.94, 0.92)
    out[rear & (wide > 0.62) & (height > 0.55) & (height < 0.88)] = (0.66, 0.03, 0.04)
    plate = (np.abs(y) < 0.26) & (height > (0.34)) & (height < 0.52)
    out[(front | rear) & plate] = (0.88, 0.88, 0.84)


def _cabin(out, point, face, half, colour, seed):
    x, y, z = point
    up = (z + half[2]) / (2 * half[2])
    side = (face == FACE_LEFT) | (face == FACE_RIGHT)
    ends = (face == FACE_FRONT) | (face == FACE_REAR)
    pillar = (np.abs(x + 0.05 * half[0]) < 0.05) | (
        np.abs(x) > 0.90 * half[0] - 0.55 * half[2] * up
    )
    glass = (side & ~pillar & (up > 0.06) & (up < 0.86)) | (
        ends & (np.abs(y) < half[1] * (0.90 - 0.12 * up)) & (up > 0.05) & (up < 0.92)
    )
    shade = (0.6 + 0.9 * up)[:, None] * colour[1]
    out[glass] = shade[glass]


def _wheel(out, point, face, half, colour, seed):
    r = np.hypot(point[0], point[2]) / half[0]
    out[r < 0.62] = colour[1]
    spoke = np.cos(5 * np.arctan2(point[2], point[0])) < -0.2
    out[(r < 0.52) & (r > 0.18) & spoke] = 0.10


def _spokes(out, point, face, half, colour, seed):
    r = np.hypot(point[0], point[2]) / half[0]
    out[r < 0.86] = (0.42, 0.43, 0.43)
    out[r < 0.12] = 0.1


def _bus(out, point, face, half, colour, seed):
    x, y, z = point
    up = (z + half[2]) / (2 * half[2])
    side = (face == FACE_LEFT) | (face == FACE_RIGHT)
    out[up > 0.80] = colour[1]
    out[up < 0.07] = 0.06
    band = (up > 0.42) & (up < 0.78)
    post = np.abs((x / 1.45) % 1.0 - 0.5) > 0.46
    out[side & band & ~post] = (0.08, 0.10, 0.12)
    door = (face == FACE_RIGHT) & (np.abs(np.abs(x - 0.1 * half[0]) - 0.7 * half[0]) < 0.6)
    out[door & (up > 0.05) & (up < 0.78)] = (0.10, 0.12, 0.13)
    inside = np.abs(y) < 0.9 * half[1]
    out[(face == FACE_FRONT) & inside & (up > 0.34) & (up < 0.80)] = (0.09, 0.11, 0.13)
    sign = np.abs(y) < 0.6 * half[1]
    out[(face == FACE_FRONT) & sign & (up > 0.85) & (up < 0.95)] = (0.95, 0.62, 0.10)
    out[(face == FACE_REAR) & inside & (up > 0.55) & (up < 0.80)] = (0.09, 0.11, 0.13)
    lamp = (np.abs(y) > 0.72 * half[1]) & (up > 0.12) & (up < 0.22)
    out[(face == FACE_FRONT) & lamp] = (0.95, 0.95, 0.9)
    out[(face == FACE_REAR) & lamp] = (0.7, 0.03, 0.03)


def _cargo(out, point, face, half, colour, seed):
    x, y, z = point
    up = (z + half[2]) / (2 * half[2])
    side = (face == FACE_LEFT) | (face == FACE_RIGHT)
    out[side & (np.abs((x / 0.6) % 1.0 - 0.5) > 0.47)] *= 0.82
    if seed < 0.5:
        out[side & (np.abs(up - 0.55) < 0.16) & (np.abs(x) < 0.6 * half[0])] = colour[1]
    out[(face == FACE_REAR) & (np.abs(y) < 0.02)] = 0.15
    out[up < 0.04] = 0.15
    lamp = (face == FACE_REAR) & (np.abs(y) > 0.78 * half[1]) & (up < 0.12)
    out[lamp] = (0.7, 0.03, 0.03)


def _truck_cab(out, point, face, half, colour, seed):
    x, y, z = point
    up = (z + half[2]) / (2 * half[2])
    side = (face == FACE_LEFT) | (face == FACE_RIGHT)
    glass = (up > 0.55) & (up < 0.88)
    out[(face == FACE_FRONT) & glass & (np.abs(y) < 0.88 * half[1])] = colour[1]
    out[side & glass & (x > -0.35 * half[0]) & (x < 0.62 * half[0])] = colour[1]
    out[(face == FACE_FRONT) & (np.abs(y) < 0.6 * half[1]) & (up > 0.2) & (up < 0.45)] = 0.06
    lamp = (np.abs(y) > 0.66 * half[1]) & (up > 0.10) & (up < 0.20)
    out[(face == FACE_FRONT) & lamp] = (0.95, 0.95, 0.9)
    out[up < 0.06] = 0.06


def _head(out, point, face, half, colour, seed):
    out[(point[0] > -0.15 * half[0]) & (point[2] < 0.45 * half[2])] = colour[1]


def _cone(out, point, face, half, colour, seed):
    up = (point[2] + half[2]) / (2 * half[2])
    out[((up > 0.30) & (up < 0.50)) | ((up > 0.64) & (up < 0.80))] = colour[1]


def _signal(out, point, face, half, colour, seed):
    front = face == FACE_FRONT
    centres = (0.3, 0.0, -0.3)
    lit = 2 if seed < 0.5 else 0
    for number, centre in enumerate(centres):
        inside = front & (point[1] ** 2 + (point[2] - centre) ** 2 < 0.115**2)
        out[inside] = colour[1] * 1.25 if number == lit else 0.04


def _facade(out, point, face, half, colour, seed):
    x, y, z = point
    wide = np.where((face == FACE_LEFT) | (face == FACE_RIGHT), x + half[0], y + half[1])
    ground = z + half[2]
    wall = face < FACE_TOP
    brick = noise(wide * 14, ground * 18)
    out *= (1 + 0.09 * brick)[:, None]
    style = int(seed * 3.999)
    storey, bay = (3.3, 2.6) if style == 0 else (3.1, 3.3) if style == 1 else (3.6, 1.9)
    size_x, low, high = (
        (0.28, 0.28, 0.80),
        (0.34, 0.30, 0.78),
        (0.42, 0.16, 0.90),
        (0.50, 0.25, 0.85),
    )[style]
    shop = 4.0 if seed * 7 % 1 > 0.35 else 0.8
    level, column = np.floor((ground - shop) / storey), np.floor(wide / bay)
    fy, fx = (ground - shop) / storey - level, np.abs(wide / bay - column - 0.5)
    upper = wall & (ground > shop) & (ground < 2 * half[2] - 0.8)
    out[upper & (fy > 0.955)] *= 0.80
    frame = upper & (fx < size_x + 0.03) & (fy > low - 0.03) & (fy < high + 0.02)
    out[frame] = colour[1]
    pane = upper & (fx < size_x) & (fy > low) & (fy < high) & (fx > 0.015)
    tone = cell_hash(column, level, seed)
    glass = np.stack([0.13 + 0.12 * tone, 0.17 + 0.15 * tone, 0.21 + 0.17 * tone], axis=-1)
    glass *= (0.75 + 0.5 * fy)[:, None]
    blind = tone > 0.8
    glass[blind & (fy > 0.5)] = (0.62, 0.60, 0.54)
    out[pane] = glass[pane]
    if shop > 1:
        _shopfront(out, wide, ground, wall, colour, seed)


def _shopfront(out, wide, ground, wall, colour, seed):
    """Glass, awnings and doors of a ground floor with shops."""
    unit = np.floor(wide / 5.5)
    fx = wide / 5.5 - unit
    tone = cell_hash(unit, unit * 0, seed)
    front = wall & (ground < 4.0)
    awning = np.stack(
        [0.25 + 0.5 * tone, 0.2 + 0.35 * (tone * 7 % 1), 0.2 + 0.4 * (tone * 13 % 1)], axis=-1
    )
    sign = front & (ground > 2.9) & (ground < 3.6) & (fx > 0.05) & (fx < 0.95)
    out[sign] = awning[sign]
    window = front & (ground > 0.6) & (ground < 2.8) & (fx > 0.08) & (fx < 0.70)
    goods = cell_hash(np.floor(wide / 0.45), np.floor(ground / 0.9), seed)
    inside = np.where(goods > 0.55, 0.12 + 0.30 * goods, 0.11 + 0.05 * ground)
    out[window] = (inside[:, None] * np.array([1.0, 0.95, 0.86], np.float32))[window]
    out[window & (np.abs(fx - 0.39) < 0.008)] = 0.30
    door = front & (ground < 2.5) & (fx > 0.76) & (fx < 0.92)
    out[door] = (0.55 * awning)[door]
    out[front & (ground < 0.3)] *= 0.6


def _foliage(out, point, face, half, colour, seed):
    x, y, z = point + np.float32(7 * seed)
    leaf = noise(x * 55, y * 55) + noise(y * 55 + 90, z * 55) + noise(z * 55 + 200, x * 55)
    clump = noise(x * 5, z * 5 + 30) + noise(y * 5, z * 5)
    depth = 0.82 + 0.28 * point[2] / half[2]
    out *= (depth * np.clip(1 + 0.30 * leaf + 0.16 * clump, 0.3, 1.8))[:, None]


_PAINTERS = {
    Paint.CAR_BODY: _car_body,
    Paint.CABIN: _cabin,
    Paint.WHEEL: _wheel,
    Paint.SPOKES: _spokes,
    Paint.BUS: _bus,
    Paint.CARGO: _cargo,
    Paint.TRUCK_CAB: _truck_cab,
    Paint.HEAD: _head,
    Paint.CONE: _cone,
    Paint.FACADE: _facade,
    Paint.FOLIAGE: _foliage,
    Paint.SIGNAL: _signal,
}
