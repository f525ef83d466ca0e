"""Annotated things as composites of solids: vehicles, people, cones and barriers.

Composites are built in their own frame: origin on the ground below the centre, x forward, y left. A
vehicle or person fills its box (length, width, height) but for MARGIN on every side and at the top,
so that lidar noise on its skin stays inside the annotated box.
"""

from __future__ import annotations

from occfeat_targets.demo_world.materials import Material
from occfeat_targets.demo_world.paint import Paint
from occfeat_targets.demo_world.primitives import Kind, SolidBuilder

MARGIN = 0.03
DARK = (0.05, 0.05, 0.055)
GREY = (0.35, 0.35, 0.36)
GLASS = (0.10, 0.12, 0.14)
Colour = tuple[float, float, float]


def add_vehicle(out: SolidBuilder, category: str, size, colour, seed: float, rider: bool) -> None:
    """Add a vehicle of a nuScenes category; ``size`` is (width, length, height), metres."""
    width, length, height = (size[0] - 2 * MARGIN, size[1] - 2 * MARGIN, size[2] - MARGIN)
    name = category.split(".")[1] if category.startswith("vehicle.") else category
    if name in ("motorcycle", "bicycle"):
        _two_wheeler(out, name, length, width, height, colour, seed, rider)
    elif name == "bus":
        _bus(out, length, width, height, colour, seed)
    elif name in ("truck", "construction"):
        _truck(out, length, width, height, colour, seed)
    elif name == "trailer":
        _trailer(out, length, width, height, colour, seed)
    else:
        _car(out, length, width, height, colour, seed)


def _wheels(out, positions, y, radius, thickness=0.11):
    for x in positions:
        for side in (-1, 1):
            out.add(
                Kind.ELLIPSOID,
                (x, side * (y - thickness), radius),
                (radius, thickness, radius),
                Material.RUBBER,
                Paint.WHEEL,
                DARK,
                GREY,
            )


def _car(out, length, width, height, colour, seed):
    van = height > 1.75
    radius = 0.33 if height < 1.7 else 0.37
    sill, waist = 0.26, height * (0.56 if van else 0.60)
    axle = 0.30 * length
    out.add(
        Kind.TAPER,
        (0, 0, (sill + waist) / 2),
        (length / 2, width / 2, (waist - sill) / 2),
        Material.METAL,
        Paint.CAR_BODY,
        colour,
        (axle, radius, waist),
        seed=seed,
        taper=(0.14 if not van else 0.05, 0.08, 0.05),
    )
    out.add(
        Kind.BOX,
        (0, 0, 0.21),
        (0.46 * length, 0.42 * width, 0.08),
        Material.METAL,
        Paint.PLAIN,
        DARK,
    )
    if van:
        front, rear, slope_front, slope_rear = 0.34 * length, -0.49 * length, 0.75, 0.12
    else:
        hatch = seed > 0.5
        front, rear = 0.23 * length, (-0.485 if hatch else -0.40) * length
        slope_front, slope_rear = 0.19 * length, (0.09 if hatch else 0.15) * length
    out.add(
        Kind.TAPER,
        ((front + rear) / 2, 0, (waist + height) / 2),
        ((front - rear) / 2, width / 2 - 0.05, (height - waist) / 2),
        Material.GLASS,
        Paint.CABIN,
        colour,
        GLASS,
        seed=seed,
        taper=(slope_front, slope_rear, 0.16),
    )
    _wheels(out, (-axle, axle), width / 2, radius)


def _bus(out, length, width, height, colour, seed):
    out.add(
        Kind.TAPER,
        (0, 0, (0.32 + height) / 2),
        (length / 2, width / 2, (height - 0.32) / 2),
        Material.METAL,
        Paint.BUS,
        colour,
        (0.85, 0.85, 0.86),
        seed=seed,
        taper=(0.12, 0.05, 0.03),
    )
    out.add(
        Kind.BOX,
        (0, 0, 0.27),
        (0.45 * length, 0.43 * width, 0.08),
        Material.METAL,
        Paint.PLAIN,
        DARK,
    )
    _wheels(out, (-0.28 * length, 0.34 * length), width / 2 + 0.0, 0.48, 0.14)


