"""What the sensors see: rays against the solids and the ground, nearest wins.

A pixel (row i, column j) covers [j, j+1) x [i, i+1); its ray passes through (j + 0.5, i + 0.5) and
has length 1 along the optical axis, so the ray parameter is the z-depth.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from occfeat_targets.demo_world import rig
from occfeat_targets.demo_world.layout import SHADOW, sample_ground
from occfeat_targets.demo_world.scene import World
from occfeat_targets.demo_world.solids import FIRST_STATIC_ID, Solids, intersect, surface_normals
from occfeat_targets.demo_world.surface import Material, albedo, noise

_NEAR = 0.2
_HAZE_METRES = 420.0
_SMOOTH = ImageFilter.Kernel((3, 3), (1, 2, 1, 2, 8, 2, 1, 2, 1))
_SUN, _SKY = np.array([[0.78, 0.75, 0.69], [0.56, 0.59, 0.64]], np.float32)
_HORIZON, _ZENITH = np.array([[0.80, 0.85, 0.90], [0.30, 0.50, 0.80]], np.float32)
# Colour of every raster value of the ground, in the sun and in the shadow of things.
_GROUND = np.zeros((256, 3), np.float32)
_GROUND[: len(Material)] = [material.colour for material in Material]
_GROUND[SHADOW:] = 0.56 * _GROUND[:SHADOW]
_INTENSITY = np.array([material.intensity for material in Material])


class View(NamedTuple):
    """What a camera sees.

    ``rgb`` (H, W, 3) uint8; ``depth`` (H, W) float32, z-depth in metres along the optical axis, inf
    for sky; ``object_id`` (H, W) int32: -1 sky, 0 ground, else the id of the thing; ``silhouette``
    object id -> pixels that an annotated thing would cover if nothing hid it.
    """

    rgb: np.ndarray
    depth: np.ndarray
    object_id: np.ndarray
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
) -> View:
    """Render one camera of ``height`` x ``width`` pixels.

    ``K`` (3, 3) goes to continuous pixels of that image; ``global_T_cam`` (4, 4) float64, with x
    right, y down, z forward.
    """
    rays = _Rays(K, global_T_cam, height, width)
    depth, solid, silhouette = _trace(world.solids, rays)
    rgb = _shade(world, rays, depth.ravel(), solid.ravel())
    return View(rgb, depth, _ids(world.solids)[solid], silhouette)


def _ids(solids: Solids) -> np.ndarray:
    """Ids of solids, then those of the ground (index -2) and of the sky (index -1)."""
    return np.concatenate([solids.object_id, [0, -1]]).astype(np.int32)


def _trace(solids: Solids, rays: _Rays) -> tuple[np.ndarray, np.ndarray, dict[int, int]]:
    """Depth and index of the nearest solid of every pixel (see _ids), and the silhouettes."""
    height, width = rays.shape
    down = rays.window(np.eye(3), (0, height, 0, width))[2]
    with np.errstate(divide="ignore"):
        depth = np.where(down < 0, np.float32(-rays.origin[2]) / down, np.float32(np.inf))
    # A ray just below the horizon meets the plane kilometres away: that is sky.
    depth[depth > 2000] = np.inf
    solid = np.where(np.isfinite(depth), np.int32(-2), np.int32(-1))
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
    return depth, solid, silhouette


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
    boxes = np.stack([low[:, 1], high[:, 1], low[:, 0], high[:, 0]], axis=1)
    boxes = np.clip(boxes, 0, np.repeat(rays.shape, 2))
    return boxes.astype(np.int64), np.maximum(corners[..., 2].min(axis=1), 0.0)


def _shade(world: World, rays: _Rays, depth: np.ndarray, solid: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) uint8 of traced pixels (H * W,)."""
    image = np.empty((len(depth), 3), dtype=np.float32)
    order = np.argsort(solid, kind="stable")  # pixels of one solid become neighbours
    bounds = np.searchsorted(solid[order], np.arange(-2, len(world.solids) + 1))
    for index in np.flatnonzero(np.diff(bounds)) - 2:
        chosen = order[bounds[index + 2] : bounds[index + 3]]
        if index == -1:
            x, y, z = rays.pixels(np.eye(3), chosen)
            up = np.clip(1.3 * z / np.sqrt(x * x + y * y + z * z), 0, 1)
            image[chosen] = _HORIZON + np.outer(np.sqrt(up), _ZENITH - _HORIZON)
        elif index == -2:
            image[chosen] = _ground(world, rays, chosen, depth[chosen])
        else:
            image[chosen] = _surface(world, rays, index, chosen, depth[chosen])
    clear = np.exp(np.float32(-1 / _HAZE_METRES) * depth)
    clear[np.isinf(depth)] = 1
    image -= _HORIZON
    image *= clear[:, None]
    image += _HORIZON
    rgb = (image.clip(0, 1, out=image) * 255).astype(np.uint8).reshape(*rays.shape, 3)
    # One ray a pixel leaves outlines jagged: blur them as a lens does.
    return np.asarray(Image.fromarray(rgb).filter(_SMOOTH))


