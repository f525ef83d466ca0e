"""The sparse OccFeat head against the paper's dense form: values, gradients, parameters."""

import math

import numpy as np
import pytest
import torch
import train_reference as reference

from occfeat_train.objectives import occfeat as occfeat_head
from occfeat_train.objectives.occfeat import PRIOR, OccFeatHead

C, Z, N_Y = 6, 3, 5
B, X, Y = 3, 5, 7
BOTH, OCCUPANCY, FEATURES = (True, True), (True, False), (False, True)
VARIANTS = pytest.mark.parametrize("variant", [BOTH, OCCUPANCY, FEATURES], ids=str)


def make(variant=BOTH, seed=0):
    """A head in double precision with every parameter random, biases too, and a BEV map."""
    torch.manual_seed(seed)
    head = OccFeatHead(C, Z, N_Y, *variant).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return head, torch.randn(B, C, X, Y, dtype=torch.float64)


def some_voxels(n, seed=1):
    """Flat indices of several samples, in no order."""
    return torch.from_numpy(np.random.default_rng(seed).permutation(B * Z * X * Y)[:n])


def gradients(head, bev, outputs, seed=2):
    """Of a random linear function of the outputs, by the input and by every parameter."""
    head.zero_grad()
    bev.grad = None
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for output in outputs:
        if output is not None:
            total = total + (output * torch.randn(output.shape, generator=generator)).sum()
    total.backward()
    found = {name: p.grad.clone() for name, p in head.named_parameters()}
    return found | {"input": bev.grad.clone()}


@VARIANTS
@pytest.mark.parametrize("n_voxels", [40, 1, B * Z * X * Y])
def test_values_and_gradients_equal_the_dense_form(variant, n_voxels):
    head, bev = make(variant)
    bev.requires_grad_()
    voxel = some_voxels(n_voxels)
    dense_logits, dense_features = reference.dense_head(head, bev)
    if dense_features is not None:
        dense_features = reference.at_voxels(dense_features, voxel)
    expected = gradients(head, bev, (dense_logits, dense_features))
    logits, features = head(bev, voxel)
    for got, dense, wanted in zip(
        (logits, features), (dense_logits, dense_features), variant, strict=True
    ):
        assert (got is not None) == wanted
        if wanted:
            assert got.shape == dense.shape
            torch.testing.assert_close(got, dense, atol=1e-10, rtol=1e-10)
    found = gradients(head, bev, (logits, features))
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_dense_form_is_what_the_paper_says_for_one_voxel():
    """The reference itself, with one voxel worked out by hand from the mixed map."""
    head, bev = make()
    p = {name: value.detach().numpy() for name, value in head.named_parameters()}
    mixed = head.mix(bev).detach().numpy()
    b, x, y, z = 1, 3, 2, 2
    group = slice(z * C, (z + 1) * C)  # Z groups of N_B channels
    vector = p["unsplat.weight"][group] @ mixed[b, :, x, y] + p["unsplat.bias"][group]
    hidden = np.log1p(np.exp(p["expand.weight"] @ vector + p["expand.bias"]))
    voxel = p["reduce.weight"] @ hidden + p["reduce.bias"]
    logits, features = (out.detach().numpy() for out in reference.dense_head(head, bev))
    occupancy = p["occupancy.weight"] @ voxel + p["occupancy.bias"]
    np.testing.assert_allclose(logits[b, z, x, y], occupancy[0])
    expected = p["features.weight"] @ voxel + p["features.bias"]
    np.testing.assert_allclose(features[b, :, z, x, y], expected)


def test_the_mixed_map_is_convolved_normalised_and_rectified_by_hand():
    head, bev = make()
    weight, bias = (head.mix[0].get_parameter(n).detach().numpy() for n in ("weight", "bias"))
    padded = np.pad(bev.numpy(), [(0, 0), (0, 0), (1, 1), (1, 1)])
    expected = np.zeros((B, C, X, Y))
    for b, c, x, y in np.ndindex(expected.shape):
        expected[b, c, x, y] = (weight[c] * padded[b, :, x : x + 3, y : y + 3]).sum() + bias[c]
    for b, c in np.ndindex(B, C):
        values = expected[b, c]
        variance = ((values - values.mean()) ** 2).mean()
        expected[b, c] = np.maximum((values - values.mean()) / math.sqrt(variance + 1e-5), 0)
    np.testing.assert_allclose(head.mix(bev).detach().numpy(), expected, atol=1e-12)


def test_row_blocks_do_not_change_values_or_gradients(monkeypatch):
    head, bev = make()
    bev.requires_grad_()
    voxel = some_voxels(30)
    whole = head(bev, voxel)
    expected = gradients(head, bev, whole)
    monkeypatch.setattr(occfeat_head, "_ROWS", 8)  # 105 rows: 14 blocks, the last one short
    blocks = head(bev, voxel)
    torch.testing.assert_close(blocks, whole, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradients(head, bev, blocks), expected, atol=1e-11, rtol=1e-11)


def test_features_come_in_the_order_of_the_voxels():
    head, bev = make()
    ascending = some_voxels(25).sort().values
    shuffled = ascending[torch.from_numpy(np.random.default_rng(4).permutation(25))]
    everything = head(bev, torch.arange(B * Z * X * Y))[1]
    torch.testing.assert_close(head(bev, ascending)[1], everything[ascending])
    torch.testing.assert_close(head(bev, shuffled)[1], everything[shuffled])
    assert everything.unique(dim=0).shape == everything.shape  # or any order would do


@VARIANTS
def test_without_voxels_there_are_no_features_and_still_gradients(variant):
    head, bev = make(variant)
    bev.requires_grad_()
    logits, features = head(bev, torch.zeros(0, dtype=torch.int64))
    if variant[1]:
        assert features.shape == (0, N_Y)
    if variant[0]:
        torch.testing.assert_close(logits, reference.dense_head(head, bev)[0])
    # A parameter without a gradient would stop distributed training.
    found = gradients(head, bev, (logits, features))
    assert all(gradient is not None for gradient in found.values())


@VARIANTS
def test_every_parameter_is_used(variant):
    head, bev = make(variant)
    bev.requires_grad_()
    found = gradients(head, bev, head(bev, some_voxels(20)))
    for name, gradient in found.items():
        # The normalisation takes away what the bias before it adds.
        assert gradient.any() or name == "mix.0.bias", name


def test_the_paper_s_size_has_395265_parameters():
    head = OccFeatHead(128, 8, 384)
    assert sum(p.numel() for p in head.parameters()) == 395_265
    assert not list(head.buffers())  # nothing else is stored or averaged


@pytest.mark.parametrize(("variant", "absent"), [(OCCUPANCY, 49_536), (FEATURES, 129)])
def test_a_variant_lacks_just_the_parameters_of_the_other_output(variant, absent):
    head = OccFeatHead(128, 8, 384, *variant)
    assert sum(p.numel() for p in head.parameters()) == 395_265 - absent


def test_predicted_occupancy_starts_near_its_share():
    torch.manual_seed(0)
    head = OccFeatHead(32, 8, 16)
    assert head.occupancy.bias.sigmoid().item() == pytest.approx(PRIOR, rel=1e-5)
    probability = head(torch.randn(1, 32, 20, 20), torch.zeros(0, dtype=torch.int64))[0].sigmoid()
    assert PRIOR / 2 < probability.mean() < PRIOR * 2


def test_training_and_evaluation_mode_are_the_same():
    head, bev = make()
    voxel = some_voxels(10)
    trained = head.train()(bev, voxel)
    torch.testing.assert_close(head.eval()(bev, voxel), trained, atol=0, rtol=0)
