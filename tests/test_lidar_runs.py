"""Lidar networks through ``occfeat-train``, as every other: pretrained by each objective, killed,
resumed, shared by two processes, finetuned, probed, evaluated, exported."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LONG
from PIL import Image
from train_runs import (
    FORKED,
    SCHEDULE,
    assert_same_state,
    curve,
    final_state,
    run,
    start,
    stop_at_step,
)

from occfeat_train.export import export, export_encoder, load_network
from occfeat_train.network import build_network, frames_for
from occfeat_train.onnx_file import write_onnx
from occfeat_train.predict import open_network
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run, RunError
from occfeat_train.sensors.lidar import Lidar, network_inputs

SETTINGS = [
    "lidar.size=3-8",
    "lidar.reach_m=[16,16,8]",
    "lidar.cell_m=2",
    "lidar.neighbours=4",
    "lidar.max_rows=150",
    "objectives.also.queries=60",
    *SCHEDULE,
    "finetune.lr=0.01",
]
ROOT = Path(__file__).parent.parent
OBJECTIVES = ("scalr", "slidr", "also")


def options(*settings):
    return [text for setting in (*SETTINGS, *settings) for text in ("--set", setting)]


def pretrain(store, cwd, objective, name, *settings, **how):
    arguments = ("--objective", objective, "--run-dir", name, *options(*settings))
    return run("pretrain", "--store", store, *arguments, cwd=cwd, **how)


@pytest.fixture(scope="module", params=OBJECTIVES)
def pretrained(request, tiny_lidar_store, tmp_path_factory):
    """``(objective, directory)`` with an undisturbed pretraining ``runs/pre``."""
    cwd = tmp_path_factory.mktemp(request.param)
    pretrain(tiny_lidar_store, cwd, request.param, "runs/pre")
    return request.param, cwd


def test_killed_and_resumed_it_ends_as_if_it_had_not_been(pretrained, tiny_lidar_store):
    objective, cwd = pretrained
    arguments = ("pretrain", "--store", tiny_lidar_store, "--objective", objective)
    process = start(*arguments, "--run-dir", "runs/killed", *options(), cwd=cwd)
    stop_at_step(process, cwd / "runs/killed", 4, signal.SIGKILL, group=True)
    assert Run(cwd / "runs/killed").checkpoints()
    run("pretrain", "--resume", "--run-dir", "runs/killed", cwd=cwd)
    assert_same_state(cwd / "runs/pre", cwd / "runs/killed")
    steps = {line["step"]: line for line in curve(cwd / "runs/killed")}
    assert [*steps.values()] == curve(cwd / "runs/pre")


def test_reading_processes_change_nothing(pretrained, tiny_lidar_store):
    objective, cwd = pretrained
    pretrain(tiny_lidar_store, cwd, objective, "runs/read", "data.workers=2")
    assert_same_state(cwd / "runs/pre", cwd / "runs/read")


def test_it_is_finetuned_probed_evaluated_and_exported(pretrained, tiny_lidar_store):
    _, cwd = pretrained
    fine = ("finetune", "--task", "lidarseg", "--init", "runs/pre")
    output = run(*fine, "--run-dir", "runs/fine", cwd=cwd)
    assert "loaded from" in output and "embedding 21, layers 42" in output
    run(*fine, "--run-dir", "runs/probe", "--set", "finetune.freeze_backbone=true", cwd=cwd)
    before, fined, probed = (final_state(cwd / f"runs/{n}") for n in ("pre", "fine", "probe"))
    backbone = [name for name in before if name.startswith(".network.lidar_net.")]
    assert len(backbone) == 63
    assert all(torch.equal(before[name], probed[name]) for name in backbone)
    changed = [name for name in backbone if not torch.equal(before[name], fined[name])]
    assert len(changed) > 50
    for name in ("fine", "probe"):
        output = run("evaluate", "--run-dir", f"runs/{name}", cwd=cwd)
        assert "stored, mean" in output and "all-returns, mean" in output
        assert "probability" not in output
        result = json.loads((cwd / f"runs/{name}/result.json").read_text())
        assert result["headline"]["protocol"] == "stored"
        assert result["headline"]["name"] == "stored, mean of 3 of 16 classes"
        assert 0 < result["headline"]["iou"] <= 100
    run("export", "--run-dir", "runs/fine", "--out", "net", "--hub-card", cwd=cwd)
    card = (cwd / "net/README.md").read_text()
    assert "lidarseg network: features of lidar points" in card and "WaffleIron 3-8" in card
    _same_predictions(cwd)


def test_what_it_learned_is_drawn_in_images_and_from_above(pretrained):
    objective, cwd = pretrained
    run("finetune", "--task", "lidarseg", "--init", "runs/pre", "--run-dir", "runs/seen", cwd=cwd)
    run("view", "--run-dir", "runs/seen", "--out", "seen.png", cwd=cwd)
    with Image.open(cwd / "seen.png") as picture:
        assert min(picture.size) > 400
    view = ("view", "--run-dir", "runs/pre", "--out", "pre.png")
    if objective == "scalr":
        run(*view, cwd=cwd)
        assert (cwd / "pre.png").stat().st_size > 10_000
    else:
        assert "of which there is no picture" in run(*view, cwd=cwd, code=1)
    run("report", "runs/pre", "runs/seen", "--out", "report.html", cwd=cwd)
    assert "lidarseg" in (cwd / "report.html").read_text()


def test_what_is_for_cameras_says_so(pretrained):
    _, cwd = pretrained
    trained = Run(cwd / "runs/pre")
    for ask in (
        lambda: open_network(trained.path),
        lambda: export_encoder(trained, cwd / "e.safetensors"),
        lambda: write_onnx(export(trained, cwd / "e"), [], cwd / "e"),
    ):
        with pytest.raises(RunError, match="does not look through cameras"):
            ask()


def _same_predictions(cwd):
    """The exported network says what the run's does."""
    trained = Run(cwd / "runs/fine")
    job = Job.of_run(trained)
    exported = load_network(cwd / "net")
    from occfeat_targets.store.reader import open_store

    network, _ = build_network(job, open_store(job.store), load_weights=False)
    network.load_state_dict(trained.load()[0]["network"])
    data = frames_for(job, network, range(12, 14), network.objective.eval_arrays)
    inputs = network_inputs(data.collate([data[0], data[1]]))
    with torch.no_grad():
        wanted = network.eval().objective.predict(network.backbone(**inputs))
        assert torch.equal(exported(*inputs.values()), wanted)
    assert len(np.unique(wanted)) > 1


