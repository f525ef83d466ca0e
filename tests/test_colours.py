"""Features as colours: one basis for all frames, saved and used again; likeness to a picked one."""

import json

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from tiny_store import change_attributes, make_tiny_store

from occfeat_targets.store.colours import Colours, from_above, store_colours
from occfeat_targets.store.files import StoreError
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.pick import SCALE, Likeness, pick
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.schema import dequantise
from occfeat_targets.store.settings import ConfigError
from occfeat_targets.view import draw_frame


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return open_store(str(make_tiny_store(tmp_path_factory.mktemp("colours") / "targets.zarr")))


def test_colours_depend_on_direction_alone_and_spread_over_the_range():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 8))
    colours = Colours.fit(features)
    painted = colours(features)
    assert painted.shape == (200, 3) and painted.min() == 0 and painted.max() == 1
    longer = features * rng.uniform(0.1, 9, (200, 1))
    np.testing.assert_allclose(colours(longer), painted, atol=1e-9)
    np.testing.assert_allclose(Colours.fit(longer)(features), painted, atol=1e-9)
    # By another way: singular vectors, of which the largest entry is to be positive.
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    axes = np.linalg.svd(unit - unit.mean(axis=0))[2][:3]
    axes *= np.sign([axis[np.abs(axis).argmax()] for axis in axes])[:, None]
    for channel, component in zip(painted.T, axes @ (unit - unit.mean(axis=0)).T, strict=True):
        low, high = np.percentile(component, [2, 98])
        np.testing.assert_allclose(channel, np.clip((component - low) / (high - low), 0, 1))


def test_what_has_no_feature_is_grey():
    features = np.random.default_rng(2).normal(size=(9, 8))
    features[4] = 0
    grey = (Colours.fit(features)(features) == 0.5).all(axis=1)
    assert np.flatnonzero(grey).tolist() == [4]
    assert (Colours.fit(features[:2])(features) == 0.5).all()
    assert Colours.fit(features)(np.zeros((0, 8))).shape == (0, 3)
    assert (Colours.fit(np.zeros((3, 0)))(np.zeros((3, 0))) == 0.5).all()
    narrow = Colours.fit(features[:, :1])(features[:, :1])  # a teacher of one channel
    assert narrow.shape == (9, 3) and np.isfinite(narrow).all()


def test_a_store_has_one_basis_of_all_its_scenes(store, tmp_path):
    """Its own each time, and of features that no single frame has."""
    colours = store_colours(store)
    again = store_colours(open_store(store.url))
    assert np.array_equal(colours.components, again.components)
    assert np.array_equal(colours.low, again.low)
    frames = [store.frame(i) for i in (0, len(store) - 1)]
    for frame in frames:
        features = dequantise(frame["features"], frame["feature_scale"])
        assert not np.allclose(Colours.fit(features)(features), colours(features), atol=0.05)


def test_saved_colours_are_used_for_another_store(store, tmp_path):
    file = tmp_path / "colours.json"
    made = store_colours(store, file)
    other = open_store(str(make_tiny_store(tmp_path / "other.zarr", seed=1)))
    used = store_colours(other, file)
    features = np.random.default_rng(0).normal(size=(20, 8))
    assert np.array_equal(used(features), made(features))
    assert not np.allclose(store_colours(other)(features), made(features))
    without = open_store(str(make_tiny_store(tmp_path / "none.zarr", dim=0)))
    assert (store_colours(without)(np.zeros((4, 0))) == 0.5).all()
    change_attributes(tmp_path / "other.zarr", teacher={"name": "b", "dim": 8, "weights": "b"})
    with pytest.raises(StoreError, match=r"of teacher weights random\(tiny\).* features of b"):
        store_colours(open_store(other.url), file)


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        "{}",
        {"components": [[1, 2]]},
        {"low": [0, 0]},
        {"mean": "x"},
        {"high": [0, 0, None]},
        {"more": []},
    ],
)
def test_a_file_that_holds_no_colours_is_refused(store, tmp_path, damage):
    file = tmp_path / "colours.json"
    if isinstance(damage, dict):
        store_colours(store, file)
        damage = json.dumps(json.loads(file.read_text()) | damage)
    file.write_text(damage)
    with pytest.raises(StoreError, match="holds no colours"):
        store_colours(store, file)


