"""Solid primitives and their intersection with rays: the one geometry of images and lidar.

Every solid is convex, so a ray meets it along one interval; a primitive is the intersection of a
few such intervals. Solids: boxes, boxes that narrow towards the top, upright cylinders,
ellipsoids; each is turned by a yaw about the vertical. Local frame of a solid: origin at its
centre, z up, metres.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np


class Kind(IntEnum):
    """Shape of a solid."""

    BOX = 0
    TAPER = 1
    CYLINDER = 2
    ELLIPSOID = 3


@dataclass
class Solids:
    """P solids as parallel arrays.

    ``kind`` (P,) uint8; ``centre`` (P, 3) float64, global, metres; ``half`` (P, 3) float64 half
    extents; ``yaw`` (P,) radians; ``taper`` (P, 3) metres by which front, rear and each side are
    pulled in at the top; ``object_id`` (P,) int32, from 1; ``material`` (P,) uint8; ``paint`` (P,)
    uint8, how the surface is coloured; ``colour`` (P, 2, 3) float32 in 0..1 (but the second of
    Paint.CAR_BODY holds axle, wheel radius and waist in metres); ``seed`` (P,) float32 in 0..1;
    ``lidar_only`` (P,) bool, True for parts of the ego car, which no camera sees.
    """

    kind: np.ndarray
    centre: np.ndarray
    half: np.ndarray
    yaw: np.ndarray
    taper: np.ndarray
    object_id: np.ndarray
    material: np.ndarray
    paint: np.ndarray
    colour: np.ndarray
    seed: np.ndarray
    lidar_only: np.ndarray

    def __len__(self) -> int:
        """Number of solids."""
        return len(self.kind)

    def local_R_global(self, index: int) -> np.ndarray:
        """Rotation (3, 3) float64 from the global frame to a solid's frame."""
        cos, sin = math.cos(self.yaw[index]), math.sin(self.yaw[index])
        return np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])

    def corners(self) -> np.ndarray:
        """Corners of the bounding box of every solid, (P, 8, 3) float64, global."""
        signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
        local = self.half[:, None, :] * signs
        cos, sin = np.cos(self.yaw)[:, None], np.sin(self.yaw)[:, None]
        turned = np.stack(
            [
                cos * local[..., 0] - sin * local[..., 1],
                sin * local[..., 0] + cos * local[..., 1],
                local[..., 2],
            ],
            axis=-1,
        )
        return turned + self.centre[:, None, :]


class SolidBuilder:
    """Collects solids; parts of a composite are given in the frame of the composite."""

    def __init__(self) -> None:
        """Start empty, with the composite's frame equal to the global frame."""
        self._rows: list[tuple] = []
        self._frame = (0.0, 0.0, 0.0)
        self._object_id = 0

    def begin(self, x: float, y: float, yaw: float, object_id: int) -> None:
        """Set the frame (origin on the ground, yaw in radians) and the id of the next parts."""
        self._frame = (x, y, yaw)
        self._object_id = object_id

    def add(
        self,
        kind: Kind,
        centre,
        half,
        material: int,
        paint: int,
        colour,
        colour2=None,
        *,
        seed: float = 0.0,
        taper=(0.0, 0.0, 0.0),
        yaw: float = 0.0,
        lidar_only: bool = False,
    ) -> None:
        """Add one part; centre (3,), half extents (3,) and yaw are in the composite's frame."""
        x, y, turn = self._frame
        cos, sin = math.cos(turn), math.sin(turn)
        placed = (
            x + cos * centre[0] - sin * centre[1],
            y + sin * centre[0] + cos * centre[1],
            centre[2],
        )
        self._rows.append(
            (
                kind,
                placed,
                tuple(half),
                turn + yaw,
                tuple(taper),
                self._object_id,
                material,
                paint,
                (tuple(colour), tuple(colour2 or colour)),
                seed,
                lidar_only,
            )
        )

    def build(self) -> Solids:
        """The solids collected so far."""
        columns = list(zip(*self._rows, strict=True)) if self._rows else [[] for _ in range(11)]
        count = len(self._rows)
        dtypes = (
            np.uint8,
            float,
            float,
            float,
            float,
            np.int32,
            np.uint8,
            np.uint8,
            np.float32,
            np.float32,
            bool,
        )
        shapes = ((), (3,), (3,), (), (3,), (), (), (), (2, 3), (), ())
        return Solids(
            *[
                np.array(column, dtype=dtype).reshape((count, *shape))
                for column, dtype, shape in zip(columns, dtypes, shapes, strict=True)
            ]
        )


