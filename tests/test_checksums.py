"""Damage of a finished store: verify finds all of it, and a reader never takes it for data."""

import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import FAST, build_store, tree_bytes

from occfeat_targets import writer
from occfeat_targets.cli import main
from occfeat_targets.store import checksums
from occfeat_targets.store.files import StoreError
from occfeat_targets.store.reader import open_store
from occfeat_targets.verify import verify_store

SMALL = ("images.size=[36,64]", "grid.x=[-20,20,40]", "grid.y=[-20,20,40]")
FLIPS = 500


@pytest.fixture(scope="module")
def small_store(demo_root, tmp_path_factory):
    """Two blocks of small frames. Tests may spoil an object, and put it back."""
    store = tmp_path_factory.mktemp("small") / "targets.zarr"
    build_store(demo_root, store, *SMALL)
    return store


@pytest.fixture
def objects(small_store):
    """Content of every object, by key; whatever a test did to them is undone."""
    content = tree_bytes(small_store)
    yield content
    for key, data in content.items():
        _put(small_store, key, data)
    for key in tree_bytes(small_store).keys() - content.keys():
        (small_store / key).unlink()


def _put(store, key, data):
    path = store / key
    if not path.exists() or path.read_bytes() != data:
        path.write_bytes(data)


def _flipped(data, rng):
    """The data with one byte changed: in one bit, or to any other value."""
    at, mask = int(rng.integers(len(data))), int(rng.integers(1, 256))
    mask = 1 << mask % 8 if rng.random() < 0.5 else mask
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


def _verify(store):
    try:
        return verify_store(str(store))[1]
    except StoreError as error:
        return [str(error)]


def test_a_good_store_is_good_and_every_object_counts(small_store, objects):
    assert verify_store(str(small_store)) == (4, [])
    assert len(objects) > 50
    lines = objects[checksums.DATA].decode().splitlines()
    assert sorted(line.split(" ", 2)[2] for line in lines[:-1]) == sorted(
        objects.keys() - {checksums.DATA}
    )


def test_every_flipped_byte_is_found(small_store, objects):
    rng = np.random.default_rng(0)
    spread = rng.choice(sorted(objects), FLIPS - len(objects)).tolist()
    for key in [*objects, *spread]:
        _put(small_store, key, _flipped(objects[key], rng))
        problems = _verify(small_store)
        assert any(key in problem for problem in problems), (key, problems)
        _put(small_store, key, objects[key])
    assert _verify(small_store) == []


