"""Whole keyframes against the naive loop of `reference`: voxels, cameras, features, sweeps.

The teachers here know nothing of the image: their features are functions of the camera and of the
centre of each cell, so that the loop can be given the very same maps.
"""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import reference
import torch
from conftest import targets_of
from PIL import Image

from occfeat_targets.build import read_dataset
from occfeat_targets.config import TargetsConfig
from occfeat_targets.frame import layout_of
from occfeat_targets.outputs.base import FrameInputs
from occfeat_targets.store.schema import dequantise
from occfeat_targets.teachers.base import NoTeacher

DIM = 12
KINDS = ("linear", "product", "sinusoid", "noise")
ROWS, COLUMNS = 252 // 14, 448 // 14

PAPER = ("grid.z=[-5,5,8]", "lidar.near_m=0")
DEFAULT = ()
# No two axes alike, and not centred on the car.
UNEVEN = ("grid.x=[-40,48,110]", "grid.y=[-32,30,93]", "grid.z=[-2,6,7]", "lidar.near_m=1.7")


def analytic(kind, x, y):
    """Features (6, DIM, ...) of each camera at relative image positions x = u / W, y = v / H."""
    a, b, c, d = np.random.default_rng(1).uniform(-1, 1, (4, 6, DIM) + (1,) * np.ndim(x))
    if kind == "linear":
        return 0.5 * a + b * x + c * y
    if kind == "product":
        return 0.5 * a + b * x + c * y + 3 * d * x * y
    return a + np.sin(2 * np.pi * (3 * b * x + 3 * c * y + d))


def feature_maps(kind):
    """float64 (6, DIM, ROWS, COLUMNS), of values that float32 holds exactly."""
    x, y = (np.arange(COLUMNS) + 0.5) / COLUMNS, (np.arange(ROWS) + 0.5) / ROWS
    if kind == "noise":
        maps = np.random.default_rng(2).normal(size=(6, DIM, ROWS, COLUMNS)) * 50
    else:
        maps = analytic(kind, *np.meshgrid(x, y))
    return maps.astype(np.float32).astype(np.float64)


class Analytic:
    """Plug-in teacher; camera c is image c of the batch."""

    dim = DIM
    patch_size = 14

    def __init__(self, kind):
        self.name = kind
        self.images = None

    def __call__(self, images):
        assert images.shape == (6, 3, 252, 448)
        self.images = images
        return torch.from_numpy(feature_maps(self.name)).float()


@cache
def read(dataroot, overrides, sweeps):
    config = TargetsConfig.load(None, ["map.mode=never", f"lidar.sweeps={sweeps}", *overrides])
    return config, read_dataset(dataroot, None, config)


def read_lidar(dataset, number, config, near_m=2.2):
    layout = layout_of(config, vars(dataset), 0)
    return FrameInputs(dataset.records[number], layout, near_m, NoTeacher(), (1, 1)).lidar


@cache
def tables(dataroot):
    return reference.Tables(dataroot)


@cache
def naive(dataroot, token, overrides, sweeps):
    """The loop's (bits, mean of the maps of all kinds one after another) of each voxel."""
    config, _ = read(dataroot, overrides, sweeps)
    bounds = (config.grid.x, config.grid.y, config.grid.z)
    maps = np.concatenate([feature_maps(kind) for kind in KINDS], axis=1)
    near_m = config.lidar.near_m
    return reference.targets(tables(dataroot), token, bounds, near_m, maps, sweeps)


