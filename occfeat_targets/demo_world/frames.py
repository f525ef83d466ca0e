"""One keyframe's files: six JPEGs, one lidar turn, and what was measured while making them."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from occfeat_targets.demo_world.lidar import sweep
from occfeat_targets.demo_world.render import object_ids, shade, trace
from occfeat_targets.demo_world.rig import (
    CAMERAS,
    IMAGE_HEIGHT,
    IMAGE_WIDTH,
    LIDAR_SENSOR,
    SENSORS,
    Sensor,
)
from occfeat_targets.demo_world.scene import (
    Plan,
    Scene,
    World,
    build_scene,
    frame_world,
    global_T_ego,
)
from occfeat_targets.demo_world.solids import FIRST_STATIC_ID
from occfeat_targets.geometry import transform

FrameResult = list[dict]
#: Lower bounds of the visible share of visibility levels "1" to "4".
VISIBILITY_BOUNDS = (0.0, 0.4, 0.6, 0.8)
RESULTS_FOLDER = "demo_world_frames"


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that under its name there is either the whole of it or nothing new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(data)
    os.replace(partial, path)


def vehicle_log(scene: Scene) -> str:
    """Name of a scene's log file, the prefix of its sensor files."""
    return f"n000-2018-07-24-{11 + scene.index // 60:02d}-{scene.index % 60:02d}-00+0000"


def file_name(scene: Scene, sample: int, sensor: Sensor) -> str:
    """File of one sensor in one keyframe, relative to the dataroot."""
    ending = "jpg" if sensor.intrinsics else "pcd.bin"
    timestamp = scene.timestamp(sample) - sensor.early_us
    return f"samples/{sensor.channel}/{vehicle_log(scene)}__{sensor.channel}__{timestamp}.{ending}"


def result_file(out: Path, index: int, sample: int) -> Path:
    """File that holds a frame's measurements; written last, it says that the frame is complete."""
    return out / RESULTS_FOLDER / f"{index:04d}_{sample:04d}.json"


def frame_is_complete(out: Path, plan: Plan, index: int, sample: int) -> bool:
    """Whether all files of a frame are there."""
    scene = build_scene(plan, index)
    return result_file(out, index, sample).exists() and all(
        (out / file_name(scene, sample, sensor)).exists() for sensor in SENSORS
    )


def visibility_level(visible: int, silhouette: int) -> str:
    """Visibility token "1".."4" from the pixels seen and the pixels of the whole silhouette."""
    share = visible / silhouette if silhouette else 0.0
    return str(sum(share >= bound for bound in VISIBILITY_BOUNDS))


def make_frame(out: Path, plan: Plan, index: int, sample: int) -> None:
    """Write all files of one keyframe under ``out``, its measurements last.

    As in the real data, things that no sensor catches are not annotated.
    """
    world = frame_world(plan, index, sample)
    scene = world.scene
    silhouette: dict[int, int] = {}
    visible: dict[int, int] = {}
    for sensor in CAMERAS:
        pose = global_T_ego(world, world.timestamp - sensor.early_us) @ sensor.ego_T_sensor()
        matrix = sensor.camera_matrix()
        view = trace(world, matrix, pose, IMAGE_HEIGHT, IMAGE_WIDTH)
        rgb = shade(world, matrix, pose, view)
        write_atomically(out / file_name(scene, sample, sensor), _jpeg(rgb))
        seen = object_ids(world, view)
        seen = np.bincount(seen[(seen > 0) & (seen < FIRST_STATIC_ID)])
        for object_id, pixels in view.silhouette.items():
            silhouette[object_id] = silhouette.get(object_id, 0) + pixels
            if object_id < len(seen):
                visible[object_id] = visible.get(object_id, 0) + int(seen[object_id])
    points, _, _ = sweep(world, np.random.default_rng([plan.seed, index, sample, 2]))
    write_atomically(out / file_name(scene, sample, LIDAR_SENSOR), points.astype("<f4").tobytes())
    counts = _points_in_boxes(world, points)
    result = [
        {
            "object_id": placed.actor.object_id,
            "num_lidar_pts": int(count),
            "visibility": visibility_level(
                visible.get(placed.actor.object_id, 0), silhouette.get(placed.actor.object_id, 0)
            ),
        }
        for placed, count in zip(world.placed, counts, strict=True)
        if count or visible.get(placed.actor.object_id, 0)
    ]
    write_atomically(result_file(out, index, sample), json.dumps(result).encode())


def _jpeg(rgb: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="JPEG", quality=90, subsampling="4:2:0")
    return buffer.getvalue()


def _points_in_boxes(world: World, points: np.ndarray) -> list[int]:
    """Lidar returns inside each annotated box, counted from the points as they are stored."""
    global_T_lidar = global_T_ego(world, world.timestamp) @ LIDAR_SENSOR.ego_T_sensor()
    xyz = transform(global_T_lidar, points[:, :3])
    counts = []
    for placed in world.placed:
        cos, sin = np.cos(placed.yaw), np.sin(placed.yaw)
        offset = xyz - placed.centre
        width, length, height = placed.actor.size
        inside = (
            (np.abs(cos * offset[:, 0] + sin * offset[:, 1]) <= length / 2)
            & (np.abs(-sin * offset[:, 0] + cos * offset[:, 1]) <= width / 2)
            & (np.abs(offset[:, 2]) <= height / 2)
        )
        counts.append(int(inside.sum()))
    return counts
