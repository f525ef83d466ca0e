"""What the store holds for lidar networks: feature maps, classes of returns, superpixels."""

import io
import json
import re
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import build_store, reseal, targets_of
from PIL import Image
from teachers import PatchMeans

from occfeat_targets.build import prepare, read_dataset
from occfeat_targets.cli import main
from occfeat_targets.config import TargetsConfig
from occfeat_targets.demo_world.labels import CATEGORIES
from occfeat_targets.demo_world.render import sweep
from occfeat_targets.demo_world.scene import Plan, frame_world
from occfeat_targets.demo_world.solids import EGO_ID, FIRST_STATIC_ID
from occfeat_targets.demo_world.things import Material
from occfeat_targets.sources.base import SourceError
from occfeat_targets.store.files import open_group
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.schema import dequantise
from occfeat_targets.verify import recompute_frames, verify_store

ALL = "outputs={tokens: {}, lidarseg: {}, superpixels: {}}"


@pytest.fixture(scope="module")
def lidar_store(demo_root, made_once):
    """Finished store of the demo world with all three; read-only by agreement."""
    return made_once("lidar-demo.zarr", lambda path: build_store(demo_root, path, ALL))


def config_of(*settings):
    return TargetsConfig.load(None, ["teacher.name=teachers:PatchMeans", *settings])


# --- the demo world's classes ---------------------------------------------------------------------


def test_the_devkit_loads_the_demo_worlds_classes(demo_root):
    nuscenes = pytest.importorskip("nuscenes.nuscenes")
    nusc = nuscenes.NuScenes("v1.0-mini", str(demo_root), verbose=False)
    assert nusc.lidarseg_idx2name_mapping == dict(enumerate(CATEGORIES))
    for sample in nusc.sample:
        key = sample["data"]["LIDAR_TOP"]
        labels = np.fromfile(demo_root / nusc.get("lidarseg", key)["filename"], np.uint8)
        assert (
            len(labels)
            == (demo_root / nusc.get("sample_data", key)["filename"]).stat().st_size / 20
        )
        assert len({*labels.tolist()}) >= 8


def test_each_return_has_the_category_of_what_it_hit(demo_root):
    """One return at a time: of an annotated thing its actor's, of the rest by where it is."""
    plan = Plan(scenes=2, samples=2, seed=0, version="v1.0-mini")
    world = frame_world(plan, 0, 1)
    points, ids, material = sweep(world, np.random.default_rng([0, 0, 1, 2]))
    rows = json.loads((demo_root / "v1.0-mini/lidarseg.json").read_text())
    labels = np.fromfile(demo_root / rows[1]["filename"], np.uint8)
    assert len(points) == len(labels)
    category = {actor.object_id: actor.category for actor, _ in world.placed}
    flat = {Material.SIDEWALK: "sidewalk", Material.KERB: "sidewalk"}
    flat |= {Material.TERRAIN: "terrain", Material.ISLAND: "other"}
    for label, i, stuff in zip(labels, ids.tolist(), material.tolist(), strict=True):
        if i == 0:
            wanted = f"flat.{flat.get(Material(stuff), 'driveable_surface')}"
        elif i == EGO_ID:
            wanted = "vehicle.ego"
        elif i >= FIRST_STATIC_ID:
            plant = Material(stuff) in (Material.FOLIAGE, Material.BARK)
            wanted = "static.vegetation" if plant else "static.manmade"
        else:
            wanted = category[i]
        assert CATEGORIES[label] == wanted


# --- classes in the store -------------------------------------------------------------------------


def hashed(rows):
    """A class of each return that follows from its bytes alone."""
    return (np.abs(rows[:, :4]).sum(axis=1) * 1000).astype(np.int64) % 32


