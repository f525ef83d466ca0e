"""Datasets: one module each, everything about it. ``base`` says what a dataset must offer."""

from occfeat_targets.store.registry import Registry

SOURCES = Registry("source", {"nuscenes": "occfeat_targets.sources.nuscenes:NuScenesSource"})
