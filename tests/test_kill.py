"""SIGKILL of the client at several moments: the re-run ends as if nothing had happened."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import teachers
from click.testing import CliRunner
from conftest import FAST, TESTS, tree_bytes

from occfeat_targets.cli import main


def _arguments(dataroot, store, workers):
    arguments = ["build", str(dataroot), str(store), "--workers", str(workers)]
    for setting in [*FAST, "block_frames=1", "teacher.name=teachers:Slow"]:
        arguments += ["--set", setting]
    return arguments


def _start(dataroot, store, **more):
    command = [sys.executable, "-m", "occfeat_targets.cli", *_arguments(dataroot, store, 1)]
    return subprocess.Popen(command, cwd=TESTS, stderr=subprocess.PIPE, text=True, **more)


@pytest.fixture
def run_here(demo_root, monkeypatch):
    """The same command in this process; it need not be slow."""
    monkeypatch.setattr(teachers.time, "sleep", lambda seconds: None)

    def run(store):
        result = CliRunner().invoke(main, _arguments(demo_root, store, 0))
        assert result.exit_code == 0, result.output

    return run


@pytest.fixture
def uninterrupted(run_here, tmp_path):
    run_here(tmp_path / "uninterrupted.zarr")
    return tree_bytes(tmp_path / "uninterrupted.zarr")


MOMENTS = {
    "the root group exists": lambda store: (store / "zarr.json").exists(),
    "arrays are being created": lambda store: (store / "images").exists(),
    "a block is being written": lambda store: (store / "features" / "c").exists(),
    "one block is done": lambda store: (store / "build/blocks/00000.json").exists(),
    "three blocks are done": lambda store: (store / "build/blocks/00002.json").exists(),
}


def _wait(client, moment, store):
    while not MOMENTS[moment](store):
        assert client.poll() is None, f"the build ended before {moment}: {client.stderr.read()}"
        time.sleep(0.002)


def _stop(family):
    """SIGSTOP to all, and wait: a thread stops only when its call into the kernel returns."""
    for process in family:
        process.suspend()
    for thread in [t for process in family for t in Path(f"/proc/{process.pid}/task").iterdir()]:
        while _state(thread) not in "TZX":
            time.sleep(0.001)


def _state(thread):
    try:
        return (thread / "stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def test_kill_and_run_again(demo_root, uninterrupted, run_here, tmp_path):
    """At each moment all of the build's processes are stopped dead and what is on the disk is
    copied: what a SIGKILL there and then would leave. At the last one the client is killed."""
    store = tmp_path / "targets.zarr"
    client = _start(demo_root, store)
    left = {}
    for moment in MOMENTS:
        _wait(client, moment, store)
        parent = psutil.Process(client.pid)
        family = parent.children(recursive=True)
        _stop([parent, *family])
        left[moment] = shutil.copytree(store, tmp_path / moment)
        if moment != [*MOMENTS][-1]:
            for process in (*family, parent):
                process.resume()
    client.send_signal(signal.SIGKILL)
    for process in family:
        process.resume()
    client.wait()
    assert not psutil.wait_procs(family, timeout=20)[1], "workers outlived their client"
    for moment, copy in (left | {"the end of the killed one": store}).items():
        assert tree_bytes(copy) != uninterrupted, moment
        run_here(copy)
        assert tree_bytes(copy) == uninterrupted, moment


def test_interrupting_says_how_to_go_on(demo_root, uninterrupted, run_here, tmp_path):
    store = tmp_path / "targets.zarr"
    # A shell starts its background jobs, and so perhaps these tests, with Ctrl-C ignored.
    ignores_nothing = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    ignores_nothing["start_new_session"] = True
    # Its worker is then busy for longer than Dask waits before it kills it.
    ignores_nothing["env"] = os.environ | {"SLOW_SECONDS": "4"}
    client = _start(demo_root, store, **ignores_nothing)
    _wait(client, "one block is done", store)
    os.killpg(client.pid, signal.SIGINT)  # as a terminal does
    errors = client.communicate(timeout=180)[1]
    assert client.returncode == 130, errors
    assert "interrupted; run the same command again to continue" in errors
    assert "Traceback" not in errors and "leaked" not in errors
    run_here(store)
    assert tree_bytes(store) == uninterrupted
