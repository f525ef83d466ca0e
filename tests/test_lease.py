"""One writer of a store on an object store (S3, by moto on loopback), whatever becomes of it."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import fsspec
import pytest
from conftest import LONG, TESTS, build_store, tree_bytes
from torture_store import torture

from occfeat_targets import verify
from occfeat_targets.info import as_text, summarise
from occfeat_targets.store import lease
from occfeat_targets.store.files import LEASE, StoreError, find, open_group, this_process
from occfeat_targets.store.lease import one_writer, writer_of
from occfeat_targets.store.reader import open_store
from occfeat_train.data.dataset import FrameReader

HOLD = """if True:
    import sys, time
    from occfeat_targets.store.lease import one_writer
    with one_writer(sys.argv[1]) as require:
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
        require()
"""


@pytest.fixture
def hold():
    """``hold(url, seconds)``: a process that has the lease of a store, and keeps it so long."""
    started = []

    def start(url, seconds):
        command = [sys.executable, "-c", HOLD, url, str(seconds)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, **pipes))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def _write_lease(url, **changes):
    fs, path = fsspec.url_to_fs(url)
    fs.pipe_file(f"{path}/{LEASE}", json.dumps(this_process() | changes).encode())


def test_a_store_that_begins_while_it_is_looked_for_is_none_yet(bucket, monkeypatch):
    """s3fs lists, finds nothing, and asks again whether there is a folder: by now there is."""
    url, listing = f"{bucket}/t.zarr", type(fsspec.filesystem("s3"))._lsdir

    async def slow(self, path, *args, **options):
        found = await listing(self, path, *args, **options)
        if not found:
            await self._pipe_file(f"{path}/{LEASE}", b"{}")
        return found

    monkeypatch.setattr(type(fsspec.filesystem("s3")), "_lsdir", slow)
    assert find(url) == {}
    assert fsspec.filesystem("s3").exists(f"{url}/{LEASE}")


def test_the_second_is_told_who_the_first_is_and_takes_over_after_a_kill(bucket, hold):
    url = f"{bucket}/t.zarr"
    first = hold(url, 600)
    who = f"process {first.pid} on {socket.gethostname()}"
    assert writer_of(url) == who
    with (
        pytest.raises(StoreError, match=f"{who} is building {url} now: wait for it"),
        one_writer(url),
    ):
        pass
    first.kill()
    first.wait()
    assert writer_of(url) is None
    began = time.monotonic()
    with one_writer(url) as require:
        require()
        assert time.monotonic() - began < 1
    assert fsspec.filesystem("s3").find("bucket") == []


def test_another_machine_s_lease_is_watched_before_it_is_taken_over(bucket, monkeypatch, capsys):
    url = f"{bucket}/t.zarr"
    monkeypatch.setattr(lease, "_DEAD_S", 8)
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: slept.append(seconds))
    slept = []
    _write_lease(url, host="far-away", system="another", pid=7, id="theirs")
    with one_writer(url) as require:
        require()
    assert slept == [1] * 8
    assert "waiting 8 s for a sign of process 7 on far-away" in capsys.readouterr().err


def test_who_lost_the_store_while_it_was_stopped_says_so(bucket, hold):
    """Its lease is another's by then: it must not write, nor take that one away."""
    url = f"{bucket}/t.zarr"
    first = hold(url, 4)
    first.send_signal(signal.SIGSTOP)
    _write_lease(url, pid=7, host="far-away", id="theirs")
    first.send_signal(signal.SIGCONT)
    errors = first.communicate(timeout=60)[1]
    assert f"StoreError: process 7 on far-away took over {url}" in errors.splitlines()[-1]
    assert json.loads(fsspec.filesystem("s3").cat_file(f"bucket/t.zarr/{LEASE}"))["id"] == "theirs"


def test_only_one_of_many_gets_it(bucket):
    holding, most = [], []

    def work():
        try:
            with one_writer(f"{bucket}/t.zarr"):
                holding.append(1)
                most.append(len(holding))
                time.sleep(3)
                holding.pop()
        except StoreError:
            most.append(0)

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(most) == [0, 0, 0, 0, 1]


