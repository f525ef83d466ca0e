"""Datasets: one module each, everything about it. ``base`` says what a dataset must offer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from occfeat_targets.store.registry import Registry

if TYPE_CHECKING:
    from occfeat_targets.sources.base import Source

SOURCES = Registry("source", {"nuscenes": "occfeat_targets.sources.nuscenes:NuScenesSource"})


def source_of(name: str, dataroot: Path) -> Source:
    """The source of a name; ``auto`` is the first that recognises the dataroot.

    Where none does it is the first of all, whose ``read`` says what is missing.

    Raises:
        ConfigError: there is none of that name.
    """
    if name != "auto":
        return SOURCES(name)()
    known = [SOURCES(each)() for each in SOURCES.names]
    return next((source for source in known if source.detect(dataroot)), known[0])