def join(first: Solids, second: Solids) -> Solids:
    """The solids of both, in order."""
    return Solids(
        *[
            np.concatenate([a, b])
            for a, b in zip(vars(first).values(), vars(second).values(), strict=True)
        ]
    )


def intersect(solids: Solids, index: int, origin: np.ndarray, direction) -> np.ndarray:
    """Where rays enter one solid.

    Args:
        solids: all solids.
        index: which one.
        origin: (3,) start of all rays in the solid's frame, metres.
        direction: three arrays of one shape (or broadcastable), x, y, z of each ray in that frame;
            any length.

    Returns:
        Ray parameter of the entry point, float32, in units of the direction's length; inf where a
        ray misses the solid or starts inside or beyond it.
    """
    kind = solids.kind[index]
    half = solids.half[index].astype(np.float32)
    origin = origin.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if kind == Kind.BOX:
            near, far = _slab(origin[0], direction[0], half[0])
            near, far = _meet(near, far, *_slab(origin[1], direction[1], half[1]))
            near, far = _meet(near, far, *_slab(origin[2], direction[2], half[2]))
        elif kind == Kind.TAPER:
            near, far = _slab(origin[2], direction[2], half[2])
            for normal, offset in taper_planes(half, solids.taper[index]):
                near, far = _meet(near, far, *_half_space(origin, direction, normal, offset))
        elif kind == Kind.CYLINDER:
            near, far = _slab(origin[2], direction[2], half[2])
            near, far = _meet(
                near, far, *_ball(origin[:2] / half[0], [d / half[0] for d in direction[:2]])
            )
        else:
            near, far = _ball(origin / half, [d / h for d, h in zip(direction, half, strict=True)])
        hit = (near <= far) & (near > 0)
    return np.where(hit, near, np.float32(np.inf))


def taper_planes(half: np.ndarray, taper: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """Front, rear, left, right planes of a tapered box: (unit normal n, offset), n.p <= offset."""
    planes = []
    for axis, sign, pulled in (
        (0, 1, taper[0]),
        (0, -1, taper[1]),
        (1, 1, taper[2]),
        (1, -1, taper[2]),
    ):
        normal = np.zeros(3)
        normal[axis] = sign * 2 * half[2]
        normal[2] = pulled
        normal /= np.linalg.norm(normal)
        edge = np.zeros(3)
        edge[axis], edge[2] = sign * half[axis], -half[2]
        planes.append((normal, float(normal @ edge)))
    return planes


def _meet(near, far, near2, far2):
    return np.maximum(near, near2), np.minimum(far, far2)


def _slab(origin, direction, half):
    """Interval of rays inside -half <= p <= half along one axis."""
    inverse = np.float32(1) / direction
    a = np.float32(-half - origin) * inverse
    b = np.float32(half - origin) * inverse
    return np.minimum(a, b), np.maximum(a, b)


def _half_space(origin, direction, normal, offset):
    """Interval of rays inside n.p <= offset."""
    slope = sum(np.float32(n) * d for n, d in zip(normal, direction, strict=True) if n != 0)
    t = np.float32(offset - normal @ origin) / slope
    enters = slope < 0
    infinite = np.float32(np.inf)
    return np.where(enters, t, -infinite), np.where(enters, infinite, t)


def _ball(origin, direction):
    """Interval of rays inside the unit ball (or disc): coordinates already divided by the radii."""
    origin = [np.float32(o) for o in origin]
    square = sum(d * d for d in direction)
    closest = -sum(o * d for o, d in zip(origin, direction, strict=True)) / square
    # Measured from the closest point: the usual b^2 - 4ac loses all digits of a small far ball.
    miss = sum((o + closest * d) ** 2 for o, d in zip(origin, direction, strict=True))
    reach = np.sqrt((np.float32(1) - miss) / square)  # NaN for a miss: no comparison holds
    return closest - reach, closest + reach
