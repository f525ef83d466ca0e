"""Simple-BEV's protocol against OpenCV, the nuScenes devkit and a plain writing of its steps."""

import numpy as np
import pytest
import torch
from conftest import LONG
from nuscenes import NuScenes
from pyquaternion import Quaternion

from occfeat_targets.build import read_dataset
from occfeat_targets.config import TargetsConfig
from occfeat_targets.outputs.boxes import vehicle_masks
from occfeat_targets.store.grid import VoxelGrid
from occfeat_train.tasks import simple_bev
from occfeat_train.tasks.polygons import fill_polygons
from occfeat_train.tasks.vehicle import simple_bev_targets

cv2 = pytest.importorskip("cv2")
PAPER = VoxelGrid()
LEVEL = np.array([[0, -1, 0, 0], [0, 0, -1, 1.5], [1, 0, 0, 0], [0, 0, 0, 1.0]])
"""``cam_T_ego`` of a camera above ego's origin that looks ahead."""
UNEVEN = VoxelGrid((-9.0, 14.0, 31), (-8.0, 5.0, 22), (-1.0, 1.0, 2))


def opencv(corners, shape):
    """What ``cv2.fillPoly`` fills of (P, 2), row and column."""
    image = np.zeros(shape, np.uint8)
    cv2.fillPoly(image, [np.ascontiguousarray(corners[:, ::-1], dtype=np.int32)], 1)
    return image.astype(bool)


@pytest.mark.parametrize(("low", "high"), [(0, 40), (-30, 70), (-3, 8), (-200, 300)])
@pytest.mark.parametrize("n_corners", [3, 4, 7])
def test_polygons_of_all_kinds_are_opencv_s(low, high, n_corners):
    """Convex and not, edges that cross, points, in and across and outside of the picture."""
    corners = np.random.default_rng(high).integers(low, high, (300, n_corners, 2))
    for shape in ((40, 31), (4, 5)):
        filled = fill_polygons(torch.from_numpy(corners), shape)
        expected = np.stack([opencv(polygon, shape) for polygon in corners])
        np.testing.assert_array_equal(filled.numpy(), expected)


def theirs(corners_cam, grid):
    """Simple-BEV's cells (X, Y) of a box, and whether the border crosses itself. ``corners_cam``
    (8, 3): x to the right, y down, z ahead. Rows are ahead, columns go to the right."""
    top = corners_cam[np.argsort(corners_cam[:, 1], kind="stable")[:4]]
    (dx, dy, _), (x_low, *_), y_high = grid.cell_size, grid.lower, grid.y[1]
    cells = np.stack([(top[:, 2] - x_low) / dx, (top[:, 0] + y_high) / dy], axis=1) - 0.5
    cells = cells[[0, 1, 3, 2]].astype(np.int32)
    sides = np.roll(cells, -1, axis=0) - cells
    turns = [a[0] * b[1] - a[1] * b[0] for a, b in zip(sides, np.roll(sides, -1, 0), strict=True)]
    return opencv(cells, grid.bev_shape)[:, ::-1], min(turns) < 0 < max(turns)


def corners(box, cam_T_ego):
    """Corners (8, 3) in a camera of a box (>= 7,) in ego, by its quaternion."""
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, 8).T
    turn = Quaternion(axis=[0, 0, 1], radians=float(box[6])).rotation_matrix
    in_ego = (signs * box[3:6] / 2) @ turn.T + box[:3]
    return in_ego @ cam_T_ego[:3, :3].T + cam_T_ego[:3, 3]


def random_boxes(rng, n, reach):
    """Rotated boxes of all sizes, many of them across the border of the grid or outside."""
    centre = rng.uniform(-1.2, 1.2, (n, 3)) * (reach, reach, 1)
    size = rng.uniform((0.3, 0.3, 1.2), (12, 3, 4), (n, 3))
    columns = (centre, size, rng.uniform(-7, 7, n), rng.integers(0, 5, n))
    return torch.from_numpy(np.column_stack(columns)).float()


