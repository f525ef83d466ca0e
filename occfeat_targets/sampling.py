"""Voxel centres into cameras, bilinear mean of the teacher's features, int8 quantisation."""

import numpy as np
import torch
from torch.nn import functional as F

from occfeat_targets.geometry import in_image, project


def see(
    centres: np.ndarray, K: np.ndarray, cam_T_ego: np.ndarray, hw: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where each camera sees each voxel centre (paper §3.3; occlusion is ignored).

    ``centres`` are float64 (V, 3), metres, ego frame, ``K`` (N, 3, 3), continuous pixels,
    ``cam_T_ego`` (N, 4, 4), and ``hw`` int (N, 2), height and width of each image. Returns
    ``(position, valid)``: float64 (N, V, 2) positions (u / W, v / H) in the image, in [0, 1) where
    bool (N, V) ``valid``.
    """
    uv, depth = project(K, cam_T_ego, centres)
    valid = np.stack([in_image(uv[c], depth[c], tuple(hw[c])) for c in range(len(K))])
    return uv / hw[:, None, ::-1], valid


def camera_bits(valid: np.ndarray) -> np.ndarray:
    """Bit c of each voxel = camera c sees it; int64 (V,) from bool (N, V)."""
    return (valid.astype(np.int64) << np.arange(len(valid))[:, None]).sum(axis=0)


def sample_mean(features: torch.Tensor, position: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Mean over the seeing cameras of bilinearly sampled features (paper §3.3): float32 (V, C),
    zeros where no camera sees the voxel.

    A feature map's cell (i, j) covers [j/w, (j+1)/w) x [i/h, (i+1)/h) of the image: the same as
    ``grid_sample(align_corners=False, padding_mode="border")``, but only seen pairs are touched.
    ``features`` is a float32 CPU tensor (N, C, h, w), ``position`` and ``valid`` are from
    :func:`see`.
    """
    _, channels, h, w = features.shape
    voxel, camera = np.nonzero(valid.T)  # ascending voxel: one bag per voxel
    x, x_next, x_weight = _taps(position[camera, voxel, 0], w)
    y, y_next, y_weight = _taps(position[camera, voxel, 1], h)
    row, row_next = (camera * h + y) * w, (camera * h + y_next) * w
    cells = np.stack([row + x, row + x_next, row_next + x, row_next + x_next], axis=1)
    n_cameras = valid.sum(axis=0)
    weights = (
        np.stack([1 - y_weight, y_weight], axis=1)[:, :, None]
        * np.stack([1 - x_weight, x_weight], axis=1)[:, None, :]
    ).reshape(-1, 4) / n_cameras[voxel, None]
    bag_start = 4 * (np.cumsum(n_cameras) - n_cameras)
    return F.embedding_bag(
        torch.from_numpy(cells.ravel()),
        features.permute(0, 2, 3, 1).reshape(-1, channels),
        torch.from_numpy(bag_start),
        per_sample_weights=torch.from_numpy(weights.ravel().astype(np.float32)),
        mode="sum",
    ).numpy()


def _taps(position: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower cell, upper cell and the upper one's weight, for positions in [0, 1) on one axis."""
    at = np.clip(position * cells - 0.5, 0, cells - 1)  # clip = border padding
    lower = np.floor(at).astype(np.int64)
    return lower, np.minimum(lower + 1, cells - 1), at - lower


def quantise(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors float32 (V, C) as ``(codes, scale)``, int8 (V, C) in [-127, 127] and one float16 step
    each (V,), so that codes * step is the vector.

    The step is max abs / 127, rounded up to float16 before use: the error of a component is then at
    most half a step, with nothing added by the step's own rounding. Raises ValueError if a feature
    is not finite or too large for a float16 step.
    """
    peak = np.abs(features).max(axis=1, initial=0.0)
    if not np.isfinite(peak).all():
        raise ValueError("teacher features are not finite")
    if (peak > 127 * np.finfo(np.float16).max).any():
        raise ValueError(f"teacher features as large as {peak.max():g} do not fit a float16 step")
    scale = (peak / 127).astype(np.float16)
    low = scale.astype(np.float32) * 127 < peak
    scale[low] = np.nextafter(scale[low], np.float16(np.inf))
    step = np.where(scale > 0, scale, 1).astype(np.float32)
    return np.rint(features / step[:, None]).astype(np.int8), scale
