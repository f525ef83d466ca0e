"""A synthetic drive through made-up streets, written as a nuScenes dataroot.

Every image, lidar return, box and map polygon of a keyframe comes from one and the same geometry,
so it is useful to try the pipeline without the real data and to test it against known answers.
Needs numpy, Pillow and tqdm only.
"""

import io
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from threading import Thread

import numpy as np
from PIL import Image
from tqdm import tqdm

from occfeat_targets.demo_world import rig, tables
from occfeat_targets.demo_world.labels import lidarseg
from occfeat_targets.demo_world.render import render_camera, sweep
from occfeat_targets.demo_world.scene import Plan, build_scene, frame_world
from occfeat_targets.demo_world.solids import EGO_ID, Pose
from occfeat_targets.demo_world.traffic import Actor
from occfeat_targets.geometry import transform

#: Changes whenever the same parameters would give other bytes.
GENERATOR_VERSION = 3
MANIFEST = "demo_world.json"


def make_demo_world(
    out: Path,
    scenes: int = 4,
    samples: int = 10,
    seed: int = 0,
    version: str = "v1.0-mini",
    workers: int | None = None,
) -> None:
    """Write a synthetic dataroot in nuScenes format that nuscenes-devkit loads as it is.

    The same parameters give the same bytes, whatever the number of workers. A run that was cut off
    is finished by running it again with the same parameters: complete frames are kept. Things that
    move stand still within a keyframe (see ``scene``).

    Args:
        out: folder to write: missing, empty, or with a world of these parameters, finished or not.
        scenes: number of scenes, at least 2; about one in four is a validation scene.
        samples: keyframes per scene, two a second.
        seed: changes everything random.
        version: "v1.0-mini" (up to 10 scenes) or "v1.0-trainval" (up to 64).
        workers: processes; None takes one per CPU, 0 works in this process.

    Raises:
        ValueError: a parameter is out of range, or ``out`` holds something else.
    """
    out = Path(out)
    names = tables.scene_names(version, scenes)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, but is {samples}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, but is {seed}")
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be 0 or more, or None for one per CPU, but is {workers}")
    plan = Plan(scenes, samples, seed, version)
    _claim(out, plan)
    keyframes = [(index, sample) for index in range(scenes) for sample in range(samples)]
    missing = [key for key in keyframes if not _is_complete(out, plan, *key)]
    done = len(keyframes) - len(missing)
    with tqdm(total=len(keyframes), initial=done, desc="demo world", unit="frame") as progress:
        for _ in _make_frames(out, plan, missing, workers):
            progress.update()
    _write_tables(out, plan, names)


