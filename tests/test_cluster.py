"""Dask: the store does not depend on who computes it, and a dead worker is survived."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

import dask.config
import psutil
import pytest
import teachers
from conftest import FAST, LONG, TESTS, tree_bytes

from occfeat_targets import cluster as cluster_module
from occfeat_targets.build import BuildStopped, build, prepare
from occfeat_targets.cluster import ClusterError, choose, executor, tell
from occfeat_targets.config import TargetsConfig
from occfeat_targets.store.reader import open_store

GB = 1_000_000_000


def _square(x):
    if x < 0:
        raise ValueError("negative")
    return x * x


def _build(cluster, dataroot, store, *overrides):
    config = TargetsConfig.load(None, [*FAST, "block_frames=1", *overrides])
    dataset = prepare(dataroot, str(store), None, config, overwrite=False)
    build(str(store), config, dataset, cluster)


@pytest.fixture(scope="module")
def one():
    """A cluster of one worker."""
    with executor(workers=1, threads=1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def two(one):
    """Another of two workers on the same machine, and the warnings while it started."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with executor(workers=2) as cluster:
            yield cluster, list(said)


@pytest.fixture(scope="module")
def reference(demo_root, tmp_path_factory):
    """Store with one frame a block, built in this process."""
    store = tmp_path_factory.mktemp("reference") / "targets.zarr"
    with executor(workers=0) as here:
        _build(here, demo_root, store)
    return tree_bytes(store)


def test_the_number_of_workers_changes_nothing(demo_root, reference, tmp_path, one, two):
    for name, cluster in (("one", one), ("two", two[0])):
        _build(cluster, demo_root, tmp_path / name)
        assert tree_bytes(tmp_path / name) == reference


def test_a_second_cluster_on_a_machine_says_nothing(two):
    second, said = two
    assert dict(second.run(_square, [3])) == {3: 9}
    assert not said


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


def _tell_all(job):
    for i in range(3):
        tell("told", (job, i))


@pytest.mark.parametrize("workers", [0, 1])
def test_tasks_tell_how_far_they_are(workers, one):
    """Which is where the build's bar has its frames from."""
    with executor(workers=0) as here:
        cluster, heard = one if workers else here, []
        with cluster.listening("told", heard.append):
            list(cluster.run(_tell_all, ["a", "b"]))
            deadline = time.monotonic() + 30
            while len(heard) < 6 and time.monotonic() < deadline:
                time.sleep(0.01)
        list(cluster.run(_tell_all, ["c"]))
    assert sorted(heard) == [(job, i) for job in "ab" for i in range(3)]


def test_few_tasks_are_in_flight(one):
    """Jobs are drawn as workers come free: the client never holds 34,149 of them."""
    drawn = []

    def jobs():
        for job in range(50):
            drawn.append(job)
            yield job

    results = one.run(_square, jobs())
    first, _ = next(results)
    assert len(drawn) <= 3
    others = sorted({*range(50)} - {first})
    assert sorted(result for _, result in results) == [x * x for x in others]


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
    worker = [f"{dask[2]}dask_worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"]
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
    deadline = time.time() + 120
    while True:
        try:
            with executor(scheduler=hand_started) as remote:
                if len(remote.everywhere(_square, 2)) == 2:
                    break
        except ClusterError:
            pass
        assert time.time() < deadline, "the workers did not come up"
        time.sleep(0.5)
    with executor(scheduler=hand_started) as remote:
        _build(remote, demo_root, tmp_path / "targets.zarr")
    assert tree_bytes(tmp_path / "targets.zarr") == reference


def test_a_scheduler_that_is_not_there(monkeypatch):
    assert cluster_module._CONNECT_SECONDS == 10
    monkeypatch.setattr(cluster_module, "_CONNECT_SECONDS", 0.5)
    with (
        pytest.raises(ClusterError, match="no Dask scheduler at tcp://127.0.0.1"),
        executor(scheduler=f"tcp://127.0.0.1:{_free_port()}"),
    ):
        pass


