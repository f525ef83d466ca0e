"""Finetuning for the map and its evaluation, as a user meets them."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train_reference as reference
from conftest import LONG
from tiny_store import make_tiny_store
from train_runs import assert_same_state, log_of, options, run

from occfeat_targets.sources.nuscenes_map import MAP_CLASSES
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import SEAL, open_store
from occfeat_train.data.dataset import FrameDataset
from occfeat_train.distributed import Process
from occfeat_train.evaluate import evaluate, predict, table
from occfeat_train.export import load_bev_net
from occfeat_train.network import build_network
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run, RunError
from occfeat_train.tasks.map import MapSegmentation
from occfeat_train.tasks.masks import HEADLINE, RANGES_M, THRESHOLDS
from occfeat_train.tasks.vehicle import VehicleSegmentation

PROTOCOLS = VehicleSegmentation.protocols
COUNTS = "true_positive, false_positive, false_negative"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A finished and evaluated finetuning for the map, with what the commands printed."""
    cwd = tmp_path_factory.mktemp("workplace")
    make_tiny_store(cwd / "targets.zarr", with_map=True)
    finetune = ("finetune", "--task", "map", "--init", "none", "--run-dir", "runs/map")
    printed = [
        run(*finetune, "--store", "targets.zarr", *options("augment.rotate_bev_deg=90"), cwd=cwd),
        run("evaluate", cwd=cwd),
    ]
    return cwd, printed


def test_finetuning_for_the_map_says_so_and_learns_every_class(workplace):
    cwd, (finetuned, _) = workplace
    assert "runs/map: map finetuning on 12 frames of 3 scenes" in finetuned
    assert json.loads((cwd / "runs/map/run.json").read_text())["task"] == "map"
    lines = log_of(cwd / "runs/map")
    assert len(lines) == 9
    for line in lines:
        assert line["loss"] == pytest.approx(np.mean([line[name] for name in MAP_CLASSES]))
        assert "centre" not in line
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_table_has_a_row_per_class_and_their_mean(workplace):
    _, (_, evaluated) = workplace
    lines = evaluated.splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith("at probability 0.5"))
    assert "runs/map (step 9) on 4 frames of mini_val: map IoU in per cent" in lines[start]
    assert lines[start + 2].split()[:4] == ["protocol,", "class", "all", "ranges"]
    assert lines[start + 2].endswith("best threshold")
    rows = [line.split()[:2] for line in lines[start + 3 : start + 9]]
    assert rows == [["ego,", name] for name in (*MAP_CLASSES, "mean")]


def test_evaluation_equals_naive_counting(workplace):
    cwd, _ = workplace
    result, expected = json.loads((cwd / "runs/map/result.json").read_text()), []
    job, store = Job.of_run(Run(cwd / "runs/map")), open_store(cwd / "targets.zarr")
    assert result["task"] == "map"
    assert result["headline"] == {
        "name": "ego, mean of classes",
        "iou": result["rows"]["ego, mean"]["iou"],
        "protocol": "ego",
    }
    network = build_network(job, store, load_weights=False)[0]
    network.load_state_dict(Run(cwd / "runs/map").load()[0]["network"])
    frames = [i for i in range(len(store)) if store.split(i) == "mini_val"]
    data = FrameDataset(job.store, frames, ("images", "map"))
    batch = data.collate([data[i] for i in range(len(frames))])
    mask = predict(network, batch, network.objective.predict)["mask"]
    probability = mask.float().sigmoid().numpy()
    truth = np.stack([store.frame(i)["map"] for i in frames])
    assert probability.shape == truth.shape == (4, 5, 16, 16)
    bounds, thresholds = reference.bounds_of(store.grid), [np.float32(t) for t in THRESHOLDS]
    best = []
    for k, name in enumerate(MAP_CLASSES):
        visible = np.ones_like(truth[:, k])
        counts = reference.iou_counts(
            probability[:, k], truth[:, k], visible, bounds, thresholds, RANGES_M
        )[1].sum(axis=0)
        ious = counts[:, 0] / counts.sum(axis=1)
        row = result["rows"][f"ego, {name}"]
        assert row[COUNTS] == counts[HEADLINE].tolist()
        assert row["iou"] == pytest.approx(100 * ious[HEADLINE], abs=0.005)
        assert row["best"]["iou"] == pytest.approx(100 * ious.max(), abs=0.005)
        assert row["best"]["threshold"] == THRESHOLDS[ious.argmax()]
        assert list(row["by_threshold"].values()) == pytest.approx(100 * ious, abs=0.005)
        expected.append(100 * ious[HEADLINE])
        best.append(100 * ious.max())
    assert result["rows"]["ego, mean"]["iou"] == pytest.approx(np.mean(expected), abs=0.005)
    assert result["rows"]["ego, mean"]["best"] == {
        "iou": pytest.approx(np.mean(best), abs=0.005),
        "threshold": None,
    }


@LONG
def test_two_processes_count_the_same(workplace):
    cwd, _ = workplace
    before = (cwd / "runs/map/result.json").read_text()
    printed = run("evaluate", "--json", cwd=cwd, processes=2)
    assert (cwd / "runs/map/result.json").read_text() == before
    said = json.loads(printed[printed.index("{\n") : printed.rindex("}") + 1])
    assert said == json.loads(before)


