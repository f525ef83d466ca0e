"""Img-ALSO: queries on lidar rays, the cells that answer them, decoder and loss, the command."""

import json
import math
import shutil
from contextlib import chdir
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train_reference as reference
from click.testing import CliRunner
from conftest import LONG, build_store
from tiny_store import make_tiny_store
from torch import nn
from train_runs import COMPARABLE, assert_same_state, final_state, log_of, options, run

from occfeat_targets.store.files import StoreError
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.settings import ConfigError
from occfeat_train.cli import main
from occfeat_train.config import TrainConfig
from occfeat_train.data.dataset import FrameDataset
from occfeat_train.models.bev_net import ModelSettings
from occfeat_train.objectives.img_also import ImgAlso, near_cells, query_targets
from occfeat_train.objectives.occfeat import OccFeat
from occfeat_train.objectives.queries import QueryHead, draw_queries, frame_queries
from occfeat_train.runs.job import Job
from occfeat_train.train import prepare

GRID = VoxelGrid((-3.0, 4.0, 14), (-4.0, 2.0, 10), (-1.0, 2.0, 3))
STEP_M = 0.002
SENSOR = (0.9, -0.4, 1.8)
KINDS = ("front", "between", "behind")
TIE_M = 1e-5
C = 6


def some_points(n, seed=0, reach=5.0):
    """Points (n, 4) as stored, around the grid and partly outside of it."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(-reach / STEP_M, reach / STEP_M, (n, 3))
    return torch.from_numpy(np.column_stack([steps, rng.integers(0, 256, n)]).astype(np.int16))


def a_batch(counts, sensor=SENSOR, seed=0):
    """Frames of so many points, with the lidar turned and off the origin."""
    ego_T_lidar = torch.eye(4).repeat(len(counts), 1, 1)
    ego_T_lidar[:, :3, :3] = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    ego_T_lidar[:, :3, 3] = torch.tensor(sensor)
    return {
        "points": torch.cat([some_points(n, seed + i) for i, n in enumerate(counts)]),
        "n_points": torch.tensor(counts),
        "ego_T_lidar": ego_T_lidar,
        "seed": torch.arange(len(counts)) + 2**62,
    }


def a_store(grid=GRID, sweeps=1):
    attrs = {"point_step_m": STEP_M, "config": {"lidar": {"sweeps": sweeps}}}
    return SimpleNamespace(url="some.zarr", grid=grid, attrs=attrs)


def an_objective(store=None, queries=90, seed=0):
    """In double precision, every parameter random."""
    model = ModelSettings(encoder_weights="random", channels=C)
    settings = ImgAlso.Settings(queries=queries)
    objective = ImgAlso(settings, store or a_store(), model.channels, turned=True)
    torch.manual_seed(seed)
    for parameter in objective.parameters():
        nn.init.normal_(parameter, std=0.2)
    return objective.double()


def naive_queries(points, sensor, n, seed):
    """[(place in ego, label, intensity or None)] of a frame, for the draws of its seed."""
    kept = reference.first_in_cubes(points[:, :3].tolist(), round(1000 * STEP_M))
    draws = draw_queries(len(kept), n, torch.Generator().manual_seed(seed))
    queries = []
    for source, kind, u in zip(*(values.tolist() for values in draws), strict=True):
        *steps, brightness = points[kept[source]].tolist()
        point = [STEP_M * step for step in steps]
        place, label = reference.query(point, sensor, KINDS[kind], u)
        queries.append((place, label, None if KINDS[kind] == "between" else brightness / 255))
    return queries


# --- queries --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_points", "n_queries"), [(400, 100), (40, 200), (1, 3), (0, 30)])
def test_queries_are_the_naive_ones(n_points, n_queries):
    points = some_points(n_points, reach=1.0 if n_points == 400 else 5.0)
    wanted = naive_queries(points, SENSOR, n_queries, 7)
    found = frame_queries(points, torch.tensor(SENSOR), STEP_M, n_queries, 7)
    assert len(wanted) == (100 if n_points == 400 else 3 * n_points)
    assert found["xyz_ego"].shape == (len(wanted), 3)
    for i, (place, label, intensity) in enumerate(wanted):
        assert found["xyz_ego"][i].tolist() == pytest.approx(place, abs=5e-6)
        assert found["occupied"][i].item() == label
        assert found["has_intensity"][i].item() == (intensity is not None)
        assert found["intensity"][i].item() == pytest.approx(intensity or 0, abs=1e-6)


def test_one_return_is_kept_per_cube_the_first_and_cubes_are_half_open():
    steps = [
        *([2, 0, 0], [-2, 0, 0], [1, 1, 1]),  # 4 mm on both sides of 0: two cubes
        *([150, 0, 0], [149, 0, 0], [199, 49, 49]),  # 300 mm begins a cube
        *([-50, 0, 0], [-51, 0, 0], [0, -1, 0], [0, 0, -1]),
    ]
    points = torch.tensor([[*step, 10 * i] for i, step in enumerate(steps)], dtype=torch.int16)
    found = frame_queries(points, torch.tensor(SENSOR), STEP_M, 300, 0)
    kept = sorted(255 * found["intensity"][found["has_intensity"]].unique())
    assert [round(brightness.item()) for brightness in kept] == [0, 10, 30, 40, 70, 80, 90]


@pytest.mark.parametrize("n", [3000, 3001, 3002])
def test_a_third_of_each_kind_from_different_returns_at_uniform_places(n):
    source, kind, u = draw_queries(9000, n, torch.Generator().manual_seed(n))
    assert torch.bincount(kind).tolist() == [1000, 1000, n - 2000]
    chosen = []
    for k in range(3):
        assert source[kind == k].unique().numel() == (kind == k).sum()
        assert source[kind == k].float().mean().item() == pytest.approx(4500, abs=350)
        assert u[kind == k].mean().item() == pytest.approx(0.5, abs=0.04)
        assert u[kind == k].std().item() == pytest.approx(1 / math.sqrt(12), abs=0.02)
        chosen.append(set(source[kind == k].tolist()))
    assert 0 <= u.min() < 0.005 and 0.995 < u.max() < 1
    for a, b in ((0, 1), (0, 2), (1, 2)):  # independent permutations: a ninth in common
        assert 70 < len(chosen[a] & chosen[b]) < 160
    between = u[kind == 1]
    assert torch.corrcoef(torch.stack([between, u[kind == 0]]))[0, 1].abs() < 0.1


def frame_of(which, request):
    """A frame's points and lidar position, from a store."""
    if which == "tiny":
        store = open_store(request.getfixturevalue("tiny_store"))
    else:
        path = request.getfixturevalue("tmp_path") / "targets.zarr"
        root = request.getfixturevalue("nuscenes_one")
        build_store(root, path, "map.mode=auto")
        store = open_store(path)
    frame = store.frame(0)
    return torch.from_numpy(frame["points"]), torch.from_numpy(frame["ego_T_lidar"][:3, 3]), store


