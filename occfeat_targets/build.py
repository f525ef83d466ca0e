"""The build: dataroot to finished store, resumed wherever it was left; and a store's evaluation
split again with corrupted images, one store for each corruption and severity."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from occfeat_targets import writer
from occfeat_targets.cluster import Executor
from occfeat_targets.config import TargetsConfig
from occfeat_targets.frame import layout_of, make_outputs
from occfeat_targets.sources import SOURCES
from occfeat_targets.sources.base import Dataset, FrameRecord, SourceError
from occfeat_targets.store.lease import one_writer
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.schema import MAX_CAMERAS
from occfeat_targets.store.settings import differences
from occfeat_targets.teachers.base import NoTeacher, TeacherError

_MAX_FAULTS_SHOWN = 20


class BuildStopped(RuntimeError):
    """Frames or blocks failed; the message lists them. What is finished is kept."""


def prepare(
    dataroot: Path, url: str, version: str | None, config: TargetsConfig, overwrite: bool
) -> Dataset:
    """All that can go wrong before any work: read tables, check files and the store's place.
    Raises SourceError (unusable dataset, or faults in it) and StoreError (unusable place)."""
    dataset = read_dataset(dataroot, version, config)
    check_records(dataset, config)
    writer.check(url, config, dataset, overwrite)
    return dataset


def read_dataset(dataroot: Path, version: str | None, config: TargetsConfig) -> Dataset:
    """Read the tables. Raises SourceError: unusable dataset; and ConfigError: no such source."""
    dataroot, name, known = Path(dataroot), config.source, SOURCES.names
    found = [each for each in known if name == "auto" and SOURCES(each)().detect(dataroot)]
    if name == "auto":  # where none recognises the dataroot, the first says what is missing
        name = (found or known)[0]
    sweeps, map_mode = config.lidar.sweeps, config.map.mode
    try:
        dataset = SOURCES(name)().read(dataroot, version, config.frames, sweeps, map_mode)
    except SourceError as error:
        if found or config.source != "auto" or not dataroot.is_dir():
            raise
        hint = "for a dataset of another kind name its reader: --set source=module:Name"
        raise SourceError(f"{error} ({hint})") from error
    if len(dataset.cameras) > MAX_CAMERAS:
        raise SourceError(f"{dataroot} has {len(dataset.cameras)} cameras, at most {MAX_CAMERAS}")
    if unknown := sorted({*dataset.vehicle_classes} - {*dataset.box_classes}):
        raise SourceError(f"vehicle_classes that are no box_classes: {', '.join(unknown)}")
    return replace(dataset, records=[replace(r, source=name) for r in dataset.records])


def check_records(dataset: Dataset, config: TargetsConfig) -> None:
    """Before any work: files are there and sound by size or header, calibration is sane, maps are
    readable, all fits. Raises SourceError with all faults, each with scene, sample and file."""
    outputs = make_outputs(config, layout_of(config, vars(dataset), 0))

    def faults_of(record: FrameRecord) -> list[str]:
        found = list(record.misfits(len(dataset.cameras)))
        if not found:  # the outputs rely on that
            found = [fault for output in outputs for fault in output.faults(record)]
        return [f"{record}: {fault}" for fault in found]

    records = dataset.records
    found = thread_map(  # the threads wait for storage, not for the processor
        faults_of, records, max_workers=16, desc="checking files", unit="frame", disable=None
    )
    faults = [fault for each in found for fault in each]
    for path, name in sorted({(r.map_path, r.source) for r in records if r.map_path}):
        try:
            SOURCES(name)().read_map(path)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:_MAX_FAULTS_SHOWN])
        more = len(faults) - _MAX_FAULTS_SHOWN
        shown += f"\n  … and {more} more" if more > 0 else ""
        n = "one fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise SourceError(f"{n} in the dataroot, nothing was built:\n{shown}")


def build(
    url: str,
    config: TargetsConfig,
    dataset: Dataset,
    executor: Executor,
    skip_errors: bool = False,
    overwrite: bool = False,
) -> dict[int, str]:
    """Begin the store, or go on with it (unless ``overwrite``), write all blocks that are not done
    yet and finish it, after :func:`prepare`. With ``skip_errors`` the other frames are finished
    when one fails; else it stops after the running blocks. Returns the frames that failed then,
    index to message. Raises BuildStopped if a frame or block failed (run the same command again to
    continue), ClusterError if the workers are gone, and TeacherError, ConfigError or StoreError
    from the workers' side of the set-up, before anything is written or deleted."""
    with one_writer(url) as require:
        # Loads the teacher on all workers at once, and finds out if they have different ones.
        teacher, *others = executor.everywhere(writer.describe_teacher, config)
        for other in others:
            if lines := differences(teacher, other):
                raise TeacherError(f"the workers have different teachers: {'; '.join(lines)}")
        writer.begin(url, config, dataset, overwrite)
        writer.set_teacher(url, config, teacher)
        jobs = writer.plan(url, config, dataset.records, teacher, skip_errors)
        problems: list[str] = []
        until_trouble = takewhile(lambda job: not problems, jobs)
        with _progress(len(dataset.records), jobs) as heard, executor.listening(url, heard):
            for job, result in executor.run(writer.write_block, until_trouble):
                require()
                if isinstance(result, dict):
                    heard((job.start, len(job.records)))
                    problems += [] if skip_errors else result.values()
                else:
                    problems.append(f"block {job.index} ({job.records[0]} …): {result}")
        if problems:
            lines = "\n".join(f"  {problem}" for problem in problems)
            raise BuildStopped(
                f"stopped, for {len(problems)} of its frames or blocks failed:\n{lines}\nWhat is "
                "finished is kept: mend this and run the same command again, or leave such frames "
                "out: --on-error skip"
            )
        require()
        return writer.finalise(url, config, dataset)