def test_every_truncated_or_lengthened_object_is_found(small_store, objects):
    for key, data in objects.items():
        for other in (b"", data[:1], data[: len(data) // 2], data[:-1], data + b"\0", data + data):
            _put(small_store, key, other)
            problems = _verify(small_store)
            assert any(key in problem for problem in problems), (key, len(other), problems)
        _put(small_store, key, data)


def test_every_lost_object_is_found(small_store, objects):
    for key, data in objects.items():
        (small_store / key).unlink()
        problems = _verify(small_store)
        wanted = "no targets store here" if key == "zarr.json" else key
        assert any(wanted in problem for problem in problems), (key, problems)
        _put(small_store, key, data)


def test_exchanged_objects_are_found(small_store, objects):
    """All pairs of one size, which no size can tell apart, and some others."""
    pairs = [(a, b) for a, b in combinations(objects, 2) if objects[a] != objects[b]]
    same = [(a, b) for a, b in pairs if len(objects[a]) == len(objects[b])]
    assert len(same) >= 4
    others = np.random.default_rng(1).choice(len(pairs), 200, replace=False)
    for a, b in [*same, *(pairs[i] for i in others)]:
        _put(small_store, a, objects[b])
        _put(small_store, b, objects[a])
        assert _verify(small_store), (a, b)
        for key in (a, b):
            _put(small_store, key, objects[key])


def test_an_added_object_is_found(small_store, objects):
    for key in ("extra", "features/c/2/0/0", "K/c/1", "checksums/c/1", "images/zarr.json.bak"):
        path = small_store / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        assert _verify(small_store) == [f"{key} is no object of this store"]
        path.unlink()


# --- what a reader makes of it --------------------------------------------------------------------


def _everything(store, names=None):
    """All that a reader can get of a store (or some arrays of it), as comparable values."""
    opened = open_store(store)
    read = [opened.read(i, names or opened.specs) for i in range(len(opened))]
    frames = (opened.per_frame, *read)
    return opened.attrs, [
        {name: (v.dtype, v.shape, v.tobytes()) for name, v in frame.items()} for frame in frames
    ]


def _is_noticed(store, truth, names=None):
    """Whether reading raises StoreError; else it must give the very same values."""
    try:
        found = _everything(store, names)
    except StoreError:
        return True
    assert found == truth
    return False


def test_a_reader_never_takes_a_flipped_byte_of_a_chunk_or_an_index_for_data(small_store, objects):
    rng = np.random.default_rng(2)
    data = [key for key in objects if "/c/" in key and key != checksums.DATA]
    assert len(data) > 30
    for key in data:
        n, names = len(objects[key]), [key.split("/")[0]]
        truth = _everything(small_store, names)
        ends = [objects[key][:at] + bytes([objects[key][at] ^ 1]) + objects[key][at + 1 :]
                for at in (0, n - 1, max(0, n - 12))]  # fmt: skip
        for spoilt in (*ends, *(_flipped(objects[key], rng) for _ in range(1))):
            _put(small_store, key, spoilt)
            assert _is_noticed(small_store, truth, names), key
        _put(small_store, key, objects[key])


def test_a_reader_never_takes_damaged_descriptions_for_others(small_store, objects):
    """``zarr.json`` of the root and of every array: shapes, types, codecs, who counts the rows."""
    truth, rng = _everything(small_store), np.random.default_rng(3)
    for key in (key for key in objects if key.endswith("zarr.json")):
        noticed = []
        for _ in range(40 if key == "zarr.json" else 8):
            _put(small_store, key, _flipped(objects[key], rng))
            noticed.append(_is_noticed(small_store, truth))
        _put(small_store, key, objects[key])
        if key not in ("zarr.json", "checksums/zarr.json"):  # some bytes of the root are blanks
            assert all(noticed), key


def test_a_reader_misses_what_is_lost(small_store, objects):
    truth = _everything(small_store)
    for key in objects:
        if not key.startswith("checksums/"):
            (small_store / key).unlink()
            assert _is_noticed(small_store, truth), key
            _put(small_store, key, objects[key])


DAMAGED_ROOTS = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:200],
    "not text": lambda data: b"\xff" + data[1:],
    "not JSON": lambda data: data.replace(b"{", b"[", 1),
    "a list": lambda data: b"[]",
    "a number": lambda data: b"3",
    "of an array": lambda data: data.replace(b'"group"', b'"array"'),
    "attributes are a list": lambda data: data.replace(b'"attributes": {', b'"attributes": [{', 1),
    "no attributes": lambda data: b'{"zarr_format": 3, "node_type": "group"}',
}


@pytest.mark.parametrize("damage", DAMAGED_ROOTS)
def test_a_damaged_root_gets_one_sentence(demo_root, small_store, objects, damage):
    _put(small_store, "zarr.json", DAMAGED_ROOTS[damage](objects["zarr.json"]))
    with pytest.raises(StoreError, match="damaged|not an occfeat-targets store"):
        open_store(small_store)
    settings = [part for setting in (*FAST, *SMALL) for part in ("--set", setting)]
    for arguments in (["info"], ["verify"], ["view"], ["build", demo_root, *settings]):
        command, *rest = map(str, arguments)
        place = [*rest[:1], str(small_store), *rest[1:]]
        result = CliRunner().invoke(main, [command, *place])
        assert result.exit_code == 1, (command, result.output)
        assert result.output.startswith("Error: ") and result.output.count("\n") == 1, command