@pytest.mark.parametrize("which", ["tiny", "real"])
def test_as_seen_from_the_sensor_space_is_free_up_to_the_return_and_occupied_behind(which, request):
    points, sensor, store = frame_of(which, request)
    assert sensor.norm() > 1.9  # not ego's origin
    found = frame_queries(points, sensor, STEP_M, 2048, 5)
    kept = reference.first_in_cubes(points[:, :3].tolist(), 2)
    source, kind, _ = draw_queries(len(kept), 2048, torch.Generator().manual_seed(5))
    returns = points[torch.tensor(kept)[source], :3].double() * STEP_M - sensor.double()
    queries = found["xyz_ego"].double() - sensor.double()
    away, length = returns.norm(dim=1), queries.norm(dim=1)
    beyond = length - away
    off_ray = torch.linalg.cross(queries, returns / away[:, None]).norm(dim=1)
    assert off_ray.max() < 2e-5
    assert ((queries * returns).sum(dim=1) > 0).all()
    for k, low, high in ((0, -0.1, 0), (2, 0, 0.1)):
        assert low - 1e-5 <= beyond[kind == k].min() and beyond[kind == k].max() <= high + 1e-5
        assert beyond[kind == k].abs().mean().item() == pytest.approx(0.05, abs=0.006)
        assert (found["occupied"][kind == k] == (k == 2)).all()
    share = (length / away)[kind == 1]
    assert share.min() >= 0 and share.max() <= 1 + 1e-6
    assert share.mean().item() == pytest.approx(0.5, abs=0.06)
    assert not found["occupied"][kind == 1].any() and not found["has_intensity"][kind == 1].any()
    assert found["intensity"].min() >= 0 and found["intensity"].max() <= 1
    if which == "real":
        assert 10_000 < len(kept) < len(points) and len(kind) == 2048
        pairs = near_cells(found["xyz_ego"], store.grid)[0]
        answered = pairs.unique().numel()
        assert 0.9 < answered / 2048 <= 1
        assert len(pairs) / answered == pytest.approx(4 * math.pi, rel=0.02)