@contextmanager
def _progress(total: int, jobs: Sequence[writer.BlockJob]) -> Iterator[Callable]:
    """A bar of frames. It is told, from any thread, ``(start, n)``: of the block of that start so
    many frames are done; a task that is run again says so twice."""
    done = dict.fromkeys((job.start for job in jobs), 0)
    before = total - sum(len(job.records) for job in jobs)
    terminal = sys.stderr.isatty()
    with tqdm(
        total=total,
        initial=before,
        desc="building",
        unit="frame",
        smoothing=0,  # the mean rate: workers' frames end together, and a recent one would jump
        mininterval=0.1 if terminal else 30,  # in a log file a line now and then
    ) as bar:

        def heard(message: tuple[int, int]) -> None:
            start, n = message
            if start in done:  # not of a task that outlived an earlier client
                done[start] = max(done[start], n)
            bar.n = before + sum(done.values())
            bar.update(0)

        yield heard


def read_split(dataroot: Path, url: str, split: str | None) -> tuple[TargetsConfig, Dataset]:
    """Settings and frames of a split of a store (default: ``val`` or ``mini_val``), to build it
    again without features from its dataroot. Raises StoreError: the store can't be read;
    ValueError: it has no such split; SourceError: the dataroot lacks its frames, or has faults."""
    store = open_store(url)
    splits = [store.split(i) for i in range(len(store))]
    if split is None:
        split = next((name for name in ("val", "mini_val") if name in splits), "val or mini_val")
    if split not in splits:
        there = ", ".join(sorted({*splits}))
        raise ValueError(f"{url} has no frames of {split}; choose with --split: {there}")
    config = TargetsConfig.of(store.attrs["config"])
    tokens = [store.token(i) for i, name in enumerate(splits) if name == split]
    # Frames are in table order: the first so many of all are the first so many of a split.
    limit = None if config.frames.limit is None else len(tokens)
    config = config.with_(
        teacher=config.teacher.with_(name=NoTeacher.name),
        map=config.map.with_(mode="required" if store.attrs["map_classes"] else "never"),
        frames=config.frames.with_(splits=(split,), limit=limit),
    )
    dataset = read_dataset(dataroot, store.attrs["source"]["version"], config)
    check_records(dataset, config)
    found = [record.token for record in dataset.records]
    if found != tokens:
        raise SourceError(
            f"{dataroot} is not what {url} was built from: it has {len(found)} such frames, the "
            f"store {len(tokens)}, {len({*found} & {*tokens})} of them the same"
        )
    return config, dataset


def build_corrupted(
    config: TargetsConfig,
    dataset: Dataset,
    out: str,
    names: Sequence[str],
    executor: Executor,
    skip_errors: bool,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Build a store ``OUT/<name>.zarr`` for each of ``corruptions.CORRUPTED`` in ``names``; those
    that are complete are left alone. ``say`` gets a line for each; the other arguments are what
    :func:`read_split` gives and :func:`build` takes, whose StoreError and BuildStopped it raises.
    Returns frames left out (with ``skip_errors``): store and frame to message."""
    failed = {}
    for name in names:
        url = f"{out.rstrip('/')}/{name}.zarr"
        corrupted = config.with_(images=config.images.with_(corruption=name))
        writer.check(url, corrupted, dataset, overwrite=False)
        if writer.is_complete(url):
            say(f"{url} is complete: {len(dataset.records)} frames, nothing to do")
            continue
        messages = build(url, corrupted, dataset, executor, skip_errors)
        failed |= {f"{url}, frame {i}": message for i, message in messages.items()}
        say(f"{url}: {len(dataset.records)} frames, {len(messages)} failed")
    return failed
