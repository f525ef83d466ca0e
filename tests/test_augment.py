"""Augmentation: images, intrinsics and cameras stay consistent; draws are reproducible."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train_reference as reference

from occfeat_train.augment import NO_AUGMENT, AugmentSettings, Draws, draw, network_inputs
from occfeat_train.config import RunSettings, TrainConfig
from occfeat_train.evaluate import predict
from occfeat_train.geometry import resize_and_crop, rotation_z
from occfeat_train.models.bev_net import ModelSettings
from occfeat_train.sensors.camera import Camera

# Below 256 pixels a side, so that one grey level is one pixel and a ramp is exact.
STORED_WH = (240, 136)
NETWORK_HW = (104, 176)  # another aspect ratio
N = 3
AUGMENT = AugmentSettings()


def painted(batch):
    """uint8 (B, N, H, W, 3): red is the pixel's column, green its row, blue says "image"."""
    width, height = STORED_WH
    image = np.empty((height, width, 3), np.uint8)
    image[..., 0] = np.arange(width)
    image[..., 1] = np.arange(height)[:, None]
    image[..., 2] = 255
    return torch.from_numpy(image).expand(batch, N, -1, -1, -1).contiguous()


def cameras(batch, seed=0):
    """Tilted cameras with odd intrinsics, looking in all directions."""
    rng = np.random.default_rng(seed)
    K, cam_T_ego = np.zeros((batch, N, 3, 3)), np.zeros((batch, N, 4, 4))
    for index in np.ndindex(batch, N):
        fx, fy = rng.uniform(100, 160, 2)
        x0, y0 = np.array(STORED_WH) / 2 + rng.uniform(-10, 10, 2)
        K[index] = [[fx, 0, x0], [0, fy, y0], [0, 0, 1]]
        rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        rotation *= np.linalg.det(rotation)  # proper
        cam_T_ego[index][:3, :3], cam_T_ego[index][:3, 3] = rotation, rng.uniform(-2, 2, 3)
        cam_T_ego[index][3, 3] = 1
    return torch.from_numpy(K).float(), torch.from_numpy(cam_T_ego).float()


def stored_batch(batch, seed=0):
    K, cam_T_ego = cameras(batch, seed)
    return {"images": painted(batch), "K": K, "cam_T_ego": cam_T_ego}


def plain(batch, **changes):
    """Draws that change nothing, but for what is given."""
    nothing = Draws(
        torch.ones(batch, N),
        torch.zeros(batch, N, 2),
        torch.zeros(batch, N, dtype=torch.bool),
        torch.zeros(batch, 2, dtype=torch.bool),
        torch.zeros(batch),
        torch.zeros(batch, dtype=torch.int64),
    )
    return replace(nothing, **changes)


def decode(image, u, v):
    """(blue, old u, old v) of the network's image (3, H, W) at a pixel."""
    red, green, blue = reference.bilinear_pixel(image, u, v) * 255
    return blue / 255, red + 0.5, green + 0.5


def test_a_point_in_space_shows_the_same_image_content_after_augmentation():
    batch, (width, height), (new_height, new_width) = 8, STORED_WH, NETWORK_HW
    stored = stored_batch(batch)
    draws = draw(AUGMENT, 7, 3, torch.arange(batch), N)
    assert 0.2 < draws.image_flip.float().mean() < 0.8
    inputs = network_inputs(stored, draws, NETWORK_HW, AUGMENT.shift)
    images = inputs["images"].double().numpy()
    rng = np.random.default_rng(1)
    checked, outside = 0, 0
    for b, n in np.ndindex(batch, N):
        camera = [stored[name][b, n].tolist() for name in ("K", "cam_T_ego")]
        changed = [inputs[name][b, n].tolist() for name in ("K", "cam_T_bev")]
        for point in rng.uniform(-20, 20, (400, 3)).tolist():
            u, v, depth = reference.project(point, *camera)
            if depth < 0.1 or not (2 < u < width - 2 and 2 < v < height - 2):
                continue
            in_bev = reference.turn(point, draws.angle[b].item())
            new_u, new_v, new_depth = reference.project(in_bev, *changed)
            assert new_depth == pytest.approx(depth, abs=1e-4)
            if not (0.5 < new_u < new_width - 0.5 and 0.5 < new_v < new_height - 0.5):
                outside += 1
                continue
            shown_u = new_width - new_u if draws.image_flip[b, n] else new_u
            is_image, old_u, old_v = decode(images[b, n], shown_u, new_v)
            if is_image < 0.999:  # fades to black within a pixel of the border
                continue
            assert (old_u, old_v) == pytest.approx((u, v), abs=0.01)
            checked += 1
    assert checked > 300 and outside > 50


