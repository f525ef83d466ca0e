"""Camera images: every pixel's ray against the solids, nearest wins, then colour and light.

A pixel (row i, column j) covers [j, j+1) x [i, i+1); its ray passes through (j + 0.5, i + 0.5).
Rays have length 1 along the optical axis, so the ray parameter is the z-depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from occfeat_targets.demo_world.ground import SHADOW
from occfeat_targets.demo_world.scene import World
from occfeat_targets.demo_world.solids import FIRST_STATIC_ID, Solids, intersect, surface_normals
from occfeat_targets.demo_world.surface import GROUND_COLOURS, Material, albedo, noise

SKY, GROUND = -1, -2
_NEAR = 0.2
_HAZE_METRES = 420.0
_SMOOTH = ImageFilter.Kernel((3, 3), (1, 2, 1, 2, 4, 2, 1, 2, 1))
# Colour of every raster value of the ground, in the sun and in the shadow of things.
_GROUND_TABLE = np.zeros((256, 3), np.float32)
_GROUND_TABLE[: len(GROUND_COLOURS)] = GROUND_COLOURS
_GROUND_TABLE[SHADOW:] = 0.56 * _GROUND_TABLE[:SHADOW]


class _Weather(NamedTuple):
    """Light from the sun and from the sky, and the sky's colours: (3,) each, 0..1."""

    sun: tuple[float, float, float]
    sky: tuple[float, float, float]
    horizon: tuple[float, float, float]
    zenith: tuple[float, float, float]


