"""Training targets in a turned BEV frame, on the real keyframe and on made-up boxes."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
import train_reference as reference
from conftest import build_store

from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import open_store
from occfeat_train.augment import Draws, network_inputs
from occfeat_train.geometry import flat_index
from occfeat_train.models.lifts.simplebev import SimpleBEVLift
from occfeat_train.objectives.occfeat import voxel_targets
from occfeat_train.tasks.vehicle import vehicle_targets

GRID = VoxelGrid()  # the stores' own: the tests below that use them check it
BOUNDS = reference.bounds_of(GRID)
STEP_M = 0.002
FLOAT32_M = 5e-5
"""How far float32 may be off, 50 m away, after a rotation."""


@pytest.fixture(scope="module")
def real(nuscenes_one, tmp_path_factory):
    """The real keyframe with the default configuration."""
    path = tmp_path_factory.mktemp("targets") / "one.zarr"
    build_store(nuscenes_one, path, "map.mode=auto")
    return checked_frames(path)[0]


@pytest.fixture(scope="module")
def demo(demo_store):
    """The demo frames."""
    return checked_frames(demo_store)


def checked_frames(path):
    store = open_store(path)
    assert store.grid == GRID and store.attrs["point_step_m"] == STEP_M
    return [reference.with_vehicles(store.frame(i), store.attrs) for i in range(len(store))]


def with_random_features(frame, seed=0):
    """The frame with features that no two voxels share, so that a wrong source shows."""
    rng = np.random.default_rng(seed)
    n, c = frame["features"].shape
    return frame | {
        "features": rng.integers(-127, 128, (n, c)).astype(np.int8),
        "feature_scale": rng.uniform(0.1, 10, n).astype(np.float16),
    }


def targets_of(frames, angles):
    return voxel_targets(
        reference.collated(frames, GRID.n_voxels), torch.tensor(angles), GRID, STEP_M
    )


def vehicle_maps(batch, angle, grid):
    return vehicle_targets(batch["vehicles"], batch["n_vehicles"], angle, grid)


def around(point):
    """Voxels a point may lie in if float32 is a bit off."""
    shifts = np.stack(np.meshgrid(*[(-FLOAT32_M, FLOAT32_M)] * 3), -1).reshape(-1, 3)
    found = {reference.voxel_of(np.add(point, shift), BOUNDS) for shift in shifts}
    return found - {None}


def naive_voxel_targets(frame, angle):
    """The stored points, turned and voxelised one by one.

    Returns:
        Voxels that hold a point for certain; voxels that may, or whose points' old voxels are in
        doubt; and the summed features of each voxel's points that have any.
    """
    row = {int(v): i for i, v in enumerate(frame["voxel_index"])}
    features = frame["features"].astype(float) * frame["feature_scale"].astype(float)[:, None]
    angle = float(np.float32(angle))
    certain, doubtful, summed = set(), set(), defaultdict(float)
    for step in frame["points"][:, :3].tolist():
        point = [s * STEP_M for s in step]
        moved = reference.turn(point, angle)
        if reference.border_distance(moved, BOUNDS) < FLOAT32_M:
            doubtful |= around(moved)
            continue
        voxel = reference.voxel_of(moved, BOUNDS)
        if voxel is None:
            continue
        certain.add(voxel)
        if reference.border_distance(point, BOUNDS) < FLOAT32_M:
            doubtful.add(voxel)
        source = row.get(reference.voxel_of(point, BOUNDS))
        if source is not None and frame["feature_cameras"][source]:
            summed[voxel] = summed[voxel] + features[source]
    return certain, doubtful, summed


def assert_targets(targets, frame, angle, first_voxel=0):
    certain, doubtful, summed = naive_voxel_targets(frame, angle)
    voxels = (targets["voxel"] - first_voxel).tolist()
    assert len(voxels) == len(set(voxels)) and voxels == sorted(voxels)
    assert certain <= set(voxels) <= certain | doubtful
    assert len(certain) > 1000 and len(doubtful) < 0.1 * len(certain)
    n_valid = 0
    for voxel, feature, valid in zip(voxels, targets["features"], targets["valid"], strict=True):
        if voxel in doubtful:
            continue
        assert valid.item() == (voxel in summed)
        if valid:
            n_valid += 1
            a, b = feature.double().numpy(), summed[voxel]
            assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 1 - 1e-6
    assert n_valid > 1000


@pytest.mark.parametrize("angle", [0.7, -2.5, math.pi])
def test_turned_voxels_and_features_equal_the_naive_loop_on_the_real_keyframe(real, angle):
    frame = with_random_features(real)
    targets = targets_of([frame], [angle])
    assert_targets(targets, frame, angle)
    assert 0 < (~targets["valid"]).sum() < 0.2 * len(targets["valid"])


def test_every_sample_of_a_batch_is_turned_by_its_own_angle(real, demo):
    frames = [with_random_features(f, i) for i, f in enumerate((demo[0], real, demo[3]))]
    angles = [1.1, -0.3, 3.0]
    together = targets_of(frames, angles)
    sample = together["voxel"] // GRID.n_voxels
    for b, (frame, angle) in enumerate(zip(frames, angles, strict=True)):
        mine = {name: values[sample == b] for name, values in together.items()}
        assert_targets(mine, frame, angle, first_voxel=b * GRID.n_voxels)


def test_a_sample_that_is_not_turned_beside_one_that_is_keeps_its_voxels(real):
    frame = with_random_features(real)
    together = targets_of([frame, frame], [0.5, 0.0])
    mine = {name: values[together["voxel"] >= GRID.n_voxels] for name, values in together.items()}
    assert_targets(mine, frame, 0.0, first_voxel=GRID.n_voxels)
    stored = set(frame["voxel_index"].tolist())
    changed = stored ^ set((mine["voxel"] - GRID.n_voxels).tolist())
    assert len(changed) < 0.02 * len(stored)  # points moved by rounding to 2 mm


def test_without_a_turn_targets_are_what_is_stored(real, demo):
    batch = reference.collated([real, demo[1]], GRID.n_voxels)
    stored = ("voxel", "features", "feature_cameras")
    batch = {name: batch[name] for name in stored}  # points are not even read
    targets = voxel_targets(batch, torch.zeros(2), GRID, STEP_M)
    assert torch.equal(targets["voxel"], batch["voxel"].long())
    assert torch.equal(targets["features"], batch["features"])
    assert torch.equal(targets["valid"], batch["feature_cameras"] != 0)
    assert targets["valid"].any() and not targets["valid"].all()


def lonely(points, voxels, n_features=4):
    """A frame of a few points (metres) and stored voxels, all seen."""
    n = len(voxels)
    return {
        "voxel_index": np.array(voxels, dtype=np.uint32),
        "features": np.ones((n, n_features), np.int8),
        "feature_scale": np.ones(n, np.float16),
        "feature_cameras": np.ones(n, np.uint8),
        "points": np.round(np.array([[*p, 0] for p in points]) / STEP_M).astype(np.int16),
        "vehicles": np.zeros((0, 8), np.float32),
        "K": np.eye(3, dtype=np.float32)[None],
        "cam_T_ego": np.eye(4, dtype=np.float32)[None],
        "vehicle": np.zeros(GRID.bev_shape, np.uint8),
        "vehicle_visible": np.ones(GRID.bev_shape, np.uint8),
    }


def test_a_point_from_outside_the_stored_grid_occupies_its_new_voxel_without_a_feature():
    near, far = (10.1, 3.1, 0.1), (60.0, 1.0, 0.1)
    frame = lonely([near, far], [reference.voxel_of(near, BOUNDS)])
    targets = targets_of([frame], [math.pi / 4])
    moved = [reference.voxel_of(reference.turn(p, math.pi / 4), BOUNDS) for p in (near, far)]
    assert None not in moved and moved == sorted(moved)
    assert targets["voxel"].tolist() == moved
    assert targets["valid"].tolist() == [True, False]


def test_a_point_from_outside_is_turned_in_even_where_no_voxel_is_stored():
    far = (60.0, 1.0, 0.1)
    targets = targets_of([lonely([far], [])], [math.pi / 4])
    assert targets["voxel"].tolist() == [
        reference.voxel_of(reference.turn(far, math.pi / 4), BOUNDS)
    ]
    assert not targets["valid"].any()


def test_a_frame_without_points_has_no_targets():
    empty = lonely([], [])
    empty["points"] = np.zeros((0, 4), np.int16)
    targets = targets_of([empty], [0.5])
    assert targets["voxel"].shape == targets["valid"].shape == (0,)
    assert targets["features"].shape == (0, 4)


def test_voxels_of_points_equal_the_naive_floor():
    grid = VoxelGrid((-3.0, 5.0, 4), (-2.0, 2.5, 9), (0.0, 3.0, 2))
    rng = np.random.default_rng(0)
    xyz = rng.uniform([-4, -3, -1], [6, 3.5, 4], (2000, 3))
    xyz[:6] = [(-3, -2, 0), (5, 0, 1), (0, 2.5, 1), (0, 0, 3), (-3.001, 0, 1), (4.99, 2.49, 2.99)]
    index, inside = flat_index(torch.from_numpy(xyz), grid)
    expected = [reference.voxel_of(point, reference.bounds_of(grid)) for point in xyz.tolist()]
    assert inside.tolist() == [voxel is not None for voxel in expected]
    assert index[inside].tolist() == [voxel for voxel in expected if voxel is not None]
    assert 100 < inside.sum() < 1900


# --- consistency of cameras, voxels, vehicles -----------------------------------------------------


def turned_inputs(frame, angle):
    """Network inputs of a frame without images' content, nothing but the BEV frame changed."""
    batch = reference.collated([frame], GRID.n_voxels)
    batch["images"] = torch.zeros(1, 6, 288, 512, 3, dtype=torch.uint8)
    off = torch.zeros(1, 6, dtype=torch.bool)
    still, seed = (torch.ones(1, 6), torch.zeros(1, 6, 2)), torch.zeros(1, dtype=torch.int64)
    draws = Draws(*still, off, off[:, :2], torch.tensor([angle]), seed)
    return network_inputs(batch, draws, (224, 400), 0.2)


