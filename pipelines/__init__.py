"""Presets (YAML), launchers and benchmarks; installed as ``occfeat_pipelines``."""
