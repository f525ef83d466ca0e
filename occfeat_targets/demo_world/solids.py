"""Solids, their intersection with rays and their shadows: the one geometry of images and lidar.

Every solid is convex, so a ray meets it along one interval, the intersection of a few simpler ones.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from occfeat_targets.demo_world.things import Colour, Part, Shape

FIRST_STATIC_ID = 100_000
EGO_ID = FIRST_STATIC_ID - 1
Pose = tuple[float, float, float]
"""x, y in metres and heading in radians, in the global frame."""


@dataclass
class Solids:
    """P solids as parallel arrays, in metres."""

    shape: np.ndarray  # (P,) uint8
    centre: np.ndarray  # (P, 3) float64, global
    half: np.ndarray  # (P, 3) float64, half extents in its own frame
    global_R_local: np.ndarray  # (P, 3, 3) float64
    taper: np.ndarray  # (P, 3) float64, as of Part
    object_id: np.ndarray  # (P,) int32, from 1
    material: np.ndarray  # (P,) uint8
    colour: np.ndarray  # (P, 3) float32, 0..1
    pattern: np.ndarray  # (P,) str

    def axes(self) -> np.ndarray:
        """Half axes of every solid as columns, (P, 3, 3) float64, global, metres."""
        return self.global_R_local * self.half[:, None, :]


def place(
    object_id: int,
    parts: Sequence[Part],
    pose: Pose,
    colour: Colour | None = None,
    scale: float | tuple[float, float, float] = 1.0,
) -> Solids:
    """Solids of a thing that stands at a pose.

    ``colour`` is for parts without one of their own; ``scale`` is along x, y and z.
    """
    (x, y, yaw), scales = pose, np.broadcast_to(scale, 3)
    cos, sin = math.cos(yaw), math.sin(yaw)
    rotation = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    extent = np.array([(part.x, part.y, part.z) for part in parts]) * scales[:, None]
    return Solids(
        np.array([part.shape for part in parts], np.uint8),
        extent.mean(axis=2) @ rotation.T + (x, y, 0.0),
        (extent[..., 1] - extent[..., 0]) / 2,
        np.tile(rotation, (len(parts), 1, 1)),
        np.array([part.taper for part in parts]) * scales[[0, 0, 1]],
        np.full(len(parts), object_id, np.int32),
        np.array([part.material for part in parts], np.uint8),
        np.array([part.colour or colour for part in parts], np.float32),
        np.array([part.pattern for part in parts]),
    )


def join(groups: Iterable[Solids]) -> Solids:
    """The solids of all groups, in order."""
    columns = zip(*(vars(group).values() for group in groups), strict=True)
    return Solids(*[np.concatenate(column) for column in columns])


def intersect(solids: Solids, index: int, origin: np.ndarray, direction) -> np.ndarray:
    """Where rays enter one solid: float32, in units of the direction's length.

    It is inf where a ray misses the solid or starts inside or beyond it. In the solid's frame,
    ``origin`` (3,) is the start of all rays, metres, and ``direction`` three arrays of one shape,
    x, y, z of each ray, of any length.
    """
    shape, taper = solids.shape[index], solids.taper[index]
    half, origin = solids.half[index].astype(np.float32), origin.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if shape != Shape.BOX:
            axes = [0, 1] if shape == Shape.CYLINDER else [0, 1, 2]
            intervals = [_ball((origin / half)[axes], [direction[k] / half[k] for k in axes])]
        elif taper.any():
            planes = side_planes(half, taper)
            intervals = [_half_space(origin, direction, *plane) for plane in planes]
        else:
            intervals = [_slab(origin[k], direction[k], half[k]) for k in (0, 1)]
        if shape != Shape.ELLIPSOID:
            intervals.append(_slab(origin[2], direction[2], half[2]))
        near, far = intervals[0]
        for enter, leave in intervals[1:]:
            near, far = np.maximum(near, enter), np.minimum(far, leave)
        return np.where((near <= far) & (near > 0), near, np.float32(np.inf))


def side_planes(half: np.ndarray, taper: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """Front, rear, left, right planes of a box: (unit normal n, offset), inside n.p <= offset."""
    planes = []
    for axis, sign, pulled in ((0, 1, 0), (0, -1, 1), (1, 1, 2), (1, -1, 2)):
        normal = np.zeros(3)
        normal[[axis, 2]] = sign * 2 * half[2], taper[pulled]
        normal /= np.linalg.norm(normal)
        planes.append((normal, float(sign * normal[axis] * half[axis] - normal[2] * half[2])))
    return planes


def _slab(origin, direction, half):
    """Interval of rays inside -half <= p <= half along one axis."""
    inverse = np.float32(1) / direction
    a, b = np.float32(-half - origin) * inverse, np.float32(half - origin) * inverse
    return np.minimum(a, b), np.maximum(a, b)


def _half_space(origin, direction, normal, offset):
    """Interval of rays inside n.p <= offset."""
    slope = sum(np.float32(n) * d for n, d in zip(normal, direction, strict=True) if n != 0)
    t = np.float32(offset - normal @ origin) / slope
    infinite = np.float32(np.inf)
    return np.where(slope < 0, t, -infinite), np.where(slope < 0, infinite, t)


def _ball(origin, direction):
    """Interval of rays inside the unit ball (or disc): coordinates already divided by the radii."""
    square = sum(d * d for d in direction)
    closest = -sum(o * d for o, d in zip(origin, direction, strict=True)) / square
    # Measured from the closest point: the usual b^2 - 4ac loses all digits of a small far ball.
    miss = sum((o + closest * d) ** 2 for o, d in zip(origin, direction, strict=True))
    reach = np.sqrt((np.float32(1) - miss) / square)  # NaN for a miss: no comparison holds
    return closest - reach, closest + reach


def surface_normals(solids: Solids, index: int, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outward normals (3, n) float32 and faces (n,) of points (3, n) on a solid, in its frame.

    Faces are numbered front, rear, left, right, top, bottom; on round solids, the nearest of them.
    """
    shape, half = solids.shape[index], solids.half[index].astype(np.float32)
    if shape == Shape.BOX:
        normals, offsets = zip(*side_planes(half, solids.taper[index]), strict=True)
        table = np.array([*normals, (0, 0, 1), (0, 0, -1)], dtype=np.float32)
        offset = np.array([*offsets, half[2], half[2]], dtype=np.float32)
        face = (table @ point - offset[:, None]).argmax(axis=0)
        return table[face].T, face
    normal = point / (half * half)[:, None]
    if shape == Shape.CYLINDER:
        normal[2] = 0  # their ends lie hidden in other solids
    normal /= np.sqrt((normal * normal).sum(axis=0))
    axis = np.abs(normal).argmax(axis=0)
    return normal, 2 * axis + (np.take_along_axis(normal, axis[None], axis=0)[0] < 0)