def test_a_turned_voxel_projects_where_the_unturned_point_does(real):
    angle = 2.2
    inputs = turned_inputs(real, angle)
    rng, checked = np.random.default_rng(0), 0
    for voxel in rng.choice(GRID.n_voxels, 400, replace=False).tolist():
        in_bev = reference.voxel_centre(*reference.unflat(voxel, BOUNDS), BOUNDS)
        in_ego = reference.turn(in_bev, -angle)
        for camera in range(6):
            K = inputs["K"][0, camera].tolist()
            u, v, depth = reference.project(in_bev, K, inputs["cam_T_bev"][0, camera].tolist())
            expected = reference.project(in_ego, K, real["cam_T_ego"][camera].tolist())
            assert depth == pytest.approx(expected[2], abs=1e-4)
            if depth > 1:
                assert (u, v) == pytest.approx(expected[:2], abs=0.01, rel=1e-5)
                checked += 1
    assert checked > 500


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_permute_voxels_features_and_vehicles_alike(real, quarters):
    """Cameras, lidar and boxes turn the same way: np.rot90 takes x towards y."""
    angle = quarters * math.pi / 2
    frame = with_random_features(real)

    features = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 6, 2, 28, 50))).float()
    lift = SimpleBEVLift(GRID, 1)
    straight, turned = (turned_inputs(frame, a) for a in (0.0, angle))
    before = lift(features, straight["K"], straight["cam_T_bev"], (224, 400))
    after = lift(features, turned["K"], turned["cam_T_bev"], (224, 400))
    expected = before.rot90(quarters, dims=(2, 3))
    differs = ((after - expected).abs() > 5e-3).any(dim=1)
    assert before.any(dim=1).float().mean() > 0.9
    assert differs.float().mean() < 1e-3  # voxels at the border of an image

    volume = np.zeros(GRID.shape, dtype=int)  # row of the voxel + 1
    volume.ravel()[frame["voxel_index"]] = np.arange(len(frame["voxel_index"])) + 1
    expected = np.rot90(volume, quarters, axes=(1, 2)).ravel()
    targets = targets_of([frame], [angle])
    voxels = targets["voxel"].numpy()
    changed = set(voxels.tolist()) ^ set(np.flatnonzero(expected).tolist())
    firm = (
        {  # voxels of points that neither rounding to 2 mm nor float32 moves to another
            reference.voxel_of(reference.turn(point, angle), BOUNDS)
            for point in (frame["points"][:, :3] * STEP_M).tolist()
            if reference.border_distance(point, BOUNDS) > STEP_M
        }
        - {None}
    )
    assert not changed & firm
    assert len(firm) > 4000 and len(changed) < 0.01 * len(firm)
    # A voxel whose points all came from one voxel has that one's feature.
    same = 0
    for voxel, feature, valid in zip(voxels, targets["features"], targets["valid"], strict=True):
        source = expected[voxel] - 1
        if source >= 0 and valid and frame["feature_cameras"][source]:
            a, b = feature.double().numpy(), frame["features"][source].astype(float)
            same += a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 1 - 1e-6
    assert same > 0.9 * (targets["valid"]).sum()

    batch = reference.collated([frame], GRID.n_voxels)
    before, after = (vehicle_maps(batch, torch.tensor([a]), GRID) for a in (0.0, angle))
    assert before["vehicle"].sum() > 100
    expected = before["vehicle"].rot90(quarters, dims=(1, 2))
    assert (after["vehicle"] != expected).sum() <= 2  # cells at the edge of a footprint


