"""One keyframe to its arrays: a pure function, no cluster and no store.

In a notebook: ``frame_targets(record, config, load_teacher(config.teacher))``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from occfeat_targets.config import TargetsConfig
from occfeat_targets.corruptions import corrupt
from occfeat_targets.geometry import transform
from occfeat_targets.images import ImageError, decode_jpeg, encode_jpeg, resize
from occfeat_targets.labels import map_masks, vehicle_boxes, vehicle_masks
from occfeat_targets.map_layers import load_map
from occfeat_targets.records import FrameError, FrameRecord
from occfeat_targets.sampling import camera_bits, quantise, sample_mean, see
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.schema import CAMERAS, image_room, point_step_m
from occfeat_targets.teacher import NoTeacher, Teacher, dense_features


def frame_targets(
    record: FrameRecord, config: TargetsConfig, teacher: Teacher
) -> dict[str, np.ndarray]:
    """Everything the store holds of one frame that is not in its record.

    Returns:
        By the names, dtypes and axes of ``schema.array_specs``, trimmed to what is valid:
        ``voxel_index`` (V,), ``feature_cameras`` (V,), ``images`` (bytes,), ``image_offset``
        (7,), ``points`` (P, 4), ``vehicle_boxes`` (n, 8), ``vehicle`` and ``vehicle_visible``
        (X, Y); ``features`` (V, C) and ``feature_scale`` (V,) unless the teacher is ``none``; and
        ``map`` (5, X, Y) if the record has a map.

    Raises:
        FrameError: naming scene, sample and file, when the frame can't be processed.
    """
    try:
        points, intensity = read_lidar(record, config.lidar.near_m)
        teacher_images, jpegs = camera_images(record, config)
        voxels = voxel_targets(record, config, teacher, points, teacher_images)
        packed = pack_points(points, intensity, config.grid)
        room = config.lidar.max_points * config.lidar.sweeps
        _require_room(len(packed), room, "lidar returns", "raise lidar.max_points")
        images = pack_images(jpegs)
        room = image_room(config.images.size)
        _require_room(len(images["images"]), room, "bytes of JPEG", "lower images.quality")
        return voxels | {"points": packed} | images | bev_labels(record, config)
    except (ImageError, ValueError) as error:
        raise FrameError(f"{record}: {error}") from error


def read_lidar(record: FrameRecord, near_m: float) -> tuple[np.ndarray, np.ndarray]:
    """Lidar returns of all sweeps of a record.

    Returns:
        ``(xyz, intensity)``: float64 (M, 3) metres in the ego frame, and float32 (M,) 0..255.

    Raises:
        ValueError: naming the file, when it is missing, truncated or holds NaN or infinity.
    """
    xyz_ego, intensity = [], []
    for path, ego_T_sensor in zip(record.sweep_paths, record.ego_T_sweep, strict=True):
        try:
            raw = np.fromfile(path, dtype="<f4")
        except OSError as error:
            raise ValueError(f"{path}: cannot read the lidar file: {error.strerror}") from error
        if raw.size == 0 or raw.size % 5 or Path(path).stat().st_size % 20:
            raise ValueError(f"{path} is truncated: its size is not a multiple of 20 bytes")
        rows = raw.reshape(-1, 5)
        bad = np.count_nonzero(~np.isfinite(rows[:, :4]).all(axis=1))
        if bad:
            raise ValueError(f"{path} has {bad} points with NaN or infinite coordinates")
        near = (np.abs(rows[:, :2]) < near_m).all(axis=1)
        rows = rows[~near]
        xyz_ego.append(transform(ego_T_sensor, rows[:, :3]))
        intensity.append(rows[:, 3])
    return np.concatenate(xyz_ego), np.concatenate(intensity)


def camera_images(
    record: FrameRecord, config: TargetsConfig
) -> tuple[list[Image.Image], list[bytes]]:
    """Decode each camera's JPEG once, for the teacher and for the store.

    A corruption is laid on the store's, at full size; the teacher sees the clean image. A store
    without corruption decodes at a fraction of the size where that is enough: on a real keyframe
    its images differ by 0.4 of 255 levels from those resized from full size.

    Returns:
        RGB images of ``teacher.input_size`` (none for no teacher) and JPEGs of ``images.size``,
        one per camera.

    Raises:
        ImageError: naming the file, when it is missing or damaged.
    """
    for_teacher, stored = [], []
    (a, b), (c, d) = config.teacher.input_size, config.images.size
    name, seed = config.images.corruption, config.images.corruption_seed
    for camera, path, full in zip(CAMERAS, record.image_paths, record.image_hw, strict=True):
        corrupted = name != "none"
        image = decode_jpeg(Path(path), full if corrupted else (max(a, c), max(b, d)))
        if config.teacher.name != NoTeacher.name:
            for_teacher.append(resize(image, config.teacher.input_size))
        if corrupted:
            levels = corrupt(np.asarray(image), name, record.token, camera, seed)
            image = Image.fromarray(levels)
        stored.append(encode_jpeg(resize(image, config.images.size), config.images.quality))
    return for_teacher, stored


def voxel_targets(
    record: FrameRecord,
    config: TargetsConfig,
    teacher: Teacher,
    xyz_ego: np.ndarray,
    images: list[Image.Image],
) -> dict[str, np.ndarray]:
    """Occupied voxels and their mean teacher feature (paper §3.3), quantised.

    Args:
        record: the frame's calibration.
        config: grid and teacher input size.
        teacher: see ``teacher``.
        xyz_ego: float64 (M, 3), metres, ego frame.
        images: one per camera, RGB of ``teacher.input_size``.

    Returns:
        ``voxel_index`` uint32 (V,), ``feature_cameras`` uint8 (V,), and, if the teacher has
        channels, ``features`` int8 (V, C) and ``feature_scale`` float16 (V,).

    Raises:
        ValueError: features are not finite. TeacherError: they have the wrong shape.
    """
    voxel_index = config.grid.occupied(xyz_ego)
    position, valid = see(
        config.grid.centres(voxel_index), record.K, record.cam_T_ego, np.array(record.image_hw)
    )
    targets = {"voxel_index": voxel_index, "feature_cameras": camera_bits(valid)}
    if teacher.dim == 0:
        return targets
    features = dense_features(teacher, images, config.teacher.input_size)
    codes, scale = quantise(sample_mean(features, position, valid))
    return targets | {"features": codes, "feature_scale": scale}


def bev_labels(record: FrameRecord, config: TargetsConfig) -> dict[str, np.ndarray]:
    """Vehicle boxes and BEV masks, and map masks if the record has a map.

    Returns:
        ``vehicle_boxes`` float32 (n, 8), ``vehicle`` and ``vehicle_visible`` uint8 (X, Y), and
        ``map`` uint8 (5, X, Y); ego frame, see ``labels``.

    Raises:
        ValueError: more vehicles than there is room for.
    """
    boxes = vehicle_boxes(record.boxes)
    room = config.labels.max_vehicles
    _require_room(len(boxes), room, "vehicles", "raise labels.max_vehicles")
    vehicle, visible = vehicle_masks(boxes, config.grid)
    labels = {"vehicle_boxes": boxes, "vehicle": vehicle, "vehicle_visible": visible}
    if record.map_path:
        layers = load_map(record.map_path)
        labels["map"] = map_masks(
            layers, record.global_T_ego, config.labels.divider_width_m, config.grid
        )
    return labels


def pack_points(xyz_ego: np.ndarray, intensity: np.ndarray, grid: VoxelGrid) -> np.ndarray:
    """Points as int16 (P, 4): x, y, z in steps of ``point_step_m(grid)``, and intensity.

    Returns farther than 32767 steps on any axis are left out: they lie outside the grid (not of
    every turned one: the trainer's rotation may miss a few at its corners).
    """
    steps = np.rint(xyz_ego / point_step_m(grid))
    fits = (np.abs(steps) <= 32767).all(axis=1)
    return np.column_stack([steps[fits], np.rint(intensity[fits])]).astype(np.int16)


def pack_images(jpegs: list[bytes]) -> dict[str, np.ndarray]:
    """JPEGs one after another as uint8 (bytes,), with int32 (N + 1,) offsets."""
    offset = np.cumsum([0, *map(len, jpegs)], dtype=np.int32)
    return {"images": np.frombuffer(b"".join(jpegs), dtype=np.uint8), "image_offset": offset}


def _require_room(n: int, room: int, what: str, advice: str) -> None:
    if n > room:
        raise ValueError(f"{n} {what}, the store has room for {room}: {advice}")
