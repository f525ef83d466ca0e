"""``occfeat-train view --scene``: all frames of a scene in turn, at their own pace."""

import os

import pytest
import torch
from PIL import Image
from tiny_store import change_attributes, make_tiny_store
from train_runs import options, run

from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run
from occfeat_train.view import Viewer

FFMPEG = """#!/bin/sh
# What it would be given: its last argument, and how much.
for last; do :; done
echo "$@" > {folder}/asked
wc -c > "$last"
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A store of which the labels are taken away after the training."""
    cwd = tmp_path_factory.mktemp("movie")
    make_tiny_store(cwd / "targets.zarr")
    asked = ("--store", "targets.zarr", "--config", "paper", "--init", "none")
    run("finetune", "--run-dir", "run", *asked, *options("finetune.epochs=1"), cwd=cwd)
    change_attributes(cwd / "targets.zarr", vehicle_classes=[])
    return cwd


def test_a_scene_is_a_moving_picture(workplace, monkeypatch):
    said = run("view", "--run-dir", "run", "--scene", "scene-0003", cwd=workplace)
    assert "scene-0003.webp: 4 frames of scene-0003 as run (vehicle finetuning) sees them" in said
    movie = Image.open(workplace / "scene-0003.webp")
    assert movie.n_frames == 4
    pictures = []
    for n in range(4):
        movie.seek(n)
        pictures.append(movie.convert("RGB").tobytes())
        assert movie.info["duration"] == 500  # ms, as the frames of the store
    assert len({*pictures}) == 4


def test_without_labels_there_is_no_target(workplace):
    job = Job.of_run(Run(workplace / "run"))
    (panel,) = Viewer(job, Run(workplace / "run"), torch.device("cpu")).look(3).panels
    assert panel.target is None and panel.predicted.max() > 0


def test_mp4_goes_through_ffmpeg(workplace, tmp_path, monkeypatch):
    arguments = ("view", "--run-dir", "run", "--scene", "scene-0000", "--out", tmp_path / "a.mp4")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs ffmpeg, which is not installed" in run(*arguments, cwd=workplace, code=1)
    (tmp_path / "ffmpeg").write_text(FFMPEG.format(folder=tmp_path))
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.defpath}")
    run(*arguments, cwd=workplace)
    asked = (tmp_path / "asked").read_text()
    assert "-s 1323x540 -r 1000/500" in asked
    assert int((tmp_path / "a.mp4").read_text()) == 4 * 3 * 1323 * 540
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\ncat > /dev/null; exit 1\n")
    assert "ffmpeg could not write" in run(*arguments, cwd=workplace, code=1)


def test_what_can_t_be_written_is_said(workplace):
    asked = ("view", "--run-dir", "run", "--scene")
    said = run(*asked, "scene-0009", cwd=workplace, code=1)
    assert "no frame of scene scene-0009: did you mean scene-000" in said
    said = run(*asked, "scene-0000", "--out", "a.gif", cwd=workplace, code=1)
    assert "cannot write a.gif: a scene is written as .webp or .mp4" in said
