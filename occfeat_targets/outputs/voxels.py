"""Occupied voxels and the teacher's mean feature of each: OccFeat's targets (paper §3.2, §3.3)."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from occfeat_targets.geometry import project
from occfeat_targets.outputs.base import FrameInputs, Output
from occfeat_targets.sampling import camera_bits, quantise, sample_mean, see
from occfeat_targets.store.colours import feature_colours
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.schema import FAILED, ArraySpec, dequantise

_EDGE_PX = 0.02
"""Stored calibration is float32: a voxel this close to an image's edge may fall either side."""


class Voxels(Output):
    """Occupied voxels, which cameras see each, and their mean feature, quantised."""

    def specs(self) -> tuple[ArraySpec, ...]:
        """See :class:`Output`."""
        n, dim = self.layout.max_voxels, self.layout.feature_dim
        ragged: dict[str, Any] = {"rows": "n_voxels", "chunk": min(4096, n)}
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
        wrong = (bits & surely_outside) | (~bits & surely_inside)
        if wrong.any():
            yield f"feature_cameras contradicts the calibration at {int(wrong.sum())} voxels"

    def compare(self, stored: dict[str, Any], again: dict[str, np.ndarray]) -> Iterator[str]:
        """Voxels and cameras must be equal; the features' cosine at least 0.999, since processors
        and library versions round differently."""
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
        colours = feature_colours(features)[seen]
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
