"""The demo world: devkit-readable, consistent in itself, the same on every run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from pyquaternion import Quaternion

from occfeat_targets.demo_world import make_demo_world, visibility_level, write_atomically
from occfeat_targets.demo_world.render import cast_rays, ground_material, render_camera, sweep
from occfeat_targets.demo_world.scene import Plan, frame_world
from occfeat_targets.demo_world.solids import EGO_ID, intersect, place, side_planes
from occfeat_targets.demo_world.tables import scene_names
from occfeat_targets.demo_world.things import Material, Part, Shape

nuscenes = pytest.importorskip("nuscenes.nuscenes")
# What the fixture demo_root holds (see conftest).
PLAN = Plan(scenes=2, samples=2, seed=0, version="v1.0-mini")
CAMERAS = (
    "CAM_FRONT_LEFT",
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_LEFT",
    "CAM_BACK",
    "CAM_BACK_RIGHT",
)
# Ground materials found inside a drivable area (its paint included), a walkway, a parking area.
ROAD_MATERIALS = (
    Material.ASPHALT,
    Material.CROSSING,
    Material.CROSSING_STRIPE,
    Material.LANE_LINE,
    Material.DIVIDER_LINE,
)
WALKWAY_MATERIALS = (Material.SIDEWALK, Material.KERB)
PARKING_MATERIALS = (Material.PARKING, Material.PARKING_LINE)


@pytest.fixture(scope="session")
def nusc(demo_root):
    """The world as the devkit sees it."""
    return nuscenes.NuScenes("v1.0-mini", str(demo_root), verbose=False)


@pytest.fixture(scope="session")
def worlds():
    """The frozen worlds of all four keyframes, by (scene, sample)."""
    return {
        (scene, sample): frame_world(PLAN, scene, sample)
        for scene in range(2)
        for sample in range(2)
    }


def samples_of(nusc):
    """All samples as (scene, sample, record), in the order of the plan."""
    for index, scene in enumerate(nusc.scene):
        key = scene["first_sample_token"]
        for number in range(scene["nbr_samples"]):
            record = nusc.get("sample", key)
            yield index, number, record
            key = record["next"]


def matrix(record) -> np.ndarray:
    """4 x 4 transform of a devkit record with translation and rotation, by pyquaternion."""
    out = np.eye(4)
    out[:3, :3] = Quaternion(record["rotation"]).rotation_matrix
    out[:3, 3] = record["translation"]
    return out


def sensor_chain(nusc, key, pose_of=None):
    """global_T_sensor and K of a sample_data record, with the ego pose of ``pose_of`` if given."""
    data = nusc.get("sample_data", key)
    pose = nusc.get("ego_pose", nusc.get("sample_data", pose_of or key)["ego_pose_token"])
    calibrated = nusc.get("calibrated_sensor", data["calibrated_sensor_token"])
    return matrix(pose) @ matrix(calibrated), np.array(calibrated["camera_intrinsic"])


def lidar_points(nusc, sample) -> tuple[np.ndarray, np.ndarray]:
    """Stored returns (N, 5), and those outside the ego square in global coordinates (M, 3)."""
    data = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
    points = np.fromfile(Path(nusc.dataroot) / data["filename"], "<f4").reshape(-1, 5)
    far = points[~((np.abs(points[:, 0]) < 2.2) & (np.abs(points[:, 1]) < 2.2))].astype(float)
    pose, _ = sensor_chain(nusc, data["token"])
    return points, far[:, :3] @ pose[:3, :3].T + pose[:3, 3]


# ---------------------------------------------------------------- tables


def test_scene_names_are_official():
    from nuscenes.utils.splits import create_splits_scenes

    splits = create_splits_scenes()
    for version, most, train, val in (
        ("v1.0-mini", 10, "mini_train", "mini_val"),
        ("v1.0-trainval", 64, "train", "val"),
    ):
        for count in range(2, most + 1):
            names = scene_names(version, count)
            held_out = sum(name in splits[val] for name in names)
            assert len(set(names)) == count and held_out >= 1
            assert all(name in splits[train] or name in splits[val] for name in names)
            assert held_out < count and abs(held_out - count / 4) <= 1.5
        with pytest.raises(ValueError, match=f"between 2 .* and {most}"):
            scene_names(version, most + 1)


def test_tables_are_consistent(nusc, demo_root):
    assert [scene["name"] for scene in nusc.scene] == ["scene-0061", "scene-0103"]
    assert len(nusc.category) == 32 and len(nusc.sample) == 4 and len(nusc.sample_data) == 28
    for data in nusc.sample_data:
        path = demo_root / data["filename"]
        assert path.stat().st_size > 0
        if data["fileformat"] == "pcd":
            assert path.stat().st_size % 20 == 0
        else:
            with Image.open(path) as image:
                assert image.size == (1600, 900) == (data["width"], data["height"])
    for table, first in (("sample", 2), ("sample_data", 14), ("sample_annotation", None)):
        records = getattr(nusc, table)
        for record in records:
            if record["next"]:
                assert nusc.get(table, record["next"])["prev"] == record["token"]
        starts = [record for record in records if not record["prev"]]
        assert len(starts) == (first or len(nusc.instance))
    for instance in nusc.instance:
        key, count = instance["first_annotation_token"], 0
        while key:
            last, key, count = key, nusc.get("sample_annotation", key)["next"], count + 1
        assert last == instance["last_annotation_token"] and count == instance["nbr_annotations"]
    for sample in nusc.sample:
        assert set(sample["data"]) == {*CAMERAS, "LIDAR_TOP"}
        times = {
            c: nusc.get("sample_data", key)["timestamp"] - sample["timestamp"]
            for c, key in sample["data"].items()
        }
        assert times["LIDAR_TOP"] == 0 and times["CAM_FRONT_LEFT"] < -43_000
        assert all(-44_000 < times[c] < -400 for c in CAMERAS)


def test_every_sensor_has_its_own_pose(nusc):
    for _, _, sample in samples_of(nusc):
        lidar, camera = (
            nusc.get("ego_pose", nusc.get("sample_data", sample["data"][c])["ego_pose_token"])
            for c in ("LIDAR_TOP", "CAM_FRONT_LEFT")
        )
        moved = np.linalg.norm(np.subtract(lidar["translation"], camera["translation"]))
        assert 3 * 0.043 < moved < 12 * 0.0432


def test_annotations_vary(nusc):
    """Several categories, visibility levels, moving and parked things."""
    assert len({a["category_name"] for a in nusc.sample_annotation}) >= 6
    assert {a["visibility_token"] for a in nusc.sample_annotation} == {"1", "2", "3", "4"}
    for sample in nusc.sample:
        assert 20 < len(sample["anns"]) < 200
    speeds = [
        np.linalg.norm(nusc.box_velocity(a["token"])[:2])
        for a in nusc.sample_annotation
        if a["category_name"] == "vehicle.car" and (a["prev"] or a["next"])
    ]
    assert min(speeds) < 0.01 and max(speeds) > 2


def test_visibility_level():
    assert [visibility_level(v, 100) for v in (0, 39, 40, 59, 60, 79, 80, 100)] == list("11223344")
    assert visibility_level(0, 0) == "1"


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    ("shape", "taper"),
    [*((shape, (0.0, 0.0, 0.0)) for shape in Shape), (Shape.BOX, (0.4, 0.2, 0.1))],
)
def test_intersection_is_on_the_surface(shape, taper):
    """Entry points satisfy the solid's own equation, and rays that miss never get inside."""
    rng = np.random.default_rng(3)
    half = np.array([0.9, 0.9, 0.6]) if shape == Shape.CYLINDER else np.array([1.1, 0.7, 0.5])
    extent = [(-extent, extent) for extent in half]
    part = Part(shape, Material.METAL, None, *extent, taper=taper)
    solids = place(1, [part], (0, 0, 0))

    def level(points):  # < 1 inside, 1 on the surface
        q = np.abs(points) / half
        if shape == Shape.CYLINDER:
            return np.maximum(np.hypot(q[..., 0], q[..., 1]), q[..., 2])
        if shape == Shape.ELLIPSOID:
            return np.linalg.norm(q, axis=-1)
        if taper == (0, 0, 0):
            return q.max(axis=-1)
        sides = [1 + points @ n - offset for n, offset in side_planes(half, solids.taper[0])]
        return np.max([*sides, q[..., 2]], axis=0)

    origin = np.array([30.0, -20.0, 6.0])
    target = rng.uniform(-1.6, 1.6, (4000, 3))
    d = target - origin
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    t = intersect(solids, 0, origin, d.T.astype(np.float32))
    hit = np.isfinite(t)
    assert 200 < hit.sum() < 3800
    np.testing.assert_allclose(level(origin + t[hit, None] * d[hit]), 1, atol=3e-4)
    inside = level(origin + np.linspace(30, 45, 1500)[:, None, None] * d[~hit]).min(axis=0) < 0.99
    assert not inside.any()
    # It is the entry, not the exit: nothing inside comes before it.
    before = level(origin + (t[hit] - 0.01)[:, None] * d[hit])
    assert np.mean(before > 1) > 0.99


