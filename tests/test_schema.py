import io
import json
import shutil

import numpy as np
import pytest
import zarr
from conftest import build_store
from PIL import Image

from occfeat_targets.config import TargetsConfig
from occfeat_targets.frame import layout_of, make_outputs
from occfeat_targets.outputs.points import point_step_m
from occfeat_targets.sources.nuscenes import CAMERAS
from occfeat_targets.store.files import StoreError, zarr_store
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import SEAL, open_store


def test_a_frame_reads_back_as_the_contract_says(demo_store):
    store = open_store(demo_store)
    assert len(store) == 4
    frame = store.frame(1)
    for spec in store.specs.values():
        if spec.name != "images":
            assert frame[spec.name].dtype == spec.dtype, spec.name
    n = frame["n_voxels"]
    assert n > 1000
    assert frame["features"].shape == (n, 8)
    assert frame["voxel_index"].shape == frame["feature_cameras"].shape == (n,)
    assert frame["map"].shape == (5, 200, 200)
    assert frame["boxes"].shape == (frame["n_boxes"], 8)
    assert frame["box_class"].shape == (frame["n_boxes"],)
    assert frame["box_class"].max() < len(store.attrs["box_classes"])
    sizes = [Image.open(io.BytesIO(jpeg)).size for jpeg in frame["images"]]
    assert sizes == [(512, 288)] * len(CAMERAS)
    assert store.split(0) in ("mini_train", "mini_val")
    assert len(store.token(0)) == 32


def test_root_attributes_describe_the_store(demo_store):
    attrs = open_store(demo_store).attrs
    assert attrs["format"] == "occfeat-targets"
    assert attrs["format_version"] == 2
    assert attrs["teacher"]["name"] == "patch-means"
    axes = {"x": [-50.0, 50.0, 200], "y": [-50.0, 50.0, 200], "z": [-4.5, 5.5, 8]}
    assert attrs["grid"] == axes and VoxelGrid.from_dict(axes) == VoxelGrid()
    assert TargetsConfig.of(attrs["config"]).block_frames == 2
    assert attrs["source"]["version"] == "v1.0-mini"
    assert attrs["cameras"] == list(CAMERAS)
    assert "human.pedestrian.adult" in attrs["box_classes"]
    assert set(attrs["vehicle_classes"]) < set(attrs["box_classes"])
    assert attrs["map_classes"] == ["road", "sidewalk", "crosswalk", "parking", "divider"]


def test_arrays_say_themselves_what_they_are(demo_store):
    """Names of the axes, which array counts the rows, a description: of the writer's own specs."""
    store = open_store(demo_store)
    config = TargetsConfig.of(store.attrs["config"])
    layout = layout_of(config, store.attrs, 8)
    wanted = {s.name: s for output in make_outputs(config, layout) for s in output.specs()}
    assert store.specs.keys() == wanted.keys() == set(store.attrs["arrays"])
    for name, spec in wanted.items():
        array = store.array(name)
        assert array.metadata.dimension_names == ("frame", *spec.axes)
        assert array.shape == (4, *spec.axes.values())
        assert array.attrs["description"] == spec.doc
        found = store.specs[name]
        np.testing.assert_array_equal(found.fill, spec.fill)
        same = ("dtype", "axes", "doc", "rows", "chunk")
        assert all(getattr(found, key) == getattr(spec, key) for key in same), name
    assert wanted["boxes"].rows == "n_boxes" and wanted["images"].rows == "image_offset"


def test_what_was_never_written_is_not_data(demo_store):
    """Past the valid length every array holds its fill, and no fill is a legal value."""
    store = open_store(demo_store)
    n = store.per_frame["n_voxels"][0]
    assert (store.array("features")[0, n:] == -128).all()
    assert (store.array("voxel_index")[0, n:] == 2**32 - 1).all()
    assert np.isnan(store.array("feature_scale")[0, n:]).all()
    assert (store.array("feature_cameras")[0, n:] == 255).all()


def test_no_two_blocks_share_a_file(demo_store):
    """One block, one shard of every sharded array: the rule that makes parallel writes safe."""
    store = open_store(demo_store)
    block = store.attrs["config"]["block_frames"]
    for spec in store.specs.values():
        array = store.array(spec.name)
        if spec.chunk is None:
            assert array.nchunks == 1, spec.name
        else:
            assert array.shards[0] == block, spec.name
            assert array.shards[1:] >= array.shape[1:], spec.name
            assert array.chunks[0] == 1, spec.name


