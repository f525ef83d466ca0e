"""A naive second computation of one keyframe's targets: float64, plain loops, no occfeat code.

Written from the conventions alone (frames, axes, half-open bounds, half-cell centres), so that a
mistake in the package and a mistake here are unlikely to be the same one. Slow on purpose: every
rule stands in a loop where it can be read. Needs numpy and pyquaternion, nothing else.
"""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
from pyquaternion import Quaternion

CAMERAS = ["FRONT_LEFT", "FRONT", "FRONT_RIGHT", "BACK_LEFT", "BACK", "BACK_RIGHT"]


class Tables:
    """The JSON tables of a dataroot, by token."""

    def __init__(self, dataroot):
        self.root = Path(dataroot)
        folders = [f for f in sorted(self.root.glob("v1.0-*")) if (f / "sample.json").exists()]
        assert len(folders) == 1, f"expected one table folder in {self.root}, got {folders}"
        self.version = folders[0].name
        self.by_token = {}
        for name in (
            "sample",
            "sample_data",
            "ego_pose",
            "calibrated_sensor",
            "sensor",
            "sample_annotation",
            "instance",
            "category",
        ):
            with open(folders[0] / f"{name}.json") as file:
                self.by_token[name] = {row["token"]: row for row in json.load(file)}
        self.data = {}  # (sample token, channel) -> keyframe sample_data
        for row in self.by_token["sample_data"].values():
            if row["is_key_frame"]:
                self.data[row["sample_token"], self.channel(row)] = row

    def channel(self, sample_data):
        calibration = self.by_token["calibrated_sensor"][sample_data["calibrated_sensor_token"]]
        return self.by_token["sensor"][calibration["sensor_token"]]["channel"]

    def sample_tokens(self):
        return list(self.by_token["sample"])

    def ego_T_sensor(self, sample_data):
        return pose(self.by_token["calibrated_sensor"][sample_data["calibrated_sensor_token"]])

    def global_T_ego(self, sample_data):
        return pose(self.by_token["ego_pose"][sample_data["ego_pose_token"]])

    def intrinsics(self, sample_data):
        row = self.by_token["calibrated_sensor"][sample_data["calibrated_sensor_token"]]
        return np.array(row["camera_intrinsic"], dtype=np.float64)


def pose(row):
    matrix = Quaternion(row["rotation"]).transformation_matrix.copy()
    matrix[:3, 3] = row["translation"]
    return matrix


# --- lidar ------------------------------------------------------------------------------------


def read_lidar(path):
    """The (x, y, z) of each return, in the sensor frame."""
    return np.fromfile(path, dtype=np.float32).reshape(-1, 5)[:, :3].astype(np.float64)


def points_ego(tables, sample_token, near_m, sweeps=1):
    """Returns of the keyframe's sweep and `sweeps - 1` before it, in the keyframe's ego frame."""
    keyframe = tables.data[sample_token, "LIDAR_TOP"]
    ego_T_global = np.linalg.inv(tables.global_T_ego(keyframe))
    points = []
    row = keyframe
    for _ in range(sweeps):
        ego_T_sensor = ego_T_global @ tables.global_T_ego(row) @ tables.ego_T_sensor(row)
        for x, y, z in read_lidar(tables.root / row["filename"]).tolist():
            if abs(x) < near_m and abs(y) < near_m:
                continue
            points.append(apply(ego_T_sensor, (x, y, z)))
        if not row["prev"]:
            break
        row = tables.by_token["sample_data"][row["prev"]]
    return points


def apply(matrix, point):
    m = matrix.tolist()
    x, y, z = point
    return tuple(m[r][0] * x + m[r][1] * y + m[r][2] * z + m[r][3] for r in range(3))


# --- grid: bounds = ((lo, hi, n) of x, of y, of z) ----------------------------------------------


def cell(point, bounds):
    """The (ix, iy, iz) of a point, or None outside the half-open box."""
    index = []
    for value, (lo, hi, n) in zip(point, bounds, strict=True):
        if not (lo <= value < hi):
            return None
        index.append(math.floor((value - lo) / ((hi - lo) / n)))
    return tuple(index)


def centre(index, bounds):
    return tuple(
        lo + (i + 0.5) * (hi - lo) / n for i, (lo, hi, n) in zip(index, bounds, strict=True)
    )


def flat(index, bounds):
    """Volume axes (Z, X, Y): y runs fastest, z slowest."""
    ix, iy, iz = index
    return (iz * bounds[0][2] + ix) * bounds[1][2] + iy


def voxels(points, bounds):
    """{flat index: (ix, iy, iz)} of the occupied voxels."""
    found = {}
    for point in points:
        index = cell(point, bounds)
        if index is not None:
            found[flat(index, bounds)] = index
    return found


# --- cameras ----------------------------------------------------------------------------------


def camera_list(tables, sample_token):
    """Per camera: (cam_T_ego through the camera's own ego pose, K, width, height)."""
    global_T_ego = tables.global_T_ego(tables.data[sample_token, "LIDAR_TOP"])
    found = []
    for name in CAMERAS:
        row = tables.data[sample_token, "CAM_" + name]
        cam_T_egocam = np.linalg.inv(tables.ego_T_sensor(row))
        egocam_T_global = np.linalg.inv(tables.global_T_ego(row))
        cam_T_ego = cam_T_egocam @ egocam_T_global @ global_T_ego
        found.append((cam_T_ego, tables.intrinsics(row), row["width"], row["height"]))
    return found


