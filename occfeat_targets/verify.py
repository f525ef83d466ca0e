"""Re-read a store and say everything that is wrong with it."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from occfeat_common.settings import differences
from occfeat_targets.config import FramesConfig, TargetsConfig
from occfeat_targets.frame_targets import frame_targets
from occfeat_targets.geometry import project
from occfeat_targets.labels import vehicle_masks
from occfeat_targets.nuscenes_source import load_source
from occfeat_targets.records import FrameError
from occfeat_targets.store.schema import CAMERAS, FAILED, TargetStore, dequantise, open_store
from occfeat_targets.teacher import describe, shared_teacher

_EDGE_PX = 0.02
"""Stored calibration is float32: a voxel this close to an image's edge may fall either side."""


def verify_store(url: str) -> tuple[int, list[str]]:
    """Read every frame and check shapes, ranges, order, images, scales and consistency.

    Returns:
        Number of frames, and one line per problem, naming frame, scene and sample.

    Raises:
        StoreError: the store can't be opened at all.
    """
    store = open_store(url)
    try:
        problems = list(
            _check_arrays(store)
        )  # reads the per-frame arrays before threads share them
    except (ValueError, OSError, RuntimeError) as error:
        return 0, [f"the per-frame arrays cannot be read: {error!r}"]
    if problems:
        return len(store), problems
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda i: _check_frame(store, i), range(len(store)))
        for found in tqdm(results, total=len(store), desc="verifying", unit="frame", disable=None):
            problems += found
    return len(store), problems


def recompute_frames(url: str, dataroot: Path, count: int, seed: int) -> list[str]:
    """Compute random frames again from the dataroot and compare with what is stored.

    Voxels, cameras, points and labels must be equal; features and images may differ by rounding,
    since processors and library versions differ: the cosine must be at least 0.999, an image's
    mean difference at most 1 level of 255.

    Raises:
        StoreError, SourceError, TeacherError: store, dataroot or teacher can't be used.
    """
    store = open_store(url)
    config = TargetsConfig.from_dict(store.attrs["config"])
    teacher = shared_teacher(config.teacher)
    # Not precision: a store built on a GPU can be checked on a CPU.
    ours, theirs = describe(teacher, config.teacher), store.attrs["teacher"]
    same = ("weights", "layer", "dim", "input_size")
    other = differences({key: theirs[key] for key in same}, {key: ours[key] for key in same})
    if other:
        return [f"the teacher here is not the store's: {'; '.join(other)}"]
    good = np.flatnonzero(store.per_frame["n_voxels"] != FAILED)
    rng = np.random.default_rng(seed)
    chosen = sorted(rng.choice(good, min(count, len(good)), replace=False).tolist())
    scenes = tuple(sorted({store.scene(i) for i in chosen}))
    only = replace(config, frames=FramesConfig(scenes=scenes))
    source = load_source(dataroot, store.attrs["source"]["version"], only)
    records = {record.token: record for record in source.records}
    problems = []
    for i in tqdm(chosen, desc="recomputing", unit="frame", disable=None):
        record = records.get(store.token(i))
        if record is None:
            problems.append(f"{_name(store, i)}: not in {dataroot}")
            continue
        try:
            again = frame_targets(record, config, teacher)
        except FrameError as error:
            problems.append(str(error))
            continue
        problems += [f"{_name(store, i)}: {p}" for p in _differences(store.frame(i), again)]
    return problems


def _differences(stored: dict, again: dict) -> Iterator[str]:
    same = [n for n in again if n not in ("images", "image_offset", "features", "feature_scale")]
    for name in same:
        if not np.array_equal(stored[name], again[name]):
            yield f"{name} differs from the recomputed one"
    if "features" in again and stored["features"].shape == again["features"].shape:
        a = dequantise(stored["features"], stored["feature_scale"])
        b = dequantise(again["features"], again["feature_scale"])
        norm = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosine = (a * b).sum(axis=1)[norm > 0] / norm[norm > 0]
        if cosine.min(initial=1.0) < 0.999:
            yield f"features differ from the recomputed ones: lowest cosine {cosine.min():.4f}"
    jpegs = [again["images"][a:b].tobytes() for a, b in pairwise(again["image_offset"])]
    for camera, *pair in zip(CAMERAS, stored["images"], jpegs, strict=True):
        old, new = (np.asarray(Image.open(io.BytesIO(jpeg)), dtype=np.int16) for jpeg in pair)
        difference = np.abs(old - new).mean()
        if difference > 1:
            yield f"{camera}: image differs from the recomputed one by {difference:.1f} levels"


def _name(store: TargetStore, i: int) -> str:
    return f"frame {i} ({store.scene(i)}, sample {store.token(i)})"


def _check_arrays(store: TargetStore) -> Iterator[str]:
    for spec in store.specs:
        array = store.array(spec.name)
        if array.dtype != spec.dtype or array.shape != (store.attrs["n_frames"], *spec.shape):
            yield f"{spec.name} is {array.dtype} {array.shape}, not what the config implies"
    for name, names in (("scene", "scenes"), ("split", "splits")):
        if (store.per_frame[name] >= len(store.attrs[names])).any():
            yield f"{name} holds numbers that the attribute {names} has no name for"


