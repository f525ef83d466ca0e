"""Offline stage of occfeat: a nuScenes dataroot becomes a self-contained Zarr store of targets.

Deliberately imports nothing: the trainer imports ``schema`` and ``grid`` from here and must not
pay for, or depend on, dask, the devkit or torch.
"""

__version__ = "0.1.0"
