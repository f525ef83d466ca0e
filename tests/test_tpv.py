"""TPVFormer's lifting against loops over planes, queries, cameras, levels, anchors and points."""

import numpy as np
import pytest
import torch
import train_reference as reference
from test_bevformer import random, randomised
from torch.nn import functional as F

from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.settings import ConfigError
from occfeat_train.models.bev_net import BEVNet, ModelSettings
from occfeat_train.models.deformable import LevelAttention
from occfeat_train.models.lifts.tpv import HEADS, LEVELS, PLANES, TpvLift, anchors

GRID = VoxelGrid((-9.0, 13.0, 4), (-8.0, 6.0, 3), (-2.0, 8.0, 2))
C, FEATURE_HW = 8, (5, 9)


@pytest.fixture(scope="module")
def cameras(tiny_store):
    store = open_store(str(tiny_store))
    frames = [store.frame(i) for i in (0, 5)]
    K, pose = (
        torch.stack([torch.from_numpy(f[name]).float() for f in frames])
        for name in ("K", "cam_T_ego")
    )
    K[1] *= torch.tensor([1.5, 1.2, 1.0])[:, None]
    return K, pose, tuple(store.attrs["config"]["images"]["size"])


def by_hand(lift, features, K, pose, image_hw):
    """In float64, one query at a time. Volume (B, Z, X, Y, C)."""
    w = {name: value.double() for name, value in lift.state_dict().items()}
    (B, N), (H, W) = features.shape[:2], image_hw
    maps = [features.double().flatten(0, 1)]
    for k in range(LEVELS - 1):
        weight, bias = (w[f"pyramid.{k}.{part}"] for part in ("weight", "bias"))
        maps.append(F.conv2d(maps[-1], weight, bias, stride=2, padding=1))

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attend(query, at, tables, position, levels, points):
        """Heads and points of one query in maps (h, w, C), position by level."""
        offsets = linear(query, f"{at}.sampling_offsets").view(HEADS, levels, points, 2)
        weights = linear(query, f"{at}.attention_weights").view(HEADS, -1).softmax(-1)
        weights, out = weights.view(HEADS, levels, points), []
        for head in range(HEADS):
            part = slice(head * C // HEADS, (head + 1) * C // HEADS)
            total = 0
            for level, table in enumerate(tables):
                values = linear(table, f"{at}.value_proj")[..., part]
                for p in range(points):
                    where = position(level, p)
                    if where is None:
                        continue
                    x, y = where + offsets[head, level, p]
                    total = total + weights[head, level, p] * reference.bilinear_zero(values, x, y)
            out.append(total if torch.is_tensor(total) else torch.zeros(C // HEADS).double())
        return torch.cat(out)

    axes = [GRID.x, GRID.y, GRID.z]
    planes = {p.name: w[f"planes.{p.name}"].permute(1, 2, 0) for p in PLANES}
    rows, columns = w["row_position"], w["column_position"]
    X, Y = axes[0][2], axes[1][2]
    place = torch.cat([rows.expand(-1, X, Y), columns.expand(-1, X, Y)]).permute(1, 2, 0)
    volumes = []
    for b in range(B):
        queries = dict(planes)
        for n in range(len(lift.layers)):
            at = f"layers.{n}"
            above, updated = queries["above"], torch.empty(X, Y, C, dtype=torch.float64)
            table = above + place
            for x, y in np.ndindex(X, Y):
                here = torch.tensor([float(y), float(x)]).double()
                found = attend(
                    table[x, y],
                    f"{at}.self_attention.attention",
                    [table],
                    lambda *_, here=here: here,
                    1,
                    4,
                )
                found = linear(
                    linear(found, f"{at}.self_attention.attention_proj"),
                    f"{at}.self_attention.output_proj",
                )
                updated[x, y] = above[x, y] + found
            queries["above"] = updated
            queries = {name: norm(q, f"{at}.norm1") for name, q in queries.items()}
            for p in PLANES:
                q = queries[p.name]
                new = torch.empty_like(q)
                for r, c in np.ndindex(*q.shape[:2]):
                    xyz = []
                    for k in range(p.anchors):
                        point = [0.0, 0.0, 0.0]
                        for axis, i in ((p.rows, r), (p.columns, c)):
                            point[axis] = reference.cell_centre(i, axes[axis])
                        lo, hi, size = axes[p.along]
                        cell = 0.5 + k * (size - 1) / (p.anchors - 1)
                        point[p.along] = lo + cell * (hi - lo) / size
                        xyz.append(torch.tensor(point, dtype=torch.float64))
                    query = q[r, c]
                    seen = []
                    for camera in range(N):
                        pixels = []
                        for point in xyz:
                            cam = pose[b, camera].double()[:3, :3] @ point
                            cam = cam + pose[b, camera].double()[:3, 3]
                            u, v, d = K[b, camera].double() @ cam
                            pixels.append(None if d <= 0 else (u / d, v / d))
                        if not any(
                            q is not None and 0 <= q[0] < W and 0 <= q[1] < H for q in pixels
                        ):
                            continue
                        tables = [m[b * N + camera].permute(1, 2, 0) for m in maps]

                        def position(level, k, pixels=pixels, tables=tables, n=p.anchors):
                            pixel = pixels[k % n]
                            if pixel is None:
                                return None
                            h, w_ = tables[level].shape[:2]
                            return torch.stack([pixel[0] * w_ / W - 0.5, pixel[1] * h / H - 0.5])

                        name = f"{at}.cross_attention.{p.name}.attention"
                        seen.append(attend(query, name, tables, position, LEVELS, 2 * p.anchors))
                    value = q[r, c]
                    if seen:
                        mean = sum(seen) / len(seen)
                        value = value + linear(mean, f"{at}.cross_attention.{p.name}.output_proj")
                    new[r, c] = value
                x = norm(new, f"{at}.norm2")
                hidden = linear(x, f"{at}.ffn.0").clamp(min=0)
                queries[p.name] = norm(x + linear(hidden, f"{at}.ffn.2"), f"{at}.norm3")
        above, side, front = (queries[p.name] for p in PLANES)
        volume = [
            [[above[x, y] + side[z, x] + front[y, z] for y in range(Y)] for x in range(X)]
            for z in range(axes[2][2])
        ]
        volumes.append(torch.stack([torch.stack([torch.stack(r) for r in v]) for v in volume]))
    return torch.stack(volumes)


def lift_of(monkeypatch):
    """Of one layer and few anchors: the loops are slow."""
    from occfeat_train.models.lifts import tpv

    fewer = tuple(p._replace(anchors=n) for p, n in zip(PLANES, (2, 3, 3), strict=True))
    monkeypatch.setattr(tpv, "LAYERS", 1)
    monkeypatch.setattr(tpv, "PLANES", fewer)
    monkeypatch.setitem(globals(), "PLANES", fewer)
    return randomised(TpvLift(GRID, C), std=0.3)


def test_the_volume_is_that_of_the_loop(cameras, monkeypatch):
    lift, (K, pose, hw) = lift_of(monkeypatch), cameras
    features = random((2, 6, C, *FEATURE_HW), 1)
    got = lift(features, K, pose, hw).unflatten(1, (GRID.shape[0], C)).permute(0, 1, 3, 4, 2)
    wanted = by_hand(lift, features, K, pose, hw)
    assert wanted.std() > 0.3
    torch.testing.assert_close(got.double(), wanted, atol=2e-3, rtol=1e-3)


def test_gradients_are_those_of_differences(cameras, monkeypatch):
    lift, (K, pose, hw) = lift_of(monkeypatch).double(), cameras
    features = random((2, 6, C, *FEATURE_HW), 1, torch.float64).requires_grad_()
    into = random((2, 16, 4, 3), 2, torch.float64)
    wanting = [features, *lift.parameters()]
    gradients = torch.autograd.grad((lift(features, K, pose, hw) * into).sum(), wanting)
    with torch.no_grad():
        for tensor, gradient in zip(wanting, gradients, strict=True):
            direction = random(tensor.shape, 3, torch.float64)
            values = []
            for step in (1e-7, -1e-7):  # larger ones meet kinks
                tensor += step * direction
                values.append((lift(features, K, pose, hw) * into).sum().item())
                tensor -= step * direction
            slope = (values[0] - values[1]) / 2e-7
            along = (gradient * direction).sum().item()
            assert along == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_anchors_run_along_the_line_of_a_query():
    for p in PLANES:
        xyz = anchors(GRID, p, torch.device("cpu")).view(-1, p.anchors, 4)
        others = [axis for axis in range(3) if axis != p.along]
        assert (xyz[:, :1, others] == xyz[:, :, others]).all()
        lo, hi, n = (GRID.x, GRID.y, GRID.z)[p.along]
        half = (hi - lo) / n / 2
        assert xyz[0, 0, p.along] == pytest.approx(lo + half)
        assert xyz[0, -1, p.along] == pytest.approx(hi - half)


def test_a_batch_equals_each_sample_alone_and_cameras_have_no_order(cameras, monkeypatch):
    lift, (K, pose, hw) = lift_of(monkeypatch), cameras
    features = random((2, 6, C, *FEATURE_HW), 1)
    both, order = lift(features, K, pose, hw), [4, 2, 0, 5, 1, 3]
    for b in range(2):
        alone = lift(features[[b]], K[[b]], pose[[b]], hw)
        torch.testing.assert_close(both[[b]], alone, atol=1e-5, rtol=1e-5)
    shuffled = lift(features[:, order], K[:, order], pose[:, order], hw)
    torch.testing.assert_close(shuffled, both, atol=1e-5, rtol=1e-5)


def test_a_star_of_equal_weights_on_each_level():
    attention = LevelAttention(C, 4, anchors=5, per_anchor=2, levels=3)
    star = attention.sampling_offsets.bias.view(4, 3, 2, 5, 2)
    assert (star[:, :1] == star).all() and (star[:, :, :, :1] == star).all()
    star = star[:, :, :, 0]
    assert star[:, 0].tolist() == [
        [[1, 0], [2, 0]],
        [[0, 1], [0, 2]],
        [[-1, 0], [-2, 0]],
        [[0, -1], [0, -2]],
    ]


def test_odd_numbers_of_channels_are_refused():
    with pytest.raises(ConfigError, match="multiple of 8"):
        ModelSettings.of({"lift": "tpv", "channels": 12})


def test_it_has_no_form_for_other_runtimes(cameras):
    K, pose, hw = cameras
    with pytest.raises(ConfigError, match="ONNX files are of the lifts simplebev and bevformer"):
        TpvLift(GRID, C).fixed(K[:1], pose[:1], hw, FEATURE_HW)


def test_a_network_of_it_learns(tiny_store, cameras):
    K, pose, _ = cameras
    torch.manual_seed(0)
    settings = ModelSettings(lift="tpv", channels=8, image_size=(32, 64))
    network = BEVNet(settings, open_store(str(tiny_store)).grid)
    bev = network(torch.rand(2, 6, 3, 32, 64), K * torch.tensor([2 / 3, 0.5, 1.0])[:, None], pose)
    bev.square().sum().backward()
    assert bev.shape == (2, 8, 16, 16)
    lacking = [name for name, p in network.lift.named_parameters() if p.grad is None]
    assert not lacking