def test_depth_is_the_range_along_pixel_rays(nusc, worlds):
    """render_camera and cast_rays see the same thing through the centres of pixels."""
    _, _, sample = next(samples_of(nusc))
    pose, K = sensor_chain(nusc, sample["data"]["CAM_BACK"])
    K = np.diag([0.125, 0.125, 1]) @ K
    rgb, depth, ids, _ = render_camera(worlds[0, 0], K, pose, 112, 200)
    assert rgb.shape == (112, 200, 3) and rgb.dtype == np.uint8
    assert depth.dtype == np.float32 and ids.dtype == np.int32
    rows, columns = np.mgrid[:112, :200]
    d = np.stack([columns + 0.5, rows + 0.5, np.ones_like(rows)], -1) @ np.linalg.inv(K).T
    length = np.linalg.norm(d, axis=-1)
    distance, hit_ids, _ = cast_rays(
        worlds[0, 0], pose[:3, 3], ((d / length[..., None]) @ pose[:3, :3].T).reshape(-1, 3)
    )
    same = ids.ravel() == hit_ids
    assert same.mean() > 0.995  # rays along an outline may fall on either side of it
    seen = same & np.isfinite(distance)
    assert seen.mean() > 0.6
    np.testing.assert_allclose((depth * length).ravel()[seen], distance[seen], rtol=2e-3)
    assert np.all(np.isinf(depth[ids == -1])) and np.all(depth[ids >= 0] > 0)


