"""Records to a store: begin, write blocks, finalise; resumable, byte for byte. While a store is
being built it holds ``build/blocks/00042.json`` for every finished block, written after the block's
arrays: a chunk's existence proves nothing, since Zarr drops empty ones. The client alone writes the
small per-frame arrays, sets ``complete``, and last writes all objects' checksums."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from occfeat_targets import __version__
from occfeat_targets.cluster import tell
from occfeat_targets.config import TargetsConfig
from occfeat_targets.frame import (
    MAY_SHARE,
    SHARED,
    frame_targets,
    layout_of,
    make_outputs,
    stored_outputs,
)
from occfeat_targets.outputs.base import Output
from occfeat_targets.outputs.points import point_step_m
from occfeat_targets.sources.base import Dataset, FrameError, FrameRecord
from occfeat_targets.store import checksums, files, schema
from occfeat_targets.store.files import StoreError
from occfeat_targets.store.lease import one_writer
from occfeat_targets.store.reader import SEAL, array_seals, seal
from occfeat_targets.store.settings import differences
from occfeat_targets.teachers import shared_teacher
from occfeat_targets.teachers.base import TeacherError, describe


@dataclass(frozen=True)
class BlockJob:
    """One task: everything a worker needs to write one block."""

    url: str
    index: int
    records: tuple[FrameRecord, ...]
    config: TargetsConfig
    teacher: dict
    """The store's ``teacher`` attribute; a worker with other weights refuses."""
    skip_errors: bool

    @property
    def start(self) -> int:
        """First frame of the block."""
        return self.index * self.config.block_frames


def check(url: str, config: TargetsConfig, dataset: Dataset, overwrite: bool) -> None:
    """Before any work: the store's place is writable, nobody builds there now, and it holds nothing
    or what this very build has begun, unless it is to be overwritten. Raises StoreError: something
    else is there, or it was begun with other settings (all differences listed)."""
    existing = _existing_attributes(url)  # not even a lease where something else is
    with _one_message(url), one_writer(url):
        if existing and "teacher" in existing and not overwrite:
            _refuse_other(url, existing, _root_attributes(config, dataset))
        sweep_litter(url)


def begin(url: str, config: TargetsConfig, dataset: Dataset, overwrite: bool) -> None:
    """Create the root group, or go on with the one there. Raises StoreError as :func:`check`."""
    wanted = _root_attributes(config, dataset)
    with _one_message(url):
        existing = _existing_attributes(url)
        if existing is None:
            zarr.create_group(files.zarr_store(url, read_only=False), attributes=wanted)
        # Without a teacher nothing was computed: its settings bind nobody.
        elif overwrite or "teacher" not in existing:
            files.open_group(url, "r+").attrs.put(wanted)  # first: no half-deleted store is one
            fs, path = files.filesystem(url)
            if rest := [f"{path}/{key}" for key in files.find(url) if key != "zarr.json"]:
                fs.rm(rest)
        else:
            _refuse_other(url, existing, wanted)


