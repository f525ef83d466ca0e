"""Run directories under damage, and what a trainer can be asked besides: more epochs, held-out
numbers."""

import json
import random
import shutil
import signal
import socket
import time
from contextlib import chdir

import psutil
import pytest
import torch
from conftest import LONG
from torture_train import torture
from train_runs import (
    TORCHRUN,
    assert_same_state,
    curve,
    flip,
    full_disk,
    log_of,
    options,
    run,
    start,
)

from occfeat_targets.store.reader import open_store
from occfeat_train.config import TrainConfig
from occfeat_train.distributed import Process
from occfeat_train.runs import resolve
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run, RunError
from occfeat_train.train import Trainer

CPU = Process(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def undisturbed(tiny_store, tmp_path_factory):
    """A pretraining of 9 steps, 3 epochs, that nothing disturbed."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    run("pretrain", "--store", tiny_store, "--run-dir", "a", *options(), cwd=cwd)
    return cwd / "a"


def held_out(directory):
    return [line for line in log_of(directory) if "loss" not in line]


def test_any_flipped_byte_leaves_a_whole_checkpoint(tmp_path, capsys):
    whole, copy = Run(tmp_path / "whole"), Run(tmp_path / "copy")
    whole.create({"kind": "pretrain", "config": {"lr": 0.001}})
    for step in (1, 2):
        whole.save({"a": torch.full((99,), float(step))}, {"step": step, "finished": step == 2})
    fell_back, rng = {".pt": 0, ".json": 0}, random.Random(0)
    for suffix in (".pt", ".json") * 200:
        shutil.copytree(whole.path, copy.path, dirs_exist_ok=True)
        newest = copy.path / f"checkpoint-00000002{suffix}"
        flip(newest, rng.randrange(newest.stat().st_size))
        state, position = copy.load()
        assert position == {"step": position["step"], "finished": position["step"] == 2}
        assert torch.equal(state["a"], torch.full((99,), float(position["step"])))
        said = capsys.readouterr().err.splitlines()
        assert len(said) == (position["step"] == 1)
        assert all(line.endswith("the checkpoint before it is taken, of step 1") for line in said)
        fell_back[suffix] += len(said)
    assert fell_back[".json"] > 150 and fell_back[".pt"] > 50  # others hit spaces and padding


def test_a_fall_back_resumes_to_the_same_weights(undisturbed, tmp_path):
    copy = Run(shutil.copytree(undisturbed, tmp_path / "copy"))
    flip(copy.path / "checkpoint-00000009.pt", 100_000)
    output = run("pretrain", "--resume", "--run-dir", "copy", cwd=tmp_path)
    assert output.count("checkpoint-00000009.pt is damaged") == 1
    assert "resumed after step 8" in output
    assert_same_state(undisturbed, copy.path)
    assert curve(copy.path) == curve(undisturbed)
    for path in copy.path.glob("checkpoint-*.pt"):
        path.write_bytes(b"")
    said = run("pretrain", "--resume", "--run-dir", "copy", cwd=tmp_path, code=1)
    assert "is damaged (File is not a zip file), and there is no whole one before it" in said


def test_damage_in_one_run_leaves_the_others_alone(undisturbed, tmp_path, capsys):
    for name in ("good", "no-json", "flipped", "no-position", "foreign"):
        shutil.copytree(undisturbed, tmp_path / "runs" / name)
    (tmp_path / "runs/no-json/run.json").write_text("")
    flip(tmp_path / "runs/flipped/run.json", 300)
    for path in (tmp_path / "runs/no-position").glob("checkpoint-*.json"):
        path.write_text("{")
    (tmp_path / "runs/foreign/run.json").write_text('{"of": "another program"}')
    with chdir(tmp_path):
        assert resolve.finished(None, "pretrain").path.name == "good"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all(line.startswith("Note: left out: runs/") for line in said)
    with pytest.raises(RunError, match="put a copy of checkpoint-00000009.json in its place"):
        Run(tmp_path / "runs/flipped").description()
    (tmp_path / "runs/flipped/run.json").write_bytes(
        (tmp_path / "runs/flipped/checkpoint-00000009.json").read_bytes()
    )
    assert "finished" in run("pretrain", "--resume", "--run-dir", "runs/flipped", cwd=tmp_path)


def test_only_what_a_run_never_began_to_be_is_reused(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    for name, text in (("lock", ""), ("run.json", ""), ("run.json.part", "{")):
        (path / name).write_text(text)
        Run(path).require_new()
    (path / "log.jsonl").touch()
    with pytest.raises(RunError, match="is not empty"):
        Run(path).require_new()
    with pytest.raises(RunError, match="is a file"):
        Run(path / "lock").require_new()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    whole = Run(tmp_path)
    whole.create({"kind": "pretrain"})
    whole.save({"a": torch.ones(9)}, {"step": 1, "finished": False})
    before = sorted(tmp_path.iterdir())
    with full_disk(20_000), pytest.raises(RunError, match="cannot write .*2.pt: .*--resume"):
        whole.save({"a": torch.ones(99_999)}, {"step": 2, "finished": False})
    assert sorted(tmp_path.iterdir()) == before
    assert whole.load()[1]["step"] == 1


def test_torchrun_with_a_killed_process_ends_and_says_how_to_go_on(tiny_store, tmp_path):
    settings = options("pretrain.epochs=99", "run.save_minutes=9")
    process = start("pretrain", "--store", tiny_store, *settings, cwd=tmp_path, launcher=TORCHRUN)
    try:
        deadline = time.monotonic() + 120
        while not any(map(log_of, tmp_path.glob("runs/*"))):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        family = psutil.Process(process.pid).children(recursive=True)
        (victim,) = [p for p in family if p.environ().get("RANK") == "1"]
        victim.kill()
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    report = output[output.index("Failures:") :]
    assert "Error: process 0 of 2 lost another one; go on from the last checkpoint" in report
    assert "Signal 9 (SIGKILL)" in report[report.index("Root Cause") :]
    assert process.returncode == 1


def test_torchrun_s_report_ends_in_the_sentence(tiny_store, tmp_path):
    arguments = ("pretrain", "--store", tiny_store, *options("pretrain.batch=3"))
    process = start(*arguments, cwd=tmp_path, launcher=TORCHRUN)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "traceback : Error: pretrain.batch is 3 over all" in output[output.index("Root Ca") :]
    assert output[: output.index("Failures:")].count("Error: pretrain.batch") <= 1


@pytest.mark.parametrize("lift", ["simplebev", pytest.param("bevformer", marks=LONG)])
def test_held_out_numbers_change_nothing(lift, tiny_store, tmp_path):
    """Also where a run is stopped and resumed; the last IoU is that of ``evaluate``."""
    settings, on = options(f"model.lift={lift}", "pretrain.epochs=2"), "run.validate_every=1"
    pretrain = ("pretrain", "--store", tiny_store, *settings)
    run(*pretrain, "--run-dir", "off", cwd=tmp_path)
    output = run(*pretrain, "--run-dir", "on", "--set", on, cwd=tmp_path)
    assert_same_state(tmp_path / "off", tmp_path / "on")
    assert curve(tmp_path / "off") == curve(tmp_path / "on")
    assert not held_out(tmp_path / "off")
    first, last = held_out(tmp_path / "on")
    assert [first["step"], first["epoch"], last["step"], last["epoch"]] == [3, 1, 6, 2]
    loss, occupancy, features = (last[f"held_out_{k}"] for k in ("loss", "occupancy", "features"))
    assert loss == pytest.approx(occupancy + 0.01 * features, rel=1e-6)
    assert f"epoch 2/2, 4 held-out frames: loss {loss:.4g}, occupancy {occupancy:.4g}" in output
    for path in (tmp_path / "on").glob("checkpoint-00000006.*"):
        path.unlink()
    run("pretrain", "--resume", "--run-dir", "on", cwd=tmp_path)
    assert held_out(tmp_path / "on") == [first, last]


@LONG
def test_held_out_numbers_of_two_processes(tiny_store, tmp_path):
    fine = ("finetune", "--store", tiny_store, "--init", "none", *options("finetune.epochs=2"))
    for name, every in (("off", 0), ("on", 2)):
        arguments = ("--run-dir", name, "--set", f"run.validate_every={every}")
        run(*fine, *arguments, cwd=tmp_path, processes=2)
    assert_same_state(tmp_path / "off", tmp_path / "on")
    run("evaluate", "--run-dir", "on", cwd=tmp_path)
    result = json.loads((tmp_path / "on/result.json").read_text())
    assert held_out(tmp_path / "on") == [
        {"step": 6, "epoch": 2, "held_out_ego_IoU": result["headline"]["iou"]}
    ]


def test_held_out_frames_must_be_there_before_any_work(tiny_store, tmp_path):
    settings = options("run.validate_every=1", "data.eval_split=val")
    said = run("pretrain", "--store", tiny_store, *settings, cwd=tmp_path, code=1)
    assert "no usable frames of val" in said and "run.validate_every=0" in said
    assert not (tmp_path / "runs").exists()


def test_a_pretraining_goes_on_for_more_epochs(undisturbed, tiny_store, tmp_path, monkeypatch):
    """Even if it is stopped before it saved anything of them; epochs are counted from 1."""
    path, longer = tmp_path / "runs/a", ("--set", "pretrain.epochs=3")
    short = options("pretrain.epochs=2")
    output = run("pretrain", "--store", tiny_store, "--run-dir", path, *short, cwd=tmp_path)
    assert "epoch 1/2" in output and "occupancy=" in output and "features=" in output
    assert Run(path).is_finished()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", lambda *_: False)
        run("pretrain", "--resume", "--run-dir", path, *longer, cwd=tmp_path, code=130)
    assert not Run(path).is_finished()
    output = run("pretrain", "--resume", cwd=tmp_path)
    assert "resumed after step 6" in output and "epoch 3/3" in output
    assert_same_state(undisturbed, path)
    assert curve(path) == curve(undisturbed)
    fewer = ("--set", "pretrain.epochs=1")
    said = run("pretrain", "--resume", "--run-dir", path, *fewer, cwd=tmp_path, code=1)
    assert "has done 9 steps, more than the 3 asked for" in said
    fine = ("--resume", "--run-dir", path, "--set", "finetune.epochs=4")
    said = run("finetune", *fine, cwd=tmp_path, code=1)
    assert "keeps its finetune.epochs, whose rates rise and fall over them: leave" in said


@pytest.mark.parametrize(("size", "warned"), [([64, 96], 0), ([64, 97], 1), ([65, 64], 1)])
def test_images_that_are_enlarged_are_told_of(size, warned, tiny_store, capsys):
    settings = [text for text in options() if text != "--set"]
    config = TrainConfig.load(None, [*settings, f"model.image_size={size}"])
    Trainer(Job("pretrain", str(tiny_store), config), CPU).begin()
    assert capsys.readouterr().err.count("is more than the [64, 96] of the store's") == warned


@LONG
def test_a_killed_second_trainer_leaves_the_first_alone(undisturbed, tmp_path):
    """A lock goes with its holder, by whatever end."""
    copy = Run(shutil.copytree(undisturbed, tmp_path / "copy"))
    for path in copy.path.glob("checkpoint-*"):
        path.unlink()
    first = start("pretrain", "--resume", "--run-dir", "copy", cwd=tmp_path)
    try:
        while not log_of(copy.path)[:1] or len(log_of(copy.path)) == 9:
            assert first.poll() is None
            time.sleep(0.002)
        first.send_signal(signal.SIGSTOP)
        said = run("pretrain", "--resume", "--run-dir", "copy", cwd=tmp_path, code=1)
        assert f"Error: process {first.pid} on {socket.gethostname()} is training copy" in said
        first.send_signal(signal.SIGKILL)
        first.wait(60)
    finally:
        first.kill()
    run("pretrain", "--resume", "--run-dir", "copy", cwd=tmp_path)
    assert_same_state(undisturbed, copy.path)


def test_a_round_of_torture(tmp_path, capsys):
    """Each fault has a test of its own too."""
    assert torture(rounds=1, seed=0, home=tmp_path) == 0, capsys.readouterr().out


def test_checksums_of_what_is_read_can_be_left_out(tiny_store, tmp_path):
    """Here it is the checksum of frame 0's voxels that is wrong."""
    store = shutil.copytree(tiny_store, tmp_path / "targets.zarr")
    opened = open_store(store)
    key, ranges = opened.sharded["voxel_index"].ranges(0, opened.n_rows(0, "voxel_index"))
    flip(store / key, sum(ranges[0]) - 1)
    settings = ("--store", store, *options("pretrain.epochs=1"))
    said = run("pretrain", *settings, "--run-dir", "checked", cwd=tmp_path, code=1)
    assert "an inner chunk does not match its checksum" in said
    run("pretrain", *settings, "--set", "data.check_reads=false", cwd=tmp_path)