def test_rays_start_at_the_lidar_not_at_ego_s_origin():
    """A return straight to the left of the lidar: all its queries have the lidar's x."""
    batch = a_batch([1], sensor=(0.8, -3.0, 1.5))
    batch["points"] = torch.tensor([[400, 500, 0, 9]], dtype=torch.int16)  # (0.8, 1, 0) m
    targets = query_targets(batch, torch.zeros(1), GRID, STEP_M, 30)
    x = GRID.bev_centres()[0][targets["cell"] // 10] + targets["relative"][:, 0].numpy()
    np.testing.assert_allclose(x, 0.8, atol=1e-6)
    assert len(x) > 20


# --- pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid",
    [
        GRID,
        VoxelGrid((-3.0, 3.0, 6), (-2.0, 3.0, 5), (-1.0, 1.0, 1)),  # 1 m
        VoxelGrid((-1.5, 1.5, 10), (-2.1, 1.4, 5), (-1.0, 1.0, 1)),  # 0.3 x 0.7 m
        VoxelGrid((-2.8, 2.8, 4), (-2.8, 2.8, 4), (-1.0, 1.0, 1)),  # 1.4 m
        VoxelGrid((-1.0, 1.0, 20), (-0.8, 1.2, 20), (-1.0, 1.0, 1)),  # 0.1 m
    ],
)
def test_pairs_are_those_of_a_search_of_all_cells(grid):
    rng = np.random.default_rng(0)
    (lo_x, hi_x, _), (lo_y, hi_y, _), _ = reference.bounds_of(grid)
    low, high = (lo_x - 0.7, lo_y - 0.7, -9), (hi_x + 0.7, hi_y + 0.7, 9)
    points = rng.uniform(low, high, (100, 3)).astype(np.float32)
    wanted, ties = reference.near_pairs(points.tolist(), reference.bounds_of(grid), TIE_M)
    query, cell, relative = (values.tolist() for values in near_cells(torch.tensor(points), grid))
    found = dict(zip(zip(query, cell, strict=True), relative, strict=True))
    assert len(found) == len(query) and len(ties) < 10
    assert found.keys() - ties == wanted.keys() - ties
    for pair in found.keys() & wanted.keys():
        assert found[pair] == pytest.approx(wanted[pair], abs=1e-5)
    answered = {pair[0] for pair in found}
    inside = (points[:, 0] >= lo_x) & (points[:, 0] < hi_x)
    inside &= (points[:, 1] >= lo_y) & (points[:, 1] < hi_y)
    assert len(answered) == inside.sum() < 100  # every query in the map has a cell, no other one


def naive_pairs(batch, angles, n_queries):
    """{(sample, query of it, flat cell): (relative, label, intensity or None)}, and ties."""
    pairs, ties = {}, set()
    points = batch["points"].split(batch["n_points"].tolist())
    for b, angle in enumerate(angles):
        queries = naive_queries(points[b], SENSOR, n_queries, batch["seed"][b].item())
        turned = [reference.turn(place, angle) for place, _, _ in queries]
        found, close = reference.near_pairs(turned, reference.bounds_of(GRID), TIE_M)
        for (q, cell), relative in found.items():
            pairs[b, q, cell] = (relative, *queries[q][1:])
        ties |= {(b, *pair) for pair in close}
    return pairs, ties


