"""Every command in the README runs as it stands there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]


def test_every_command_is_covered():
    """make by CI and test_cli, dask by test_cluster, occfeat-targets below."""
    for line in COMMANDS:
        assert line.startswith(("make ", "dask ", "occfeat-targets ")), line


def test_occfeat_targets_commands_run_in_order(tmp_path):
    lines = [c for c in COMMANDS if c.startswith("occfeat-targets") and "--scheduler" not in c]
    assert len(lines) == 6
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line in lines:
        run = subprocess.run(
            line,
            shell=True,
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, f"{line}\n{run.stdout}\n{run.stderr}"
    assert (tmp_path / "view.png").exists()


def test_make_commands_are_the_makefile_s(pytestconfig):
    for line in COMMANDS:
        if line.startswith("make "):
            arguments = line.split("#")[0].split()[1:]
            subprocess.run(
                ["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True
            )


def test_python_example_runs(demo_store, tmp_path, monkeypatch):
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    shutil.copytree(demo_store, tmp_path / "targets.zarr")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert names["features"].shape == (len(names["xyz"]), 8)
    assert names["seen"].any()


@pytest.mark.parametrize("link", re.findall(r"\]\(([\w/.]+)\)", (ROOT / "README.md").read_text()))
def test_links_to_files_exist(link):
    assert (ROOT / link).exists()