def test_classes_stay_with_their_returns(dataroot):
    """Labels that are hashes of the points, through both filters that leave returns out."""
    for file in dataroot.glob("lidarseg/*/*.bin"):
        token = file.name.partition("_")[0]
        rows = json.loads((dataroot / "v1.0-mini/sample_data.json").read_text())
        lidar = dataroot / next(row["filename"] for row in rows if row["token"] == token)
        points = np.fromfile(lidar, "<f4").reshape(-1, 5)
        points[::50, :2] *= 100  # beyond what 16 bits reach
        points.tofile(lidar)
        hashed(points).astype(np.uint8).tofile(file)
    config = config_of("teacher.name=none", "outputs={lidarseg: {}}")
    dataset = read_dataset(dataroot, None, config)
    record = dataset.records[1]
    frame = targets_of(record, dataset, config, PatchMeans())
    points = np.fromfile(record.sweep_paths[0], "<f4").reshape(-1, 5)
    labels, stored = hashed(points), frame["points"]
    near = (np.abs(points[:, 0]) < 2.2) & (np.abs(points[:, 1]) < 2.2)
    pose, kept = record.ego_T_sweep[0], []
    for i in range(len(points)):
        xyz = pose[:3, :3] @ points[i, :3].astype(np.float64) + pose[:3, 3]
        if not near[i] and (np.abs(xyz) < 65.53).all():
            kept.append(i)
            np.testing.assert_allclose(stored[len(kept) - 1, :3] * 0.002, xyz, atol=1.01e-3)
    assert frame["lidarseg"].tolist() == labels[kept].tolist()
    counted = np.bincount(frame["lidarseg"], minlength=32) + frame["lidarseg_left_out"]
    assert counted.tolist() == np.bincount(labels, minlength=32).tolist()
    assert 500 < frame["lidarseg_left_out"].sum() < len(points) / 2


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), r"has \d+ classes, its lidar file"),
        (lambda file: file.write_bytes(b"\x20" * file.stat().st_size), "has class 32, there are"),
    ],
)
def test_labels_that_do_not_fit_are_said_with_their_file(dataroot, tmp_path, spoil, said):
    file = sorted(dataroot.glob("lidarseg/*/*.bin"))[0]
    spoil(file)
    failed = build_store(dataroot, tmp_path / "a.zarr", "outputs={lidarseg: {}}", skip_errors=True)
    assert len(failed) == 1
    (message,) = failed.values()
    assert file.name in message and "scene-" in message
    assert re.search(said, message)


def test_what_is_missing_is_said_before_any_work(dataroot, tmp_path):
    config = config_of("outputs={lidarseg: {}}", "map.mode=required")
    file = sorted(dataroot.glob("lidarseg/*/*.bin"))[0]
    content = file.read_bytes()
    file.unlink()
    file.with_name("other.bin").write_bytes(content)  # the devkit counts them
    with pytest.raises(SourceError, match=f"{file.name} is missing"):
        prepare(dataroot, str(tmp_path / "a.zarr"), None, config, False)
    shutil.rmtree(dataroot / "lidarseg")
    (dataroot / "v1.0-mini/lidarseg.json").unlink()
    with pytest.raises(SourceError, match="no classes for the output lidarseg"):
        prepare(dataroot, str(tmp_path / "a.zarr"), None, config, False)
    two = config_of("outputs={lidarseg: {}}", "lidar.sweeps=2")
    with pytest.raises(SourceError, match=r"lidarseg wants lidar\.sweeps=1"):
        prepare(dataroot, str(tmp_path / "a.zarr"), None, two, False)


def test_a_category_table_that_does_not_count_is_refused(dataroot):
    file = dataroot / "v1.0-mini/category.json"
    rows = json.loads(file.read_text())
    rows[3]["index"] = 99
    file.write_text(json.dumps(rows))
    with pytest.raises(SourceError, match=r"category\.json: `index` should count"):
        read_dataset(dataroot, None, config_of())


# --- all three ------------------------------------------------------------------------------------


def test_a_store_has_what_was_asked_for_and_says_what_it_means(lidar_store, demo_store):
    store, plain = open_store(lidar_store), open_store(demo_store)
    names = {"tokens", "token_scale", "lidarseg", "lidarseg_left_out", "superpixels"}
    assert store.specs.keys() - plain.specs.keys() == names
    assert store.attrs["lidarseg_classes"] == [*CATEGORIES]
    assert verify_store(str(lidar_store)) == (4, [])
    for i in range(4):  # and nothing else has changed
        ours, theirs = store.frame(i), plain.frame(i)
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs if name != "images")
        assert ours["images"] == theirs["images"]