_WEATHER = {
    False: _Weather((0.78, 0.76, 0.72), (0.56, 0.59, 0.64), (0.80, 0.85, 0.90), (0.30, 0.50, 0.80)),
    True: _Weather((0.45, 0.44, 0.42), (0.70, 0.72, 0.74), (0.80, 0.81, 0.82), (0.66, 0.68, 0.71)),
}


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

    def pixels(self, local_R_global: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Directions (3, n) in a local frame of pixels given by their flat index (n,)."""
        M = (local_R_global @ self.R).astype(np.float32)
        rows, columns = np.divmod(chosen, self.shape[1])
        x, y = self.x[columns], self.y[rows]
        return np.stack([m[0] * x + m[1] * y + m[2] for m in M])


def render_camera(
    world: World, K: np.ndarray, global_T_cam: np.ndarray, height: int, width: int
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


def trace(world: World, K: np.ndarray, global_T_cam: np.ndarray, height: int, width: int) -> View:
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
    in_view = (boxes[:, 1] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 2]) & ~solids.lidar_only
    static = solids.object_id >= FIRST_STATIC_ID
    fixed = np.flatnonzero(in_view & static)
    for index in fixed[np.argsort(nearest[fixed], kind="stable")]:
        r0, r1, c0, c1 = boxes[index]
        if nearest[index] <= depth[r0:r1, c0:c1].max():
            _merge(solids, [index], boxes, rays, depth, solid)
    silhouette: dict[int, int] = {}
    for object_id in np.unique(solids.object_id[in_view & ~static]):
        parts = np.flatnonzero(in_view & (solids.object_id == object_id))
        silhouette[int(object_id)] = _merge(solids, parts, boxes, rays, depth, solid)
    return View(depth, solid, silhouette)


def _merge(solids: Solids, parts, boxes, rays: _Rays, depth, solid) -> int:
    """Put the parts of one thing into the image; returns the pixels of its silhouette."""
    r0, c0 = boxes[parts][:, [0, 2]].min(axis=0)
    r1, c1 = boxes[parts][:, [1, 3]].max(axis=0)
    own = np.zeros((r1 - r0, c1 - c0), dtype=bool)
    for index in parts:
        top, bottom, left, right = boxes[index]
        rotation = solids.local_R_global(index)
        origin = rotation @ (rays.origin - solids.centre[index])
        t = intersect(solids, index, origin, rays.window(rotation, boxes[index]))
        own[top - r0 : bottom - r0, left - c0 : right - c0] |= np.isfinite(t)
        window = depth[top:bottom, left:right]
        nearer = t < window
        window[nearer] = t[nearer]
        solid[top:bottom, left:right][nearer] = index
    return int(np.count_nonzero(own))


def _pixel_boxes(solids: Solids, rays: _Rays) -> tuple[np.ndarray, np.ndarray]:
    """Pixel windows (P, 4) int (row0, row1, column0, column1) of solids, and nearest depths (P,).

    Edges that cross the near plane are cut there, so windows of half-hidden solids are right too.
    """
    corners = (solids.corners() - rays.origin) @ rays.R
    starts = np.array([0, 0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 6])
    ends = np.array([1, 2, 4, 3, 5, 3, 6, 7, 5, 6, 7, 7])
    a, b = corners[:, starts], corners[:, ends]
    crosses = (a[..., 2] < _NEAR) != (b[..., 2] < _NEAR)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(crosses, (_NEAR - a[..., 2]) / (b[..., 2] - a[..., 2]), 0.0)
    points = np.concatenate([corners, a + share[..., None] * (b - a)], axis=1)
    valid = np.concatenate([corners[..., 2] >= _NEAR, crosses], axis=1)[..., None]
    z = np.where(valid, np.maximum(points[..., 2:], _NEAR), 1.0)
    pixels = points[..., :2] / z * np.diag(rays.K)[:2] + rays.K[:2, 2]
    low = np.floor(np.where(valid, pixels, np.inf).min(axis=1))
    high = np.ceil(np.where(valid, pixels, -np.inf).max(axis=1))
    height, width = rays.shape
    u, v = (np.stack([low[:, k], high[:, k]], axis=1) for k in (0, 1))
    boxes = np.concatenate([np.clip(v, 0, height), np.clip(u, 0, width)], axis=1)
    return boxes.astype(np.int64), np.maximum(corners[..., 2].min(axis=1), 0.0)


def shade(world: World, K: np.ndarray, global_T_cam: np.ndarray, view: View) -> np.ndarray:
    """Colour a traced view: (H, W, 3) uint8."""
    height, width = view.depth.shape
    rays = _Rays(K, global_T_cam, height, width)
    image = np.empty((height * width, 3), dtype=np.float32)
    depth, solid = view.depth.ravel(), view.solid.ravel()
    order = np.argsort(solid, kind="stable")  # pixels of one solid become neighbours
    bounds = np.searchsorted(solid[order], np.arange(-2, len(world.solids) + 1))
    for index in np.flatnonzero(np.diff(bounds)) - 2:
        chosen = order[bounds[index + 2] : bounds[index + 3]]
        if index == SKY:
            image[chosen] = _sky(world, rays.pixels(np.eye(3), chosen))
        elif index == GROUND:
            image[chosen] = _ground(world, rays, chosen, depth[chosen])
        else:
            image[chosen] = _surface(world, rays, index, chosen, depth[chosen])
    clear = np.exp(np.float32(-1 / _HAZE_METRES) * depth)
    clear[np.isinf(depth)] = 1
    image = image * clear[:, None] + np.outer(1 - clear, _weather(world).horizon)
    rgb = (np.clip(image, 0, 1) * 255).astype(np.uint8).reshape(height, width, 3)
    return _soften(rgb, view.solid)


def _weather(world: World) -> _Weather:
    return _Weather(*np.array(_WEATHER[world.scene.dull], np.float32))


def _sky(world: World, direction: np.ndarray) -> np.ndarray:
    """Sky colours (n, 3) for directions (3, n)."""
    weather = _weather(world)
    up = direction[2] / np.sqrt((direction * direction).sum(axis=0))
    high = np.sqrt(np.clip(up * np.float32(1.3), 0, 1))[:, None]
    return weather.horizon * (1 - high) + weather.zenith * high


def _ground(world: World, rays: _Rays, chosen: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Ground colours (n, 3)."""
    scene = world.scene
    direction = rays.pixels(np.eye(3), chosen)[:2]
    x, y = scene.xy_scene(rays.origin[:2] + (depth * direction).T).T.astype(np.float32)
    colour = _GROUND_TABLE[world.ground.values(x, y)]
    # Grain too fine for the distance would flicker.
    grain = 0.055 * np.clip(1.1 - depth / 30, 0, 1) * noise(x * 45, y * 45)
    grain += 0.05 * np.clip(1.1 - depth / 120, 0, 1) * noise(x * 2.7 + 50, y * 2.7)
    weather = _weather(world)
    light = weather.sky + weather.sun * np.float32(scene.sun[2] + 0.12)
    return colour * (1 + grain)[:, None] * light


def _surface(world: World, rays: _Rays, index: int, chosen, depth) -> np.ndarray:
    """Lit colours (n, 3) of pixels that show one solid."""
    solids, weather = world.solids, _weather(world)
    rotation = solids.local_R_global(index)
    origin = (rotation @ (rays.origin - solids.centre[index])).astype(np.float32)
    point = origin[:, None] + depth * rays.pixels(rotation, chosen)
    normal, face = surface_normals(solids, index, point)
    sun = (rotation @ world.scene.sun).astype(np.float32)
    facing = np.clip(sun @ normal, 0, 1) * world.lit[index]
    if solids.material[index] == Material.FOLIAGE:
        facing = 0.25 + 0.6 * facing  # light also comes through leaves
    # Less sky is seen near the ground and from below.
    height = np.clip((point[2] + np.float32(solids.centre[index, 2])) / 1.2, 0, 1)
    open_sky = (0.72 + 0.28 * normal[2]) * (0.70 + 0.30 * height)
    light = np.outer(open_sky, weather.sky) + np.outer(facing, weather.sun)
    return albedo(solids, index, point, face) * light


def _soften(rgb: np.ndarray, solid: np.ndarray) -> np.ndarray:
    """Blur only the outlines of solids, which one ray a pixel leaves jagged."""
    edge = np.zeros(solid.shape, dtype=bool)
    beside, below = solid[:, 1:] != solid[:, :-1], solid[1:] != solid[:-1]
    for part, differs in (
        (edge[:, 1:], beside),
        (edge[:, :-1], beside),
        (edge[1:], below),
        (edge[:-1], below),
    ):
        part |= differs
    blurred = np.asarray(Image.fromarray(rgb).filter(_SMOOTH))
    rgb[edge] = blurred[edge]
    return rgb
