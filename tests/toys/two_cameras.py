"""A dataset in one file: ``--set source=two_cameras:TwoCameras``.

A drive is a folder with ``drive.json``, JPEGs, and lidar sweeps as float64 .npy of rows
(reflectivity 0..1, x, y, z). See ``two_camera_drive.py`` for what writes one.
"""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np

from occfeat_targets.geometry import inverse_rigid
from occfeat_targets.sources.base import (
    Boxes,
    Dataset,
    FrameRecord,
    MapLayers,
    Shapes,
    SourceError,
)

CAMERAS = ("ahead", "left")


class TwoCameras:
    def detect(self, dataroot):
        return (dataroot / "drive.json").exists()

    def read(self, dataroot, version, frames, sweeps, map_mode):
        if not self.detect(dataroot):
            raise SourceError(f"{dataroot} holds no drive.json")
        drive = json.loads((dataroot / "drive.json").read_text())
        rows = [
            row
            for row in drive["frames"]
            if row["scene"] in (frames.scenes or [row["scene"]])
            and row["split"] in (frames.splits or [row["split"]])
        ]
        has_map = map_mode != "never"
        return Dataset(
            records=[_record(dataroot, drive, row, has_map) for row in rows[: frames.limit]],
            name="a drive",
            version=version or drive["version"],
            reader="1",
            scenes=tuple(dict.fromkeys(row["scene"] for row in rows)),
            splits=("train", "val"),
            cameras=CAMERAS,
            box_classes=("person", "tram"),
            vehicle_classes=("tram",),
            map_classes=("platform", "rail") if has_map else (),
        )

    def n_returns(self, path):
        try:
            return len(np.load(path, mmap_mode="r"))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot be read: {error}") from error

    def read_lidar(self, path):
        reflectivity, x, y, z = np.load(path).T
        return np.stack([x, y, z, 255 * reflectivity], axis=1).astype(np.float32)

    def read_map(self, path):
        return _read_map(path)


@functools.cache
def _read_map(path):
    areas = json.loads(Path(path).read_text())["map"]
    rings = {name: [[np.array(ring)] for ring in found] for name, found in areas.items()}
    return MapLayers(
        areas={"platform": Shapes(rings["platform"])}, lines={"rail": Shapes(rings["rail"])}
    )


def _record(dataroot, drive, row, has_map):
    cameras = [drive["cameras"][name] for name in CAMERAS]
    boxes = row["boxes"]
    return FrameRecord(
        token=hashlib.md5(row["lidar"].encode()).hexdigest(),
        scene=row["scene"],
        split=row["split"],
        timestamp_us=row["timestamp_us"],
        map_path=str(dataroot / "drive.json") if has_map else "",
        image_paths=tuple(str(dataroot / row["images"][name]) for name in CAMERAS),
        image_hw=tuple(tuple(camera["size"]) for camera in cameras),
        K=np.array([camera["K"] for camera in cameras]),
        cam_T_ego=inverse_rigid(np.array([camera["ego_T_cam"] for camera in cameras])),
        sweep_paths=(str(dataroot / row["lidar"]),),
        ego_T_sweep=np.array([drive["ego_T_lidar"]]),
        global_T_ego=np.array(row["global_T_ego"]),
        boxes=Boxes(
            category=tuple(box["class"] for box in boxes),
            box=np.array([box["box"] for box in boxes]).reshape(-1, 7),
            visibility=np.zeros(len(boxes), np.uint8),
        ),
    )
