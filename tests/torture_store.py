"""Rounds of a build under faults, on a disk and on S3 (moto on loopback), then of damage to what it
made. Every build must end byte for byte as one that nothing disturbed, without a traceback, and
``verify`` must name every damage. ``python tests/torture_store.py --rounds 100 --seed 1``"""

import argparse
import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import fsspec
import psutil
from conftest import TESTS, s3_environment, tree_bytes

from occfeat_targets import cli
from occfeat_targets.demo_world import make_demo_world
from occfeat_targets.store.files import filesystem
from occfeat_targets.verify import verify_store

SETTINGS = [
    "grid.x=[-50,50,40]",
    "grid.y=[-50,50,40]",
    "grid.z=[-5,5,4]",
    "teacher.input_size=[28,56]",
    "images.size=[64,96]",
    "block_frames=1",
    "teacher.name=teachers:Slow",
]


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__.replace("__main__", "torture_store"), "nuscenes.nuscenes"])
"""A client is forked from a process that has imported what it needs: most of its time otherwise."""


class Client:
    """``occfeat-targets build`` in a process group of its own."""

    def __init__(self, world, url, *more, most_bytes=None):
        settings = [part for setting in SETTINGS for part in ("--set", setting)]
        arguments = ["build", str(world), str(url), *settings, *more]
        said, saying = FORKS.Pipe(False)
        given = {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}
        arguments = (arguments, saying, os.environ | given, most_bytes)
        self._process = FORKS.Process(target=_client, args=arguments)
        self._process.start()
        self.pid, self.kill = self._process.pid, self._process.kill
        saying.close()
        self._said = b""
        self._listener = threading.Thread(target=self._listen, args=(said,), daemon=True)
        self._listener.start()

    def _listen(self, said):
        while new := os.read(said.fileno(), 1 << 16):
            self._said += new
        said.close()

    def end(self):
        """Its exit status, and what it said."""
        self._process.join(300)
        self._listener.join(30)
        if self._process.exitcode is None or self._listener.is_alive():
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError("the build, or a worker of it, does not end")
        return self._process.exitcode, self._said.decode()


def _client(arguments, saying, environment, most_bytes):
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(saying.fileno(), 2)
    saying.close()
    if most_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    sys.argv = ["occfeat-targets", *arguments]
    cli.main()


class Round:
    """One build of one store; each ``FAULTS`` does something to it."""

    def __init__(self, rng, world, url):
        self.rng, self.world, self.url = rng, world, str(url)
        self.workers = rng.choice(["0", "2"])
        self.said = ""

    def start(self, *more, **how):
        return Client(self.world, self.url, "--workers", self.workers, *more, **how)

    def end(self, client):
        """Its exit status."""
        status, said = client.end()
        self.said += said
        return status

    def some_time(self):
        time.sleep(self.rng.uniform(0, 10 if self.workers == "2" else 4))

    def kill_client(self):
        client = self.start()
        self.some_time()
        client.kill()
        self.end(client)

    def kill_group(self):
        client = self.start()
        self.some_time()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(client.pid, signal.SIGKILL)
        self.end(client)

    def kill_worker(self):
        client = self.start()
        self.some_time()
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(client.pid).children(recursive=True)
            if workers := [c for c in children if "spawn_main" in " ".join(c.cmdline())]:
                self.rng.choice(workers).kill()
        self.end(client)

    def stop_for_a_while(self):
        client = self.start()
        self.some_time()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(client.pid, signal.SIGSTOP)
            time.sleep(self.rng.uniform(0, 4))
            os.killpg(client.pid, signal.SIGCONT)
        assert self.end(client) == 0, "a build that was stopped for a while did not go on"

    def disk_full(self):
        """No file may be larger than so much: as if the disk were full, for that file."""
        most = self.rng.choice([100, 1000, 5000, 20_000])
        self.end(self.start(most_bytes=most))

    def second_client(self):
        first = self.start()
        self.some_time()
        second = self.start()
        status = self.end(second), self.end(first)
        told = self.said.count("is building")
        assert status.count(0) + told >= 2, f"two clients ended with {status}, {told} told why"

    def overwrite(self):
        assert self.end(self.start("--set", "images.quality=50")) == 0
        client = self.start("--overwrite")
        self.some_time()
        client.kill()
        self.end(client)


