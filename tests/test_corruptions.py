"""nuScenes-C: against the published formulas, in order, repeatable, and in a built store."""

import io
import json
import shutil
from pathlib import Path

import corruption_reference as reference
import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from conftest import build_store, reseal, tree_bytes
from PIL import Image

from occfeat_targets import corruptions
from occfeat_targets.cli import main
from occfeat_targets.config import TargetsConfig
from occfeat_targets.corruptions import CORRUPTED, corrupt, crashed_cameras
from occfeat_targets.sources.nuscenes import CAMERAS
from occfeat_targets.store.files import zarr_store
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.schema import CORRUPTIONS, SEVERITIES, dequantise
from occfeat_targets.store.settings import ConfigError
from occfeat_targets.verify import recompute_frames, verify_store

TOKEN = "0123456789abcdef" * 2


def crop(seed=0, hw=(26, 37)):
    """A small image, with grey in it; the one of seed 0 has black and white, others neither."""
    rng = np.random.default_rng(seed)
    image = rng.integers(15, 210, (*hw, 3), dtype=np.uint8)
    image[15:19, 20:30] = 100
    if seed == 0:
        image[3:6, 4:9] = 0
        image[8:12, :7] = (255, 250, 245)
    return image


def run(image, name, token=TOKEN, camera="CAM_FRONT", seed=0):
    return corrupt(image, name, token, camera, CAMERAS, seed)


# --- one image ----------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("corruption", reference.SEVERITY)
def test_an_image_is_what_the_published_formula_says(corruption, severity, monkeypatch):
    """Within the rounding to a level; snow's flakes are rounded twice."""
    monkeypatch.setattr(corruptions, "_generator", lambda *what: np.random.default_rng(7))
    number = reference.SEVERITY[corruption][SEVERITIES.index(severity)]
    formula = getattr(reference, corruption)
    for seed in range(2):
        image = crop(seed)
        expected = formula(image, number, np.random.default_rng(7))
        error = np.abs(run(image, f"{corruption}-{severity}") - expected)
        assert (error > 0.51).mean() < (0.02 if corruption == "snow" else 1e-9)
        assert error.max() < (3 if corruption == "snow" else 0.51)


def test_the_plasma_of_a_full_image_has_size_2048(monkeypatch):
    sizes = []

    def plasma(size, decay, rng):
        sizes.append((size, decay))
        return np.zeros((size, size), dtype=np.float32)

    monkeypatch.setattr(corruptions, "plasma", plasma)
    for hw in ((900, 1600), (16, 64), (16, 65)):
        run(np.full((*hw, 3), 9, dtype=np.uint8), "fog-mid")
    assert sizes == [(2048, 1.5), (64, 1.5), (128, 1.5)]


@pytest.mark.parametrize("name", CORRUPTED)
def test_images_of_one_colour_survive(name):
    """No division by zero, nothing wraps around."""
    for level in (0, 128, 255):
        image = np.full((20, 30, 3), level, dtype=np.uint8)
        with np.errstate(all="raise"):
            result = run(image, name)
        assert (result.shape, result.dtype) == (image.shape, np.uint8)
        assert (image == level).all()


@pytest.fixture(params=["demo", "real"])
def photo(request):
    """A full-size image: uint8 (900, 1600, 3)."""
    root = request.getfixturevalue("demo_root" if request.param == "demo" else "nuscenes_one")
    image = np.asarray(Image.open(min((root / "samples" / "CAM_FRONT").iterdir())).convert("RGB"))
    assert image.shape == (900, 1600, 3)
    return image


def test_severities_are_ordered_on_a_full_image(photo):
    """Except snow's mid and hard: ImageNet-C's second and third snow cover as much."""
    for corruption in reference.SEVERITY:
        far = [
            np.abs(run(photo, f"{corruption}-{s}").astype(np.int16) - photo).mean()
            for s in SEVERITIES
        ]
        assert 0.2 < far[0] < min(far[1:])
        assert far[1] < far[2] or (corruption == "snow" and far[2] > 0.9 * far[1])


# --- random numbers -----------------------------------------------------------------------------


RANDOM = ("motion_blur-easy", "low_light-hard", "fog-mid", "snow-easy")


@pytest.mark.parametrize("name", RANDOM)
def test_an_image_has_its_own_random_numbers(name):
    image = crop()
    first = run(image, name)
    others = [
        run(image, name, token="f" * 32),
        run(image, name, camera="CAM_BACK"),
        run(image, name, seed=1),
    ]
    for i, other in enumerate(others):
        assert all((other != b).any() for b in (first, *others[:i]))
    state = np.random.get_state()[1].copy()
    assert (run(image, name) == first).all()  # whatever was done in between
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_the_severities_of_an_image_share_their_draws(corruption, monkeypatch):
    real, asked = corruptions._generator, []
    monkeypatch.setattr(corruptions, "_generator", lambda *what: asked.append(what) or real(*what))
    for severity in SEVERITIES:
        run(crop(), f"{corruption}-{severity}")
    assert len(asked) == 3 and len(set(asked)) == 1
    assert corruption in asked[0]


