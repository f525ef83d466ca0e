"""Shared fixtures: a small demo world, a store of it, the real keyframe."""

import os
import shutil
from pathlib import Path

import pytest
from tiny_store import make_tiny_store

from occfeat_targets.build import build, prepare
from occfeat_targets.cluster import InProcess
from occfeat_targets.config import TargetsConfig
from occfeat_targets.demo_world import make_demo_world

TESTS = Path(__file__).parent
FAST = ["teacher.name=teachers:PatchMeans", "block_frames=2", "map.mode=required"]


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory):
    """Dataroot of a synthetic world, 2 scenes x 2 samples; read-only by agreement."""
    root = tmp_path_factory.mktemp("world") / "demo-world"
    make_demo_world(root, scenes=2, samples=2, seed=0)
    return root


@pytest.fixture
def dataroot(demo_root, tmp_path):
    """A copy of the demo world that a test may spoil."""
    return Path(shutil.copytree(demo_root, tmp_path / "dataroot"))


def build_store(dataroot, store, *overrides, skip_errors=False, overwrite=False):
    """Build in this process with the fast teacher; returns the failed frames."""
    config = TargetsConfig.load(None, [*FAST, *overrides])
    dataset = prepare(Path(dataroot), str(store), None, config, overwrite)
    return build(str(store), config, dataset, InProcess(), skip_errors)


@pytest.fixture(scope="session")
def demo_store(demo_root, tmp_path_factory):
    """Finished store of the demo world; read-only by agreement."""
    store = tmp_path_factory.mktemp("store") / "targets.zarr"
    build_store(demo_root, store)
    return store


@pytest.fixture(scope="session")
def nuscenes_one():
    """Dataroot of one real keyframe. Not ours to publish, so not in the repository."""
    default = TESTS.parent.parent / "shared" / "data" / "nuscenes-one"
    root = Path(os.environ.get("OCCFEAT_NUSCENES_ONE", default))
    if not root.is_dir():
        pytest.skip(f"the real nuScenes keyframe is not at {root} (set OCCFEAT_NUSCENES_ONE)")
    return root


def tree_bytes(root):
    """Relative path -> content of every file below a directory."""
    root = Path(root)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory):
    """A store of 16 small made-up frames (12 mini_train, 4 mini_val); read-only by agreement."""
    return make_tiny_store(tmp_path_factory.mktemp("tiny") / "targets.zarr")