FAULTS = {name: f for name, f in vars(Round).items() if name not in ("start", "end", "some_time")}
FAULTS = {name: f for name, f in FAULTS.items() if not name.startswith("_")}


def build_under(fault, round_, reference):
    """What was lost, as text; empty if nothing."""
    try:
        FAULTS[fault](round_)
        more = ["--overwrite"] if fault == "overwrite" else []
        while round_.end(round_.start(*more)):
            more, round_.tries = [], getattr(round_, "tries", 0) + 1
            assert round_.tries < 4, "the build does not come to its end"
        assert tree_bytes(round_.url) == reference, "its bytes are others"
        assert "Traceback" not in round_.said, "a traceback"
    except AssertionError as error:
        return f"{error}\n{round_.said[-3000:]}"
    return ""


def _flip(rng, tree, key):
    data, at = bytearray(tree[key]), rng.randrange(len(tree[key]))
    data[at] ^= 1 << rng.randrange(8)
    return {key: bytes(data)}


def _exchange(rng, tree, key):
    other = rng.choice([k for k in tree if tree[k] != tree[key]])
    return {key: tree[other], other: tree[key]}


DAMAGE = {
    "flip": _flip,
    "truncate": lambda rng, tree, key: {key: tree[key][: rng.randrange(len(tree[key]))]},
    "exchange": _exchange,
    "lose": lambda rng, tree, key: {key: None},
    "add": lambda rng, tree, key: {f"{key}.{rng.randrange(9)}": b"foreign"},
}


def damage(kind, rng, url):
    """Damage a finished store, verify it, mend it: what was not named, as text."""
    fs, path = filesystem(url)
    tree = tree_bytes(url)
    changed = DAMAGE[kind](rng, tree, rng.choice(sorted(tree)))
    for key, data in changed.items():
        fs.rm_file(f"{path}/{key}") if data is None else fs.pipe_file(f"{path}/{key}", data)
    try:
        said = "\n".join(verify_store(url)[1])
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    for key in changed:
        if key in tree:
            fs.pipe_file(f"{path}/{key}", tree[key])
        else:
            fs.rm_file(f"{path}/{key}")
    named = [
        k for k in changed if k in said or (Path(k).name == "zarr.json" and "StoreError" in said)
    ]
    return "" if named else f"{kind} of {[*changed]}: verify said {said!r}"


def torture(rounds, seed, world, folder):
    """Returns all that went wrong, and how often each was tried."""
    rng, tried, wrong = random.Random(seed), Counter(), []
    calm = Round(random.Random(0), world, folder / "reference.zarr")
    assert calm.end(calm.start()) == 0, calm.said
    reference = tree_bytes(calm.url)
    order = [(fault, where) for fault in FAULTS for where in ("disk", "s3")]
    order = [each for each in order if each != ("disk_full", "s3")]
    for number in range(rounds):
        if number % len(order) == 0:
            rng.shuffle(order)
        fault, where = order[number % len(order)]
        place = folder if where == "disk" else "s3://bucket"
        round_ = Round(rng, world, f"{place}/round-{number}.zarr")
        found = [build_under(fault, round_, reference)]
        kinds = [] if found[0] else [rng.choice([*DAMAGE]) for _ in range(5)]
        found += [damage(kind, rng, round_.url) for kind in kinds]
        tried.update([f"{fault} ({where})", *kinds])
        wrong += [f"round {number}, {fault} ({where}): {text}" for text in found if text]
        if not found[0]:
            fs, path = filesystem(round_.url)
            fs.rm(path, recursive=True)
        print(
            f"{number + 1}/{rounds} {fault} ({where}): {'WRONG' if any(found) else 'ok'}",
            flush=True,
        )
    return wrong, tried


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    make_demo_world(folder / "world", scenes=2, samples=2, seed=0)
    with s3_environment() as environment:
        os.environ.update(environment)
        fsspec.filesystem("s3").mkdir("bucket")
        wrong, tried = torture(asked.rounds, asked.seed, folder / "world", folder)
    for what, count in sorted(tried.items()):
        print(f"{count:6} {what}")
    print("\n".join(wrong) or "nothing lost, every damage named")
    if wrong:
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