def test_frames_are_lost_at_the_published_rate_and_nested():
    image = np.full((1, 1, 3), 9, dtype=np.uint8)
    tokens = [f"{i:032x}" for i in range(500)]
    lost = np.array(
        [
            [[(run(image, f"frame_lost-{s}", t, c) == 0).all() for c in CAMERAS] for t in tokens]
            for s in SEVERITIES
        ]
    )
    assert lost.mean(axis=(1, 2)) == pytest.approx([1 / 3, 2 / 3, 5 / 6], abs=0.03)
    assert (lost[0] <= lost[1]).all() and (lost[1] <= lost[2]).all()
    correlation = np.corrcoef(lost[1].T.astype(float))
    assert np.abs(correlation - np.eye(6)).max() < 0.15  # each camera on its own


def test_cameras_crash_for_the_whole_set_by_name():
    image = crop()
    for level, severity in enumerate(SEVERITIES):
        dead = crashed_cameras(level, CAMERAS, seed=3)
        for token in (TOKEN, "f" * 32):
            for camera in CAMERAS:
                result = run(image, f"camera_crash-{severity}", token, camera, seed=3)
                assert (result == (0 if camera in dead else image)).all()


def test_as_many_cameras_crash_as_in_robobev():
    """Expected number of different ones in 2, 4 and 5 draws out of 6 with replacement."""
    sets = [
        [set(crashed_cameras(level, CAMERAS, seed)) for level in range(3)] for seed in range(1000)
    ]
    counts = np.array([[len(dead) for dead in levels] for levels in sets])
    expected = [6 * (1 - (5 / 6) ** draws) for draws in (2, 4, 5)]
    assert counts.mean(axis=0) == pytest.approx(expected, abs=0.1)
    assert all(easy <= mid <= hard for easy, mid, hard in sets)
    hit = [sum(camera in levels[2] for levels in sets) for camera in CAMERAS]
    assert min(hit) > 500  # every camera can
    # What the default seed means.
    hardest = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
    assert crashed_cameras(0, CAMERAS, 0) == (hardest[0], hardest[2])
    assert crashed_cameras(1, CAMERAS, 0) == hardest[:3]
    assert crashed_cameras(2, CAMERAS, 0) == hardest


# --- stores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["fog", "fog-4", "rain-easy", "camera_crash", "easy", ""])
def test_wrong_names_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"no images.corruption {wrong}; "):
        TargetsConfig.load(None, [f"images.corruption='{wrong}'"])


def test_a_near_miss_is_named():
    with pytest.raises(ConfigError, match="did you mean motion_blur-mid"):
        TargetsConfig.load(None, ["images.corruption=motion-blur-mid"])
    assert (
        TargetsConfig.load(None, ["images.corruption=snow-hard"]).images.corruption == "snow-hard"
    )


def test_a_corrupted_store_differs_in_its_images_alone(demo_root, demo_store, tmp_path):
    store = tmp_path / "crashed.zarr"
    build_store(demo_root, store, "images.corruption=camera_crash-hard", "frames.limit=1")
    clean, crashed = open_store(demo_store).frame(0), open_store(store).frame(0)
    images = ("images", "image_offset", "features", "feature_scale")
    for name in clean.keys() - set(images):
        assert np.array_equal(clean[name], crashed[name]), name
    a, b = (dequantise(f["features"], f["feature_scale"]) for f in (clean, crashed))
    assert np.abs(a - b).mean() < 0.01 * np.abs(a).mean()  # the teacher saw clean images
    for camera, jpeg, before in zip(CAMERAS, crashed["images"], clean["images"], strict=True):
        levels, original = (_levels(data) for data in (jpeg, before))
        if camera in crashed_cameras(2, CAMERAS, 0):
            assert not levels.any()
        else:
            assert np.abs(levels - original).mean() < 3


