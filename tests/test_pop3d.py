"""POP-3D against loops over points, cameras, rays and voxels."""

from collections import Counter

import numpy as np
import pytest
import torch
import train_reference as reference

from occfeat_targets.store.files import StoreError
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.semantics import CLASSES, IGNORED, class_numbers
from occfeat_targets.store.settings import ConfigError
from occfeat_targets.store.texts import Texts
from occfeat_train.data.dataset import FrameDataset
from occfeat_train.objectives.pop3d import Pop3d
from occfeat_train.tasks.open_vocabulary import (
    EMPTY,
    OpenVocabulary,
    OpenVocabularySettings,
    VoxelMeter,
    frame_truth,
)

HW, STEP, C, DIM = (64, 96), 0.002, 8, 8
ANGLE = torch.tensor([0.3, -1.0])


def objective(store, turned=False):
    torch.manual_seed(0)
    return Pop3d(Pop3d.Settings(), open_store(str(store)), C, turned)


def batch_of(store, arrays, frames=(0, 1)):
    data = FrameDataset(str(store), range(12), arrays)
    return data.collate([data[i] for i in frames])


def points_of(batch):
    ends = np.cumsum(batch["n_points"].tolist())
    xyz = batch["points"][:, :3].double().numpy() * STEP
    return np.split(xyz, ends[:-1])


def pairs_by_loop(batch, bounds, angle):
    """(sample, place in voxels, image, u / W, v / H), one return and camera at a time."""
    found = []
    for b, points in enumerate(points_of(batch)):
        cos, sin = np.cos(angle[b].item()), np.sin(angle[b].item())
        for point in points:
            turned = [cos * point[0] - sin * point[1], sin * point[0] + cos * point[1], point[2]]
            if reference.voxel_of(turned, bounds) is None:
                continue
            place = [
                (v - lo) / ((hi - lo) / n) - 0.5
                for v, (lo, hi, n) in zip(turned, bounds, strict=True)
            ]
            for c in range(6):
                pose, K = (batch[n][b, c].double().numpy() for n in ("cam_T_ego", "K"))
                x, y, depth = pose[:3, :3] @ point + pose[:3, 3]
                if depth <= 1:
                    continue
                u, v = K[0, 0] * x / depth + K[0, 2], K[1, 1] * y / depth + K[1, 2]
                if 0 <= u < HW[1] and 0 <= v < HW[0]:
                    found.append((b, place, 6 * b + c, u / HW[1], v / HW[0]))
    return found


def feature_by_hand(head, bev, b, place):
    """Trilinear in the volume of N_B channels, in float64, then the rest of the head."""
    volume = head.unsplat(head.mix(bev).permute(0, 2, 3, 1)).unflatten(-1, (head.heights, -1))
    volume = volume[b].permute(2, 0, 1, 3).detach().double().numpy()  # (Z, X, Y, C)
    x, y, z = place
    value = 0
    sizes = volume.shape[:3]
    corners = []
    for at, size in zip((z, x, y), sizes, strict=True):
        at = min(max(at, 0.0), size - 1.0)
        low = int(np.floor(at))
        corners.append([(low, 1 - (at - low)), (min(low + 1, size - 1), at - low)])
    for iz, wz in corners[0]:
        for ix, wx in corners[1]:
            for iy, wy in corners[2]:
                value = value + wz * wx * wy * volume[iz, ix, iy]

    def linear(layer, x):
        w, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
        return w @ x + bias

    hidden = np.logaddexp(0, linear(head.expand, value))
    return linear(head.features, linear(head.reduce, hidden))


