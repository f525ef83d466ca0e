"""Objectives: the papers' losses, and the same however a step is split."""

import copy
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train_reference as reference
from torch import nn

from occfeat_targets.sources.nuscenes_map import MAP_CLASSES
from occfeat_targets.store.files import StoreError
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import open_store
from occfeat_train.config import TrainConfig
from occfeat_train.models.bev_net import ModelSettings
from occfeat_train.network import Network
from occfeat_train.objectives.occfeat import OccFeat
from occfeat_train.sensors.camera import Camera
from occfeat_train.tasks.map import MapSegmentation
from occfeat_train.tasks.vehicle import VehicleSegmentation

GRID = VoxelGrid((-3.0, 3.0, 6), (-3.0, 4.0, 7), (-1.0, 2.0, 3))
C, N_Y = 6, 5
ATTRS = {
    "arrays": {},
    "point_step_m": 0.002,
    "teacher": {"dim": N_Y},
    "map_classes": list(MAP_CLASSES),
    "box_classes": ["bicycle", "car", "pedestrian"],
    "vehicle_classes": ["bicycle", "car"],
}
STORE = SimpleNamespace(url="some.zarr", grid=GRID, attrs=ATTRS)
VARIANTS = {
    "both": OccFeat.Settings(),
    "occupancy": OccFeat.Settings(features=False),
    "features": OccFeat.Settings(occupancy=False),
    "heavy features": OccFeat.Settings(feature_weight=2.5),
}


def fresh(cls, store=STORE, turned=True, **settings):
    """An objective or task as a network of C channels has it."""
    return cls(cls.Settings(**settings), store, C, turned)


def randomised(objective, seed=0):
    """In double precision, every parameter random: nothing is hidden by an initial value."""
    torch.manual_seed(seed)
    for parameter in objective.parameters():
        nn.init.normal_(parameter, std=0.5)
    return objective.double()


def occfeat(variant="both", seed=0):
    return randomised(OccFeat(VARIANTS[variant], STORE, C, turned=True), seed)


def segmentation(seed=0):
    return randomised(fresh(VehicleSegmentation), seed)


def map_segmentation(seed=0, **settings):
    return randomised(fresh(MapSegmentation, **settings), seed)


def map_truth(objective, batch, seed=0, angles=None):
    """Targets of random masks, each sample turned by another angle."""
    rng = np.random.default_rng(seed)
    stored = torch.from_numpy(rng.integers(0, 2, (batch, 5, *GRID.bev_shape), dtype=np.uint8))
    angles = torch.linspace(0, 1, batch) if angles is None else angles
    return objective.targets({"map": stored}, angles)


def bev_map(batch, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(batch, C, *GRID.bev_shape)))


