"""A teacher, a dataset and an output, each added from outside of the package in one file.

The files are in ``toys``; nothing in the package knows of them.
"""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import reference
import torch
import two_camera_drive
from click.testing import CliRunner
from conftest import TESTS, build_store, reseal, tree_bytes
from PIL import Image
from teachers import PatchMeans

from occfeat_targets.build import BuildStopped
from occfeat_targets.cli import main
from occfeat_targets.config import TargetsConfig
from occfeat_targets.frame import layout_of, make_outputs
from occfeat_targets.sources.base import SourceError
from occfeat_targets.store.files import open_group
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.schema import dequantise
from occfeat_targets.verify import verify_store


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


NAMES = ("two_cameras:TwoCameras", "heights:Heights", "constant:Constant", "teachers:PatchMeans")
PLUGINS = [part for name in NAMES for part in ("--plugin", name)]

# --- a dataset ------------------------------------------------------------------------------------


def test_a_store_of_another_dataset_says_what_it_has(two_camera_store):
    store = open_store(two_camera_store)
    wanted = {
        "cameras": ["ahead", "left"],
        "box_classes": ["person", "tram"],
        "vehicle_classes": ["tram"],
        "map_classes": ["platform", "rail"],
        "scenes": ["morning", "noon", "evening"],
        "splits": ["train", "val"],
        "source": {"dataset": "a drive", "version": "2", "reader": "1"},
    }
    assert {key: store.attrs[key] for key in wanted} == wanted
    assert [store.split(i) for i in range(len(store))] == ["train"] * 4 + ["val"] * 2
    assert store.specs["K"].axes == {"camera": 2, "uvw": 3, "xyz": 3}
    assert store.specs["feature_cameras"].dtype == "uint8"
    frame = store.frame(0)
    assert [Image.open(io.BytesIO(jpeg)).size for jpeg in frame["images"]] == [(96, 64)] * 2


def test_commands_work_on_it(two_camera_store, drive, toys, tmp_path):
    again = ("--recompute", 6, "--dataroot", drive, *PLUGINS)
    said = run("verify", two_camera_store, *again)
    assert "6 frames read, 6 recomputed, 0 problems" in said
    said = run("info", two_camera_store)
    assert "a drive 2" in said and "platform, rail" in said and "heights:Heights" in said
    run("view", two_camera_store, *PLUGINS, "--frame", 3, "--out", tmp_path / "view.png")
    assert (tmp_path / "view.png").stat().st_size > 20_000
    source = ("--set", "source=two_cameras:TwoCameras", "--set", "lidar.max_points=700")
    assert "2, 3 scenes, 6 keyframes: ok" in run("check", drive, *source)
    run("corrupt", drive, two_camera_store, *PLUGINS, tmp_path, "--only", "fog-mid", "--workers", 0,
        "--split", "train")  # fmt: skip
    assert len(open_store(tmp_path / "fog-mid.zarr")) == 4