def shadow_outlines(solids: Solids, sun: np.ndarray) -> np.ndarray:
    """Outlines (P, 12, 2) float64 of the shadows on the ground, global; ``sun`` (3,) unit vector.

    Sliding along the sunlight is linear, so a box's shadow is the sum of its three shifted axes (a
    hexagon, each corner given twice) and an ellipsoid's is an ellipse.
    """
    slide = np.array([[1, 0, -sun[0] / sun[2]], [0, 1, -sun[1] / sun[2]]])
    axes: np.ndarray = slide @ solids.axes()  # (P, 2, 3)
    upward = np.where(axes[:, 1:] < 0, -axes, axes)
    order = np.argsort(np.arctan2(upward[:, 1], upward[:, 0]), axis=1)
    upward = np.take_along_axis(upward, order[:, None], axis=2)
    half_way = 2 * np.cumsum(upward, axis=2) - upward.sum(axis=2, keepdims=True)
    hexagons = np.repeat(np.concatenate([half_way, -half_way], axis=2), 2, axis=2)
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    ellipses = np.linalg.cholesky(axes @ axes.swapaxes(1, 2)) @ [np.cos(angle), np.sin(angle)]
    round_ = (solids.shape == Shape.ELLIPSOID)[:, None, None]
    outlines = np.where(round_, ellipses, hexagons).swapaxes(1, 2)
    return outlines + (solids.centre @ slide.T)[:, None]
