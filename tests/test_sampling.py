"""Bilinear sampling against torch and a loop; int8 quantisation and its error bound."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.nn import functional as F

from occfeat_targets.outputs.voxels import camera_bits, quantise, sample_mean, see

# The same examples everywhere, and no deadline: a busy machine is no mistake.
repeatable = settings(derandomize=True, deadline=None)


def scene(seed, cameras=6, voxels=40, channels=5, h=4, w=7):
    """Feature maps, positions with the borders well represented, and a mixed validity."""
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(rng.normal(size=(cameras, channels, h, w)).astype(np.float32))
    position = rng.uniform(0, 1, (cameras, voxels, 2))
    position[:, :8] = rng.choice([0.0, 0.5 / w, 0.999999, 1 - 0.5 / w], (cameras, 8, 2))
    valid = rng.uniform(size=(cameras, voxels)) < 0.4
    valid[:, 10] = False
    valid[:, 11] = True
    position[~valid] = rng.choice([np.nan, np.inf, -3.0, 2.0], (int((~valid).sum()), 2))
    return features, position, valid


def by_grid_sample(features, position, valid):
    grid = torch.from_numpy(2 * np.where(valid[..., None], position, 0) - 1)[:, None]
    sampled = F.grid_sample(
        features.double(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    weight = valid[:, :, None] / np.maximum(valid.sum(axis=0), 1)[None, :, None]
    return (sampled[:, :, 0].permute(0, 2, 1).numpy() * weight).sum(axis=0)


@pytest.mark.parametrize("seed", range(5))
def test_mean_is_grid_samples(seed):
    features, position, valid = scene(seed)
    mean = sample_mean(features, position, valid)
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, by_grid_sample(features, position, valid), atol=2e-6)


@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 5), (5, 1), (2, 2)])
def test_mean_on_tiny_maps_is_grid_samples(h, w):
    features, position, valid = scene(9, h=h, w=w)
    mean = sample_mean(features, position, valid)
    np.testing.assert_allclose(mean, by_grid_sample(features, position, valid), atol=2e-6)


def test_mean_is_the_loops():
    features, position, valid = scene(3)
    maps = features.double().numpy()
    mean = sample_mean(features, position, valid)
    for voxel in range(valid.shape[1]):
        seeing = np.flatnonzero(valid[:, voxel])
        if len(seeing) == 0:
            assert (mean[voxel] == 0).all()
            continue
        vectors = [reference.bilinear(maps[c], *position[c, voxel], 1.0, 1.0) for c in seeing]
        np.testing.assert_allclose(mean[voxel], sum(vectors) / len(seeing), atol=2e-6)


def test_cell_centres_give_back_the_cells():
    features = torch.arange(12, dtype=torch.float32).view(1, 1, 3, 4)
    x, y = np.meshgrid((np.arange(4) + 0.5) / 4, (np.arange(3) + 0.5) / 3)
    position = np.stack([x.ravel(), y.ravel()], axis=1)[None]
    mean = sample_mean(features, position, np.ones((1, 12), dtype=bool))
    np.testing.assert_allclose(mean[:, 0], np.arange(12), atol=1e-6)


def test_mean_divides_by_the_cameras_that_see():
    features = torch.ones(6, 2, 3, 4) * torch.arange(1.0, 7.0).view(6, 1, 1, 1)
    valid = np.zeros((6, 3), dtype=bool)
    valid[2, 0] = valid[[0, 5], 1] = True
    mean = sample_mean(features, np.full((6, 3, 2), 0.4), valid)
    np.testing.assert_allclose(mean, [[3, 3], [3.5, 3.5], [0, 0]])


def test_no_voxels_give_an_empty_array():
    features, position, valid = scene(0)
    assert sample_mean(features, position[:, :0], valid[:, :0]).shape == (0, 5)
    assert sample_mean(features, position, np.zeros_like(valid)).tolist() == [[0.0] * 5] * 40


def test_camera_bits():
    valid = np.array(
        [[1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1], [0, 1, 0, 1]],
        dtype=bool,
    )
    bits = camera_bits(valid)
    assert bits.dtype == np.int64  # the output stores what its number of cameras needs
    assert bits.tolist() == [1, 32, 0, 63]
    assert camera_bits(np.ones((16, 1), dtype=bool)).tolist() == [65535]


def test_see_uses_each_images_own_size():
    # The same camera twice; the second says its image is half as wide and twice as high.
    K = np.array([[100.0, 0, 50], [0, 100, 50], [0, 0, 1]])
    centres = np.array([[0.2, 0.3, 1.0], [-0.2, 0.1, 1.0], [0.2, 0.3, -1.0]])
    position, valid = see(
        centres, np.stack([K, K]), np.stack([np.eye(4)] * 2), np.array([[100, 100], [200, 50]])
    )
    assert valid.tolist() == [[True, True, False], [False, True, False]]
    np.testing.assert_allclose(position[0, :2], [[0.7, 0.8], [0.3, 0.6]])
    np.testing.assert_allclose(position[1, 1], [0.6, 0.3])


vectors = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.floats(-8e6, 8e6, width=32),
)


@repeatable
@given(vectors, st.integers(-30, 0))
def test_quantisation_error_is_at_most_half_a_step(features, exponent):
    features = (features * np.float32(2.0**exponent)).astype(np.float32)
    codes, scale = quantise(features)
    assert codes.dtype == np.int8
    assert scale.dtype == np.float16
    assert np.abs(codes.astype(int)).max() <= 127
    step = scale.astype(np.float64)[:, None]
    error = np.abs(codes * step - features.astype(np.float64))
    assert (error <= step / 2 * (1 + 1e-5)).all()
    # The step is no larger than it must be: max abs / 127, up to float16's own resolution.
    peak = np.abs(features.astype(np.float64)).max(axis=1)
    assert (scale.astype(np.float64) <= peak / 127 * (1 + 2**-10) + 2**-24).all()


def test_zero_vectors_have_zero_codes_and_scale():
    features = np.zeros((3, 4), dtype=np.float32)
    features[1] = [1, -2, 0, 0.5]
    codes, scale = quantise(features)
    assert (codes[[0, 2]] == 0).all()
    assert (scale[[0, 2]] == 0).all()
    assert codes[1].tolist() == [63, -127, 0, 32]


def test_tiny_and_huge_vectors_stay_within_half_a_step():
    features = np.array([[1e-9, -5e-10], [1e-40, 0], [127 * 65504, -1], [1, 1]], np.float32)
    codes, scale = quantise(features)
    step = scale.astype(np.float64)[:, None]
    assert np.isfinite(step).all()
    assert (np.abs(codes * step - features.astype(np.float64)) <= step / 2 * (1 + 1e-6)).all()
    assert codes[2].tolist() == [127, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_features_are_refused(bad):
    features = np.ones((3, 4), dtype=np.float32)
    features[1, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantise(features)


def test_features_beyond_float16_steps_are_refused():
    with pytest.raises(ValueError, match="float16"):
        quantise(np.array([[1.0, -127 * 65504 * 1.01]], dtype=np.float32))


def test_no_vectors_quantise_to_nothing():
    codes, scale = quantise(np.zeros((0, 4), dtype=np.float32))
    assert codes.shape == (0, 4)
    assert scale.shape == (0,)
