"""Shared fixtures: a small demo world, stores of it and of another dataset, the real keyframe."""

import contextlib
import importlib.util
import logging
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import fsspec
import pytest
import two_camera_drive
from filelock import FileLock
from tiny_store import make_tiny_store

from occfeat_targets.build import build, prepare
from occfeat_targets.cluster import InProcess
from occfeat_targets.config import TargetsConfig
from occfeat_targets.demo_world import make_demo_world
from occfeat_targets.frame import frame_targets, layout_of, make_outputs
from occfeat_targets.store import files
from occfeat_targets.store.checksums import write_checksums
from occfeat_targets.store.files import open_group
from occfeat_targets.store.reader import SEAL, seal

TESTS = Path(__file__).parent
OFFLINE = (
    "against_reference build cli cluster corruptions demo_world docs geometry grid kill labels "
    "lidar_outputs lidar_overfit "
    "lease protocols retrieval robustness sampling seams_targets teacher verify"
)
"""Tests of the offline side: not collected where its extra ``targets`` is not installed."""
HAS_DEVKIT = importlib.util.find_spec("nuscenes") is not None
collect_ignore = [] if HAS_DEVKIT else [f"test_{name}.py" for name in OFFLINE.split()]
SLOW = (
    "build checksums cluster demo_world docs encoder_weights export gradients img_also kill lease "
    "lidar_outputs lidar_overfit lidar_runs "
    "map_task movie onnx overfit predict protocol_runs report reproduce retrieval robustness runs "
    "seams_targets seams_train trackers train train_cli "
    "train_view"
)
"""Tests that start processes, train or build: all but these are ``make quick``."""
LONG = pytest.mark.skipif(
    "OCCFEAT_LONG" not in os.environ,
    reason="long, and others come near it: make long runs it",
)
FAST = ["teacher.name=teachers:PatchMeans", "block_frames=2", "map.mode=required"]


def pytest_collection_modifyitems(items):
    slow_fixtures = {"demo_root", "demo_store", "drive", "two_camera_store"}
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW.split() or slow_fixtures & {
            *item.fixturenames
        }:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """``made_once(name, make)``: a path that ``make(path)`` fills once for all of pytest's
    processes; read-only by agreement."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # each of xdist's processes has a folder of its own in there

    def made(name, make):
        with FileLock(base / f"{name}.lock"):
            if not (base / f"{name}.done").exists():
                make(base / name)
                (base / f"{name}.done").touch()
        return base / name

    return made


@pytest.fixture(scope="session")
def demo_root(made_once):
    """Dataroot of a synthetic world, 2 scenes x 2 samples; read-only by agreement."""
    return made_once("demo-world", lambda root: make_demo_world(root, scenes=2, samples=2, seed=0))


@pytest.fixture
def dataroot(demo_root, tmp_path):
    """A copy of the demo world that a test may spoil."""
    return Path(shutil.copytree(demo_root, tmp_path / "dataroot"))


def reseal(store):
    """Make seal and checksums fit what a test changed in a store: as if it had been built so."""
    group = open_group(store, "r+")
    group.attrs[SEAL] = seal(dict(group.attrs))
    write_checksums(str(store), group, {})


def targets_of(record, dataset, config, teacher):
    """All arrays of one keyframe."""
    outputs = make_outputs(config, layout_of(config, vars(dataset), teacher.dim))
    return frame_targets(record, config, outputs, teacher)


def build_store(dataroot, store, *overrides, skip_errors=False, overwrite=False):
    """Build in this process with the fast teacher; returns the failed frames."""
    config = TargetsConfig.load(None, [*FAST, *overrides])
    dataset = prepare(Path(dataroot), str(store), None, config, overwrite)
    return build(str(store), config, dataset, InProcess(), skip_errors, overwrite)


def _require_devkit():
    if not HAS_DEVKIT:
        pytest.skip("needs nuscenes-devkit: pip install 'occfeat[targets]'")


@pytest.fixture(scope="session")
def demo_store(demo_root, made_once):
    """Finished store of the demo world; read-only by agreement."""
    _require_devkit()
    return made_once("demo.zarr", lambda store: build_store(demo_root, store))


@pytest.fixture(scope="session")
def toys():
    """Folder of the plug-ins in ``toys``, importable from now on as a user's would be."""
    folder = str(TESTS / "toys")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return folder


@pytest.fixture(scope="session")
def drive(made_once):
    """Dataroot of a drive with two cameras; read-only by agreement."""
    return made_once("drive", two_camera_drive.write_drive)


@pytest.fixture(scope="session")
def two_camera_store(toys, drive, made_once):
    """Finished store of the drive (4 frames train, 2 val), with boxes, a map and an output of its
    own; read-only by agreement."""
    return made_once("two-cameras.zarr", lambda store: two_camera_drive.build(drive, store))


@pytest.fixture(scope="session")
def nuscenes_one():
    """Dataroot of one real keyframe. Not ours to publish, so not in the repository."""
    _require_devkit()
    default = TESTS.parent.parent / "shared" / "data" / "nuscenes-one"
    root = Path(os.environ.get("OCCFEAT_NUSCENES_ONE", default))
    if not root.is_dir():
        pytest.skip(f"the real nuScenes keyframe is not at {root} (set OCCFEAT_NUSCENES_ONE)")
    return root


@contextlib.contextmanager
def s3_environment():
    """The environment of a client of moto's S3, which serves on loopback in the ``with`` block."""
    moto = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.stop()


@pytest.fixture(scope="session")
def s3_server():
    """The environment of a client of an S3 server."""
    with s3_environment() as environment:
        yield environment


@pytest.fixture
def bucket(s3_server, monkeypatch):
    """An empty S3 bucket, as a URL that this process and those it starts can open."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    fs = fsspec.filesystem("s3")
    fs.mkdir("bucket")
    yield "s3://bucket"
    fs.rm("bucket", recursive=True)


def tree_bytes(root):
    """Relative path -> content of every file below a directory or URL."""
    if "://" in str(root):
        fs, path = files.filesystem(root)
        return {key: fs.cat_file(f"{path}/{key}") for key in files.find(root)}
    root = Path(root)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def tiny_lidar_store(made_once):
    """The same with what lidar networks learn from; read-only by agreement."""
    return made_once("tiny-lidar.zarr", partial(make_tiny_store, lidar=True))


@pytest.fixture(scope="session")
def tiny_store(made_once):
    """A store of 16 small made-up frames (12 mini_train, 4 mini_val); read-only by agreement."""
    return made_once("tiny.zarr", make_tiny_store)
