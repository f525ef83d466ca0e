"""Rigid transforms and the pinhole projection against pyquaternion and formulas by hand."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pyquaternion import Quaternion

from occfeat_targets.geometry import (
    in_image,
    inverse_rigid,
    project,
    rigid,
    rotation_matrices,
    scale_intrinsics,
    transform,
    yaw,
)

# The same examples everywhere, and no deadline: a busy machine is no mistake.
repeatable = settings(derandomize=True, deadline=None)

K = np.array([[1200.0, 0.0, 810.0], [0.0, 1150.0, 460.0], [0.0, 0.0, 1.0]])
component = st.floats(-1, 1)
quaternions = st.tuples(component, component, component, component)
offsets = st.tuples(*[st.floats(-1000, 1000)] * 3)


def pose_by_hand(wxyz, translation):
    matrix = Quaternion(wxyz).transformation_matrix
    matrix[:3, 3] = translation
    return matrix


@repeatable
@given(quaternions)
def test_rotation_is_pyquaternions(wxyz):
    assume(np.linalg.norm(wxyz) > 1e-3)
    np.testing.assert_allclose(
        rotation_matrices(np.array(wxyz)), Quaternion(wxyz).rotation_matrix, atol=1e-12
    )


def test_rotations_of_a_stack_keep_their_place():
    wxyz = np.random.default_rng(0).normal(size=(2, 3, 4))
    matrices = rotation_matrices(wxyz)
    assert matrices.shape == (2, 3, 3, 3)
    for i in range(2):
        for j in range(3):
            wanted = Quaternion(wxyz[i, j]).rotation_matrix
            np.testing.assert_allclose(matrices[i, j], wanted, atol=1e-12)


def test_zero_quaternion_gives_nan():
    assert np.isnan(rotation_matrices(np.zeros(4))).all()


@repeatable
@given(quaternions, offsets)
def test_inverse_of_a_rigid_transform(wxyz, translation):
    assume(np.linalg.norm(wxyz) > 1e-3)
    a_T_b = rigid(np.array(wxyz), np.array(translation))
    np.testing.assert_allclose(a_T_b, pose_by_hand(wxyz, translation), atol=1e-12)
    np.testing.assert_allclose(inverse_rigid(a_T_b), np.linalg.inv(a_T_b), atol=1e-9)


def test_transform_takes_points_of_b_to_a():
    # A quarter turn to the left, then a step: b's x axis is a's y axis.
    a_T_b = rigid(np.array([math.sqrt(0.5), 0, 0, math.sqrt(0.5)]), np.array([10.0, 20.0, 30.0]))
    xyz_a = transform(a_T_b, np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]))
    np.testing.assert_allclose(xyz_a, [[10, 21, 30], [9, 20, 30], [10, 20, 31]], atol=1e-12)
    assert yaw(a_T_b) == pytest.approx(math.pi / 2)


def test_transform_of_float32_points_is_float64():
    # Global coordinates are of the order of a kilometre: float32 would lose 0.1 mm.
    xyz = np.array([[0.001, 0, 0]], dtype=np.float32)
    moved = transform(rigid(np.array([1.0, 0, 0, 0]), np.array([4096.0, 0, 0])), xyz)
    assert moved.dtype == np.float64
    assert moved[0, 0] - 4096 == pytest.approx(0.001, abs=1e-9)


@repeatable
@given(quaternions, offsets, st.lists(offsets, min_size=1, max_size=8))
def test_projection_is_the_formula(wxyz, translation, points):
    assume(np.linalg.norm(wxyz) > 1e-3)
    cam_T_ego = pose_by_hand(wxyz, translation)
    uv, depth = project(K[None], cam_T_ego[None], np.array(points))
    for k, (x, y, z) in enumerate(points):
        xc, yc, zc = (
            cam_T_ego[r, 0] * x + cam_T_ego[r, 1] * y + cam_T_ego[r, 2] * z + cam_T_ego[r, 3]
            for r in range(3)
        )
        assert depth[0, k] == pytest.approx(zc, abs=1e-9)
        if zc > 1e-3:
            assert uv[0, k, 0] == pytest.approx(1200 * xc / zc + 810, rel=1e-7, abs=1e-5)
            assert uv[0, k, 1] == pytest.approx(1150 * yc / zc + 460, rel=1e-7, abs=1e-5)


def test_each_camera_has_its_own_pose_and_intrinsics():
    cam_T_ego = np.stack([np.eye(4), np.eye(4)])
    cam_T_ego[1, :3, 3] = [1.0, 2.0, 3.0]
    both = np.stack([K, np.diag([100.0, 200.0, 1.0])])
    uv, depth = project(both, cam_T_ego, np.array([[2.0, 3.0, 5.0]]))
    assert depth[:, 0].tolist() == [5.0, 8.0]
    np.testing.assert_allclose(uv[:, 0], [[1290, 1150], [37.5, 125]])


def test_points_behind_the_camera_are_not_in_the_image():
    # (1, 2, -10) has the same pixel as (-1, -2, 10): only its depth tells it apart.
    uv, depth = project(K[None], np.eye(4)[None], np.array([[-1.0, -2, 10], [1.0, 2, -10]]))
    np.testing.assert_allclose(uv[0, 0], uv[0, 1])
    assert in_image(uv, depth, (900, 1600)).tolist() == [[True, False]]


def test_point_in_the_focal_plane_is_not_in_the_image():
    uv, depth = project(K[None], np.eye(4)[None], np.array([[1.0, 2, 0], [0.0, 0, 0]]))
    assert not in_image(uv, depth, (900, 1600)).any()


@pytest.mark.parametrize(
    ("u", "v", "inside"),
    [
        (0, 0, True),
        (1599.999, 899.999, True),
        (1600, 450, False),
        (800, 900, False),
        (-1e-9, 450, False),
        (800, -1e-9, False),
        (950, 850, True),  # would be outside with height and width swapped
        (850, 950, False),
    ],
)
def test_image_is_half_open(u, v, inside):
    found = in_image(np.array([[[float(u), float(v)]]]), np.array([[5.0]]), (900, 1600))
    assert found.tolist() == [[inside]]


@repeatable
@given(
    st.floats(-5, 5),
    st.floats(-5, 5),
    st.floats(0.5, 60),
    st.tuples(st.integers(50, 2000), st.integers(50, 2000)),
)
def test_scaled_intrinsics_keep_the_relative_position(x, y, z, to_hw):
    point = np.array([[x, y, z]])
    uv, _ = project(K[None], np.eye(4)[None], point)
    scaled, _ = project(scale_intrinsics(K, (900, 1600), to_hw)[None], np.eye(4)[None], point)
    np.testing.assert_allclose(scaled[0, 0, 0] / to_hw[1], uv[0, 0, 0] / 1600, atol=1e-9)
    np.testing.assert_allclose(scaled[0, 0, 1] / to_hw[0], uv[0, 0, 1] / 900, atol=1e-9)


def test_scale_intrinsics_by_hand():
    # Width is halved, height is a third: continuous pixels scale with no half-pixel offset.
    scaled = scale_intrinsics(np.stack([K, K]), (900, 1600), (300, 800))
    wanted = [[600, 0, 405], [0, 1150 / 3, 460 / 3], [0, 0, 1]]
    np.testing.assert_allclose(scaled, [wanted, wanted])