def test_a_lease_that_nobody_can_read_is_taken_over(monkeypatch):
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: None)
    fs = fsspec.filesystem("memory")
    fs.pipe_file(f"/t.zarr/{LEASE}", b"\xff")
    with one_writer("memory://t.zarr"):
        assert b"pid" in fs.cat_file(f"/t.zarr/{LEASE}")
    assert not fs.exists(f"/t.zarr/{LEASE}")


def test_a_build_on_s3_ends_as_a_local_one_also_after_overwriting(bucket, demo_root, demo_store):
    """Overwriting and finishing delete much, but not the lease: the build would end."""
    url = f"{bucket}/targets.zarr"
    build_store(demo_root, url, "images.quality=50")
    assert find(url)["images/c/0/0"] != find(str(demo_store))["images/c/0/0"]
    build_store(demo_root, url, overwrite=True)
    assert tree_bytes(url) == tree_bytes(demo_store)


def test_nothing_is_written_where_something_else_is(bucket, demo_root):
    fs = fsspec.filesystem("s3")
    fs.pipe_file("bucket/thesis/chapter1.tex", b"precious")
    with pytest.raises(StoreError, match="not an occfeat-targets store"):
        build_store(demo_root, f"{bucket}/thesis", overwrite=True)
    assert fs.find("bucket") == ["bucket/thesis/chapter1.tex"]


@pytest.mark.parametrize("where", ["local", "s3"])
def test_who_reads_a_store_that_is_being_built_is_told_so(
    where, request, tmp_path, demo_store, hold
):
    store = shutil.copytree(demo_store, tmp_path / "t.zarr")
    open_group(store, "r+").attrs["complete"] = False
    url = str(store) if where == "local" else f"{request.getfixturevalue('bucket')}/t.zarr"
    if where == "s3":
        fsspec.filesystem("s3").put(f"{store}/", "bucket/t.zarr/", recursive=True)
    first = hold(url, 600)
    who = f"process {first.pid} on {socket.gethostname()}"
    with pytest.raises(StoreError, match=f"^{who} is building {url} now: wait until"):
        open_store(url)
    assert f"{who} is building it now" in as_text(summarise(url))
    first.kill()
    first.wait()
    with pytest.raises(StoreError, match="is not finished: run its occfeat-targets build again"):
        open_store(url)
    assert "unfinished: run its build again" in as_text(summarise(url))


def test_a_store_that_is_overwritten_while_it_is_read(demo_root, demo_store, tmp_path, monkeypatch):
    store = shutil.copytree(demo_store, tmp_path / "t.zarr")
    reader, frames = open_store(store), FrameReader(str(store))
    assert reader.frame(0) and frames.read(0, ["images"])
    check = verify.check_objects

    def overwritten(url, quick):
        build_store(demo_root, store, "images.quality=50", "frames.limit=1", overwrite=True)
        return check(url, quick)

    monkeypatch.setattr(verify, "check_objects", overwritten)
    sentence = "t.zarr was replaced or deleted meanwhile: start again with it$"
    for read in (verify.verify_store, lambda _: reader.frame(3), lambda _: frames.read(3, ["map"])):
        with pytest.raises(StoreError, match=sentence):
            read(str(store))


@pytest.mark.parametrize("lacking", ["endpoint", "credentials"])
def test_a_bucket_out_of_reach_is_one_sentence(monkeypatch, tmp_path, demo_root, lacking):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
        if lacking == "endpoint":
            monkeypatch.setenv(name, "anything")
    said = {"endpoint": "Could not connect to the endpoint", "credentials": "Unable to locate cred"}
    fsspec.filesystem("s3").clear_instance_cache()
    for use in (open_store, lambda url: build_store(demo_root, url)):  # seconds each
        with pytest.raises(StoreError, match=f"^s3://b/t.zarr is out of reach: {said[lacking]}"):
            use("s3://b/t.zarr")
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_short_torture(bucket, demo_root, tmp_path):
    wrong, tried = torture(1, 0, demo_root, tmp_path)
    assert wrong == []
    assert tried.total() == 6


@LONG
def test_many_damages_and_pairs():
    command = [sys.executable, "torture_pairs.py", "--damages", "60", "--pairs", "2"]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "flip: 60 tried, 0 not named" in done.stdout and "; 0 wrong" in done.stdout
