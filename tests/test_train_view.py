"""``occfeat-train view``: pictures of what a network should predict, and does."""

from collections import Counter
from contextlib import chdir

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from matplotlib import rc_context, rcParamsDefault
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from tiny_store import make_tiny_store
from train_runs import SMALL, options

from occfeat_targets.store.colours import store_colours
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.schema import dequantise
from occfeat_train import view
from occfeat_train.cli import main
from occfeat_train.config import TrainConfig
from occfeat_train.network import build_network
from occfeat_train.objectives.base import Panel
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run
from occfeat_train.voxel_picture import draw_voxels

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with a map."""
    path = tmp_path_factory.mktemp("view") / "targets.zarr"
    return open_store(str(make_tiny_store(path, with_map=True)))


def _job(store, kind, *settings, task=None):
    return Job(kind, store.url, TrainConfig.load(None, [*SMALL, *settings]), task=task)


def _look(job, store, i, head):
    """Frame i where the network's head predicts what ``head`` returns."""
    network = build_network(job, store, load_weights=False)[0]
    network.objective.head.forward = head
    seen = view.look(network, job, i, CPU, store_colours(store))
    assert seen.images.shape == (6, 64, 96, 3)
    return seen


@pytest.mark.parametrize("task", ["vehicle", "map"])
def test_masks_are_the_store_s_and_the_head_s(store, task):
    frames = map(store.frame, range(len(store)))
    i, frame = next((i, f) for i, f in enumerate(frames) if f["vehicle_visible"].min() == 0)
    rng = np.random.default_rng(0)
    n = 5 if task == "map" else 1
    probability = rng.random((n, 16, 16))
    mask = torch.logit(torch.from_numpy(probability))[None]
    if task == "vehicle":
        mask = mask[:, 0]
    panels = _look(_job(store, "finetune", task=task), store, i, lambda _: {"mask": mask}).panels
    wanted = frame["map"] if task == "map" else frame["vehicle"][None] * 1.0
    if task == "vehicle":
        wanted[0][frame["vehicle_visible"] == 0] = 0.4
    titles = store.attrs["map_classes"] if task == "map" else ["vehicle"]
    assert [panel.title for panel in panels] == [f"{title}, ego" for title in titles]
    remark = " (purple: hardly visible)" if task == "vehicle" else ""
    assert {panel.remark for panel in panels} == {remark}
    for k, panel in enumerate(panels):
        np.testing.assert_allclose(panel.target, wanted[k], atol=1e-6)
        np.testing.assert_allclose(panel.predicted, probability[k], atol=1e-6)


def test_a_perfect_pretraining_looks_like_its_targets(store):
    """Also though the features it predicts have other lengths: only directions are learned."""
    frame, asked = store.frame(14), []
    features = dequantise(frame["features"], frame["feature_scale"])
    voxel, valid = frame["voxel_index"].astype(int), frame["feature_cameras"] > 0

    def head(bev, voxels):
        asked.append(voxels.numpy())
        logits = torch.full((1, *store.grid.shape), -20.0)
        logits.view(-1)[voxels] = 20
        lengths = np.random.default_rng(0).uniform(0.1, 9, (len(features), 1))
        return logits, torch.from_numpy(features * lengths)

    seen = _look(_job(store, "pretrain"), store, 14, head)
    occupancy, colours = seen.panels
    assert all(np.array_equal(asked_for, voxel) for asked_for in asked) and len(asked) == 3
    target, predicted = seen.volume
    assert np.array_equal(target[0], voxel) and np.array_equal(predicted[0], voxel)
    np.testing.assert_allclose(predicted[1][valid], target[1][valid], atol=1e-4)
    assert (target[1][~valid] == 0.5).all() and (~valid).any()
    assert "voxel IoU of this frame 100.0 %" in view.describe_predicted(seen.volume)
    above = np.zeros((16, 16))
    picture = np.zeros((16, 16, 3))
    expected = iter(store_colours(store)(features[valid]))
    for v, has_feature in zip(voxel, valid, strict=True):
        _, x, y = np.unravel_index(v, (2, 16, 16))
        above[x, y] = 1
        if has_feature:  # ascending, so that the highest voxel of a column comes last
            picture[x, y] = next(expected)
    assert np.array_equal(occupancy.target, above) and 0 < above.mean() < 1
    np.testing.assert_allclose(occupancy.predicted, above, atol=1e-6)
    np.testing.assert_allclose(colours.target, picture, atol=1e-5)
    np.testing.assert_allclose(colours.predicted, picture, atol=1e-4)