def test_the_highest_voxel_of_a_column_is_seen_from_above():
    grid = VoxelGrid((-1, 1, 2), (-1, 1, 2), (0, 3, 3))
    index = np.array([1, 5, 10], dtype=np.uint32)  # column (0, 1) twice, (1, 0)
    picture = from_above(grid, index, np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1.0]]))
    assert picture[0, 1].tolist() == [0, 1, 0] and picture[1, 0].tolist() == [0, 0, 1]
    assert picture.sum() == 2


# --- likeness to a picked voxel -------------------------------------------------------------------


def test_likeness_is_the_cosine_on_the_scale():
    reference = np.array([2.0, 0])
    angles = np.arccos([1, 0.6, 0.0, -0.5, 0.8])
    features = 3 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    colours = (255 * Likeness(reference)(np.vstack([features, [[0, 0]]]))).round().astype(int)
    rgb = {at: [int(text[i : i + 2], 16) for i in (1, 3, 5)] for at, text in SCALE.items()}
    assert colours[:4].tolist() == [rgb[1.0], rgb[0.6], rgb[0.0], rgb[0.0]]
    assert np.abs(colours[4] - np.mean([rgb[0.6], rgb[1.0]], axis=0)).max() <= 1
    assert colours[5].tolist() == [128] * 3


def test_picking_a_place_takes_the_nearest_voxel_that_has_a_feature(store):
    frame = store.frame(3)
    centres, seen = store.grid.centres(frame["voxel_index"]), frame["feature_cameras"] > 0
    features = dequantise(frame["features"], frame["feature_scale"])
    chosen = np.flatnonzero(seen)[7]
    x, y, z = centres[chosen] + 0.1
    likeness, place = pick(store, 3, f"{x},{y},{z}")
    assert place.tolist() == centres[chosen].tolist()
    assert np.array_equal(likeness.reference, features[chosen])
    hidden = np.flatnonzero(~seen)[0]
    nearest = np.linalg.norm(centres - centres[hidden], axis=1)
    nearest[~seen] = np.inf
    _, place = pick(store, 3, ",".join(map(str, centres[hidden])))
    assert place.tolist() == centres[nearest.argmin()].tolist()


def test_picking_a_pixel_takes_the_first_voxel_under_it(store):
    """Of all voxels that the camera sees near the pixel, none is nearer to the camera."""
    frame, c = store.frame(3), 0
    centres = store.grid.centres(frame["voxel_index"])
    ego = np.c_[centres, np.ones(len(centres))]
    camera = (frame["cam_T_ego"][c].astype(float) @ ego.T)[:3]
    u, v, _ = (frame["K"][c] @ camera) / camera[2]
    seen = ((frame["feature_cameras"] & 1) == 1) & (camera[2] > 0)
    hidden = 0
    for at in np.flatnonzero(seen):
        _, place = pick(store, 3, f"{store.attrs['cameras'][c]},{u[at]},{v[at]}")
        found = np.flatnonzero((centres == place).all(axis=1)).item()
        reach = np.maximum(0.02 * 96, 0.5 * 60 / camera[2])
        near = seen & (np.hypot(u - u[at], v - v[at]) <= reach)
        assert near[found] and camera[2][found] == camera[2][near].min()
        hidden += found != at
    assert hidden > 0


def test_what_can_t_be_picked_is_said(store, tmp_path):
    for text in ("1,2", "1,2,x", "CAM_NONE,1,2", "1,2,3,4"):
        with pytest.raises(ConfigError, match=rf"--pick {text}: give X,Y,Z .* one of CAM_FRONT"):
            pick(store, 3, text)
    with pytest.raises(ConfigError, match="--pick 99,0,0: the nearest voxel with a feature is at"):
        pick(store, 3, "99,0,0")
    with pytest.raises(ConfigError, match="no voxel with a feature is near that pixel"):
        pick(store, 3, "CAM_FRONT,9000,0")
    without = open_store(str(make_tiny_store(tmp_path / "none.zarr", dim=0)))
    with pytest.raises(ConfigError, match="built without a teacher"):
        pick(without, 3, "0,0,0")


