"""Map masks in a turned BEV frame, against a loop over cells."""

import math

import numpy as np
import pytest
import torch
import train_reference as reference

from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import open_store
from occfeat_train.augment import Draws, network_inputs
from occfeat_train.tasks.map import map_targets
from occfeat_train.tasks.vehicle import vehicle_targets

SQUARE = VoxelGrid((-50.0, 50.0, 200), (-50.0, 50.0, 200), (-1.0, 1.0, 2))
UNEVEN = VoxelGrid((-9.0, 14.0, 31), (-8.0, 5.0, 22), (-1.0, 1.0, 2))
TIE_M = 1e-9
"""How far float64 may be off."""


def random_map(grid, batch=1, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 2, (batch, 5, *grid.bev_shape), dtype=np.uint8))


def targets_of(stored, angles, grid):
    return map_targets({"map": stored}, torch.tensor(angles), grid)


def assert_turned(targets, b, stored, angle, grid):
    """Sample b is what the loop finds, ties left out; returns the share of known cells."""
    turned, known, tie = reference.turned_map(
        stored[b].numpy(), float(np.float32(angle)), reference.bounds_of(grid), TIE_M
    )
    assert tie.sum() <= 2
    np.testing.assert_array_equal(targets["known"][b].numpy()[~tie], known[~tie])
    np.testing.assert_array_equal(targets["map"][b].numpy()[:, ~tie], turned[:, ~tie])
    return known.mean()


def test_an_unturned_map_is_the_stored_one_and_known_everywhere():
    stored = random_map(UNEVEN, 2)
    targets = targets_of(stored, [0.0, 0.0], UNEVEN)
    assert targets["map"].dtype == torch.float32 and targets["known"].dtype == torch.bool
    assert torch.equal(targets["map"], stored.float())
    assert targets["known"].shape == (2, 31, 22) and targets["known"].all()


@pytest.mark.parametrize("quarters", [-2, -1, 1, 2])
def test_quarter_turns_permute_the_cells_exactly(quarters):
    """np.rot90 takes x towards y, as a turn counter-clockwise does."""
    stored = random_map(SQUARE)
    targets = targets_of(stored, [quarters * math.pi / 2], SQUARE)
    assert targets["known"].all()
    assert torch.equal(targets["map"], stored.float().rot90(quarters, dims=(2, 3)))


@pytest.mark.parametrize("angle", [0.05, 0.7, -2.5, math.pi / 4, math.pi / 2, 3.0])
def test_any_turn_equals_a_loop_over_cells(angle):
    stored = random_map(UNEVEN, seed=1)
    known = assert_turned(targets_of(stored, [angle], UNEVEN), 0, stored, angle, UNEVEN)
    assert 0.3 < known < 1


def test_every_sample_is_turned_by_its_own_angle_and_unturned_ones_stay():
    stored, angles = random_map(UNEVEN, 4), [1.1, 0.0, -0.3, 3.0]
    targets = targets_of(stored, angles, UNEVEN)
    for b, angle in enumerate(angles):
        assert_turned(targets, b, stored, angle, UNEVEN)
    assert torch.equal(targets["map"][1], stored[1].float()) and targets["known"][1].all()


def test_what_is_not_known_is_outside_of_the_stored_square_and_empty():
    stored = torch.ones(1, 5, *SQUARE.bev_shape, dtype=torch.uint8)
    targets = targets_of(stored, [math.pi / 4], SQUARE)
    known = targets["known"][0]
    octagon = 2 * (math.sqrt(2) - 1)  # a square and itself turned by 45 degrees share this much
    assert known.float().mean().item() == pytest.approx(octagon, abs=0.005)
    assert not known[0, 0] and not known[-1, 0] and known[100, 0] and known[100, 100]
    assert torch.equal(targets["map"][0], known.float().expand(5, -1, -1))


@pytest.mark.parametrize("angle", [0.6, -2.0])
def test_the_map_turns_with_the_vehicles(angle):
    """A map with the vehicles' footprints on it agrees with the turned vehicles but at edges."""
    box = np.array([[12.0, -20.0, 0, 30.0, 14.0, 1.5, 0.4, 4]], np.float32)
    box, count = torch.from_numpy(box), torch.tensor([1])
    before, after = (
        vehicle_targets(box, count, torch.tensor([a]), SQUARE)["vehicle"] for a in (0.0, angle)
    )
    turned = targets_of(before[:, None].byte(), [angle], SQUARE)["map"][:, 0]
    either = ((turned + after) > 0).sum().item()
    assert (turned * after).sum().item() > 0.95 * either > 1000
    for axis in (1, 2):  # not moved by half a cell: the centres of both agree
        n = torch.arange(200.0)
        centre = [(m.sum(dim=3 - axis)[0] @ n / m.sum()).item() for m in (turned, after)]
        assert centre[0] == pytest.approx(centre[1], abs=0.15)


@pytest.mark.parametrize("angle", [0.0, 0.9, -2.3])
def test_the_map_turns_with_the_cameras(demo_store, angle):
    """A cell's turned map is the stored one where the turned camera's rays say it is."""
    store = open_store(demo_store)
    frame = reference.with_vehicles(store.frame(0), store.attrs)
    batch = reference.collated([frame], store.grid.n_voxels)
    stored = torch.from_numpy(frame["map"])[None]
    hw = store.attrs["config"]["images"]["size"]
    batch["images"] = torch.zeros(1, 6, *hw, 3, dtype=torch.uint8)
    none = torch.zeros(1, 6, dtype=torch.bool)
    still, seed = (torch.ones(1, 6), torch.zeros(1, 6, 2)), torch.zeros(1, dtype=torch.int64)
    draws = Draws(*still, none, none[:, :2], torch.tensor([angle]), seed)
    inputs = network_inputs(batch, draws, tuple(hw), 0.0)
    targets = targets_of(stored, [angle], store.grid)
    bounds = reference.bounds_of(store.grid)
    x, y = store.grid.bev_centres()
    ego_T_cam = torch.linalg.inv(batch["cam_T_ego"][0, 0].double())
    checked = 0
    for i, j in np.random.default_rng(0).integers(0, len(x), (200, 2)):
        in_cam = inputs["cam_T_bev"][0, 0].double() @ torch.tensor([x[i], y[j], 0.0, 1.0]).double()
        in_ego = (ego_T_cam @ in_cam).tolist()[:3]
        in_ego[2] = bounds[2][0]
        if reference.border_distance(in_ego[:2], bounds[:2]) < 1e-3:
            continue
        cell = reference.voxel_of(in_ego, bounds)
        assert targets["known"][0, i, j].item() == (cell is not None)
        if cell is not None:
            a, b, _ = reference.unflat(cell, bounds)
            assert targets["map"][0, :, i, j].tolist() == stored[0, :, a, b].tolist()
            checked += 1
    assert checked > 100


def test_the_batch_is_left_alone():
    stored = random_map(UNEVEN)
    before = stored.clone()
    targets_of(stored, [0.5], UNEVEN)["map"].zero_()
    targets_of(stored, [0.0], UNEVEN)["map"].zero_()
    assert torch.equal(stored, before)