def project(point, cam_T_ego, K, width, height):
    """(u, v) in pixels of the full image, or None where the camera does not see the point."""
    x, y, depth = apply(cam_T_ego, point)
    if depth <= 0:
        return None
    u = (K[0, 0] * x + K[0, 1] * y + K[0, 2] * depth) / depth
    v = (K[1, 1] * y + K[1, 2] * depth) / depth
    if 0 <= u < width and 0 <= v < height:
        return u, v
    return None


def bilinear(feature_map, u, v, width, height):
    """feature_map (C, h, w) at pixel (u, v) of a width x height image; cell centres at half."""
    _, h, w = feature_map.shape
    # Position in units of cells, 0 at the first centre; beyond the outer centres the border holds.
    a = min(max(u * w / width - 0.5, 0.0), w - 1.0)
    b = min(max(v * h / height - 0.5, 0.0), h - 1.0)
    j, i = min(int(a), w - 2), min(int(b), h - 2)
    p, q = a - j, b - i
    return (
        (1 - q) * (1 - p) * feature_map[:, i, j]
        + (1 - q) * p * feature_map[:, i, j + 1]
        + q * (1 - p) * feature_map[:, i + 1, j]
        + q * p * feature_map[:, i + 1, j + 1]
    )


def targets(tables, sample_token, bounds, near_m, feature_maps, sweeps=1):
    """{flat index: (camera bits, mean feature or None)}; feature_maps (6, C, h, w) float64."""
    cameras = camera_list(tables, sample_token)
    found = {}
    for index, voxel in voxels(points_ego(tables, sample_token, near_m, sweeps), bounds).items():
        xyz = centre(voxel, bounds)
        bits, vectors = 0, []
        for c, (cam_T_ego, K, width, height) in enumerate(cameras):
            uv = project(xyz, cam_T_ego, K, width, height)
            if uv is not None:
                bits |= 1 << c
                vectors.append(bilinear(feature_maps[c], *uv, width, height))
        found[index] = (bits, sum(vectors) / len(vectors) if vectors else None)
    return found


# --- BEV labels -------------------------------------------------------------------------------


def vehicle_boxes(tables, sample_token):
    """(centre x, centre y, length, width, yaw, visibility level) in ego of the vehicle boxes."""
    ego_T_global = np.linalg.inv(tables.global_T_ego(tables.data[sample_token, "LIDAR_TOP"]))
    found = []
    for row in tables.by_token["sample_annotation"].values():
        if row["sample_token"] != sample_token:
            continue
        instance = tables.by_token["instance"][row["instance_token"]]
        category = tables.by_token["category"][instance["category_token"]]["name"]
        if not category.startswith("vehicle."):
            continue
        ego_T_box = ego_T_global @ pose(row)
        width, length, _ = row["size"]
        yaw = math.atan2(ego_T_box[1, 0], ego_T_box[0, 0])
        level = int(row["visibility_token"] or 0)  # 0: nobody said
        found.append((ego_T_box[0, 3], ego_T_box[1, 3], length, width, yaw, level))
    return found


def in_box(x, y, box):
    """Is (x, y) in the box's footprint? Turn the offset into the box's own axes and compare."""
    cx, cy, length, width, yaw = box[:5]
    dx, dy = x - cx, y - cy
    along = dx * math.cos(yaw) + dy * math.sin(yaw)
    across = -dx * math.sin(yaw) + dy * math.cos(yaw)
    return abs(along) <= length / 2 and abs(across) <= width / 2


def bev_mask(bounds, inside):
    """uint8 (X, Y): `inside(x, y)` at each cell centre."""
    nx, ny = bounds[0][2], bounds[1][2]
    mask = np.zeros((nx, ny), dtype=np.uint8)
    for ix in range(nx):
        for iy in range(ny):
            x, y, _ = centre((ix, iy, 0), bounds)
            mask[ix, iy] = inside(x, y)
    return mask


def vehicle_mask(boxes, bounds):
    return bev_mask(bounds, lambda x, y: any(in_box(x, y, box) for box in boxes))


def visible_mask(boxes, bounds):
    """0 where only boxes of visibility level 1 (0-40 %) lie, 1 elsewhere."""

    def counts(x, y):
        levels = [box[5] for box in boxes if in_box(x, y, box)]
        return not levels or any(level != 1 for level in levels)

    return bev_mask(bounds, counts)


def in_polygon(x, y, exterior, holes=()):
    """Even-odd rule: crossings of a ray to the right with the rings, holes included."""
    crossings = 0
    for ring in [exterior, *holes]:
        for k in range(len(ring)):
            (x0, y0), (x1, y1) = ring[k - 1], ring[k]
            if (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0):
                crossings += 1
    return crossings % 2 == 1


def distance_to_polyline(x, y, line):
    """Distance of (x, y) to the nearest point of the line's segments."""
    best = math.inf
    for (x0, y0), (x1, y1) in pairwise(line):
        dx, dy = x1 - x0, y1 - y0
        square = dx * dx + dy * dy
        t = 0.0 if square == 0 else ((x - x0) * dx + (y - y0) * dy) / square
        t = min(max(t, 0.0), 1.0)
        best = min(best, math.hypot(x - x0 - t * dx, y - y0 - t * dy))
    return best
