"""Cameras of a vehicle: a JSON file that anyone can write, and what the network takes of it.

    {"cameras": [{"name": "front", "image_hw": [900, 1600], "file": "front.jpg",
                  "K": [[1266, 0, 816], [0, 1266, 491], [0, 0, 1]],
                  "cam_T_ego": [[0, -1, 0, 0], [0, 0, -1, 1.5], [1, 0, 0, -1.7], [0, 0, 0, 1]]}]}

``K`` is that of images of height and width ``image_hw``, which must be rectified; ``cam_T_ego``
takes points from ego (x forward, y left, z up, on the ground, metres) to the camera (x right,
y down, z forward). ``file`` is the camera's image, beside the JSON, and may be left out.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import torch
from pydantic import Field, FiniteFloat, model_validator
from torch import Tensor

from occfeat_targets.store.files import StoreError
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.settings import ConfigError, Settings, Size
from occfeat_train.data.order import select_frames, split_names
from occfeat_train.geometry import resize_and_crop
from occfeat_train.runs.job import Job

_Row3 = tuple[FiniteFloat, FiniteFloat, FiniteFloat]
_Row4 = tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]


class Camera(Settings):
    """One camera; fields as above."""

    name: Annotated[str, Field(min_length=1)]
    image_hw: Size
    K: tuple[_Row3, _Row3, _Row3]
    cam_T_ego: tuple[_Row4, _Row4, _Row4, _Row4]
    file: str | None = None

    @model_validator(mode="after")
    def _is_a_camera(self) -> Self:
        K, cam_T_ego = np.array(self.K), np.array(self.cam_T_ego)
        if K[0, 0] <= 0 or K[1, 1] <= 0 or K[1, 0] or (K[2] != (0, 0, 1)).any():
            raise ValueError("K must be [[fx, skew, cx], [0, fy, cy], [0, 0, 1]]")
        rotation = cam_T_ego[:3, :3]
        is_rigid = np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3)
        if not is_rigid or np.linalg.det(rotation) < 0 or (cam_T_ego[3] != (0, 0, 0, 1)).any():
            raise ValueError("cam_T_ego must be a rotation and a translation, last row 0, 0, 0, 1")
        return self


def read_rig(path: Path) -> list[Camera]:
    """The cameras of a JSON file. ConfigError, naming file and camera: it is none, lacks something,
    or holds what can't be."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        entries = said["cameras"]
        names = [entry["name"] for entry in entries]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(
            f'{path} is no calibration, {{"cameras": [{{"name": ...}}, ...]}}: {error!r:.200}'
        ) from error
    if not names or len({*map(str, names)}) < len(names):
        raise ConfigError(f"{path} must name cameras, each by a name of its own; it names {names}")
    cameras = []
    for name, entry in zip(names, entries, strict=True):
        try:
            cameras.append(Camera.of(entry))
        except ConfigError as error:
            raise ConfigError(f"{path}: camera {name!s:.100}: {error}") from None
    return cameras


def image_files(cameras: Sequence[Camera], calibration: Path) -> list[Path]:
    """The images that a JSON file names, beside it. ConfigError, naming the camera: it has none."""
    for camera in cameras:
        if camera.file is None:
            raise ConfigError(
                f"{calibration} names no file of camera {camera.name}: add it, or give --images"
            )
    return [calibration.parent / str(camera.file) for camera in cameras]


def write_rig(cameras: Sequence[Camera]) -> dict:
    """What :func:`read_rig` reads, to be written as JSON."""
    return {"cameras": [camera.model_dump(mode="json", exclude_none=True) for camera in cameras]}


def rig_of_frame(job: Job, i: int | None) -> list[Camera]:
    """The cameras of frame ``i`` of a job's store, None the first of its evaluation split, with
    images as they are stored. StoreError: no such frame or store, or it has no targets."""
    store = open_store(job.store)
    if i is None:
        i = select_frames(store, split_names(job.config.data.eval_split, "val"))[0]
    if not 0 <= i < len(store):
        raise StoreError(f"no frame {i}: {job.store} has frames 0 to {len(store) - 1}")
    frame = store.read(i, ("K", "cam_T_ego"))
    matrices = {name: frame[name].astype(float).tolist() for name in ("K", "cam_T_ego")}
    size = store.attrs["config"]["images"]["size"]
    return [
        Camera.of({"name": name, "image_hw": size} | {k: v[c] for k, v in matrices.items()})
        for c, name in enumerate(store.attrs["cameras"])
    ]


def calibration(cameras: Sequence[Camera], image_hw: Size) -> tuple[Tensor, Tensor]:
    """``K`` of images resized to (H, W), float32 (1, N, 3, 3), and ``cam_T_ego`` (1, N, 4, 4)."""
    K = torch.tensor([camera.K for camera in cameras])
    old = torch.tensor([camera.image_hw for camera in cameras])
    K = resize_and_crop(K, (torch.tensor(image_hw) / old).flip(-1), torch.zeros(2))
    return K[None], torch.tensor([camera.cam_T_ego for camera in cameras])[None]
