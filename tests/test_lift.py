"""Lifting against the naive loop: real and demo calibration, gradients, what no camera sees."""

import numpy as np
import pytest
import torch
import train_reference as reference
from conftest import build_store
from torch.nn import functional as F

from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import open_store
from occfeat_train.geometry import volume_centres
from occfeat_train.models.lifts.simplebev import SimpleBEVLift, bilinear_corners

# No two axes alike, not centred on the car, reaching behind and below every camera.
UNEVEN = VoxelGrid((-20.0, 24.0, 22), (-18.0, 15.0, 27), (-3.0, 5.0, 5))
CHANNELS = 3


@pytest.fixture(scope="module")
def real(nuscenes_one, tmp_path_factory):
    """Calibration of the real keyframe: K, cam_T_ego, image (height, width)."""
    store = tmp_path_factory.mktemp("lift") / "one.zarr"
    build_store(nuscenes_one, store, "map.mode=auto", "grid.x=[-20,20,40]")
    return calibration(open_store(store), [0])


@pytest.fixture(scope="module")
def demo(demo_store):
    """Calibration of the demo frames."""
    store = open_store(demo_store)
    return calibration(store, range(len(store)))


def calibration(store, frames):
    hw = tuple(store.attrs["config"]["images"]["size"])
    K, cam_T_ego = (
        torch.from_numpy(np.stack([store.frame(i)[name] for i in frames]))
        for name in ("K", "cam_T_ego")
    )
    return K, cam_T_ego, hw


def tiny_cameras(batch=1, n=2):
    """Cameras that look along x and, turned by 50 degrees, to the left; 16 x 12 pixels."""
    K = torch.tensor([[8.0, 0, 8], [0, 8.0, 6], [0, 0, 1]]).repeat(batch, n, 1, 1)
    cam_T_ego = torch.zeros(batch, n, 4, 4)
    for b in range(batch):
        for c in range(n):
            yaw = np.radians(50) * c + 0.1 * b
            cos, sin = np.cos(yaw), np.sin(yaw)
            rotation = torch.tensor([[sin, -cos, 0], [0, 0, -1], [cos, sin, 0]])
            cam_T_ego[b, c, :3, :3] = rotation
            cam_T_ego[b, c, :3, 3] = -rotation.float() @ torch.tensor([0.3, 0.1, 1.2])
            cam_T_ego[b, c, 3, 3] = 1
    return K, cam_T_ego


def random_features(shape, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32))


def all_weights(K, cam_T_bev, image_hw, feature_hw, grid, voxels):
    """Naive weights and closeness of voxels [(ix, iy, iz)] of one sample."""
    bounds = reference.bounds_of(grid)
    K, cam_T_bev = K.double().tolist(), cam_T_bev.double().tolist()
    pairs = [
        reference.lifting_weights(
            reference.voxel_centre(*voxel, bounds), K, cam_T_bev, image_hw, feature_hw
        )
        for voxel in voxels
    ]
    return [w for w, _ in pairs], np.array([close for _, close in pairs])


def every_voxel(grid):
    return list(np.ndindex(grid.x[2], grid.y[2], grid.z[2]))


def at(volume, voxels, channels=CHANNELS):
    """(V, C) of one sample's (Z·C, X, Y), channel z·C + c, for voxels [(ix, iy, iz)]."""
    ix, iy, iz = np.array(voxels).T
    channel = iz[:, None] * channels + np.arange(channels)
    return volume.detach().double().numpy()[channel, ix[:, None], iy[:, None]]


