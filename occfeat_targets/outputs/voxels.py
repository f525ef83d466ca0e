"""Occupied voxels and the teacher's mean feature of each: OccFeat's targets (paper §3.2, §3.3)."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from occfeat_targets.geometry import in_image, project
from occfeat_targets.outputs.base import FrameInputs, Output
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.schema import FAILED, ArraySpec, dequantise

_EDGE_PX = 0.02
"""Stored calibration is float32: a voxel this close to an image's edge may fall either side."""


class Voxels(Output):
    """Occupied voxels, which cameras see each, and their mean feature, quantised."""

    def specs(self) -> tuple[ArraySpec, ...]:
        """See :class:`Output`."""
        n, dim = self.layout.max_voxels, self.layout.feature_dim
        ragged: Any = {"rows": "n_voxels", "chunk": min(4096, n), "setting": "lidar.max_points"}
        V = {"voxel": n}
        doc = "flat (Z, X, Y) indices of occupied voxels, ascending"
        bits = "bit c = camera c sees the voxel; 0 = no feature target"
        unset = np.iinfo(self.layout.camera_bits).max
        specs = (
            ArraySpec("n_voxels", "int32", {}, "occupied voxels; -1 = failed", FAILED - 1),
            ArraySpec("voxel_index", "uint32", V, doc, 2**32 - 1, codec="shuffle", **ragged),
            ArraySpec("feature_cameras", self.layout.camera_bits, V, bits, unset, **ragged),
        )
        if dim == 0:
            return specs
        doc = "mean teacher feature / feature_scale, rounded"
        ragged_features = ragged | {"chunk": min(2048, n), "codec": "lz4"}
        return (
            *specs,
            ArraySpec("features", "int8", V | {"channel": dim}, doc, -128, **ragged_features),
            ArraySpec("feature_scale", "float16", V, "int8 step", np.nan, **ragged),
        )

    def compute(self, frame: FrameInputs) -> dict[str, np.ndarray]:
        """``voxel_index`` (V,), ``feature_cameras`` (V,) and, if the teacher has channels,
        ``features`` int8 (V, C) and ``feature_scale`` (V,). Raises ValueError if features are not
        finite, and TeacherError if they have the wrong shape."""
        record, index = frame.record, frame.voxel_index
        centres = self.layout.grid.centres(index)
        position, valid = see(centres, record.K, record.cam_T_ego, np.array(record.image_hw))
        bits = camera_bits(valid).astype(self.layout.camera_bits)
        targets = {"voxel_index": index, "feature_cameras": bits}
        if self.layout.feature_dim == 0:
            return targets
        codes, scale = quantise(sample_mean(frame.feature_maps, position, valid))
        return targets | {"features": codes, "feature_scale": scale}

    def check(self, store: TargetStore, frame: dict[str, Any]) -> Iterator[str]:
        """See :class:`Output`. The camera bits must follow from the stored calibration."""
        index = frame["voxel_index"].astype(np.int64)
        if (np.diff(index) <= 0).any():
            yield "voxel_index is not ascending"
        if index.max(initial=0) >= store.grid.n_voxels:
            yield "voxel_index leaves the grid"
            return
        yield from self._check_cameras(store, frame)
        if "features" not in frame:  # a store without a teacher
            return
        scale = frame["feature_scale"].astype(np.float32)
        peak = np.abs(frame["features"].astype(np.int16)).max(axis=1, initial=0)
        if not np.isfinite(scale).all() or (scale < 0).any():
            yield "feature_scale is not finite and positive"
        if ((frame["feature_cameras"] == 0) & ((scale != 0) | (peak != 0))).any():
            yield "a voxel that no camera sees has a feature"
        normal = scale >= np.finfo(np.float16).tiny  # a subnormal step can't reach 127 exactly
        if (peak[normal] != 127).any() or (peak > 127).any():
            yield "a feature's largest code is not 127"

    def _check_cameras(self, store: TargetStore, frame: dict[str, Any]) -> Iterator[str]:
        n_cameras, bits = len(self.layout.cameras), frame["feature_cameras"].astype(np.int64)
        if (bits >> n_cameras).any():
            yield "feature_cameras has bits of no camera"
        uv, depth = _projected(frame, store.grid.centres(frame["voxel_index"]), slice(None))
        size = np.array(self.layout.image_size)[::-1]
        inside = np.minimum(uv, size - uv).min(axis=-1)  # px to the nearest edge, negative outside
        bits = (bits >> np.arange(n_cameras)[:, None]) & 1 == 1
        surely_outside = (depth <= 0) | (inside < -_EDGE_PX)
        surely_inside = (depth > 0) & (inside > _EDGE_PX)
        if wrong := int(((bits & surely_outside) | (~bits & surely_inside)).sum()):
            yield f"feature_cameras contradicts the calibration at {wrong} voxels"

    def compare(self, stored: dict[str, Any], again: dict[str, np.ndarray]) -> Iterator[str]:
        """Voxels and cameras must be equal, features' cosine at least 0.999, since processors and
        library versions round differently."""
        for name in ("voxel_index", "feature_cameras"):
            if not np.array_equal(stored[name], again[name]):
                yield f"{name} differs from the recomputed one"
                return
        if "features" in again:
            a = dequantise(stored["features"], stored["feature_scale"])
            b = dequantise(again["features"], again["feature_scale"])
            norm = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            cosine = (a * b).sum(axis=1)[norm > 0] / norm[norm > 0]
            if cosine.min(initial=1.0) < 0.999:
                yield f"features differ from the recomputed ones: lowest cosine {cosine.min():.4f}"

    def draw_camera(self, axis: Any, store: TargetStore, frame: dict[str, Any], c: int) -> None:
        """The voxels' centres, coloured by feature; near ones are larger and drawn last."""
        if "features" in frame:
            features = dequantise(frame["features"], frame["feature_scale"])
        else:  # a store without a teacher: all grey
            features = np.zeros((frame["n_voxels"], 0))
        seen = (frame["feature_cameras"] >> c) & 1 == 1
        colours = self.paint(features[seen])
        centres = store.grid.centres(frame["voxel_index"][seen])
        uv, depth = (a[0] for a in _projected(frame, centres, slice(c, c + 1)))
        order = np.argsort(-depth)
        size = np.clip(400 / depth[order], 4, 60)
        axis.scatter(*uv[order].T, c=colours[order], s=size, alpha=0.7, linewidths=0)
        axis.set_title(f"{self.layout.cameras[c]}: {int(seen.sum())} voxels", fontsize=10)