def occfeat_targets(batch, seed=0, valid_share=0.7):
    rng = np.random.default_rng(seed)
    n = batch * GRID.n_voxels
    voxel = np.sort(rng.permutation(n)[: n // 8])
    return {
        "voxel": torch.from_numpy(voxel),
        "features": torch.from_numpy(rng.normal(size=(len(voxel), N_Y))),
        "valid": torch.from_numpy(rng.uniform(size=len(voxel)) < valid_share),
        "n_samples": torch.tensor(batch),
    }


def segmentation_targets(objective, batch, seed=0):
    """Of random boxes, more of them in later samples and none in the first."""
    rng = np.random.default_rng(seed)
    counts = torch.arange(batch)
    n = int(counts.sum())
    boxes = np.column_stack(
        [
            rng.uniform(-3, 3, (n, 2)),
            np.zeros(n),
            rng.uniform(1, 3, (n, 3)),
            rng.uniform(-3, 3, n),
            rng.choice([1, 2, 4], n),
        ]
    )
    boxes = torch.from_numpy(boxes.astype(np.float32))
    names = {"boxes": boxes, "box_class": torch.arange(n) % 2, "n_boxes": counts}
    return objective.targets(names, torch.linspace(0, 1, batch))


def part(targets, start, stop):
    """The targets of samples start to stop."""
    if "voxel" not in targets:
        return {name: values[start:stop] for name, values in targets.items()}
    sample = targets["voxel"] // GRID.n_voxels
    chosen = (sample >= start) & (sample < stop)
    rows = {name: targets[name][chosen] for name in ("voxel", "features", "valid")}
    rows["voxel"] = rows["voxel"] - start * GRID.n_voxels
    return rows | {"n_samples": torch.tensor(stop - start)}


def step(objective, bev, targets, cuts):
    """Loss, terms and gradients of a batch that is cut into parts, each worth the same share."""
    objective.zero_grad()
    bev = bev.clone().requires_grad_()
    pieces = [part(targets, a, b) for a, b in pairwise(cuts)]
    counts = sum(objective.counts(piece) for piece in pieces)
    total, terms = 0.0, {}
    for (a, b), piece in zip(pairwise(cuts), pieces, strict=True):
        loss, values = objective(bev[a:b], piece, counts, 1 / len(pieces))
        loss.backward()
        total += loss.item()
        for name, value in values.items():
            terms[name] = terms.get(name, 0.0) + value.item()
    found = {name: p.grad.clone() for name, p in objective.named_parameters()}
    return total, terms, found | {"bev": bev.grad}


def assert_same_step(objective, bev, targets, cuts):
    loss, terms, gradients = step(objective, bev, targets, [0, len(bev)])
    split_loss, split_terms, split_gradients = step(objective, bev, targets, cuts)
    assert split_loss == pytest.approx(loss, rel=1e-5)
    assert split_terms == pytest.approx(terms, rel=1e-5, abs=1e-7)
    for name, gradient in gradients.items():
        assert gradient.any() or name == "head.mix.0.bias", name
        torch.testing.assert_close(
            split_gradients[name],
            gradient,
            atol=1e-6 * gradient.abs().max().item() + 1e-9,
            rtol=1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )


SPLITS = pytest.mark.parametrize("cuts", [[0, 2, 4], [0, 1, 4], [0, 3, 4], [0, 1, 2, 3, 4]])


@SPLITS
@pytest.mark.parametrize("variant", ["both", "occupancy", "features"])
def test_a_pretraining_step_is_the_same_however_it_is_split(variant, cuts):
    assert_same_step(occfeat(variant), bev_map(4), occfeat_targets(4), cuts)


@SPLITS
def test_a_finetuning_step_is_the_same_however_it_is_split(cuts):
    objective = segmentation()
    assert_same_step(objective, bev_map(4), segmentation_targets(objective, 4), cuts)


@SPLITS
def test_a_map_finetuning_step_is_the_same_however_it_is_split(cuts):
    objective = map_segmentation()
    assert_same_step(objective, bev_map(4), map_truth(objective, 4), cuts)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_the_map_loss_and_its_gradient_are_the_naive_ones(weight):
    objective = map_segmentation(pos_weight=weight)
    targets = map_truth(objective, 2)
    assert targets["known"][0].all() and not targets["known"][1].all()
    logits = np.random.default_rng(0).normal(size=(2, 5, *GRID.bev_shape)) * 3
    arrays = [targets[name].numpy() for name in ("map", "known")]
    expected, terms = reference.map_loss(logits, *arrays, weight)
    slope = reference.numerical_gradient(
        lambda values: reference.map_loss(values, *arrays, weight)[0], logits
    )
    assert (slope[1][:, ~arrays[1][1]] == 0).all() and (slope[0] != 0).all()

    class Given(nn.Module):
        def forward(self, bev):
            return {"mask": bev}

    objective.head = Given()
    leaf = torch.from_numpy(logits).requires_grad_()
    loss, got = objective(leaf, targets, objective.counts(targets), 1.0)
    assert list(got) == list(MAP_CLASSES)
    assert [value.item() for value in got.values()] == pytest.approx(terms, rel=1e-5)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    np.testing.assert_allclose(leaf.grad.numpy(), slope, rtol=1e-4, atol=1e-8)


def test_the_map_head_is_one_branch_with_a_channel_per_class():
    head, bev = map_segmentation().head, bev_map(2)
    y = nn.functional.conv2d(bev, head.mask[0].weight, padding=1)
    y = nn.functional.relu(nn.functional.instance_norm(y))
    y = nn.functional.conv2d(y, head.mask[-1].weight, head.mask[-1].bias)
    assert y.shape == (2, 5, *GRID.bev_shape)
    torch.testing.assert_close(head(bev)["mask"], y)


def test_map_cells_weigh_one_by_default_and_no_weight_is_learned():
    objective = fresh(MapSegmentation)
    assert objective.settings.pos_weight == 1.0
    assert all(name.startswith("head.") for name, _ in objective.named_parameters())


def test_a_map_of_which_nothing_is_known_has_no_loss():
    objective, bev = map_segmentation(), bev_map(1).requires_grad_()
    targets = map_truth(objective, 1)
    targets["known"] = torch.zeros_like(targets["known"])
    loss, _ = objective(bev, targets, objective.counts(targets), 1.0)
    loss.backward()
    assert loss.item() == 0 and not bev.grad.any()


def test_a_store_without_a_map_is_refused():
    bare = SimpleNamespace(url="bare.zarr", grid=GRID, attrs=ATTRS | {"map_classes": []})
    with pytest.raises(StoreError, match="bare.zarr has no map: rebuild it with the map expansion"):
        fresh(MapSegmentation, bare)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pretraining_loss_is_the_paper_s(variant):
    objective, bev, targets = occfeat(variant), bev_map(2), occfeat_targets(2)
    logits, features = reference.dense_head(objective.head, bev)
    expected = {}
    if logits is not None:
        occupied = np.zeros(2 * GRID.n_voxels)
        occupied[targets["voxel"]] = 1
        expected["occupancy"] = reference.occupancy_loss(logits.detach().numpy(), occupied)
    if features is not None:
        predicted = reference.at_voxels(features, targets["voxel"]).detach().numpy()
        expected["features"] = reference.feature_loss(
            predicted, targets["features"].numpy(), targets["valid"].numpy()
        )
    weights = {"occupancy": 1, "features": 2.5 if variant == "heavy features" else 0.01}
    loss, terms = objective(bev, targets, objective.counts(targets), 1.0)
    assert {n: v.item() for n, v in terms.items()} == pytest.approx(expected, rel=1e-5)
    total = sum(weights[name] * value for name, value in expected.items())
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_the_finetuning_loss_is_simple_bev_s():
    objective, bev = segmentation(), bev_map(3)
    targets = segmentation_targets(objective, 3)
    assert not targets["visible"].all() and targets["has_offset"].any()
    predicted = {name: out.detach().numpy() for name, out in objective.head(bev).items()}
    maps = {name: values.numpy() for name, values in targets.items()}
    terms = {
        "mask": reference.mask_loss(predicted["mask"], maps["vehicle"], maps["visible"], 2.13),
        "centre": reference.centre_loss(predicted["centre"], maps["centre"]),
        "offset": reference.offset_loss(predicted["offset"], maps["offset"], maps["has_offset"]),
    }
    weights = objective.log_weights.tolist()
    assert all(abs(w) > 0.01 for w in weights)
    expected = reference.segmentation_loss(*terms.values(), weights)
    loss, got = objective(bev, targets, objective.counts(targets), 1.0)
    assert {n: v.item() for n, v in got.items()} == pytest.approx(terms, rel=1e-5)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    slope = reference.numerical_gradient(
        lambda w: reference.segmentation_loss(*terms.values(), w), np.array(weights)
    )
    np.testing.assert_allclose(objective.log_weights.grad.numpy(), slope, rtol=1e-5)


def test_learned_weights_start_at_simple_bev_s():
    assert fresh(VehicleSegmentation).log_weights.tolist() == [0, 0, 0]


def test_the_weight_of_vehicle_cells_is_configurable():
    objective = fresh(VehicleSegmentation, pos_weight=5.0)
    objective = randomised(objective)
    bev, targets = bev_map(2), segmentation_targets(objective, 2)
    logits = objective.head(bev)["mask"].detach().numpy()
    maps = [targets[name].numpy() for name in ("vehicle", "visible")]
    term = objective(bev, targets, objective.counts(targets), 1.0)[1]["mask"]
    assert term.item() == pytest.approx(reference.mask_loss(logits, *maps, 5.0), rel=1e-5)


def test_the_segmentation_head_is_the_published_one():
    """Three branches of conv 3x3, instance norm, ReLU, conv 1x1; the centre through a sigmoid."""
    head, bev = segmentation().head, bev_map(2)
    predicted = head(bev)
    for name in ("mask", "centre", "offset"):
        hidden, last = getattr(head, name)[0], getattr(head, name)[-1]
        y = nn.functional.conv2d(bev, hidden.weight, padding=1)
        y = nn.functional.relu(nn.functional.instance_norm(y))
        y = nn.functional.conv2d(y, last.weight, last.bias)
        if name != "offset":
            y = y[:, 0]
        if name == "centre":
            y = 1 / (1 + torch.exp(-y))
        assert predicted[name].shape == y.shape
        torch.testing.assert_close(predicted[name].double(), y, atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", ["both", "features"])
def test_without_valid_voxels_the_feature_term_is_zero_and_finite(variant):
    objective, bev = occfeat(variant), bev_map(2).requires_grad_()
    for targets in (occfeat_targets(2, valid_share=0), part(occfeat_targets(3), 3, 3)):
        targets["n_samples"] = torch.tensor(2)
        assert not targets["valid"].any()
        objective.zero_grad()
        loss, terms = objective(bev, targets, objective.counts(targets), 1.0)
        assert terms["features"].item() == 0 and loss.isfinite()
        loss.backward()
        for name, parameter in objective.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_without_vehicles_the_finetuning_loss_is_finite():
    objective, bev = segmentation(), bev_map(1).requires_grad_()
    targets = segmentation_targets(objective, 1)  # its only sample has no box
    assert not targets["vehicle"].any()
    loss, terms = objective(bev, targets, objective.counts(targets), 1.0)
    assert terms["offset"].item() == 0 and terms["mask"].item() > 0
    assert loss.isfinite()
    loss.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_counts_are_what_each_term_is_a_mean_over():
    objective, targets = occfeat(), occfeat_targets(3)
    counts = objective.counts(targets)
    assert counts.dtype == torch.float64
    assert counts.tolist() == [3 * 6 * 7 * 3, targets["valid"].sum().item()]
    objective = segmentation()
    targets = segmentation_targets(objective, 3)
    near = (targets["centre"] > 0.5).sum().item()
    cells = targets["centre"].numel()
    expected = [targets["visible"].sum(), near, cells - near, targets["has_offset"].sum()]
    assert objective.counts(targets).tolist() == expected


def test_points_are_read_only_if_the_bev_is_turned():
    turned = fresh(OccFeat).arrays
    still = fresh(OccFeat, turned=False).arrays
    assert set(still) == {"voxel_index", "features", "feature_cameras"}
    assert set(turned) - set(still) == {"feature_scale", "points"}


def test_a_step_on_the_demo_store_is_the_same_however_it_is_split(demo_store):
    """With targets made for each part alone, as micro-batches and processes make them."""
    store = open_store(demo_store)
    objective = randomised(fresh(OccFeat, store))
    frames = [reference.with_vehicles(store.frame(i), store.attrs) for i in range(3)]
    angle = torch.tensor([0.5, -2.0, 1.0])
    bev = torch.randn(3, C, *store.grid.bev_shape, dtype=torch.float64)

    def losses(cuts):
        parts = [slice(a, b) for a, b in pairwise(cuts)]
        targets = [
            objective.targets(reference.collated(frames[p], store.grid.n_voxels), angle[p])
            for p in parts
        ]
        counts = sum(objective.counts(t) for t in targets)
        with torch.no_grad():
            found = [
                objective(bev[p], t, counts, 1 / len(parts))
                for p, t in zip(parts, targets, strict=True)
            ]
        names = found[0][1]
        return [
            sum(loss.item() for loss, _ in found),
            *(sum(terms[name].item() for _, terms in found) for name in names),
        ]

    assert losses([0, 1, 3]) == pytest.approx(losses([0, 3]), rel=1e-5)


def test_frozen_batch_norms_keep_their_statistics_in_training():
    objective = fresh(OccFeat)
    for moves in (True, False):
        model = ModelSettings(encoder_weights="random", channels=C, freeze_batch_norm=not moves)
        torch.manual_seed(0)
        network = Network(Camera(TrainConfig(model=model)), copy.deepcopy(objective)).train()
        before = {n: b.clone() for n, b in network.named_buffers() if "running_mean" in n}
        assert before
        images = torch.rand(2, 1, 3, 64, 64)
        K = torch.tensor([[30.0, 0, 32], [0, 30, 32], [0, 0, 1]]).repeat(2, 1, 1, 1)
        cam_T_bev = torch.eye(4).repeat(2, 1, 1, 1)
        cam_T_bev[..., 2, 3] = 3
        inputs = {"images": images, "K": K, "cam_T_bev": cam_T_bev}
        targets = occfeat_targets(2)
        targets["features"] = targets["features"].float()
        network(inputs, targets, objective.counts(targets), 1.0)[0].backward()
        after = dict(network.named_buffers())
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == (set(before) if moves else set())