def test_cast_rays_overlooks_no_solid(worlds):
    """Rays in all directions meet the same as when every solid is tried for every ray."""
    world = worlds[1, 0]
    rng = np.random.default_rng(1)
    origin = np.array([*world.scene.ego_pose(world.timestamp)[0][:2], 1.9])
    d = rng.standard_normal((600, 3)) * [1, 1, 0.1]
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    nearest = np.where(d[:, 2] < 0, -origin[2] / d[:, 2], np.inf)
    for index in np.flatnonzero(world.solids.object_id != EGO_ID):
        rotation = world.solids.global_R_local[index].T
        start = rotation @ (origin - world.solids.centre[index])
        t = intersect(world.solids, index, start, (rotation @ d.T).astype(np.float32))
        nearest = np.minimum(nearest, t)
    nearest[nearest > 90] = np.inf
    distance, _, _ = cast_rays(world, origin, d, max_range=90)
    assert 300 < np.isfinite(nearest).sum() < 600
    same = np.isclose(distance, nearest, rtol=1e-3) | (np.isinf(distance) & np.isinf(nearest))
    assert same.mean() > 0.995  # a few graze an outline


def compare_with_depth(nusc, sample, channel, world, pose_of=None):
    """Differences (metres) of lidar returns to a rendering, through the devkit's tables alone.

    Returns projected depth minus rendered depth. 1/z of a plane is linear over the image, so
    rendered depth is interpolated as 1/z between four pixel centres; returns whose four pixels show
    different things, next to an outline, are left out.
    """
    _, xyz = lidar_points(nusc, sample)
    true_pose, K = sensor_chain(nusc, sample["data"][channel])
    K = np.diag([0.5, 0.5, 1]) @ K
    _, depth, ids, _ = render_camera(world, K, true_pose, 450, 800)
    pose, _ = sensor_chain(nusc, sample["data"][channel], pose_of)
    local = (xyz - pose[:3, 3]) @ pose[:3, :3]
    local = local[local[:, 2] > 1]
    uv = local @ K.T
    u, v = uv[:, 0] / uv[:, 2] - 0.5, uv[:, 1] / uv[:, 2] - 0.5
    ok = (u >= 0) & (v >= 0) & (u < 799) & (v < 449)
    u, v, z = u[ok], v[ok], local[ok, 2]
    j, i = u.astype(int), v.astype(int)
    a, b = u - j, v - i
    inverse = 1 / depth.astype(float)
    flat = (
        inverse[i, j] * (1 - a) * (1 - b)
        + inverse[i, j + 1] * a * (1 - b)
        + inverse[i + 1, j] * (1 - a) * b
        + inverse[i + 1, j + 1] * a * b
    )
    corners = np.stack([ids[i, j], ids[i, j + 1], ids[i + 1, j], ids[i + 1, j + 1]])
    smooth = (corners == corners[0]).all(axis=0) & (corners[0] >= 0)
    return (z - 1 / np.maximum(flat, 1e-9))[smooth], smooth.mean()


