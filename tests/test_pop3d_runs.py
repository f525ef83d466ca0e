"""POP-3D through ``occfeat-train``, as every other objective: trained, killed, resumed, shared by
two processes, evaluated by words, asked, drawn, exported, reported; and what it says to misuse."""

import json
import signal

import pytest
import torch
from conftest import LONG
from PIL import Image
from train_runs import COMPARABLE, assert_same_state, curve, options, run, start, stop_at_step

from occfeat_targets.store.reader import open_store
from occfeat_targets.store.texts import Texts
from occfeat_targets.texts import stand_in
from occfeat_train.config import TrainConfig
from occfeat_train.export import load_bev_net
from occfeat_train.runs.job import Job
from occfeat_train.runs.resolve import require_words
from occfeat_train.runs.run import Run, RunError, check_same_teacher

ARGUMENTS = ("pretrain", "--objective", "pop3d", "--store", "targets.zarr", "--run-dir")


@pytest.fixture(scope="module")
def workplace(tiny_lidar_store, tmp_path_factory):
    """A store with tokens and classes, stand-ins of texts, an undisturbed pretraining."""
    cwd = tmp_path_factory.mktemp("pop3d")
    (cwd / "targets.zarr").symlink_to(tiny_lidar_store)
    stand_in(str(tiny_lidar_store)).save(cwd / "texts.safetensors")
    run(*ARGUMENTS, "runs/pre", *options(), cwd=cwd)
    return cwd