def test_tokens_are_the_teachers_feature_maps(lidar_store, demo_root):
    config = config_of(ALL, "map.mode=required")
    dataset = read_dataset(demo_root, None, config)
    record, frame = dataset.records[2], open_store(lidar_store).frame(2)
    teacher = PatchMeans()
    size = config.teacher.size_for(teacher)
    for c, path in enumerate(record.image_paths):
        image = Image.open(path).resize(size[::-1], Image.Resampling.BICUBIC)
        pixels = np.asarray(image, dtype=np.float32) / 255
        patch = teacher.patch_size
        h, w = size[0] // patch, size[1] // patch
        wanted = pixels.reshape(h, patch, w, patch, 3).mean(axis=(1, 3))
        codes = frame["tokens"][c].reshape(-1, frame["tokens"].shape[-1])
        found = dequantise(codes, frame["token_scale"][c].ravel()).reshape(h, w, -1)
        assert np.abs(found[..., :3] - wanted).mean() < 0.01


def test_superpixels_are_those_of_the_stored_jpegs(lidar_store):
    slic = pytest.importorskip("skimage.segmentation").slic
    frame = open_store(lidar_store).frame(3)
    for labels, jpeg in zip(frame["superpixels"], frame["images"], strict=True):
        image = np.asarray(Image.open(io.BytesIO(jpeg)))
        settings = {"n_segments": 150, "compactness": 6, "sigma": 3 * 288 / 900}
        np.testing.assert_array_equal(labels, slic(image, start_label=0, **settings))
        assert 60 < labels.max() < 150


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("tokens", lambda a: a + 1, "a token's largest code is not 127"),
        ("token_scale", lambda a: -a, "token_scale is not finite and positive"),
        ("lidarseg", lambda a: a + 40, "lidarseg holds numbers of no class"),
        ("lidarseg_left_out", lambda a: a - 9999, "lidarseg_left_out is negative"),
        ("superpixels", lambda a: np.where(a == 3, 4, a), "are not numbered one after another"),
    ],
)
def test_verify_finds_what_can_not_be(lidar_store, tmp_path, name, spoil, said):
    store = shutil.copytree(lidar_store, tmp_path / "a.zarr")
    array = open_group(store, "r+")[name]
    n = open_store(store).per_frame["n_points"][1] if name == "lidarseg" else None
    array[1:2, :n] = spoil(array[1:2, :n])
    reseal(store)
    problems = verify_store(str(store))[1]
    assert len(problems) >= 1 and all(said in problem for problem in problems)


def test_recomputing_finds_other_ones(lidar_store, demo_root, tmp_path):
    assert recompute_frames(str(lidar_store), demo_root, 1, seed=0) == []
    store = shutil.copytree(lidar_store, tmp_path / "a.zarr")
    for name in ("tokens", "superpixels"):
        array = open_group(store, "r+")[name]
        array[:] = array[:][:, ::-1]  # other cameras'
    reseal(store)
    problems = recompute_frames(str(store), demo_root, 1, seed=0)
    assert any("tokens differ" in p for p in problems)
    assert any("are not those that scikit-image finds" in p for p in problems)


def test_a_frame_is_drawn_with_all_of_it(lidar_store, tmp_path):
    out = tmp_path / "a.png"
    result = CliRunner().invoke(main, ["view", str(lidar_store), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert out.stat().st_size > 100_000


def test_the_real_keyframe_has_tokens_and_superpixels(nuscenes_one):
    config = config_of("outputs={tokens: {}, superpixels: {}}", "images.size=[144,256]")
    dataset = read_dataset(nuscenes_one, None, config)
    assert dataset.lidarseg_classes == () and dataset.records[0].lidarseg_path == ""
    frame = targets_of(dataset.records[0], dataset, config, PatchMeans())
    assert frame["tokens"].shape[:3] == (6, 18, 32)
    counts = [int(labels.max()) + 1 for labels in frame["superpixels"]]
    assert all(60 < count <= 150 for count in counts)