# --- vehicles -------------------------------------------------------------------------------------

UNEVEN = VoxelGrid((-9.0, 14.0, 31), (-8.0, 5.0, 22), (-1.0, 1.0, 2))


def random_boxes(seed, n):
    """float32 (n, 8), inside, across and beyond the border of UNEVEN, many overlapping."""
    rng = np.random.default_rng(seed)
    centre = np.array([2.5, -1.5]) + rng.uniform(-1.3, 1.3, (n, 2)) * [11.5, 6.5]
    size, yaw = rng.uniform([1, 1, 1], [9, 4, 2], (n, 3)), rng.uniform(-7, 7, n)
    visibility = rng.choice([1, 1, 2, 3, 4], n)
    return np.column_stack([centre, np.zeros(n), size, yaw, visibility]).astype(np.float32)


def box_batch(*boxes):
    return {
        "vehicles": torch.from_numpy(np.concatenate(boxes)),
        "n_vehicles": torch.tensor([len(b) for b in boxes]),
    }


def assert_maps(targets, b, boxes, angle, grid):
    """Sample b equals the naive maps, but for cells at the very edge of a footprint."""
    turned = [reference.turned_box(box, float(np.float32(angle))) for box in boxes.tolist()]
    maps = reference.vehicle_maps(turned, reference.bounds_of(grid), tie_m=FLOAT32_M)
    sure = maps["tie"] == 0
    assert (~sure).sum() <= 2
    got = {name: values[b].double().numpy() for name, values in targets.items()}
    for name in ("vehicle", "visible"):
        np.testing.assert_array_equal(got[name][sure], maps[name][sure], err_msg=name)
    np.testing.assert_allclose(got["centre"], maps["centre"], atol=1e-5)
    np.testing.assert_allclose(got["offset"][:, sure], maps["offset"][:, sure], atol=1e-4)
    has_offset = (maps["vehicle"] == 1) & (maps["visible"] == 1)
    np.testing.assert_array_equal(got["has_offset"][sure], has_offset[sure])
    return maps


