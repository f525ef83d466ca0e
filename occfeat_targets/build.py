"""The build: dataroot to finished store, resumed wherever it was left."""

import sys
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from occfeat_targets import writer
from occfeat_targets.cluster import Executor
from occfeat_targets.config import TargetsConfig
from occfeat_targets.frame import layout_of, make_outputs
from occfeat_targets.sources import SOURCES, source_of
from occfeat_targets.sources.base import Dataset, FrameRecord, SourceError
from occfeat_targets.store.schema import MAX_CAMERAS
from occfeat_targets.store.settings import differences
from occfeat_targets.teachers.base import TeacherError

_MAX_FAULTS_SHOWN = 20


class BuildStopped(RuntimeError):
    """Frames or blocks failed; the message lists them. What is finished is kept."""


def prepare(
    dataroot: Path, url: str, version: str | None, config: TargetsConfig, overwrite: bool
) -> Dataset:
    """All that can go wrong before any work: read the tables, check the files, begin the store.
    Raises SourceError if the dataset is unusable or has faults (all listed), and StoreError if the
    store's place can't be used."""
    dataset = read_dataset(dataroot, version, config)
    check_records(dataset, config)
    writer.begin(url, config, dataset, overwrite)
    return dataset


def read_dataset(dataroot: Path, version: str | None, config: TargetsConfig) -> Dataset:
    """Read the tables. Raises SourceError if the dataset is unusable, and ConfigError if there is
    no such source."""
    name, source = source_of(config.source, Path(dataroot))
    mode, sweeps = config.map.mode, config.lidar.sweeps
    dataset = source.read(Path(dataroot), version, config.frames, sweeps, mode)
    if len(dataset.cameras) > MAX_CAMERAS:
        raise SourceError(f"{dataroot} has {len(dataset.cameras)} cameras, at most {MAX_CAMERAS}")
    if unknown := sorted({*dataset.vehicle_classes} - {*dataset.box_classes}):
        raise SourceError(f"vehicle_classes that are no box_classes: {', '.join(unknown)}")
    return replace(dataset, records=[replace(r, source=name) for r in dataset.records])


def check_records(dataset: Dataset, config: TargetsConfig) -> None:
    """Before any work: files are there and sound by size or header, calibration is sane, maps can
    be read, and nothing outgrows its room in the store. Raises SourceError, listing all faults at
    once, each with scene, sample and file."""
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
        raise SourceError(
            f"{len(faults)} fault(s) in the dataroot, nothing was built:\n{shown}"
            + (f"\n  … and {more} more" if more > 0 else "")
        )


def build(
    url: str, config: TargetsConfig, dataset: Dataset, executor: Executor, skip_errors: bool = False
) -> dict[int, str]:
    """Write all blocks that are not done yet and finish the store, after :func:`prepare`.

    With ``skip_errors`` the other frames are finished when one fails; else it stops after the
    running blocks. Returns the frames that failed then, index to message. Raises BuildStopped if a
    frame or block failed (run the same command again to continue), and TeacherError, ConfigError or
    StoreError from the workers' side of the set-up.
    """
    # Loads the teacher on all workers at once, and finds out if they have different ones.
    teacher, *others = executor.everywhere(writer.describe_teacher, config)
    for other in others:
        if other != teacher:
            lines = "; ".join(differences(teacher, other))
            raise TeacherError(f"the workers have different teachers: {lines}")
    writer.set_teacher(url, config, teacher)
    jobs = writer.plan(url, config, dataset.records, teacher, skip_errors)
    problems: list[str] = []
    until_trouble = takewhile(lambda job: not problems, jobs)
    todo = sum(len(job.records) for job in jobs)
    with tqdm(
        total=len(dataset.records),
        initial=len(dataset.records) - todo,
        desc="building",
        unit="frame",
        mininterval=0.1 if sys.stderr.isatty() else 30,  # a line now and then in a log file
    ) as progress:
        for job, result in executor.run(writer.write_block, until_trouble):
            if isinstance(result, dict):
                progress.update(len(job.records))
                problems += [] if skip_errors else result.values()
            else:
                problems.append(f"block {job.index} ({job.records[0]} …): {result}")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise BuildStopped(
            f"stopped, {len(problems)} problem(s):\n{lines}\nWhat is finished is kept: mend this "
            "and run the same command again, or leave such frames out with --on-error skip"
        )
    return writer.finalise(url, config, dataset)
