"""verify must notice damage: every check is shown to fail on a store spoilt that way."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import reseal
from fsspec.implementations.local import LocalFileSystem

from occfeat_targets.frame import stored_outputs
from occfeat_targets.outputs.points import Points
from occfeat_targets.store.files import zarr_store
from occfeat_targets.store.reader import open_store
from occfeat_targets.verify import recompute_frames, verify_store


@pytest.fixture
def store(demo_store, tmp_path):
    return Path(shutil.copytree(demo_store, tmp_path / "targets.zarr"))


def _edit(store, name, change):
    """Change one stored array through zarr, as a buggy writer would: checksums are of the wrong
    values, so that the checks of what arrays hold must find them."""
    array = zarr.open_group(zarr_store(store, read_only=False), mode="r+")[name]
    frame = array[1]
    change(frame)
    array[1] = frame
    reseal(store)


def test_a_good_store_has_no_problems(demo_store):
    assert verify_store(demo_store) == (4, [])


def _swap(index):
    index[[10, 11]] = index[[11, 10]]


def _shift(index):
    index[index < 2**32 - 1] -= index.min()  # still ascending, still inside


def _turn(cam_T_ego):
    cam_T_ego[2] = cam_T_ego[0]


def _set(where, value):
    def change(array):
        array[where] = value

    return change


DAMAGE = {
    "unsorted voxels": ("voxel_index", _swap, "not ascending"),
    "voxel outside": ("voxel_index", _set(0, 320_000), "leaves the grid"),
    "voxels moved": ("voxel_index", _shift, "hold no stored point"),
    "scale NaN": ("feature_scale", _set(5, np.nan), "not finite"),
    "camera 7": ("feature_cameras", _set(5, 64), "bits of no camera"),
    "camera 8": ("feature_cameras", _set(5, 128), "bits of no camera"),
    "feature unwritten": ("features", _set(5, -128), "largest code is not 127"),
    "feature lost": ("features", _set(5, 3), "largest code is not 127"),
    "cameras swapped": ("cam_T_ego", _turn, "contradicts the calibration"),
    "not rigid": ("cam_T_ego", _set((0, 0), 0.5), "not a rigid transform"),
    "K singular": ("K", _set((0, 1), 0.0), "K is singular"),
    "image damaged": ("images", _set(slice(0, 4), 0), "cannot be decoded"),
    "vehicle mask": (
        "vehicle",
        _set((slice(3), slice(3)), 1),
        "not the mask of the vehicles among boxes",
    ),
    "visible mask": (
        "vehicle_visible",
        _set((0, 0), 0),
        "not the mask of the vehicles among boxes",
    ),
    "box class": ("box_class", _set(0, 99), "box_class holds numbers of no class"),
    "a car becomes a person": ("box_class", _set(slice(None), 0), "not the mask of the vehicles"),
    "map value": ("map", _set((0, 0, 0), 7), "other than 0 and 1"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_located(store, kind):
    name, change, message = DAMAGE[kind]
    _edit(store, name, change)
    n_frames, problems = verify_store(store)
    assert n_frames == 4
    assert any(message in problem for problem in problems), problems
    token = open_store(store).token(1)
    assert all(f"frame 1 ({open_store(store).scene(1)}, sample {token})" in p for p in problems)


def test_a_scene_without_a_name_is_found(store):
    group = zarr.open_group(zarr_store(store, read_only=False), mode="r+")
    group.attrs["scenes"] = group.attrs["scenes"][:1]
    reseal(store)
    assert verify_store(store)[1] == [
        f"{store}: scene holds numbers that the attribute scenes has no name for"
    ]


def test_a_feature_on_an_unseen_voxel_is_found(store):
    bits = open_store(store).frame(1)["feature_cameras"]
    unseen = int(np.flatnonzero(bits == 0)[0])
    _edit(store, "features", _set((unseen, 2), 127))
    problems = verify_store(store)[1]
    assert any("no camera sees has a feature" in problem for problem in problems)


@pytest.mark.parametrize("kept", [0, 10, 2000])
def test_truncated_files_are_found(store, kept):
    shard = store / "features" / "c" / "0" / "0" / "0"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:kept])
    assert verify_store(store)[1] == [f"features/c/0/0/0 has {kept} bytes instead of {size}"]
    reseal(store)  # had it been written so, the frames would show it
    problems = verify_store(store)[1]
    assert len(problems) >= 1
    assert all("frame 0" in p or "frame 1" in p for p in problems)


def test_a_missing_file_is_found(store):
    """Zarr reads a missing shard as fill values; fill values are no data."""
    (store / "features" / "c" / "0" / "0" / "0").unlink()
    assert verify_store(store)[1] == ["features/c/0/0/0 is missing"]
    reseal(store)
    problems = verify_store(store)[1]
    assert sum("features/c/0/0/0 is missing" in problem for problem in problems) == 2
    assert all("frame 0" in p or "frame 1" in p for p in problems)


def test_recomputing_finds_what_no_check_can_see(store, demo_root):
    assert recompute_frames(store, demo_root, 4, seed=0) == []

    def rotate(features):
        features[:500] = np.roll(features[:500], 3, axis=1)

    _edit(store, "features", rotate)
    _edit(store, "points", _set((0, 0), 77))
    problems = recompute_frames(store, demo_root, 4, seed=0)
    assert len(problems) == 2
    assert any("features differ" in problem for problem in problems)
    assert any("points differs" in problem for problem in problems)


def test_recomputing_with_another_teacher_says_so(store, demo_root):
    group = zarr.open_group(zarr_store(store, read_only=False), mode="r+")
    group.attrs["teacher"] = group.attrs["teacher"] | {"weights": "others"}
    reseal(store)
    assert recompute_frames(store, demo_root, 1, 0) == [
        "the teacher here is not the store's: weights: others -> none"
    ]


def _points_check(store, points, voxel_index):
    """What the points' output says of a frame of just these points and voxels."""
    _, outputs = stored_outputs(store.attrs)
    (output,) = (o for o in outputs if isinstance(o, Points))
    return list(output.check(store, {"points": points, "voxel_index": voxel_index}))


