"""Evaluation on corrupted images, and training and evaluating without a teacher's features."""

import json
import shutil
from contextlib import chdir

import pytest
import torch
import zarr
from click.testing import CliRunner
from tiny_store import make_tiny_store
from train_runs import log_of, options

from occfeat_targets.store.files import StoreError, zarr_store
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.schema import CORRUPTIONS, SEVERITIES
from occfeat_train.cli import main
from occfeat_train.data.dataset import FrameDataset
from occfeat_train.distributed import process_group
from occfeat_train.evaluate import evaluate
from occfeat_train.objectives.occfeat import voxel_targets
from occfeat_train.robustness import find_corrupted, headline, summary
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run

STORED = ("fog-hard", "fog-easy", "fog-mid", "snow-mid")


def _invoke(*arguments, cwd, code=0):
    with chdir(cwd):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def _corrupted(path, name, shift, **arguments):
    """The tiny store of the same frames, but each with the images of the ``shift``-th before."""
    make_tiny_store(path, settings=[f"images.corruption={name}"], dim=0, **arguments)
    group = zarr.open_group(zarr_store(path, read_only=False), mode="r+")
    for array in ("images", "image_offset"):
        values = group[array][:]
        for i in range(len(values)):
            group[array][i] = values[i - shift]
    return path


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Runs of both tasks on a store with a map, and corrupted ones made of it."""
    cwd = tmp_path_factory.mktemp("corrupted")
    splits = {"mini_train": 1, "mini_val": 1}
    make_tiny_store(cwd / "targets.zarr", splits=splits, with_map=True)
    for i, name in enumerate(STORED):
        _corrupted(cwd / "out" / f"{i}.zarr", name, i + 1, splits=splits, with_map=True)
    settings = options("finetune.epochs=2", "finetune.lr=0.01")
    for task in ("vehicle", "map"):
        arguments = ("finetune", "--init", "none", "--task", task, "--run-dir", task, *settings)
        _invoke(*arguments, cwd=cwd)
    return cwd


@pytest.mark.parametrize("task", ["vehicle", "map"])
def test_every_store_is_evaluated_and_named_by_its_settings(workplace, task):
    as_json = ["--json"] if task == "map" else []
    arguments = ("evaluate", "--run-dir", task, "--corrupted", "out", *as_json)
    printed = _invoke(*arguments, cwd=workplace)
    result = json.loads((workplace / task / "corrupted.json").read_text())
    run = Run(workplace / task)
    with process_group() as process:
        alone = {
            name: headline(evaluate(Job.of_run(run, str(workplace / "out" / path)), run, process))
            for name, path in zip(STORED, ("0.zarr", "1.zarr", "2.zarr", "3.zarr"), strict=True)
        }
    assert len(set(alone.values())) > 2  # the stores can be told apart
    assert result["iou"] == {
        "fog": {s: alone[f"fog-{s}"] for s in SEVERITIES},
        "snow": {"mid": alone["snow-mid"]},
    }
    clean = result["clean"]["rows"]["ego, mean" if task == "map" else "ego, visible"]["iou"]
    fog = sum(alone[f"fog-{s}"] for s in SEVERITIES)
    assert result["mean"] == {"fog": pytest.approx(fog / 3, abs=0.01)}
    assert result["mRR"] == result["RR"]["fog"] == pytest.approx(100 * fog / 3 / clean, abs=0.01)
    if as_json:
        assert json.loads(printed[printed.index("{\n") : printed.rindex("}") + 1]) == result
        return
    assert "vehicle IoU, ego, visible cells" in printed
    assert "mRR over 1 of 8 corruptions" in printed
    assert "missing: camera_crash, frame_lost, " in printed
    assert "snow-easy, snow-hard\n" in printed


def test_stores_that_do_not_fit_are_refused_before_any_work(workplace, tmp_path):
    def refused(name, make):
        make(tmp_path / name / "x.zarr")
        arguments = ("--run-dir", workplace / "vehicle", "--corrupted", tmp_path / name)
        return _invoke("evaluate", *arguments, cwd=workplace, code=1)

    splits = {"mini_train": 1, "mini_val": 1}
    fog = {"settings": ["images.corruption=fog-easy"], "splits": splits}
    assert "and not the same" in refused("tokens", lambda p: make_tiny_store(p, seed=1, **fog))
    other = {"settings": [*fog["settings"], "images.quality=50"], "splits": splits}
    assert "quality: 95 -> 50" in refused("images", lambda p: make_tiny_store(p, **other))
    assert "holds no finished stores of corrupted images" in refused(
        "clean", lambda p: make_tiny_store(p, splits=splits)
    )
    assert "not an occfeat-targets store" in refused(
        "foreign", lambda p: zarr.open_group(p, mode="w", zarr_format=3)
    )
    arguments = ("evaluate", "--run-dir", "vehicle", "--corrupted", "nowhere")
    assert "occfeat-targets corrupt DATAROOT STORE" in _invoke(*arguments, cwd=workplace, code=1)


def test_unfinished_stores_are_missing_and_doubles_refused(workplace, tmp_path):
    out = shutil.copytree(workplace / "out", tmp_path / "out")
    assert list(find_corrupted(str(out))) == ["fog-easy", "fog-mid", "fog-hard", "snow-mid"]
    zarr.open_group(zarr_store(out / "2.zarr", read_only=False), mode="r+").attrs["complete"] = (
        False
    )
    assert list(find_corrupted(str(out))) == ["fog-easy", "fog-hard", "snow-mid"]
    assert find_corrupted(f"file://{out}").keys() == find_corrupted(str(out)).keys()
    shutil.copytree(out / "3.zarr", out / "again.zarr")
    with pytest.raises(StoreError, match="are both of snow-mid: move one away"):
        find_corrupted(str(out))


def test_rates_by_hand():
    scores = {
        "fog": {"easy": 30.0, "mid": 20.0, "hard": 10.0},
        "snow": {"easy": 40.0, "mid": 40.0, "hard": 28.0},
        "low_light": {"easy": 1.0, "hard": 2.0},
    }
    found = summary(40.0, scores)
    assert found["mean"] == {"fog": 20.0, "snow": 36.0}
    assert found["RR"] == {"fog": 50.0, "snow": 90.0}
    assert found["mRR"] == 70.0
    absent = [c for c in CORRUPTIONS if c not in scores]
    assert set(found["missing"]) == {"low_light-mid", *absent}
    for undefined in (None, 0.0):
        assert summary(undefined, scores)["mRR"] is None
        assert summary(undefined, scores)["mean"]["fog"] == 20.0
    scores["fog"]["mid"] = None  # no vehicle, none found: no IoU
    assert summary(40.0, scores)["RR"] == {"snow": 90.0}
    assert "fog" not in summary(40.0, scores)["missing"]


# --- stores without features --------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacherless(tmp_path_factory):
    return make_tiny_store(tmp_path_factory.mktemp("teacherless") / "targets.zarr", dim=0)


def test_pretraining_features_without_a_teacher_is_refused(teacherless, tmp_path):
    output = _invoke("pretrain", "--store", teacherless, *options(), cwd=tmp_path, code=1)
    assert "has no features, it was built with teacher.name=none" in output
    assert "--set objectives.occfeat.features=false" in output


@pytest.mark.parametrize("turn", [0.0, 30.0])
def test_occupancy_alone_is_learned_as_from_a_store_with_features(
    teacherless, tiny_store, tmp_path, turn
):
    settings = options(
        "objectives.occfeat.features=false", "pretrain.epochs=1", f"augment.rotate_bev_deg={turn}"
    )
    losses = []
    for name, store in (("without", teacherless), ("with", tiny_store)):
        _invoke("pretrain", "--store", store, "--run-dir", name, *settings, cwd=tmp_path)
        losses.append([line["loss"] for line in log_of(tmp_path / name)])
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


def test_targets_without_features_are_the_same_voxels(tiny_store):
    names = ("voxel_index", "features", "feature_scale", "feature_cameras", "points")
    dataset = FrameDataset(str(tiny_store), [0, 1], names)
    batch = dataset.collate([dataset[0], dataset[1]])
    bare = {key: value for key, value in batch.items() if key not in names[1:3]}
    store = open_store(tiny_store)
    for angle in (torch.zeros(2), torch.tensor([0.5, -1.0])):
        arguments = (angle, store.grid, store.attrs["point_step_m"])
        whole, less = voxel_targets(batch, *arguments), voxel_targets(bare, *arguments)
        assert whole.keys() - less.keys() == {"features"}
        assert all(torch.equal(less[key], whole[key]) for key in less)