def assert_targets_are_the_loops(dataroot, number, overrides, kind, sweeps=1):
    config, dataset = read(dataroot, overrides, sweeps)
    record = dataset.records[number]
    wanted = naive(dataroot, record.token, overrides, sweeps)
    found = targets_of(record, dataset, config, Analytic(kind))
    assert found["voxel_index"].dtype == np.uint32
    assert found["voxel_index"].tolist() == sorted(wanted)
    bits = np.array([wanted[index][0] for index in sorted(wanted)])
    np.testing.assert_array_equal(found["feature_cameras"], bits)
    assert len({int(b) for b in bits}) > 6  # every camera, and pairs of them
    seen = bits > 0

    codes, scale = found["features"], found["feature_scale"]
    assert (codes.dtype, scale.dtype) == (np.int8, np.float16)
    assert (codes[~seen] == 0).all()
    assert (scale[~seen] == 0).all()

    part = slice(KINDS.index(kind) * DIM, (KINDS.index(kind) + 1) * DIM)
    mean = np.array([wanted[index][1][part] for index in sorted(wanted) if wanted[index][0]])
    stored = dequantise(codes[seen], scale[seen]).astype(np.float64)
    lengths = np.linalg.norm(stored, axis=1) * np.linalg.norm(mean, axis=1)
    assert ((stored * mean).sum(axis=1) / lengths).min() >= 0.9995
    step = scale[seen].astype(np.float64)[:, None]
    peak = np.abs(mean).max(axis=1, keepdims=True)
    float32_slack = 2e-6 * peak + 1e-6 * np.abs(feature_maps(kind)).max()
    assert (np.abs(stored - mean) <= step / 2 + float32_slack).all()
    assert (step <= peak / 127 * 1.001 + 1e-6).all()
    return found, bits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overrides", [PAPER, DEFAULT, UNEVEN], ids=["paper", "default", "uneven"])
def test_real_keyframe_is_the_loops(nuscenes_one, overrides, kind):
    assert_targets_are_the_loops(nuscenes_one, 0, overrides, kind)


def test_real_keyframe_has_the_published_counts(nuscenes_one):
    config, dataset = read(nuscenes_one, PAPER, 1)
    (record,) = dataset.records
    found = targets_of(record, dataset, config, Analytic("linear"))
    cameras = np.unpackbits(found["feature_cameras"][:, None], axis=1).sum(axis=1)
    assert len(found["voxel_index"]) == 4267
    shares = 100 * np.bincount(cameras.astype(int)) / 4267
    assert np.round(shares, 1).tolist() == [5.9, 81.7, 12.4]


@pytest.mark.parametrize("kind", ["linear", "product"])
def test_real_features_follow_the_projection_with_no_bilinear_code_at_all(nuscenes_one, kind):
    # Between the outer cell centres, bilinear sampling of a bilinear function is the function.
    config, dataset = read(nuscenes_one, DEFAULT, 1)
    (record,) = dataset.records
    found = targets_of(record, dataset, config, Analytic(kind))
    cameras = reference.camera_list(tables(nuscenes_one), record.token)
    bounds = (config.grid.x, config.grid.y, config.grid.z)
    n_checked = 0
    for index, code, scale in zip(
        found["voxel_index"], found["features"], found["feature_scale"], strict=True
    ):
        iz, ix, iy = np.unravel_index(index, (8, 200, 200))
        xyz = reference.centre((ix, iy, iz), bounds)
        vectors, inner = [], True
        for c, (cam_T_ego, K, width, height) in enumerate(cameras):
            uv = reference.project(xyz, cam_T_ego, K, width, height)
            if uv is not None:
                x, y = uv[0] / width, uv[1] / height
                inner &= 0.5 / COLUMNS <= x <= 1 - 0.5 / COLUMNS
                inner &= 0.5 / ROWS <= y <= 1 - 0.5 / ROWS
                vectors.append(analytic(kind, x, y)[c])
        if vectors and inner:
            n_checked += 1
            error = np.abs(code * float(scale) - sum(vectors) / len(vectors)).max()
            assert error <= float(scale) / 2 + 1e-5
    assert n_checked > 3000


def assert_teacher_sees_the_cameras(dataroot, number):
    """RGB in 0..1, each image at its own camera's place, resized and not cropped."""
    config, dataset = read(dataroot, DEFAULT, 1)
    teacher, token = Analytic("linear"), dataset.records[number].token
    targets_of(dataset.records[number], dataset, config, teacher)
    assert teacher.images.dtype == torch.float32
    for c, name in enumerate(reference.CAMERAS):
        row = tables(dataroot).data[token, "CAM_" + name]
        image = Image.open(tables(dataroot).root / row["filename"]).convert("RGB")
        wanted = np.asarray(image.resize((448, 252), Image.Resampling.BOX), dtype=np.float64) / 255
        wanted = torch.from_numpy(wanted).permute(2, 0, 1)
        distance = (teacher.images - wanted).abs().mean(dim=(1, 2, 3))
        assert distance[c] < 0.03
        assert distance[c] * 3 < np.delete(distance.numpy(), c).min()
        for other in (wanted.flip(0), wanted.flip(1), wanted.flip(2)):
            assert distance[c] < (teacher.images[c] - other).abs().mean()