def tilted_cameras(rng, n):
    """``cam_T_ego`` float32 (n, 1, 4, 4) that look any way round, pitched and rolled by degrees."""
    cameras = torch.eye(4).repeat(n, 1, 1, 1)
    for camera in cameras[:, 0]:
        level = np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]])
        angles = rng.normal(0, 0.02, 2)
        tilt = Quaternion(axis=[1, 0, 0], radians=angles[0])
        tilt *= Quaternion(axis=[0, 0, 1], radians=angles[1])
        yaw = Quaternion(axis=[0, 0, 1], radians=rng.uniform(-4, 4))
        rotation = tilt.rotation_matrix @ level @ yaw.rotation_matrix
        camera[:3, :3] = torch.from_numpy(rotation)
        camera[:3, 3] = torch.from_numpy(-rotation @ rng.uniform(-2, 2, 3))
    return cameras


def count_differences(boxes, cam_T_ego, grid):
    """Of all boxes in a camera's frame: cells of theirs, cells that differ where their border does
    not cross itself, and boxes where it does."""
    frame = simple_bev.camera_frame(cam_T_ego[None], torch.tensor([0]))
    covered, _ = simple_bev.footprints(boxes, frame[0], grid)
    camera, total, different, crossed = cam_T_ego[0].double().numpy(), 0, 0, 0
    for box, cells in zip(boxes.double().numpy(), covered.numpy(), strict=True):
        expected, crosses_itself = theirs(corners(box, camera), grid)
        total, crossed = total + expected.sum(), crossed + crosses_itself
        different += 0 if crosses_itself else (cells != expected).sum()
    return total, different, crossed


@pytest.mark.parametrize(
    ("grid", "reach", "cells"), [(PAPER, 50, 18251), (UNEVEN, 14, 4320)], ids=["paper", "uneven"]
)
def test_footprints_of_random_boxes_are_theirs(grid, reach, cells):
    """No corner order of theirs crosses itself where a camera is tilted as cameras are."""
    rng = np.random.default_rng(0)
    counts = [
        count_differences(random_boxes(rng, 40, reach), camera, grid)
        for camera in tilted_cameras(rng, 12)
    ]
    assert np.sum(counts, axis=0).tolist() == [cells, 0, 0]


def test_a_roof_that_is_level_in_the_camera_s_frame_may_cross_itself_in_their_code():
    """Corners of one height are sorted by noise. Ours go round the roof."""
    rng = np.random.default_rng(1)
    crossed = 0
    for box in random_boxes(rng, 60, 40).double().numpy():
        noisy = corners(box, LEVEL) + rng.normal(0, 1e-7, (8, 3)) * (0, 1, 0)
        crossed += theirs(noisy, PAPER)[1]
    assert crossed == 33


def boxes_of(record, dataset):
    """float32 (M, 8) of the vehicles, as the store holds them."""
    boxes = np.column_stack([record.boxes.box, record.boxes.visibility]).astype(np.float32)
    return torch.from_numpy(boxes[[c in dataset.vehicle_classes for c in record.boxes.category]])


def records_of(root):
    dataset = read_dataset(root, None, TargetsConfig.load(None, []))
    return [(record, boxes_of(record, dataset)) for record in dataset.records]


def assert_every_camera_s_footprints_are_theirs(record, boxes):
    for camera in torch.from_numpy(record.cam_T_ego).float():
        total, different, crossed = count_differences(boxes, camera[None], PAPER)
        assert total > 300 and (different, crossed) == (0, 0)


def test_footprints_of_the_demo_world_are_theirs(demo_root):
    for record, boxes in records_of(demo_root):
        assert_every_camera_s_footprints_are_theirs(record, boxes)


def test_footprints_of_the_real_keyframe_are_theirs(nuscenes_one):
    ((record, boxes),) = records_of(nuscenes_one)
    assert_every_camera_s_footprints_are_theirs(record, boxes)
    in_ego, _ = simple_bev.footprints(boxes, torch.eye(4), PAPER)
    assert in_ego.any(dim=0).sum() == 397 and vehicle_masks(boxes.numpy(), PAPER)[0].sum() == 293


