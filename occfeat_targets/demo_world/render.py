"""Camera images: every pixel's ray against the solids, nearest wins, then colour and light.

A pixel (row i, column j) covers [j, j+1) x [i, i+1); its ray passes through (j + 0.5, i + 0.5).
Rays have length 1 along the optical axis, so the ray parameter is the z-depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from occfeat_targets.demo_world import paint
from occfeat_targets.demo_world.materials import Material
from occfeat_targets.demo_world.primitives import Kind, Solids, intersect, taper_planes
from occfeat_targets.demo_world.scene import FIRST_STATIC_ID
from occfeat_targets.demo_world.world import World

SKY, GROUND = -1, -2
_NEAR = 0.2
_HAZE_METRES = 420.0
_SMOOTH = ImageFilter.Kernel((3, 3), (1, 2, 1, 2, 4, 2, 1, 2, 1))


@dataclass
class View:
    """What a camera sees.

    ``depth`` (H, W) float32 z-depth in metres, inf for sky; ``solid`` (H, W) int32 index into
    ``world.solids``, SKY or GROUND; ``silhouette`` object id -> pixels that the object would cover
    if nothing hid it.
    """

    depth: np.ndarray
    solid: np.ndarray
    silhouette: dict[int, int]


class _Rays:
    """The rays of one image: directions in a frame are affine in column and row."""

    def __init__(self, K: np.ndarray, global_T_cam: np.ndarray, height: int, width: int):
        self.R = global_T_cam[:3, :3]
        self.origin = global_T_cam[:3, 3]
        self.K = K
        self.shape = (height, width)
        self.x = ((np.arange(width) + 0.5 - K[0, 2]) / K[0, 0]).astype(np.float32)
        self.y = ((np.arange(height) + 0.5 - K[1, 2]) / K[1, 1]).astype(np.float32)

    def window(self, local_R_global: np.ndarray, box) -> list[np.ndarray]:
        """Directions in a local frame for a pixel window (row0, row1, column0, column1)."""
        M = (local_R_global @ self.R).astype(np.float32)
        x, y = self.x[box[2] : box[3]], self.y[box[0] : box[1]]
        return [m[0] * x[None, :] + (m[1] * y + m[2])[:, None] for m in M]

    def pixels(self, local_R_global: np.ndarray, rows, columns) -> np.ndarray:
        """Directions (3, n) in a local frame of single pixels."""
        M = (local_R_global @ self.R).astype(np.float32)
        x, y = self.x[columns], self.y[rows]
        return np.stack([m[0] * x + m[1] * y + m[2] for m in M])


def render_camera(
    world: World,
    K: np.ndarray,
    global_T_cam: np.ndarray,
    height: int,
    width: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Render one camera.

    Args:
        world: the frozen world of a keyframe.
        K: (3, 3) intrinsics to continuous pixels of this height and width.
        global_T_cam: (4, 4) float64 camera pose; x right, y down, z forward.
        height: rows.
        width: columns.

    Returns:
        rgb (H, W, 3) uint8; depth (H, W) float32, z-depth in metres along the optical axis, inf for
        sky; object_id (H, W) int32: -1 sky, 0 ground, else the id of the thing.
    """
    view = trace(world, K, global_T_cam, height, width)
    return shade(world, K, global_T_cam, view), view.depth, object_ids(world, view)


def object_ids(world: World, view: View) -> np.ndarray:
    """Ids (H, W) int32 of what each pixel shows: -1 sky, 0 ground, else the thing's id."""
    table = np.concatenate([world.solids.object_id, [0, -1]]).astype(np.int32)
    return table[view.solid]  # GROUND = -2 and SKY = -1 index the table from its end


