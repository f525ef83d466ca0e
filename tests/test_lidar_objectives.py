"""ScaLR, SLidR and ALSO against loops over points, cameras, superpixels and pairs."""

import math

import numpy as np
import pytest
import torch
import train_reference as reference
from torch.nn import functional as F

from occfeat_targets.store.files import StoreError
from occfeat_targets.store.reader import open_store
from occfeat_train.data.cloud import CloudWork
from occfeat_train.data.dataset import FrameDataset
from occfeat_train.models.lidar_settings import LidarSettings
from occfeat_train.objectives.also import RADIUS_M, Also, AlsoSettings, near_rows
from occfeat_train.objectives.pairs import camera_pairs, rows_in_ego, sample_tokens
from occfeat_train.objectives.queries import frame_queries
from occfeat_train.objectives.scalr import ScaLR
from occfeat_train.objectives.slidr import SHRINK, SLidR, SLidRSettings

HW, STEP, C = (64, 96), 0.002, 8
SETTINGS = LidarSettings(size="2-8", reach_m=(16.0, 16.0, 8.0), cell_m=1.0, neighbours=4)
ARRAYS = ("points", "ego_T_lidar", "tokens", "token_scale", "superpixels")


def batch_of(store, frames=(0, 1), one_camera=False, training=True):
    work = CloudWork(SETTINGS, STEP, HW, 0, training, one_camera)
    data = FrameDataset(store, range(12), ARRAYS, work=work)
    return data.collate([data[i] for i in frames])


def objective(kind, store, settings=None):
    torch.manual_seed(0)
    return kind(settings or kind.Settings(), open_store(store), C, False)


def pairs_by_loop(batch, one_camera=False):
    """(row, image, place) one point and camera at a time."""
    xyz, sample = rows_in_ego(batch, STEP)
    found = []
    for row, (point, b) in enumerate(zip(xyz.double().numpy(), sample.tolist(), strict=True)):
        for c in range(6):
            pose, K = (batch[n][b, c].double().numpy() for n in ("cam_T_ego", "K"))
            x, y, depth = pose[:3, :3] @ point + pose[:3, 3]
            if depth <= 1 or (one_camera and c != batch["camera"][b]):
                continue
            u, v = K[0, 0] * x / depth + K[0, 2], K[1, 1] * y / depth + K[1, 2]
            if 0 <= u < HW[1] and 0 <= v < HW[0]:
                found.append((row, 6 * b + c, u / HW[1], v / HW[0]))
    return found


@pytest.mark.parametrize("one_camera", [False, True])
def test_pairs_are_those_of_the_loop(tiny_lidar_store, one_camera):
    batch = batch_of(tiny_lidar_store, one_camera=one_camera)
    pairs, expected = camera_pairs(batch, STEP, HW), pairs_by_loop(batch, one_camera)
    assert [*zip(pairs.row.tolist(), pairs.image.tolist(), strict=True)] == [
        pair[:2] for pair in expected
    ]
    np.testing.assert_allclose(pairs.place, [pair[2:] for pair in expected], atol=1e-5)
    assert len(expected) > 100
    if one_camera:
        assert len({*pairs.image.tolist()}) == 2


def test_tokens_are_sampled_where_their_centres_are(tiny_lidar_store):
    batch = batch_of(tiny_lidar_store)
    pairs = camera_pairs(batch, STEP, HW)
    found = sample_tokens(batch["tokens"], batch["token_scale"], pairs.image, pairs.place)
    maps = (batch["tokens"].float() * batch["token_scale"].float()[..., None]).flatten(0, 1)
    for i in range(0, len(found), 17):
        grid = (2 * pairs.place[i] - 1).view(1, 1, 1, 2)
        image = maps[pairs.image[i]].permute(2, 0, 1)[None]
        wanted = F.grid_sample(image, grid, align_corners=False, padding_mode="border").flatten()
        torch.testing.assert_close(found[i], wanted, atol=1e-5, rtol=1e-5)


def test_scalr_is_the_mean_distance_of_unit_vectors(tiny_lidar_store):
    model, batch = objective(ScaLR, tiny_lidar_store), batch_of(tiny_lidar_store, one_camera=True)
    targets = model.targets(batch, torch.zeros(2))
    rows = torch.randn(int(batch["n_rows"].sum()), C)
    loss, terms = model(rows, targets, model.counts(targets).tolist(), 1.0)
    maps = (batch["tokens"].float() * batch["token_scale"].float()[..., None]).flatten(0, 1)
    distances, cosines = [], []
    for row, image, u, v in pairs_by_loop(batch, one_camera=True):
        h, w = maps.shape[1:3]
        tokens = maps[image].permute(2, 0, 1).double().numpy()
        token = reference.bilinear_pixel(tokens, u * w, v * h)
        mine = (model.head.weight @ rows[row] + model.head.bias).detach().numpy()
        cosine = mine @ token / np.linalg.norm(mine) / np.linalg.norm(token)
        cosines.append(cosine)
        distances.append(math.sqrt(2 - 2 * cosine))
    assert loss.item() == pytest.approx(np.mean(distances), rel=1e-4)
    assert terms["cosine"].item() == pytest.approx(np.mean(cosines), abs=1e-5)


