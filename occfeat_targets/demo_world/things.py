"""What stands and drives in the streets, as tables of parts, their materials and what is on them.

A part is in the frame of its thing: origin on the ground below its centre, x forward, y left, z up,
metres. Annotated things stay 3 cm inside their box, so that lidar noise on them does too.
"""

from enum import IntEnum
from typing import NamedTuple

Interval = tuple[float, float]
Colour = tuple[float, float, float]


class Material(IntEnum):
    """Materials: those before METAL are of the ground, the others are coloured by their things."""

    intensity: float  # mean of the lidar's, 0..255
    colour: Colour  # 0..1

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


class Shape(IntEnum):
    """Shape of a solid; boxes may narrow towards the top, cylinders are upright."""

    BOX = 0
    CYLINDER = 1
    ELLIPSOID = 2


class Part(NamedTuple):
    """One solid of a thing: its extent along x, y and z in the thing's frame, metres."""

    shape: Shape
    material: Material
    colour: Colour | None  # None: the thing's own
    x: Interval
    y: Interval
    z: Interval
    pattern: str = "plain"  # of PATTERNS
    taper: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """By how many metres a box's front, rear and both sides are pulled in at the top."""


class Decal(NamedTuple):
    """A rectangle (or the ellipse in it) of another colour on some faces of a solid."""

    faces: tuple[int, ...]
    u: Interval  # distance from the face's middle line, 0..1, so that left equals right
    v: Interval  # height, 0..1
    colour: Colour
    period: tuple[float, float] = (0.0, 0.0)
    """Metres along u and v, 0: none. u and v count within each repetition instead."""
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


BOX, CYLINDER, ELLIPSOID = Shape
METAL, GLASS, MASONRY, FOLIAGE, BARK, CLOTH, RUBBER, PLASTIC = list(Material)[11:19]
OWN = None  # the colour of the thing
BLUE, BLACK, ORANGE = (0.15, 0.2, 0.35), (0.14, 0.14, 0.17), (0.93, 0.36, 0.06)


class Model(NamedTuple):
    """How an annotated thing looks."""

    size: tuple[float, float, float]  # nominal width, length, height of its box, metres
    parts: tuple[Part, ...]
    share: float = 1.0  # among the models of its category
    colour: Colour | None = None  # None: any


def _wheels(radius: float, outer: float, width: float, *axles: float) -> tuple[Part, ...]:
    """Wheels on both sides at every axle; ``outer`` is the distance of their outside from y = 0."""
    return tuple(
        Part(ELLIPSOID, RUBBER, DARK, (x - radius, x + radius), y, (0, 2 * radius), "wheel")
        for x in axles
        for y in ((outer - width, outer), (-outer, width - outer))
    )