def assert_lifted(volume, features, weights, close, voxels):
    expected = np.array([reference.lift(features.double().numpy(), w) for w in weights])
    seen_by = np.array([len(w) // 4 for w in weights])
    assert (seen_by == 0).sum() > 20 and (seen_by == 1).sum() > 20 and (seen_by > 1).sum() > 20
    assert close.mean() < 2e-3  # few enough that none of the rules hides behind them
    got = at(volume, voxels)
    error = np.abs(got - expected).max(axis=1)
    # float32 pixels: a few 1e-4 of a pixel, more for voxels a hand's breadth before a camera
    assert error[~close].max() < 2e-3
    assert np.quantile(error[~close], 0.99) < 1e-4
    assert (got[(seen_by == 0) & ~close] == 0).all()


def test_lifted_features_of_the_real_keyframe_equal_the_naive_loop(real):
    K, cam_T_ego, hw = real
    features = random_features((1, 6, CHANNELS, 36, 64))
    volume = SimpleBEVLift(UNEVEN, CHANNELS)(features, K, cam_T_ego, hw)
    assert volume.shape == (1, 5 * CHANNELS, 22, 27)
    voxels = every_voxel(UNEVEN)
    weights, close = all_weights(K[0], cam_T_ego[0], hw, (36, 64), UNEVEN, voxels)
    assert_lifted(volume[0], features[0], weights, close, voxels)


def test_lifted_features_on_the_default_grid_equal_the_naive_loop(real, demo):
    grid = VoxelGrid()
    K, cam_T_ego, hw = real
    assert demo[2] == hw
    K, cam_T_ego = torch.cat([K, demo[0][-1:]]), torch.cat([cam_T_ego, demo[1][-1:]])
    features = random_features((2, 6, CHANNELS, 28, 50))  # not the images' aspect ratio
    volume = SimpleBEVLift(grid, CHANNELS)(features, K, cam_T_ego, hw)
    rng = np.random.default_rng(1)
    voxels = rng.integers((200, 200, 8), size=(2500, 3)).tolist()
    for b in range(2):
        weights, close = all_weights(K[b], cam_T_ego[b], hw, (28, 50), grid, voxels)
        assert_lifted(volume[b], features[b], weights, close, voxels)


def test_gradient_by_the_features_is_the_same_weights_transposed(real):
    K, cam_T_ego, hw = real
    features = random_features((1, 6, CHANNELS, 18, 32)).requires_grad_()
    volume = SimpleBEVLift(UNEVEN, CHANNELS)(features, K, cam_T_ego, hw)
    voxels = every_voxel(UNEVEN)
    weights, close = all_weights(K[0], cam_T_ego[0], hw, (18, 32), UNEVEN, voxels)
    out_gradient = random_features(volume.shape, seed=2)
    ix, iy, iz = np.array(voxels)[close].reshape(-1, 3).T
    for c in range(CHANNELS):
        out_gradient[0, iz * CHANNELS + c, ix, iy] = 0
    volume.backward(out_gradient)
    expected = reference.lift_gradient(features.shape[1:], weights, at(out_gradient[0], voxels))
    scale = np.abs(expected).max()
    assert scale > 1
    np.testing.assert_allclose(features.grad[0].numpy(), expected, atol=2e-3 * scale)


def test_gradcheck_in_double_precision():
    grid = VoxelGrid((0.5, 6.5, 3), (-3.0, 4.0, 4), (-1.0, 3.0, 2))
    K, cam_T_ego = tiny_cameras(batch=2)
    lift = SimpleBEVLift(grid, CHANNELS)
    features = random_features((2, 2, 2, 3, 4)).double().requires_grad_()
    assert (lift(features, K, cam_T_ego, (12, 16)) != 0).float().mean() > 0.5
    assert torch.autograd.gradcheck(lambda f: lift(f, K, cam_T_ego, (12, 16)), features)


def test_a_batch_of_different_calibrations_equals_each_alone(real, demo):
    cropped = demo[0][:1] * torch.tensor([1.1, 0.9, 1.0])[:, None]
    K, cam_T_ego = torch.cat([cropped, real[0]]), torch.cat([demo[1][:1], real[1]])
    features = random_features((2, 6, CHANNELS, 18, 32))
    lift = SimpleBEVLift(UNEVEN, CHANNELS)
    both = lift(features, K, cam_T_ego, real[2])
    for b in range(2):
        alone = lift(features[b : b + 1], K[b : b + 1], cam_T_ego[b : b + 1], real[2])
        assert torch.equal(both[b : b + 1], alone)
        assert alone.any()


def test_the_order_of_cameras_does_not_matter(real):
    K, cam_T_ego, hw = real
    features = random_features((1, 6, CHANNELS, 18, 32))
    lift, order = SimpleBEVLift(UNEVEN, CHANNELS), [4, 2, 0, 5, 1, 3]
    shuffled = lift(features[:, order], K[:, order], cam_T_ego[:, order], hw)
    torch.testing.assert_close(shuffled, lift(features, K, cam_T_ego, hw), atol=1e-5, rtol=0)


def test_a_voxel_of_constant_features_gets_that_constant_however_many_cameras_see_it(real):
    K, cam_T_ego, hw = real
    constant = torch.tensor([2.0, -1.0, 0.25])
    features = constant[:, None, None].expand(1, 6, CHANNELS, 18, 32)
    volume = SimpleBEVLift(UNEVEN, CHANNELS)(features, K, cam_T_ego, hw)
    vectors = volume[0].unflatten(0, (-1, CHANNELS)).transpose(0, 1).flatten(1)
    seen = vectors.any(dim=0)
    assert 0.3 < seen.float().mean() < 1
    torch.testing.assert_close(vectors[:, seen], constant[:, None].expand_as(vectors[:, seen]))


def test_cameras_that_see_no_voxel_give_zeros_and_no_gradient():
    grid = VoxelGrid((1.0, 5.0, 2), (-2.0, 2.0, 2), (0.0, 2.0, 2))
    K, cam_T_ego = tiny_cameras()
    cam_T_ego[..., 2, 3] -= 100  # all voxels far behind both cameras, inside their mirrored view
    features = random_features((1, 2, 3, 3, 4)).requires_grad_()
    volume = SimpleBEVLift(grid, CHANNELS)(features, K, cam_T_ego, (12, 16))
    assert volume.shape == (1, 6, 2, 2) and not volume.any()
    volume.sum().backward()
    assert not features.grad.any()


@pytest.mark.parametrize("below_m", [0, 100])
def test_with_cameras_as_constants_it_is_the_same_lift(below_m):
    """Also where several cameras see a voxel, and where none sees any."""
    K, cam_T_ego = tiny_cameras(n=5)
    cam_T_ego[..., 2, 3] -= below_m
    lift = SimpleBEVLift(UNEVEN, CHANNELS)
    fixed = lift.fixed(K, cam_T_ego, (12, 16), (5, 7))
    for seed in range(2):
        features = random_features((1, 5, CHANNELS, 5, 7), seed)
        expected = lift(features, K, cam_T_ego, (12, 16))
        assert expected.any() == (below_m == 0)
        torch.testing.assert_close(fixed(features), expected, atol=1e-6, rtol=0)
    assert len(fixed.cells) == (8 if below_m == 0 else 4)  # of two cameras at most


def test_output_is_channels_last_for_the_convolution_behind_it(real):
    K, cam_T_ego, hw = real
    features = random_features((1, 6, CHANNELS, 18, 32))
    volume = SimpleBEVLift(UNEVEN, CHANNELS)(features, K, cam_T_ego, hw)
    assert volume.is_contiguous(memory_format=torch.channels_last)


def test_autocast_leaves_the_geometry_in_float32(real):
    K, cam_T_ego, hw = real
    features = random_features((1, 6, CHANNELS, 18, 32))
    lift = SimpleBEVLift(UNEVEN, CHANNELS)
    expected = lift(features, K, cam_T_ego, hw)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(lift(features, K, cam_T_ego, hw), expected)
        half = lift(features.bfloat16(), K, cam_T_ego, hw)
    assert half.dtype == torch.bfloat16
    # Features and weights are rounded to 8 bits, but a voxel never moves by a pixel.
    torch.testing.assert_close(half.float(), expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("feature_hw", [(9, 16), (5, 7), (1, 4), (3, 1), (1, 1)])
def test_bilinear_corners_equal_border_padded_sampling(feature_hw):
    H, W = 90, 160
    rng = np.random.default_rng(3)
    uv = rng.uniform([-10, -10], [W + 10, H + 10], (300, 2))
    uv[:4] = [(0, 0), (W, H), (W / 2, 0), (0, H / 2)]
    features = rng.normal(size=(CHANNELS, *feature_hw))
    cells, weights = bilinear_corners(torch.from_numpy(uv), feature_hw, (H, W))
    assert cells.shape == weights.shape == (300, 4)
    assert (weights >= 0).all()
    flat = torch.from_numpy(features).flatten(1)
    got = (flat[:, cells] * weights).sum(dim=-1).T.numpy()
    naive = [
        sum(w * features[:, i, j] for i, j, w in reference.bilinear_cells(u, v, (H, W), feature_hw))
        for u, v in uv.tolist()
    ]
    np.testing.assert_allclose(got, naive, atol=1e-12)
    position = torch.from_numpy(uv) / torch.tensor([W, H]) * 2 - 1
    sampled = F.grid_sample(
        torch.from_numpy(features)[None],
        position[None, None],
        padding_mode="border",
        align_corners=False,
    )
    np.testing.assert_allclose(got, sampled[0, :, 0].T.numpy(), atol=1e-12)


def test_volume_centres_run_over_x_then_y_then_z():
    centres = volume_centres(UNEVEN, torch.device("cpu"))
    bounds = reference.bounds_of(UNEVEN)
    expected = [(*reference.voxel_centre(*voxel, bounds), 1.0) for voxel in every_voxel(UNEVEN)]
    assert centres.dtype == torch.float32
    np.testing.assert_allclose(centres.numpy(), expected, atol=2e-6)
