"""Records to a store: begin, write blocks, finalise; resumable, byte for byte.

While a store is being built it holds ``build/blocks/00042.json`` for every finished block, written
after the block's arrays: a chunk's existence proves nothing, since Zarr drops empty ones. The
client alone writes the small per-frame arrays and sets ``complete``, last of all.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import zarr

from occfeat_common.settings import differences
from occfeat_targets import __version__
from occfeat_targets.config import TargetsConfig
from occfeat_targets.frame_targets import frame_targets
from occfeat_targets.geometry import scale_intrinsics
from occfeat_targets.records import FrameError, FrameRecord, Source
from occfeat_targets.store import schema
from occfeat_targets.store.schema import StoreError
from occfeat_targets.teacher import Teacher, TeacherError, describe, shared_teacher

_MARKERS = "build/blocks"
_PER_FRAME_RESULTS = ("n_voxels", "n_points", "n_vehicles", "image_offset")


@dataclass(frozen=True)
class BlockJob:
    """One task: everything a worker needs to write one block."""

    url: str
    index: int
    start: int
    """First frame of the block."""
    records: tuple[FrameRecord, ...]
    config: TargetsConfig
    teacher: dict
    """The store's ``teacher`` attribute; a worker with other weights refuses."""
    skip_errors: bool


@dataclass(frozen=True)
class BlockResult:
    """What a worker reports: never arrays."""

    index: int
    n_frames: int
    failed: dict[int, str]
    """Frame index to message; without ``skip_errors`` the block was not written then."""


def begin(url: str, config: TargetsConfig, source: Source, overwrite: bool) -> None:
    """Create the root group, or check that the one there is this very build's.

    Raises:
        StoreError: the place is not writable, holds something else, or was begun with other
            settings (all differences listed).
    """
    fs, path = schema.filesystem(url)
    trash = f"{path}.deleting"
    wanted = _root_attributes(config, source)
    _require_hex_tokens(source)
    try:
        if fs.exists(trash):  # an earlier --overwrite was killed half-way
            fs.rm(trash, recursive=True)
        existing = _existing_attributes(url)
        # Without a teacher nothing was computed: its settings bind nobody.
        if existing is not None and (overwrite or "teacher" not in existing):
            fs.mv(path, trash, recursive=True)  # a half-deleted store must not look like one
            fs.rm(trash, recursive=True)
            existing = None
        if existing is None:
            zarr.create_group(schema.zarr_store(url, read_only=False), attributes=wanted)
            return
    except OSError as error:
        raise StoreError(f"cannot write {url}: {error.strerror or error}") from error
    _refuse_other(url, existing, wanted)


def _require_hex_tokens(source: Source) -> None:
    for record in source.records:
        try:
            complete = len(bytes.fromhex(record.token)) == 16
        except ValueError:
            complete = False
        if not complete:
            raise StoreError(f"{record}: a sample token must be 32 hex digits")


def _refuse_other(url: str, existing: dict, wanted: dict) -> None:
    if existing.get("format_version") != schema.FORMAT_VERSION:
        raise StoreError(
            f"{url} has format version {existing.get('format_version')}, this program writes "
            f"{schema.FORMAT_VERSION}: choose another store or --overwrite"
        )
    identity = ("config", "source", "teacher", "scenes", "splits", "map_classes", "records_sha256")
    changed = differences(
        {key: existing[key] for key in identity if key in existing and key in wanted},
        {key: wanted[key] for key in identity if key in existing and key in wanted},
    )
    if changed:
        lines = "\n  ".join(changed)
        raise StoreError(
            f"{url} was begun with other settings (stored -> wanted):\n  {lines}\n"
            "Choose another store, restore the settings, or start again with --overwrite"
        )


def set_teacher(url: str, config: TargetsConfig, teacher: dict) -> None:
    """Record which teacher makes the features and create the arrays; idempotent.

    Raises:
        StoreError: the store was begun with another teacher.
    """
    group = zarr.open_group(schema.zarr_store(url, read_only=False), mode="r+")
    attrs = dict(group.attrs)
    if "teacher" in attrs:
        _refuse_other(url, attrs, attrs | {"teacher": teacher})
        if attrs["complete"]:  # frames that failed are about to be written again
            group.attrs["complete"] = False
        return
    specs = schema.array_specs(config.to_dict(), teacher["dim"], attrs["map_classes"] != [])
    schema.create_arrays(group, specs, attrs["n_frames"], config.block_frames)
    group.attrs["teacher"] = teacher  # last: a store that names its teacher has its arrays


def describe_teacher(config: TargetsConfig) -> dict:
    """The ``teacher`` attribute, from this process's own instance; run on a worker."""
    return describe(shared_teacher(config.teacher), config.teacher)