_SALOON = (
    Part(BOX, METAL, OWN, (-2.26, 2.26), (-0.89, 0.89), (0.26, 0.89), "car", (0.14, 0.08, 0.05)),
    Part(BOX, METAL, DARK, (-2.1, 2.1), (-0.77, 0.77), (0.13, 0.29)),
    Part(BOX, GLASS, OWN, (-1.9, 1.05), (-0.85, 0.85), (0.89, 1.44), "cabin", (0.87, 0.65, 0.16)),
    *_wheels(0.33, 0.89, 0.22, -1.38, 1.38),
)
_SUV = (
    Part(BOX, METAL, OWN, (-2.31, 2.31), (-0.93, 0.93), (0.30, 1.01), "car", (0.12, 0.06, 0.05)),
    Part(BOX, METAL, DARK, (-2.15, 2.15), (-0.8, 0.8), (0.16, 0.33)),
    Part(BOX, GLASS, OWN, (-2.25, 1.1), (-0.89, 0.89), (1.01, 1.67), "cabin", (0.8, 0.35, 0.16)),
    *_wheels(0.37, 0.93, 0.24, -1.41, 1.41),
)
_VAN = (
    Part(BOX, METAL, OWN, (-2.56, 2.56), (-0.98, 0.98), (0.30, 1.15), "car", (0.08, 0.04, 0.05)),
    Part(BOX, METAL, DARK, (-2.4, 2.4), (-0.8, 0.8), (0.16, 0.33)),
    Part(BOX, GLASS, OWN, (-2.52, 1.8), (-0.94, 0.94), (1.15, 2.07), "cabin", (0.75, 0.1, 0.12)),
    *_wheels(0.37, 0.98, 0.24, -1.56, 1.56),
)
_BUS = (
    Part(BOX, METAL, OWN, (-5.56, 5.56), (-1.34, 1.34), (0.32, 3.21), "bus", (0.12, 0.05, 0.03)),
    Part(BOX, METAL, DARK, (-5.0, 5.0), (-1.2, 1.2), (0.19, 0.35)),
    *_wheels(0.48, 1.34, 0.28, -3.1, 3.8),
)
_TRUCK = (
    Part(BOX, METAL, OWN, (-3.46, 1.06), (-1.14, 1.14), (0.95, 2.91), "cargo"),
    Part(BOX, METAL, DARK, (-3.4, 2.8), (-0.85, 0.85), (0.55, 0.95)),
    Part(BOX, METAL, OWN, (1.26, 3.46), (-1.1, 1.1), (0.45, 2.5), "cab", (0.22, 0.02, 0.08)),
    *_wheels(0.46, 1.12, 0.28, -2.8, -1.82, 2.5),
)
_TRAILER = (
    Part(BOX, METAL, WHITE, (-4.7, 4.7), (-1.21, 1.21), (0.9, 3.46), "cargo"),
    *_wheels(0.46, 1.19, 0.28, -3.6, -2.3),
)
_MOTORCYCLE = (
    *_wheels(0.30, 0.07, 0.14, -0.72, 0.72)[::2],
    Part(BOX, METAL, OWN, (-0.6, 0.6), (-0.15, 0.15), (0.32, 0.80), "plain", (0.2, 0.1, 0.05)),
    Part(BOX, RUBBER, DARK, (-0.57, 0.07), (-0.13, 0.13), (0.77, 0.87)),
    Part(BOX, METAL, GREY, (0.54, 0.6), (-0.03, 0.03), (0.2, 1.05)),
    Part(BOX, METAL, DARK, (0.48, 0.56), (-0.36, 0.36), (1.0, 1.05)),
)
_BICYCLE = (
    *_wheels(0.34, 0.025, 0.05, -0.5, 0.5)[::2],
    Part(BOX, METAL, OWN, (-0.35, 0.35), (-0.025, 0.025), (0.57, 0.63)),
    Part(BOX, METAL, OWN, (-0.23, -0.17), (-0.03, 0.03), (0.32, 0.92)),
    Part(BOX, METAL, GREY, (0.32, 0.38), (-0.03, 0.03), (0.2, 1.05)),
    Part(BOX, METAL, DARK, (0.26, 0.34), (-0.27, 0.27), (1.0, 1.05)),
)
_RIDER = (
    Part(BOX, CLOTH, BLACK, (-0.29, 0.19), (-0.21, 0.21), (0.69, 0.87)),
    Part(CYLINDER, CLOTH, BLACK, (0.1, 0.22), (0.07, 0.19), (0.2, 0.85)),
    Part(CYLINDER, CLOTH, BLACK, (0.1, 0.22), (-0.19, -0.07), (0.2, 0.85)),
    Part(ELLIPSOID, CLOTH, BLUE, (-0.27, 0.07), (-0.23, 0.23), (0.82, 1.48)),
    Part(ELLIPSOID, PLASTIC, WHITE, (-0.13, 0.13), (-0.12, 0.12), (1.42, 1.70), "face"),
)
_CONE = (
    Part(BOX, PLASTIC, OWN, (-0.14, 0.14), (-0.14, 0.14), (0, 0.74), "bands", (0.12, 0.12, 0.12)),
    Part(BOX, PLASTIC, DARK, (-0.17, 0.17), (-0.17, 0.17), (0, 0.04)),
)
_BARRIER = (
    Part(BOX, PLASTIC, OWN, (-0.91, 0.91), (-0.21, 0.21), (0, 0.96), "bands", (0.0, 0.0, 0.13)),
)


def _person(step: float) -> tuple[Part, ...]:
    """A person of 1.75 m whose feet are ``2 * step`` metres apart along x."""
    return (
        Part(CYLINDER, CLOTH, BLACK, (step - 0.08, step + 0.08), (0.02, 0.18), (0, 0.88)),
        Part(CYLINDER, CLOTH, BLACK, (-step - 0.08, 0.08 - step), (-0.18, -0.02), (0, 0.88)),
        Part(CYLINDER, CLOTH, OWN, (-step - 0.06, 0.06 - step), (0.15, 0.26), (0.82, 1.38)),
        Part(CYLINDER, CLOTH, OWN, (step - 0.06, step + 0.06), (-0.26, -0.15), (0.82, 1.38)),
        Part(ELLIPSOID, CLOTH, OWN, (-0.15, 0.15), (-0.23, 0.23), (0.74, 1.57)),
        Part(ELLIPSOID, CLOTH, DARK, (-0.1, 0.12), (-0.1, 0.1), (1.44, 1.71), "face"),
    )