def test_what_was_not_in_the_image_is_black():
    draws = draw(AUGMENT, 1, 0, torch.arange(6), N)
    inputs = network_inputs(stored_batch(6), draws, NETWORK_HW, AUGMENT.shift)
    new_height, new_width = NETWORK_HW
    identity = network_inputs(
        stored_batch(6) | {"K": torch.eye(3).expand(6, N, 3, 3)}, draws, NETWORK_HW, AUGMENT.shift
    )["K"]
    n_black = 0
    for b, n in np.ndindex(6, N):
        (sx, _, left), (_, sy, top) = identity[b, n, :2].tolist()
        columns = (np.arange(new_width) + 0.5 - left) / sx
        rows = (np.arange(new_height) + 0.5 - top) / sy
        if draws.image_flip[b, n]:
            columns = columns[::-1]
        from_border = np.minimum(
            np.minimum(columns, STORED_WH[0] - columns)[None],
            np.minimum(rows, STORED_WH[1] - rows)[:, None],
        )
        image = inputs["images"][b, n].numpy()
        assert (image[:, from_border < -0.51] == 0).all()
        np.testing.assert_allclose(image[2, from_border > 0.51], 1, atol=1e-5)
        n_black += (from_border < -0.51).sum()
    assert n_black > 1000


def test_images_are_floats_from_0_to_1():
    stored = stored_batch(1)
    stored["images"] = torch.randint(256, stored["images"].shape, dtype=torch.uint8)
    images = network_inputs(stored, plain(1), NETWORK_HW, 0.2)["images"]
    assert images.dtype == torch.float32 and images.shape == (1, N, 3, *NETWORK_HW)
    assert images.min() >= 0 and images.max() <= 1
    assert images.mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("whole_pixels", [False, True])
def test_intrinsics_follow_simple_bev(whole_pixels):
    """Whose code cuts the size and both parts of the offset to whole pixels."""
    batch, (height, width) = 5, NETWORK_HW
    stored = stored_batch(batch)
    draws = draw(AUGMENT, 3, 0, torch.arange(batch), N)
    K = network_inputs(stored, draws, NETWORK_HW, AUGMENT.shift)["K"].numpy()
    for b, n in np.ndindex(batch, N):
        shift_px = draws.shift[b, n].numpy().astype(float) * 0.2 * height  # both axes: the height's
        expected = reference.published_intrinsics(
            stored["K"][b, n].double().numpy(),
            STORED_WH,
            (width, height),
            draws.resize[b, n].item(),
            shift_px,
            whole_pixels,
        )
        got = [K[b, n, 0, 0], K[b, n, 1, 1], K[b, n, 0, 2], K[b, n, 1, 2]]
        tolerance = 3 if whole_pixels else 1e-4
        np.testing.assert_allclose(got, expected, atol=tolerance)
        np.testing.assert_array_equal(K[b, n][[0, 1, 2, 2, 2], [1, 0, 0, 1, 2]], [0, 0, 0, 0, 1])


def test_resize_and_crop_leaves_its_argument_alone():
    K = cameras(1)[0]
    before = K.clone()
    changed = resize_and_crop(
        K, torch.full((1, N, 2), 2.0), torch.tensor([3.0, -5.0]).expand(1, N, 2)
    )
    assert torch.equal(K, before)
    torch.testing.assert_close(changed[..., 0, 0], 2 * K[..., 0, 0])
    torch.testing.assert_close(changed[..., :2, 2], 2 * K[..., :2, 2] - torch.tensor([3.0, -5.0]))


def resized(image, hw):
    """Bilinear resize of (H, W, 3), the border repeated, in a loop over pixels."""
    image = image.transpose(2, 0, 1).astype(np.float64)
    _, old_height, old_width = image.shape
    result = np.zeros((3, *hw))
    for i, j in np.ndindex(hw):
        u, v = (j + 0.5) * old_width / hw[1], (i + 0.5) * old_height / hw[0]
        result[:, i, j] = reference.bilinear_pixel(image, u, v)
    return result / 255


def evaluation_images(hw):
    stored = stored_batch(2)
    rng = np.random.default_rng(0)
    stored["images"] = torch.from_numpy(
        rng.integers(256, size=stored["images"].shape, dtype=np.uint8)
    )
    draws = draw(NO_AUGMENT, 5, 9, torch.tensor([4, 2]), N)
    return stored, network_inputs(stored, draws, hw, NO_AUGMENT.shift)