def trace(
    world: World,
    K: np.ndarray,
    global_T_cam: np.ndarray,
    height: int,
    width: int,
) -> View:
    """Find the nearest surface of every pixel; arguments as in render_camera."""
    rays = _Rays(K, global_T_cam, height, width)
    solids = world.solids
    down = rays.window(np.eye(3), (0, height, 0, width))[2]
    with np.errstate(divide="ignore"):
        depth = np.where(down < 0, np.float32(-rays.origin[2]) / down, np.float32(np.inf))
    # A ray just below the horizon meets the plane kilometres away: that is sky.
    depth[depth > 2000] = np.inf
    solid = np.where(np.isfinite(depth), np.int32(GROUND), np.int32(SKY))
    boxes, nearest = _pixel_boxes(solids, rays)
    visible = np.flatnonzero(
        (boxes[:, 1] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 2]) & ~solids.lidar_only
    )
    silhouette: dict[int, int] = {}
    actors = solids.object_id < FIRST_STATIC_ID
    for object_id in np.unique(solids.object_id[visible[actors[visible]]]):
        parts = visible[solids.object_id[visible] == object_id]
        silhouette[int(object_id)] = _merge(solids, parts, boxes, rays, depth, solid)
    fixed = visible[~actors[visible]]
    for index in fixed[np.argsort(nearest[fixed], kind="stable")]:
        r0, r1, c0, c1 = boxes[index]
        if nearest[index] > depth[r0:r1, c0:c1].max():
            continue
        _merge(solids, [index], boxes, rays, depth, solid)
    return View(depth, solid, silhouette)


def _merge(solids: Solids, parts, boxes, rays: _Rays, depth, solid) -> int:
    """Put the parts of one thing into the image; returns the pixels of its silhouette."""
    r0, c0 = boxes[parts][:, [0, 2]].min(axis=0)
    r1, c1 = boxes[parts][:, [1, 3]].max(axis=0)
    own = np.zeros((r1 - r0, c1 - c0), dtype=bool)
    for index in parts:
        box = boxes[index]
        rotation = solids.local_R_global(index)
        origin = rotation @ (rays.origin - solids.centre[index])
        t = intersect(solids, index, origin, rays.window(rotation, box))
        own[box[0] - r0 : box[1] - r0, box[2] - c0 : box[3] - c0] |= np.isfinite(t)
        window = depth[box[0] : box[1], box[2] : box[3]]
        nearer = t < window
        window[nearer] = t[nearer]
        solid[box[0] : box[1], box[2] : box[3]][nearer] = index
    return int(np.count_nonzero(own))


def _pixel_boxes(solids: Solids, rays: _Rays) -> tuple[np.ndarray, np.ndarray]:
    """Pixel windows (P, 4) int (row0, row1, column0, column1) of solids, and nearest depths (P,).

    Edges that cross the near plane are cut there, so windows of half-hidden solids are right too.
    """
    height, width = rays.shape
    corners = (solids.corners() - rays.origin) @ rays.R
    starts = np.array([0, 0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 6])
    ends = np.array([1, 2, 4, 3, 5, 3, 6, 7, 5, 6, 7, 7])
    a, b = corners[:, starts], corners[:, ends]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (_NEAR - a[..., 2]) / (b[..., 2] - a[..., 2])
    crosses = (a[..., 2] < _NEAR) != (b[..., 2] < _NEAR)
    cut = a + np.where(crosses, share, 0.0)[..., None] * (b - a)
    points = np.concatenate([corners, cut], axis=1)
    valid = np.concatenate([corners[..., 2] >= _NEAR, crosses], axis=1)
    z = np.where(valid, np.maximum(points[..., 2], _NEAR), 1.0)
    u = points[..., 0] / z * rays.K[0, 0] + rays.K[0, 2]
    v = points[..., 1] / z * rays.K[1, 1] + rays.K[1, 2]
    big = 1e9
    low_u, high_u = (np.where(valid, u, big).min(1), np.where(valid, u, -big).max(1))
    low_v, high_v = (np.where(valid, v, big).min(1), np.where(valid, v, -big).max(1))
    boxes = np.stack(
        [
            np.clip(np.floor(low_v), 0, height),
            np.clip(np.ceil(high_v), 0, height),
            np.clip(np.floor(low_u), 0, width),
            np.clip(np.ceil(high_u), 0, width),
        ],
        1,
    )
    return boxes.astype(np.int64), np.maximum(corners[..., 2].min(axis=1), 0.0)