def test_predicted_features_have_the_colours_of_the_store_s_targets(store):
    frame = store.frame(14)
    valid = frame["feature_cameras"] > 0
    predicted = np.random.default_rng(0).normal(size=frame["features"].shape)
    job = _job(store, "pretrain", "objectives.occfeat.occupancy=false")
    seen = _look(job, store, 14, lambda *_: (None, torch.from_numpy(predicted)))
    x, y = np.unravel_index(frame["voxel_index"][valid][-1], (2, 16, 16))[1:]
    expected = store_colours(store)(predicted[valid])
    np.testing.assert_allclose(seen.panels[0].predicted[x, y], expected[-1], atol=1e-5)
    # In 3-D it is asked for the features of all that is occupied, seen or not.
    expected = store_colours(store)(predicted)
    np.testing.assert_allclose(seen.volume.predicted[1], expected, atol=1e-5)
    assert "the same voxels" in view.describe_predicted(seen.volume)


def test_predicted_voxels_are_those_above_one_half_with_features_of_their_own(store):
    voxel, features = store.frame(14)["voxel_index"].astype(int), np.eye(8)
    logits = torch.full((1, *store.grid.shape), -1.0)
    logits.view(-1)[[3, voxel[5], 500]] = 0.1

    def head(bev, voxels):
        return logits, torch.from_numpy(features[voxels.numpy() % 8])

    volume = _look(_job(store, "pretrain"), store, 14, head).volume
    index, colours = volume.predicted
    assert index.tolist() == sorted({3, int(voxel[5]), 500})
    np.testing.assert_allclose(colours, store_colours(store)(features[index % 8]))
    both, union = len({*index} & {*voxel}), len({*index} | {*voxel})
    text = view.describe_predicted(volume)
    assert text.startswith(f"{len(index)} predicted voxels (probability > 0.5)")
    assert f"IoU of this frame {100 * both / union:.1f} %" in text


@pytest.mark.parametrize("kept", ["occupancy", "features"])
def test_a_term_that_was_off_has_no_picture(store, kept):
    off = {"occupancy": "features", "features": "occupancy"}[kept]
    job = _job(store, "pretrain", f"objectives.occfeat.{off}=false")
    network = build_network(job, store, load_weights=False)[0]
    seen = view.look(network, job, 0, CPU, store_colours(store))
    (panel,) = seen.panels
    assert panel.title.startswith(kept)
    assert (seen.volume.target[1] is None) == (kept == "occupancy")


def test_forward_is_up_and_left_is_left(store):
    """A bright cell ahead and a little to the left of ego is seen above and a little left of it."""
    picture = np.zeros((16, 16, 3))
    picture[14, 10] = 1  # x 6.5 m, y 2.5 m
    with rc_context(rcParamsDefault):  # the devkit's maps, if a test loads them, turn on grid lines
        figure = Figure(figsize=(4, 4), dpi=100)
        canvas = FigureCanvasAgg(figure)
        axis = figure.subplots()
        view.draw_bev(axis, store.grid, picture, "")
        axis.lines[0].remove()  # ego
        canvas.draw()
    (left, bottom), (right, top) = axis.get_window_extent().get_points().round().astype(int)
    pixels = np.asarray(canvas.buffer_rgba())[400 - top : 400 - bottom, left:right, 0]
    rows, columns = np.nonzero(pixels[3:-3, 3:-3] > 200)
    assert columns.mean() / pixels.shape[1] == pytest.approx((8 - 2.5) / 16, abs=0.02)
    assert rows.mean() / pixels.shape[0] == pytest.approx((8 - 6.5) / 16, abs=0.02)