def test_the_devkit_s_tilted_boxes_of_the_real_keyframe(nuscenes_one):
    """387 cells in ego of their bottoms, truncated to cells that are counted as ours are."""
    nusc = NuScenes("v1.0-mini", str(nuscenes_one), verbose=False)
    sample = nusc.sample[0]
    ego, _ = _poses(nusc, sample["data"]["LIDAR_TOP"])
    boxes = [box for box in map(nusc.get_box, sample["anns"]) if "vehicle" in box.name]
    for box in boxes:
        box.translate(-np.array(ego["translation"]))
        box.rotate(Quaternion(ego["rotation"]).inverse)
    bottoms = np.stack([box.bottom_corners()[:2].T for box in boxes])
    cells = ((bottoms + 50) / 0.5 - 0.5).astype(np.int64)
    expected = np.any([opencv(polygon, PAPER.bev_shape) for polygon in cells], axis=0)
    filled = fill_polygons(torch.from_numpy(cells), PAPER.bev_shape).any(dim=0)
    np.testing.assert_array_equal(filled.numpy(), expected)
    assert expected.sum() == 387


def test_the_real_front_camera_s_frame_and_masks_are_the_devkit_s(nuscenes_one):
    """Their masks from the devkit's boxes, tilted with the car, differ in 14 cells."""
    ((record, boxes),) = records_of(nuscenes_one)
    nusc = NuScenes("v1.0-mini", str(nuscenes_one), verbose=False)
    sample = nusc.sample[0]
    ego, _ = _poses(nusc, sample["data"]["LIDAR_TOP"])
    then, sensor = _poses(nusc, sample["data"]["CAM_FRONT"])
    assert sensor["translation"][0] == pytest.approx(1.70, abs=0.005)
    cameras = torch.from_numpy(record.cam_T_ego).float()[None]
    assert simple_bev.front_camera(cameras).tolist() == [1]
    frame = simple_bev.camera_frame(cameras, torch.tensor([1]))
    for in_bev in ((0, 0, simple_bev.HEIGHT_M), (20, 0, 1), (10, -5, 0)):
        x, y, z = in_bev
        point = np.array([-y, simple_bev.HEIGHT_M - z, x])  # in the camera
        for pose in (sensor, then):
            point = Quaternion(pose["rotation"]).rotate(point) + pose["translation"]
        point = Quaternion(ego["rotation"]).inverse.rotate(point - ego["translation"])
        found = frame[0].double() @ torch.tensor([*in_bev, 1.0], dtype=torch.float64)
        np.testing.assert_allclose(found[:3], point, atol=2e-4)
    expected = np.zeros(PAPER.bev_shape, bool)
    for token in sample["anns"]:
        box = nusc.get_box(token)
        if "vehicle" in box.name:
            for pose in (then, sensor):
                box.translate(-np.array(pose["translation"]))
                box.rotate(Quaternion(pose["rotation"]).inverse)
            expected |= theirs(box.corners().T, PAPER)[0]
    cells, _ = simple_bev.footprints(boxes, frame[0], PAPER)
    cells = cells.any(dim=0).numpy()
    assert (expected.sum(), cells.sum(), (cells != expected).sum()) == (368, 376, 14)


def _poses(nusc, token):
    data = nusc.get("sample_data", token)
    sensor = nusc.get("calibrated_sensor", data["calibrated_sensor_token"])
    return nusc.get("ego_pose", data["ego_pose_token"]), sensor


# The labels