def test_the_stored_image_is_the_full_one_corrupted_then_resized(demo_root, tmp_path):
    """Blur and flakes have the size they have in the original image."""
    store = tmp_path / "snow.zarr"
    settings = ("teacher.name=none", "images.corruption=snow-mid", "images.corruption_seed=5")
    build_store(demo_root, store, *settings, "frames.limit=1")
    token = open_store(store).token(0)
    rows = json.loads((demo_root / "v1.0-mini" / "sample_data.json").read_text())
    names = [row["filename"] for row in rows if row["sample_token"] == token]
    (file,) = [name for name in names if "/CAM_BACK/" in name]
    full = np.asarray(Image.open(demo_root / file).convert("RGB"))
    snowy = corrupt(full, "snow-mid", token, "CAM_BACK", CAMERAS, 5)
    expected = Image.fromarray(snowy).resize((512, 288), Image.Resampling.BILINEAR)
    stored = _levels(open_store(store).frame(0)["images"][CAMERAS.index("CAM_BACK")])
    assert np.abs(stored - np.asarray(expected, dtype=np.int16)).mean() < 4
    assert verify_store(str(store)) == (1, [])
    assert recompute_frames(str(store), demo_root, 1, seed=0) == []
    group = zarr.open_group(zarr_store(store, read_only=False), mode="r+")
    config = group.attrs["config"]
    config["images"]["corruption_seed"] = 6
    group.attrs["config"] = config
    reseal(store)
    problems = recompute_frames(str(store), demo_root, 1, seed=0)
    assert len(problems) == 6
    assert all("image differs from the recomputed one by" in problem for problem in problems)


def _levels(jpeg):
    return np.asarray(Image.open(io.BytesIO(jpeg)), dtype=np.int16)


def _corrupt(*arguments, code=0):
    result = CliRunner().invoke(main, ["corrupt", *map(str, arguments), "--workers", "0"])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def test_corrupt_builds_the_validation_split_and_continues(demo_root, demo_store, tmp_path):
    out, only = tmp_path / "out", ["--only", "color_quant-easy", "--only", "camera_crash-mid"]
    said = _corrupt(demo_root, demo_store, out, *only)
    names = {path.name for path in out.iterdir() if not path.name.endswith(".lock")}
    assert names == {
        "color_quant-easy.zarr",
        "camera_crash-mid.zarr",
    }
    assert said.count("2 frames, 0 failed") == 2
    clean, store = open_store(demo_store), open_store(out / "color_quant-easy.zarr")
    val = [i for i in range(len(clean)) if clean.split(i) == "mini_val"]
    assert [store.token(i) for i in range(2)] == [clean.token(i) for i in val]
    frame = store.frame(0)
    assert "features" not in frame and "feature_scale" not in frame
    assert np.array_equal(frame["map"], clean.frame(val[0])["map"])
    changed = {
        "teacher": {"name": "none"},
        "images": {"corruption": "color_quant-easy"},
        "map": {"mode": "required"},
        "frames": {"splits": ["mini_val"]},
    }
    expected = clean.attrs["config"]
    assert store.attrs["config"] == {
        key: value | changed.get(key, {}) if isinstance(value, dict) else value
        for key, value in expected.items()
    }
    before = tree_bytes(out)
    shutil.rmtree(out / "camera_crash-mid.zarr")
    said = _corrupt(demo_root, demo_store, out, *only)
    assert "color_quant-easy.zarr is complete: 2 frames, nothing to do" in said
    assert tree_bytes(out) == before
    info = CliRunner().invoke(main, ["info", str(out / "color_quant-easy.zarr")]).output
    assert "CORRUPTED: color_quant-easy, seed 0" in info
    assert "none: the store has no features" in info
    picture = tmp_path / "view.png"
    arguments = ["view", str(out / "camera_crash-mid.zarr"), "--out", str(picture)]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert picture.exists()


def test_corrupt_follows_a_limited_store(demo_root, tmp_path):
    """A limit counts frames of all splits; the corrupted store has those of one."""
    clean, out = tmp_path / "clean.zarr", tmp_path / "out"
    build_store(demo_root, clean, "teacher.name=none", "frames.limit=3", "map.mode=never")
    _corrupt(demo_root, clean, out, "--only", "color_quant-hard")
    store = open_store(out / "color_quant-hard.zarr")
    assert len(store) == 1
    assert store.token(0) == open_store(clean).token(2)
    assert store.attrs["config"]["map"]["mode"] == "never"


def test_corrupt_refuses_in_one_sentence(demo_root, demo_store, tmp_path):
    out = tmp_path / "out"
    arguments = (demo_root, demo_store, out)
    assert "no corruption fog; there are camera_crash-easy," in _corrupt(
        *arguments, "--only", "fog", code=1
    )
    assert "has no frames of val; choose with --split: mini_train, mini_val" in _corrupt(
        *arguments, "--split", "val", code=1
    )
    assert "no targets store here" in _corrupt(demo_root, tmp_path / "x", out, code=1)
    other = Path(shutil.copytree(demo_store, tmp_path / "other.zarr"))
    tokens = zarr.open_group(zarr_store(other, read_only=False), mode="r+")["token"]
    tokens[-1] = 1
    assert "it has 2 such frames, the store 2, 1 of them the same" in _corrupt(
        demo_root, other, out, code=1
    )
    assert not out.exists()