def _ground(world: World, rays: _Rays, chosen: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Ground colours (n, 3)."""
    direction = rays.pixels(np.eye(3), chosen)
    x, y = rays.origin[:2, None].astype(np.float32) + depth * direction[:2]
    # Grain too fine for the distance would flicker.
    grain = 0.055 * np.clip(1.1 - depth / 30, 0, 1) * noise(x * 45, y * 45)
    grain += 0.05 * np.clip(1.1 - depth / 120, 0, 1) * noise(x * 2.7 + 50, y * 2.7)
    light = _SKY + _SUN * np.float32(world.scene.sun[2] + 0.12)
    return _GROUND[sample_ground(world.ground, x, y)] * ((1 + grain)[:, None] * light)


def _surface(world: World, rays: _Rays, index: int, chosen, depth) -> np.ndarray:
    """Lit colours (n, 3) of pixels that show one solid."""
    solids = world.solids
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
    light = open_sky[:, None] * _SKY + facing[:, None] * _SUN
    return albedo(solids, index, point, face) * light


def cast_rays(
    world: World,
    origin: np.ndarray,
    directions: np.ndarray,
    max_range: float = 2000.0,
    ego_car: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nearest surfaces along rays from ``origin`` (3,) in ``directions`` (N, 3), unit; global.

    What is farther than ``max_range`` metres is not hit, nor the car's own body but by ``ego_car``.

    Returns:
        range (N,) float32 metres, inf where nothing is hit; object_id (N,) int32, -1 nothing,
        0 ground, else the thing's id; material (N,) uint8, a Material.
    """
    solids, d = world.solids, directions.T.astype(np.float32)
    with np.errstate(divide="ignore"):
        distance = np.where(d[2] < 0, np.float32(-origin[2]) / d[2], np.float32(np.inf))
    distance[distance > max_range] = np.inf
    hit = np.where(np.isfinite(distance), -2, -1).astype(np.int32)
    # Seen from above, only rays within a narrow angle of its centre can meet a solid.
    flat = (d[:2] / np.hypot(d[0], d[1])).T
    away = solids.centre[:, :2] - origin[:2]
    far = np.maximum(np.hypot(away[:, 0], away[:, 1]), 1e-9)
    radius = np.hypot(solids.half[:, 0], solids.half[:, 1]) * 1.01 + 1e-3
    cosine = np.where(far > radius, np.sqrt(np.maximum(1 - (radius / far) ** 2, 0)) - 1e-5, -2)
    towards = (away / far[:, None]).astype(np.float32)
    for index in np.flatnonzero((far - radius < max_range) & (ego_car | ~solids.lidar_only)):
        chosen = np.flatnonzero(flat @ towards[index] > cosine[index])
        rotation = solids.local_R_global(index)
        start = rotation @ (origin - solids.centre[index])
        t = intersect(solids, index, start, rotation.astype(np.float32) @ d[:, chosen])
        nearer = (t < distance[chosen]) & (t <= max_range)
        distance[chosen[nearer]] = t[nearer]
        hit[chosen[nearer]] = index
    material = np.concatenate([solids.material, [0, Material.NOTHING]]).astype(np.uint8)[hit]
    on_ground = hit == -2
    xy = origin[:2] + distance[on_ground, None].astype(np.float64) * directions[on_ground, :2]
    material[on_ground] = ground_material(world, xy)
    return distance, _ids(solids)[hit], material


def ground_material(world: World, xy: np.ndarray) -> np.ndarray:
    """Materials (N,) uint8 of the ground at global points (N, 2)."""
    return sample_ground(world.ground, *xy.T) & (SHADOW - 1)


def sweep(world: World, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One lidar turn at the keyframe's time.

    Returns:
        points (N, 5) float32: x, y, z in the lidar frame in metres, intensity 0..255, ring 0..31;
        object_id (N,) int32 and material (N,) uint8 of what each return hit, as in cast_rays.
    """
    global_T_lidar = world.scene.global_T_ego(world.timestamp) @ rig.LIDAR_SENSOR.ego_T_sensor()
    directions, ring = rig.lidar_directions()
    turned = directions @ global_T_lidar[:3, :3].T
    distance, object_id, material = cast_rays(
        world, global_T_lidar[:3, 3], turned, rig.LIDAR_MAX_RANGE, ego_car=True
    )
    error = rng.normal(0, rig.LIDAR_RANGE_NOISE, len(distance)).clip(-0.028, 0.028)
    spread = rng.uniform(0.7, 1.3, len(distance))
    kept = np.isfinite(distance)
    measured = distance[kept].astype(np.float64) + error[kept]
    points = np.empty((int(kept.sum()), 5), dtype=np.float32)
    points[:, :3] = directions[kept] * measured[:, None]
    points[:, 3] = np.clip(np.round(_INTENSITY[material[kept]] * spread[kept]), 0, 255)
    points[:, 4] = ring[kept]
    return points, object_id[kept], material[kept]