def test_processes_find_it_too(two_camera_store, drive, toys, tmp_path):
    """Workers import a plug-in by its name, from PYTHONPATH."""
    store = tmp_path / "targets.zarr"
    command = [sys.executable, "-m", "occfeat_targets.cli", "build", drive, store]
    command += ["--workers", "1", *two_camera_drive.options()]
    path = os.pathsep.join([toys, str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tree_bytes(store) == tree_bytes(two_camera_store)


def cameras_of(drive):
    for name in ("ahead", "left"):
        camera = drive["cameras"][name]
        height, width = camera["size"]
        yield np.linalg.inv(camera["ego_T_cam"]), np.array(camera["K"]), width, height


@pytest.mark.parametrize("number", [0, 3])
def test_occupancy_cameras_and_features_are_the_loops(two_camera_store, drive, number):
    tables = json.loads((drive / "drive.json").read_text())
    row = tables["frames"][number]
    frame, grid = open_store(two_camera_store).frame(number), open_store(two_camera_store).grid
    bounds = (grid.x, grid.y, grid.z)
    ego_T_lidar, points = np.array(tables["ego_T_lidar"], dtype=float), []
    for _, *xyz in np.load(drive / row["lidar"]).astype(np.float32).astype(float).tolist():
        if not (abs(xyz[0]) < 0.5 and abs(xyz[1]) < 0.5):
            points.append(reference.apply(ego_T_lidar, xyz))
    voxels = reference.voxels(points, bounds)
    assert frame["voxel_index"].tolist() == sorted(voxels)
    assert len(voxels) > 100
    images = [Image.open(drive / row["images"][name]).resize((84, 56), Image.Resampling.BILINEAR)
              for name in ("ahead", "left")]  # fmt: skip
    pixels = np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2) / 255
    maps = PatchMeans()(torch.from_numpy(pixels)).numpy()
    features = dequantise(frame["features"], frame["feature_scale"])
    step = frame["feature_scale"].astype(float)
    kinds = set()
    for i, index in enumerate(sorted(voxels)):
        centre, bits, vectors = reference.centre(voxels[index], bounds), 0, []
        for c, camera in enumerate(cameras_of(tables)):
            uv = reference.project(centre, *camera)
            if uv is not None:
                bits |= 1 << c
                vectors.append(reference.bilinear(maps[c], *uv, *camera[2:]))
        assert frame["feature_cameras"][i] == bits
        wanted = sum(vectors) / len(vectors) if vectors else np.zeros(8)
        assert np.abs(features[i] - wanted).max() <= step[i] / 2 + 1e-5
        kinds.add(bits)
    assert kinds == {0, 1, 2, 3}


def test_points_boxes_and_map_are_the_loops(two_camera_store, drive):
    tables = json.loads((drive / "drive.json").read_text())
    store = open_store(two_camera_store)
    bounds, painted = (store.grid.x, store.grid.y, store.grid.z), np.zeros(2)
    for i, row in enumerate(tables["frames"]):
        frame = store.frame(i)
        reflectivity, *xyz = np.load(drive / row["lidar"]).T
        kept = ~((np.abs(xyz[0]) < 0.5) & (np.abs(xyz[1]) < 0.5))
        np.testing.assert_array_equal(frame["points"][:, 3], np.rint(255 * reflectivity[kept]))
        names = [("person", "tram")[c] for c in frame["box_class"]]
        assert names == [box["class"] for box in row["boxes"]]
        boxes = [box["box"] for box in row["boxes"]]
        np.testing.assert_array_equal(frame["boxes"][:, :7], np.array(boxes, np.float32))
        trams = [(x, y, length, width, yaw, 0) for x, y, _, length, width, _, yaw in boxes[:1]]
        np.testing.assert_array_equal(frame["vehicle"], reference.vehicle_mask(trams, bounds))
        assert frame["vehicle"].any()
        ego_T_global = np.linalg.inv(row["global_T_ego"])

        def to_ego(ring, ego_T_global=ego_T_global):
            return [reference.apply(ego_T_global, (x, y, 0.0))[:2] for x, y in ring]

        (platform,), rails = ([to_ego(ring) for ring in tables["map"][name]]
                              for name in ("platform", "rail"))  # fmt: skip
        masks = [
            reference.bev_mask(bounds, lambda x, y, p=platform: reference.in_polygon(x, y, p)),
            reference.bev_mask(
                bounds,
                lambda x, y, r=rails: (
                    min(reference.distance_to_polyline(x, y, a) for a in r) <= 0.75
                ),
            ),
        ]
        np.testing.assert_array_equal(frame["map"], masks)
        painted += frame["map"].any(axis=(1, 2))
    assert (painted == 6).all()


def test_what_is_wrong_with_the_drive_is_told_before_any_work(drive, toys, tmp_path):
    options = two_camera_drive.options
    said = run("build", tmp_path, tmp_path / "s", *options(), code=1)
    assert "holds no drive.json" in said
    said = run("build", drive, tmp_path / "s", *options(source="two_camera:TwoCameras"), code=1)
    assert "cannot load the source 'two_camera:TwoCameras'" in said and "PYTHONPATH" in said
    said = run("build", drive, tmp_path / "s", *options(source="kitti"), code=1)
    assert "no source 'kitti' (known: nuscenes); a plug-in is named package.module:name" in said
    said = run("build", drive, tmp_path / "s", *options(lidar__max_points=500), code=1)
    assert (
        "6 faults in the dataroot" in said
        and "holds 600 lidar returns: raise lidar.max_points" in said
    )
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("image_paths", lambda v: v[:1], r"image_paths has shape \(1,\), should be \(2,\)"),
        ("K", lambda v: v[0], r"K has shape \(3, 3\), should be \(2, 3, 3\)"),
        ("cam_T_ego", lambda v: v[:, :3], r"cam_T_ego has shape \(2, 3, 4\)"),
        ("ego_T_sweep", lambda v: v[0], r"ego_T_sweep has shape \(4, 4\), should be \(1, 4, 4\)"),
        ("sweep_paths", lambda v: (), "sweep_paths is empty"),
        ("image_hw", lambda v: v[0], "image_hw has shape"),
    ],
)
def test_a_source_that_gives_a_wrong_shape_is_told_so(
    drive, toys, tmp_path, monkeypatch, field, change, message
):
    import two_cameras

    made = two_cameras._record

    def spoilt(*arguments):
        record = made(*arguments)
        return dataclasses.replace(record, **{field: change(getattr(record, field))})

    monkeypatch.setattr(two_cameras, "_record", spoilt)
    with pytest.raises(SourceError, match=f"morning, sample .*: {message}"):
        _build(drive, tmp_path / "targets.zarr")


