"""Lidar returns to rows of a network, against loops over points."""

import numpy as np
import pytest

from occfeat_targets.store.files import StoreError
from occfeat_targets.store.settings import ConfigError
from occfeat_train.data.cloud import (
    CloudWork,
    draw_motion,
    in_cameras,
    move,
    nearest_to_one,
    neighbours,
    plane_cells,
    voxelise,
)
from occfeat_train.data.dataset import FrameDataset
from occfeat_train.models.lidar_settings import LidarSettings

SMALL = LidarSettings(size="2-8", reach_m=(8.0, 8.0, 4.0), cell_m=1.0, neighbours=4, max_rows=100)
ARRAYS = ("points", "ego_T_lidar", "lidarseg")


def cloud(n=50, seed=0):
    return np.random.default_rng(seed).uniform(-3, 3, (n, 3))


def work(training=True, one_camera=False, settings=SMALL, seed=0):
    return CloudWork(settings, 0.002, (64, 96), seed, training, one_camera)


def test_voxelise_keeps_the_first_of_each_cube_in_the_order_asked():
    xyz, order = cloud(200), np.random.default_rng(1).permutation(200)
    kept, seen = [], set()
    low = xyz.min(axis=0)
    for i in order:
        cube = tuple(np.floor((xyz[i] - low) / 0.7).astype(int))
        if cube not in seen:
            seen.add(cube)
            kept.append(i)
    assert voxelise(xyz, 0.7, order).tolist() == sorted(kept)
    assert len(kept) < 200
    assert voxelise(xyz[:0], 0.7, order[:0]).tolist() == []


def test_neighbours_are_the_nearest_others():
    xyz = cloud()
    found = neighbours(xyz, 5)
    for i, row in enumerate(found):
        distance = np.linalg.norm(xyz - xyz[i], axis=1)
        others = [j for j in np.argsort(distance, kind="stable") if j != i][:5]
        assert row.tolist() == others


def test_neighbours_of_points_at_one_place_are_each_other():
    xyz = np.repeat([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]], [4, 3], axis=0)
    found = neighbours(xyz, 2)
    assert found.shape == (7, 2)
    for i, row in enumerate(found):
        assert i not in row and len({*row}) == 2
        assert all((xyz[j] == xyz[i]).all() for j in row)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_points_have_themselves_as_further_neighbours(n):
    found = neighbours(cloud(n), 4)
    for i, row in enumerate(found):
        assert sorted({*row.tolist()} - {i}) == [j for j in range(n) if j != i]
        assert (row[n - 1 :] == i).all()


def test_cells_are_half_open():
    settings = LidarSettings(reach_m=(8.0, 8.0, 4.0), cell_m=0.5)
    assert settings.cells == (32, 32, 16)
    xyz = np.array([[-8.0, -8.0, -4.0], [7.999, 7.999, 3.999], [0.0, -0.001, 0.5]])
    # Cells (0, 0, 0), (31, 31, 15) and (16, 15, 9) on planes 32 x 32, 32 x 16 and 32 x 16.
    wanted = [[0, 0, 0], [1023, 511, 511], [16 * 32 + 15, 16 * 16 + 9, 15 * 16 + 9]]
    assert plane_cells(xyz, settings).tolist() == wanted


def test_the_limit_keeps_those_nearest_to_one_point():
    xyz = cloud(80)
    kept = nearest_to_one(xyz, 20, np.random.default_rng(3))
    assert len(kept) == 20 and (np.diff(kept) > 0).all()
    radii = [np.linalg.norm(xyz[kept] - xyz[i], axis=1).max() for i in kept]
    rest = np.setdiff1d(np.arange(80), kept)
    nearer = [np.linalg.norm(xyz[rest] - xyz[i], axis=1).min() for i in kept]
    assert any(r < n for r, n in zip(radii, nearer, strict=True))
    assert nearest_to_one(xyz, 80, np.random.default_rng(3)).tolist() == [*range(80)]


