"""A targets store of a few small made-up frames, written in a second, for tests of the trainer.

Its numbers are random but fit together: voxels come from the points, masks from the boxes. What
the trainer learns from it means nothing; that it runs, resumes and agrees with itself does.
"""

from pathlib import Path

import numpy as np
import zarr
from PIL import Image

from occfeat_targets import __version__
from occfeat_targets.config import TargetsConfig
from occfeat_targets.demo_world.labels import CATEGORIES
from occfeat_targets.frame import layout_of, make_outputs
from occfeat_targets.images import encode_jpeg
from occfeat_targets.outputs.boxes import vehicle_masks
from occfeat_targets.outputs.images import pack_images
from occfeat_targets.outputs.points import pack_points, point_step_m
from occfeat_targets.sources.nuscenes import CAMERAS
from occfeat_targets.sources.nuscenes_map import MAP_CLASSES
from occfeat_targets.store import schema
from occfeat_targets.store.reader import SEAL, array_seals, seal

SETTINGS = [
    "grid.x=[-8,8,16]",
    "grid.y=[-8,8,16]",
    "grid.z=[-1,3,2]",
    "images.size=[64,96]",
    "lidar.max_points=400",
    "boxes.max_boxes=4",
    "map.mode=never",
    "block_frames=4",
]
"""of ``occfeat-targets build``."""
TOKEN_HW = (4, 6)
LIDAR = [
    f"teacher.input_size={[*TOKEN_HW]}",
    "outputs={tokens: {}, lidarseg: {}, superpixels: {}}",
]
"""Likewise, of a store for lidar networks."""
DIM = 8
"""Channels of the made-up teacher."""
SPLITS = {"mini_train": 3, "mini_val": 1}
"""Scenes of each split."""
SCENE_FRAMES = 4
_EGO_T_LIDAR = np.array([[0, -1, 0, 0.9], [1, 0, 0, 0.3], [0, 0, 1, 1.8], [0, 0, 0, 1]])
_PEDESTRIAN = [6.0, 6.0, 1.0, 0.6, 0.6, 1.8, 0.0, 4.0]
"""A box that is no vehicle, the first of every frame."""