def _check_frame(store: TargetStore, i: int) -> list[str]:
    if store.per_frame["n_voxels"][i] == FAILED:
        known = str(i) in store.attrs["failed"]
        return [] if known else [f"{_name(store, i)}: marked failed, but no reason is recorded"]
    try:
        frame = store.frame(i)
        checks = (_features, _calibration, _cameras, _images, _labels, _points)
        broken = [f"{_name(store, i)}: {p}" for p in _voxels(store, frame)]
        if broken:  # the other checks look voxels up
            return broken
        return [f"{_name(store, i)}: {p}" for check in checks for p in check(store, frame)]
    except Exception as error:  # whatever a damaged file makes zarr or a codec raise
        return [f"{_name(store, i)}: cannot be read: {error!r}"]


def _voxels(store: TargetStore, frame: dict) -> Iterator[str]:
    index = frame["voxel_index"].astype(np.int64)
    if (np.diff(index) <= 0).any():
        yield "voxel_index is not ascending"
    if index.max(initial=0) >= store.grid.n_voxels:
        yield "voxel_index leaves the grid"


def _features(store: TargetStore, frame: dict) -> Iterator[str]:
    bits = frame["feature_cameras"]
    if (bits >= 1 << len(CAMERAS)).any():
        yield "feature_cameras has bits of no camera"
    if "features" not in frame:  # a store without a teacher
        return
    scale = frame["feature_scale"].astype(np.float32)
    peak = np.abs(frame["features"].astype(np.int16)).max(axis=1, initial=0)
    if not np.isfinite(scale).all() or (scale < 0).any():
        yield "feature_scale is not finite and positive"
    if ((bits == 0) & ((scale != 0) | (peak != 0))).any():
        yield "a voxel that no camera sees has a feature"
    normal = scale >= np.finfo(np.float16).tiny  # a subnormal step can't reach 127 exactly
    if (peak[normal] != 127).any() or (peak > 127).any():
        yield "a feature's largest code is not 127"


def _calibration(store: TargetStore, frame: dict) -> Iterator[str]:
    for name in ("cam_T_ego", "ego_T_lidar", "global_T_ego"):
        rotation = frame[name].reshape(-1, 4, 4)[:, :3, :3].astype(np.float64)
        if not np.allclose(rotation @ rotation.transpose(0, 2, 1), np.eye(3), atol=1e-4):
            yield f"{name} is not a rigid transform"
    if not (np.isfinite(frame["K"]).all() and (np.linalg.det(frame["K"]) > 0).all()):
        yield "K is singular"


def _cameras(store: TargetStore, frame: dict) -> Iterator[str]:
    """The camera bits must follow from the stored calibration."""
    centres = store.grid.centres(frame["voxel_index"])
    uv, depth = project(
        frame["K"].astype(np.float64), frame["cam_T_ego"].astype(np.float64), centres
    )
    size = np.array(store.attrs["config"]["images"]["size"])[::-1]
    inside = np.minimum(uv, size - uv).min(axis=-1)  # px to the nearest edge, negative outside
    bits = (frame["feature_cameras"][None] >> np.arange(len(CAMERAS))[:, None]) & 1 == 1
    wrong = (bits & ((depth <= 0) | (inside < -_EDGE_PX))) | (
        ~bits & (depth > 0) & (inside > _EDGE_PX)
    )
    if wrong.any():
        yield f"feature_cameras contradicts the calibration at {int(wrong.sum())} voxels"


def _images(store: TargetStore, frame: dict) -> Iterator[str]:
    height, width = store.attrs["config"]["images"]["size"]
    for camera, jpeg in zip(CAMERAS, frame["images"], strict=True):
        try:
            with Image.open(io.BytesIO(jpeg)) as image:
                image.load()
                if image.size != (width, height):
                    yield f"{camera}: stored image is {image.size[1]}x{image.size[0]}"
        except (OSError, SyntaxError) as error:
            yield f"{camera}: stored image cannot be decoded: {error}"


def _labels(store: TargetStore, frame: dict) -> Iterator[str]:
    vehicle, visible = vehicle_masks(frame["vehicle_boxes"], store.grid)
    if not np.array_equal(frame["vehicle"], vehicle):
        yield "vehicle is not the mask of vehicle_boxes"
    if not np.array_equal(frame["vehicle_visible"], visible):
        yield "vehicle_visible is not the mask of vehicle_boxes"
    if "map" in frame and frame["map"].max(initial=0) > 1:
        yield "map holds values other than 0 and 1"


def _points(store: TargetStore, frame: dict) -> Iterator[str]:
    """The stored points must fill the stored voxels, up to their 2 mm rounding."""
    xyz = frame["points"][:, :3] * store.attrs["point_step_m"]
    again = store.grid.occupied(xyz)
    common = len(np.intersect1d(again, frame["voxel_index"], assume_unique=True))
    if common < 0.95 * max(len(again), len(frame["voxel_index"])):
        yield f"only {common} of {len(frame['voxel_index'])} voxels hold a stored point"