@pytest.mark.parametrize("hw", [(50, 90), (136, 240)])
def test_without_augmentation_images_are_resized_and_nothing_else(hw):
    stored, inputs = evaluation_images(hw)
    for b, n in ((0, 0), (1, 2)):
        expected = resized(stored["images"][b, n].numpy(), hw)
        np.testing.assert_allclose(inputs["images"][b, n].numpy(), expected, atol=1e-4)
    scale = torch.tensor([hw[1] / 240, hw[0] / 136, 1.0])
    torch.testing.assert_close(inputs["K"], stored["K"] * scale[:, None])
    assert torch.equal(inputs["cam_T_bev"], stored["cam_T_ego"])
    assert not inputs["image_flip"].any() and not inputs["bev_flip"].any()


def test_without_augmentation_enlarged_images_are_resized_and_nothing_else():
    stored, inputs = evaluation_images((150, 260))
    expected = resized(stored["images"][0, 0].numpy(), (150, 260))
    np.testing.assert_allclose(inputs["images"][0, 0].numpy(), expected, atol=1e-4)


def test_mirroring_an_image_mirrors_it_and_nothing_else():
    stored = stored_batch(2)
    flip = torch.tensor([[True, False, True], [False, False, True]])
    moved = {"resize": torch.full((2, N), 0.9), "shift": torch.full((2, N, 2), 0.3)}
    straight = network_inputs(stored, plain(2, **moved), NETWORK_HW, 0.2)
    mirrored = network_inputs(stored, plain(2, image_flip=flip, **moved), NETWORK_HW, 0.2)
    for b, n in np.ndindex(2, N):
        expected = straight["images"][b, n]
        assert not torch.allclose(expected, expected.flip(-1), atol=0.1)
        if flip[b, n]:
            expected = expected.flip(-1)
        torch.testing.assert_close(mirrored["images"][b, n], expected, atol=1e-5, rtol=0)
    assert torch.equal(mirrored["image_flip"], flip)
    assert torch.equal(mirrored["K"], straight["K"])


def test_the_bev_flip_is_handed_on_and_changes_nothing_here():
    stored, flip = stored_batch(2), torch.tensor([[True, False], [False, True]])
    straight = network_inputs(stored, plain(2), NETWORK_HW, 0.2)
    flipped = network_inputs(stored, plain(2, bev_flip=flip), NETWORK_HW, 0.2)
    assert torch.equal(flipped.pop("bev_flip"), flip)
    assert not straight.pop("bev_flip").any()
    torch.testing.assert_close(flipped, straight, atol=0, rtol=0)


def test_turning_the_bev_changes_cameras_by_the_inverse_rotation():
    stored, angle = stored_batch(2), torch.tensor([math.pi / 2, -0.4])
    cam_T_bev = network_inputs(stored, plain(2, angle=angle), NETWORK_HW, 0.2)["cam_T_bev"]
    forward, left, up, one = 3.0, 4.0, 5.0, 1.0
    in_ego = torch.tensor([forward, left, up, one])
    in_bev = torch.tensor([-left, forward, up, one])  # turned to the left by 90 degrees
    expected = stored["cam_T_ego"][0] @ in_ego
    torch.testing.assert_close(cam_T_bev[0] @ in_bev, expected, atol=1e-5, rtol=0)
    in_bev = torch.tensor([*reference.turn((forward, left, up), -0.4), one])
    expected = stored["cam_T_ego"][1] @ in_ego
    torch.testing.assert_close(cam_T_bev[1] @ in_bev, expected, atol=1e-5, rtol=0)


def test_rotation_z_turns_counter_clockwise():
    angles = torch.tensor([0.0, 0.5, -2.0], dtype=torch.float64)
    a_T_b = rotation_z(angles)
    for matrix, angle in zip(a_T_b, angles.tolist(), strict=True):
        turned = matrix @ torch.tensor([2.0, 1.0, 3.0, 1.0], dtype=torch.float64)
        assert turned.tolist() == pytest.approx([*reference.turn((2.0, 1.0, 3.0), angle), 1.0])