def test_motions_turn_mirror_and_scale_alike_everywhere():
    rng, signs = np.random.default_rng(0), set()
    for _ in range(200):
        motion = draw_motion(SMALL, rng)[:3, :3]
        factor = np.cbrt(abs(np.linalg.det(motion)))
        assert 0.9 <= factor <= 1.1
        np.testing.assert_allclose(motion @ motion.T, factor**2 * np.eye(3), atol=1e-9)
        assert motion[2].tolist() == pytest.approx([0, 0, factor])
        signs.add(np.sign(np.linalg.det(motion)))
    assert signs == {1.0, -1.0}
    still = SMALL.with_(rotate_deg=0, flip=False, scale=(1.0, 1.0))
    np.testing.assert_array_equal(draw_motion(still, rng), np.eye(4))


def test_a_cloud_without_a_row_in_reach_is_said_so(tiny_lidar_store):
    near = SMALL.with_(reach_m=(0.01, 0.01, 0.01))
    with pytest.raises(StoreError, match=r"frame 2: none of its 300 lidar returns lies within"):
        frames(tiny_lidar_store, training=False, settings=near)[2]
    assert len(frames(tiny_lidar_store, settings=near)[2]["row_point"]) == 0


def test_of_a_frame_without_a_return_nothing_is_left(tiny_lidar_store):
    data = frames(tiny_lidar_store)
    sample = {name: data[0][name] for name in ("frame", *data.names)}
    sample["points"] = sample["points"][:0]
    for training in (True, False):
        made = work(training).sample(sample, 0)
        assert made["row_features"].shape == (0, 5) and made["row_neighbours"].shape == (0, 4)
    assert made["nearest_row"].shape == (0,)


@pytest.mark.parametrize("one_camera", [False, True])
def test_rows_are_those_of_the_loop_over_returns(tiny_lidar_store, one_camera):
    """Nothing random but the camera: a return is a row if it is the first of its cube, the camera
    sees it, and it is within reach; also right on the border."""
    still = SMALL.with_(voxel_m=0.5, reach_m=(6.0, 5.0, 2.0))
    data = frames(tiny_lidar_store, training=False, one_camera=one_camera, settings=still)
    for index in range(3):
        sample = data[index]
        pose = np.linalg.inv(sample["ego_T_lidar"].astype(np.float64))
        xyz = sample["points"][:, :3] * 0.002 @ pose[:3, :3].T + pose[:3, 3]
        low, seen, rows = xyz.min(axis=0), set(), []
        for i, point in enumerate(xyz):
            cube = tuple(np.floor((point - low) / 0.5).astype(int))
            first, in_view = cube not in seen, True
            seen.add(cube)
            if one_camera:
                c, ego = sample["camera"], sample["points"][i, :3] * 0.002
                x, y, depth = sample["cam_T_ego"][c][:3, :3] @ ego + sample["cam_T_ego"][c][:3, 3]
                K = sample["K"][c]
                in_view = depth > 1
                in_view &= 0 <= K[0, 0] * x / depth + K[0, 2] < 96
                in_view &= 0 <= K[1, 1] * y / depth + K[1, 2] < 64
            inside = all(-r <= p < r for p, r in zip(point, still.reach_m, strict=True))
            if first and in_view and inside:
                rows.append(i)
        assert sample["row_point"].tolist() == rows
        assert 5 < len(rows) < 250


def frames(store, **options):
    return FrameDataset(store, range(4), ARRAYS, work=work(**options))


def test_rows_are_the_stored_returns_in_the_clouds_frame(tiny_lidar_store):
    data = frames(tiny_lidar_store)
    sample = data[4 + 2]  # of epoch 1
    xyz_ego = sample["points"][sample["row_point"], :3] * 0.002
    xyz = move(sample["cloud_T_ego"].astype(np.float64), xyz_ego)
    features = sample["row_features"]
    np.testing.assert_allclose(features[:, 1:4], xyz, atol=1e-4)
    np.testing.assert_allclose(features[:, 4], np.linalg.norm(xyz, axis=1), atol=1e-4)
    intensity = sample["points"][sample["row_point"], 3]
    np.testing.assert_allclose(features[:, 0] * 22.04632 + 18.742355, intensity, atol=1e-3)
    assert len(features) <= 100 and (np.abs(xyz) <= SMALL.reach_m).all()