@contextmanager
def _one_message(url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot write {url}: {error.strerror or error}") from error


def _refuse_other(url: str, existing: dict, wanted: dict) -> None:
    version = existing.get("format_version")
    if version != schema.FORMAT_VERSION:
        raise StoreError(
            f"{url} has format version {version}, this program writes {schema.FORMAT_VERSION}: "
            "choose another store or --overwrite"
        )
    identity = {"config", "source", "teacher", "scenes", "splits", "records_sha256"}
    identity |= {*SHARED, *MAY_SHARE}
    both = identity & existing.keys() & wanted.keys()
    if changed := differences({k: existing[k] for k in both}, {k: wanted[k] for k in both}):
        lines = "\n  ".join(changed)
        raise StoreError(
            f"{url} was begun with other settings (stored -> wanted):\n  {lines}\n"
            "Choose another store, restore the settings, or start again with --overwrite"
        )


def set_teacher(url: str, config: TargetsConfig, teacher: dict) -> None:
    """Record which teacher makes the features and create the arrays; idempotent. Raises StoreError
    if the store was begun with another teacher."""
    group = files.open_group(url, "r+")
    attrs: dict[str, Any] = dict(group.attrs)
    if "teacher" in attrs:
        _refuse_other(url, attrs, attrs | {"teacher": teacher})
        if attrs["complete"]:  # frames that failed are about to be written again
            if checksums.NAME in group:
                del group[checksums.NAME]
            group.attrs["complete"] = False
        return
    layout = layout_of(config, attrs, teacher["dim"], teacher["patch_size"])
    specs = _specs(make_outputs(config, layout))
    schema.create_arrays(group, specs, attrs["n_frames"], config.block_frames)
    # Last: a store that names its teacher has its arrays.
    arrays = array_seals(url, [spec.name for spec in specs])
    group.attrs.update({"arrays": arrays, "teacher": teacher})


def _specs(outputs: Sequence[Output]) -> list[schema.ArraySpec]:
    return [spec for output in outputs for spec in output.specs()]


def describe_teacher(config: TargetsConfig) -> dict:
    """The ``teacher`` attribute, from this process's own instance; run on a worker."""
    return describe(shared_teacher(config.teacher), config.teacher)


def is_complete(url: str) -> bool:
    """Whether the store is finished, checksums and all, and no frame of it failed."""
    attrs = _existing_attributes(url) or {}
    if not attrs.get("complete") or attrs.get("failed"):
        return False
    fs, path = files.filesystem(url)
    return fs.exists(f"{path}/{checksums.DATA}")


def plan(
    url: str, config: TargetsConfig, records: Sequence[FrameRecord], teacher: dict, skip: bool
) -> list[BlockJob]:
    """Jobs of the blocks that are not done: without a marker, or with failed frames in it."""
    markers, size = _read_markers(url), config.block_frames
    return [
        BlockJob(url, start // size, tuple(records[start : start + size]), config, teacher, skip)
        for start in range(0, len(records), size)
        if start // size not in markers or markers[start // size]["failed"]
    ]


def write_block(job: BlockJob) -> dict[int, str]:
    """Compute one block, write its part of every array, then its marker. Returns the frames that
    failed, index to message; without ``skip_errors`` nothing was written then. Raises TeacherError
    (not the store's teacher) and StoreError (can't be written: disk full, no permission)."""
    teacher = shared_teacher(job.config.teacher)
    if mine := differences(job.teacher, describe(teacher, job.config.teacher)):
        raise TeacherError(f"this worker's teacher differs from the store's: {'; '.join(mine)}")
    outputs = stored_outputs(dict(_open(job)[0].attrs))[1]
    frames: list[dict[str, np.ndarray]] = []
    failed: dict[int, str] = {}
    for i, record in enumerate(job.records, job.start):
        tell(job.url, (job.start, i - job.start))
        try:
            frames.append(frame_targets(record, job.config, outputs, teacher))
        except FrameError as error:
            failed[i] = str(error)
            if not job.skip_errors:
                return failed
            frames.append({})
    try:
        write_frames(job, outputs, frames, failed)
    except OSError as error:
        raise StoreError(
            f"cannot write {job.url}: {error.strerror or error}; what is finished is kept, run the "
            "same command again"
        ) from error
    return failed


def _open(job: BlockJob) -> tuple[zarr.Group, checksums.RecordingStore]:
    """The job's store, if it still is: a task can outlive its client and meet a newer store."""
    recorder = checksums.RecordingStore(files.zarr_store(job.url, read_only=False))
    group = zarr.open_group(recorder, mode="r+", zarr_format=3)
    if group.attrs["config"] != job.config.plain() or group.attrs["teacher"] != job.teacher:
        raise StoreError(f"{job.url} was replaced by a store with other settings meanwhile")
    return group, recorder


def write_frames(
    job: BlockJob, outputs: Sequence[Output], frames: list[dict], failed: dict[int, str]
) -> None:
    """Write a block's computed frames, empty dicts where one failed: each array's shard in one
    write, where the tail that no frame uses stays fill; then the marker."""
    group, recorder = _open(job)
    specs = _specs(outputs)
    for spec in specs:
        if spec.chunk is None:
            continue
        longest = max((len(frame[spec.name]) for frame in frames if frame), default=0)
        rows = min(spec.shape[0], spec.chunk * math.ceil(longest / spec.chunk))
        buffer = np.full((len(frames), rows, *spec.shape[1:]), spec.fill, dtype=spec.dtype)
        for row, frame in zip(buffer, frames, strict=True):
            if frame:
                row[: len(frame[spec.name])] = frame[spec.name]
        array: Any = group[spec.name]
        array[job.start : job.start + len(frames), :rows] = buffer
    _open(job)
    counted = {spec.rows: spec.name for spec in specs if spec.rows}

    def small(frame: dict[str, np.ndarray]) -> dict:
        """What the small arrays hold of a frame; counts that no output gave are lengths."""
        counts = {rows: len(frame[name]) for rows, name in counted.items() if rows not in frame}
        given = {s.name for s in specs if s.chunk is None} & frame.keys()
        return counts | {name: np.asarray(frame[name]).tolist() for name in sorted(given)}

    done = {
        "frames": [small(frame) if frame else None for frame in frames],
        "failed": {str(i): message for i, message in failed.items()},
        "objects": recorder.written,
    }
    _write_marker(job, json.dumps(done).encode())


def _write_marker(job: BlockJob, content: bytes) -> None:
    fs, path = files.filesystem(job.url)
    target = f"{path}/{schema.MARKERS}/{job.index:05d}.json"
    fs.makedirs(f"{path}/{schema.MARKERS}", exist_ok=True)
    fs.pipe_file(f"{target}.partial", content)
    fs.mv(f"{target}.partial", target)  # a rename on a local disk: all or nothing


def finalise(url: str, config: TargetsConfig, dataset: Dataset) -> dict[int, str]:
    """All blocks are there: write the per-frame arrays (from the tables and the markers), mark the
    store complete, tidy up. Returns failed frames, index to message: their blocks' markers stay, so
    that the same command can try them again. Raises StoreError if blocks are missing."""
    markers = _read_markers(url)
    n_blocks = math.ceil(len(dataset.records) / config.block_frames)
    if missing := sorted({*range(n_blocks)} - markers.keys()):
        raise StoreError(f"{url}: {len(missing)} of {n_blocks} blocks are not done: {missing[:10]}")
    ordered = [markers[index] for index in range(n_blocks)]
    failed = {int(i): text for marker in ordered for i, text in marker["failed"].items()}
    group = files.open_group(url, "r+")
    outputs = stored_outputs(dict(group.attrs))[1]
    of_records = {name: v for output in outputs for name, v in output.of_records(dataset).items()}
    frames = [frame for marker in ordered for frame in marker["frames"]]
    for spec in _specs(outputs):
        if spec.chunk is None:
            unknown = np.full(spec.shape, schema.FAILED if spec.name == "n_voxels" else 0).tolist()
            values = of_records.get(spec.name)
            if values is None:
                values = np.array([f[spec.name] if f else unknown for f in frames])
            array: Any = group[spec.name]
            array[:] = values
    attrs = {"failed": {str(i): text for i, text in failed.items()}, "complete": True}
    group.attrs.update(attrs | {SEAL: seal({**group.attrs, **attrs})})
    sweep_litter(url)  # a killed worker's, which must not be among what has a checksum
    written = {key: tuple(sums) for m in ordered for key, sums in m["objects"].items()}
    checksums.write_checksums(url, group, written, without=() if failed else (schema.MARKERS,))
    sweep_litter(url)
    return failed


def sweep_litter(url: str) -> None:
    """Delete the ``*.partial`` files of killed writers, and the markers of a finished build."""
    fs, path = files.filesystem(url)
    for key in files.find(url):
        if key.endswith(".partial"):
            fs.rm(f"{path}/{key}")
    if is_complete(url) and fs.exists(f"{path}/{schema.MARKERS}"):
        fs.rm(f"{path}/{schema.MARKERS}", recursive=True)
        with suppress(OSError):  # an object store has no folders, but a lease in there
            fs.rmdir(f"{path}/build")


def _root_attributes(config: TargetsConfig, dataset: Dataset) -> dict:
    packages = ("numpy", "Pillow", "torch", "transformers", "zarr")
    return {
        "format": schema.FORMAT,
        "format_version": schema.FORMAT_VERSION,
        "complete": False,
        "n_frames": len(dataset.records),
        "records_sha256": _records_sha256(dataset),
        "grid": config.plain()["grid"],
        "config": config.plain(),
        **{key: list(getattr(dataset, key)) for key in ("scenes", "splits", *SHARED)},
        **{key: list(named) for key in MAY_SHARE if (named := getattr(dataset, key))},
        "point_step_m": point_step_m(config.grid),
        "source": {"dataset": dataset.name, "version": dataset.version, "reader": dataset.reader},
        "software": {"occfeat": __version__} | {p: metadata.version(p) for p in packages},
    }


def _records_sha256(dataset: Dataset) -> str:
    """Fingerprint of what the dataset's tables say of the frames: changed tables are noticed."""
    digest = hashlib.sha256()
    for r in dataset.records:
        digest.update(f"{r.token} {r.scene} {r.split} {r.timestamp_us} {r.boxes.category}".encode())
        for values in (r.K, r.cam_T_ego, r.ego_T_sweep, r.global_T_ego, r.boxes.box):
            digest.update(values.tobytes())
        digest.update(r.boxes.visibility.tobytes())
    return digest.hexdigest()


def _existing_attributes(url: str) -> dict | None:
    """Root attributes of the store at ``url``, or None where there is nothing. Raises StoreError
    if something else is there; it is left alone."""
    # Nothing, or what a killed begin leaves: LocalStore's unfinished zarr.json.
    if all(re.fullmatch(r"zarr\.\w+\.partial", key) for key in files.find(url)):
        return None
    no_group = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
    try:
        attrs = dict(files.open_group(url, "r").attrs)
    except (FileNotFoundError, NotADirectoryError, *no_group):
        attrs = {}
    if attrs.get("format") != schema.FORMAT:
        raise StoreError(f"{url} exists and is not an {schema.FORMAT} store: choose another place")
    return attrs


def _read_markers(url: str) -> dict[int, dict]:
    fs, path = files.filesystem(url)
    found = (key for key in files.find(url, schema.MARKERS) if key.endswith(".json"))
    return {int(Path(key).stem): json.loads(fs.cat_file(f"{path}/{key}")) for key in found}
