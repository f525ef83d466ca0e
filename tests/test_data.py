"""Frames of a store to batches: right bytes, right order, every start method, clear errors."""

import io
import pickle
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import psutil
import pytest
import torch
import zarr
from conftest import LONG
from PIL import Image
from tiny_store import change_attributes

from occfeat_targets.store.files import StoreError, zarr_store
from occfeat_targets.store.reader import open_store
from occfeat_train.data.dataset import FrameDataset, FrameReader, number_voxels
from occfeat_train.data.order import ShardSampler, eval_batches, frame_order, select_frames
from occfeat_train.data.workers import make_loader

NAMES = (
    "images",
    "voxel_index",
    "features",
    "feature_scale",
    "feature_cameras",
    "points",
    "boxes",
    "box_class",
    "vehicle",
    "map",
)


@pytest.fixture
def store(demo_store, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(demo_store, tmp_path / "targets.zarr"))


def _batches(loader):
    return [{name: values.clone() for name, values in batch.items()} for batch in loader]


def _equal(left, right):
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(left, right, strict=True)
    )


# Reading and collating


def test_a_frame_is_what_the_store_says(demo_store):
    store, reader = open_store(demo_store), FrameReader(demo_store)
    names = list(store.specs)
    for i in range(len(store)):
        expected, frame = store.frame(i), reader.read(i, names)
        assert list(frame) == names
        for name in set(names) - {"images"}:
            np.testing.assert_array_equal(frame[name], expected[name])
            assert frame[name].dtype == expected[name].dtype
        for image, jpeg in zip(frame["images"], expected["images"], strict=True):
            np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(jpeg))))


def test_a_batch_is_its_frames_one_after_another(demo_store):
    store = open_store(demo_store)
    dataset = FrameDataset(demo_store, [3, 1, 2], NAMES)
    batch = dataset.collate([dataset[0], dataset[2], dataset[1]])
    frames = [store.frame(i) for i in (3, 2, 1)]
    assert batch["frame"].tolist() == [3, 2, 1]
    assert {name: (values.dtype, values.ndim) for name, values in batch.items()} == {
        "frame": (torch.int64, 1),
        "K": (torch.float32, 4),
        "cam_T_ego": (torch.float32, 4),
        "images": (torch.uint8, 5),
        "voxel": (torch.int32, 1),
        "n_voxels": (torch.int64, 1),
        "features": (torch.int8, 2),
        "feature_scale": (torch.float16, 1),
        "feature_cameras": (torch.uint8, 1),
        "points": (torch.int16, 2),
        "n_points": (torch.int64, 1),
        "boxes": (torch.float32, 2),
        "box_class": (torch.uint8, 1),
        "n_boxes": (torch.int64, 1),
        "vehicle": (torch.uint8, 3),
        "map": (torch.uint8, 4),
    }
    assert batch["images"].shape == (3, 6, 288, 512, 3)
    for name in ("K", "cam_T_ego", "vehicle", "map"):
        np.testing.assert_array_equal(batch[name], [frame[name] for frame in frames])
    ragged = ("features", "feature_scale", "feature_cameras", "points", "boxes", "box_class")
    for name in ragged:
        np.testing.assert_array_equal(batch[name], np.concatenate([f[name] for f in frames]))
    for name in ("n_voxels", "n_points", "n_boxes"):
        assert batch[name].tolist() == [frame[name] for frame in frames]
    of_batch, index = np.divmod(batch["voxel"].numpy(), store.grid.n_voxels)
    np.testing.assert_array_equal(index, np.concatenate([f["voxel_index"] for f in frames]))
    assert np.bincount(of_batch).tolist() == [f["n_voxels"] for f in frames]


def test_frames_without_voxels_and_vehicles_collate(store):
    group = zarr.open_group(zarr_store(store, read_only=False), mode="r+")
    group["n_voxels"][:2] = 0
    group["n_boxes"][:] = 0
    dataset = FrameDataset(store, range(4), NAMES)
    batch = dataset.collate([dataset[0], dataset[1]])
    assert batch["voxel"].shape == (0,)
    assert batch["features"].shape == (0, 8)
    assert batch["boxes"].shape == (0, 8)
    batch = dataset.collate([dataset[0], dataset[3]])
    assert (batch["voxel"] >= 320_000).all()
    assert batch["n_boxes"].tolist() == [0, 0]


def test_voxels_of_a_huge_batch_are_int64():
    index = np.array([7], np.uint32)
    assert [v.dtype for v in number_voxels([index], 2**31 - 1)] == [np.int32]
    numbered = number_voxels([index, index], 2**31 - 1)
    assert [v.tolist() for v in numbered] == [[7], [2**31 + 6]]