def _claim(out: Path, plan: Plan) -> None:
    """Make the folder ours, or refuse it."""
    manifest = out / MANIFEST
    ours = {"generator": "occfeat demo world", "generator_version": GENERATOR_VERSION, **vars(plan)}
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder that is empty or does not exist yet")
    if manifest.exists():
        try:
            found = json.loads(manifest.read_text())
        except ValueError:
            found = {}
        if different := [key for key in ours if found.get(key) != ours[key]]:
            listed = ", ".join(f"{k} {found.get(k)!r} instead of {ours[k]!r}" for k in different)
            raise ValueError(
                f"{out} holds another demo world ({listed}): run with its parameters, delete the "
                "folder, or choose another one"
            )
        return
    there = out.iterdir() if out.exists() else ()
    if others := sorted(path.name for path in there if path.name != MANIFEST + ".tmp"):
        raise ValueError(
            f"{out} is not empty (it holds {', '.join(others[:5])}) and was not made by "
            "demo-data: choose a folder that is empty or does not exist yet"
        )
    write_atomically(manifest, json.dumps(ours, indent=1).encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that under its name there is either the whole of it or nothing new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_name(path.name + ".tmp")
    partial_file.write_bytes(data)
    os.replace(partial_file, path)


def _result_file(out: Path, index: int, sample: int) -> Path:
    """File that holds a frame's measurements; written last, it says that the frame is complete."""
    return out / "demo_world_frames" / f"{index:04d}_{sample:04d}.json"


def _is_complete(out: Path, plan: Plan, index: int, sample: int) -> bool:
    scene = build_scene(plan, index)
    files = [out / scene.file_name(sample, sensor) for sensor in rig.SENSORS]
    files.append(out / tables.lidarseg_row(plan, index, sample)[-1])
    return all(path.exists() for path in [_result_file(out, index, sample), *files])


def _make_frames(
    out: Path, plan: Plan, missing: list[tuple[int, int]], workers: int | None
) -> Iterator[None]:
    """Make the missing frames, yielding after each."""
    make = partial(_make_frame, out, plan)
    count = min(os.cpu_count() or 1 if workers is None else workers, len(missing))
    if count == 0:
        yield from map(make, missing)
        return
    # spawn: a forked child could inherit locks of threads that the caller runs.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _end_with_parent) as pool:
        # When a frame fails or the user stops, map cancels those that have not begun.
        yield from pool.map(make, missing)


def _end_with_parent() -> None:
    """Of a pool's process: else it waits for work for ever after a SIGKILL of its parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def _make_frame(out: Path, plan: Plan, keyframe: tuple[int, int]) -> None:
    """Write all files of one keyframe (scene, sample): six JPEGs, a lidar turn, the class of each
    return, what was measured.

    As in the real data, things that no sensor catches are not annotated.
    """
    index, sample = keyframe
    world = frame_world(plan, index, sample)
    silhouette, visible = Counter(), Counter()  # object id -> pixels
    for sensor in rig.CAMERAS:
        pose = world.scene.global_T_sensor(world.timestamp, sensor)
        view = render_camera(world, sensor.camera_matrix(), pose, *rig.IMAGE_HW)
        buffer = io.BytesIO()
        Image.fromarray(view.rgb).save(buffer, format="JPEG", quality=90, subsampling="4:2:0")
        write_atomically(out / world.scene.file_name(sample, sensor), buffer.getvalue())
        silhouette.update(view.silhouette)
        annotated = view.object_id[(view.object_id > 0) & (view.object_id < EGO_ID)]
        visible.update(dict(enumerate(np.bincount(annotated).tolist())))
    points, *hit = sweep(world, np.random.default_rng([plan.seed, index, sample, 2]))
    lidar_file = out / world.scene.file_name(sample, rig.LIDAR_SENSOR)
    write_atomically(lidar_file, points.astype("<f4").tobytes())
    labels_file = out / tables.lidarseg_row(plan, index, sample)[-1]
    write_atomically(labels_file, lidarseg(world, *hit).tobytes())
    global_T_lidar = world.scene.global_T_sensor(world.timestamp, rig.LIDAR_SENSOR)
    xyz, result = transform(global_T_lidar, points[:, :3]), []
    for actor, pose in world.placed:
        key, count = actor.object_id, _points_in_box(xyz, actor, pose)
        if count or visible[key]:
            level = visibility_level(visible[key], silhouette[key])
            result.append({"object_id": key, "num_lidar_pts": count, "visibility": level})
    write_atomically(_result_file(out, index, sample), json.dumps(result).encode())


def visibility_level(visible: int, silhouette: int) -> str:
    """Visibility token "1".."4" from the pixels seen and the pixels of the whole silhouette."""
    share = visible / silhouette if silhouette else 0.0
    return str(1 + sum(share >= bound for bound in (0.4, 0.6, 0.8)))


def _points_in_box(xyz: np.ndarray, actor: Actor, pose: Pose) -> int:
    """How many of the global points (N, 3) lie inside an actor's box."""
    (x, y, yaw), (width, length, height) = pose, actor.size
    offset = xyz[np.abs(xyz[:, 0] - x) < length + width] - (x, y, height / 2)
    cos, sin = np.cos(yaw), np.sin(yaw)
    box_R_global = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    inside = np.abs(offset @ box_R_global.T) <= np.array([length, width, height]) / 2
    return int(inside.all(axis=1).sum())


def _write_tables(out: Path, plan: Plan, names: list[str]) -> None:
    """Write map and tables from the frames' measurements; the tables come last."""
    scenes = [build_scene(plan, index) for index in range(plan.scenes)]
    results = [
        [json.loads(_result_file(out, index, sample).read_text()) for sample in range(plan.samples)]
        for index in range(plan.scenes)
    ]
    expansion = json.dumps(tables.map_expansion(scenes, plan.seed))
    write_atomically(out / f"maps/expansion/{tables.LOCATION}.json", expansion.encode())
    buffer = io.BytesIO()
    # The devkit wants this file to exist; at its fixed 0.1 m per pixel a real one would be 600 MB.
    Image.new("L", (200, 200), 0).save(buffer, format="PNG")
    world = tables.build_tables(plan, names, scenes, results)
    write_atomically(out / world["map"][0]["filename"], buffer.getvalue())
    for name, records in world.items():
        content = json.dumps(records, indent=0).encode()
        write_atomically(out / plan.version / f"{name}.json", content)