@pytest.mark.parametrize("seed", range(4))
def test_vehicle_maps_equal_a_test_of_every_cell(seed):
    boxes = [random_boxes(seed, 3), random_boxes(seed + 10, 12)]
    angles = [0.0, 1.3] if seed % 2 else [-2.9, 0.4]
    targets = vehicle_maps(box_batch(*boxes), torch.tensor(angles), UNEVEN)
    assert targets["vehicle"].shape == targets["centre"].shape == (2, 31, 22)
    assert targets["offset"].shape == (2, 2, 31, 22)
    assert targets["visible"].dtype == targets["has_offset"].dtype == torch.bool
    for b in range(2):
        maps = assert_maps(targets, b, boxes[b], angles[b], UNEVEN)
        assert 0 < maps["vehicle"].mean() < 1 and (maps["centre"] > 0.5).any()
        if b == 0:
            assert (maps["centre"] == 0).any()
        else:
            assert (maps["visible"] == 0).any()


@pytest.mark.parametrize("angle", [0.0, 2.0])
def test_vehicle_maps_of_the_real_keyframe_equal_a_test_of_every_cell(real, angle):
    batch = reference.collated([real], GRID.n_voxels)
    targets = vehicle_maps(batch, torch.tensor([angle]), GRID)
    maps = assert_maps(targets, 0, real["vehicles"], angle, GRID)
    assert maps["vehicle"].sum() > 100