def test_teacher_sees_the_real_cameras_in_order(nuscenes_one):
    assert_teacher_sees_the_cameras(nuscenes_one, 0)


def test_teacher_sees_the_demo_cameras_in_order(demo_root):
    assert_teacher_sees_the_cameras(demo_root, 1)


@pytest.mark.parametrize("sweeps", [1, 2])
@pytest.mark.parametrize("overrides", [DEFAULT, UNEVEN], ids=["default", "uneven"])
@pytest.mark.parametrize("number", range(4))
def test_demo_keyframe_is_the_loops(demo_root, number, overrides, sweeps):
    kind = KINDS[number]
    assert_targets_are_the_loops(demo_root, number, overrides, kind, sweeps)


@pytest.mark.parametrize("fixture", ["demo_root", "nuscenes_one"])
def test_record_poses_are_the_loops(fixture, request):
    dataroot = request.getfixturevalue(fixture)
    for record in read(dataroot, DEFAULT, 1)[1].records:
        lidar = tables(dataroot).data[record.token, "LIDAR_TOP"]
        ego_T_sensor = tables(dataroot).ego_T_sensor(lidar)
        np.testing.assert_allclose(record.ego_T_sweep, ego_T_sensor[None], atol=1e-9)
        np.testing.assert_allclose(
            record.global_T_ego, tables(dataroot).global_T_ego(lidar), atol=1e-9
        )
        for c, (cam_T_ego, K, width, height) in enumerate(
            reference.camera_list(tables(dataroot), record.token)
        ):
            np.testing.assert_allclose(record.cam_T_ego[c], cam_T_ego, atol=1e-9)
            np.testing.assert_array_equal(record.K[c], K)
            assert record.image_hw[c] == (height, width)


def test_world_moves_between_lidar_and_cameras_and_between_keyframes(demo_root):
    # Without this the demo world could not tell a pose at the wrong time from the right one.
    drift = []
    for record in read(demo_root, DEFAULT, 1)[1].records:
        lidar = tables(demo_root).data[record.token, "LIDAR_TOP"]
        here = tables(demo_root).global_T_ego(lidar)[:3, 3]
        for name in reference.CAMERAS:
            row = tables(demo_root).data[record.token, "CAM_" + name]
            drift.append(np.linalg.norm(tables(demo_root).global_T_ego(row)[:3, 3] - here))
    assert max(drift) > 0.05
    moved = [
        np.linalg.norm(b.global_T_ego[:3, 3] - a.global_T_ego[:3, 3])
        for a, b in pairwise(read(demo_root, DEFAULT, 1)[1].records)
        if a.scene == b.scene
    ]
    assert max(moved) > 0.5


def test_second_sweep_is_the_keyframe_before(demo_root):
    (config, first), (_, both) = (read(demo_root, DEFAULT, sweeps) for sweeps in (1, 2))
    one = first.records
    for number, (short, long) in enumerate(zip(one, both.records, strict=True)):
        points, intensity = read_lidar(both, number, config)
        wanted = reference.points_ego(tables(demo_root), long.token, 2.2, 2)
        np.testing.assert_allclose(points, wanted, atol=1e-9)
        assert len(intensity) == len(points)
        first_of_scene = number == 0 or one[number - 1].scene != short.scene
        n_sweeps = 1 if first_of_scene else 2
        assert len(long.sweep_paths) == n_sweeps
        assert (len(points) > len(read_lidar(first, number, config)[0])) == (n_sweeps == 2)


@pytest.mark.parametrize("near_m", [0.0, 2.2, 5.0])
def test_near_filter_is_a_square_in_the_sensor_frame(nuscenes_one, near_m):
    config, dataset = read(nuscenes_one, DEFAULT, 1)
    points, _ = read_lidar(dataset, 0, config, near_m)
    wanted = reference.points_ego(tables(nuscenes_one), dataset.records[0].token, near_m)
    np.testing.assert_allclose(points, wanted, atol=1e-9)
    dropped = {0.0: 0.0, 2.2: 0.25, 5.0: 0.4}[near_m]  # a quarter of all returns hit the car
    everything = len(read_lidar(dataset, 0, config, 0.0)[0])
    assert 1 - len(points) / everything >= dropped * 0.8