def test_without_pretraining_it_starts_at_random(tiny_lidar_store, tmp_path):
    fine = ("finetune", "--task", "lidarseg", "--init", "none", "--store", tiny_lidar_store)
    output = run(*fine, "--run-dir", "runs/fine", *options(), cwd=tmp_path)
    assert "lidar_net: random weights" in output


@LONG
@pytest.mark.parametrize("objective", ["scalr", "lidarseg"])
def test_two_processes_equal_one(objective, tiny_lidar_store, tmp_path, monkeypatch):
    """Losses and gradients, where batch norms, which see the processes' clouds apart, keep their
    statistics: of a frozen backbone, or here, of none. Lovász is left out: it is no mean."""
    monkeypatch.setattr(Lidar, "freeze_batch_norm", True)
    (tmp_path / "calm.py").write_text(CALM)
    calm = ("pretrain.lr=1e-6", "pretrain.batch=2", "pretrain.epochs=1", "finetune.lr=1e-6")
    command = ["pretrain", "--objective", objective]
    if objective == "lidarseg":
        command = ["finetune", "--task", "lidarseg", "--init", "none"]
        calm += ("finetune.batch=2", "finetune.epochs=1")
    arguments = (*command, "--store", tiny_lidar_store, *options(*calm), "--run-dir")
    run(*arguments, "one", cwd=tmp_path)
    _run_two_calmly((*arguments, "two"), tmp_path)
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert a.get("entropy", a["loss"]) == pytest.approx(b.get("entropy", b["loss"]), rel=1e-4)
        if objective != "lidarseg":
            assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)


CALM = '''
"""occfeat-train with batch norms that keep their statistics."""
from occfeat_train.sensors.lidar import Lidar

Lidar.freeze_batch_norm = True
if __name__ == "__main__":
    from occfeat_train.cli import main

    main()
'''


def _run_two_calmly(arguments, cwd):
    result = subprocess.run(
        [sys.executable, *FORKED, "calm", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{cwd}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_counts_of_two_processes_are_those_of_one(tiny_lidar_store, tmp_path):
    """The metric adds whole numbers, so it is equal to the last digit."""
    fine = ("finetune", "--task", "lidarseg", "--init", "none", "--store", tiny_lidar_store)
    run(*fine, "--run-dir", "runs/fine", *options(), cwd=tmp_path)
    results = []
    for processes in (1, 2):
        run("evaluate", "--run-dir", "runs/fine", cwd=tmp_path, processes=processes)
        results.append(json.loads((tmp_path / "runs/fine/result.json").read_text()))
    assert results[0] == results[1]


def test_a_pretraining_whose_rate_falls_is_as_long_as_it_is(tiny_lidar_store, tmp_path):
    falls = "pretrain.optimiser.schedule=cosine"
    pretrain(tiny_lidar_store, tmp_path, "scalr", "runs/a", falls, "pretrain.epochs=1")
    longer = ("pretrain", "--resume", "--run-dir", "runs/a", "--set", "pretrain.epochs=2")
    said = run(*longer, cwd=tmp_path, code=1)
    assert "keeps its pretrain.epochs, over which its rate follows a cosine" in said


def test_a_camera_pretraining_is_no_start_for_lidar(tiny_lidar_store, tmp_path):
    from train_runs import options as of_cameras

    store = ("--store", tiny_lidar_store)
    run("pretrain", *store, *of_cameras("pretrain.epochs=1"), "--run-dir", "a", cwd=tmp_path)
    fine = ("finetune", "--task", "lidarseg", "--init", "a", *options())
    said = run(*fine, cwd=tmp_path, code=1)
    assert "a has no lidar_net, with which a lidarseg finetuning begins" in said


def test_lidar_code_and_camera_code_do_not_load_each_other():
    cameras = {"augment", "models.bev_net", "models.encoders", "models.decoder", "sensors.camera"}
    cameras |= {"models.lifts.base", "tasks.vehicle", "objectives.occfeat", "objectives.img_also"}
    lidar = {"data.cloud", "models.waffle_iron", "sensors.lidar", "objectives.pairs"}
    of_lidar = "objectives.scalr objectives.slidr objectives.also tasks.lidarseg data.cloud"
    of_cameras = "objectives.occfeat objectives.img_also tasks.vehicle tasks.map sensors.camera"
    for modules, others in (
        (f"{of_lidar} models.waffle_iron", cameras),
        (f"{of_cameras} models.bev_net", lidar),
    ):
        code = "import sys, importlib\n"
        code += (
            f"for name in {modules.split()}: importlib.import_module(f'occfeat_train.{{name}}')\n"
        )
        code += "print(*(m for m in sys.modules if m.startswith('occfeat_train')))"
        loaded = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        names = {name.removeprefix("occfeat_train.") for name in loaded.stdout.split()}
        assert {*modules.split()} <= names and not names & others