def test_draws_follow_seed_epoch_and_frame_alone(tiny_lidar_store):
    data = frames(tiny_lidar_store)
    once, again, later = data[2], data[2], data[4 + 2]
    for name in ("row_point", "row_features", "cloud_T_ego", "seed"):
        assert np.array_equal(once[name], again[name]), name
        assert not np.array_equal(once[name], later[name]), name
    other = frames(tiny_lidar_store, seed=1)[2]
    assert not np.array_equal(once["cloud_T_ego"], other["cloud_T_ego"])


def test_outside_of_training_nothing_is_random_and_every_return_has_a_row(tiny_lidar_store):
    data = frames(tiny_lidar_store, training=False)
    sample, later = data[1], data[4 + 1]
    assert np.array_equal(sample["row_features"], later["row_features"])
    lidar_T_ego = np.linalg.inv(sample["ego_T_lidar"].astype(np.float64))
    np.testing.assert_allclose(sample["cloud_T_ego"], lidar_T_ego, atol=1e-6)
    xyz = move(lidar_T_ego, sample["points"][:, :3] * 0.002)
    rows = sample["row_features"][:, 1:4].astype(np.float64)
    for point, row in zip(xyz, sample["nearest_row"], strict=True):
        distance = np.linalg.norm(rows - point, axis=1)
        assert distance[row] <= distance.min() + 1e-5


def test_one_camera_keeps_what_it_sees(tiny_lidar_store):
    data = frames(tiny_lidar_store, one_camera=True)
    cameras = set()
    for index in range(12):
        sample = data[index]
        camera = sample["camera"]
        cameras.add(camera)
        K, pose = sample["K"][camera], sample["cam_T_ego"][camera]
        for point in sample["points"][sample["row_point"], :3] * 0.002:
            x, y, depth = pose[:3, :3] @ point + pose[:3, 3]
            u, v = K[0, 0] * x / depth + K[0, 2], K[1, 1] * y / depth + K[1, 2]
            assert depth > 1 and 0 <= u < 96 and 0 <= v < 64
    assert len(cameras) > 2


def test_a_cloud_that_no_camera_sees_stays_whole(tiny_lidar_store):
    data = frames(tiny_lidar_store)
    sample = {name: data[0][name] for name in ("frame", *data.names)}
    sample["cam_T_ego"] = sample["cam_T_ego"] * np.array([1, 1, -1, 1])[:, None]  # mirrored
    sample["cam_T_ego"][:, 2, 3] = -100
    made = work(one_camera=True).sample(sample, 0)
    assert made["camera"] == -1 and len(made["row_point"]) > 20


def test_in_cameras_wants_a_metre_of_depth():
    K, pose = np.array([[[60.0, 0, 48], [0, 60, 32], [0, 0, 1]]]), np.eye(4)[None]
    xyz = np.array([[0, 0, 1.0], [0, 0, 1.01], [0, 0, -5.0], [10, 0, 2.0], [-0.8, 0, 1.01]])
    assert in_cameras(xyz, K, pose, (64, 96))[0].tolist() == [False, True, False, False, True]


def test_a_batch_is_its_frames_one_after_another(tiny_lidar_store):
    data = frames(tiny_lidar_store, training=False)
    samples = [data[i] for i in (3, 0)]
    batch = data.collate(samples)
    first_row, first_point = len(samples[0]["row_point"]), len(samples[0]["points"])
    assert batch["n_rows"].tolist() == [len(s["row_point"]) for s in samples]
    second = slice(first_row, None)
    assert (batch["row_point"][second].numpy() - first_point).tolist() == samples[1][
        "row_point"
    ].tolist()
    np.testing.assert_array_equal(
        batch["row_neighbours"][second].numpy() - first_row, samples[1]["row_neighbours"]
    )
    x, y, z = SMALL.cells
    planes = np.array([x * y, x * z, y * z])
    np.testing.assert_array_equal(
        batch["row_cells"][second].numpy() - planes, samples[1]["row_cells"]
    )
    np.testing.assert_array_equal(
        batch["nearest_row"][first_point:].numpy() - first_row, samples[1]["nearest_row"]
    )
    assert len(batch["lidarseg"]) == len(batch["points"]) == len(batch["nearest_row"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"size": "48"}, "LAYERS-CHANNELS"), ({"scale": [1.1, 0.9]}, "low, high")],
)
def test_impossible_settings(settings, said):
    with pytest.raises(ConfigError, match=said):
        LidarSettings.of(settings)