def test_evaluation_in_bfloat16_sees_the_same_cameras_and_images():
    """Autocast would multiply the cameras' poses and place the pixels with eight bits."""
    stored, seen = stored_batch(2) | {"frame": torch.arange(2)}, []

    def see(images, K, cam_T_bev, image_hw):
        seen.append({"images": images, "K": K, "cam_T_bev": cam_T_bev})

    for precision in ("float32", "bfloat16"):
        model, run = ModelSettings(image_size=NETWORK_HW), RunSettings(precision=precision)
        network = SimpleNamespace(
            eval=lambda: None,
            sensor=Camera(TrainConfig(model=model, run=run)),
            backbone=SimpleNamespace(encode=lambda images: images, see=see),
            objective=SimpleNamespace(frame=lambda batch: None),
        )
        predict(network, stored, lambda bev: bev)
    single, half = seen
    assert torch.equal(half["K"], single["K"])
    torch.testing.assert_close(half["cam_T_bev"], single["cam_T_bev"])
    torch.testing.assert_close(half["images"], single["images"], atol=1e-4, rtol=0)


# --- draws ----------------------------------------------------------------------------------------


def as_dict(draws, rows=slice(None)):
    return {name: getattr(draws, name)[rows] for name in Draws.__dataclass_fields__}


def test_draws_depend_on_seed_epoch_and_frame_alone():
    frames = torch.tensor([11, 4, 900])
    together = draw(AUGMENT, 3, 5, frames, N)
    np.random.seed(1)
    torch.manual_seed(1)
    again = draw(AUGMENT, 3, 5, frames.flip(0), N)  # another order, other global generators
    torch.testing.assert_close(as_dict(again, [2, 1, 0]), as_dict(together), atol=0, rtol=0)
    for b, frame in enumerate(frames):
        alone = draw(AUGMENT, 3, 5, frame[None], N)
        torch.testing.assert_close(as_dict(alone), as_dict(together, [b]), atol=0, rtol=0)
    numbers = {
        tuple(draw(AUGMENT, seed, epoch, torch.tensor([frame]), N).resize[0].tolist())
        for seed in range(3)
        for epoch in range(3)
        for frame in range(3)
    }
    assert len(numbers) == 27
    seeds = draw(AUGMENT, 3, 5, torch.arange(100), N).seed
    assert seeds.dtype == torch.int64 and len(seeds.unique()) == 100 and (seeds >= 0).all()


def test_draws_have_the_published_ranges_and_means():
    draws = draw(AUGMENT, 0, 0, torch.arange(3000), 6)
    assert draws.resize.shape == draws.image_flip.shape == (3000, 6)
    assert draws.shift.shape == (3000, 6, 2)
    assert draws.bev_flip.shape == (3000, 2) and draws.angle.shape == (3000,)
    for values, low, high in (
        (draws.resize, 0.8, 1.2),
        (draws.shift, -1, 1),
        (draws.angle, -math.pi, math.pi),
    ):
        assert values.dtype == torch.float32
        assert low - 1e-6 <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high + 1e-6
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
        assert values.std() == pytest.approx((high - low) / math.sqrt(12), rel=0.03)
    for flips in (draws.image_flip, draws.bev_flip):
        assert flips.dtype == torch.bool
        assert flips.float().mean() == pytest.approx(0.5, abs=0.03)


def test_draws_of_cameras_and_axes_are_independent():
    draws = draw(AUGMENT, 0, 0, torch.arange(3000), 2)
    columns = [
        *draws.resize.T,
        *draws.shift.flatten(1).T,
        *draws.image_flip.float().T,
        *draws.bev_flip.float().T,
        draws.angle,
    ]
    correlation = torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns))
    assert correlation.abs().max() < 0.08


@pytest.mark.parametrize(
    ("off", "name"),
    [
        ({"flip_images": False}, "image_flip"),
        ({"flip_bev": False}, "bev_flip"),
        ({"rotate_bev_deg": 0.0}, "angle"),
    ],
)
def test_what_is_switched_off_is_never_drawn_and_the_rest_is_as_before(off, name):
    frames = torch.arange(50)
    with_it = as_dict(draw(AUGMENT, 2, 1, frames, N))
    without = as_dict(draw(AUGMENT.with_(**off), 2, 1, frames, N))
    assert with_it.pop(name).any() and not without.pop(name).any()
    torch.testing.assert_close(without, with_it, atol=0, rtol=0)


def test_angles_stay_within_the_configured_range():
    angles = draw(AUGMENT.with_(rotate_bev_deg=30.0), 0, 0, torch.arange(500), N).angle
    assert math.radians(29) < angles.abs().max() <= math.radians(30) + 1e-6
    assert angles.min() < 0 < angles.max()
