"""SIGKILL of the client at several moments: the re-run ends as if nothing had happened."""

import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import FAST, TESTS, tree_bytes


def _command(dataroot, store):
    command = [sys.executable, "-m", "occfeat_targets.cli", "build", str(dataroot), str(store)]
    command += ["--workers", "1"]
    for setting in [*FAST, "block_frames=1", "teacher.name=teachers:Slow"]:
        command += ["--set", setting]
    return command


@pytest.fixture(scope="module")
def uninterrupted(demo_root, tmp_path_factory):
    store = tmp_path_factory.mktemp("uninterrupted") / "targets.zarr"
    subprocess.run(_command(demo_root, store), cwd=TESTS, check=True, capture_output=True)
    return tree_bytes(store)


MOMENTS = {
    "the root group exists": lambda store: (store / "zarr.json").exists(),
    "arrays are being created": lambda store: (store / "images").exists(),
    "a block is being written": lambda store: (store / "features" / "c").exists(),
    "one block is done": lambda store: (store / "build/blocks/00000.json").exists(),
    "three blocks are done": lambda store: (store / "build/blocks/00002.json").exists(),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_and_run_again(demo_root, uninterrupted, tmp_path, moment):
    store = tmp_path / "targets.zarr"
    command = _command(demo_root, store)
    client = subprocess.Popen(command, cwd=TESTS, stderr=subprocess.DEVNULL)
    while not MOMENTS[moment](store):
        assert client.poll() is None, "the build ended before it could be killed"
        time.sleep(0.002)
    family = psutil.Process(client.pid).children(recursive=True)
    client.send_signal(signal.SIGKILL)
    client.wait()
    assert not psutil.wait_procs(family, timeout=20)[1], "workers outlived their client"
    again = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert tree_bytes(store) == uninterrupted


def test_interrupting_says_how_to_go_on(demo_root, uninterrupted, tmp_path):
    store = tmp_path / "targets.zarr"
    command = _command(demo_root, store)
    client = subprocess.Popen(
        command,
        cwd=TESTS,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts its background jobs, and so perhaps these tests, with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not MOMENTS["one block is done"](store):
        assert client.poll() is None, "the build ended before it could be interrupted"
        time.sleep(0.002)
    client.send_signal(signal.SIGINT)
    errors = client.communicate(timeout=60)[1]
    assert client.returncode == 130, errors
    assert "interrupted; run the same command again to continue" in errors
    assert "Traceback" not in errors
    subprocess.run(command, cwd=TESTS, check=True, capture_output=True)
    assert tree_bytes(store) == uninterrupted