@pytest.mark.parametrize("angles", [[0.0, 0.0, 0.0], [0.7, -2.5, math.pi]])
def test_targets_of_a_turned_frame_are_its_turned_queries(angles):
    batch = a_batch([150, 40, 90])
    targets = query_targets(batch, torch.tensor(angles), GRID, STEP_M, 60)
    wanted, ties = naive_pairs(batch, angles, 60)
    assert not ties & wanted.keys()
    n_cells = math.prod(GRID.bev_shape)
    rows = [
        (b, cell % n_cells, *wanted[b, q, cell][0], label, intensity)
        for (b, q, cell), (_, label, intensity) in wanted.items()
    ]
    found = zip(*(targets[name].tolist() for name in targets), strict=True)
    found = [
        (cell // n_cells, cell % n_cells, *relative, label, intensity if known else None)
        for cell, relative, label, intensity, known in found
    ]
    assert list(targets) == ["cell", "relative", "occupied", "intensity", "has_intensity"]

    def order(row):
        return [-1.0 if value is None else round(value, 3) for value in row]

    assert len(found) == len(rows) > 300
    for a, b in zip(sorted(found, key=order), sorted(rows, key=order), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


# --- decoder and loss -----------------------------------------------------------------------------


def test_loss_and_gradients_are_those_of_loops_over_pairs():
    objective, batch, angles = an_objective(), a_batch([60, 30]), [0.4, -1.0]
    pairs, _ = naive_pairs(batch, angles, 18)
    objective.settings = ImgAlso.Settings(queries=18)
    targets = objective.targets(batch, torch.tensor(angles))
    ny = GRID.bev_shape[1]
    rows = [(b, cell // ny, cell % ny, *what) for (b, _, cell), what in pairs.items()]
    assert {row[-2] for row in rows} == {0, 1} and any(row[-1] is None for row in rows)
    rng = np.random.default_rng(0)
    bev = torch.from_numpy(rng.normal(size=(2, C, *GRID.bev_shape)))
    bevs = [bev.clone().requires_grad_() for _ in range(2)]
    expected = reference.query_loss(objective.head, bevs[0], rows)
    sum(expected).backward()
    slopes = {name: p.grad.clone() for name, p in objective.named_parameters()}
    objective.zero_grad()
    targets["relative"] = targets["relative"].double()
    loss, terms = objective(bevs[1], targets, objective.counts(targets), 1.0)
    assert list(terms) == ["occupancy", "intensity"]
    assert [t.item() for t in terms.values()] == pytest.approx([t.item() for t in expected], 1e-5)
    assert loss.item() == pytest.approx(sum(expected).item(), rel=1e-5)
    loss.backward()
    for name, parameter in objective.named_parameters():
        torch.testing.assert_close(parameter.grad, slopes[name], rtol=1e-4, atol=1e-6)
        assert slopes[name].any()
    torch.testing.assert_close(bevs[1].grad, bevs[0].grad, rtol=1e-4, atol=1e-6)
    assert bevs[0].grad.any()


def test_the_decoder_is_as_large_as_the_published_one():
    layers = ((128, 128), (131, 128), (128, 128), (128, 128), (128, 2))
    expected = sum(n_in * n_out + n_out for n_in, n_out in layers)
    assert sum(p.numel() for p in QueryHead(128).parameters()) == expected == 66_690


def test_the_decoder_stays_precise_under_autocast():
    """Two centimetres at 20 m above the ground make a difference, and the right one."""
    head, cell = an_objective().head.float(), torch.tensor([3, 3])
    cells = torch.randn(9, C)
    relative = torch.tensor([[0.1, 0.2, 20.0], [0.1, 0.2, 20.02]])
    with torch.autocast("cpu", torch.bfloat16):
        half = head(cells, cell, relative)
    torch.testing.assert_close(half, head(cells, cell, relative), rtol=0, atol=0)
    assert (half[0] != half[1]).all()


def tiny_batch(store, frames):
    dataset = FrameDataset(store, frames, ("points", "ego_T_lidar"))
    batch = dataset.collate([dataset[i] for i in range(len(frames))])
    return batch | {"seed": batch["frame"] + 100}


@pytest.mark.parametrize("cuts", [[0, 2, 4], [0, 1, 4], [0, 1, 2, 3, 4]])
def test_a_step_is_the_same_however_it_is_split(cuts, tiny_store):
    """With targets made for each part alone, as micro-batches and processes make them."""
    store = open_store(tiny_store)
    objective, angles = an_objective(store), torch.tensor([0.5, 0.0, -2.0, 1.0])
    bev = torch.randn(4, C, *store.grid.bev_shape, dtype=torch.float64)

    def step(cuts):
        objective.zero_grad()
        leaf, parts = bev.clone().requires_grad_(), [slice(a, b) for a, b in pairwise(cuts)]
        batches = [tiny_batch(tiny_store, range(p.start, p.stop)) for p in parts]
        targets = [
            objective.targets(batch, angles[p]) for batch, p in zip(batches, parts, strict=True)
        ]
        for t in targets:
            t["relative"] = t["relative"].double()
        counts = sum(objective.counts(t) for t in targets)
        losses = [
            objective(leaf[p], t, counts, 1 / len(parts))[0]
            for p, t in zip(parts, targets, strict=True)
        ]
        sum(losses).backward()
        slopes = {name: p.grad.clone() for name, p in objective.named_parameters()}
        return counts, {"loss": sum(losses).detach(), "bev": leaf.grad} | slopes

    (counts, whole), (split_counts, split) = step([0, 4]), step(cuts)
    assert torch.equal(counts, split_counts)
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-6)


def test_counts_are_what_each_term_is_a_mean_over():
    objective = an_objective()
    batch = a_batch([50, 80])
    targets = objective.targets(batch, torch.zeros(2))
    pairs, _ = naive_pairs(batch, [0.0, 0.0], 90)
    known = sum(intensity is not None for _, _, intensity in pairs.values())
    counts = objective.counts(targets)
    assert counts.dtype == torch.float64
    assert counts.tolist() == [len(pairs), known] and 0 < known < len(pairs)


@pytest.mark.parametrize("counts", [[0, 0], [0, 40]])
def test_frames_without_points_have_no_queries_and_a_finite_loss(counts):
    objective, batch = an_objective(), a_batch(counts)
    targets = objective.targets(batch, torch.tensor([0.3, 0.4]))
    assert (targets["cell"] >= math.prod(GRID.bev_shape)).all()  # of the second sample
    targets["relative"] = targets["relative"].double()
    bev = torch.zeros(2, C, *GRID.bev_shape, dtype=torch.float64, requires_grad=True)
    loss, _ = objective(bev, targets, objective.counts(targets), 1.0)
    loss.backward()
    assert loss.isfinite() and (loss.item() == 0) == (counts == [0, 0])
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_a_return_at_the_sensor_itself_does_no_harm():
    points = torch.tensor([[0, 0, 0, 3]], dtype=torch.int16)
    found = frame_queries(points, torch.zeros(3), STEP_M, 9, 0)
    assert torch.equal(found["xyz_ego"], torch.zeros(3, 3))


def test_queries_of_a_frame_depend_on_seed_epoch_and_frame_alone(tiny_store):
    objective = an_objective(open_store(tiny_store))
    network, device = SimpleNamespace(objective=objective), torch.device("cpu")

    def cells(frames, seed=0, epoch=0):
        """Of each frame, whatever batch it is in."""
        settings = [f"run.seed={seed}", "augment.rotate_bev_deg=0"]
        job = Job("pretrain", str(tiny_store), TrainConfig.load(None, settings))
        dataset = FrameDataset(tiny_store, frames, ("images", "points", "ego_T_lidar"))
        batch = dataset.collate([dataset[i] for i in range(len(frames))])
        torch.manual_seed(len(frames))
        targets = prepare(batch, job, network, epoch, device)[1]
        sample = targets["cell"] // 256
        return {f: targets["relative"][sample == b] for b, f in enumerate(frames)}

    together, other_batch = cells([3, 5, 8]), cells([8, 2])
    assert torch.equal(together[8], other_batch[8]) and len(together[8]) > 50
    assert torch.equal(cells([5])[5], together[5])
    for other in (cells([8], seed=1), cells([8], epoch=1)):
        assert not torch.equal(other[8], together[8])


def test_what_does_not_fit_is_refused():
    settings = ImgAlso.Settings()
    with pytest.raises(StoreError, match="some.zarr accumulates 3 lidar sweeps .* lidar.sweeps=1"):
        ImgAlso(settings, a_store(sweeps=3), C, True)
    coarse = VoxelGrid((-9.0, 9.0, 9), (-9.0, 9.0, 18), (-1.0, 2.0, 3))
    with pytest.raises(StoreError, match="BEV cells of 2 x 1 m, but img-also needs .* finer grid"):
        ImgAlso(settings, a_store(coarse), C, True)
    with pytest.raises(ConfigError, match="no objective 'img-alsa' .did you mean img-also"):
        TrainConfig.load(None, ["pretrain.objective=img-alsa"])
    with pytest.raises(ConfigError, match="objectives.img-also.queries must be greater .* 3"):
        TrainConfig.load(None, ["objectives.img-also.queries=2"])


# --- the command ----------------------------------------------------------------------------------


def command(*arguments, cwd, code=0):
    """``occfeat-train`` in this process; returns what it printed."""
    with chdir(cwd):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


SETTINGS = ("objectives.img-also.queries=100", "augment.rotate_bev_deg=90")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A finished Img-ALSO pretraining, and what it printed."""
    cwd = tmp_path_factory.mktemp("workplace")
    make_tiny_store(cwd / "targets.zarr")
    arguments = ("pretrain", "--objective", "img-also", "--run-dir", "runs/also")
    return cwd, command(*arguments, *options(*SETTINGS), cwd=cwd)


def test_pretraining_says_what_it_learns_and_logs_its_terms(workplace):
    cwd, printed = workplace
    assert "runs/also: img-also pretraining on 12 frames of 3 scenes" in printed
    said = json.loads((cwd / "runs/also/run.json").read_text())
    assert said["kind"] == "pretrain" and said["config"]["pretrain"]["objective"] == "img-also"
    lines = log_of(cwd / "runs/also")
    assert len(lines) == 9 and lines[-1]["loss"] < lines[0]["loss"]
    for line in lines:
        assert line["loss"] == pytest.approx(line["occupancy"] + line["intensity"])
        assert 0.3 < line["occupancy"] < 1.5 and 0 < line["intensity"] < 1


def test_a_resumed_run_keeps_its_objective_and_ends_bit_equal(workplace):
    cwd, _ = workplace
    copy = shutil.copytree(cwd / "runs/also", cwd / "resumed")
    last, _ = sorted(copy.glob("checkpoint-*.json"), reverse=True)
    last.unlink()
    resume = ("pretrain", "--resume", "--run-dir", copy)
    output = command(*resume, "--objective", "occfeat", cwd=cwd, code=1)
    assert "a resumed run keeps its --objective: leave it out" in output
    output = command(*resume, "--set", "pretrain.objective=occfeat", cwd=cwd, code=1)
    assert "a resumed run keeps its pretrain.objective: leave" in output
    output = command(*resume, cwd=cwd)
    assert "img-also pretraining on" in output and "resumed after step 8" in output
    assert_same_state(cwd / "runs/also", copy)


def test_finetuning_and_evaluation_go_on_from_it(workplace):
    cwd, _ = workplace
    arguments = ("--run-dir", "fine", "--set", "finetune.epochs=1", "--set", "finetune.lr=1e-30")
    frozen = ("--set", "model.freeze_batch_norm=true")
    output = command("finetune", "--init", "runs/also", *arguments, *frozen, cwd=cwd)
    assert "not used: 10 tensors of its pretrain head" in output
    before, after = final_state(cwd / "runs/also"), final_state(cwd / "fine")
    shared = [name for name in before if name.startswith(".network.bev_net.")]
    assert len(shared) == 341
    for name in shared:
        assert torch.equal(before[name], after[name]), name
    assert " on 4 frames of mini_val" in command("evaluate", "--run-dir", "fine", cwd=cwd)


@LONG
def test_accumulation_and_two_processes_are_one_large_batch(workplace):
    cwd, _ = workplace
    arguments = ("pretrain", "--store", "targets.zarr", "--objective", "img-also", "--run-dir")
    settings = (*SETTINGS, *COMPARABLE, "pretrain.epochs=1")
    command(*arguments, "one", *options(*settings), cwd=cwd)
    small = options(*settings, "pretrain.batch=2", "pretrain.accumulate=2")
    command(*arguments, "small", *small, cwd=cwd)
    run(*arguments, "two", *options(*settings), cwd=cwd, processes=2)
    one, small, two = (
        torch.tensor(
            [
                [line[k] for k in ("loss", "occupancy", "intensity", "gradient_norm")]
                for line in log_of(cwd / name)
            ]
        )
        for name in ("one", "small", "two")
    )
    assert len(one) == 3
    torch.testing.assert_close(small, one, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(two, one, rtol=1e-4, atol=2e-6)


def test_a_run_that_names_no_objective_learned_occfeat(workplace):
    cwd, _ = workplace
    said = json.loads((cwd / "runs/also/run.json").read_text())
    del said["config"]["pretrain"]["objective"]
    job = Job.of_run(SimpleNamespace(path=cwd, description=lambda: said))
    assert job.learns is OccFeat and job.title == "occfeat pretraining"


def test_a_store_that_does_not_fit_is_refused_before_any_work(tmp_path):
    store = make_tiny_store(tmp_path / "sweeps.zarr", settings=["lidar.sweeps=2"])
    arguments = ("pretrain", "--store", store, "--objective", "img-also", *options())
    output = command(*arguments, cwd=tmp_path, code=1)
    assert "Error: " in output and "accumulates 2 lidar sweeps" in output
    assert not (tmp_path / "runs").exists()
