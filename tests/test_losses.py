"""Loss terms against naive sums, with their gradients."""

import numpy as np
import pytest
import torch
import train_reference as reference

from occfeat_train.objectives.occfeat import cosine_sum, occupancy_sum
from occfeat_train.tasks.masks import segmentation_sum
from occfeat_train.tasks.vehicle import centre_sums, offset_sum

B, Z, X, Y = 2, 3, 4, 5


def rng(seed=0):
    return np.random.default_rng(seed)


def tensor(array):
    return torch.from_numpy(np.asarray(array))


def assert_loss(function, naive, x, rtol=1e-5):
    """Value and gradient of a torch function of one array against those of a naive one."""
    argument = tensor(x).requires_grad_()
    value = function(argument)
    value.backward()
    assert value.item() == pytest.approx(naive(x), rel=rtol, abs=1e-6)
    expected = reference.numerical_gradient(naive, x)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(argument.grad.numpy(), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("n_occupied", [7, 0, B * Z * X * Y])
def test_occupancy_is_cross_entropy_over_all_voxels(n_occupied):
    logits = rng().normal(size=(B, Z, X, Y)) * 4
    voxel = rng(1).permutation(logits.size)[:n_occupied]
    occupied = np.zeros(logits.size)
    occupied[voxel] = 1
    assert_loss(
        lambda x: occupancy_sum(x, tensor(voxel)) / x.numel(),
        lambda x: reference.occupancy_loss(x, occupied.reshape(x.shape)),
        logits,
    )


def test_occupancy_of_certain_voxels_is_neither_infinite_nor_lost():
    logits = torch.tensor([200.0, -200.0, 200.0, -200.0]).view(1, 1, 2, 2)
    right_is_0_wrong_is_200 = occupancy_sum(logits, torch.tensor([0, 1]))
    assert right_is_0_wrong_is_200.item() == pytest.approx(400)


def test_features_are_negative_cosine_over_valid_voxels():
    predicted, target = rng().normal(size=(2, 9, 4))
    valid = rng(1).uniform(size=9) < 0.6
    assert 0 < valid.sum() < 9
    assert_loss(
        lambda x: cosine_sum(x, tensor(target), tensor(valid)) / valid.sum(),
        lambda x: reference.feature_loss(x, target, valid),
        predicted,
    )


def test_only_the_direction_of_the_target_counts():
    predicted = tensor(rng().normal(size=(6, 4)).astype(np.float32))
    codes = tensor(rng(1).integers(-127, 128, (6, 4)).astype(np.int8))  # as they are stored
    valid = torch.ones(6, dtype=torch.bool)
    scale = tensor(rng(2).uniform(0.01, 50, (6, 1)).astype(np.float32))
    expected = cosine_sum(predicted, codes * scale, valid)
    torch.testing.assert_close(cosine_sum(predicted, codes, valid), expected)
    assert cosine_sum(codes, codes, valid).item() == pytest.approx(-6)


@pytest.mark.parametrize("n", [0, 5])
def test_without_valid_voxels_features_cost_nothing(n):
    predicted = torch.randn(n, 4, requires_grad=True)
    target = torch.zeros(n, 4, dtype=torch.int8)  # what the store holds for unseen voxels
    total = cosine_sum(predicted, target, torch.zeros(n, dtype=torch.bool))
    total.backward()
    assert total.item() == 0
    assert torch.equal(predicted.grad, torch.zeros(n, 4))


def test_mask_is_weighted_cross_entropy_over_visible_cells():
    logits = rng().normal(size=(B, X, Y)) * 3
    target = (rng(1).uniform(size=logits.shape) < 0.3).astype(np.float32)
    visible = rng(2).uniform(size=logits.shape) < 0.7
    assert_loss(
        lambda x: segmentation_sum(x, tensor(target), tensor(visible), 2.13) / visible.sum(),
        lambda x: reference.mask_loss(x, target, visible, 2.13),
        logits,
    )


def test_centre_is_balanced_squared_error():
    predicted, target = rng().uniform(size=(2, B, X, Y))
    target[0, 0, 0] = 0.5  # not above one half
    near = (target > 0.5).sum()

    def balanced(x):
        above, below = centre_sums(x, tensor(target))
        return 0.5 * (above / near + below / (target.size - near))

    assert_loss(balanced, lambda x: reference.centre_loss(x, target), predicted)


def test_offset_is_l1_over_the_mask():
    predicted, target = rng().normal(size=(2, B, 2, X, Y)) * 3
    mask = rng(1).uniform(size=(B, X, Y)) < 0.4
    assert_loss(
        lambda x: offset_sum(x, tensor(target), tensor(mask)) / mask.sum(),
        lambda x: reference.offset_loss(x, target, mask),
        predicted,
    )


def test_half_precision_predictions_are_summed_in_single():
    """A sum of 4096 such terms in bfloat16 would stop at 256 or so."""
    ones = torch.ones(1, 1, 64, 64, dtype=torch.bfloat16)
    none = torch.zeros(0, dtype=torch.int64)
    everywhere = torch.ones(1, 64, 64, dtype=torch.bool)
    zero = torch.zeros(1, 64, 64)
    sums = {
        "occupancy": occupancy_sum(ones, none),
        "mask": segmentation_sum(ones[0], zero, everywhere, 1.0),
        "centre": centre_sums(ones[0], zero)[1],
        "offset": offset_sum(ones.expand(1, 2, 64, 64), torch.zeros(1, 2, 64, 64), everywhere),
        "features": cosine_sum(ones.view(-1, 1), ones.view(-1, 1), everywhere.flatten()),
    }
    softplus_of_1 = 1.3132616875
    each = {"occupancy": softplus_of_1, "mask": softplus_of_1, "centre": 1, "offset": 2}
    for name, value in sums.items():
        assert value.dtype == torch.float32, name
        assert value.item() == pytest.approx(4096 * each.get(name, -1), rel=1e-5), name
