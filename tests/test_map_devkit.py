"""The devkit's raster of the map: equal to nuscenes-devkit's own, cell for cell."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import build_store, targets_of, tree_bytes
from pyquaternion import Quaternion
from tiny_store import make_tiny_store

from occfeat_targets.build import read_dataset
from occfeat_targets.config import TargetsConfig
from occfeat_targets.outputs.map_devkit import MapDevkit, devkit_masks
from occfeat_targets.sources.base import MapLayers, Shapes, SourceError
from occfeat_targets.sources.nuscenes import NuScenesSource
from occfeat_targets.sources.nuscenes_map import AREAS, LINES, MAP_CLASSES
from occfeat_targets.store.files import open_group
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import open_store
from occfeat_targets.teachers.base import NoTeacher
from occfeat_targets.verify import recompute_frames, verify_store
from occfeat_train.data.dataset import FrameDataset
from occfeat_train.tasks.map import MapSegmentation

cv2 = pytest.importorskip("cv2")
nuscenes = pytest.importorskip("nuscenes.nuscenes")
map_api = pytest.importorskip("nuscenes.map_expansion.map_api")

STORED = "outputs={map_devkit: {}}"
SQUARE = VoxelGrid((-50.0, 50.0, 200), (-50.0, 50.0, 200), (-1.0, 1.0, 2))
UNEVEN = VoxelGrid((-40.0, 48.0, 176), (-32.0, 30.0, 100), (-1.0, 1.0, 2))
LONG = VoxelGrid((-44.0, 44.0, 176), (-31.0, 31.0, 100), (-1.0, 1.0, 2))
"""Centred, for equal patches to the last bit: where a line is cut off, that decides its cell."""
NAME = "boston-seaport"


@pytest.fixture
def devkit(monkeypatch):
    """Masks (K, X, Y) by the devkit's ``get_map_mask``, mended where it crashes under shapely 2."""

    def mask_for_lines(lines, mask):
        for line in getattr(lines, "geoms", [lines]):
            cv2.polylines(mask, [np.asarray(line.coords, np.int32)], False, 1, 2)
        return mask

    monkeypatch.setattr(map_api.NuScenesMapExplorer, "mask_for_lines", staticmethod(mask_for_lines))

    def masks(city, pose, grid):
        rotation = Quaternion(pose["rotation"]).rotation_matrix
        heading = math.atan2(rotation[1, 0], rotation[0, 0])
        (x_lo, x_hi, X), (y_lo, y_hi, Y) = grid.x, grid.y
        ahead, left = (x_lo + x_hi) / 2, (y_lo + y_hi) / 2
        x = pose["translation"][0] + ahead * math.cos(heading) - left * math.sin(heading)
        y = pose["translation"][1] + ahead * math.sin(heading) + left * math.cos(heading)
        patch, layers = (x, y, y_hi - y_lo, x_hi - x_lo), [*AREAS.values(), *LINES.values()]
        found = city.get_map_mask(patch, math.degrees(heading), layers, (Y, X))
        return found.transpose(0, 2, 1)  # its rows are y

    return masks


def poses(root):
    """Ego pose of every keyframe's lidar, by sample token."""
    nusc = nuscenes.NuScenes("v1.0-mini", str(root), verbose=False)
    lidars = {s["token"]: nusc.get("sample_data", s["data"]["LIDAR_TOP"]) for s in nusc.sample}
    return {token: nusc.get("ego_pose", row["ego_pose_token"]) for token, row in lidars.items()}


@pytest.mark.parametrize("grid", [SQUARE, UNEVEN], ids=["square", "uneven"])
def test_demo_frames_are_the_devkits(demo_root, devkit, grid):
    overrides = [f"grid.{axis}={list(getattr(grid, axis))}" for axis in "xyz"]
    config = TargetsConfig.load(None, ["teacher.name=none", STORED, *overrides])
    dataset = read_dataset(demo_root, None, config)
    city, pose = map_api.NuScenesMap(str(demo_root), NAME), poses(demo_root)
    painted = np.zeros(len(MAP_CLASSES), dtype=int)
    for record in dataset.records:
        found = targets_of(record, dataset, config, NoTeacher())["map_devkit"]
        wanted = devkit(city, pose[record.token], grid)
        assert found.dtype == np.uint8 and np.count_nonzero(found != wanted) == 0
        painted += found.any(axis=(1, 2))
    assert (painted[[0, 1, 4]] > 0).all()


def test_an_awkward_map_is_the_devkits(demo_root, devkit, tmp_path):
    """Holes that erase what is below, polygons that cross themselves, lines that come back."""
    root = Path(shutil.copytree(demo_root / "maps", tmp_path / "maps")).parent
    path = root / "maps" / "expansion" / f"{NAME}.json"
    path.write_text(json.dumps(awkward(json.loads(path.read_text()), np.random.default_rng(0))))
    city, layers = map_api.NuScenesMap(str(root), NAME), NuScenesSource().read_map(str(path))
    assert not all(city.extract_polygon(r["polygon_token"]).is_valid for r in city.walkway)
    rng = np.random.default_rng(1)
    for grid in (SQUARE, LONG) * 6:
        turn = Quaternion(axis=[0, 0, 1], angle=rng.uniform(-4, 4))
        tilt = Quaternion(axis=[*rng.normal(size=2), 0], angle=0.03)
        pose = {"rotation": (turn * tilt).elements, "translation": [*rng.uniform(480, 520, 2), 1]}
        global_T_ego = (turn * tilt).transformation_matrix
        global_T_ego[:3, 3] = pose["translation"]
        found = devkit_masks(layers, global_T_ego, grid)
        wanted = devkit(city, pose, grid)
        for name, mask in zip(MAP_CLASSES, wanted, strict=True):
            assert np.count_nonzero(found[name] != mask) == 0 and mask.any(), name


