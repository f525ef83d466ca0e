"""The lidar network, against loops over cells, and the published numbers of parameters."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from occfeat_train.data.cloud import neighbours, plane_cells
from occfeat_train.models.lidar_settings import PLANES, LidarSettings
from occfeat_train.models.waffle_iron import Embedding, Layer, WaffleIron

TINY = LidarSettings(size="3-4", reach_m=(4.0, 4.0, 2.0), cell_m=1.0, neighbours=3)


def rows_of(settings, sizes, seed=0):
    """Inputs of clouds of some sizes."""
    rng, parts, first = np.random.default_rng(seed), [], 0
    for b, n in enumerate(sizes):
        xyz = rng.uniform(-1, 1, (n, 3)) * settings.reach_m
        x, y, z = settings.cells
        features = np.column_stack([rng.normal(size=n), xyz, np.linalg.norm(xyz, axis=1)])
        parts.append(
            (
                features.astype(np.float32),
                neighbours(xyz, settings.neighbours) + first,
                plane_cells(xyz, settings) + b * np.array([x * y, x * z, y * z]),
            )
        )
        first += n
    joined = [torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True)]
    return dict(zip(("features", "neighbours", "cells"), joined, strict=True)) | {
        "n_rows": torch.tensor(sizes)
    }


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("size", "batch_norm", "head", "published"),
    [
        ("48-384", True, 16, 15_125_796),  # WaffleIron's paper: 15.1 M
        ("48-256", True, 16, 6_839_844),  # 6.8 M
        ("48-768", False, 1024, 60_222_996),  # ScaLR
        ("48-768", False, 384, 59_730_836),
        ("48-384", False, 384, 15_267_476),
        ("48-256", False, 384, 6_934_420),
        ("12-64", False, 384, 157_972),
    ],
)
def test_sizes_have_the_published_number_of_parameters(size, batch_norm, head, published):
    settings = LidarSettings(size=size, batch_norm=batch_norm)
    with torch.device("meta"):
        net, linear = WaffleIron(settings), nn.Linear(settings.width, head)
    assert parameters(net) + parameters(linear) == published


def embedding_by_loop(module, features, neighbours):
    """One row at a time, as WI's ``embedding.py`` says; batch norms by their stored statistics."""
    norm, (norm_in, enter, norm_out, _, leave) = module.norm, module.beside

    def normed(x, by):
        return (x - by.running_mean) / (by.running_var + by.eps).sqrt() * by.weight + by.bias

    features, found = normed(features, norm), []
    for i, row in enumerate(features):
        beside = []
        for j in neighbours[i]:
            hidden = enter.weight @ normed(features[j] - row, norm_in)
            beside.append(leave.weight @ normed(hidden, norm_out).clamp(min=0))
        largest = torch.stack(beside).max(dim=0).values
        own = module.point.weight @ row + module.point.bias
        found.append(module.merge.weight @ torch.cat([own, largest]) + module.merge.bias)
    return torch.stack(found)


def layer_by_loop(layer, rows, cells, shape):
    """One cloud, one cell at a time: a dense picture (C, H, W) of means, convolved."""
    normed = F.layer_norm(rows, rows.shape[1:], layer.space_norm.weight, layer.space_norm.bias)
    picture = torch.zeros(rows.shape[1], *shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            inside = [r for r in range(len(rows)) if cells[r] == i * shape[1] + j]
            if inside:
                picture[:, i, j] = normed[inside].mean(dim=0)
    for conv in (layer.space[0], layer.space[2]):
        padded = F.pad(picture, (1, 1, 1, 1))
        out = torch.zeros_like(picture)
        for di in range(3):
            for dj in range(3):
                part = padded[:, di : di + shape[0], dj : dj + shape[1]]
                out += conv.weight[:, 0, di, dj, None, None] * part
        picture = out + conv.bias[:, None, None]
        if conv is layer.space[0]:
            picture = picture.clamp(min=0)
    mixed = torch.stack([picture[:, c // shape[1], c % shape[1]] for c in cells.tolist()])
    rows = rows + mixed * layer.space_scale
    normed = F.layer_norm(rows, rows.shape[1:], layer.channel_norm.weight, layer.channel_norm.bias)
    enter, _, leave = layer.channels
    hidden = (normed @ enter.weight.T + enter.bias).clamp(min=0)
    return rows + (hidden @ leave.weight.T + leave.bias) * layer.channel_scale


def network(settings=TINY, seed=0):
    torch.manual_seed(seed)
    net = WaffleIron(settings)
    for module in net.modules():  # statistics and weights that nothing cancels
        if isinstance(module, nn.BatchNorm1d | nn.LayerNorm):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


def test_the_network_is_the_loop_over_rows_and_cells():
    net, inputs = network(), rows_of(TINY, [40])
    rows = embedding_by_loop(net.embedding, inputs["features"], inputs["neighbours"])
    torch.testing.assert_close(
        net.embedding(inputs["features"], inputs["neighbours"]), rows, atol=1e-5, rtol=1e-4
    )
    for i, layer in enumerate(net.layers):
        a, b = PLANES[i]
        shape = TINY.cells[a], TINY.cells[b]
        rows = layer_by_loop(layer, rows, inputs["cells"][:, i], shape)
    torch.testing.assert_close(net(**inputs), rows, atol=1e-4, rtol=1e-4)


def test_a_cloud_does_not_see_the_others_of_its_batch():
    net = network()
    both, alone = rows_of(TINY, [25, 30]), rows_of(TINY, [25])
    torch.testing.assert_close(net(**both)[:25], net(**alone), atol=1e-5, rtol=1e-5)


def test_permuted_points_give_permuted_outputs():
    net, inputs = network(), rows_of(TINY, [40])
    order = torch.from_numpy(np.random.default_rng(1).permutation(40))
    place = torch.empty_like(order)
    place[order] = torch.arange(40)
    permuted = {
        "features": inputs["features"][order],
        "neighbours": place[inputs["neighbours"][order]],
        "cells": inputs["cells"][order],
        "n_rows": inputs["n_rows"],
    }
    torch.testing.assert_close(net(**permuted), net(**inputs)[order], atol=1e-5, rtol=1e-5)


def test_gradients():
    net, inputs = network().double().train(), rows_of(TINY, [12])
    features = inputs.pop("features").double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: net(features=x, **inputs), (features,))


def test_every_weight_learns():
    net, inputs = network().train(), rows_of(TINY, [30, 20])
    net(**inputs).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    layer = Layer(4, nn.LayerNorm, 0.25).train()
    sample = torch.arange(3000).repeat_interleave(2)
    kept = layer._drop(torch.ones(6000, 4), sample, 3000)
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(kept[::2], kept[1::2])
    assert kept.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(layer.eval()._drop(torch.ones(4, 4), sample[:4], 2), torch.ones(4, 4))


def test_its_parts_are_all_of_it_in_order():
    net = network()
    parts = net.in_layers()
    assert isinstance(parts[0], Embedding) and len(parts) == 1 + TINY.depth
    assert sum(map(parameters, parts)) == parameters(net)
