"""Every command in the README runs as it stands there."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
from tiny_store import make_tiny_store

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]


def test_every_command_is_covered():
    """make by CI and test_cli, dask by test_cluster, reproduce.py by test_reproduce too."""
    known = ("make ", "dask ", "occfeat-targets ", "occfeat-train ", "torchrun ", "python pipel")
    for line in COMMANDS:
        assert line.startswith(known), line


def _run_lines(lines, cwd):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line in lines:
        if "--resume" in line:
            _make_unfinished(cwd)
        run = subprocess.run(
            line,
            shell=True,
            cwd=cwd,
            env=os.environ | {"PATH": path},  # torchrun itself gives each process one thread
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, f"{line}\n{run.stdout}\n{run.stderr}"
        yield run.stdout


def _make_unfinished(cwd):
    """Take the newest pretraining back to the checkpoint before its last."""
    newest = max((cwd / "runs").glob("pretrain-*"))
    last = max(newest.glob("checkpoint-*.pt"))
    last.with_suffix(".json").unlink()
    last.unlink()


def test_occfeat_targets_commands_run_in_order(demo_root, demo_store, tmp_path):
    # What `make targets` makes, but smaller.
    (tmp_path / "demo-world").symlink_to(demo_root)
    shutil.copytree(demo_store, tmp_path / "targets.zarr")
    lines = [c for c in COMMANDS if c.startswith("occfeat-targets") and "--scheduler" not in c]
    assert len(list(_run_lines(lines, tmp_path))) == 7
    assert (tmp_path / "view.png").exists()
    assert (tmp_path / "corrupted" / "fog-easy.zarr").exists()


def test_training_commands_run_in_order_on_a_tiny_store(tmp_path):
    splits = {"mini_train": 1, "mini_val": 1}
    make_tiny_store(tmp_path / "targets.zarr", splits=splits)
    fog = tmp_path / "corrupted" / "fog-easy.zarr"
    make_tiny_store(fog, settings=["images.corruption=fog-easy"], splits=splits, dim=0)
    lines = [c for c in COMMANDS if c.startswith(("occfeat-train ", "torchrun "))]
    printed = list(_run_lines(lines, tmp_path))
    assert len(printed) == 10
    assert "mRR over 0 of 8 corruptions" in printed[-1]
    assert "vehicle IoU in per cent" in printed[2]
    assert (tmp_path / "prediction.png").exists()
    codes = [text for kind, text in BLOCKS if kind == "python"]
    (code,) = [text for text in codes if "bev_net" in text]
    (preparing,) = [text for text in codes if "jpeg" in text]
    names: dict = {}
    with chdir(tmp_path):
        exec(preparing, names)
        exec(code, names)
    assert names["images"].shape[:3] == (1, 6, 3) and 0.3 < names["images"].max() <= 1
    assert names["bev"].shape == (1, 32, 16, 16)


def test_the_reproduction_command_is_understood(tmp_path):
    """Run by ``test_reproduce`` at toy size; here as it stands, but for the training."""
    make_tiny_store(tmp_path / "targets.zarr", preset="paper")
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    (line,) = [c for c in COMMANDS if c.startswith("python ")]
    (printed,) = _run_lines([line + " --report-only"], tmp_path)
    assert printed.count("SimpleBEV") == 8


def test_make_commands_are_the_makefile_s(pytestconfig):
    for line in COMMANDS:
        if line.startswith("make "):
            arguments = line.split("#")[0].split()[1:]
            subprocess.run(
                ["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True
            )


def test_the_example_of_reading_a_store_runs(demo_store, tmp_path, monkeypatch):
    (code,) = [text for kind, text in BLOCKS if kind == "python" and "dequantise" in text]
    shutil.copytree(demo_store, tmp_path / "targets.zarr")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert names["features"].shape == (len(names["xyz"]), 8)
    assert names["seen"].any()


@pytest.mark.parametrize("link", re.findall(r"\]\(([\w/.]+)\)", (ROOT / "README.md").read_text()))
def test_links_to_files_exist(link):
    assert (ROOT / link).exists()
