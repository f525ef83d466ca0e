"""Things that stand at a street: buildings, trees, lamps, signals, shelters.

Composites are built in their own frame: origin on the ground below the centre, x forward, y left.
"""

from __future__ import annotations

import numpy as np

from occfeat_targets.demo_world.materials import Material
from occfeat_targets.demo_world.paint import Paint
from occfeat_targets.demo_world.primitives import Kind, SolidBuilder

Colour = tuple[float, float, float]


def add_building(
    out: SolidBuilder, length: float, depth: float, height: float, walls, trim, seed: float
) -> None:
    """Add a building with its front along x; metres."""
    out.add(
        Kind.BOX,
        (0, 0, height / 2),
        (length / 2, depth / 2, height / 2),
        Material.MASONRY,
        Paint.FACADE,
        walls,
        trim,
        seed=seed,
    )
    out.add(
        Kind.BOX,
        (0, 0, height + 0.2),
        (length / 2 + 0.2, depth / 2 + 0.2, 0.3),
        Material.MASONRY,
        Paint.PLAIN,
        trim,
    )
    if seed > 0.4:
        out.add(
            Kind.BOX,
            ((seed - 0.5) * length * 0.7, 0, height + 1.4),
            (min(2.5, length / 4), min(2.0, depth / 4), 1.2),
            Material.MASONRY,
            Paint.PLAIN,
            tuple(0.8 * c for c in trim),
        )


def add_tree(out: SolidBuilder, height: float, spread: float, leaves: Colour, seed: float) -> None:
    """Add a tree: a trunk and a crown of overlapping balls of leaves."""
    stem, radius = 0.5 * height, 0.07 + 0.012 * height
    out.add(
        Kind.CYLINDER,
        (0, 0, stem / 2),
        (radius, radius, stem / 2),
        Material.BARK,
        Paint.PLAIN,
        (0.33, 0.27, 0.21),
    )
    low, high = 0.36 * height, height
    # (share of the height, distance from the trunk, size), all relative to the crown
    tiers = ((0.80, 0.10, 0.66, 2), (0.58, 0.48, 0.60, 4), (0.34, 0.50, 0.54, 4))
    turn = 6.283 * seed
    for share, off, size, count in tiers:
        for number in range(count):
            angle = turn + 6.283 * number / count
            wobble = 0.85 + 0.3 * ((number * 0.618 + seed + share) % 1.0)
            up = low + share * (high - low)
            tall = min(max(0.7 * size * spread, 0.22 * (high - low)) * wobble, high - up)
            shade = 0.80 + 0.30 * share + 0.10 * (wobble - 1)
            out.add(
                Kind.ELLIPSOID,
                (off * spread * np.cos(angle), off * spread * np.sin(angle), up),
                (size * spread * wobble, size * spread * wobble, tall),
                Material.FOLIAGE,
                Paint.FOLIAGE,
                tuple(shade * c for c in leaves),
                seed=(seed + 0.37 * number + share) % 1.0,
            )
        turn += 0.8


def add_lamp(out: SolidBuilder, height: float) -> None:
    """Add a street lamp reaching out to +y."""
    out.add(
        Kind.CYLINDER,
        (0, 0, height / 2),
        (0.08, 0.08, height / 2),
        Material.METAL,
        Paint.PLAIN,
        (0.30, 0.32, 0.33),
    )
    out.add(
        Kind.BOX,
        (0, 0.9, height),
        (0.05, 0.95, 0.05),
        Material.METAL,
        Paint.PLAIN,
        (0.30, 0.32, 0.33),
    )
    out.add(
        Kind.BOX,
        (0, 1.7, height - 0.06),
        (0.12, 0.32, 0.06),
        Material.PLASTIC,
        Paint.PLAIN,
        (0.8, 0.8, 0.75),
    )


def add_signal(out: SolidBuilder, green: bool) -> None:
    """Add a traffic light facing +x."""
    out.add(
        Kind.CYLINDER,
        (0, 0, 1.7),
        (0.07, 0.07, 1.7),
        Material.METAL,
        Paint.PLAIN,
        (0.22, 0.23, 0.22),
    )
    out.add(
        Kind.BOX,
        (0.05, 0, 3.0),
        (0.12, 0.17, 0.45),
        Material.PLASTIC,
        Paint.SIGNAL,
        (0.10, 0.10, 0.10),
        (0.1, 0.9, 0.4) if green else (0.95, 0.15, 0.1),
        seed=0.0 if green else 1.0,
    )


def add_shelter(out: SolidBuilder) -> None:
    """Add a bus shelter open towards +y."""
    out.add(
        Kind.BOX, (0, 0, 2.45), (1.9, 0.75, 0.07), Material.METAL, Paint.PLAIN, (0.25, 0.27, 0.30)
    )
    out.add(
        Kind.BOX,
        (0, -0.68, 1.3),
        (1.85, 0.03, 1.08),
        Material.GLASS,
        Paint.PLAIN,
        (0.50, 0.58, 0.60),
    )
    out.add(
        Kind.BOX,
        (1.75, 0, 1.3),
        (0.06, 0.6, 1.05),
        Material.PLASTIC,
        Paint.PLAIN,
        (0.85, 0.35, 0.15),
    )
    out.add(
        Kind.BOX,
        (-0.2, -0.35, 0.48),
        (1.2, 0.18, 0.04),
        Material.METAL,
        Paint.PLAIN,
        (0.45, 0.33, 0.22),
    )