def test_lidar_agrees_with_images(nusc, worlds):
    """Returns lie on what the cameras see there, or behind it: lidar and camera stand apart."""
    everything, kept = [], []
    for scene, number, sample in samples_of(nusc):
        for channel in CAMERAS if number == 0 else CAMERAS[:2]:
            difference, share = compare_with_depth(nusc, sample, channel, worlds[scene, number])
            assert len(difference) > 1000
            everything.append(difference)
            kept.append(share)
    difference = np.concatenate(everything)
    assert np.mean(kept) > 0.8
    # A return behind the rendered surface is hidden from this camera by a nearer thing.
    in_view = difference < 0.3
    assert in_view.mean() > 0.85
    assert np.median(np.abs(difference[in_view])) < 0.02
    assert np.mean(np.abs(difference[in_view]) < 0.1) >= 0.97
    # In front of what the camera sees there is nothing, so no return may be there.
    assert np.mean(difference < -0.1) < 0.02


def test_stored_images_are_what_the_tables_say(nusc, worlds):
    """A JPEG shows the view from its own pose in the tables, not from where the lidar fired."""
    scene, number, sample = next(samples_of(nusc))
    key = sample["data"]["CAM_FRONT_LEFT"]
    with Image.open(Path(nusc.dataroot) / nusc.get("sample_data", key)["filename"]) as image:
        stored = np.asarray(image, dtype=float)
    errors = []
    for pose_of in (key, sample["data"]["LIDAR_TOP"]):
        pose, K = sensor_chain(nusc, key, pose_of)
        rgb, _, _, _ = render_camera(worlds[scene, number], K, pose, 900, 1600)
        errors.append(np.abs(rgb - stored).mean())
    assert errors[0] < 2
    assert errors[1] > 2 * errors[0]


