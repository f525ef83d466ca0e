"""One keyframe's files: six JPEGs, one lidar turn, and what was measured while making them."""

import io
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from occfeat_targets.demo_world import rig
from occfeat_targets.demo_world.render import render_camera, sweep
from occfeat_targets.demo_world.scene import Plan, World, build_scene, frame_world
from occfeat_targets.demo_world.solids import FIRST_STATIC_ID
from occfeat_targets.geometry import transform


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that under its name there is either the whole of it or nothing new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(data)
    os.replace(partial, path)


def _result_file(out: Path, index: int, sample: int) -> Path:
    """File that holds a frame's measurements; written last, it says that the frame is complete."""
    return out / "demo_world_frames" / f"{index:04d}_{sample:04d}.json"


def read_result(out: Path, index: int, sample: int) -> list[dict]:
    """What was measured in a frame: object_id, num_lidar_pts and visibility of what is seen."""
    return json.loads(_result_file(out, index, sample).read_text())


def is_complete(out: Path, plan: Plan, index: int, sample: int) -> bool:
    """Whether all files of a frame are there."""
    scene = build_scene(plan, index)
    files = [out / scene.file_name(sample, sensor) for sensor in rig.SENSORS]
    return all(path.exists() for path in [_result_file(out, index, sample), *files])


def visibility_level(visible: int, silhouette: int) -> str:
    """Visibility token "1".."4" from the pixels seen and the pixels of the whole silhouette."""
    share = visible / silhouette if silhouette else 0.0
    return str(1 + sum(share >= bound for bound in (0.4, 0.6, 0.8)))


def make_frame(out: Path, plan: Plan, index: int, sample: int) -> None:
    """Write all files of one keyframe under ``out``, its measurements last.

    As in the real data, things that no sensor catches are not annotated.
    """
    world = frame_world(plan, index, sample)
    silhouette, visible = Counter(), Counter()  # object id -> pixels
    for sensor in rig.CAMERAS:
        pose = world.scene.global_T_ego(world.timestamp - sensor.early_us) @ sensor.ego_T_sensor()
        size = rig.IMAGE_HEIGHT, rig.IMAGE_WIDTH
        view = render_camera(world, sensor.camera_matrix(), pose, *size)
        buffer = io.BytesIO()
        Image.fromarray(view.rgb).save(buffer, format="JPEG", quality=90, subsampling="4:2:0")
        write_atomically(out / world.scene.file_name(sample, sensor), buffer.getvalue())
        silhouette.update(view.silhouette)
        ids = view.object_id[(view.object_id > 0) & (view.object_id < FIRST_STATIC_ID)]
        visible.update(dict(enumerate(np.bincount(ids).tolist())))
    points, _, _ = sweep(world, np.random.default_rng([plan.seed, index, sample, 2]))
    lidar_file = out / world.scene.file_name(sample, rig.LIDAR_SENSOR)
    write_atomically(lidar_file, points.astype("<f4").tobytes())
    result = []
    for placed, count in zip(world.placed, _points_in_boxes(world, points), strict=True):
        key = placed.actor.object_id
        if count or visible[key]:
            level = visibility_level(visible[key], silhouette[key])
            result.append({"object_id": key, "num_lidar_pts": count, "visibility": level})
    write_atomically(_result_file(out, index, sample), json.dumps(result).encode())


def _points_in_boxes(world: World, points: np.ndarray) -> list[int]:
    """Lidar returns inside each annotated box, counted from the points as they are stored."""
    global_T_lidar = world.scene.global_T_ego(world.timestamp) @ rig.LIDAR_SENSOR.ego_T_sensor()
    xyz = transform(global_T_lidar, points[:, :3])
    counts = []
    for placed in world.placed:
        width, length, height = placed.actor.size
        offset = xyz[np.abs(xyz[:, 0] - placed.centre[0]) < length + width] - placed.centre
        cos, sin = np.cos(placed.yaw), np.sin(placed.yaw)
        box_R_global = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
        inside = np.abs(offset @ box_R_global.T) <= np.array([length, width, height]) / 2
        counts.append(int(inside.all(axis=1).sum()))
    return counts