def shade(world: World, K: np.ndarray, global_T_cam: np.ndarray, view: View) -> np.ndarray:
    """Colour a traced view: (H, W, 3) uint8."""
    height, width = view.depth.shape
    rays = _Rays(K, global_T_cam, height, width)
    sun_colour, sky_light = _light(world)
    image = np.empty((height * width, 3), dtype=np.float32)
    solid = view.solid.ravel()
    order = np.argsort(solid, kind="stable")  # pixels of one solid become neighbours
    bounds = np.searchsorted(solid[order], np.arange(-2, len(world.solids) + 1))
    for index in np.flatnonzero(np.diff(bounds)) - 2:
        chosen = order[bounds[index + 2] : bounds[index + 3]]
        rows, columns = np.divmod(chosen, width)
        depth = view.depth.ravel()[chosen]
        if index == SKY:
            image[chosen] = _sky(world, rays.pixels(np.eye(3), rows, columns))
        elif index == GROUND:
            image[chosen] = _ground(world, rays, rows, columns, depth)
        else:
            image[chosen] = _surface(
                world, rays, index, rows, columns, depth, sun_colour, sky_light
            )
    _haze(world, image, view.depth.ravel())
    rgb = (np.clip(image, 0, 1) * 255).astype(np.uint8).reshape(height, width, 3)
    return _soften(rgb, view.solid)


def _light(world: World) -> tuple[np.ndarray, np.ndarray]:
    """Sunlight and skylight colours (3,) of a scene; some scenes are dull."""
    dull = world.scene.style[0] > 0.8
    warm = np.array([1.0, 0.95, 0.86]) if world.scene.sun[2] < 0.72 else np.array([1.0, 0.98, 0.94])
    strength = 0.45 if dull else 0.78
    sky = np.array([0.70, 0.72, 0.74]) if dull else np.array([0.56, 0.59, 0.64])
    return (strength * warm).astype(np.float32), sky.astype(np.float32)


def _horizon(world: World) -> np.ndarray:
    dull = world.scene.style[0] > 0.8
    return np.array([0.80, 0.81, 0.82] if dull else [0.80, 0.85, 0.90], dtype=np.float32)


def _sky(world: World, direction: np.ndarray) -> np.ndarray:
    """Sky colours (n, 3) for directions (3, n)."""
    up = direction[2] / np.sqrt((direction * direction).sum(axis=0))
    dull = world.scene.style[0] > 0.8
    zenith = np.array([0.66, 0.68, 0.71] if dull else [0.30, 0.50, 0.80], dtype=np.float32)
    high = np.sqrt(np.clip(up, 0, 1) * np.float32(1.3)).clip(0, 1)[:, None]
    colour = _horizon(world) * (1 - high) + zenith * high
    # Clouds lie on a plane high above, so they crowd towards the horizon.
    flat = np.maximum(up, np.float32(0.04)) * np.sqrt((direction * direction).sum(axis=0))
    a, b = direction[0] / flat * 130 + 97 * world.scene.index, direction[1] / flat * 130
    cloud = paint.CLOUDS[a.astype(np.int32) & 511, b.astype(np.int32) & 511]
    cloud = np.clip(cloud * 2.0 - 0.1, 0, 1) * np.clip((up - 0.05) * 5, 0, 1) * 0.8
    return colour * (1 - cloud)[:, None] + cloud[:, None] * np.float32(0.96)


def _ground(world: World, rays: _Rays, rows, columns, depth) -> np.ndarray:
    """Ground colours (n, 3)."""
    scene = world.scene
    cos, sin = math.cos(scene.yaw), math.sin(scene.yaw)
    rotation = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    origin = rotation @ (rays.origin - np.array([*scene.origin, 0.0]))
    direction = rays.pixels(rotation, rows, columns)
    x = np.float32(origin[0]) + depth * direction[0]
    y = np.float32(origin[1]) + depth * direction[1]
    colour = world.ground.colour(x, y)
    fine = np.clip(1.1 - depth / 30, 0, 1)
    grain = 0.055 * fine * paint.noise(x * 45, y * 45) + 0.05 * np.clip(
        1.1 - depth / 120, 0, 1
    ) * paint.noise(x * 2.7 + 50, y * 2.7)
    sun_colour, sky_light = _light(world)
    light = sky_light + sun_colour * np.float32(scene.sun[2] + 0.12)
    return colour * (1 + grain)[:, None] * light