def test_a_vehicle_class_that_is_no_class_is_told_before_any_work(
    drive, toys, tmp_path, monkeypatch
):
    import two_cameras

    read = two_cameras.TwoCameras.read

    def misspelt(*arguments):
        return dataclasses.replace(read(*arguments), vehicle_classes=("tarm",))

    monkeypatch.setattr(two_cameras.TwoCameras, "read", misspelt)
    with pytest.raises(SourceError, match="vehicle_classes that are no box_classes: tarm"):
        _build(drive, tmp_path / "targets.zarr")


def test_lidar_without_intensity_is_told_with_the_file(drive, toys, tmp_path, monkeypatch):
    import two_cameras

    read = two_cameras.TwoCameras.read_lidar
    monkeypatch.setattr(two_cameras.TwoCameras, "read_lidar", lambda *a: read(*a)[:, :3])
    with pytest.raises(BuildStopped, match=r"\.npy: read_lidar gave shape \(\d+, 3\), should be"):
        _build(drive, tmp_path / "targets.zarr")


def _build(drive, store, *more):
    settings = [f"{k}={json.dumps(v)}" for k, v in two_camera_drive.SETTINGS.items()]
    return build_store(drive, store, *settings, *more)


# --- a teacher ------------------------------------------------------------------------------------


def test_a_constant_teacher_gives_constant_features(drive, toys, tmp_path):
    store = tmp_path / "targets.zarr"
    options = two_camera_drive.options(teacher__name="constant:Constant")
    run("build", drive, store, *options, "--workers", 0, "--limit", 2)
    opened = open_store(store)
    described = {key: opened.attrs["teacher"][key] for key in ("name", "dim", "patch_size")}
    assert described == {"name": "constant", "dim": 3, "patch_size": 7}
    frame = opened.frame(1)
    seen = frame["feature_cameras"] > 0
    features = dequantise(frame["features"], frame["feature_scale"])
    assert np.abs(features[seen] - [1, -2, 0.5]).max() <= 2 / 127
    assert seen.any() and not features[~seen].any()
    assert "constant" in run("info", store)
    assert "0 problems" in run("verify", store, "--recompute", 1, "--dataroot", drive, *PLUGINS)


# --- an output ------------------------------------------------------------------------------------


def test_an_outputs_arrays_are_read_like_any_other(two_camera_store, drive):
    store = open_store(two_camera_store)
    tables = json.loads((drive / "drive.json").read_text())
    ego_T_lidar = np.array(tables["ego_T_lidar"], dtype=float)
    bounds = (store.grid.x, store.grid.y, store.grid.z)
    spec = store.specs["heights"]
    assert (spec.rows, spec.dtype, [*spec.axes]) == ("n_voxels", "float32", ["voxel", "low_high"])
    frame = store.read(4, ["heights", "n_below", "voxel_index"])
    wanted = {}
    for _, *xyz in np.load(drive / tables["frames"][4]["lidar"]).astype(np.float32).tolist():
        point = reference.apply(ego_T_lidar, xyz)
        cell = reference.cell(point, bounds)
        if cell is not None and not (abs(xyz[0]) < 0.5 and abs(xyz[1]) < 0.5):
            wanted.setdefault(reference.flat(cell, bounds), []).append(point[2] - 0.5)
    assert frame["voxel_index"].tolist() == sorted(wanted)
    ends = [(min(wanted[index]), max(wanted[index])) for index in sorted(wanted)]
    np.testing.assert_allclose(frame["heights"], ends, atol=1e-6)
    assert frame["n_below"] == sum(low < 0 for low, _ in ends) > 0
    assert store.attrs["config"]["outputs"] == {"heights:Heights": {"ground_m": 0.5}}