def is_complete(url: str) -> bool:
    """Whether the store is finished and no frame of it failed."""
    attrs = _existing_attributes(url) or {}
    return bool(attrs.get("complete")) and not attrs.get("failed")


def plan(
    url: str, config: TargetsConfig, records: Sequence[FrameRecord], teacher: dict, skip: bool
) -> list[BlockJob]:
    """Jobs of the blocks that are not done: without a marker, or with failed frames in it."""
    markers = _read_markers(url)
    size = config.block_frames
    return [
        BlockJob(
            url=str(url),
            index=index,
            start=index * size,
            records=tuple(records[index * size : (index + 1) * size]),
            config=config,
            teacher=teacher,
            skip_errors=skip,
        )
        for index in range(math.ceil(len(records) / size))
        if index not in markers or markers[index]["failed"]
    ]


def write_block(job: BlockJob) -> BlockResult:
    """Compute one block, write its part of every array, then its marker.

    Raises:
        TeacherError: this worker's teacher is not the one the store was begun with.
        StoreError: the block can't be written (disk full, no permission).
    """
    teacher = shared_teacher(job.config.teacher)
    mine = differences(job.teacher, describe(teacher, job.config.teacher))
    if mine:
        raise TeacherError(f"this worker's teacher differs from the store's: {'; '.join(mine)}")
    frames, failed = _compute(job, teacher)
    if failed and not job.skip_errors:
        return BlockResult(job.index, len(job.records), failed)
    try:
        group = _group_of(job)
        _write_arrays(group, job, frames)
        _group_of(job)
        _write_marker(job, frames, failed)
    except OSError as error:
        raise StoreError(
            f"cannot write {job.url}: {error.strerror or error}; what is finished is kept, run the "
            "same command again"
        ) from error
    return BlockResult(job.index, len(job.records), failed)


def _group_of(job: BlockJob) -> zarr.Group:
    """The job's store, if it still is: a task can outlive its client and meet a newer store."""
    group = zarr.open_group(schema.zarr_store(job.url, read_only=False), mode="r+")
    if group.attrs["config"] != job.config.to_dict() or group.attrs["teacher"] != job.teacher:
        raise StoreError(f"{job.url} was replaced by a store with other settings meanwhile")
    return group


def _compute(job: BlockJob, teacher: Teacher) -> tuple[list[dict], dict[int, str]]:
    frames: list[dict[str, np.ndarray]] = []
    failed: dict[int, str] = {}
    for i, record in enumerate(job.records, job.start):
        try:
            frames.append(frame_targets(record, job.config, teacher))
        except FrameError as error:
            failed[i] = str(error)
            frames.append({})
            if not job.skip_errors:
                break
    return frames, failed


def _write_arrays(group: zarr.Group, job: BlockJob, frames: list[dict]) -> None:
    """Each array's shard of this block in one write; the tail that no frame uses stays fill."""
    attrs = group.attrs
    specs = schema.array_specs(attrs["config"], attrs["teacher"]["dim"], attrs["map_classes"] != [])
    for spec in specs:
        if spec.chunk is None:
            continue
        longest = max((len(frame[spec.name]) for frame in frames if frame), default=0)
        rows = min(spec.shape[0], spec.chunk[0] * math.ceil(longest / spec.chunk[0]))
        buffer = np.full((len(frames), rows, *spec.shape[1:]), spec.fill, dtype=spec.dtype)
        for row, frame in zip(buffer, frames, strict=True):
            if frame:
                row[: len(frame[spec.name])] = frame[spec.name]
        group[spec.name][job.start : job.start + len(frames), :rows] = buffer


def _write_marker(job: BlockJob, frames: list[dict], failed: dict[int, str]) -> None:
    done = {
        "n_voxels": [len(f["voxel_index"]) if f else schema.FAILED for f in frames],
        "n_points": [len(f["points"]) if f else 0 for f in frames],
        "n_vehicles": [len(f["vehicle_boxes"]) if f else 0 for f in frames],
        "image_offset": [
            f["image_offset"].tolist() if f else [0] * (len(schema.CAMERAS) + 1) for f in frames
        ],
        "failed": {str(i): message for i, message in failed.items()},
    }
    fs, path = schema.filesystem(job.url)
    target = f"{path}/{_MARKERS}/{job.index:05d}.json"
    fs.makedirs(f"{path}/{_MARKERS}", exist_ok=True)
    fs.pipe_file(f"{target}.partial", json.dumps(done).encode())
    fs.mv(f"{target}.partial", target)  # a rename on a local disk: all or nothing