@pytest.mark.parametrize("angle", [torch.zeros(2), ANGLE])
def test_losses_are_those_of_the_loop(tiny_lidar_store, angle):
    model = objective(tiny_lidar_store, turned=True)
    batch, grid = batch_of(tiny_lidar_store, model.arrays), model.grid
    bounds = reference.bounds_of(grid)
    targets = model.targets(batch, angle)
    bev = torch.randn(2, C, *grid.bev_shape)
    loss, terms = model(bev, targets, model.counts(targets).tolist(), 1.0)

    occupied = np.zeros((2, grid.n_voxels), int)
    for b, points in enumerate(points_of(batch)):
        for x, y, z in points:
            cos, sin = np.cos(angle[b].item()), np.sin(angle[b].item())
            voxel = reference.voxel_of([cos * x - sin * y, sin * x + cos * y, z], bounds)
            if voxel is not None:
                occupied[b, voxel] = 1
    if not angle.any():  # rounding to the stored step moves a few returns out of their voxel
        occupied.ravel()[:] = 0
        occupied.ravel()[batch["voxel"].numpy()] = 1
    opened = model.head.open(bev)
    logits = model.head.logits(opened).detach().double().flatten().numpy()
    two = np.stack([np.zeros_like(logits), logits], axis=1)  # CE of two classes
    entropy = np.log(np.exp(two).sum(axis=1)) - two[np.arange(len(two)), occupied.ravel()]
    assert terms["occupancy"].item() == pytest.approx(entropy.mean(), rel=1e-5)
    p = 1 / (1 + np.exp(-logits))
    wanted = np.mean(
        [lovasz_by_jaccard(np.abs(occupied.ravel() - p), occupied.ravel() == c) for c in (0, 1)]
    )
    assert terms["lovasz"].item() == pytest.approx(wanted, rel=1e-4)

    maps = (batch["tokens"].float() * batch["token_scale"].float()[..., None]).flatten(0, 1)
    pairs, errors = pairs_by_loop(batch, bounds, angle), []
    for b, place, image, u, v in pairs:
        h, w = maps.shape[1:3]
        token = reference.bilinear_pixel(
            maps[image].permute(2, 0, 1).double().numpy(), u * w, v * h
        )
        errors.append((feature_by_hand(model.head, bev, b, place) - token) ** 2)
    assert len(pairs) > 100
    assert terms["features"].item() == pytest.approx(np.mean(errors), rel=1e-3)
    total = sum(terms[name].item() for name in ("occupancy", "lovasz", "features"))
    assert loss.item() == pytest.approx(total, rel=1e-6)


def lovasz_by_jaccard(errors, truth):
    """Errors, largest first, times how much each one, added to the mistakes, takes of the IoU."""
    order, total, before = np.argsort(-errors, kind="stable"), 0, 0
    n = truth.sum()
    missed = added = 0
    for i in order:
        missed, added = missed + truth[i], added + (not truth[i])
        now = 1 - (n - missed) / (n + added)
        total += errors[i] * (now - before)
        before = now
    return total


