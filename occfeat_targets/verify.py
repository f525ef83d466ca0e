"""Re-read a store and say everything that is wrong with it."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from occfeat_targets.build import read_dataset
from occfeat_targets.frame import frame_targets, stored_outputs
from occfeat_targets.outputs.base import Output
from occfeat_targets.sources.base import FrameError, FramesSettings
from occfeat_targets.store.checksums import check_objects
from occfeat_targets.store.files import StoreError
from occfeat_targets.store.reader import TargetStore, open_store
from occfeat_targets.store.schema import FAILED
from occfeat_targets.store.settings import differences
from occfeat_targets.teachers import shared_teacher
from occfeat_targets.teachers.base import describe


def verify_store(url: str, quick: bool = False) -> tuple[int, list[str]]:
    """Check every object against its checksum, then every frame: shapes, ranges, order, images,
    scales, and whether it fits together; ``quick``: objects alone, by sizes where frames are in
    them. Returns the number of frames, and a line per problem, naming object, or frame, scene and
    sample. Raises StoreError: the store can't be opened, or is replaced meanwhile; ConfigError: its
    outputs can't be had."""
    store = open_store(url)
    problems = list(check_objects(url, quick))
    store.require_same()
    if quick or problems:
        return len(store), problems
    _, outputs = stored_outputs(store.attrs)
    try:
        problems = list(_check_arrays(store, outputs))
        store.per_frame, store.sharded  # noqa: B018  opened before threads share them
    except StoreError as error:
        return len(store), [str(error)]
    if problems:
        return len(store), problems
    shown = {"desc": "verifying", "unit": "frame", "disable": None, "max_workers": os.cpu_count()}
    found = thread_map(lambda i: _check_frame(store, outputs, i), range(len(store)), **shown)
    return len(store), [problem for each in found for problem in each]


def recompute_frames(url: str, dataroot: Path, count: int, seed: int) -> list[str]:
    """Compute random frames again from the dataroot and compare with what is stored. Each output
    says what must be equal and what may differ by rounding, since processors and library versions
    differ. Raises StoreError, SourceError or TeacherError if one of these can't be used."""
    store = open_store(url)
    config, outputs = stored_outputs(store.attrs)
    teacher = shared_teacher(config.teacher)
    # Not precision: a store built on a GPU can be checked on a CPU.
    ours, theirs = describe(teacher, config.teacher), store.attrs["teacher"]
    same = ("weights", "layer", "dim", "input_size")
    if other := differences({k: theirs.get(k) for k in same}, {k: ours[k] for k in same}):
        return [f"the teacher here is not the store's: {'; '.join(other)}"]
    good = np.flatnonzero(store.per_frame["n_voxels"] != FAILED)
    rng = np.random.default_rng(seed)
    chosen = sorted(rng.choice(good, min(count, len(good)), replace=False).tolist())
    scenes = tuple(sorted({store.scene(i) for i in chosen}))
    only = config.with_(frames=FramesSettings(scenes=scenes))
    dataset = read_dataset(dataroot, store.attrs["source"]["version"], only)
    records = {record.token: record for record in dataset.records}
    problems = []
    for i in tqdm(chosen, desc="recomputing", unit="frame", disable=None):
        record, where = records.get(store.token(i)), store.describe(i)
        if record is None:
            problems.append(f"{where}: not in {dataroot}")
            continue
        try:
            again, stored = frame_targets(record, config, outputs, teacher), store.frame(i)
            found = (problem for output in outputs for problem in output.compare(stored, again))
            problems += [f"{where}: {problem}" for problem in found]
        except FrameError as error:
            problems.append(str(error))
    return problems


def _check_arrays(store: TargetStore, outputs: Sequence[Output]) -> Iterator[str]:
    """Whether the arrays are those that the settings imply."""
    wanted = {spec.name: spec for output in outputs for spec in output.specs()}
    for name in sorted(wanted.keys() ^ store.specs.keys()):
        yield f"there should {'' if name in wanted else 'not '}be an array {name}"
    for name in sorted(wanted.keys() & store.specs.keys()):
        ours, theirs = wanted[name], store.specs[name]
        same = ("dtype", "axes", "rows", "chunk")
        if any(getattr(ours, key) != getattr(theirs, key) for key in same):
            yield f"{name} is {theirs.dtype} {theirs.axes}, not what the config implies"


def _check_frame(store: TargetStore, outputs: Sequence[Output], i: int) -> list[str]:
    where = store.describe(i)
    if store.per_frame["n_voxels"][i] == FAILED:
        known = str(i) in store.attrs["failed"]
        return [] if known else [f"{where}: marked failed, but no reason is recorded"]
    try:
        frame = store.frame(i)
        return [f"{where}: {p}" for output in outputs for p in output.check(store, frame)]
    except StoreError as error:
        return [str(error)]
    except Exception as error:  # whatever values that nobody checked before lead to
        return [f"{where}: cannot be checked: {error!r}"]
