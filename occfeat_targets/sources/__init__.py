"""Datasets: one module each, everything about it. ``base`` says what a dataset must offer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from occfeat_targets.store.registry import Registry

if TYPE_CHECKING:
    from occfeat_targets.sources.base import Source

SOURCES = Registry("source", {"nuscenes": "occfeat_targets.sources.nuscenes:NuScenesSource"})


def source_of(name: str, dataroot: Path) -> tuple[str, Source]:
    """The source of a name, and its name; ``auto`` is the first that recognises the dataroot, or
    where none does the first of all, whose ``read`` says what is missing. Raises ConfigError if
    there is none of that name."""
    if name != "auto":
        return name, SOURCES(name)()
    known = [(each, SOURCES(each)()) for each in SOURCES.names]
    return next((found for found in known if found[1].detect(dataroot)), known[0])