def test_a_dataset_that_was_used_pickles_small(demo_store):
    dataset = FrameDataset(demo_store, [0, 1], ("voxel_index",))
    dataset[0]
    copy = pickle.dumps(dataset)
    assert len(copy) < 2000
    np.testing.assert_array_equal(pickle.loads(copy)[1]["voxel_index"], dataset[1]["voxel_index"])


def test_any_url(demo_store):
    fs = fsspec.filesystem("memory")
    fs.put(str(demo_store), "/test-data/targets.zarr", recursive=True)
    try:
        remote = FrameDataset("memory://test-data/targets.zarr", range(4), NAMES)
        local = FrameDataset(demo_store, range(4), NAMES)
        for i in range(4):
            assert _equal([remote.collate([remote[i]])], [local.collate([local[i]])])
    finally:
        fs.rm("/test-data", recursive=True)


# Errors


def _shard(store, name):
    return next(path for path in sorted((store / name / "c").rglob("*")) if path.is_file())


def _cut_shard(store):
    shard = _shard(store, "features")
    shard.write_bytes(shard.read_bytes()[:-1])


def _delete_shard(store):
    _shard(store, "voxel_index").unlink()


def _write(name, value, where=0):
    """What a build might have written: no checksum tells."""

    def damage(store):
        group = zarr.open_group(zarr_store(store, read_only=False), mode="r+")
        group[name][where] = value

    return damage


_break_jpeg = _write("images", list(b"nope"), (0, slice(4)))
_hole_in_jpeg = _write("images", 0, (0, slice(5000, 6000)))