def test_a_resumed_run_keeps_its_task_and_ends_bit_equal(workplace):
    cwd, _ = workplace
    copy = shutil.copytree(cwd / "runs/map", cwd / "resumed")
    last, _ = sorted(copy.glob("checkpoint-*.json"), reverse=True)
    last.unlink()
    output = run("finetune", "--resume", "--run-dir", copy, "--task", "map", cwd=cwd, code=1)
    assert "a resumed run keeps its --task: leave it out" in output
    output = run("finetune", "--resume", "--run-dir", copy, cwd=cwd)
    assert "map finetuning on 12 frames" in output and "resumed after step" in output
    assert_same_state(cwd / "runs/map", copy)


def test_a_store_without_a_map_is_refused_before_any_work(workplace, tiny_store, tmp_path):
    cwd, _ = workplace
    sentence = f"Error: {tiny_store} has no map: rebuild it with the map expansion"
    arguments = ("finetune", "--task", "map", "--init", "none", "--store", tiny_store, *options())
    output = run(*arguments, cwd=tmp_path, code=1)
    assert sentence in output and "Traceback" not in output
    assert not list(tmp_path.iterdir())
    arguments = ("evaluate", "--store", tiny_store, "--run-dir", cwd / "runs/map")
    assert sentence in run(*arguments, cwd=tmp_path, code=1)


def test_the_network_of_a_map_run_exports_like_any_other(workplace):
    cwd, _ = workplace
    run("export", "--run-dir", "runs/map", "--out", "bev-net", cwd=cwd)
    weights = load_bev_net(cwd / "bev-net").state_dict()
    trained = Run(cwd / "runs/map").load()[0]["network"]
    for name, value in weights.items():
        assert torch.equal(value, trained[f"bev_net.{name}"])


def test_runs_of_before_there_were_tasks_are_refused(workplace, tmp_path):
    cwd, _ = workplace
    said = json.loads((cwd / "runs/map/run.json").read_text())
    del said["task"], said[SEAL]
    (tmp_path / "run.json").write_text(json.dumps(said))
    with pytest.raises(RunError, match="of another version of occfeat: it says no task"):
        Job.of_run(Run(tmp_path))


def test_evaluation_takes_its_head_from_the_run_not_from_the_store(workplace):
    """A store with a map evaluates a vehicle run on vehicles."""
    cwd, _ = workplace
    arguments = ("--store", "targets.zarr", "--init", "none", "--run-dir", "vehicles")
    output = run("finetune", *arguments, *options("finetune.epochs=1"), cwd=cwd)
    assert "vehicle finetuning on 12 frames" in output
    run_ = Run(cwd / "vehicles")
    result = evaluate(Job.of_run(run_), run_, Process(0, 1, torch.device("cpu")))
    assert result["task"] == "vehicle"
    rows = [f"{protocol}, {cells}" for protocol in PROTOCOLS for cells in ("visible", "all")]
    assert list(result["rows"]) == rows
    lines = table(result).splitlines()[3:]
    assert all(line.startswith(row) for line, row in zip(lines, rows, strict=True))


# --- the rows -------------------------------------------------------------------------------------


def map_of(*classes):
    attrs = {"map_classes": classes, "arrays": {}}
    store = SimpleNamespace(url="", grid=VoxelGrid(), attrs=attrs)
    return MapSegmentation(MapSegmentation.Settings(), store, 4, turned=False)


def made_up_counts(*totals):
    """(K, 2, R, T, 3) with each class's (T, 3) in the innermost ring, no cell hidden."""
    counts = torch.zeros(len(totals), 2, len(RANGES_M) + 1, len(THRESHOLDS), 3, dtype=torch.int64)
    for k, total in enumerate(totals):
        counts[k, :, 0] = torch.tensor(total)
    return counts


def test_the_mean_of_the_best_takes_each_class_at_its_own_threshold():
    first = [[t + 1, 0, 9 - t] for t in range(7)]  # 10 % at 0.35 to 70 % at 0.65
    second = [[8 - t, 0, 2 + t] for t in range(7)]  # 80 % to 20 %
    result = map_of("a", "b").rows(made_up_counts(first, second))
    assert result["a"]["best"] == {"iou": 70.0, "threshold": 0.65}
    assert result["b"]["best"] == {"iou": 80.0, "threshold": 0.35}
    assert result["mean"]["best"] == {"iou": 75.0, "threshold": None}
    assert result["mean"]["iou"] == 45.0  # 40 % and 50 %
    assert set(result["mean"]["by_threshold"].values()) == {45.0}
    assert list(result["mean"]["by_range"].values()) == [45.0, None, None, None]


def test_a_class_that_is_nowhere_is_left_out_of_the_mean():
    here, nowhere = [[5, 0, 5]] * 7, [[0, 0, 0]] * 7
    result = map_of("a", "b").rows(made_up_counts(here, nowhere))
    assert result["b"]["iou"] is None
    assert result["b"]["best"] == {"iou": None, "threshold": None}
    assert result["mean"]["iou"] == result["mean"]["best"]["iou"] == 50.0
    said = {"run": "r", "step": 1, "finished": True, "frames": 2, "splits": ["val"], "task": "map"}
    *_, last = table(said | {"rows": result}).splitlines()[:-1]
    assert last.split() == ["b"] + ["-"] * 6