def _truck(out, length, width, height, colour, seed):
    cab = min(2.2, 0.32 * length)
    cab_height = min(height, max(2.0, 0.85 * height))
    cargo = (0.82, 0.82, 0.80) if seed < 0.6 else (0.55, 0.42, 0.30)
    out.add(
        Kind.BOX,
        (-cab / 2 - 0.1, 0, (0.95 + height) / 2),
        ((length - cab - 0.2) / 2, width / 2, (height - 0.95) / 2),
        Material.METAL,
        Paint.CARGO,
        cargo,
        colour,
        seed=seed,
    )
    out.add(
        Kind.BOX,
        (-0.05 * length, 0, 0.75),
        (0.44 * length, 0.36 * width, 0.2),
        Material.METAL,
        Paint.PLAIN,
        DARK,
    )
    out.add(
        Kind.TAPER,
        (length / 2 - cab / 2, 0, (0.45 + cab_height) / 2),
        (cab / 2, width / 2 - 0.04, (cab_height - 0.45) / 2),
        Material.METAL,
        Paint.TRUCK_CAB,
        colour,
        GLASS,
        seed=seed,
        taper=(0.22, 0.02, 0.08),
    )
    _wheels(out, (-0.40 * length, -0.26 * length, 0.36 * length), width / 2 - 0.03, 0.46, 0.14)


def _trailer(out, length, width, height, colour, seed):
    out.add(
        Kind.BOX,
        (0, 0, (0.9 + height) / 2),
        (length / 2, width / 2, (height - 0.9) / 2),
        Material.METAL,
        Paint.CARGO,
        (0.80, 0.80, 0.82),
        colour,
        seed=seed,
    )
    _wheels(out, (-0.38 * length, -0.24 * length), width / 2 - 0.03, 0.46, 0.14)


def _two_wheeler(out, name, length, width, height, colour, seed, rider):
    motor = name == "motorcycle"
    radius = 0.30 if motor else 0.34
    reach = length / 2 - radius
    thick = 0.07 if motor else 0.025
    for x in (-reach, reach):
        out.add(
            Kind.ELLIPSOID,
            (x, 0, radius),
            (radius, thick, radius),
            Material.RUBBER,
            Paint.WHEEL if motor else Paint.SPOKES,
            DARK,
            GREY,
        )
    seat = 0.80 if motor else 0.92
    if motor:
        out.add(
            Kind.TAPER,
            (0, 0, 0.56),
            (0.62 * reach + 0.15, 0.15, 0.24),
            Material.METAL,
            Paint.PLAIN,
            colour,
            taper=(0.2, 0.1, 0.05),
        )
        out.add(Kind.BOX, (-0.25, 0, 0.82), (0.32, 0.13, 0.05), Material.RUBBER, Paint.PLAIN, DARK)
    else:
        out.add(
            Kind.BOX, (0, 0, 0.60), (reach * 0.7, 0.025, 0.025), Material.METAL, Paint.PLAIN, colour
        )
        out.add(Kind.BOX, (-0.2, 0, 0.62), (0.03, 0.03, 0.30), Material.METAL, Paint.PLAIN, colour)
    bar = min(1.05, height)
    out.add(
        Kind.BOX,
        (reach - 0.15, 0, bar / 2 + 0.2),
        (0.03, 0.03, bar / 2 - 0.2),
        Material.METAL,
        Paint.PLAIN,
        GREY,
    )
    out.add(
        Kind.BOX,
        (reach - 0.2, 0, bar - 0.03),
        (0.04, width / 2, 0.025),
        Material.METAL,
        Paint.PLAIN,
        DARK,
    )
    if rider:
        _rider(out, height, seat, colour, seed)


def _rider(out, height, seat, colour, seed):
    """A person sitting on a two-wheeler, up to its full height."""
    cloth = (0.15 + 0.5 * seed, 0.2, 0.55 - 0.4 * seed)
    for side in (-1, 1):
        out.add(
            Kind.BOX,
            (-0.05, side * 0.13, seat - 0.12),
            (0.24, 0.08, 0.09),
            Material.CLOTH,
            Paint.PLAIN,
            (0.12, 0.13, 0.2),
        )
        out.add(
            Kind.CYLINDER,
            (0.16, side * 0.13, (0.2 + seat) / 2),
            (0.065, 0.065, (seat - 0.2) / 2),
            Material.CLOTH,
            Paint.PLAIN,
            (0.12, 0.13, 0.2),
        )
    top = height - 0.28
    out.add(
        Kind.ELLIPSOID,
        (-0.1, 0, (seat + top) / 2),
        (0.17, 0.23, (top - seat) / 2 + 0.06),
        Material.CLOTH,
        Paint.PLAIN,
        cloth,
    )
    out.add(
        Kind.ELLIPSOID,
        (0.0, 0, height - 0.14),
        (0.13, 0.12, 0.14),
        Material.PLASTIC,
        Paint.HEAD,
        (0.8, 0.8, 0.82) if seed > 0.5 else colour,
    )


