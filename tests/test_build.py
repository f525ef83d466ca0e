"""Building in this process: resuming, refusing, and every kind of bad input."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import FAST, TESTS, build_store, tree_bytes
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from occfeat_targets import writer
from occfeat_targets.build import BuildStopped, prepare
from occfeat_targets.config import TargetsConfig
from occfeat_targets.sources.base import SourceError
from occfeat_targets.sources.nuscenes import find_version
from occfeat_targets.store.files import StoreError, zarr_store
from occfeat_targets.store.lease import one_writer
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.settings import ConfigError


def _files(dataroot, channel):
    return sorted((dataroot / "samples" / channel).iterdir())


def _edit_table(dataroot, table, change):
    path = dataroot / "v1.0-mini" / f"{table}.json"
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))


# --- resuming -----------------------------------------------------------------------------------


def test_a_stopped_build_continues_and_ends_byte_for_byte_the_same(
    demo_root, demo_store, tmp_path, monkeypatch
):
    store = tmp_path / "targets.zarr"
    whole_plan = writer.plan
    monkeypatch.setattr(writer, "plan", lambda *args: whole_plan(*args)[:1])
    with pytest.raises(StoreError, match="1 of 2 blocks are not done"):
        build_store(demo_root, store)
    with pytest.raises(StoreError, match="not finished"):
        open_store(store)
    first_block = (store / "features" / "c" / "0" / "0" / "0").stat().st_mtime_ns
    (store / "features" / "c" / "0" / "0" / "0.abc.partial").write_bytes(b"torn")
    monkeypatch.undo()
    build_store(demo_root, store)
    assert (store / "features" / "c" / "0" / "0" / "0").stat().st_mtime_ns == first_block
    assert tree_bytes(store) == tree_bytes(demo_store)


def test_a_block_without_its_marker_is_done_again(demo_root, demo_store, tmp_path, monkeypatch):
    """Killed between arrays and marker: the arrays alone prove nothing."""
    store = tmp_path / "targets.zarr"
    monkeypatch.setattr(writer, "_write_marker", lambda *args: None)
    with pytest.raises(StoreError, match="2 of 2 blocks are not done"):
        build_store(demo_root, store)
    monkeypatch.undo()
    build_store(demo_root, store)
    assert tree_bytes(store) == tree_bytes(demo_store)


def test_killed_while_the_arrays_are_created(demo_root, demo_store, tmp_path, monkeypatch):
    store = tmp_path / "targets.zarr"
    create = zarr.Group.create_array

    def create_three(self, name, **arguments):
        if name == "token":
            raise KeyboardInterrupt
        return create(self, name, **arguments)

    monkeypatch.setattr(zarr.Group, "create_array", create_three)
    with pytest.raises(KeyboardInterrupt):
        build_store(demo_root, store)
    monkeypatch.undo()
    build_store(demo_root, store)
    assert tree_bytes(store) == tree_bytes(demo_store)


def test_a_finished_build_is_left_alone(demo_root, demo_store, tmp_path):
    store = Path(shutil.copytree(demo_store, tmp_path / "targets.zarr"))
    before = {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()}
    assert writer.is_complete(str(store))
    (store / "features" / "zarr.json.1.partial").write_bytes(b"")
    build_store(demo_root, store)
    assert not list(store.rglob("*.partial"))
    assert tree_bytes(store) == tree_bytes(demo_store)
    assert before.keys() == {p for p in store.rglob("*") if p.is_file()}


def test_other_settings_refuse_to_continue_and_show_the_difference(demo_root, demo_store, tmp_path):
    store = shutil.copytree(demo_store, tmp_path / "targets.zarr")
    with pytest.raises(StoreError) as error:
        build_store(demo_root, store, "lidar.near_m=1.0", "images.quality=90")
    assert "config.images.quality: 95 -> 90" in str(error.value)
    assert "config.lidar.near_m: 2.2 -> 1.0" in str(error.value)
    assert "--overwrite" in str(error.value)
    assert tree_bytes(store) == tree_bytes(demo_store)


def test_another_teacher_behind_the_same_name_refuses(demo_root, tmp_path, monkeypatch):
    store = tmp_path / "targets.zarr"
    whole_plan = writer.plan
    monkeypatch.setattr(writer, "plan", lambda *args: whole_plan(*args)[:1])
    with pytest.raises(StoreError):
        build_store(demo_root, store)
    monkeypatch.undo()
    described = writer.describe_teacher
    monkeypatch.setattr(
        writer, "describe_teacher", lambda config: described(config) | {"weights": "other"}
    )
    with pytest.raises(StoreError, match="teacher.weights: none -> other"):
        build_store(demo_root, store)


@pytest.mark.parametrize("table", ["ego_pose", "sample_annotation", "splits"])
def test_changed_tables_refuse_to_continue(dataroot, tmp_path, monkeypatch, table):
    """Old blocks with new calibration, boxes or splits would be silently wrong."""
    store = tmp_path / "targets.zarr"
    whole_plan = writer.plan
    monkeypatch.setattr(writer, "plan", lambda *args: whole_plan(*args)[:1])
    with pytest.raises(StoreError, match="blocks are not done"):
        build_store(dataroot, store)
    monkeypatch.undo()
    if table == "splits":
        scenes = json.loads((dataroot / "v1.0-mini" / "scene.json").read_text())
        own = {"a": [s["name"] for s in scenes[:1]], "b": [s["name"] for s in scenes[1:]]}
        (dataroot / "v1.0-mini" / "splits.json").write_text(json.dumps(own))
    else:
        _edit_table(dataroot, table, lambda rows: rows[0]["translation"].__setitem__(0, 7.0))
    with pytest.raises(StoreError, match="records_sha256"):
        build_store(dataroot, store)


def test_a_task_that_outlives_its_client_leaves_a_newer_store_alone(demo_root, tmp_path):
    store = tmp_path / "targets.zarr"
    config = TargetsConfig.load(None, [*FAST, "images.quality=60"])
    source = prepare(demo_root, str(store), None, config, overwrite=False)
    teacher = writer.describe_teacher(config)
    writer.begin(str(store), config, source, overwrite=False)
    writer.set_teacher(str(store), config, teacher)
    old_job = writer.plan(str(store), config, source.records, teacher, skip=False)[0]
    build_store(demo_root, store, overwrite=True)
    newer = tree_bytes(store)
    with pytest.raises(StoreError, match="replaced by a store with other settings"):
        writer.write_block(old_job)
    assert tree_bytes(store) == newer


def test_tokens_that_do_not_fit_are_refused_at_once(dataroot, tmp_path):
    def rename(rows):
        for row in rows:
            for key in ("token", "sample_token", "first_sample_token", "last_sample_token"):
                if row.get(key) == old:
                    row[key] = "sample-1"
            for key in ("next", "prev"):
                if row.get(key) == old:
                    row[key] = "sample-1"

    old = json.loads((dataroot / "v1.0-mini" / "sample.json").read_text())[0]["token"]
    for table in ("sample", "sample_data", "sample_annotation", "scene"):
        _edit_table(dataroot, table, rename)
    with pytest.raises(SourceError, match="sample sample-1: a sample token must be 32 hex digits"):
        build_store(dataroot, tmp_path / "targets.zarr")


def test_odd_characters_in_the_path(demo_root, demo_store, tmp_path):
    store = tmp_path / "run[1]?*" / "targets.zarr"
    build_store(demo_root, store)
    assert tree_bytes(store) == tree_bytes(demo_store)


def test_a_worker_with_other_weights_refuses(demo_root, tmp_path, monkeypatch):
    described = writer.describe_teacher
    monkeypatch.setattr(
        writer, "describe_teacher", lambda config: described(config) | {"weights": "other"}
    )
    with pytest.raises(BuildStopped, match="this worker's teacher differs .* weights: other"):
        build_store(demo_root, tmp_path / "targets.zarr")


def test_overwrite_starts_again_even_after_a_kill_in_mid_deletion(
    demo_root, demo_store, tmp_path, monkeypatch
):
    store = Path(shutil.copytree(demo_store, tmp_path / "real.zarr"))
    link = tmp_path / "targets.zarr"
    link.symlink_to(store)
    beside = Path(shutil.copytree(demo_store, tmp_path / "targets.zarr.deleting"))
    remove = LocalFileSystem.rm

    def killed(self, paths, **more):
        remove(self, paths[::2], **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalFileSystem, "rm", killed)
    with pytest.raises(KeyboardInterrupt):
        build_store(demo_root, link, "images.quality=50", overwrite=True)
    with pytest.raises(StoreError, match="is not finished"):
        open_store(store)
    monkeypatch.undo()
    build_store(demo_root, link, "images.quality=50")
    build_store(demo_root, tmp_path / "fresh.zarr", "images.quality=50")
    assert tree_bytes(store) == tree_bytes(tmp_path / "fresh.zarr")
    assert link.is_symlink() and tree_bytes(beside) == tree_bytes(demo_store)


def test_files_of_others_that_are_partial_are_left_alone(demo_root, tmp_path):
    mine = tmp_path / "targets.zarr" / "movie.partial"
    mine.parent.mkdir()
    mine.write_text("precious")
    with pytest.raises(StoreError, match="is not an occfeat-targets store"):
        build_store(demo_root, mine.parent)
    assert mine.read_text() == "precious"


def test_two_builds_of_one_store_at_once(demo_root, demo_store, tmp_path):
    """The second is refused in one sentence, the first ends as if it had been alone."""
    code = """if True:
        import sys
        from conftest import build_store
        from occfeat_targets.build import BuildStopped
        from occfeat_targets.store.files import StoreError
        try:
            build_store(*sys.argv[1:])
        except StoreError as error:
            sys.exit(str(error))
    """
    command = [sys.executable, "-c", code, str(demo_root), str(tmp_path / "targets.zarr")]
    quiet = {"cwd": TESTS, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **quiet) for _ in range(2)]
    said = [process.communicate(timeout=300)[1].splitlines()[-1:] for process in both]
    for process, line, other in zip(both, said, both[::-1], strict=True):
        assert process.returncode == 0 or f"process {other.pid} on" in line[0]
    build_store(demo_root, tmp_path / "targets.zarr")
    assert tree_bytes(tmp_path / "targets.zarr") == tree_bytes(demo_store)


def test_a_build_that_holds_the_store_keeps_others_out(demo_root, demo_store, tmp_path):
    link = tmp_path / "link.zarr"
    link.symlink_to(tmp_path / "targets.zarr")
    with (
        one_writer(str(tmp_path / "targets.zarr")),
        pytest.raises(
            StoreError, match=rf"process {os.getpid()} on .* is building .*link.zarr now"
        ),
    ):
        build_store(demo_root, link)
    build_store(demo_root, tmp_path / "targets.zarr")
    assert tree_bytes(tmp_path / "targets.zarr") == tree_bytes(demo_store)


def test_foreign_directories_are_never_touched(demo_root, tmp_path):
    place = tmp_path / "thesis"
    place.mkdir()
    (place / "chapter1.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(StoreError, match="not an occfeat-targets store"):
            build_store(demo_root, place, overwrite=overwrite)
    assert (place / "chapter1.tex").read_text() == "precious"


def test_a_store_of_another_format_version_refuses(demo_root, demo_store, tmp_path):
    store = shutil.copytree(demo_store, tmp_path / "targets.zarr")
    zarr.open_group(zarr_store(store, read_only=False), mode="r+").attrs["format_version"] = 99
    with pytest.raises(StoreError, match="format version 99, this program writes 2"):
        build_store(demo_root, store)


# --- bad input found before any work ------------------------------------------------------------


def test_all_faults_are_listed_at_once_and_nothing_is_built(dataroot, tmp_path):
    lidar = _files(dataroot, "LIDAR_TOP")
    lidar[0].unlink()
    lidar[1].write_bytes(lidar[1].read_bytes()[:-7])
    images = _files(dataroot, "CAM_FRONT")
    images[0].unlink()
    images[1].write_bytes(b"not a jpeg")
    Image.new("RGB", (640, 480)).save(_files(dataroot, "CAM_BACK")[2])
    store = tmp_path / "targets.zarr"
    with pytest.raises(SourceError) as error:
        build_store(dataroot, store)
    text = str(error.value)
    assert "5 faults in the dataroot" in text
    assert f"{lidar[0]} is missing" in text
    assert f"{lidar[1]} is truncated" in text
    assert f"{images[0]} is missing" in text
    assert f"{images[1]} is not a readable JPEG" in text
    assert "is 480x640, its record says 900x1600" in text
    assert text.count("scene-") == text.count("sample ") == 5
    assert not store.exists()


@pytest.mark.parametrize("table", ["calibrated_sensor", "ego_pose", "ragged"])
def test_singular_calibration_is_refused(dataroot, tmp_path, table):
    def spoil(rows):
        row = next(r for r in rows if r.get("camera_intrinsic", True))
        if table == "ragged":
            row["camera_intrinsic"] = [[1, 0], [0, 1]]
        elif table == "calibrated_sensor":
            row["camera_intrinsic"][1] = [0, 0, 0]
        else:
            row["rotation"] = [0, 0, 0, 0]

    _edit_table(dataroot, "ego_pose" if table == "ego_pose" else "calibrated_sensor", spoil)
    messages = {
        "ego_pose": "zero rotation",
        "ragged": "calibrated_sensor.*camera_intrinsic.0: List should have at least 3",
    }
    message = messages.get(table, "CAM_.*camera_intrinsic is singular")
    with pytest.raises(SourceError, match=message):
        build_store(dataroot, tmp_path / "targets.zarr")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["frames.scenes=[scene-0062]"], "no scene scene-0062 in v1.0-mini; there are scene-00"),
        (["frames.splits=[train]"], "no split train in v1.0-mini; there are mini_train, mini_val"),
        (["frames.splits=[mini_val]", "frames.scenes=[scene-0061]"], "no keyframes left"),
        (["teacher.input_size=[250, 448]"], r"\[250, 448\] must be multiples of the patch size 14"),
    ],
)
def test_impossible_selections_and_sizes(demo_root, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        build_store(demo_root, tmp_path / "targets.zarr", *overrides)


def test_a_teacher_that_can_t_be_loaded_begins_and_overwrites_nothing(
    demo_root, demo_store, tmp_path
):
    store = tmp_path / "targets.zarr"
    with pytest.raises(ConfigError):
        build_store(demo_root, store, "teacher.input_size=[250, 448]")
    assert not store.exists()
    shutil.copytree(demo_store, store)
    with pytest.raises(ConfigError):
        build_store(demo_root, store, "teacher.input_size=[250, 448]", overwrite=True)
    assert tree_bytes(store) == tree_bytes(demo_store)


def test_a_store_without_its_teacher_does_not_bind_the_next_try(demo_root, demo_store, tmp_path):
    """Killed right after its beginning."""
    store = tmp_path / "targets.zarr"
    config = TargetsConfig.load(None, [*FAST, "images.quality=50"])
    dataset = prepare(demo_root, str(store), None, config, overwrite=False)
    writer.begin(str(store), config, dataset, overwrite=False)
    build_store(demo_root, store)
    assert tree_bytes(store) == tree_bytes(demo_store)


def test_unknown_version_names_what_is_there(demo_root, tmp_path):
    with pytest.raises(SourceError, match=r"no version v1.0-test in .*; found v1.0-mini"):
        find_version(demo_root, "v1.0-test")
    with pytest.raises(SourceError, match="not a nuScenes dataroot"):
        find_version(tmp_path, None)
    with pytest.raises(SourceError, match="no such directory"):
        find_version(tmp_path / "nowhere", None)
    shutil.copytree(demo_root / "v1.0-mini", tmp_path / "v1.0-mini")
    shutil.copytree(demo_root / "v1.0-mini", tmp_path / "v1.0-trainval")
    with pytest.raises(SourceError, match="choose one with --version"):
        find_version(tmp_path, None)


def test_broken_tables_are_named(dataroot, tmp_path):
    (dataroot / "v1.0-mini" / "ego_pose.json").unlink()
    with pytest.raises(SourceError, match="nuscenes-devkit cannot load"):
        build_store(dataroot, tmp_path / "targets.zarr")


def test_missing_map_expansion_is_refused_when_required(dataroot, tmp_path):
    shutil.rmtree(dataroot / "maps" / "expansion")
    with pytest.raises(SourceError, match="missing map expansion: .*map.mode=never"):
        build_store(dataroot, tmp_path / "targets.zarr")
    build_store(dataroot, tmp_path / "targets.zarr", "map.mode=auto", "frames.limit=1")
    assert "map" not in open_store(tmp_path / "targets.zarr").frame(0)


def test_a_broken_map_expansion_names_the_file(dataroot, tmp_path):
    (path,) = (dataroot / "maps" / "expansion").iterdir()
    path.write_text("{}")
    with pytest.raises(SourceError, match=f"{path.name}: not a nuScenes map expansion"):
        build_store(dataroot, tmp_path / "targets.zarr")


def test_scenes_without_an_official_split_need_a_splits_file(dataroot, tmp_path):
    names = []

    def rename(rows):
        for row in rows:
            row["name"] = f"my-{row['name']}"
            names.append(row["name"])

    _edit_table(dataroot, "scene", rename)
    with pytest.raises(SourceError, match="in no split of v1.0-mini: my-scene"):
        build_store(dataroot, tmp_path / "targets.zarr")
    own = {"train": names[:1], "val": names[1:]}
    (dataroot / "v1.0-mini" / "splits.json").write_text(json.dumps(own))
    build_store(dataroot, tmp_path / "targets.zarr")
    store = open_store(tmp_path / "targets.zarr")
    assert {store.split(i) for i in range(4)} == {"train", "val"}


# --- bad input found on the way -----------------------------------------------------------------


def _truncate(path):
    path.write_bytes(path.read_bytes()[:30_000])


def _nan_points(path):
    points = np.fromfile(path, dtype="<f4")
    points[7] = np.nan
    points.tofile(path)


def _hole(path):
    content = bytearray(path.read_bytes())
    content[40_000:44_096] = bytes(4096)
    path.write_bytes(content)


SPOILED = {
    "jpeg with a lost disk block": ("CAM_BACK", _hole, "has a hole of zero bytes"),
    "truncated jpeg": ("CAM_FRONT", _truncate, "cannot decode the JPEG"),
    "nan points": ("LIDAR_TOP", _nan_points, "has 1 points with NaN"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_bad_frame_stops_the_build_and_a_rerun_continues(dataroot, demo_store, tmp_path, kind):
    channel, spoil, message = SPOILED[kind]
    bad = _files(dataroot, channel)[0]
    good = bad.read_bytes()
    spoil(bad)
    store = tmp_path / "targets.zarr"
    with pytest.raises(BuildStopped) as error:
        build_store(dataroot, store)
    assert message in str(error.value)
    assert str(bad) in str(error.value)
    assert "scene-" in str(error.value) and "sample " in str(error.value)
    bad.write_bytes(good)
    build_store(dataroot, store)
    assert tree_bytes(store) == tree_bytes(demo_store)


@pytest.mark.parametrize("kind", SPOILED)
def test_skip_finishes_the_others_and_can_be_mended_later(dataroot, demo_store, tmp_path, kind):
    channel, spoil, message = SPOILED[kind]
    bad = _files(dataroot, channel)[0]
    good = bad.read_bytes()
    spoil(bad)
    store = tmp_path / "targets.zarr"
    failed = build_store(dataroot, store, skip_errors=True)
    assert len(failed) == 1
    (index,) = failed
    assert message in failed[index]
    opened = open_store(store)
    assert opened.per_frame["n_voxels"][index] == -1
    assert (np.delete(opened.per_frame["n_voxels"], index) > 0).all()
    with pytest.raises(StoreError, match=f"frame {index} .* has no targets"):
        opened.frame(index)
    bad.write_bytes(good)
    assert build_store(dataroot, store) == {}
    arrays = tree_bytes(store)
    expected = tree_bytes(demo_store)
    assert arrays.keys() == expected.keys()
    assert arrays == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lidar.max_points=2000", "holds 3[0-9]+ lidar returns: raise lidar.max_points"),
        ("boxes.max_boxes=1", "[0-9]+ boxes: raise boxes.max_boxes"),
    ],
)
def test_no_room_is_an_error_before_any_work_never_a_cut(demo_root, tmp_path, override, message):
    with pytest.raises(SourceError, match=message):
        build_store(demo_root, tmp_path / "targets.zarr", override)


def test_features_that_are_not_finite_stop_the_build(demo_root, tmp_path):
    with pytest.raises(BuildStopped, match="scene-.*teacher features are not finite"):
        build_store(demo_root, tmp_path / "targets.zarr", "teacher.name=teachers:NotFinite")


def test_a_teacher_that_breaks_its_promise_stops_everything(demo_root, tmp_path):
    with pytest.raises(BuildStopped, match="returned shape .* promised"):
        build_store(demo_root, tmp_path / "targets.zarr", "teacher.name=teachers:WrongShape")
    with pytest.raises(ConfigError, match="cannot load the teacher 'teachers:Nobody'"):
        build_store(demo_root, tmp_path / "t2.zarr", "teacher.name=teachers:Nobody")


def test_an_unwritable_place_is_refused_before_any_work(demo_root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write .*file/targets.zarr"):
        build_store(demo_root, tmp_path / "file" / "targets.zarr")


def test_disk_full_keeps_what_is_finished(demo_root, demo_store, tmp_path, monkeypatch):
    """The disk fills up while the second block is written."""
    store = tmp_path / "targets.zarr"
    original = zarr.storage.LocalStore.set

    async def full(self, key, value, *args, **kwargs):
        if key == "images/c/1/0":
            raise OSError(errno.ENOSPC, "No space left on device")
        return await original(self, key, value, *args, **kwargs)

    monkeypatch.setattr(zarr.storage.LocalStore, "set", full)
    with pytest.raises(BuildStopped, match="No space left on device; what is finished is kept"):
        build_store(demo_root, store)
    assert len(list((store / "build" / "blocks").iterdir())) == 1
    monkeypatch.undo()
    build_store(demo_root, store)
    assert tree_bytes(store) == tree_bytes(demo_store)


def test_images_too_large_for_their_room_name_the_setting(demo_root, tmp_path, monkeypatch):
    monkeypatch.setattr("occfeat_targets.outputs.images.encode_jpeg", lambda *args: bytes(200_000))
    with pytest.raises(BuildStopped, match="1200000 bytes of JPEG.*lower images.quality"):
        build_store(demo_root, tmp_path / "targets.zarr")