def test_comparison_notices_a_wrong_pose(nusc, worlds):
    """The test above can fail: with the car's pose at the lidar's time things do not fit."""
    scene, number, sample = next(samples_of(nusc))
    difference, _ = compare_with_depth(
        nusc, sample, "CAM_FRONT_LEFT", worlds[scene, number], pose_of=sample["data"]["LIDAR_TOP"]
    )
    in_view = difference < 0.3
    assert np.mean(np.abs(difference[in_view]) < 0.1) < 0.9


def test_lidar_file(nusc):
    for _, _, sample in samples_of(nusc):
        points, _ = lidar_points(nusc, sample)
        assert 25_000 < len(points) <= 32 * 1084
        near = (np.abs(points[:, 0]) < 2.2) & (np.abs(points[:, 1]) < 2.2)
        assert 0.20 < near.mean() < 0.30
        assert set(np.unique(points[:, 4])) == set(range(32))
        assert points[:, 3].min() >= 0 and 40 < points[:, 3].max() <= 255
        assert np.linalg.norm(points[:, :3], axis=1).max() < 100.1


def test_num_lidar_pts_is_counted(nusc):
    from nuscenes.utils.geometry_utils import points_in_box

    total = 0
    for _, _, sample in samples_of(nusc):
        points, _ = lidar_points(nusc, sample)
        pose, _ = sensor_chain(nusc, sample["data"]["LIDAR_TOP"])
        xyz = (points[:, :3] @ pose[:3, :3].T + pose[:3, 3]).T
        for key in sample["anns"]:
            box = nusc.get_box(key)
            record = nusc.get("sample_annotation", key)
            fewest = points_in_box(box, xyz, wlh_factor=0.9999).sum()
            most = points_in_box(box, xyz, wlh_factor=1.0001).sum()
            assert fewest <= record["num_lidar_pts"] <= most
            total += record["num_lidar_pts"]
    assert total > 2000


def test_boxes_hold_their_things(nusc, worlds):
    """Nearly all returns of an annotated thing lie in its box: the box encloses what is drawn."""
    scene, number, sample = next(samples_of(nusc))
    _, ids, _ = sweep(worlds[scene, number], np.random.default_rng(0))
    hits = (ids > 0) & (ids < 90_000)
    counted = sum(nusc.get("sample_annotation", key)["num_lidar_pts"] for key in sample["anns"])
    assert hits.sum() > 300
    assert 0.97 * hits.sum() <= counted <= 1.10 * hits.sum()


def test_visibility_is_measured(nusc, worlds):
    """Things of level 4 are seen in the images; things without any pixel are of level 1."""
    scene, number, sample = next(samples_of(nusc))
    seen = set()
    for channel in CAMERAS:
        pose, K = sensor_chain(nusc, sample["data"][channel])
        _, _, ids, _ = render_camera(
            worlds[scene, number], np.diag([0.5, 0.5, 1]) @ K, pose, 450, 800
        )
        seen |= set(np.unique(ids))
    by_place = {
        tuple(np.round((x, y, actor.size[2] / 2), 3)): actor.object_id
        for actor, (x, y, _) in worlds[scene, number].placed
    }
    levels = {}
    for key in sample["anns"]:
        record = nusc.get("sample_annotation", key)
        object_id = by_place[tuple(np.round(record["translation"], 3))]
        levels.setdefault(record["visibility_token"], []).append(object_id in seen)
    assert all(levels["4"]) and np.mean(levels["1"]) < 1 and len(levels["4"]) > 10


# ---------------------------------------------------------------- map


@pytest.fixture(scope="session")
def shapes(demo_root):
    """Union of every polygon layer of the map, as the devkit reads it."""
    from nuscenes.map_expansion.map_api import NuScenesMap
    from shapely.ops import unary_union

    city = NuScenesMap(str(demo_root), "boston-seaport")
    drivable = [city.extract_polygon(t) for r in city.drivable_area for t in r["polygon_tokens"]]
    out = {
        layer: unary_union([city.extract_polygon(r["polygon_token"]) for r in getattr(city, layer)])
        for layer in ("walkway", "ped_crossing", "carpark_area", "road_segment")
    }
    out["drivable_area"] = unary_union(drivable)
    out["lines"] = [city.extract_line(r["line_token"]) for r in city.road_divider]
    out["all_valid"] = all(p.is_valid for p in drivable)
    out["holes"] = sum(len(p.interiors) for p in drivable)
    return out


