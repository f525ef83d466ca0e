"""The build: dataroot to finished store, resumed wherever it was left."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from occfeat_common.settings import differences
from occfeat_targets import writer
from occfeat_targets.cluster import Executor
from occfeat_targets.config import TargetsConfig
from occfeat_targets.nuscenes_source import check_records, load_source
from occfeat_targets.records import Source
from occfeat_targets.teacher import TeacherError
from occfeat_targets.writer import BlockJob, BlockResult


class BuildStopped(RuntimeError):
    """Frames or blocks failed; the message lists them. What is finished is kept."""


def prepare(
    dataroot: Path, url: str, version: str | None, config: TargetsConfig, overwrite: bool
) -> Source:
    """All that can go wrong before any work: read the tables, check the files, begin the store.

    Raises:
        SourceError: the dataset is unusable or has faults (all listed).
        StoreError: the store's place can't be used.
    """
    source = read_source(dataroot, version, config)
    begin(url, config, source, overwrite)
    return source


def read_source(dataroot: Path, version: str | None, config: TargetsConfig) -> Source:
    """Read the tables and check the files.

    Raises:
        SourceError: the dataset is unusable or has faults (all listed).
    """
    source = load_source(dataroot, version, config)
    check_records(source.records, config)
    return source


def begin(url: str, config: TargetsConfig, source: Source, overwrite: bool) -> None:
    """Begin the store, or check that the one there is this very build's.

    Raises:
        StoreError: the store's place can't be used.
    """
    writer.begin(url, config, source, overwrite)
    writer.sweep_litter(url)


def build(
    url: str, config: TargetsConfig, source: Source, executor: Executor, skip_errors: bool = False
) -> dict[int, str]:
    """Write all blocks that are not done yet and finish the store.

    Args:
        url: the store, after :func:`prepare`.
        config: its settings.
        source: from :func:`prepare`.
        executor: where blocks are computed.
        skip_errors: finish the other frames when one fails; else stop after the running blocks.

    Returns:
        Frames that failed (with ``skip_errors``): index to message.

    Raises:
        BuildStopped: a frame or block failed; run the same command again to continue.
        TeacherError, ConfigError, StoreError: from the workers' side of the set-up.
    """
    # Loads the teacher on all workers at once, and finds out if they have different ones.
    teacher, *others = executor.everywhere(writer.describe_teacher, config)
    for other in others:
        if other != teacher:
            lines = "; ".join(differences(teacher, other))
            raise TeacherError(f"the workers have different teachers: {lines}")
    writer.set_teacher(url, config, teacher)
    jobs = writer.plan(url, config, source.records, teacher, skip_errors)
    problems: list[str] = []

    def until_trouble() -> Iterator[BlockJob]:
        for job in jobs:
            if problems:
                return
            yield job

    todo = sum(len(job.records) for job in jobs)
    with tqdm(
        total=len(source.records),
        initial=len(source.records) - todo,
        desc="building",
        unit="frame",
        mininterval=0.1 if sys.stderr.isatty() else 30,  # a line now and then in a log file
    ) as progress:
        for job, result in executor.run(writer.write_block, until_trouble()):
            if isinstance(result, BlockResult):
                progress.update(result.n_frames)
                if not skip_errors:
                    problems += result.failed.values()
            else:
                problems.append(f"block {job.index} ({job.records[0]} …): {result}")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise BuildStopped(
            f"stopped, {len(problems)} problem(s):\n{lines}\nWhat is finished is kept: mend this "
            "and run the same command again, or leave such frames out with --on-error skip"
        )
    return writer.finalise(url, config, source)