def test_half_precision_moves_no_point(tiny_lidar_store):
    batch = batch_of(tiny_lidar_store)
    whole = camera_pairs(batch, STEP, HW)
    with torch.autocast("cpu", torch.bfloat16):
        half = camera_pairs(batch, STEP, HW)
    for a, b in zip(whole, half, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [ScaLR, SLidR, Also])
def test_losses_in_half_precision_are_nearly_the_same(kind, tiny_lidar_store):
    model, batch = objective(kind, tiny_lidar_store), batch_of(tiny_lidar_store)
    targets = model.targets(batch, torch.zeros(2))
    rows, counts = torch.randn(int(batch["n_rows"].sum()), C), model.counts(targets).tolist()
    whole = model(rows, targets, counts, 1.0)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = model(rows, targets, counts, 1.0)[0]
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(whole.item(), rel=5e-3)


def test_scalr_at_agreement_has_a_finite_gradient(tiny_lidar_store):
    model = objective(ScaLR, tiny_lidar_store)
    rows = torch.randn(5, C, requires_grad=True)
    feature = F.normalize(model.head(rows), dim=1).detach()
    loss, _ = model(rows, {"row": torch.arange(5), "feature": feature}, [5.0], 1.0)
    loss.backward()
    assert torch.isfinite(rows.grad).all()


