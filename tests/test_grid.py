"""The voxel grid: half-open bounds, floor, cell centres, and the (Z, X, Y) order."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from occfeat_targets.store.grid import VoxelGrid

# The same examples everywhere, and no deadline: a busy machine is no mistake.
repeatable = settings(derandomize=True, deadline=None)

# Three different axis lengths and cell sizes: no two axes can stand for each other.
UNEVEN = VoxelGrid((-40.0, 48.0, 110), (-32.0, 30.0, 93), (-2.0, 6.0, 7))
UNEVEN_BOUNDS = (UNEVEN.x, UNEVEN.y, UNEVEN.z)
# Powers of two: every bound and cell edge is exact in float64.
EXACT = VoxelGrid((-4.0, 4.0, 16), (-2.0, 6.0, 8), (-1.0, 3.0, 4))


@st.composite
def grids(draw):
    axes = []
    for _ in range(3):
        lo = draw(st.floats(-100, 100))
        axes.append((lo, lo + draw(st.floats(0.1, 200)), draw(st.integers(1, 40))))
    return VoxelGrid(*axes)


@repeatable
@given(grids(), st.integers(0, 2**31))
def test_centre_of_a_voxel_lies_in_that_voxel(grid, seed):
    index = np.random.default_rng(seed).integers(0, grid.n_voxels, 50)
    again, inside = grid.flat_index(grid.centres(index))
    assert inside.all()
    assert (again == index).all()


@repeatable
@given(grids(), st.integers(0, 2**31))
def test_flat_index_and_centres_agree_with_the_loop(grid, seed):
    bounds = (grid.x, grid.y, grid.z)
    lower, upper = np.array(bounds)[:, 0], np.array(bounds)[:, 1]
    size = upper - lower
    points = np.random.default_rng(seed).uniform(lower - 0.2 * size, upper + 0.2 * size, (60, 3))
    index, inside = grid.flat_index(points)
    cells = [reference.cell(point, bounds) for point in points.tolist()]
    assert inside.tolist() == [cell is not None for cell in cells]
    kept = [cell for cell in cells if cell is not None]
    assert index.tolist() == [reference.flat(cell, bounds) for cell in kept]
    wanted = np.array([reference.centre(cell, bounds) for cell in kept]).reshape(-1, 3)
    np.testing.assert_allclose(grid.centres(index), wanted, rtol=0, atol=1e-10)


def test_volume_order_is_z_x_y():
    index = np.arange(UNEVEN.n_voxels).reshape(UNEVEN.shape)
    assert UNEVEN.shape == (7, 110, 93)
    assert UNEVEN.bev_shape == (110, 93)
    for ix, iy, iz in [(0, 0, 0), (109, 92, 6), (1, 0, 0), (0, 1, 0), (0, 0, 1), (17, 61, 3)]:
        centre = np.array([reference.centre((ix, iy, iz), UNEVEN_BOUNDS)])
        np.testing.assert_allclose(UNEVEN.centres(index[iz, ix, iy, None]), centre, atol=1e-12)
        assert UNEVEN.flat_index(centre)[0] == [index[iz, ix, iy]]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_lower_bound_is_inside_and_upper_bound_outside(axis):
    bounds = (EXACT.x, EXACT.y, EXACT.z)
    lo, hi, n = bounds[axis]
    values = [lo, hi - 1e-12, hi, math.nextafter(lo, -math.inf)]
    points = np.array([[0.1, 0.1, 0.1]] * 4)
    points[:, axis] = values
    index, inside = EXACT.flat_index(points)
    assert inside.tolist() == [True, True, False, False]
    cell = np.unravel_index(index, EXACT.shape)[(1, 2, 0)[axis]]
    assert cell.tolist() == [0, n - 1]


def test_cell_edge_belongs_to_the_upper_cell():
    x = [0.5, 0.5 - 1e-12, -0.25]
    index, _ = EXACT.flat_index(np.array([[value, 0.0, 0.0] for value in x]))
    assert np.unravel_index(index, EXACT.shape)[1].tolist() == [9, 8, 7]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, -1e300])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_non_finite_and_far_points_are_outside(value, axis):
    points = np.zeros((3, 3))
    points[1, axis] = value
    index, inside = EXACT.flat_index(points)
    assert inside.tolist() == [True, False, True]
    assert len(index) == 2
    assert len(EXACT.occupied(points[1:2])) == 0


def test_occupied_is_ascending_and_counts_each_voxel_once():
    points = np.random.default_rng(0).uniform(-6, 6, (400, 3))
    wanted = sorted(reference.voxels(points.tolist(), (EXACT.x, EXACT.y, EXACT.z)))
    occupied = EXACT.occupied(np.concatenate([points, points[::-1]]))
    assert occupied.dtype == np.uint32
    assert occupied.tolist() == wanted
    assert 0 < len(wanted) < 400  # some points share a voxel, some lie outside


def test_no_points_occupy_nothing():
    assert EXACT.occupied(np.zeros((0, 3))).shape == (0,)
    assert EXACT.centres(np.zeros(0, dtype=np.uint32)).shape == (0, 3)


def test_bev_centres_are_those_of_the_volume():
    x, y = UNEVEN.bev_centres()
    centres = UNEVEN.centres(np.arange(UNEVEN.n_voxels)).reshape(*UNEVEN.shape, 3)
    np.testing.assert_allclose(centres[0, :, 0, 0], x, atol=1e-12)
    np.testing.assert_allclose(centres[0, 0, :, 1], y, atol=1e-12)


def test_float32_points_are_binned_in_float64():
    # In float32 this point, less the lower bound, rounds up into the next cell.
    x = np.nextafter(np.float32(0.5), np.float32(0))
    grid = VoxelGrid((-1000.0, 1000.0, 4000), (-1.0, 1.0, 1), (-1.0, 1.0, 1))
    assert np.float32(x + np.float32(1000)) == 1000.5
    assert grid.flat_index(np.array([[x, 0, 0]], dtype=np.float32))[0].tolist() == [2000]


def test_dict_round_trip():
    assert VoxelGrid.from_dict(json.loads(json.dumps(asdict(UNEVEN)))) == UNEVEN


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"x": (1.0, 1.0, 4)}, "grid.x"),
        ({"y": (1.0, math.inf, 4)}, "grid.y"),
        ({"y": (math.nan, 1.0, 4)}, "grid.y"),
        ({"z": (0.0, 1.0, 0)}, "grid.z"),
        ({"z": (0.0, 1.0, 2.5)}, "grid.z"),
        ({"x": (0.0, 1.0)}, "grid.x"),
        ({"x": (0.0, 1.0, 70000), "y": (0.0, 1.0, 70000)}, "uint32"),
    ],
)
def test_impossible_grid_is_refused(axes, words):
    with pytest.raises(ValueError, match=words):
        VoxelGrid(**axes)
