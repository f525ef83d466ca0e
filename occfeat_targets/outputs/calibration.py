"""Which keyframe a frame is, and the rig's calibration: what the dataset's tables say."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from occfeat_targets.geometry import scale_intrinsics
from occfeat_targets.outputs.base import Output
from occfeat_targets.sources.base import Dataset, FrameRecord
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.schema import ArraySpec

_POSE = {"to": 4, "from": 4}


class Calibration(Output):
    """Token, scene, split, time, intrinsics and poses. Float64 is rounded here, last."""

    def specs(self) -> tuple[ArraySpec, ...]:
        """See :class:`Output`."""
        cameras = {"camera": len(self.layout.cameras)}
        K = cameras | {"uvw": 3, "xyz": 3}
        return (
            ArraySpec("token", "uint8", {"token_byte": 16}, "sample token, 32 hex digits", 0),
            ArraySpec("scene", "uint16", {}, "index into attribute `scenes`", 65535),
            ArraySpec("split", "uint8", {}, "index into attribute `splits`", 255),
            ArraySpec("timestamp_us", "int64", {}, "lidar keyframe time", -1),
            ArraySpec("K", "float32", K, "of stored images, continuous pixels", np.nan),
            ArraySpec("cam_T_ego", "float32", cameras | _POSE, "at camera's time", np.nan),
            ArraySpec("ego_T_lidar", "float32", _POSE, "keyframe lidar pose", np.nan),
            ArraySpec("global_T_ego", "float64", _POSE, "ego at lidar's time", np.nan),
        )

    def of_records(self, dataset: Dataset) -> dict[str, np.ndarray]:
        """See :class:`Output`."""
        records, size = dataset.records, self.layout.image_size
        stored_K = [
            [scale_intrinsics(K, hw, size) for K, hw in zip(r.K, r.image_hw, strict=True)]
            for r in records
        ]
        tokens = b"".join(bytes.fromhex(r.token) for r in records)
        return {
            "token": np.frombuffer(tokens, dtype=np.uint8).reshape(len(records), 16),
            "scene": np.array([dataset.scenes.index(r.scene) for r in records]),
            "split": np.array([dataset.splits.index(r.split) for r in records]),
            "timestamp_us": np.array([r.timestamp_us for r in records]),
            "K": np.array(stored_K),
            "cam_T_ego": np.stack([r.cam_T_ego for r in records]),
            "ego_T_lidar": np.stack([r.ego_T_sweep[0] for r in records]),
            "global_T_ego": np.stack([r.global_T_ego for r in records]),
        }

    def faults(self, record: FrameRecord) -> Iterator[str]:
        """See :class:`Output`."""
        if not re.fullmatch("[0-9a-fA-F]{32}", record.token):
            yield "a sample token must be 32 hex digits"
        for camera, K in zip(self.layout.cameras, record.K, strict=True):
            if not np.isfinite(K).all() or abs(np.linalg.det(K)) < 1e-6:
                yield f"{camera}: camera_intrinsic is singular: {K.tolist()}"
        poses = dict(zip(self.layout.cameras, record.cam_T_ego, strict=True))
        for sensor, a_T_b in (poses | {"the lidar": record.ego_T_sweep}).items():
            if not np.isfinite(a_T_b).all():
                yield f"{sensor}: zero rotation or non-finite number in its pose chain"

    def check(self, store: TargetStore, frame: dict[str, Any]) -> Iterator[str]:
        """See :class:`Output`."""
        for name in ("cam_T_ego", "ego_T_lidar", "global_T_ego"):
            rotation = frame[name].reshape(-1, 4, 4)[:, :3, :3].astype(np.float64)
            if not np.allclose(rotation @ rotation.transpose(0, 2, 1), np.eye(3), atol=1e-4):
                yield f"{name} is not a rigid transform"
        if not (np.isfinite(frame["K"]).all() and (np.linalg.det(frame["K"]) > 0).all()):
            yield "K is singular"
