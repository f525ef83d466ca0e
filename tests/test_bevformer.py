"""BEVFormer: deformable attention against naive loops, and the published code's bugs kept out."""

import numpy as np
import pytest
import torch
import train_reference as reference
from torch import nn
from torch.nn import functional as F

from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.settings import ConfigError
from occfeat_train.augment import NO_AUGMENT, draw, network_inputs
from occfeat_train.config import PretrainSettings, TrainConfig
from occfeat_train.data.dataset import FrameDataset
from occfeat_train.geometry import volume_centres
from occfeat_train.models.bev_net import BEVNet, ModelSettings
from occfeat_train.models.deformable import DeformableAttention, deformable_sums
from occfeat_train.models.lifts.bevformer import (
    BEVFormerLift,
    CrossAttention,
    SelfAttention,
    seen_queries,
)
from occfeat_train.network import Network
from occfeat_train.runs.job import Job
from occfeat_train.tasks import TASKS

# No two axes alike, not centred on the car; the top is above every image, x reaches behind.
UNEVEN = VoxelGrid((-9.0, 13.0, 11), (-8.0, 6.0, 7), (-2.0, 8.0, 5))
C = 8
FEATURE_HW = (5, 9)


@pytest.fixture(scope="module")
def cameras(tiny_store):
    """Calibration of two samples, the second zoomed, which leaves gaps, and turned.

    Returns: K, cam_T_ego, image (H, W).
    """
    store = open_store(tiny_store)
    frame = store.frame(0)
    K, cam_T_ego = (torch.from_numpy(frame[name]).float() for name in ("K", "cam_T_ego"))
    turned = cam_T_ego @ torch.tensor(
        [[0.8, -0.6, 0, 0.3], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    )
    zoomed = K * torch.tensor([1.9, 1.2, 1.0])[:, None]
    hw = tuple(store.attrs["config"]["images"]["size"])
    return torch.stack([K, zoomed]), torch.stack([cam_T_ego, turned]), hw


def randomised(module, seed=0, std=0.5):
    """Every parameter random, in evaluation mode: nothing is hidden by an initial value."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.eval()


def zero_offsets(attention):
    nn.init.zeros_(attention.sampling_offsets.weight)
    nn.init.zeros_(attention.sampling_offsets.bias)


def random(shape, seed=0, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def views_of(grid, K, cam_T_ego, hw):
    centres = volume_centres(grid, K.device)
    return seen_queries(centres, grid.shape[0], K, cam_T_ego, hw, FEATURE_HW)


def sampling(seed=0, shape=(7, 2, 3), size=(4, 5)):
    """Maps, positions within and around them, weights; double precision, wanting gradients."""
    rng = np.random.default_rng(seed)
    h, w = size
    values = random((3, h, w, shape[1], 3), seed, torch.float64)
    positions = torch.from_numpy(rng.uniform((-2.5, -2.5), (w + 1.5, h + 1.5), (*shape, 2)))
    weights = random(shape, seed + 1, torch.float64)
    maps = torch.from_numpy(rng.integers(0, 3, shape[0]))
    return maps, [x.requires_grad_() for x in (values, positions, weights)]


def sums_and_gradients(function, inputs, out_gradient):
    for x in inputs:
        x.grad = None
    out = function(*inputs)
    out.backward(out_gradient)
    return [out.detach(), *(x.grad.clone() for x in inputs)]


# --- sampling -------------------------------------------------------------------------------------


def test_sums_and_their_gradients_equal_the_naive_loop():
    maps, inputs = sampling()
    out_gradient = random((7, 2, 3), 5, torch.float64)
    got = sums_and_gradients(lambda v, p, w: deformable_sums(v, maps, p, w), inputs, out_gradient)
    expected = sums_and_gradients(
        lambda v, p, w: reference.deformable_sums(v, maps.tolist(), p, w), inputs, out_gradient
    )
    outside = (inputs[1] < -1).any(-1) | (inputs[1] > inputs[1].new_tensor([5, 4])).any(-1)
    assert 5 < outside.sum() < 30
    for a, b in zip(got, expected, strict=True):
        assert b.abs().max() > 0.5
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_sums_and_their_gradients_equal_grid_sample_on_whole_cells_too():
    size = 4, 8  # so that grid_sample's normalised positions are exact
    maps, (values, positions, weights) = sampling(size=size, shape=(40, 2, 3))
    with torch.no_grad():
        positions[:20].round_()
    inputs = [values, positions, weights]

    def by_grid_sample(values, positions, weights):
        grid = (2 * positions + 1) / positions.new_tensor(size[::-1]) - 1
        sampled = F.grid_sample(
            values[maps].permute(0, 3, 4, 1, 2).flatten(0, 1),  # (S·heads, D, h, w)
            grid.flatten(0, 1)[:, None],
            padding_mode="zeros",
            align_corners=False,
        )
        return torch.einsum("ndp,np->nd", sampled[:, :, 0], weights.flatten(0, 1)).view(40, 2, 3)

    out_gradient = random((40, 2, 3), 5, torch.float64)
    got = sums_and_gradients(lambda v, p, w: deformable_sums(v, maps, p, w), inputs, out_gradient)
    expected = sums_and_gradients(by_grid_sample, inputs, out_gradient)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_far_and_infinite_positions_add_nothing_and_get_no_gradient():
    maps, (values, positions, weights) = sampling()
    with torch.no_grad():
        positions[:, :, 0] = torch.tensor([-torch.inf, 1.0])
        positions[:, :, 1] = torch.tensor([1e30, -torch.inf])
        positions[:, :, 2] = torch.tensor([1.0, -1e12])
    out = deformable_sums(values, maps, positions, weights)
    out.sum().backward()
    assert not out.any()
    for x in (values, positions, weights):
        assert not x.grad.any()  # nor NaN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_samplings_at_all(dtype):
    values = random((2, 3, 4, 2, 3)).to(dtype).requires_grad_()
    empty = torch.empty(0, 2, 3, requires_grad=True)
    maps = torch.empty(0, dtype=torch.int64)
    out = deformable_sums(values, maps, torch.empty(0, 2, 3, 2), empty)
    assert out.shape == (0, 2, 3) and out.dtype == dtype
    out.sum().backward()
    assert not values.grad.any()


def test_attention_predicts_offsets_and_weights_of_each_query():
    attention = randomised(DeformableAttention(C, 4, 3)).double()
    query, values = random((6, C), 1, torch.float64), random((2, 4, 5, C), 2, torch.float64)
    centres = random((9, 3, 2), 3, torch.float64) + 2
    maps, rows = torch.tensor([0, 1] * 4 + [0]), torch.tensor([0, 0, 1, 2, 3, 3, 3, 5, 5])
    got = attention(query, values, centres, maps, rows)
    p = dict(attention.named_parameters())
    offsets = F.linear(query, p["sampling_offsets.weight"], p["sampling_offsets.bias"])
    logits = F.linear(query, p["attention_weights.weight"], p["attention_weights.bias"])
    projected = F.linear(values, p["value_proj.weight"], p["value_proj.bias"])
    for i in range(9):
        for head in range(4):
            logit = logits[rows[i]].view(4, 3)[head]
            weight = logit.exp() / logit.exp().sum()
            position = centres[i] + offsets[rows[i]].view(4, 3, 2)[head]
            expected = sum(
                weight[k] * reference.bilinear_zero(projected[maps[i]], *position[k])
                for k in range(3)
            )
            part = slice(2 * head, 2 * head + 2)
            torch.testing.assert_close(got[i, part], expected[part], atol=1e-10, rtol=0)


def test_attention_starts_as_a_star_of_equal_weights():
    torch.manual_seed(0)
    attention = DeformableAttention(C, 4, 3)
    query, values = random((1, C)), random((1, 9, 11, C))
    got = attention(query, values, torch.tensor([[[5.0, 4.0]]]), torch.tensor([0]))
    projected = (values @ attention.value_proj.weight.T)[0].detach()
    for head, (right, down) in enumerate([(1, 0), (0, 1), (-1, 0), (0, -1)]):
        expected = sum(projected[4 + k * down, 5 + k * right] for k in (1, 2, 3)) / 3
        part = slice(2 * head, 2 * head + 2)
        torch.testing.assert_close(got[0, part], expected[part])


def test_positions_keep_their_precision_under_autocast():
    attention = DeformableAttention(4, 4, 1)
    nn.init.eye_(attention.value_proj.weight)
    with torch.no_grad():
        attention.sampling_offsets.bias.copy_(torch.tensor([50.3, 0.0]).repeat(4))
    stripes = (torch.arange(100) % 2).float()[None, None, :, None].expand(1, 3, 100, 4)
    with torch.autocast("cpu", torch.bfloat16):
        query = random((1, 4)).bfloat16()
        got = attention(query, stripes, torch.tensor([[[30.25, 1.0]]]), torch.tensor([0]))
    assert got.dtype == torch.bfloat16
    # Column 80.55; rounded to 8 bits it would be 80.5.
    torch.testing.assert_close(got.float(), torch.full((1, 4), 0.55), atol=0.005, rtol=0)


# --- the two attentions ---------------------------------------------------------------------------


def test_without_offsets_self_attention_samples_each_querys_own_cell():
    module = randomised(SelfAttention(C))
    zero_offsets(module.attention)
    queries, position = random((2, 6, 9, C), 1), random((2, 6, 9, C), 2)
    layers = module.attention.value_proj, module.attention_proj, module.output_proj
    expected = queries + nn.Sequential(*layers)(queries + position)
    torch.testing.assert_close(module(queries, position), expected, atol=1e-4, rtol=1e-4)


def test_offsets_of_self_attention_run_along_y_first_then_x():
    module = randomised(SelfAttention(C))
    zero_offsets(module.attention)
    with torch.no_grad():
        module.attention.sampling_offsets.bias.copy_(torch.tensor([2.0, -1.0]).repeat(4 * 8))
    queries, position = random((1, 6, 9, C), 1), torch.zeros(1, 6, 9, C)
    layers = module.attention.value_proj, module.attention_proj, module.output_proj
    moved = nn.Sequential(*layers)(queries[:, :-1, 2:])
    got = (module(queries, position) - queries)[:, 1:, :-2]
    torch.testing.assert_close(got, moved, atol=1e-4, rtol=1e-4)


def test_without_offsets_cross_attention_is_the_mean_of_what_cameras_see_of_the_column(cameras):
    K, cam_T_ego, hw = cameras
    module = randomised(CrossAttention(C, DeformableAttention(C, 4, 5)))
    zero_offsets(module.attention)
    nn.init.zeros_(module.attention.attention_weights.weight)
    nn.init.zeros_(module.attention.attention_weights.bias)
    images = random((12, *FEATURE_HW, C), 1)
    queries, position = random((2, 11, 7, C), 2), random((2, 11, 7, C), 3)
    got = module(queries, position, images, views_of(UNEVEN, K, cam_T_ego, hw))
    seen_by, n_partly = [], 0
    projected = module.attention.value_proj(images).detach().double().numpy()
    for b, x, y in np.ndindex(2, 11, 7):
        column = [reference.voxel_centre(x, y, z, reference.bounds_of(UNEVEN)) for z in range(5)]
        mean, n_cameras, partly = reference.column_mean(
            projected[6 * b : 6 * b + 6], column, K[b].tolist(), cam_T_ego[b].tolist(), hw
        )
        seen_by.append(n_cameras)
        n_partly += partly
        expected = queries[b, x, y]
        if n_cameras:
            expected = expected + module.output_proj(torch.from_numpy(mean).float())
        torch.testing.assert_close(got[b, x, y], expected, atol=2e-3, rtol=0)
    counts = np.bincount(seen_by)
    assert len(counts) == 3 and counts.min() > 10  # by no camera, by one, by two
    assert n_partly > 20  # a camera sees some anchors of the column and not others


def test_a_query_that_no_camera_sees_keeps_its_value(cameras):
    K, cam_T_ego, hw = cameras
    views = views_of(UNEVEN, K, cam_T_ego, hw)
    queries = random((2, 11, 7, C), 2)
    module = randomised(CrossAttention(C, DeformableAttention(C, 4, 5)))
    got = module(queries, torch.zeros_like(queries), random((12, *FEATURE_HW, C), 1), views)
    unchanged = (got == queries).all(dim=-1).flatten()
    assert torch.equal(unchanged, ~views.seen)
    assert 10 < unchanged.sum() < 140


def test_what_lies_behind_a_camera_is_neither_seen_nor_sampled():
    # A camera at the origin that looks up, 4 x 4 pixels: of a column it sees what is above it.
    K = torch.tensor([[2.0, 0, 2], [0, 2.0, 2], [0, 0, 1]]).view(1, 1, 3, 3)
    cam_T_ego = torch.tensor([[0.0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).view(
        1, 1, 4, 4
    )
    below = VoxelGrid((-1.0, 1.0, 2), (-1.0, 1.0, 2), (-4.0, 0.0, 2))
    views = views_of(below, K, cam_T_ego, (4, 4))
    assert len(views.query) == 0 and not views.seen.any()
    both = VoxelGrid((-1.0, 1.0, 2), (-1.0, 1.0, 2), (-4.0, 4.0, 4))
    views = views_of(both, K, cam_T_ego, (4, 4))
    assert views.seen.all()
    assert (views.centres[:, :2] == -torch.inf).all() and views.centres[:, 2:].isfinite().all()
    module = randomised(CrossAttention(C, DeformableAttention(C, 4, 4)), std=0.05)
    images, queries = random((1, *FEATURE_HW, C), 1), random((1, 2, 2, C), 2)
    got = module(queries, torch.zeros_like(queries), images, views)
    far = views._replace(centres=views.centres.clamp(min=-1e6))
    torch.testing.assert_close(got, module(queries, torch.zeros_like(queries), images, far))
    # Depth 0: an anchor in the plane of the camera, straight beside or at its centre.
    level = VoxelGrid((-1.5, 1.5, 3), (-1.5, 1.5, 3), (-1.5, 1.5, 3))
    views = views_of(level, K, cam_T_ego, (4, 4))
    assert not views.centres.isnan().any() and (views.centres[:, :2] == -torch.inf).all()


# --- the lift -------------------------------------------------------------------------------------


def lift_of(grid=UNEVEN, channels=C):
    torch.manual_seed(1)
    lift = BEVFormerLift(grid, channels)
    for layer in lift.layers:  # so that offsets and weights depend on the query
        for attention in (layer.self_attention.attention, layer.cross_attention.attention):
            nn.init.normal_(attention.sampling_offsets.weight, std=0.1)
            nn.init.normal_(attention.attention_weights.weight, std=0.5)
    return lift.eval()


def test_a_batch_of_different_calibrations_equals_each_sample_alone(cameras):
    K, cam_T_ego, hw = cameras
    features = random((2, 6, C, *FEATURE_HW), 1)
    lift = lift_of()
    both = lift(features, K, cam_T_ego, hw)
    views = [views_of(UNEVEN, K[[b]], cam_T_ego[[b]], hw) for b in range(2)]
    assert (views[0].seen != views[1].seen).sum() > 5
    for b in range(2):
        alone = lift(features[[b]], K[[b]], cam_T_ego[[b]], hw)
        torch.testing.assert_close(both[[b]], alone, atol=1e-5, rtol=0)
    assert (both[0] - both[1]).abs().max() > 0.1


def test_the_order_of_cameras_does_not_matter(cameras):
    K, cam_T_ego, hw = cameras
    features, order, lift = random((2, 6, C, *FEATURE_HW), 1), [4, 2, 0, 5, 1, 3], lift_of()
    shuffled = lift(features[:, order], K[:, order], cam_T_ego[:, order], hw)
    expected = lift(features, K, cam_T_ego, hw)
    torch.testing.assert_close(shuffled, expected, atol=1e-5, rtol=0)
    assert expected.shape == (2, C, 11, 7)
    assert expected.is_contiguous(memory_format=torch.channels_last)


def test_cells_are_in_their_place(cameras):
    """Image features of one camera change the BEV only around what that camera sees."""
    K, cam_T_ego, hw = cameras
    lift = lift_of()
    for layer in lift.layers:
        zero_offsets(layer.self_attention.attention)
    features = random((2, 6, C, *FEATURE_HW), 1)
    changed = features.clone()
    changed[:, 1] += 1
    moved = lift(changed, K, cam_T_ego, hw) != lift(features, K, cam_T_ego, hw)
    views = views_of(UNEVEN, K, cam_T_ego, hw)
    sees = torch.zeros(2 * 11 * 7, dtype=torch.bool)
    sees[views.query[views.camera % 6 == 1]] = True
    moved = moved.any(dim=1).flatten()
    assert not moved[~sees].any()
    assert moved[sees].float().mean() > 0.9 and 10 < sees.sum() < 100


def test_cameras_that_see_nothing_still_leave_a_map_and_gradients_to_learn_from(cameras):
    K, cam_T_ego, hw = cameras
    cam_T_ego = cam_T_ego.clone()
    cam_T_ego[..., 2, 3] -= 100  # everything far behind all cameras
    features = random((2, 6, C, *FEATURE_HW), 1).requires_grad_()
    lift = lift_of()
    bev = lift(features, K, cam_T_ego, hw)
    assert torch.equal(bev[0], bev[1]) and bev.any()
    bev.square().sum().backward()
    assert not features.grad.any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lift.parameters())


@pytest.mark.parametrize("below_m", [0, 100])
def test_with_cameras_as_constants_it_is_the_same_lift(below_m, cameras):
    """Also with anchors behind a camera, queries of several cameras, and cameras that see none."""
    K, cam_T_ego, hw = (x[[1]] if torch.is_tensor(x) else x for x in cameras)
    cos, sin = np.cos(0.9), np.sin(0.9)  # looking down, so that a column may pass behind a camera
    down = torch.tensor([[1, 0, 0, 0], [0, cos, -sin, 0], [0, sin, cos, 0], [0, 0, 0, 1]]).float()
    cam_T_ego = down @ cam_T_ego
    cam_T_ego[..., 2, 3] -= below_m
    views, lift = views_of(UNEVEN, K, cam_T_ego, hw), lift_of()
    assert views.seen.any() == (below_m == 0)
    fixed = lift.fixed(K, cam_T_ego, hw, FEATURE_HW)
    if below_m == 0:
        assert (views.centres == -torch.inf).any() and len(fixed.rows) > 1
        assert 0 < views.seen.float().mean() < 1
    for seed in range(2):
        features = random((1, 6, C, *FEATURE_HW), seed)
        expected = lift(features, K, cam_T_ego, hw)
        torch.testing.assert_close(fixed(features), expected, atol=1e-5, rtol=0)


def test_dropout_is_for_training_only(cameras):
    K, cam_T_ego, hw = cameras
    features, lift = random((2, 6, C, *FEATURE_HW), 1), lift_of()
    assert torch.equal(lift(features, K, cam_T_ego, hw), lift(features, K, cam_T_ego, hw))
    lift.train()
    assert not torch.equal(lift(features, K, cam_T_ego, hw), lift(features, K, cam_T_ego, hw))


def test_autocast_leaves_the_geometry_in_float32(cameras):
    K, cam_T_ego, hw = cameras
    features, lift = random((2, 6, C, *FEATURE_HW), 1), lift_of()
    expected = lift(features, K, cam_T_ego, hw)
    with torch.autocast("cpu", torch.bfloat16):
        half = lift(features.bfloat16(), K, cam_T_ego, hw)
    assert half.dtype == torch.bfloat16
    half.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lift.parameters())
    error = (half.float() - expected).abs()
    assert error.mean() < 0.03 and error.max() < 0.3  # of values of size 1


def test_number_of_parameters_at_the_papers_size():
    with torch.device("meta"):
        lift = BEVFormerLift(VoxelGrid(), 128)

    def linear(n_in, n_out):
        return n_in * n_out + n_out

    attention = linear(128, 128) + linear(128, 4 * 8 * 2) + linear(128, 4 * 8)
    self_attention, cross_attention = attention + 2 * linear(128, 128), attention + linear(128, 128)
    ffn = linear(128, 1024) + linear(1024, 128)
    layer = self_attention + cross_attention + ffn + 3 * 2 * 128
    expected = 2 * 128 * 200 * 200 + 6 * layer
    assert sum(p.numel() for p in lift.parameters()) == expected == 12_468_352


def test_the_queries_start_small():
    lift = BEVFormerLift(VoxelGrid((-1.0, 1.0, 20), (-1.0, 1.0, 30), (-1.0, 1.0, 2)), C)
    for parameter in (lift.bev_queries, lift.bev_queries_pos):
        assert parameter.shape == (C, 20, 30)
        assert 0.09 < parameter.std() < 0.11 and parameter.mean().abs() < 0.01
    assert not torch.equal(lift.bev_queries, lift.bev_queries_pos)


# --- the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["occfeat", "img-also", "vehicle"])
def test_a_training_step_reaches_every_parameter(name, tiny_store):
    model = ModelSettings(
        lift="bevformer", encoder_weights="random", image_size=(32, 64), channels=C
    )
    finetunes = name in TASKS.names
    config = TrainConfig(
        model=model, pretrain=PretrainSettings(objective="occfeat" if finetunes else name)
    )
    job = Job("finetune", "", config, task=name) if finetunes else Job("pretrain", "", config)
    store = open_store(tiny_store)
    torch.manual_seed(0)
    network = Network(job.sensor, job.objective(store)).train()
    assert isinstance(network.bev_net.lift, BEVFormerLift)
    dataset = FrameDataset(tiny_store, [0, 1], ("images", *network.objective.arrays))
    batch = dataset.collate([dataset[i] for i in range(2)])
    inputs = network_inputs(batch, draw(NO_AUGMENT, 0, 0, batch["frame"], 6), (32, 64), 0.0)
    targets = network.objective.targets(batch | {"seed": batch["frame"]}, torch.zeros(2))
    loss, _ = network(inputs, targets, network.objective.counts(targets), 1.0)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or not name.startswith("bev_net.lift"), name


def test_the_lift_follows_the_configuration():
    config = ModelSettings(lift="bevformer", encoder_weights="random", channels=C)
    names = [name for name, _ in BEVNet(config, UNEVEN).named_parameters()]
    assert any(name.startswith("lift.") for name in names)
    assert not any(name.startswith("compressor.") for name in names)
    simple = BEVNet(ModelSettings(encoder_weights="random", channels=C), UNEVEN)
    assert not any(name.startswith("lift.") for name, _ in simple.named_parameters())


def test_bev_flips_mirror_x_and_y_and_are_undone(cameras):
    K, cam_T_ego, _ = cameras
    torch.manual_seed(0)
    model = ModelSettings(lift="bevformer", encoder_weights="random", channels=C)
    network = BEVNet(model, UNEVEN).eval()
    network.decoder = nn.Identity()
    decoded = []
    network.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(inputs[0]))
    images = torch.rand(2, 6, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    plain = network(images, K, cam_T_ego)
    flip = torch.tensor([[True, False], [False, True]])
    assert torch.equal(network(images, K, cam_T_ego, bev_flip=flip), plain)
    assert torch.equal(decoded[1][0], plain[0].flip(-2))
    assert torch.equal(decoded[1][1], plain[1].flip(-1))


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="no lift 'lss' .known: simplebev, bevformer"):
        ModelSettings.of({"lift": "lss"}, "model")
    with pytest.raises(ConfigError, match="model.channels must be a multiple of 4"):
        ModelSettings.of({"lift": "bevformer", "channels": 6}, "model")
