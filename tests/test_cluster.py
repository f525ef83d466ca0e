"""Dask: the store does not depend on who computes it, and a dead worker is survived."""

import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from conftest import FAST, TESTS, tree_bytes

from occfeat_targets.build import BuildStopped, build, prepare
from occfeat_targets.cluster import ClusterError, choose, executor
from occfeat_targets.config import TargetsConfig
from occfeat_targets.store.schema import open_store

GB = 1_000_000_000


def _square(x):
    if x < 0:
        raise ValueError("negative")
    return x * x


def _build(dataroot, store, *overrides, **where):
    config = TargetsConfig.load(None, [*FAST, "block_frames=1", *overrides])
    source = prepare(dataroot, str(store), None, config, overwrite=False)
    with executor(**where) as chosen:
        build(str(store), config, source, chosen)


@pytest.fixture(scope="module")
def reference(demo_root, tmp_path_factory):
    """Store with one frame a block, built in this process."""
    store = tmp_path_factory.mktemp("reference") / "targets.zarr"
    _build(demo_root, store, workers=0)
    return tree_bytes(store)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(demo_root, reference, tmp_path, workers):
    _build(demo_root, tmp_path / "targets.zarr", workers=workers)
    assert tree_bytes(tmp_path / "targets.zarr") == reference


def test_a_second_cluster_on_a_machine_says_nothing(recwarn):
    with executor(workers=1), executor(workers=1) as second:
        assert dict(second.run(_square, [3])) == {3: 9}
    assert not recwarn.list


def test_errors_come_back_as_results_and_jobs_may_end_early():
    drawn = []

    def jobs():
        for job in [3, -1, *range(100)]:
            drawn.append(job)
            yield job

    with executor(workers=0) as here:
        results = here.run(_square, jobs())
        assert next(results) == (3, 9)
        job, error = next(results)
        assert job == -1 and isinstance(error, ValueError)
    assert drawn == [3, -1]


def test_few_tasks_are_in_flight():
    """Jobs are drawn as workers come free: the client never holds 34,149 of them."""
    drawn = []

    def jobs():
        for job in range(50):
            drawn.append(job)
            yield job

    with executor(workers=1, threads=1) as cluster:
        results = cluster.run(_square, jobs())
        next(results)
        assert len(drawn) <= 3
        assert sorted(result for _, result in results) == [x * x for x in range(1, 50)]


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def hand_started():
    """A Dask scheduler and two workers started by hand on loopback; yields the address."""
    address = f"tcp://127.0.0.1:{_free_port()}"
    dask = [sys.executable, "-m", "distributed.cli."]
    scheduler = [f"{dask[2]}dask_scheduler", "--host", address, "--no-dashboard"]
    worker = [f"{dask[2]}dask_worker", address, "--nthreads", "1", "--no-dashboard"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": TESTS}
    commands = [scheduler, worker, worker]
    processes = [subprocess.Popen([*dask[:2], *command], **quiet) for command in commands]
    yield address
    for process in processes:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()


def test_a_running_scheduler_is_used(demo_root, reference, tmp_path, hand_started):
    deadline = time.time() + 60
    while True:
        try:
            with executor(scheduler=hand_started) as remote:
                if len(remote.everywhere(_square, 2)) == 2:
                    break
        except ClusterError:
            pass
        assert time.time() < deadline, "the workers did not come up"
        time.sleep(0.5)
    _build(demo_root, tmp_path / "targets.zarr", scheduler=hand_started)
    assert tree_bytes(tmp_path / "targets.zarr") == reference


def test_a_scheduler_that_is_not_there():
    with (
        pytest.raises(ClusterError, match="no Dask scheduler at tcp://127.0.0.1"),
        executor(scheduler=f"tcp://127.0.0.1:{_free_port()}"),
    ):
        pass


def test_a_killed_worker_is_survived(demo_root, reference, tmp_path):
    store = tmp_path / "targets.zarr"
    # The slow teacher has the name and weights of the fast one, so the arrays must be equal.
    command = [sys.executable, "-m", "occfeat_targets.cli", "build", str(demo_root), str(store)]
    command += ["--workers", "2"]
    for setting in [*FAST, "block_frames=1", "teacher.name=teachers:Slow"]:
        command += ["--set", setting]
    client = subprocess.Popen(command, cwd=TESTS, stderr=subprocess.PIPE, text=True)
    killed = 0
    while client.poll() is None and not killed:
        if (store / "features" / "zarr.json").exists():
            workers = [
                child
                for child in psutil.Process(client.pid).children(recursive=True)
                if "spawn_main" in " ".join(child.cmdline())
            ]
            if workers:
                time.sleep(0.2)
                workers[0].send_signal(signal.SIGKILL)
                killed += 1
        time.sleep(0.02)
    errors = client.communicate(timeout=120)[1]
    assert killed == 1
    assert client.returncode == 0, errors
    ours = tree_bytes(store)
    differs = {name for name in reference if ours[name] != reference[name]}
    assert ours.keys() == reference.keys()
    assert differs == {"zarr.json"}  # the config names the slow teacher


def test_a_task_that_always_kills_its_worker_is_named(demo_root, tmp_path):
    config = TargetsConfig.load(None, [*FAST, "teacher.name=teachers:Suicidal"])
    store = str(tmp_path / "targets.zarr")
    source = prepare(demo_root, store, None, config, overwrite=False)
    with (
        executor(workers=1) as cluster,
        pytest.raises(BuildStopped, match=r"block 0 \(scene-.*worker died every time"),
    ):
        build(store, config, source, cluster)


def test_workers_that_die_while_loading_the_teacher_end_the_build(demo_root, tmp_path):
    config = TargetsConfig.load(None, [*FAST, "teacher.name=teachers:DiesLoading"])
    store = str(tmp_path / "targets.zarr")
    source = prepare(demo_root, store, None, config, overwrite=False)
    with executor(workers=2) as cluster, pytest.raises(ClusterError, match="worker died"):
        build(store, config, source, cluster)


def test_a_plug_in_with_parameters_needs_no_care(demo_root, tmp_path):
    _build(demo_root, tmp_path / "targets.zarr", "teacher.name=teachers:Learned", workers=0)
    store = open_store(tmp_path / "targets.zarr")
    assert len(store.attrs["teacher"]["weights"]) == 64
    assert store.frame(0)["features"].shape[1] == 4


def test_one_worker_per_gpu_else_one_per_core_that_fits_in_memory():
    assert choose(cores=2, memory=24 * GB, gpus=0) == (2, 1)
    assert choose(cores=64, memory=15 * GB, gpus=0) == (10, 1)
    assert choose(cores=1, memory=GB // 2, gpus=0) == (1, 1)
    assert choose(cores=64, memory=500 * GB, gpus=4) == (4, 8)
    assert choose(cores=16, memory=500 * GB, gpus=8) == (8, 2)
