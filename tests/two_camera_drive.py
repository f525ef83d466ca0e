"""Writes a small made-up drive for ``toys/two_cameras.py``, and builds a store of it."""

import json
from pathlib import Path

import numpy as np
from click.testing import CliRunner
from PIL import Image

from occfeat_targets.cli import main

SETTINGS = {
    "source": "two_cameras:TwoCameras",
    "teacher.name": "teachers:PatchMeans",
    "teacher.input_size": [56, 84],
    "grid.x": [-8, 8, 16],
    "grid.y": [-8, 8, 16],
    "grid.z": [-1, 3, 2],
    "images.size": [64, 96],
    "lidar.max_points": 700,
    "lidar.near_m": 0.5,
    "map.mode": "required",
    "block_frames": 2,
    "outputs": {"heights:Heights": {"ground_m": 0.5}},
}
"""of ``occfeat-targets build``."""
SCENES = {"morning": "train", "noon": "train", "evening": "val"}
SCENE_FRAMES = 2
SIZES = {"ahead": (120, 200), "left": (96, 144)}


def options(**changed):
    """``--set`` for each of the settings."""
    settings = SETTINGS | {key.replace("__", "."): value for key, value in changed.items()}
    return [part for k, v in settings.items() for part in ("--set", f"{k}={json.dumps(v)}")]


def build(folder, store):
    """Build through the command, in this process."""
    arguments = ["build", str(folder), str(store), "--workers", "0", *options()]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output


def write_drive(folder):
    """Three scenes of two frames each."""
    folder, rng = Path(folder), np.random.default_rng(0)
    folder.mkdir(parents=True)
    cameras = {
        "ahead": {"K": [[110, 0, 99], [0, 105, 61], [0, 0, 1]], "ego_T_cam": _ego_T_cam(0.1)},
        "left": {"K": [[80, 0, 70], [0, 82, 50], [0, 0, 1]], "ego_T_cam": _ego_T_cam(1.4)},
    }
    drive = {
        "version": "2",
        "cameras": {name: camera | {"size": SIZES[name]} for name, camera in cameras.items()},
        "ego_T_lidar": [[0, -1, 0, 0.4], [1, 0, 0, 0.1], [0, 0, 1, 1.2], [0, 0, 0, 1]],
        "map": {
            "platform": [[[495, 303], [509, 303], [509, 306], [495, 306]]],
            "rail": [[[480, 298], [503, 300], [520, 304]], [[480, 290], [481, 290]]],
        },
        "frames": [
            _frame(folder, rng, scene, split, number)
            for scene, split in SCENES.items()
            for number in range(SCENE_FRAMES)
        ],
    }
    (folder / "drive.json").write_text(json.dumps(drive))


def _frame(folder, rng, scene, split, number):
    name = f"{scene}-{number}"
    xyz = rng.uniform((-9, -9, -2.1), (9, 9, 1.7), (600, 3)) * (1, 1, rng.uniform(0.5, 1))
    np.save(folder / f"{name}.npy", np.column_stack([rng.uniform(0, 1, 600), xyz]))
    images = {}
    for camera, (height, width) in SIZES.items():
        images[camera] = f"{name}-{camera}.jpg"
        small = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
        small.resize((width, height)).save(folder / images[camera], quality=95)
    turn, step = 0.05 * number, 0.7 * number
    c, s = np.cos(turn), np.sin(turn)
    global_T_ego = [[c, -s, 0, 500 + step], [s, c, 0, 300], [0, 0, 1, 0], [0, 0, 0, 1]]
    tram = [*rng.uniform(-5, 5, 2), 1.0, 6.0, 2.4, 3.0, rng.uniform(-3, 3)]
    person = [*rng.uniform(-6, 6, 2), 0.9, 0.6, 0.6, 1.8, 0.0]
    boxes = [{"class": "tram", "box": tram}, {"class": "person", "box": person}]
    return {
        "scene": scene,
        "split": split,
        "timestamp_us": 1_000_000 + 500_000 * number,
        "lidar": f"{name}.npy",
        "images": images,
        "global_T_ego": global_T_ego,
        "boxes": boxes[: 2 - (number and scene == "noon")],
    }


def _ego_T_cam(yaw):
    """A camera 1.4 m above ego's origin that looks along ``yaw``."""
    c, s = np.cos(yaw), np.sin(yaw)
    # Columns: where the camera's right, down and forward point in ego.
    return [[s, 0, c, 0.3], [-c, 0, s, 0.0], [0, -1, 0, 1.4], [0, 0, 0, 1]]