def _surface(world: World, rays: _Rays, index: int, rows, columns, depth, sun_colour, sky_light):
    """Lit colours (n, 3) of pixels that show one solid."""
    solids = world.solids
    rotation = solids.local_R_global(index)
    origin = (rotation @ (rays.origin - solids.centre[index])).astype(np.float32)
    direction = rays.pixels(rotation, rows, columns)
    point = origin[:, None] + depth * direction
    normal, face = _normals(solids, index, point)
    colour = paint.albedo(
        int(solids.paint[index]),
        point,
        face,
        solids.half[index],
        solids.colour[index],
        float(solids.seed[index]),
    )
    sun = (rotation @ world.scene.sun).astype(np.float32)
    facing = np.clip((normal * sun[:, None]).sum(axis=0), 0, 1) * world.lit[index]
    if solids.paint[index] == paint.Paint.FOLIAGE:
        facing = 0.25 + 0.6 * facing  # light also comes through leaves
    # Less sky is seen near the ground and from below.
    height = np.clip((point[2] + np.float32(solids.centre[index, 2])) / 1.2, 0, 1)
    open_sky = (0.72 + 0.28 * normal[2]) * (0.70 + 0.30 * height)
    light = sky_light * open_sky[:, None] + sun_colour * facing[:, None]
    lit = colour * light
    if solids.material[index] in (Material.METAL, Material.GLASS):
        lit += _reflection(world, direction, normal)
    return lit


def _reflection(world: World, direction: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Light (n, 3) of sky or street mirrored by smooth surfaces, stronger at grazing angles."""
    d = direction / np.sqrt((direction * direction).sum(axis=0))
    towards = (d * normal).sum(axis=0)
    mirrored_up = d[2] - 2 * towards * normal[2]
    share = np.float32(0.05) + np.float32(0.5) * (1 - np.abs(towards)) ** 4
    share = share * np.clip(0.35 + 1.6 * mirrored_up, 0.15, 1)
    return share[:, None] * _horizon(world)


def _normals(solids: Solids, index: int, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outward normals (3, n) and faces (n,) of points (3, n) on a solid, in its frame."""
    kind, half = solids.kind[index], solids.half[index].astype(np.float32)
    if kind in (Kind.BOX, Kind.TAPER):
        if kind == Kind.BOX:
            planes = [(np.eye(3)[axis] * sign, half[axis]) for axis in (0, 1) for sign in (1, -1)]
        else:
            planes = taper_planes(half, solids.taper[index])
        planes += [(np.array([0, 0, 1.0]), half[2]), (np.array([0, 0, -1.0]), half[2])]
        table = np.array([normal for normal, _ in planes], dtype=np.float32)
        offset = np.array([value for _, value in planes], dtype=np.float32)
        outside = sum(table[:, k, None] * point[k] for k in range(3)) - offset[:, None]
        face = outside.argmax(axis=0)
        return table[face].T, face
    if kind == Kind.CYLINDER:
        normal = np.stack([point[0], point[1], np.zeros_like(point[0])]) / half[0]
        cap = np.abs(point[2]) / half[2] > np.hypot(point[0], point[1]) / half[0]
        normal[:, cap] = 0
        normal[2, cap] = np.sign(point[2, cap])
    else:
        normal = point / (half * half)[:, None]
        normal /= np.sqrt((normal * normal).sum(axis=0))
    axis = np.abs(normal).argmax(axis=0)
    negative = np.take_along_axis(normal, axis[None], axis=0)[0] < 0
    return normal, 2 * axis + negative


def _haze(world: World, image: np.ndarray, depth: np.ndarray) -> None:
    """Mix far colours (n, 3) with the horizon's, in place."""
    clear = np.exp(np.float32(-1 / _HAZE_METRES) * depth)
    clear[np.isinf(depth)] = 1
    image *= clear[:, None]
    image += (1 - clear)[:, None] * _horizon(world)


def _soften(rgb: np.ndarray, solid: np.ndarray) -> np.ndarray:
    """Blur only the outlines of solids, which one ray a pixel leaves jagged."""
    edge = np.zeros(solid.shape, dtype=bool)
    edge[:, 1:] |= solid[:, 1:] != solid[:, :-1]
    edge[:, :-1] |= edge[:, 1:]
    across = solid[1:] != solid[:-1]
    edge[1:] |= across
    edge[:-1] |= across
    blurred = np.asarray(Image.fromarray(rgb).filter(_SMOOTH))
    rgb[edge] = blurred[edge]
    return rgb