def test_map_layers(shapes, nusc):
    assert shapes["all_valid"] and shapes["holes"] >= 2
    for layer in ("walkway", "ped_crossing", "carpark_area", "road_segment"):
        assert shapes[layer].is_valid and shapes[layer].area > 50
    assert sum(line.length for line in shapes["lines"]) > 50
    for layer in ("walkway", "carpark_area"):
        assert shapes[layer].intersection(shapes["drivable_area"]).area < 0.5
    west, south, east, north = shapes["drivable_area"].union(shapes["walkway"]).bounds
    assert west > 0 and south > 0 and east < 2979.5 and north < 2118.1
    from shapely.geometry import Point

    for pose in nusc.ego_pose:
        assert shapes["drivable_area"].contains(Point(*pose["translation"][:2]))


def test_texture_agrees_with_map(nusc, worlds, shapes):
    """Ground pixels have the material that the devkit's polygons say, up to their outlines."""
    from shapely import contains_xy, prepare

    layers = {
        "drivable_area": ROAD_MATERIALS,
        "walkway": WALKWAY_MATERIALS,
        "carpark_area": PARKING_MATERIALS,
        "ped_crossing": (Material.CROSSING, Material.CROSSING_STRIPE),
    }
    inner = {layer: shapes[layer].buffer(-0.08, join_style="mitre") for layer in layers}
    outer = {layer: shapes[layer].buffer(0.08, join_style="mitre") for layer in layers}
    prepare([*inner.values(), *outer.values()])
    brightness = {}
    for scene, number, sample in samples_of(nusc):
        for channel in ("CAM_FRONT", "CAM_BACK"):
            pose, K = sensor_chain(nusc, sample["data"][channel])
            _, depth, ids, _ = render_camera(
                worlds[scene, number], np.diag([0.25, 0.25, 1]) @ K, pose, 225, 400
            )
            rows, columns = np.nonzero((ids == 0) & (depth < 40))
            rows, columns = rows[::7], columns[::7]
            uv = np.stack([columns + 0.5, rows + 0.5, np.ones(len(rows))]) * 4
            uv[2] = 1
            xyz = (np.linalg.inv(K) @ uv) * depth[rows, columns]
            xyz = pose[:3, :3] @ xyz + pose[:3, 3:]
            assert np.abs(xyz[2]).max() < 0.01
            found = ground_material(worlds[scene, number], xyz[:2].T)
            for layer, materials in layers.items():
                inside = contains_xy(inner[layer], xyz[0], xyz[1])
                outside = ~contains_xy(outer[layer], xyz[0], xyz[1])
                member = np.isin(found, [int(m) for m in materials])
                assert member[inside].all(), (layer, np.unique(found[inside]))
                stray = member & outside & (found != Material.KERB)  # islands have kerbs too
                assert not stray.any(), (layer, np.unique(found[stray]))
            data = nusc.get("sample_data", sample["data"][channel])
            with Image.open(Path(nusc.dataroot) / data["filename"]) as image:
                grey = np.asarray(image.convert("L"), dtype=float)
            grey = grey[rows * 4 + 2, columns * 4 + 2]
            for material in np.unique(found):
                brightness.setdefault(Material(material), []).append(grey[found == material])
    mean = {key: np.concatenate(values).mean() for key, values in brightness.items()}
    assert mean[Material.CROSSING_STRIPE] > mean[Material.CROSSING] + 40
    assert mean[Material.SIDEWALK] > mean[Material.ASPHALT] + 15


# ---------------------------------------------------------------- running it