def test_the_command_draws_the_newest_run_s_first_validation_frame(store, tmp_path):
    def invoke(*arguments, code=0):
        with chdir(tmp_path):
            result = CliRunner().invoke(main, list(map(str, arguments)))
        assert result.exit_code == code, result.output
        return result.output

    assert "no finished pretrain or finetune run" in invoke("view", code=1)
    settings = options("pretrain.epochs=1", "finetune.epochs=1")
    invoke("pretrain", "--store", store.url, *settings)
    printed = invoke("view")
    assert f"prediction.png: frame 12 of {store.url} as runs/pretrain-" in printed
    assert store.split(12) == "mini_val" and store.split(11) == "mini_train"
    assert "(occfeat pretraining)" in printed
    picked = ("view", "--frame", 3, "--pick")
    invoke(*picked, "0,0,0", "--out", "picked.png")
    assert "give X,Y,Z in metres" in invoke(*picked, "0,0", code=1)
    invoke("view", "--frame", 3, "--out", "plain.png", "--colours", "colours.json")
    (path,) = (tmp_path / "runs").iterdir()
    figure = view.Viewer(Job.of_run(Run(path)), Run(path), CPU).figure(3, "0,0,0")
    titles = [axis.get_title() for axis in figure.axes]
    assert "likeness to the picked voxel: predicted" in titles
    plain, likeness = (Image.open(tmp_path / f"{name}.png") for name in ("plain", "picked"))
    assert (tmp_path / "colours.json").exists() and plain.tobytes() != likeness.tobytes()
    invoke("finetune", "--fraction", "0.01")
    assert "not a vehicle finetuning" in invoke(*picked, "0,0,0", code=1)
    assert "(vehicle finetuning)" in invoke("view", "--out", "mask.png", "--frame", 3)
    sizes = [Image.open(tmp_path / name).size for name in ("prediction.png", "mask.png")]
    assert [height for _, height in sizes] == [540, 540]
    # A panel and the voxels more.
    assert sizes[0][0] - sizes[1][0] == pytest.approx(75 * (3.7 + 5.5), abs=1)
    assert "has frames 0 to 15" in invoke("view", "--frame", 16, code=1)
    for path in ("nowhere/a.png", "runs"):
        assert f"cannot write {path}: name a file" in invoke("view", "--out", path, code=1)
    settings = options("pretrain.epochs=1", "pretrain.objective=img-also")
    invoke("pretrain", "--store", store.url, "--run-dir", "runs/also", *settings)
    assert "of which there is no picture" in invoke("view", "--run-dir", "runs/also", code=1)


def test_near_voxels_hide_far_ones():
    """Seen from behind ego: of the one ahead only what the other one leaves."""
    grid = VoxelGrid((0, 2, 2), (0, 1, 1), (0, 1, 1))
    figure = Figure(figsize=(4, 4), dpi=100)
    canvas = FigureCanvasAgg(figure)
    for index in ([0, 1], [1, 0]):
        axis = figure.subplots()
        colours = np.eye(3)[index]  # red behind, green ahead
        draw_voxels(axis, grid, np.array(index), colours, "")
        axis.lines[0].remove(), axis.texts[0].remove()
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3].reshape(-1, 3)
        counts = Counter(map(tuple, pixels.tolist()))
        sides = {colour for colour, n in counts.items() if n > 400}
        assert sides >= {(255, 0, 0), (204, 0, 0), (153, 0, 0), (0, 255, 0), (0, 153, 0)}
        assert (0, 204, 0) not in sides
        figure.clear()


@pytest.mark.parametrize("n_cameras", [1, 2, 5])
def test_any_number_of_cameras_is_drawn(store, tmp_path, n_cameras):
    cameras = [f"CAM_{i}" for i in range(n_cameras)]
    panel = Panel("mask", np.zeros((16, 16)), np.zeros((16, 16)))
    seen = view.Seen(np.zeros((n_cameras, 64, 96, 3), np.uint8), [panel], None)
    view._draw("", cameras, seen, store.grid, None).savefig(tmp_path / "a.png", dpi=75)
    columns = (n_cameras + 1) // 2
    assert Image.open(tmp_path / "a.png").size[0] == pytest.approx(
        75 * (3.7 + 3.1 * 96 / 64 * columns), abs=1
    )