def test_labels_are_painted_as_theirs():
    """Later boxes over earlier ones; hidden ones out of what counts; offsets from whole cells."""
    rng = np.random.default_rng(3)
    for camera in tilted_cameras(rng, 4):
        boxes = random_boxes(rng, 60, 20)
        frame = simple_bev.camera_frame(camera[None], torch.tensor([0]))
        found = simple_bev_targets(boxes, torch.tensor([60]), frame, PAPER)
        owner, valid = np.zeros(PAPER.bev_shape, int), np.ones(PAPER.bev_shape, bool)
        for n, box in enumerate(boxes.double().numpy()):
            cells, _ = theirs(corners(box, camera[0].double().numpy()), PAPER)
            owner[cells] = n + 1
            if box[7] == 1:
                valid[cells] = False
        assert (owner[valid] > 0).any() and not valid.all()
        np.testing.assert_array_equal(found["vehicle"][0].numpy(), owner > 0)
        np.testing.assert_array_equal(found["visible"][0].numpy(), valid)
        np.testing.assert_array_equal(found["has_offset"][0].numpy(), (owner > 0) & valid)
        for i, j in np.argwhere(owner)[::7]:
            box = boxes[owner[i, j] - 1].double().numpy()
            x, _, z = corners(box, camera[0].double().numpy()).mean(axis=0)
            cell = np.round([(z + 50) / 0.5 - 0.5, (50 - x) / 0.5 - 0.5])  # y is to the left
            assert found["offset"][0, :, i, j].tolist() == [i - cell[0], j - cell[1]]
            assert found["centre"][0, int(cell[0]), int(cell[1])] == 1


def test_no_vehicles_no_labels():
    found = simple_bev_targets(torch.zeros(0, 8), torch.tensor([0]), torch.eye(4)[None], UNEVEN)
    assert not found["vehicle"].any() and found["visible"].all() and not found["has_offset"].any()


def test_a_training_frame_s_camera_follows_from_its_seed_alone():
    seeds = torch.arange(200)
    drawn = simple_bev.drawn_camera(seeds, 6)
    assert sorted({*drawn.tolist()}) == [0, 1, 2, 3, 4, 5]
    assert torch.equal(simple_bev.drawn_camera(seeds.flip(0), 6).flip(0), drawn)


# What the protocol is worth


ERRORS_M = pytest.mark.parametrize(
    "error_m", [pytest.param(0.25, marks=LONG), 0.5, pytest.param(1.0, marks=LONG)]
)


@ERRORS_M
def test_the_same_position_error_scores_higher_under_simple_bev(error_m):
    """Cars where they are against the same cars moved: IoU in per cent under both protocols."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(12):
        centre, yaw = rng.uniform(-45, 45, (40, 2)), rng.uniform(-3, 3, 40)
        ones = np.ones(40)
        drawn.append([centre, ones, 4.6 * ones, 1.95 * ones, 1.7 * ones, yaw, 4 * ones])
    assert 1 < _gain([np.column_stack(cars) for cars in drawn], error_m, rng) < 10


@ERRORS_M
def test_and_on_the_real_keyframe_by_2_to_9_points(error_m, nuscenes_one):
    ((_, boxes),) = records_of(nuscenes_one)
    assert 2 < _gain([boxes.numpy()] * 30, error_m, np.random.default_rng(0)) < 9


def _gain(scenes, error_m, rng):
    """Points by which IoU of boxes with the same boxes moved is higher under simple-bev."""
    counts = np.zeros((2, 2))
    for true in scenes:
        moved = true.copy()
        moved[:, :2] += rng.normal(0, error_m, (len(true), 2))
        for protocol, mask in enumerate((_ego, _simple_bev)):
            a, b = mask(true), mask(moved)
            counts[protocol] += (a & b).sum(), (a | b).sum()
    ego, theirs = (100 * both / either for both, either in counts)
    print(f"{error_m} m: ego {ego:.1f} %, simple-bev {theirs:.1f} %")
    return theirs - ego


def _ego(boxes):
    return vehicle_masks(boxes, PAPER)[0].astype(bool)


def _simple_bev(boxes):
    cells, _ = simple_bev.footprints(torch.from_numpy(boxes), torch.eye(4), PAPER)
    return cells.any(dim=0).numpy()
