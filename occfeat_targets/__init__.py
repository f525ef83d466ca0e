"""Offline stage of occfeat: a nuScenes dataroot becomes a self-contained Zarr store of targets.
Imports nothing: the trainer imports ``store`` and must not pay for dask, the devkit or torch."""

__version__ = "0.1.0"