def _projected(frame: dict, centres: np.ndarray, cameras: slice) -> tuple[np.ndarray, np.ndarray]:
    """Points (V, 3) in some cameras of a stored frame, see ``geometry.project``."""
    K, cam_T_ego = (frame[name][cameras].astype(np.float64) for name in ("K", "cam_T_ego"))
    return project(K, cam_T_ego, centres)


def see(
    centres: np.ndarray, K: np.ndarray, cam_T_ego: np.ndarray, hw: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where each camera sees each voxel centre (paper §3.3; occlusion is ignored):
    ``(position, valid)``, float64 (N, V, 2) places (u / W, v / H) in the image, in [0, 1) where
    bool (N, V) ``valid``. ``centres`` are float64 (V, 3), metres, ego, ``K`` (N, 3, 3), continuous
    pixels, ``cam_T_ego`` (N, 4, 4), and ``hw`` int (N, 2), height and width of each image."""
    uv, depth = project(K, cam_T_ego, centres)
    valid = np.stack([in_image(uv[c], depth[c], tuple(hw[c])) for c in range(len(K))])
    return uv / hw[:, None, ::-1], valid


def camera_bits(valid: np.ndarray) -> np.ndarray:
    """Bit c of each voxel = camera c sees it; int64 (V,) from bool (N, V)."""
    return (valid.astype(np.int64) << np.arange(len(valid))[:, None]).sum(axis=0)


def sample_mean(features: torch.Tensor, position: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Mean over the seeing cameras of bilinearly sampled features (paper §3.3): float32 (V, C),
    zeros where no camera sees the voxel. ``features`` is float32 (N, C, h, w), on the CPU,
    ``position`` and ``valid`` are from :func:`see`. A feature map's cell (i, j) covers
    [j/w, (j+1)/w) x [i/h, (i+1)/h) of the image, as for
    ``grid_sample(align_corners=False, padding_mode="border")``; only seen pairs are touched."""
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
    each (V,): codes * step is the vector. The step is max abs / 127, rounded up to float16 before
    use: a component's error is then at most half a step, with nothing added by the step's own
    rounding. Raises ValueError if a feature is not finite or too large for a float16 step."""
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