#: Models of every category; with ".moving" those of two-wheelers with a rider and of walkers.
MODELS: dict[str, tuple[Model, ...]] = {
    "vehicle.car": (
        Model((1.85, 4.6, 1.48), _SALOON, 0.55),
        Model((1.93, 4.7, 1.71), _SUV, 0.32),
        Model((2.03, 5.2, 2.11), _VAN, 0.13),
    ),
    "vehicle.emergency.police": (Model((1.85, 4.6, 1.48), _SALOON, 1.0, WHITE),),
    "vehicle.bus.rigid": (Model((2.75, 11.2, 3.25), _BUS),),
    "vehicle.truck": (Model((2.35, 7.0, 2.95), _TRUCK),),
    "vehicle.construction": (Model((2.35, 7.0, 2.95), _TRUCK, 1.0, (0.90, 0.62, 0.06)),),
    "vehicle.trailer": (Model((2.5, 9.5, 3.5), _TRAILER),),
    "vehicle.motorcycle": (Model((0.80, 2.12, 1.12), _MOTORCYCLE),),
    "vehicle.motorcycle.moving": (Model((0.80, 2.12, 1.74), _MOTORCYCLE + _RIDER),),
    "vehicle.bicycle": (Model((0.62, 1.75, 1.12), _BICYCLE),),
    "vehicle.bicycle.moving": (Model((0.62, 1.75, 1.74), _BICYCLE + _RIDER),),
    "human.pedestrian": (Model((0.59, 0.52, 1.75), _person(0.0)),),
    "human.pedestrian.moving": (Model((0.59, 0.52, 1.75), _person(0.11)),),
    "movable_object.trafficcone": (Model((0.42, 0.42, 0.78), _CONE, 1.0, ORANGE),),
    "movable_object.barrier": (Model((0.5, 1.9, 1.0), _BARRIER, 1.0, ORANGE),),
}

#: The ego car as its own lidar sees it, in the ego frame.
EGO_BODY = (
    Part(BOX, METAL, GREY, (0.26, 1.5), (-0.5, 0.5), (1.48, 1.58)),
    Part(BOX, METAL, GREY, (-0.5, 3.2), (-0.8, 0.8), (0.42, 1.08)),
    Part(BOX, METAL, GREY, (-0.2, 1.8), (-0.6, 0.6), (0.94, 1.46)),
)
#: A tree of 7 m.
TREE = (
    Part(CYLINDER, BARK, (0.33, 0.27, 0.21), (-0.15, 0.15), (-0.15, 0.15), (0, 3.5)),
    Part(ELLIPSOID, FOLIAGE, OWN, (-1.2, 1.2), (-1.2, 1.2), (4.5, 7.0)),
    Part(ELLIPSOID, FOLIAGE, OWN, (-0.1, 2.0), (-1.1, 1.0), (3.0, 5.6)),
    Part(ELLIPSOID, FOLIAGE, OWN, (-1.0, 1.0), (-0.1, 2.0), (2.8, 5.3)),
    Part(ELLIPSOID, FOLIAGE, OWN, (-2.1, 0.0), (-1.0, 1.1), (2.9, 5.7)),
    Part(ELLIPSOID, FOLIAGE, OWN, (-0.9, 1.2), (-1.9, 0.1), (2.7, 5.2)),
)
#: A street lamp that reaches out to its left.
LAMP = (
    Part(CYLINDER, METAL, GREY, (-0.08, 0.08), (-0.08, 0.08), (0, 7.5)),
    Part(BOX, METAL, GREY, (-0.05, 0.05), (-0.05, 1.85), (7.45, 7.55)),
    Part(BOX, PLASTIC, WHITE, (-0.12, 0.12), (1.4, 2.0), (7.38, 7.5)),
)


#: Buildings of 1 x 1 x 1 m, to be scaled.
BUILDINGS = tuple(
    (
        Part(BOX, MASONRY, OWN, (-0.5, 0.5), (-0.5, 0.5), (0, 1), facade),
        Part(BOX, MASONRY, GREY, (-0.51, 0.51), (-0.51, 0.51), (0.99, 1.02)),
        Part(BOX, MASONRY, GREY, (-0.1, 0.15), (-0.2, 0.15), (1, 1.12)),
    )
    for facade in ("flats", "shops", "offices")
)
