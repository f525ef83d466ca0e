"""A store's evaluation split with corrupted images: one store for each corruption and severity."""

from collections.abc import Callable, Sequence
from pathlib import Path

from occfeat_targets.build import build, check_records, read_dataset
from occfeat_targets.cluster import Executor
from occfeat_targets.config import TargetsConfig
from occfeat_targets.sources.base import Dataset, SourceError
from occfeat_targets.store.reader import open_store
from occfeat_targets.teachers.base import NoTeacher
from occfeat_targets.writer import begin, is_complete


def read_split(dataroot: Path, url: str, split: str | None) -> tuple[TargetsConfig, Dataset]:
    """Settings and frames of a split of a store (by default its ``val`` or ``mini_val``), to build
    it again without features from the dataroot it was built from.

    Raises StoreError if the store can't be read, ValueError if it has no such split, and
    SourceError if the dataroot does not have its frames, or has faults.
    """
    store = open_store(url)
    splits = [store.split(i) for i in range(len(store))]
    if split is None:
        split = next((name for name in ("val", "mini_val") if name in splits), "val or mini_val")
    if split not in splits:
        there = ", ".join(sorted(set(splits)))
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
    :func:`read_split` gives and ``build.build`` takes, whose StoreError and BuildStopped it raises.

    Returns frames left out (with ``skip_errors``): store and frame to message.
    """
    failed = {}
    for name in names:
        url = f"{out.rstrip('/')}/{name}.zarr"
        corrupted = config.with_(images=config.images.with_(corruption=name))
        begin(url, corrupted, dataset, overwrite=False)
        if is_complete(url):
            say(f"{url} is complete: {len(dataset.records)} frames, nothing to do")
            continue
        messages = build(url, corrupted, dataset, executor, skip_errors)
        failed |= {f"{url}, frame {i}": message for i, message in messages.items()}
        say(f"{url}: {len(dataset.records)} frames, {len(messages)} failed")
    return failed