def test_unturned_masks_are_the_stored_ones(real, demo):
    frames = [real, *demo]
    targets = vehicle_maps(
        reference.collated(frames, GRID.n_voxels), torch.zeros(len(frames)), GRID
    )
    for b, frame in enumerate(frames):
        assert frame["vehicle"].any()
        np.testing.assert_array_equal(targets["vehicle"][b].numpy(), frame["vehicle"])
        np.testing.assert_array_equal(targets["visible"][b].numpy(), frame["vehicle_visible"])
    assert any((frame["vehicle_visible"] == 0).any() for frame in frames)


def test_samples_without_vehicles_are_empty():
    none = np.zeros((0, 8), np.float32)
    boxes = random_boxes(0, 5)
    targets = vehicle_maps(box_batch(none, boxes, none), torch.tensor([1.0, 0.5, 0.0]), UNEVEN)
    assert_maps(targets, 1, boxes, 0.5, UNEVEN)
    for b in (0, 2):
        assert targets["visible"][b].all()
        for name in ("vehicle", "centre", "offset", "has_offset"):
            assert not targets[name][b].any()
    alone = vehicle_maps(box_batch(none), torch.tensor([1.0]), UNEVEN)
    assert {name: values.dtype for name, values in alone.items()} == {
        name: values.dtype for name, values in targets.items()
    }
    assert not alone["vehicle"].any() and alone["visible"].all()


def test_offsets_point_from_the_vehicle_s_centre_to_the_cell():
    box = np.array([[2.0, -1.0, 0, 6.0, 3.0, 1.5, 0.0, 4]], np.float32)
    offset = vehicle_maps(box_batch(box), torch.zeros(1), UNEVEN)["offset"][0]
    x, y = UNEVEN.bev_centres()
    size_x, size_y, _ = UNEVEN.cell_size
    i, j = 16, 9  # ahead of the centre and to its right
    assert x[i] > 2.5 and y[j] < -1.5
    assert offset[0, i, j].item() == pytest.approx((x[i] - 2.0) / size_x, abs=1e-5)
    assert offset[1, i, j].item() == pytest.approx((y[j] + 1.0) / size_y, abs=1e-5)


def test_targets_leave_the_batch_alone(real):
    batch = reference.collated([real], GRID.n_voxels)
    before = {name: values.clone() for name, values in batch.items()}
    vehicle_maps(batch, torch.tensor([0.5]), GRID)
    voxel_targets(batch, torch.tensor([0.5]), GRID, STEP_M)
    for name in batch:
        assert torch.equal(batch[name], before[name]), name