def test_a_stored_point_whose_voxel_is_missing_is_found(demo_store):
    store = open_store(demo_store)
    frame = store.frame(0)
    points, index = frame["points"], frame["voxel_index"]
    assert _points_check(store, points, index) == []
    counts = np.bincount(store.grid.flat_index(points[:, :3] * store.attrs["point_step_m"])[0])
    (problem,) = _points_check(store, points, index[index != counts.argmax()])
    assert problem == "1 voxels that hold stored points are missing"
    free = np.setdiff1d(np.arange(store.grid.n_voxels, dtype=np.uint32), index)[-1:]
    (problem,) = _points_check(store, points, np.append(index, free))
    assert problem == f"1 of {len(index) + 1} voxels hold no stored point"


@pytest.mark.parametrize("side", [-1e-7, 1e-7])
def test_flat_ground_on_the_edge_between_two_cells_is_no_damage(demo_store, side):
    """The build sees it before it is rounded to whole steps, on either side."""
    store = open_store(demo_store)
    step, edge = store.attrs["point_step_m"], store.grid.z[0] + 4 * store.grid.cell_size[2]
    assert edge % step == pytest.approx(0, abs=1e-9) or edge % step == pytest.approx(step)
    xyz = np.column_stack([*np.random.default_rng(0).uniform(5, 40, (2, 500)), np.full(500, edge)])
    voxels = store.grid.occupied(np.rint(xyz / step) * step + (0, 0, side))
    points = np.column_stack([np.rint(xyz / step), np.zeros(500)]).astype(np.int16)
    assert _points_check(store, points, voxels) == []


def test_a_quick_look_finds_files_and_descriptions_but_reads_no_data(store, monkeypatch):
    """Sizes tell truncated, lost and added files; a byte in the middle needs the whole."""
    read, cat_file = [], LocalFileSystem.cat_file
    noted = lambda fs, path, **more: read.append(path) or cat_file(fs, path, **more)  # noqa: E731
    monkeypatch.setattr(LocalFileSystem, "cat_file", noted)
    assert verify_store(str(store), quick=True) == (4, [])
    assert read and all(path.endswith(("zarr.json", "checksums/c/0")) for path in read)
    shard, lost, described = (store / n for n in ("features/c/0/0/0", "n_boxes/c/0", "K/zarr.json"))
    shard.write_bytes(shard.read_bytes()[:-1])
    lost.unlink()
    described.write_text(described.read_text().replace("3", "4"))
    (store / "points/c/7").write_bytes(b"")
    problems = verify_store(str(store), quick=True)[1]
    for said in ("n_boxes/c/0 is missing", "points/c/7 is no object", "features/c/0/0/0 has ",
                 "K/zarr.json is damaged"):  # fmt: skip
        assert sum(said in problem for problem in problems) == 1, said
    assert len(problems) == 4