def test_a_plug_in_with_parameters_needs_no_care(demo_root, tmp_path):
    with executor(workers=0) as here:
        _build(here, demo_root, tmp_path / "targets.zarr", "teacher.name=teachers:Learned")
    store = open_store(tmp_path / "targets.zarr")
    assert len(store.attrs["teacher"]["weights"]) == 64
    assert store.frame(0)["features"].shape[1] == 4


def test_one_worker_per_gpu_else_one_per_core_that_fits_in_memory():
    assert choose(cores=2, memory=24 * GB, gpus=0) == (2, 1)
    assert choose(cores=64, memory=15 * GB, gpus=0) == (10, 1)
    assert choose(cores=1, memory=GB // 2, gpus=0) == (1, 1)
    assert choose(cores=64, memory=500 * GB, gpus=4) == (4, 8)
    assert choose(cores=16, memory=500 * GB, gpus=8) == (8, 2)


def test_a_worker_that_dies_at_its_start_is_one_sentence():
    preload = {"distributed.worker.preload": ["import os; os.kill(os.getpid(), 9)"]}
    with (
        dask.config.set(preload),
        pytest.raises(ClusterError, match="ended while it started.*fewer --workers"),
        executor(workers=1),
    ):
        pass


# Last, since these kill workers of the shared clusters, which start them again.


def _pid(_):
    return os.getpid()


def test_a_killed_worker_is_survived(demo_root, tmp_path, two, monkeypatch):
    slow, store, killed = "teacher.name=teachers:Slow", tmp_path / "targets.zarr", []
    (victim, *_) = two[0].everywhere(_pid, None)

    def kill():
        while not (store / "build" / "blocks").exists() and len(killed) < 3000:
            killed.append(None)
            time.sleep(0.01)
        os.kill(victim, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    _build(two[0], demo_root, store, slow)
    killer.join()
    assert not psutil.pid_exists(victim) or psutil.Process(victim).status() == "zombie"
    monkeypatch.setattr(teachers.time, "sleep", lambda seconds: None)
    with executor(workers=0) as here:
        _build(here, demo_root, tmp_path / "reference.zarr", slow)
    assert tree_bytes(store) == tree_bytes(tmp_path / "reference.zarr")


def test_a_task_that_always_kills_its_worker_is_named(demo_root, tmp_path, one):
    with pytest.raises(BuildStopped, match=r"block 0 \(scene-.*worker died every time"):
        _build(one, demo_root, tmp_path / "targets.zarr", "teacher.name=teachers:Suicidal")


def test_workers_that_die_while_loading_the_teacher_end_the_build(demo_root, tmp_path, two):
    with pytest.raises(ClusterError, match="worker died"):
        _build(two[0], demo_root, tmp_path / "targets.zarr", "teacher.name=teachers:DiesLoading")


@LONG
def test_a_cluster_whose_workers_are_all_starting_again_is_waited_for(one):
    (victim,) = one.everywhere(_pid, None)
    os.kill(victim, signal.SIGKILL)
    deadline = time.time() + 20
    while one._client.nthreads() and time.time() < deadline:
        time.sleep(0.01)
    (other,) = one.everywhere(_pid, None)
    assert other != victim


def test_a_build_without_workers_ends(monkeypatch):
    """Dask closes a local worker for good that is late to come back; ours never are."""
    monkeypatch.setattr(cluster_module, "_GONE_SECONDS", 1)
    monkeypatch.setattr(cluster_module, "_LOOK_SECONDS", 1)
    with executor(workers=1) as cluster:
        assert dask.config.get("distributed.deploy.lost-worker-timeout") == "1 week"
        with dask.config.set({"distributed.deploy.lost-worker-timeout": "1 ms"}):
            (victim,) = cluster.everywhere(_pid, None)
            os.kill(victim, signal.SIGKILL)
            while cluster._client.nthreads():
                time.sleep(0.01)
            with pytest.raises(ClusterError, match="all workers are gone, for 1 s now"):
                cluster.everywhere(_pid, None)
        with pytest.raises(ClusterError, match="all workers are gone"):
            list(cluster.run(_square, [1, 2]))
