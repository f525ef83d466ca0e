"""A synthetic drive through made-up streets, written as a nuScenes dataroot.

Every image, lidar return, box and map polygon of a keyframe comes from one and the same geometry,
so it is useful to try the pipeline without the real data and to test it against known answers.
Needs numpy, Pillow and tqdm only.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from occfeat_targets.demo_world.frames import (
    FrameResult,
    frame_is_complete,
    make_frame,
    result_file,
    write_atomically,
)
from occfeat_targets.demo_world.lidar import cast_rays, ground_material, sweep
from occfeat_targets.demo_world.render import render_camera
from occfeat_targets.demo_world.scene import Plan, World, build_scene, frame_world, global_T_ego
from occfeat_targets.demo_world.surface import Material
from occfeat_targets.demo_world.tables import (
    LOCATION,
    build_tables,
    map_expansion,
    map_image_name,
    scene_names,
)

__all__ = [
    "Material",
    "Plan",
    "World",
    "build_scene",
    "cast_rays",
    "frame_world",
    "global_T_ego",
    "ground_material",
    "make_demo_world",
    "render_camera",
    "sweep",
]

#: Changes whenever the same parameters would give other bytes.
GENERATOR_VERSION = 2
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
        out: folder to write; made if missing. May hold an unfinished or finished world of the same
            parameters, nothing else.
        scenes: number of scenes, at least 2; about one in four is a validation scene.
        samples: keyframes per scene, two a second.
        seed: changes everything random.
        version: "v1.0-mini" (up to 10 scenes) or "v1.0-trainval" (up to 64).
        workers: processes; None takes one per CPU, 0 works in this process.

    Raises:
        ValueError: a parameter is out of range, or ``out`` holds something else.
    """
    out = Path(out)
    names = scene_names(version, scenes)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, but is {samples}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, but is {seed}")
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be 0 or more, or None for one per CPU, but is {workers}")
    plan = Plan(scenes, samples, seed, version)
    _claim(out, plan)
    missing = [
        (index, sample)
        for index in range(scenes)
        for sample in range(samples)
        if not frame_is_complete(out, plan, index, sample)
    ]
    progress = tqdm(
        total=scenes * samples,
        initial=scenes * samples - len(missing),
        desc="demo world",
        unit="frame",
    )
    with progress:
        for _ in _make_frames(out, plan, missing, workers):
            progress.update()
    _write_tables(out, plan, names)


def _manifest(plan: Plan) -> dict:
    return {"generator": "occfeat demo world", "generator_version": GENERATOR_VERSION, **vars(plan)}


def _claim(out: Path, plan: Plan) -> None:
    """Make the folder ours, or refuse it."""
    manifest = out / MANIFEST
    wanted = _manifest(plan)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder that is empty or does not exist yet")
    if manifest.exists():
        try:
            found = json.loads(manifest.read_text())
        except ValueError:
            found = {}
        different = [
            f"{key} {found.get(key)!r} instead of {value!r}"
            for key, value in wanted.items()
            if found.get(key) != value
        ]
        if different:
            raise ValueError(
                f"{out} holds another demo world ({', '.join(different)}): run with "
                "its parameters, delete the folder, or choose another one"
            )
        return
    others = (
        sorted(entry.name for entry in out.iterdir() if entry.name != MANIFEST + ".tmp")
        if out.exists()
        else []
    )
    if others:
        raise ValueError(
            f"{out} is not empty (it holds {', '.join(others[:5])}) and was not made by "
            "demo-data: choose a folder that is empty or does not exist yet"
        )
    write_atomically(manifest, json.dumps(wanted, indent=1).encode())


def _make_frames(
    out: Path, plan: Plan, missing: list[tuple[int, int]], workers: int | None
) -> Iterator[None]:
    """Make the missing frames, yielding after each."""
    count = min(os.cpu_count() or 1 if workers is None else workers, len(missing))
    if count == 0:
        for index, sample in missing:
            make_frame(out, plan, index, sample)
            yield
        return
    # spawn: a forked child could inherit locks of threads that the caller runs.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        jobs = [pool.submit(make_frame, out, plan, index, sample) for index, sample in missing]
        try:
            for job in as_completed(jobs):
                job.result()
                yield
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write_tables(out: Path, plan: Plan, names: list[str]) -> None:
    """Write map and tables from the frames' measurements; the tables come last."""
    scenes = [build_scene(plan, index) for index in range(plan.scenes)]
    results: dict[tuple[int, int], FrameResult] = {
        (index, sample): json.loads(result_file(out, index, sample).read_text())
        for index in range(plan.scenes)
        for sample in range(plan.samples)
    }
    expansion = map_expansion(scenes, plan.seed)
    write_atomically(out / f"maps/expansion/{LOCATION}.json", json.dumps(expansion).encode())
    buffer = io.BytesIO()
    # The devkit wants this file to exist; at its fixed 0.1 m per pixel a real one would be 600 MB.
    Image.new("L", (200, 200), 0).save(buffer, format="PNG")
    write_atomically(out / map_image_name(plan), buffer.getvalue())
    for name, records in build_tables(plan, names, scenes, results).items():
        write_atomically(
            out / plan.version / f"{name}.json", json.dumps(records, indent=0).encode()
        )