def awkward(tables, rng):
    """A map around (500, 500): stars of 9 corners, of which walkways' cross themselves."""
    emptied = {key: [] for key, value in tables.items() if isinstance(value, list)}
    tables |= emptied | {"canvas_edge": tables["canvas_edge"]}

    def nodes(points):
        first = len(tables["node"])
        new = [{"token": f"n{first + i}", "x": x, "y": y} for i, (x, y) in enumerate(points)]
        tables["node"] += new
        return [row["token"] for row in new]

    def polygon(crossing):
        centre, angles = (
            rng.uniform(440, 560, 2),
            np.arange(9) * np.pi / 4.5 + rng.uniform(0, 0.6, 9),
        )
        star = rng.uniform(12, 45, (9, 1)) * np.column_stack([np.cos(angles), np.sin(angles)])
        order = rng.permutation(9) if crossing else slice(None)
        holes = [{"node_tokens": nodes(centre + star * 0.4)}, {"node_tokens": []}]
        token = f"p{len(tables['polygon'])}"
        outer = nodes((centre + star)[order])
        row = {"token": token, "exterior_node_tokens": outer, "holes": holes}
        tables["polygon"].append(row)
        return token

    for layer in AREAS.values():
        for i in range(6):
            token = polygon(crossing=layer == "walkway" and i % 2)
            key = {"polygon_token": token, "polygon_tokens": [token]}
            tables[layer].append({"token": f"{layer}{i}", **key})
    for i in range(8):
        zigzag = np.column_stack([np.linspace(400, 600, 7), rng.uniform(400, 600, 7)])
        line = {"token": f"l{i}", "node_tokens": nodes(zigzag[:, ::-1] if i % 2 else zigzag)}
        tables["line"].append(line)
        row = {"token": f"d{i}", "line_token": f"l{i}", "road_segment_token": None}
        tables["road_divider"].append(row)
    return tables


def test_what_crosses_itself_is_left_out_but_of_roads():
    """Of those the devkit makes something if shapely does, and else fails too."""
    bow = Shapes([[np.array([[0.0, 0], [20, 20], [20, 0], [0, 20]])]])
    found = devkit_masks(MapLayers({"sidewalk": bow}, {}), np.eye(4), SQUARE)
    assert not found["sidewalk"].any()
    layout = SimpleNamespace(grid=SQUARE, map_classes=("road",))
    record = SimpleNamespace(map_path="city.json", global_T_ego=np.eye(4))
    frame = SimpleNamespace(map=MapLayers({"road": bow}, {}), record=record)
    with pytest.raises(ValueError, match="city.json: a road crosses itself.*leave map_devkit out"):
        MapDevkit(MapDevkit.Settings(), layout).compute(frame)


def test_a_store_has_them_if_asked_and_is_else_the_same(demo_root, demo_store, tmp_path):
    build_store(demo_root, tmp_path / "with.zarr", STORED)
    with_it, without = open_store(tmp_path / "with.zarr"), open_store(demo_store)
    assert with_it.attrs["arrays"].keys() - without.attrs["arrays"].keys() == {"map_devkit"}
    frame = with_it.frame(0)
    assert frame["map_devkit"].shape == frame["map"].shape
    assert frame["map_devkit"].sum() > frame["map"].sum() > 0  # borders count
    assert verify_store(str(tmp_path / "with.zarr")) == (4, [])
    assert recompute_frames(str(tmp_path / "with.zarr"), demo_root, 2, seed=0) == []
    assert exec_of_docs(tmp_path / "with.zarr").keys() == {*MAP_CLASSES}
    ours, theirs = (tree_bytes(path) for path in (tmp_path / "with.zarr", demo_store))
    for name in theirs.keys() - {"zarr.json"}:
        if not name.startswith("checksums"):
            assert ours[name] == theirs[name], name


def exec_of_docs(store):
    """What docs/protocols.md prints, of a store."""
    page = (Path(__file__).parent.parent / "docs" / "protocols.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = {}
    exec(code.replace("targets.zarr", str(store)), names)
    assert ((names["iou"] > 0.5) & (names["iou"] < 1)).all()
    return dict(zip(names["store"].attrs["map_classes"], names["iou"], strict=True))


def test_a_dataset_without_a_map_is_told_so(demo_root, tmp_path):
    with pytest.raises(SourceError, match="has no map for the output map_devkit: leave that out"):
        build_store(demo_root, tmp_path / "no.zarr", STORED, "map.mode=never")
    assert not (tmp_path / "no.zarr").exists()


def test_the_task_has_its_truth_under_both_protocols(tmp_path):
    def task_of(name, *settings):
        store = make_tiny_store(tmp_path / name, settings=settings, with_map=True)
        return MapSegmentation(MapSegmentation.Settings(), open_store(store), 4, turned=False)

    plain, task = task_of("without.zarr"), task_of("with.zarr", STORED)
    assert (plain.protocols, plain.eval_arrays) == (("ego",), ("map",))
    assert task.protocols == ("ego", "devkit") and task.arrays == ("map",)
    group = open_group(tmp_path / "with.zarr", "r+")
    group["map_devkit"][:] = 1 - group["map"][:]
    frames = FrameDataset(str(tmp_path / "with.zarr"), [0, 5], task.eval_arrays)
    batch = frames.collate([frames[0], frames[1]])
    (ours, counted), (theirs, _) = task.truth(batch, "ego"), task.truth(batch, "devkit")
    assert torch.equal(ours, batch["map"]) and torch.equal(theirs, 1 - ours)
    assert counted.shape == (2, 16, 16) and counted.all()