def test_it_learns_and_logs_its_terms(workplace):
    lines = curve(workplace / "runs/pre")
    assert len(lines) == 9
    for line in lines:
        total = line["occupancy"] + line["lovasz"] + line["features"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_killed_and_resumed_it_ends_as_if_it_had_not_been(workplace):
    process = start(*ARGUMENTS, "runs/killed", *options(), cwd=workplace)
    stop_at_step(process, workplace / "runs/killed", 4, signal.SIGKILL, group=True)
    assert Run(workplace / "runs/killed").checkpoints()
    run("pretrain", "--resume", "--run-dir", "runs/killed", cwd=workplace)
    assert_same_state(workplace / "runs/pre", workplace / "runs/killed")
    steps = {line["step"]: line for line in curve(workplace / "runs/killed")}
    assert [*steps.values()] == curve(workplace / "runs/pre")


@LONG
def test_two_processes_equal_one(workplace):
    """All but Lovász, which is no mean over items; so it does not count here."""
    settings = options(*COMPARABLE, "pretrain.epochs=1", "objectives.pop3d.lovasz_weight=0")
    run(*ARGUMENTS, "one", *settings, cwd=workplace)
    run(*ARGUMENTS, "two", *settings, cwd=workplace, processes=2)
    names = ("loss", "occupancy", "features", "gradient_norm")
    one, two = (
        torch.tensor([[line[name] for name in names] for line in curve(workplace / which)])
        for which in ("one", "two")
    )
    assert len(one) == 3
    torch.testing.assert_close(two, one, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("lift", ["bevformer", "tpv"])
def test_it_learns_on_other_lifts(workplace, lift):
    few = options(f"model.lift={lift}", "pretrain.epochs=1")
    run(*ARGUMENTS, f"runs/{lift}", *few, cwd=workplace)
    assert len(curve(workplace / "runs" / lift)) == 3


# --- words ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(workplace):
    """What evaluating by words printed."""
    asked = ("evaluate", "--run-dir", "runs/pre", "--texts", "texts.safetensors")
    return run(*asked, cwd=workplace)


def test_it_is_evaluated_by_words(workplace, evaluated):
    result = json.loads((workplace / "runs/pre/result.json").read_text())
    assert result["task"] == "open-vocabulary" and result["frames"] == 4
    assert result["headline"]["protocol"] == "pop3d"
    assert "STAND-INS, no text" in result["counted"] and "STAND-INS, no text" in evaluated
    rows = result["rows"]
    for name in ("pop3d, mean with empty", "looked-up, mean of classes", "pop3d, occupied"):
        assert f"{name} " in evaluated and 0 <= rows[name]["iou"] <= 100
    assert rows["looked-up, occupied"]["iou"] > 90  # the store's own voxels
    assert rows["pop3d, chance, mean with empty"]["iou"] < rows["looked-up, mean with empty"]["iou"]


@LONG
def test_two_processes_count_what_one_does(workplace, evaluated):
    before = json.loads((workplace / "runs/pre/result.json").read_text())
    asked = ("evaluate", "--run-dir", "runs/pre", "--texts", "texts.safetensors")
    run(*asked, cwd=workplace, processes=2)
    after = json.loads((workplace / "runs/pre/result.json").read_text())
    assert before == after


def test_an_occfeat_pretraining_answers_too(workplace):
    occfeat = ("pretrain", "--store", "targets.zarr", "--run-dir", "runs/occfeat")
    run(*occfeat, *options("pretrain.epochs=1"), cwd=workplace)
    run("evaluate", "--run-dir", "runs/occfeat", "--texts", "texts.safetensors", cwd=workplace)
    result = json.loads((workplace / "runs/occfeat/result.json").read_text())
    assert result["rows"]["pop3d, mean with empty"]["iou"] is not None


def test_a_frame_is_asked(workplace):
    longer = options("pretrain.epochs=15", "pretrain.lr=0.01", "data.workers=0")
    run(*ARGUMENTS, "runs/longer", *longer, cwd=workplace)
    asked = ("query", "--run-dir", "runs/longer", "--text", "car", "--texts", "texts.safetensors")
    said = run(*asked, "--frame", 13, cwd=workplace)
    lines = said.splitlines()
    assert lines[0].startswith("query.png: “car” in frame 13")
    n, voxels = (int(lines[1].split()[i]) for i in (0, 2))
    likeness = [float(line.split()[0]) for line in lines[4:9] if line[:2] == "  "]
    assert 0 <= n <= voxels and (n > 0) == (likeness[0] > 0)
    assert likeness and likeness == sorted(likeness, reverse=True)
    with Image.open(workplace / "query.png") as picture:
        assert picture.width > 1000
    said = run(*asked[:4], "a car", *asked[5:], cwd=workplace, code=1)
    assert "there is no text 'a car' (did you mean car?)" in said
    assert "name --texts FILE or --clip DIR" in run(*asked[:5], cwd=workplace, code=2)
    said = run(*asked, "--frame", 99, cwd=workplace, code=1)
    assert "no frame 99" in said


def test_what_it_learned_is_drawn(workplace):
    run("view", "--run-dir", "runs/pre", "--frame", 12, "--out", "view.png", cwd=workplace)
    with Image.open(workplace / "view.png") as picture:
        assert picture.width > 1000


def test_it_is_exported_and_finetuned(workplace):
    run("export", "--run-dir", "runs/pre", "--out", "exported", cwd=workplace)
    network = load_bev_net(workplace / "exported")
    assert sum(p.numel() for p in network.parameters())
    fine = ("finetune", "--init", "runs/pre", "--run-dir", "runs/fine")
    said = run(*fine, *options("finetune.epochs=1"), cwd=workplace)
    assert "its pretrain head" in said


def test_a_report_has_its_iou(workplace, evaluated):
    pytest.importorskip("plotly")
    run("report", "runs/pre", "--frames", 1, cwd=workplace)
    page = (workplace / "report.html").read_text()
    assert "open-vocabulary IoU of voxels; STAND-INS" in page


# --- misuse ---------------------------------------------------------------------------------------


def test_what_answers_to_no_words_says_so(workplace, tmp_path):
    also = ("pretrain", "--objective", "img-also", "--store", workplace / "targets.zarr")
    run(*also, "--run-dir", "also", *options("pretrain.epochs=1"), cwd=tmp_path)
    asked = ("--run-dir", "also", "--texts", workplace / "texts.safetensors")
    said = run("evaluate", *asked, cwd=tmp_path, code=1)
    assert "img-also pretraining does not answer to words" in said
    said = run("evaluate", "--run-dir", "also", cwd=tmp_path, code=1)
    assert "finetune it first" in said and "--texts" not in said
    said = run("query", *asked, "--text", "car", cwd=tmp_path, code=1)
    assert "img-also pretraining does not answer to words" in said
    fine = ("finetune", "--task", "open-vocabulary", "--init", "also")
    assert "evaluate --texts FILE" in run(*fine, cwd=tmp_path, code=1)
    said = run("evaluate", *asked, "--corrupted", "x", cwd=tmp_path, code=2)
    assert "--texts is of a pretraining" in said


@pytest.mark.parametrize("lacks", ["occupancy", "features"])
def test_half_an_occfeat_does_not_answer(lacks):
    config = TrainConfig.load(None, [f"objectives.occfeat.{lacks}=false"])
    with pytest.raises(RunError, match="occfeat pretraining does not answer to words"):
        require_words(Job("pretrain", "targets.zarr", config))


def test_features_of_another_teacher_are_not_compared(workplace):
    store = open_store(str(workplace / "targets.zarr"))
    check_same_teacher(Run(workplace / "runs/pre"), store)
    store.attrs["teacher"] = store.attrs["teacher"] | {"weights": "others"}
    with pytest.raises(RunError, match="weights others: use a store of the same teacher"):
        check_same_teacher(Run(workplace / "runs/pre"), store)


def test_texts_of_another_space_are_refused(workplace, tmp_path):
    sound = Texts.load(workplace / "texts.safetensors")
    other = {**vars(sound), "teacher": "another"}
    Texts(**other).save(tmp_path / "other.safetensors")
    asked = ("evaluate", "--run-dir", "runs/pre", "--texts", tmp_path / "other.safetensors")
    assert "features of another teacher" in run(*asked, cwd=workplace, code=1)
