"""What the sensors see: rays against the solids and the ground, nearest wins.

A pixel (row i, column j) covers [j, j+1) x [i, i+1); its ray passes through (j + 0.5, i + 0.5) and
has length 1 along the optical axis, so the ray parameter is the z-depth.
"""

from collections import Counter
from itertools import product
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from occfeat_targets.demo_world import rig
from occfeat_targets.demo_world.layout import SHADOW, sample_ground
from occfeat_targets.demo_world.scene import World
from occfeat_targets.demo_world.solids import EGO_ID, Solids, intersect, surface_normals
from occfeat_targets.demo_world.things import PATTERNS, WINDOW, Material

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
# Strength of the grain of a material and its texels per metre.
_GRAIN = {Material.MASONRY: (0.06, 15), Material.FOLIAGE: (0.30, 40), Material.BARK: (0.10, 30)}


def _make_noise(size: int) -> np.ndarray:
    """Tileable noise (size, size) float32 in -1..1 with detail of 1 to 32 texels."""
    rng = np.random.default_rng(20_190_318)
    total = np.zeros((size, size))
    for period in (1, 2, 4, 8, 32):
        layer = np.kron(rng.standard_normal((size // period,) * 2), np.ones((period, period)))
        for axis in (0, 1):  # a running mean over one period smooths the blocks
            layer = np.mean([np.roll(layer, shift, axis) for shift in range(period)], axis=0)
        total += layer / layer.std()
    return np.clip(total / (2.2 * total.std()), -1, 1).astype(np.float32)


_NOISE = _make_noise(512)


def _noise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Noise in -1..1 at texel coordinates a, b (same shape); repeats every 512 texels."""
    return _NOISE[a.astype(np.int32) & 511, b.astype(np.int32) & 511]


class _Rays:
    """The rays of one image: directions in a frame are affine in column and row."""

    def __init__(self, K: np.ndarray, global_T_cam: np.ndarray, height: int, width: int):
        self.R = global_T_cam[:3, :3]
        self.origin = global_T_cam[:3, 3]
        self.K = K
        self.shape = (height, width)
        self.x = ((np.arange(width) + 0.5 - K[0, 2]) / K[0, 0]).astype(np.float32)
        self.y = ((np.arange(height) + 0.5 - K[1, 2]) / K[1, 1]).astype(np.float32)

    def window(self, local_R_global: np.ndarray, pixels: tuple[slice, slice]) -> list[np.ndarray]:
        """Directions (x, y, z) in a local frame for a window of pixels (rows, columns)."""
        M = (local_R_global @ self.R).astype(np.float32)
        y, x = self.y[pixels[0]], self.x[pixels[1]]
        return [m[0] * x[None, :] + (m[1] * y + m[2])[:, None] for m in M]

    def pixels(self, local_R_global: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Directions (3, n) in a local frame of pixels given by their flat index (n,)."""
        M = (local_R_global @ self.R).astype(np.float32)
        rows, columns = np.divmod(chosen, self.shape[1])
        x, y = self.x[columns], self.y[rows]
        return np.stack([m[0] * x + m[1] * y + m[2] for m in M])


class View(NamedTuple):
    """What a camera sees, pixel by pixel (H, W)."""

    rgb: np.ndarray  # (H, W, 3) uint8
    depth: np.ndarray  # float32, z-depth in metres along the optical axis, inf for sky
    object_id: np.ndarray  # int32, -1 sky, 0 ground, else the thing's id
    silhouette: dict[int, int]  # id to pixels an annotated thing would cover if nothing hid it


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
    object_id = np.append(world.solids.object_id, [0, -1]).astype(np.int32)[solid]
    return View(rgb, depth, object_id, silhouette)


def _trace(solids: Solids, rays: _Rays) -> tuple[np.ndarray, np.ndarray, dict[int, int]]:
    """Depth and nearest solid of every pixel (-2 the ground, -1 the sky), and the silhouettes."""
    down = rays.window(np.eye(3), np.s_[:, :])[2]
    with np.errstate(divide="ignore"):
        depth = np.where(down < 0, np.float32(-rays.origin[2]) / down, np.float32(np.inf))
    # A ray just below the horizon meets the plane kilometres away: that is sky.
    depth[depth > 2000] = np.inf
    solid = np.where(np.isfinite(depth), np.int32(-2), np.int32(-1))
    boxes, nearest = _pixel_boxes(solids, rays)
    in_view = (boxes[:, 1] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 2])
    static = solids.object_id > EGO_ID
    annotated = np.flatnonzero(in_view & (solids.object_id < EGO_ID))
    fixed = np.flatnonzero(in_view & static)
    silhouette, covered = Counter(), np.zeros(rays.shape, np.int32)  # covered: by which thing
    # What is not annotated comes from near to far: most of it is hidden and skipped.
    for index in [*fixed[np.argsort(nearest[fixed], kind="stable")], *annotated]:
        r0, r1, c0, c1 = boxes[index]
        window = np.s_[r0:r1, c0:c1]
        if static[index] and nearest[index] > depth[window].max():
            continue
        rotation = solids.global_R_local[index].T
        origin = rotation @ (rays.origin - solids.centre[index])
        t = intersect(solids, index, origin, rays.window(rotation, window))
        nearer = t < depth[window]
        depth[window][nearer] = t[nearer]
        solid[window][nearer] = index
        if not static[index]:
            object_id = solids.object_id[index]
            fresh = np.isfinite(t) & (covered[window] != object_id)
            covered[window][fresh] = object_id
            silhouette[int(object_id)] += np.count_nonzero(fresh)
    return depth, solid, silhouette


def _pixel_boxes(solids: Solids, rays: _Rays) -> tuple[np.ndarray, np.ndarray]:
    """Pixel windows (P, 4) int (row0, row1, column0, column1) of solids, and nearest depths (P,).

    Edges are cut at the near plane, so that windows of solids that cross it are right too.
    """
    signs = np.array(list(product((-1.0, 1.0), repeat=3)))
    corners = solids.centre[:, None] + np.einsum("pij,cj->pci", solids.axes(), signs)
    corners = (corners - rays.origin) @ rays.R
    start = np.repeat(np.arange(8), 3)
    a, b = corners[:, start], corners[:, start ^ np.tile([1, 2, 4], 8)]  # edges from both ends
    cut = (a[..., 2:] < _NEAR) & (b[..., 2:] >= _NEAR)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(cut, (_NEAR - a[..., 2:]) / (b[..., 2:] - a[..., 2:]), 0.0)
    points, valid = a + share * (b - a), cut | (a[..., 2:] >= _NEAR)
    z = np.maximum(points[..., 2:], _NEAR)
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
    for chosen in np.split(order, np.flatnonzero(np.diff(solid[order])) + 1):
        index = solid[chosen[0]]
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
    grain = 0.055 * np.clip(1.1 - depth / 30, 0, 1) * _noise(x * 45, y * 45)
    grain += 0.05 * np.clip(1.1 - depth / 120, 0, 1) * _noise(x * 2.7 + 50, y * 2.7)
    light = _SKY + _SUN * np.float32(world.scene.sun[2] + 0.12)
    return _GROUND[sample_ground(world.ground, x, y)] * ((1 + grain)[:, None] * light)


def _surface(world: World, rays: _Rays, index: int, chosen, depth) -> np.ndarray:
    """Lit colours (n, 3) of pixels that show one solid."""
    solids = world.solids
    rotation = solids.global_R_local[index].T
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
    return _albedo(solids, index, point, face) * light


def _albedo(solids: Solids, index: int, point: np.ndarray, face: np.ndarray) -> np.ndarray:
    """Colours (n, 3) float32 in 0..1, before light and haze, of points (3, n) float32 on a solid.

    Points are in its frame, metres; ``face`` (n,) as ``surface_normals`` numbers them.
    """
    half, taper = solids.half[index].astype(np.float32), solids.taper[index].astype(np.float32)
    out = np.tile(solids.colour[index], (point.shape[1], 1))
    if solids.material[index] in _GRAIN:
        strength, fine = _GRAIN[solids.material[index]]
        x, y, z = point * np.float32(fine)
        out *= (1 + strength * (_noise(x, y) + _noise(y + 90, z) + _noise(z + 200, x)))[:, None]
    decals = PATTERNS[str(solids.pattern[index])]
    if not decals:
        return out
    height = point[2] + half[2]
    up = height / (2 * half[2])
    # Along a side or an end, from its middle line; a taper moves the line and narrows the face.
    side = (face == 2) | (face == 3)
    middle = np.where(side, (taper[1] - taper[0]) * up / 2, 0)
    wide = np.where(side, half[0] - (taper[0] + taper[1]) * up / 2, half[1] - taper[2] * up)
    along = np.where(side, point[0], point[1]) - middle
    for decal in decals:
        u, v, tone = np.abs(along) / wide, up, None
        if decal.period[0]:
            column = along / np.float32(decal.period[0])
            u = np.abs(column - np.floor(column) - np.float32(0.5)) * 2
        if decal.period[1]:
            row = height / np.float32(decal.period[1])
            v = row - np.floor(row)
            if decal.colour == WINDOW:  # rooms differ
                tone = 1 + 0.4 * _noise(7 * np.floor(column) + index, 13 * np.floor(row))
        (u0, u1), (v0, v1) = decal.u, decal.v
        # Distance from the rectangle's middle: 1 on its border.
        du, dv = np.abs(2 * u - u0 - u1) / (u1 - u0), np.abs(2 * v - v0 - v1) / (v1 - v0)
        inside = np.hypot(du, dv) < 1 if decal.ellipse else np.maximum(du, dv) < 1
        inside &= np.isin(range(6), decal.faces)[face]
        out[inside] = decal.colour
        if tone is not None:
            out[inside] *= tone[inside, None]
    return out


def cast_rays(
    world: World,
    origin: np.ndarray,
    directions: np.ndarray,
    max_range: float = 2000.0,
    ego_car: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nearest surfaces along rays from ``origin`` (3,) in ``directions`` (N, 3), unit; global.

    What is farther than ``max_range`` metres is not hit, nor the car's own body but by ``ego_car``.
    Returns range (N,) float32 metres, inf where nothing is hit; object_id (N,) int32, -1 nothing,
    0 ground, else the thing's id; material (N,) uint8, a Material.
    """
    solids, d = world.solids, directions.T.astype(np.float32)
    with np.errstate(divide="ignore"):
        distance = np.where(d[2] < 0, np.float32(-origin[2]) / d[2], np.float32(np.inf))
    distance[distance > max_range] = np.inf
    hit = np.where(np.isfinite(distance), np.int32(-2), np.int32(-1))
    # Only rays within a narrow angle of its centre can meet a solid.
    away = solids.centre - origin
    far = np.maximum(np.linalg.norm(away, axis=1), 1e-9)
    radius = np.linalg.norm(solids.half, axis=1) * 1.01 + 1e-3
    cosine = np.where(far > radius, np.sqrt(np.maximum(1 - (radius / far) ** 2, 0)) - 1e-5, -2)
    towards = (away / far[:, None]).astype(np.float32)
    seen = (far - radius < max_range) & (ego_car | (solids.object_id != EGO_ID))
    for index in np.flatnonzero(seen):
        chosen = np.flatnonzero(towards[index] @ d > cosine[index])
        rotation = solids.global_R_local[index].T
        start = rotation @ (origin - solids.centre[index])
        t = intersect(solids, index, start, rotation.astype(np.float32) @ d[:, chosen])
        nearer = (t < distance[chosen]) & (t <= max_range)
        distance[chosen[nearer]] = t[nearer]
        hit[chosen[nearer]] = index
    object_id = np.append(solids.object_id, [0, -1]).astype(np.int32)[hit]
    material = np.append(solids.material, [0, Material.NOTHING]).astype(np.uint8)[hit]
    on_ground = hit == -2
    xy = origin[:2] + distance[on_ground, None].astype(np.float64) * directions[on_ground, :2]
    material[on_ground] = ground_material(world, xy)
    return distance, object_id, material


def ground_material(world: World, xy: np.ndarray) -> np.ndarray:
    """Materials (N,) uint8 of the ground at global points (N, 2)."""
    return sample_ground(world.ground, *xy.T) & (SHADOW - 1)


def sweep(world: World, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One lidar turn at the keyframe's time; object_id and material (N,), see cast_rays, of what it
    hit.

    Points are (N, 5) float32: x, y, z in the lidar frame, metres; intensity 0..255; ring 0..31.
    """
    global_T_lidar = world.scene.global_T_sensor(world.timestamp, rig.LIDAR_SENSOR)
    # Column by column, as they fire, each from the lowest beam up; x right, y forward, z up.
    elevation = np.deg2rad(np.linspace(-30.67, 10.67, rig.LIDAR_BEAMS))
    azimuth = np.arange(rig.LIDAR_COLUMNS)[:, None] * (-2 * np.pi / rig.LIDAR_COLUMNS)
    flat = np.cos(elevation)
    xyz = np.cos(azimuth) * flat, np.sin(azimuth) * flat, np.sin(elevation)
    directions = np.stack(np.broadcast_arrays(*xyz), axis=-1).reshape(-1, 3)
    ring = np.tile(np.arange(rig.LIDAR_BEAMS), rig.LIDAR_COLUMNS)
    turned = directions @ global_T_lidar[:3, :3].T
    distance, object_id, material = cast_rays(
        world, global_T_lidar[:3, 3], turned, rig.LIDAR_MAX_RANGE, ego_car=True
    )
    error = rng.normal(0, rig.LIDAR_RANGE_NOISE, len(distance)).clip(-0.028, 0.028)
    spread = rng.uniform(0.7, 1.3, len(distance))
    kept = np.isfinite(distance)
    xyz = directions[kept] * (distance[kept].astype(np.float64) + error[kept])[:, None]
    intensity = np.clip(np.round(_INTENSITY[material[kept]] * spread[kept]), 0, 255)
    points = np.column_stack([xyz, intensity, ring[kept]]).astype(np.float32)
    return points, object_id[kept], material[kept]