def slidr_by_loop(model, rows, batch):
    """A double loop over superpixels."""
    tokens = batch["tokens"].float() * batch["token_scale"].float()[..., None]
    dense = (tokens.flatten(0, 1) @ model.image_head.weight.T + model.image_head.bias).detach()
    size = HW[0] // SHRINK, HW[1] // SHRINK
    dense = F.interpolate(dense.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False)
    points = F.normalize(rows @ model.head.weight.T + model.head.bias, dim=1).detach()
    of_points, of_pixels = {}, {}
    labels = batch["superpixels"].flatten(0, 1)
    pairs = camera_pairs(batch, STEP, HW)  # whose rounding decides on a superpixel's border
    for row, image, place in zip(*pairs, strict=True):
        u, v = (place * torch.tensor(HW[::-1])).int().tolist()
        key = int(image), int(labels[image, v, u])
        of_points.setdefault(key, []).append(points[row])
    for image in range(len(labels)):
        for i in range(size[0]):
            for j in range(size[1]):
                label = labels[image, i * SHRINK + SHRINK // 2, j * SHRINK + SHRINK // 2]
                pixel = F.normalize(dense[image, :, i, j], dim=0)
                of_pixels.setdefault((image, int(label)), []).append(pixel)
    keys = [key for key in of_points if key in of_pixels]
    k = [torch.stack(of_points[key]).mean(dim=0) for key in keys]
    q = [torch.stack(of_pixels[key]).mean(dim=0) for key in keys]
    losses = []
    for i in range(len(keys)):
        logits = torch.stack([k[i] @ other for other in q]) / model.settings.temperature
        losses.append(-torch.log_softmax(logits, dim=0)[i])
    return torch.stack(losses).mean().item(), len(keys)


def slidr_loss(model, rows, batch, share=1.0):
    targets = model.targets(batch, torch.zeros(2))
    return model(rows, targets, model.counts(targets).tolist(), share)[0].item()


def test_slidr_is_the_double_loop_over_superpixels(tiny_lidar_store):
    model = objective(SLidR, tiny_lidar_store, SLidRSettings(channels=5))
    batch = batch_of(tiny_lidar_store)
    rows = torch.randn(int(batch["n_rows"].sum()), C)
    expected, n = slidr_by_loop(model, rows, batch)
    assert n > 40
    assert slidr_loss(model, rows, batch) == pytest.approx(expected, rel=1e-4)
    assert slidr_loss(model, rows, batch, share=0.25) == pytest.approx(expected / 4, rel=1e-4)


def test_slidr_does_not_care_for_the_order_of_cameras(tiny_lidar_store):
    model, batch = objective(SLidR, tiny_lidar_store), batch_of(tiny_lidar_store)
    rows = torch.randn(int(batch["n_rows"].sum()), C)
    names = ("K", "cam_T_ego", "tokens", "token_scale", "superpixels")
    other = batch | {name: batch[name].flip(1) for name in names}
    assert slidr_loss(model, rows, other) == pytest.approx(slidr_loss(model, rows, batch), rel=1e-5)


def test_slidr_of_one_superpixel_or_none_is_0(tiny_lidar_store):
    model, batch = objective(SLidR, tiny_lidar_store), batch_of(tiny_lidar_store)
    rows = torch.randn(int(batch["n_rows"].sum()), C)
    targets = model.targets(batch, torch.zeros(2))
    single = targets | {
        "segment": torch.zeros_like(targets["segment"]),
        "pixel_segment": torch.zeros_like(targets["pixel_segment"]),
    }
    assert model(rows, single, [0.0], 1.0)[0].item() == pytest.approx(0, abs=1e-6)
    nothing = targets | {
        "row": targets["row"][:0],
        "segment": targets["segment"][:0],
        "pixel_segment": torch.full_like(targets["pixel_segment"], -1),
    }
    loss = model(rows.requires_grad_(), nothing, [0.0], 1.0)[0]
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("most", [1000, 5])
def test_also_pairs_are_those_within_reach_and_no_more_than_asked(most):
    rng = np.random.default_rng(0)
    queries, rows = (torch.from_numpy(rng.uniform(0, 3, (n, 3))).float() for n in (30, 60))
    query, row = near_rows(queries, rows, most, seed=3)
    found = {}
    for q, r in zip(query.tolist(), row.tolist(), strict=True):
        found.setdefault(q, set()).add(r)
    for q in range(30):
        distance = (rows - queries[q]).norm(dim=1)
        near = {*torch.nonzero(distance <= RADIUS_M).flatten().tolist()}
        mine = found.get(q, set())
        assert mine <= near and len(mine) == min(most, len(near))
    assert len(query) == sum(map(len, found.values()))
    if most == 5:  # which of them is random, not by index
        other = near_rows(queries, rows, most, seed=4)[1]
        assert other.tolist() != row.tolist()
        assert near_rows(queries, rows, most, seed=3)[1].tolist() == row.tolist()


def test_also_targets_are_queries_on_rays_from_the_lidar(tiny_lidar_store):
    """Its place matters: rays from ego's origin give other queries."""
    model, batch = objective(Also, tiny_lidar_store), batch_of(tiny_lidar_store)
    model.settings = AlsoSettings(queries=60, answers=1000)
    targets = model.targets(batch, torch.zeros(2))
    xyz, sample = rows_in_ego(batch, STEP)
    first, checked = 0, 0
    clouds = batch["points"].split(batch["n_points"].tolist())
    for b, points in enumerate(clouds):
        place, seed = batch["ego_T_lidar"][b, :3, 3], int(batch["seed"][b])
        queries = frame_queries(points, place, STEP, 60, seed)
        assert not torch.allclose(
            queries["xyz_ego"], frame_queries(points, place * 0, STEP, 60, seed)["xyz_ego"]
        )
        for q, query in enumerate(queries["xyz_ego"]):
            for r in torch.nonzero(sample == b).flatten().tolist():
                offset = query - xyz[r]
                if offset.norm() > RADIUS_M:
                    continue
                assert targets["row"][first] == r
                turned = batch["cloud_T_ego"][b, :3, :3] @ offset
                torch.testing.assert_close(targets["relative"][first], turned, atol=1e-5, rtol=1e-5)
                assert targets["occupied"][first] == queries["occupied"][q]
                assert targets["intensity"][first] == queries["intensity"][q]
                first, checked = first + 1, checked + 1
    assert checked == len(targets["row"]) > 50


def test_also_far_queries_without_a_row_near_them_teach_nothing(tiny_lidar_store):
    model, batch = objective(Also, tiny_lidar_store), batch_of(tiny_lidar_store)
    model.settings = AlsoSettings(queries=9)
    targets = model.targets(batch, torch.zeros(2))
    rows = torch.randn(int(batch["n_rows"].sum()), C, requires_grad=True)
    loss, terms = model(rows, targets, model.counts(targets).tolist(), 1.0)
    loss.backward()
    answered = torch.zeros(len(rows), dtype=torch.bool)
    answered[targets["row"]] = True
    assert torch.equal(rows.grad.abs().sum(dim=1) > 0, answered) and not answered.all()
    assert loss.item() == pytest.approx(sum(t.item() for t in terms.values()))


def test_a_store_that_lacks_what_they_need_is_told_how_to_get_it(tiny_store):
    for kind, lacks in ((ScaLR, "tokens"), (SLidR, "superpixels")):
        with pytest.raises(StoreError, match=f"has no {lacks}.*outputs="):
            objective(kind, tiny_store)