def test_an_output_may_be_asked_for_in_a_file_and_its_settings_are_checked(drive, toys, tmp_path):
    settings = tmp_path / "mine.yaml"
    settings.write_text("outputs:\n  heights:Heights:\n    ground_m: 1.0\n")
    config = TargetsConfig.load(settings, ['outputs."heights:Heights".ground_m=2.5'])
    assert config.outputs == {"heights:Heights": {"ground_m": 2.5}}
    wrong = [
        ({"heights:Heights": {"grond_m": 1}}, "did you mean outputs.heights:Heights.ground_m?"),
        ({"heights:Heights": {"ground_m": "low"}}, "outputs.heights:Heights.ground_m must be"),
        ({"heights:Height": {}}, "cannot load the output 'heights:Height'"),
        ({"height": {}}, "no output 'height'"),
    ]
    for outputs, message in wrong:
        said = run(
            "build", drive, tmp_path / "s", *two_camera_drive.options(outputs=outputs), code=1
        )
        assert message in said
    assert not (tmp_path / "s").exists()


def test_verify_calls_an_outputs_check_and_recomputes_it(two_camera_store, drive, toys, tmp_path):
    store = open_store(two_camera_store)
    config = TargetsConfig.of(store.attrs["config"])
    output = make_outputs(config, layout_of(config, store.attrs, 8))[-1]
    frame = store.frame(2)
    assert list(output.check(store, frame)) == []
    spoilt = frame | {"heights": frame["heights"][:, ::-1]}
    assert list(output.check(store, spoilt)) == ["heights: the lowest is above the highest"]

    copy = shutil.copytree(two_camera_store, tmp_path / "targets.zarr")
    array = open_group(copy, "r+")["heights"]
    array[2, 0] = [90.0, 91.0]
    array[3, 1] = np.nextafter(array[3, 1], 100)
    reseal(copy)
    problems = verify_store(str(copy))[1]
    assert problems == [f"{store.describe(2)}: heights leave their voxels"]
    array[2, 0] = frame["heights"][0]
    reseal(copy)
    said = run("verify", copy, "--recompute", 6, "--dataroot", drive, *PLUGINS, code=1)
    assert said.count("heights differs from the recomputed one") == 1
    assert store.describe(3) in said


MISTAKES = {
    "another name": (lambda a: {"height": a["heights"]}, r"Heights gives \['height'\]"),
    "an array forgotten": (lambda a: {"n_below": a["n_below"]}, r"Heights gives \['n_below'\]"),
    "another type": (
        lambda a: a | {"heights": a["heights"].astype(float)},
        r"gives heights as float64 .*, its spec says float32 \{'voxel': 512, 'low_high': 2\}",
    ),
    "another axis": (lambda a: a | {"heights": a["heights"].T}, "gives heights as float32 "),
    "too few rows": (
        lambda a: a | {"heights": a["heights"][1:]},
        "arrays counted by n_voxels differ in their rows: .*'heights'",
    ),
    "a number for each voxel": (lambda a: a | {"n_below": a["heights"][:, 0]}, "gives n_below as"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_an_output_that_breaks_its_word_is_told_so(drive, toys, tmp_path, monkeypatch, kind):
    import heights

    change, message = MISTAKES[kind]
    compute = heights.Heights.compute
    monkeypatch.setattr(heights.Heights, "compute", lambda *args: change(compute(*args)))
    with pytest.raises(BuildStopped, match=f"morning, sample .*: .*{message}"):
        _build(drive, tmp_path / "targets.zarr")