DAMAGE = {
    "no JPEG": (_break_jpeg, "cannot decode the image of CAM_FRONT_LEFT: "),
    "a hole": (_hole_in_jpeg, "CAM_FRONT_LEFT: it has a hole of zero bytes"),
    "image cut short": (_write("image_offset", [0, 999, *[36000] * 5]), "CAM_FRONT_LEFT: "),
    "truncated": (_cut_shard, "features/c/0/0/0 is damaged: the shard index does not match"),
    "deleted": (_delete_shard, "voxel_index/c/0/0 is missing"),
    "failed frame": (_write("n_voxels", -1), "has no targets: it failed when the store was"),
    "voxel outside": (_write("voxel_index", 320_000), "voxels outside of the grid"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_errors_name_store_frame_scene_and_sample(store, what):
    damage, message = DAMAGE[what]
    damage(store)
    good = open_store(store)
    dataset = FrameDataset(store, [2, 0], NAMES)
    dataset[0]
    with pytest.raises(StoreError) as caught:
        dataset[1]
    start = f"{store}: frame 0 ({good.scene(0)}, sample {good.token(0)})"
    assert str(caught.value).startswith(start)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_of_another_size(store):
    config = open_store(store).attrs["config"]
    change_attributes(store, config=config | {"images": config["images"] | {"size": [100, 200]}})
    with pytest.raises(StoreError, match="CAM_FRONT_LEFT: it is RGB 288x512"):
        FrameReader(store).read(1, ("images",))


def test_an_array_that_the_store_lacks(demo_store):
    with pytest.raises(StoreError, match="the store has no 'radar'"):
        FrameReader(demo_store).read(1, ("radar",))


def test_no_store(tmp_path):
    with pytest.raises(StoreError, match="no targets store here"):
        FrameDataset(tmp_path, [0], ())[0]


def test_an_error_in_a_worker_reaches_the_main_process(store):
    _break_jpeg(store)
    dataset = FrameDataset(store, range(4), ("images",))
    loader = make_loader(dataset, eval_batches(4, 1), 1, "fork", pin_memory=False)
    token = open_store(store).token(0)
    with pytest.raises(StoreError, match=rf"frame 0 \(.*, sample {token}\): .*CAM_FRONT_LEFT"):
        list(loader)


# Order


def test_the_order_is_a_stable_permutation():
    assert frame_order(10, 0, 0).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    assert frame_order(10, 0, 1).tolist() == [3, 7, 4, 2, 9, 8, 1, 6, 5, 0]
    assert frame_order(34_149, 0, 0)[:3].tolist() == [18634, 19031, 31749]
    for n, seed, epoch in [(1, 0, 0), (1000, 3, 7), (1000, 2**40, 7)]:
        assert sorted(frame_order(n, seed, epoch)) == list(range(n))
    orders = [frame_order(50, seed, epoch).tolist() for seed in range(5) for epoch in range(5)]
    assert len(set(map(tuple, orders))) == 25


def _epoch(sampler):
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return batches


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_every_global_batch(world):
    order = (frame_order(43, 5, 2) + 2 * 43).tolist()
    samplers = [ShardSampler(43, 8, 5, rank, world) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(2)
    epochs = [_epoch(sampler) for sampler in samplers]
    together = [list(chain(*parts)) for parts in zip(*epochs, strict=True)]
    assert together == [order[start : start + 8] for start in range(0, 40, 8)]
    assert all(len(part) == 8 // world for epoch in epochs for part in epoch)


def test_resume_skips_what_is_done():
    sampler = ShardSampler(43, 4, 0, rank=1, world=2)
    sampler.set_epoch(3)
    whole = _epoch(sampler)
    assert len(whole) == 10
    for done in (0, 1, 9, 10, 11):
        sampler.set_epoch(3, done)
        assert _epoch(sampler) == whole[done:]


def test_an_epoch_once_begun_does_not_change():
    sampler = ShardSampler(40, 4, 0)
    expected = _epoch(sampler)
    begun = iter(sampler)
    sampler.set_epoch(1)
    assert list(begun) == expected


@pytest.mark.parametrize(("n", "batch", "world"), [(3, 4, 1), (8, 3, 2), (8, 0, 1)])
def test_batches_that_cannot_be(n, batch, world):
    with pytest.raises(ValueError, match="batch of"):
        ShardSampler(n, batch, 0, 0, world)


@pytest.mark.parametrize("world", [1, 2, 4, 7])
@pytest.mark.parametrize("n", [0, 1, 5, 28])
def test_evaluation_reads_every_frame_once(n, world):
    shards = [list(chain(*_epoch(eval_batches(n, 3, rank, world)))) for rank in range(world)]
    assert sorted(chain(*shards)) == list(range(n))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert all(1 <= len(batch) <= 3 for batch in eval_batches(n, 3, 0, world))


# Loading

SCRIPT = """
import hashlib, os, signal, sys
from occfeat_train.data.dataset import *
from occfeat_train.data.order import *
from occfeat_train.data.workers import *

def digest(batch):
    hashed = hashlib.sha256()
    for name, values in sorted(batch.items()):
        hashed.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        hashed.update(values.numpy().tobytes())
    return hashed.hexdigest()

def main(store, names, workers, method):
    dataset = FrameDataset(store, [3, 2, 1, 0], names.split())
    before = digest(dataset.collate([dataset[0]]))  # what hangs other readers after a fork
    sampler = ShardSampler(4, 1, seed=7)
    loader = make_loader(dataset, sampler, int(workers), method, pin_memory=False)
    pids = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        batches = iter(loader)
        print(digest(next(batches)), digest(next(batches)))  # one from each worker
        if int(workers):
            pids.append([worker.pid for worker in batches._workers])
            for pid in pids[-1]:
                os.kill(pid, signal.SIGINT)  # as Ctrl-C in a terminal would
        for batch in batches:
            print(digest(batch))
    assert before == digest(dataset.collate([dataset[0]]))
    assert pids == [] or pids[0] == pids[1]  # the same workers in both epochs

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.fixture(scope="module")
def load(demo_store, tmp_path_factory):
    """Digests of the batches of two epochs, read in a process that has read before."""
    script = tmp_path_factory.mktemp("load") / "load.py"
    script.write_text(SCRIPT)

    def run(workers, method="fork"):
        command = [sys.executable, script, demo_store, " ".join(NAMES), str(workers), method]
        output = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=240
        ).stdout
        assert len(output.split()) == 8
        return output

    return run


@pytest.fixture(scope="module")
def without_workers(load):
    return load(0)


@pytest.mark.parametrize("method", ["fork", "forkserver", pytest.param("spawn", marks=LONG)])
def test_workers_change_nothing(load, without_workers, method):
    assert load(2, method) == without_workers


DYING = """
import os, signal, sys
from occfeat_train.data.dataset import *
from occfeat_train.data.order import *
from occfeat_train.data.workers import *

if __name__ == "__main__":
    dataset = FrameDataset(sys.argv[1], [0, 1, 2, 3], ("images",))
    batches = iter(make_loader(dataset, eval_batches(4, 1), 2, sys.argv[2], pin_memory=False))
    next(batches), next(batches)
    print(*(worker.pid for worker in batches._workers), flush=True)
    if sys.argv[3] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)  # else it exits, with the workers still there
"""


@pytest.mark.parametrize("end", ["killed", "exits"])
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_do_not_outlive_the_main_process(demo_store, tmp_path, method, end):
    (tmp_path / "dying.py").write_text(DYING)
    with open(tmp_path / "pids", "w") as output:
        command = [sys.executable, tmp_path / "dying.py", demo_store, method, end]
        subprocess.run(command, stdout=output, timeout=240)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    workers = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(workers, timeout=20)
    for worker in alive:
        worker.kill()
    assert not alive


@pytest.mark.parametrize("workers", [0, 1])
def test_an_abandoned_epoch_leaves_nothing_behind(demo_store, workers):
    dataset = FrameDataset(demo_store, [0, 1, 2, 3] * 5, ("feature_cameras",))
    sampler = ShardSampler(20, 1, seed=0)
    loader = make_loader(dataset, sampler, workers, "fork", pin_memory=False)

    def epoch(number, done=0):
        sampler.set_epoch(number, done)
        return iter(loader)

    first, second = _batches(epoch(0)), _batches(epoch(1))
    assert not _equal(first, second)
    batches = epoch(0)
    next(batches), next(batches)
    assert _equal(_batches(epoch(1, done=3)), second[3:])
    next(epoch(0))
    assert _equal(_batches(epoch(1)), second)


def test_loading_leaves_the_random_state_alone(demo_store):
    dataset = FrameDataset(demo_store, range(4), ())
    state = torch.get_rng_state()
    for workers in (0, 1):
        list(make_loader(dataset, eval_batches(4, 2), workers, "fork", pin_memory=False))
    assert torch.equal(torch.get_rng_state(), state)


# Selecting


def _store(scenes_per_split, frames=2, failed=()):
    """A stand-in for a store: its per-frame tables alone, scenes in table order."""
    splits = list(scenes_per_split)
    of_scene = np.repeat(np.arange(len(splits)), list(scenes_per_split.values()))
    n_voxels = np.full(frames * len(of_scene), 9)
    n_voxels[list(failed)] = -1
    scene = np.repeat(np.arange(len(of_scene)), frames)
    return SimpleNamespace(
        url="/fake.zarr",
        attrs={"splits": splits},
        per_frame={"split": of_scene[scene], "scene": scene, "n_voxels": n_voxels},
    )


def _scenes(store, *args):
    return np.unique(store.per_frame["scene"][select_frames(store, *args)]).tolist()


def test_one_percent_of_trainval_is_every_hundredth_scene():
    store = _store({"val": 150, "train": 700})
    for fraction in ("0.01", 0.01, "1e-2", "1/100"):
        assert _scenes(store, ("train",), fraction) == [150 + k for k in range(99, 700, 100)]
    assert _scenes(store, ("train",), 0.1) == [150 + k for k in range(9, 700, 10)]
    assert _scenes(store, ("train",)) == list(range(150, 850))
    assert len(_scenes(store, ("train",), "0.3")) == 210
    assert len(_scenes(store, ("train",), "0.29")) == 203
    assert _scenes(store, ("val", "train"), 0.01) == list(range(99, 850, 100))
    assert select_frames(store, ("train",), 0.01)[:2] == [498, 499]


def test_at_least_one_scene_or_frame():
    store = _store({"train": 10})
    assert select_frames(store, ("train",), 0.01) == [0, 1]
    assert select_frames(store, ("train",), 0.01, "frame") == [0]


def test_a_fraction_of_frames():
    store = _store({"val": 1, "train": 10}, frames=3)
    assert select_frames(store, ("train",), 0.1, "frame") == [12, 22, 32]
    assert select_frames(store, ("train",), 0.3, "frame") == [6, 9, 12, 16, 19, 22, 26, 29, 32]
    assert select_frames(store, ("train",), 1, "frame") == list(range(3, 33))


def test_failed_frames_are_left_out_and_change_no_choice():
    store = _store({"train": 4}, failed=(2, 3, 4))
    assert select_frames(store, ("train",)) == [0, 1, 5, 6, 7]
    assert select_frames(store, ("train",), 0.5) == [6, 7]
    with pytest.raises(StoreError, match=r"^/fake.zarr has no usable frames of train"):
        select_frames(_store({"train": 2}, failed=range(4)), ("train",))


def test_frames_of_the_demo_store(demo_store):
    store = open_store(demo_store)
    parts = [select_frames(store, (split,)) for split in store.attrs["splits"]]
    assert sorted(chain(*parts)) == [0, 1, 2, 3]
    for split, frames in zip(store.attrs["splits"], parts, strict=True):
        assert {store.split(i) for i in frames} == {split}
    assert select_frames(store, tuple(store.attrs["splits"])) == [0, 1, 2, 3]


def test_no_frames_of_a_split(demo_store):
    splits = ", ".join(open_store(demo_store).attrs["splits"])
    message = f"{demo_store} has no usable frames of train, test; its splits are: {splits}"
    with pytest.raises(StoreError, match=message):
        select_frames(open_store(demo_store), ("train", "test"))


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, "2", "nan", "ten", "1%", float("inf")])
def test_fractions_that_make_no_sense(fraction):
    with pytest.raises(ValueError):
        select_frames(_store({"train": 4}), ("train",), fraction)


def test_units_that_make_no_sense():
    with pytest.raises(ValueError, match="'scene' or 'frame', got 'sample'"):
        select_frames(_store({"train": 4}), ("train",), 1, "sample")
