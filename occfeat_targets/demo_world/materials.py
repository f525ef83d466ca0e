"""Surface materials: what the ground raster stores, what the lidar's intensity is made from."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Material(IntEnum):
    """Material of a surface; the first eleven are ground surfaces."""

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
    NOTHING = 255


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


def intensity_table() -> np.ndarray:
    """Mean lidar intensity, 0..255, of every material: (256,) float32."""
    table = np.zeros(256, dtype=np.float32)
    for material, value in {
        Material.TERRAIN: 22,
        Material.ASPHALT: 9,
        Material.SIDEWALK: 26,
        Material.KERB: 30,
        Material.CROSSING: 9,
        Material.CROSSING_STRIPE: 62,
        Material.PARKING: 12,
        Material.PARKING_LINE: 55,
        Material.LANE_LINE: 60,
        Material.DIVIDER_LINE: 48,
        Material.ISLAND: 24,
        Material.METAL: 40,
        Material.GLASS: 7,
        Material.MASONRY: 34,
        Material.FOLIAGE: 20,
        Material.BARK: 16,
        Material.CLOTH: 24,
        Material.RUBBER: 6,
        Material.PLASTIC: 90,
    }.items():
        table[material] = value
    return table


def ground_palette(style: np.ndarray) -> np.ndarray:
    """Ground colours, (11, 3) float32 in 0..1, indexed by ground material.

    ``style`` (3,) in 0..1 varies the asphalt's brightness, the pavement's warmth and the terrain.
    """
    asphalt = np.array([0.27, 0.27, 0.285]) + 0.09 * style[0]
    walk = np.array([0.60, 0.585, 0.56]) + np.array([0.08, 0.0, -0.08]) * (style[1] - 0.4)
    dry, green = np.array([0.47, 0.45, 0.38]), np.array([0.31, 0.39, 0.22])
    terrain = dry + (green - dry) * style[2]
    return np.array(
        [
            terrain,
            asphalt,
            walk,
            [0.70, 0.69, 0.66],
            asphalt * 0.93,
            [0.88, 0.88, 0.86],
            asphalt * 0.80 + [0.035, 0.015, 0.0],
            [0.80, 0.80, 0.78],
            [0.86, 0.86, 0.84],
            [0.82, 0.66, 0.18],
            [0.30, 0.38, 0.21],
        ],
        dtype=np.float32,
    )
