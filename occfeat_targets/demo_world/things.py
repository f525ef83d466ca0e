"""What stands and drives in the streets, as tables of parts.

Parts are in the frame of their thing: origin on the ground below its centre, x forward, y left,
metres. Annotated things stay 3 cm inside their box, so that lidar noise on them does too.
"""

from typing import NamedTuple

from occfeat_targets.demo_world.solids import Colour, Part, Shape
from occfeat_targets.demo_world.surface import DARK, GREY, WHITE, Material

BOX, CYLINDER, ELLIPSOID = Shape
METAL, GLASS, MASONRY, FOLIAGE, BARK, CLOTH, RUBBER, PLASTIC = list(Material)[11:19]
OWN = None  # the colour of the thing
BLUE, BLACK, ORANGE = (0.15, 0.2, 0.35), (0.14, 0.14, 0.17), (0.93, 0.36, 0.06)


class Model(NamedTuple):
    """An annotated thing: nominal box ``size`` (width, length, height) in metres, and its parts.

    ``share`` is its share among the models of its category; ``colour`` None is any colour.
    """

    size: tuple[float, float, float]
    parts: tuple[Part, ...]
    share: float = 1.0
    colour: Colour | None = None


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


def building(facade: str) -> tuple[Part, ...]:
    """A building of 1 x 1 x 1 m, to be scaled, with its walls painted as ``facade``."""
    return (
        Part(BOX, MASONRY, OWN, (-0.5, 0.5), (-0.5, 0.5), (0, 1), facade),
        Part(BOX, MASONRY, GREY, (-0.51, 0.51), (-0.51, 0.51), (0.99, 1.02)),
        Part(BOX, MASONRY, GREY, (-0.1, 0.15), (-0.2, 0.15), (1, 1.12)),
    )