def add_pedestrian(out: SolidBuilder, size, colour, seed: float, stride: float) -> None:
    """Add a person; ``stride`` in -1..1 is the phase of the step, 0 for standing."""
    width, length, height = (size[0] - 2 * MARGIN, size[1] - 2 * MARGIN, size[2] - MARGIN)
    hip = 0.50 * height
    trousers = (0.12, 0.13, 0.17) if seed < 0.5 else (0.30, 0.26, 0.20)
    skin = ((0.85, 0.64, 0.52), (0.55, 0.37, 0.26), (0.76, 0.55, 0.42))[int(seed * 2.999)]
    swing = stride * min(0.09, length / 2 - 0.12)
    for side in (-1, 1):
        out.add(
            Kind.CYLINDER,
            (side * swing, side * 0.10, hip / 2),
            (0.08, 0.08, hip / 2),
            Material.CLOTH,
            Paint.PLAIN,
            trousers,
        )
        out.add(
            Kind.CYLINDER,
            (-side * swing * 0.8, side * (width / 2 - 0.055), 0.63 * height),
            (0.055, 0.055, 0.16 * height),
            Material.CLOTH,
            Paint.PLAIN,
            tuple(0.85 * c for c in colour),
        )
    out.add(
        Kind.ELLIPSOID,
        (0, 0, hip),
        (0.14, 0.19, 0.16),
        Material.CLOTH,
        Paint.PLAIN,
        trousers,
    )
    shoulder = 0.84 * height
    out.add(
        Kind.ELLIPSOID,
        (0, 0, (hip + shoulder) / 2),
        (0.15, width / 2 - 0.06, (shoulder - hip) / 2 + 0.10),
        Material.CLOTH,
        Paint.PLAIN,
        colour,
    )
    head = 0.115
    out.add(
        Kind.ELLIPSOID,
        (0.01, 0, height - head * 1.2),
        (head * 0.9, head * 0.8, head * 1.2),
        Material.CLOTH,
        Paint.HEAD,
        (0.14, 0.10, 0.07) if seed < 0.7 else (0.5, 0.4, 0.25),
        skin,
    )


def add_prop(out: SolidBuilder, category: str, size) -> None:
    """Add a traffic cone or a barrier; ``size`` is (width, length, height), metres."""
    width, length, height = (size[0] - 2 * MARGIN, size[1] - 2 * MARGIN, size[2] - MARGIN)
    if category == "movable_object.trafficcone":
        out.add(
            Kind.TAPER,
            (0, 0, height / 2),
            (length * 0.36, width * 0.36, height / 2),
            Material.PLASTIC,
            Paint.CONE,
            (0.93, 0.33, 0.05),
            (0.93, 0.93, 0.9),
            taper=(length * 0.3, length * 0.3, width * 0.3),
        )
        out.add(
            Kind.BOX,
            (0, 0, 0.02),
            (length / 2, width / 2, 0.02),
            Material.PLASTIC,
            Paint.PLAIN,
            DARK,
        )
    else:
        out.add(
            Kind.TAPER,
            (0, 0, height / 2),
            (length / 2, width / 2, height / 2),
            Material.PLASTIC,
            Paint.CONE,
            (0.90, 0.42, 0.10),
            (0.92, 0.92, 0.9),
            taper=(0.02, 0.02, width * 0.3),
        )


def add_ego_body(out: SolidBuilder) -> None:
    """Add the roof and body of the ego car, which only the lidar sees; frame: the ego frame."""
    for centre, half in (
        ((0.88, 0.0, 1.53), (0.62, 0.50, 0.05)),
        ((1.35, 0.0, 0.75), (1.85, 0.80, 0.33)),
        ((0.80, 0.0, 1.20), (1.00, 0.60, 0.26)),
    ):
        out.add(Kind.BOX, centre, half, Material.METAL, Paint.PLAIN, GREY, lidar_only=True)
