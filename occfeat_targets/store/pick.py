"""Where else is it like here: the likeness of features to that of one voxel, by place or pixel."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from occfeat_targets.store.colours import directions
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.schema import dequantise
from occfeat_targets.store.settings import ConfigError

SCALE = {0.0: "#2a1a6e", 0.3: "#2d8f8a", 0.6: "#e8d24a", 1.0: "#d7191c"}
"""Colours of likeness 0 (and below) to 1."""
_NEAR = 0.02
"""A voxel is under a pixel if its centre is this near, in widths of the image, or if it covers it;
if there is none, the nearest centre counts up to five times as far."""


@dataclass(frozen=True)
class Likeness:
    """The cosine of features with one of them, as a colour of :data:`SCALE`."""

    reference: np.ndarray
    """(C,), not zero."""
    title: ClassVar[str] = "likeness to the picked voxel"

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """See ``colours.Paint``."""
        seen, unit = directions(features)
        cosine = unit @ (self.reference / np.linalg.norm(self.reference))
        colours = np.full((len(features), 3), 0.5)
        rgb = (
            np.array([[int(text[i : i + 2], 16) for i in (1, 3, 5)] for text in SCALE.values()])
            / 255
        )
        colours[seen] = np.stack([np.interp(cosine, [*SCALE], c) for c in rgb.T], axis=1)
        return colours


def pick(store: TargetStore, i: int, text: str) -> tuple[Likeness, np.ndarray]:
    """What ``--pick`` asks for in frame i of a store: the likeness to the voxel at ``X,Y,Z``,
    metres in ego, or to the first one under the pixel ``CAMERA,U,V`` of a stored image; and that
    voxel's centre (3,). Voxels that no camera sees have no feature and can't be picked.
    ConfigError: there is no such place, or nothing near it; StoreError: from reading."""
    if not store.attrs["teacher"]["dim"]:
        raise ConfigError(f"--pick needs features, and {store.url} was built without a teacher")
    names = ("voxel_index", "feature_cameras", "features", "feature_scale", "K", "cam_T_ego")
    frame = store.read(i, names)
    if not frame["feature_cameras"].any():
        raise ConfigError(f"--pick: {store.url}: {store.describe(i)} has no voxel with a feature")
    centres = store.grid.centres(frame["voxel_index"])
    camera, numbers = _parse(text, store.attrs["cameras"])
    if camera is None:
        distance = np.linalg.norm(centres - numbers, axis=1)
        distance[frame["feature_cameras"] == 0] = np.inf
        chosen = int(distance.argmin())
        if distance[chosen] > np.linalg.norm(2 * store.grid.cell_size):
            where = ",".join(f"{v:g}" for v in centres[chosen])
            raise ConfigError(f"--pick {text}: the nearest voxel with a feature is at {where}")
    else:
        chosen = _under(store, frame, camera, numbers)
        if chosen is None:
            raise ConfigError(f"--pick {text}: no voxel with a feature is near that pixel")
    feature = dequantise(frame["features"][[chosen]], frame["feature_scale"][[chosen]])[0]
    return Likeness(feature), centres[chosen]


def _parse(text: str, cameras: list[str]) -> tuple[int | None, np.ndarray]:
    """The camera's number, None for a place, and the other numbers."""
    first, *rest = text.split(",")
    try:
        if len(rest) != 2:
            raise ValueError("three are needed")
        numbers = np.array([float(part) for part in rest])
        if first in cameras:
            return cameras.index(first), numbers
        return None, np.array([float(first), *numbers])
    except ValueError:
        raise ConfigError(
            f"--pick {text}: give X,Y,Z in metres (x forward, y left, z up), or CAMERA,U,V in "
            f"pixels of the stored image, where CAMERA is one of {', '.join(cameras)}"
        ) from None


def _under(store: TargetStore, frame: dict[str, Any], c: int, uv: np.ndarray) -> int | None:
    """The voxel nearest to camera c of those under a pixel, if there is any."""
    K, cam_T_ego = frame["K"][c].astype(float), frame["cam_T_ego"][c].astype(float)
    xyz_cam = store.grid.centres(frame["voxel_index"]) @ cam_T_ego[:3, :3].T + cam_T_ego[:3, 3]
    depth, seen = xyz_cam[:, 2], (frame["feature_cameras"] >> c) & 1 == 1
    ahead = np.flatnonzero(seen & (depth > 0))
    uvw, depth = xyz_cam[ahead] @ K.T, depth[ahead]
    apart = np.linalg.norm(uvw[:, :2] / uvw[:, 2:] - uv, axis=1)
    half = 0.5 * store.grid.cell_size.min() * K[0, 0] / depth
    near = _NEAR * store.attrs["config"]["images"]["size"][1]
    under = apart <= np.maximum(half, near)
    if under.any():
        return int(ahead[np.where(under, depth, np.inf).argmin()])
    return int(ahead[apart.argmin()]) if apart.min(initial=np.inf) <= 5 * near else None