def make_tiny_store(
    path, seed=0, settings=(), splits=SPLITS, preset="demo", with_map=False, dim=DIM, lidar=False
) -> Path:
    """Write a finished store of ``SCENE_FRAMES`` frames a scene; of ``dim`` 0, without features;
    with ``lidar``, what lidar networks learn from."""
    settings = [*settings, *LIDAR] if lidar else settings
    config = TargetsConfig.load(None, [*SETTINGS, f"train_preset={preset}", *settings])
    rng = np.random.default_rng(seed)
    scenes = [split for split, n in splits.items() for _ in range(n)]
    n_frames = len(scenes) * SCENE_FRAMES
    shared = {
        "cameras": list(CAMERAS),
        "box_classes": ["human.pedestrian.adult", "vehicle.car"],
        "vehicle_classes": ["vehicle.car"],
        "map_classes": list(MAP_CLASSES) if with_map else [],
    }
    if lidar:
        shared["lidarseg_classes"] = list(CATEGORIES)
    outputs = make_outputs(config, layout_of(config, shared, dim))
    specs = [spec for output in outputs for spec in output.specs()]
    group = zarr.open_group(path, mode="w", zarr_format=3)
    schema.create_arrays(group, specs, n_frames, config.block_frames)
    for i in range(n_frames):
        frame = _frame(rng, config) | {
            "token": np.frombuffer(rng.bytes(16), dtype=np.uint8),
            "scene": i // SCENE_FRAMES,
            "split": list(splits).index(scenes[i // SCENE_FRAMES]),
            "timestamp_us": i * 500_000,
        }
        if with_map:
            frame["map"] = _map(config.grid, np.random.default_rng([seed, i]))
        if lidar:
            rng_of_lidar = np.random.default_rng([seed, i, 1])
            frame |= _lidar(rng_of_lidar, frame["points"], config.images.size, dim)
        for name, value in frame.items():
            if name not in group:
                continue
            array = group[name]
            where = (i, slice(len(value))) if np.ndim(value) and array.ndim > 1 else i
            array[where] = value
    attrs = {
        "format": schema.FORMAT,
        "format_version": schema.FORMAT_VERSION,
        "complete": True,
        "n_frames": n_frames,
        "arrays": array_seals(str(path), [spec.name for spec in specs]),
        "records_sha256": str(seed),
        "grid": config.plain()["grid"],
        "config": config.plain(),
        "scenes": [f"scene-{i:04d}" for i in range(len(scenes))],
        "splits": list(splits),
        "point_step_m": point_step_m(config.grid),
        "teacher": {"name": "tiny", "dim": dim, "weights": "random(tiny)"},
        "source": {"dataset": "tiny", "version": "1"},
        "software": {"occfeat": __version__},
        "failed": {},
        **shared,
    }
    group.attrs.update(attrs | {SEAL: seal(attrs)})
    return Path(path)


def change_attributes(path, **changes):
    """Other root attributes, sealed as a build would."""
    group = zarr.open_group(path, mode="r+", zarr_format=3)
    attrs = {key: value for key, value in group.attrs.items() if key != SEAL} | changes
    group.attrs.update(attrs | {SEAL: seal(attrs)})


def _frame(rng, config):
    grid, (height, width) = config.grid, config.images.size
    points = rng.uniform((-10, -10, -1), (10, 10, 3), (300, 3)) * (1, 1, rng.random())
    voxels = grid.occupied(points)
    vehicles = np.column_stack(
        [
            rng.uniform(-7, 7, (3, 2)),
            np.full(3, 1.0),
            rng.uniform(2, 5, (3, 2)),
            np.full(3, 1.5),
            rng.uniform(-3, 3, 3),
            rng.integers(1, 5, 3),
        ]
    ).astype(np.float32)
    vehicle, visible = vehicle_masks(vehicles, grid)
    K = np.tile(np.array([[60.0, 0, width / 2], [0, 60.0, height / 2], [0, 0, 1]]), (6, 1, 1))
    return {
        "n_voxels": len(voxels),
        "n_points": len(points),
        "n_boxes": 1 + len(vehicles),
        "voxel_index": voxels,
        "features": rng.integers(-127, 128, (len(voxels), DIM)),
        "feature_scale": rng.uniform(0.01, 0.02, len(voxels)),
        "feature_cameras": rng.integers(0, 3, len(voxels)),
        "points": pack_points(points, rng.uniform(0, 255, len(points)), grid),
        "boxes": np.vstack([_PEDESTRIAN, vehicles]),
        "box_class": np.array([0, 1, 1, 1]),
        "vehicle": vehicle,
        "vehicle_visible": visible,
        "K": K,
        "cam_T_ego": np.stack(
            [_cam_T_ego(yaw) for yaw in np.radians([55, 0, -55, 110, 180, -110])]
        ),
        "ego_T_lidar": _EGO_T_LIDAR,
        "global_T_ego": np.eye(4),
        **pack_images([_jpeg(rng, height, width) for _ in range(6)]),
    }


def _lidar(rng, points, hw, dim):
    """Classes by height, so that they can be learned; random tokens; superpixels in a grid."""
    height = np.digitize(points[:, 2], np.quantile(points[:, 2], [0.3, 0.6]))
    v, u = np.indices(hw)
    return {
        "lidarseg": np.array([24, 28, 17])[height],
        "lidarseg_left_out": rng.integers(0, 5, len(CATEGORIES)),
        "tokens": rng.integers(-127, 128, (6, *TOKEN_HW, dim)),
        "token_scale": rng.uniform(0.01, 0.02, (6, *TOKEN_HW)),
        "superpixels": np.tile(v // 16 * 6 + u // 16, (6, 1, 1)),
    }


def _map(grid, rng):
    """A strip across the BEV for each class; the last is empty in half of the frames."""
    x, y = grid.bev_centres()
    direction = rng.uniform(-3, 3, len(MAP_CLASSES))[:, None, None]
    across = np.cos(direction) * x[:, None] + np.sin(direction) * y
    masks = np.abs(across - rng.uniform(-4, 4)) < rng.uniform(1, 4)
    masks[-1] &= rng.random() < 0.5
    return masks.astype(np.uint8)


def _cam_T_ego(yaw):
    """A camera 1.5 m above ego's origin that looks along ``yaw``."""
    forward = np.array([np.cos(yaw), np.sin(yaw), 0])
    right, down = np.array([np.sin(yaw), -np.cos(yaw), 0]), np.array([0, 0, -1.0])
    cam_T_ego = np.eye(4)
    cam_T_ego[:3, :3] = [right, down, forward]
    cam_T_ego[:3, 3] = -cam_T_ego[:3, :3] @ (0, 0, 1.5)
    return cam_T_ego


def _jpeg(rng, height, width):

    small = rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return encode_jpeg(Image.fromarray(small).resize((width, height)), 95)
