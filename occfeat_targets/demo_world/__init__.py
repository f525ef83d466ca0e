"""A synthetic drive through made-up streets, written as a nuScenes dataroot.

Every image, lidar return, box and map polygon of a keyframe comes from one and the same geometry,
so it is useful to try the pipeline without the real data and to test it against known answers.
Needs numpy, Pillow and tqdm only.
"""

import io
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from occfeat_targets.demo_world import frames, tables
from occfeat_targets.demo_world.frames import write_atomically
from occfeat_targets.demo_world.scene import Plan, build_scene

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
    missing = [key for key in keyframes if not frames.is_complete(out, plan, *key)]
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
    entries = out.iterdir() if out.exists() else ()
    others = sorted(entry.name for entry in entries if entry.name != MANIFEST + ".tmp")
    if others:
        raise ValueError(
            f"{out} is not empty (it holds {', '.join(others[:5])}) and was not made by "
            "demo-data: choose a folder that is empty or does not exist yet"
        )
    write_atomically(manifest, json.dumps(ours, indent=1).encode())


def _make_frames(
    out: Path, plan: Plan, missing: list[tuple[int, int]], workers: int | None
) -> Iterator[None]:
    """Make the missing frames, yielding after each."""
    count = min(os.cpu_count() or 1 if workers is None else workers, len(missing))
    if count == 0:
        for key in missing:
            yield frames.make_frame(out, plan, *key)
        return
    # spawn: a forked child could inherit locks of threads that the caller runs.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        jobs = [pool.submit(frames.make_frame, out, plan, *key) for key in missing]
        try:
            for job in as_completed(jobs):
                yield job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write_tables(out: Path, plan: Plan, names: list[str]) -> None:
    """Write map and tables from the frames' measurements; the tables come last."""
    scenes = [build_scene(plan, index) for index in range(plan.scenes)]
    results = [
        [frames.read_result(out, index, sample) for sample in range(plan.samples)]
        for index in range(plan.scenes)
    ]
    expansion = json.dumps(tables.map_expansion(scenes, plan.seed))
    write_atomically(out / f"maps/expansion/{tables.LOCATION}.json", expansion.encode())
    buffer = io.BytesIO()
    # The devkit wants this file to exist; at its fixed 0.1 m per pixel a real one would be 600 MB.
    Image.new("L", (200, 200), 0).save(buffer, format="PNG")
    write_atomically(out / tables.map_image_name(plan), buffer.getvalue())
    for name, records in tables.build_tables(plan, names, scenes, results).items():
        content = json.dumps(records, indent=0).encode()
        write_atomically(out / plan.version / f"{name}.json", content)