def contents(root: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_same_bytes_with_any_number_of_workers(demo_root, tmp_path):
    """The fixture's world was made by other processes; this one is made in this process."""
    make_demo_world(tmp_path / "again", scenes=2, samples=2, seed=0, workers=0)
    first, second = contents(demo_root), contents(tmp_path / "again")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_seeds_differ():
    first, second = (frame_world(Plan(2, 1, seed, "v1.0-mini"), 0, 0) for seed in (0, 1))
    assert len(first.solids.shape) != len(second.solids.shape) or not np.allclose(
        first.solids.centre, second.solids.centre
    )


def test_resume_makes_only_what_is_missing(demo_root, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(demo_root, root)
    image = sorted((root / "samples" / "CAM_BACK").iterdir())[1]
    image.unlink()
    (root / "v1.0-mini" / "sample.json").unlink()
    (image.parent / (image.name + ".tmp")).write_bytes(b"left by a killed run")
    untouched = sorted((root / "samples" / "CAM_BACK").glob("*.jpg"))[-1]
    os.utime(untouched, (1, 1))
    make_demo_world(root, scenes=2, samples=2, seed=0, workers=0)
    assert contents(root) == contents(demo_root)
    assert untouched.stat().st_mtime == 1


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGTERM"])
def test_its_processes_do_not_outlive_it(tmp_path, signal_name):
    code = """if True:
        import sys
        from occfeat_targets.demo_world import make_demo_world
        if __name__ == "__main__":
            make_demo_world(sys.argv[1], scenes=4, samples=9, workers=1)
    """
    script = tmp_path / "make.py"
    script.write_text(code)
    client = subprocess.Popen([sys.executable, script, tmp_path / "world"])
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("world/samples/*/*.jpg")):
            assert client.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        family = psutil.Process(client.pid).children(recursive=True)
    finally:
        client.send_signal(getattr(signal, signal_name))
        client.wait()
    alive = psutil.wait_procs(family, timeout=20)[1]
    for process in alive:
        process.kill()
    assert family and not alive


def test_frame_without_its_result_is_not_complete(demo_root, tmp_path):
    """The measurements of a frame are written last: without them it is made again."""
    root = tmp_path / "copy"
    shutil.copytree(demo_root, root)
    result = sorted((root / "demo_world_frames").iterdir())[0]
    result.unlink()
    make_demo_world(root, scenes=2, samples=2, seed=0, workers=0)
    assert contents(root) == contents(demo_root)


def test_refuses_other_folders(demo_root, tmp_path):
    with pytest.raises(ValueError, match="seed 0 instead of 1"):
        make_demo_world(demo_root, scenes=2, samples=2, seed=1)
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"photo\.jpg"):
        make_demo_world(tmp_path, scenes=2, samples=1)
    with pytest.raises(ValueError, match="is a file"):
        make_demo_world(tmp_path / "photo.jpg", scenes=2, samples=1)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_folder_that_cannot_be_looked_into_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, refuse)
    with pytest.raises(PermissionError):
        make_demo_world(tmp_path, scenes=2, samples=1)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scenes": 1}, "scenes must be between 2"),
        ({"scenes": 11}, "scenes must be between 2 .* and 10"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
        ({"workers": -1}, "workers must be 0 or more"),
        ({"version": "v1.0-huge"}, "unknown version 'v1.0-huge'"),
    ],
)
def test_refuses_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_demo_world(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_atomic_write_leaves_the_old_file_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_manifest_names_its_parameters(demo_root):
    manifest = json.loads((demo_root / "demo_world.json").read_text())
    assert {key: manifest[key] for key in ("scenes", "samples", "seed", "version")} == {
        "scenes": 2,
        "samples": 2,
        "seed": 0,
        "version": "v1.0-mini",
    }


def test_imports_are_light():
    code = (
        "import sys, occfeat_targets.demo_world as d; heavy = {'torch', 'dask', 'nuscenes', "
        "'zarr', 'scipy', 'shapely', 'matplotlib'} & set(sys.modules); sys.exit(str(heavy) if "
        "heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