def test_only_codecs_with_a_stable_specification(demo_store):
    stable = {"bytes", "zstd", "blosc", "crc32c", "sharding_indexed"}
    for path in demo_store.glob("*/zarr.json"):
        meta = json.loads(path.read_text())
        assert meta["zarr_format"] == 3
        names = {codec["name"] for codec in meta["codecs"]}
        for codec in meta["codecs"]:
            if codec["name"] == "sharding_indexed":
                names |= {inner["name"] for inner in codec["configuration"]["codecs"]}
        assert names <= stable, path


def test_voxels_can_never_outnumber_their_room():
    specs = _specs(TargetsConfig(), map_classes=())
    assert specs["voxel_index"].shape == (40960,)
    assert "map" not in specs
    few = TargetsConfig.load(None, ["grid.x=[0,1,2]", "grid.y=[0,1,3]"])
    specs = _specs(few, map_classes=("road", "divider"))
    assert specs["voxel_index"].shape == (2 * 3 * 8,)
    assert specs["map"].axes == {"map_class": 2, "x": 2, "y": 3}


def _specs(config, map_classes=(), cameras=CAMERAS):
    shared = {"cameras": cameras, "map_classes": map_classes}
    layout = layout_of(config, shared | {"box_classes": (), "vehicle_classes": ()}, 384)
    return {s.name: s for output in make_outputs(config, layout) for s in output.specs()}


@pytest.mark.parametrize(
    ("n", "dtype", "fill"),
    [(1, "uint8", 255), (7, "uint8", 255), (8, "uint16", 65535), (15, "uint16", 65535),
     (16, "uint32", 2**32 - 1)],
)  # fmt: skip
def test_any_number_of_cameras_has_bits_and_none_of_them_is_the_fill(n, dtype, fill):
    specs = _specs(TargetsConfig(), cameras=tuple(f"camera {c}" for c in range(n)))
    bits = specs["feature_cameras"]
    assert (bits.dtype, bits.fill) == (dtype, fill)
    assert 2**n - 1 < fill
    assert specs["K"].axes == {"camera": n, "uvw": 3, "xyz": 3}
    assert specs["image_offset"].shape == (n + 1,)


def test_point_step_grows_with_the_grid():
    assert point_step_m(VoxelGrid()) == 0.002
    assert point_step_m(VoxelGrid(x=(-102.4, 102.4, 512))) == 0.004
    with pytest.raises(ValueError, match="grid reaches 400"):
        point_step_m(VoxelGrid(x=(-400, 400, 100)))


def _with_attrs(store, tmp_path, **attrs):
    copy = shutil.copytree(store, tmp_path / "copy.zarr")
    zarr.open_group(zarr_store(copy, read_only=False), mode="r+").attrs.update(attrs)
    return copy


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ({"complete": False}, "not finished"),
        ({"format": "other"}, "not an occfeat-targets store"),
        ({"format_version": 1}, "format version 1, this program reads 2: rebuild the store"),
        ({"format_version": 7}, "format version 7, this program reads 2"),
        ({"n_frames": 3}, "the attributes in its zarr.json are damaged"),
        ({"scenes": ["a", "b"]}, "the attributes in its zarr.json are damaged"),
        ({SEAL: 1}, "the attributes in its zarr.json are damaged"),
    ],
)
def test_wrong_stores_are_refused(demo_store, tmp_path, attrs, message):
    with pytest.raises(StoreError, match=message):
        open_store(_with_attrs(demo_store, tmp_path, **attrs))


def test_nothing_there_is_refused(tmp_path):
    with pytest.raises(StoreError, match="no targets store here"):
        open_store(tmp_path / "nothing.zarr")


def test_a_url_without_its_package_says_which():
    with pytest.raises(StoreError, match="gcsfs"):
        open_store("gs://bucket/targets.zarr")


def test_urls_work_wherever_a_path_does(demo_root, demo_store):
    """memory:// stands for s3://: the same fsspec road, no rename, no local files."""
    url = "memory://bucket/targets.zarr"
    build_store(demo_root, url)
    ours, theirs = open_store(url).frame(3), open_store(demo_store).frame(3)
    assert ours["images"] == theirs["images"]
    assert np.array_equal(ours["features"], theirs["features"])


def test_an_axis_of_a_name_has_one_length(demo_store):
    """Else xarray, which reads a store as one data set, refuses it."""
    lengths = {}
    for _, array in zarr.open_group(demo_store, mode="r").arrays():
        for name, length in zip(array.metadata.dimension_names, array.shape, strict=True):
            assert lengths.setdefault(name, length) == length, (array.name, name)
    assert len(lengths) > 15