def test_without_tokens_a_pair_is_a_voxel(tiny_store):
    model = objective(tiny_store)
    batch = batch_of(tiny_store, model.arrays)
    targets = model.targets(batch, torch.zeros(2))
    bounds, n = reference.bounds_of(model.grid), model.grid.n_voxels
    wanted = []
    for voxel, cameras, q, scale in zip(
        *(batch[k] for k in ("voxel", "feature_cameras", "features", "feature_scale")), strict=True
    ):
        if cameras:
            ix, iy, iz = reference.unflat(int(voxel) % n, bounds)
            wanted.append(([int(voxel) // n, iz, ix, iy], q.double() * scale.double()))
    assert len(wanted) == len(targets["sample"]) > 20
    found = torch.cat([targets["sample"][:, None].float(), targets["place"]], dim=1)
    assert found.tolist() == [place for place, _ in wanted]
    torch.testing.assert_close(targets["feature"].double(), torch.stack([f for _, f in wanted]))
    bev = torch.randn(2, C, *model.grid.bev_shape)
    opened, voxels = model.head.open(bev), batch["voxel"][batch["feature_cameras"] > 0].long()
    between = model.head.features_at(opened, targets["sample"], targets["place"])
    torch.testing.assert_close(between, model.head.features_of(opened, voxels))


def test_gradients_are_those_of_differences(tiny_lidar_store):
    model = objective(tiny_lidar_store).double()
    batch = batch_of(tiny_lidar_store, model.arrays)
    targets = model.targets(batch, torch.zeros(2))
    targets = {k: v[:60] if k in ("sample", "place", "feature") else v for k, v in targets.items()}
    targets = {k: v.double() if v.is_floating_point() else v for k, v in targets.items()}
    counts = model.counts(targets).tolist()
    bev = torch.randn(2, C, *model.grid.bev_shape, dtype=torch.float64, requires_grad=True)

    def loss(bev):  # its terms are made in float32: the features' alone have digits enough
        found = model.head.features_at(model.head.open(bev), targets["sample"], targets["place"])
        return (found - targets["feature"]).square().sum() / counts[1]

    (gradient,) = torch.autograd.grad(loss(bev), bev)
    direction, step = torch.randn_like(bev), 1e-6
    ahead, behind = loss(bev + step * direction), loss(bev - step * direction)
    slope = (ahead - behind) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)


def test_a_turned_store_without_tokens_says_what_to_do(tiny_store):
    with pytest.raises(StoreError, match="rotate_bev_deg=0"):
        objective(tiny_store, turned=True)


# --- evaluation -----------------------------------------------------------------------------------


def evaluation_batch(task, store, frames=(0, 1)):
    """With returns of all classes: the store has few."""
    batch = batch_of(store, task.eval_arrays, frames)
    generator = torch.Generator().manual_seed(frames[0])
    batch["lidarseg"] = torch.randint(0, 32, batch["lidarseg"].shape, generator=generator).byte()
    return batch


def truth_by_loop(points, classes, sensor, bounds, n_voxels):
    truth = [IGNORED] * n_voxels
    votes = {}
    for point, c in zip(points, classes, strict=True):
        voxel = reference.voxel_of(point, bounds)
        if voxel is None:
            continue
        votes.setdefault(voxel, []).append(int(c))
        for k in range(100):
            place = [s + k / 99 * (p - s) for s, p in zip(sensor, point, strict=True)]
            passed = reference.voxel_of(place, bounds)
            if passed is not None:
                truth[passed] = EMPTY
    for voxel, cast in votes.items():
        counted = Counter(cast)
        best = [c for c, n in counted.items() if n == max(counted.values())]
        truth[voxel] = IGNORED if IGNORED in best else min(best)
    return truth


@pytest.fixture
def texts(tmp_path):
    """Twelve prompts of five classes."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(12, DIM)).astype("f4")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = ["car", "barrier", "vegetation", "manmade", "sidewalk"]
    prompts = [f"prompt {i}" for i in range(12)]
    path = tmp_path / "texts.safetensors"
    Texts(vectors, prompts, [i % 5 for i in range(12)], names, "random").save(path)
    return path


def task_of(store, texts):
    torch.manual_seed(0)
    settings = OpenVocabularySettings(texts=str(texts))
    return OpenVocabulary(settings, open_store(str(store)), C, False)


def test_the_truth_of_voxels_is_that_of_the_loop(tiny_lidar_store, texts):
    task = task_of(tiny_lidar_store, texts)
    batch = evaluation_batch(task, tiny_lidar_store)
    numbers = class_numbers(open_store(str(tiny_lidar_store)).attrs["lidarseg_classes"])
    classes = np.split(
        numbers[batch["lidarseg"].numpy()], np.cumsum(batch["n_points"].tolist())[:-1]
    )
    bounds, wanted = reference.bounds_of(task.grid), []
    for b, points in enumerate(points_of(batch)):
        sensor = batch["ego_T_lidar"][b, :3, 3].double().numpy()
        wanted += truth_by_loop(points, classes[b], sensor, bounds, task.grid.n_voxels)
    found = task.truth(batch)
    assert found.tolist() == wanted
    assert len({*wanted}) > 8


def iou_by_loop(pairs, names):
    """Per cent by class of (true, predicted) pairs; None where nothing is true."""
    ious = []
    for c in range(names):
        both = sum(t == c == p for t, p in pairs)
        either = sum(c in (t, p) for t, p in pairs)
        ious.append(100 * both / either if any(t == c for t, _ in pairs) else None)
    return ious


@pytest.mark.parametrize("protocol", ["pop3d", "looked-up"])
def test_iou_is_that_of_the_loop_over_voxels(tiny_lidar_store, texts, protocol):
    task, named = task_of(tiny_lidar_store, texts), Texts.load(texts)
    meter, pairs, n = VoxelMeter(task, torch.device("cpu"), protocol), [], task.grid.n_voxels
    for frames in ((0, 1), (2, 3)):
        batch = evaluation_batch(task, tiny_lidar_store, frames)
        bev = torch.randn(2, C, *task.grid.bev_shape)
        with torch.no_grad():
            meter.add(batch, task.predict(bev))
            logits, features = task.head(bev, torch.arange(2 * n))
        if protocol == "pop3d":
            occupied = (logits.flatten() > 0).tolist()
        else:
            occupied = np.isin(np.arange(2 * n), batch["voxel"].numpy())
            row = {int(v): i for i, v in enumerate(batch["voxel"])}
        for voxel, true in enumerate(task.truth(batch).tolist()):
            if true == IGNORED:
                continue
            predicted = EMPTY
            if occupied[voxel]:
                if protocol == "pop3d":
                    feature, answers = features[voxel], True
                else:
                    feature = batch["features"][row[voxel]].float()
                    answers = batch["feature_cameras"][row[voxel]] > 0
                products = [float(v @ feature.numpy()) for v in named.embeddings]
                best = named.classes[int(np.argmax(products))]
                predicted = [*CLASSES].index(named.class_names[best]) if answers else -1
            pairs.append((true, predicted))
    result, ious = meter.result(), iou_by_loop(pairs, 17)
    assert [row["iou"] for row in [*result["rows"].values()][:17]] == pytest.approx(
        ious, nan_ok=True
    )
    known = [iou for iou in ious if iou is not None]
    assert result["headline"]["iou"] == pytest.approx(np.mean(known))
    assert result["headline"]["name"] == f"mean of {len(known)} of 17 classes"
    assert len(known) > 12
    among = [iou for iou in ious[:16] if iou is not None]
    assert result["rows"]["mean of classes"]["iou"] == pytest.approx(np.mean(among))
    occupancy = iou_by_loop([(t != EMPTY, p != EMPTY) for t, p in pairs], 2)[1]
    assert result["rows"]["occupied"]["iou"] == pytest.approx(occupancy)
    if protocol == "pop3d":
        drawn = chance_by_drawing(pairs, named)
        for name, part in (("mean with empty", drawn), ("mean of classes", drawn[:-1])):
            found = result["rows"][f"chance, {name}"]["iou"]
            assert found == pytest.approx(np.mean(part), abs=0.4)


def chance_by_drawing(pairs, texts):
    rng, possible = np.random.default_rng(0), [[*CLASSES].index(n) for n in texts.class_names]
    sums = np.zeros((17, 18))
    true, predicted = np.array(pairs).T
    for _ in range(200):
        drawn = np.where(predicted == EMPTY, EMPTY, rng.choice(possible, len(true)))
        np.add.at(sums, (true, drawn), 1)
    ious = []
    for c in range(17):
        if sums[c].sum():
            ious.append(100 * sums[c, c] / (sums[c].sum() + sums[:, c].sum() - sums[c, c]))
    return ious


def test_rays_free_what_they_pass(tiny_lidar_store, texts):
    grid = task_of(tiny_lidar_store, texts).grid
    xyz = torch.tensor([[5.5, 0.5, 0.5], [50.0, 0.5, 0.5]], dtype=torch.float64)
    sensor = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64)
    truth = frame_truth(xyz, np.array([3, 3], np.uint8), sensor, grid).view(grid.shape)
    along = truth[0, 8:, 8].tolist()
    assert (
        along == [EMPTY] * 5 + [3] + [IGNORED] * 2
    )  # the far one is outside: its ray says nothing
    assert (truth != IGNORED).sum() == 6


def test_half_precision_moves_no_place_and_changes_no_class(tiny_lidar_store, texts):
    task, model = task_of(tiny_lidar_store, texts), objective(tiny_lidar_store)
    batch = batch_of(tiny_lidar_store, model.arrays)
    features = torch.randn(2000, DIM)
    whole = task.classes_of(features), model.targets(batch, torch.zeros(2))
    with torch.autocast("cpu", torch.bfloat16):
        half = task.classes_of(features), model.targets(batch, torch.zeros(2))
    assert torch.equal(whole[0], half[0])
    for name in ("place", "sample", "feature"):
        assert torch.equal(whole[1][name], half[1][name]), name


def test_texts_that_do_not_fit_are_refused(tiny_lidar_store, tiny_store, texts, tmp_path):
    sound = Texts.load(texts)
    with pytest.raises(StoreError, match="lidarseg"):
        task_of(tiny_store, texts)
    for changes, error, message in (
        ({"embeddings": sound.embeddings[:, :-1]}, StoreError, "two spaces"),
        ({"class_names": ["cat", *sound.class_names[1:]]}, ConfigError, "did you mean car"),
        ({"teacher": "another"}, StoreError, "another teacher"),
    ):
        changed = {**vars(sound), **changes}
        vectors = changed["embeddings"]
        changed["embeddings"] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        Texts(**changed).save(tmp_path / "other.safetensors")
        with pytest.raises(error, match=message):
            task_of(tiny_lidar_store, tmp_path / "other.safetensors")
    with pytest.raises(StoreError, match="occfeat-targets text"):
        task_of(tiny_lidar_store, tmp_path / "none")