def test_the_picture_of_likeness(store, tmp_path):
    """The same frame, other colours."""
    place = ",".join(map(str, pick(store, 3, "0,0,0")[1]))
    draw_frame(store.url, 3, tmp_path / "plain.png")
    draw_frame(store.url, 3, tmp_path / "picked.png", picked=place)
    draw_frame(store.url, 3, tmp_path / "again.png", colours=tmp_path / "colours.json")
    other = open_store(str(make_tiny_store(tmp_path / "other.zarr", seed=1)))
    store_colours(other, tmp_path / "others.json")
    draw_frame(store.url, 3, tmp_path / "other.png", colours=tmp_path / "others.json")
    plain, picked, again, others = (
        (tmp_path / f"{name}.png").read_bytes() for name in ("plain", "picked", "again", "other")
    )
    assert plain == again and len({plain, picked, others}) == 3


def test_likeness_is_drawn_in_every_image_and_from_above(store, tmp_path, monkeypatch):
    """Each voxel where its camera sees it, in the colour of its cosine; the picked one starred."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    frame = store.frame(3)
    centres = store.grid.centres(frame["voxel_index"])
    _, place = pick(store, 3, "CAM_FRONT,48,30")
    chosen = np.flatnonzero((centres == place).all(axis=1)).item()
    draw_frame(store.url, 3, tmp_path / "picked.png", picked=",".join(map(str, centres[chosen])))
    features = dequantise(frame["features"], frame["feature_scale"]).astype(float)
    cosine = features @ features[chosen] / np.linalg.norm(features[chosen])
    cosine /= np.maximum(np.linalg.norm(features, axis=1), 1e-9)
    scale = [to_rgb(text) for text in SCALE.values()]
    colours = np.stack([np.interp(cosine, [*SCALE], c) for c in zip(*scale, strict=True)], axis=1)
    *cameras, bev, bar = drawn[0].axes
    assert len(cameras) == len(store.attrs["cameras"]) and "cosine" in bar.get_xlabel()
    stars = 0
    for c, axis in enumerate(cameras):
        xyz = frame["cam_T_ego"][c].astype(float) @ np.c_[centres, np.ones(len(centres))].T
        u, v, w = frame["K"][c].astype(float) @ xyz[:3]
        seen = (frame["feature_cameras"] >> c) & 1 == 1
        wanted = np.c_[u / w, v / w, colours][seen]
        points = axis.collections[0]
        got = np.c_[points.get_offsets(), points.get_facecolors()[: seen.sum(), :3]]
        by_place = [rows[np.lexsort(rows[:, :2].round(3).T)] for rows in (got, wanted)]
        np.testing.assert_allclose(*by_place, atol=1e-6)
        at = np.array([u[chosen], v[chosen]]) / w[chosen]
        height, width = store.attrs["config"]["images"]["size"]
        inside = w[chosen] > 0 and (at >= 0).all() and (at < [width, height]).all()
        assert len(axis.lines) == inside
        if inside:
            np.testing.assert_allclose(axis.lines[0].get_xydata(), [at])
        stars += len(axis.lines)
    assert stars > 0
    _, x, y = np.unravel_index(frame["voxel_index"].astype(int), store.grid.shape)
    highest = {(a, b): k for k, (a, b) in enumerate(zip(x, y, strict=True))}
    picture = bev.images[0].get_array()
    covered = np.zeros(picture.shape[:2], bool)
    for at, k in highest.items():
        if frame["feature_cameras"][k]:
            np.testing.assert_allclose(picture[at], colours[k], atol=1e-6)
        covered[at] = True
    assert (picture[~covered] == 1).all()