def finalise(url: str, config: TargetsConfig, source: Source) -> dict[int, str]:
    """All blocks are there: write the per-frame arrays, mark the store complete, tidy up.

    Returns:
        Failed frames: index to message. Their blocks' markers stay, so that the same command
        can try them again.

    Raises:
        StoreError: blocks are missing.
    """
    markers = _read_markers(url)
    n_blocks = math.ceil(len(source.records) / config.block_frames)
    missing = sorted(set(range(n_blocks)) - markers.keys())
    if missing:
        raise StoreError(f"{url}: {len(missing)} of {n_blocks} blocks are not done: {missing[:10]}")
    ordered = [markers[index] for index in range(n_blocks)]
    failed = {int(i): text for marker in ordered for i, text in marker["failed"].items()}
    group = zarr.open_group(schema.zarr_store(url, read_only=False), mode="r+")
    results = {
        name: np.concatenate([np.asarray(m[name]) for m in ordered]) for name in _PER_FRAME_RESULTS
    }
    for name, values in (results | _record_arrays(config, source)).items():
        group[name][:] = values
    group.attrs.update({"failed": {str(i): text for i, text in failed.items()}, "complete": True})
    sweep_litter(url)
    return failed


def sweep_litter(url: str) -> None:
    """Delete the ``*.partial`` files of killed writers, and the markers of a finished build."""
    fs, path = schema.filesystem(url)
    for file in schema.find(url):
        if file.endswith(".partial"):
            fs.rm(file)
    if is_complete(url) and fs.exists(f"{path}/build"):
        fs.rm(f"{path}/build", recursive=True)


def _record_arrays(config: TargetsConfig, source: Source) -> dict[str, np.ndarray]:
    """The per-frame arrays that come from the records alone; float64 poses rounded here, last."""
    records = source.records
    stored_K = [
        [scale_intrinsics(K, hw, config.images.size) for K, hw in zip(r.K, r.image_hw, strict=True)]
        for r in records
    ]
    tokens = b"".join(bytes.fromhex(r.token) for r in records)
    return {
        "token": np.frombuffer(tokens, dtype=np.uint8).reshape(len(records), 16),
        "scene": np.array([source.scenes.index(r.scene) for r in records]),
        "split": np.array([source.splits.index(r.split) for r in records]),
        "timestamp_us": np.array([r.timestamp_us for r in records]),
        "K": np.array(stored_K),
        "cam_T_ego": np.stack([r.cam_T_ego for r in records]),
        "ego_T_lidar": np.stack([r.ego_T_sweep[0] for r in records]),
        "global_T_ego": np.stack([r.global_T_ego for r in records]),
    }


def _root_attributes(config: TargetsConfig, source: Source) -> dict:
    packages = ("numpy", "Pillow", "torch", "transformers", "zarr")
    return {
        "format": schema.FORMAT,
        "format_version": schema.FORMAT_VERSION,
        "complete": False,
        "n_frames": len(source.records),
        "records_sha256": _records_sha256(source),
        "grid": config.grid.to_dict(),
        "config": config.to_dict(),
        "cameras": list(schema.CAMERAS),
        "scenes": list(source.scenes),
        "splits": list(source.splits),
        "map_classes": list(schema.MAP_CLASSES) if source.has_map else [],
        "point_step_m": schema.point_step_m(config.grid),
        "source": {
            "dataset": source.dataset,
            "version": source.version,
            "devkit": source.reader,
        },
        "software": {"occfeat": __version__} | {p: metadata.version(p) for p in packages},
    }


def _records_sha256(source: Source) -> str:
    """Fingerprint of what the dataset's tables say of the frames: changed tables are noticed."""
    digest = hashlib.sha256()
    for r in source.records:
        digest.update(f"{r.token} {r.scene} {r.split} {r.timestamp_us} {r.boxes.category}".encode())
        for values in (r.K, r.cam_T_ego, r.ego_T_sweep, r.global_T_ego, r.boxes.box):
            digest.update(values.tobytes())
        digest.update(r.boxes.visibility.tobytes())
    return digest.hexdigest()


def _existing_attributes(url: str) -> dict | None:
    """Root attributes of the store at ``url``, or None where there is nothing.

    Raises:
        StoreError: something else is there; it is left alone.
    """
    fs, path = schema.filesystem(url)
    found = fs.ls(path, detail=False) if fs.exists(path) else []
    if all(name.endswith(".partial") for name in found):  # nothing, or a begin that was killed
        return None
    try:
        attrs = dict(zarr.open_group(schema.zarr_store(url, read_only=True), mode="r").attrs)
    except (FileNotFoundError, ValueError, KeyError):
        attrs = {}
    if attrs.get("format") != schema.FORMAT:
        raise StoreError(f"{url} exists and is not an {schema.FORMAT} store: choose another place")
    return attrs


def _read_markers(url: str) -> dict[int, dict]:
    fs = schema.filesystem(url)[0]
    files = (Path(file) for file in schema.find(url, _MARKERS) if file.endswith(".json"))
    return {int(file.stem): json.loads(fs.cat_file(str(file))) for file in files}