# --- checksums of a build that was disturbed ------------------------------------------------------


def _killed(*arguments, **more):
    raise KeyboardInterrupt


def _kill_at(monkeypatch, module, name, call=1):
    """Make the n-th call of a function the build's last."""
    calls, real = [], getattr(module, name)

    def dies(*arguments, **more):
        calls.append(arguments)
        return (_killed if len(calls) == call else real)(*arguments, **more)

    monkeypatch.setattr(module, name, dies)


MOMENTS = {
    "before the small arrays": (writer, "stored_outputs", 3),  # after two blocks
    "after complete, before the checksums": (checksums, "write_checksums", 1),
    "before their data": (checksums, "_text", 2),
    "before the markers are deleted": (writer, "sweep_litter", 3),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_build_killed_at_its_end_ends_the_same(
    demo_root, small_store, tmp_path, monkeypatch, moment
):
    store = tmp_path / "targets.zarr"
    _kill_at(monkeypatch, *MOMENTS[moment])
    with pytest.raises(KeyboardInterrupt):
        build_store(demo_root, store, *SMALL)
    monkeypatch.undo()
    assert _verify(store)
    assert tree_bytes(store).keys() != tree_bytes(small_store).keys()
    build_store(demo_root, store, *SMALL)
    assert tree_bytes(store) == tree_bytes(small_store)


def test_a_store_that_lost_its_checksums_is_finished_again(demo_root, small_store, tmp_path):
    store = Path(shutil.copytree(small_store, tmp_path / "targets.zarr"))
    (store / checksums.DATA).unlink()
    assert _verify(store) == [
        "checksums/c/0 is missing: nothing says what the other objects should be"
    ]
    build_store(demo_root, store, *SMALL)
    assert tree_bytes(store) == tree_bytes(small_store)


def test_what_a_killed_worker_left_lying_is_no_object(
    demo_root, small_store, tmp_path, monkeypatch
):
    """Dask runs its task again and the build goes on: nobody begins it anew, and tidies up."""
    store, read = tmp_path / "targets.zarr", writer._read_markers

    def littered(url):
        if (store / "features" / "c").exists():
            (store / "features" / "c" / "0.4f2e.partial").write_bytes(b"torn")
        return read(url)

    monkeypatch.setattr(writer, "_read_markers", littered)
    build_store(demo_root, store, *SMALL)
    assert tree_bytes(store) == tree_bytes(small_store)


def test_failed_frames_have_checksums_too_and_so_have_they_when_mended(
    dataroot, small_store, tmp_path
):
    bad = sorted((dataroot / "samples" / "CAM_BACK").iterdir())[1]
    good, store = bad.read_bytes(), tmp_path / "targets.zarr"
    bad.write_bytes(good[:20_000])
    for _ in range(2):  # tried again in vain: the same
        assert len(build_store(dataroot, store, *SMALL, skip_errors=True)) == 1
        assert verify_store(str(store)) == (4, [])
    for key, data in list(tree_bytes(store).items())[::5]:
        _put(store, key, _flipped(data, np.random.default_rng(0)))
        assert _verify(store), key
        _put(store, key, data)
    bad.write_bytes(good)
    assert build_store(dataroot, store, *SMALL) == {}
    assert verify_store(str(store)) == (4, [])
    assert tree_bytes(store) == tree_bytes(small_store)


def test_names_of_any_kind_and_urls(demo_root):
    """memory:// stands for s3://."""
    url = "memory://checksums/a b#1.zarr"
    build_store(demo_root, url, *SMALL)
    assert verify_store(url) == (4, [])
    fs, path = writer.files.filesystem(url)
    shard = f"{path}/points/c/1/0/0"
    fs.pipe_file(shard, _flipped(fs.cat_file(shard), np.random.default_rng(0)))
    assert verify_store(url)[1] == ["points/c/1/0/0 is damaged: it does not match its checksum"]
    fs.rm("/checksums", recursive=True)
