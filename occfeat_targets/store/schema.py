"""The store contract, format version 1: which arrays there are, how to create and read them.

A targets store is one Zarr v3 group. The first axis of every array is the frame. Large arrays
are sharded by *block* of frames: one block = one file of each such array = one writer. Small
per-frame arrays are one chunk each, written by the client alone. Nothing past ``n_voxels``,
``n_points``, ``n_vehicles`` and ``image_offset`` of a frame means anything.

Imports numpy, zarr and fsspec only: together with ``grid`` this is all the trainer needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import fsspec
import numpy as np
import zarr
from fsspec.implementations.local import LocalFileSystem
from zarr.codecs import BloscCodec, ZstdCodec
from zarr.storage import FsspecStore, LocalStore

from occfeat_targets.store.grid import VoxelGrid

FORMAT = "occfeat-targets"
FORMAT_VERSION = 1
CAMERAS = (
    "CAM_FRONT_LEFT",
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_LEFT",
    "CAM_BACK",
    "CAM_BACK_RIGHT",
)
MAP_CLASSES = ("road", "sidewalk", "crosswalk", "parking", "divider")
CORRUPTIONS = (
    "camera_crash",
    "frame_lost",
    "motion_blur",
    "color_quant",
    "brightness",
    "low_light",
    "fog",
    "snow",
)
"""Of nuScenes-C. A store of corrupted images says in its config which: ``fog-easy``."""
SEVERITIES = ("easy", "mid", "hard")
FAILED = -1
"""``n_voxels`` of a frame that could not be processed (``build --on-error skip``)."""

INVISIBLE = 1
"""nuScenes visibility 0-40 %: a box that is hardly seen."""
JPEG_HOLE = bytes(512)
"""JPEG data never has this many zero bytes in a row; a lost disk block does, and decoders paint it
grey and say nothing."""

_FEATURE_ROWS = 2048
_VOXEL_ROWS = 4096
_POINT_ROWS = 8192
_IMAGE_BYTES = 65536

_CODECS = {
    "none": None,
    "zstd": ZstdCodec(level=1),
    "blosc-zstd-shuffle": BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"),
    # int8 directions hardly compress; lz4 at memcpy speed only drops the padding
    "blosc-lz4": BloscCodec(cname="lz4", clevel=1, shuffle="noshuffle", typesize=1),
}


class StoreError(RuntimeError):
    """A store is missing, foreign, incomplete, of another version, or damaged."""


@dataclass(frozen=True)
class ArraySpec:
    """One array of the store, without its leading frame axis.

    ``chunk`` is the inner chunk of one frame for arrays sharded by block, and None for the small
    arrays that are one chunk over all frames. ``fill`` is a value that real data never has, so
    that what was never written can't be taken for data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...] | None
    fill: Any
    codec: str
    doc: str


def array_specs(config: dict, feature_dim: int, with_map: bool) -> tuple[ArraySpec, ...]:
    """All arrays of a store.

    Args:
        config: plain resolved config, as in the root attribute ``config``.
        feature_dim: channels C of the teacher; 0 without one, then no features are stored.
        with_map: whether the dataset's map expansion is stored.
    """
    grid = VoxelGrid.from_dict(config["grid"])
    n_points = config["lidar"]["max_points"] * config["lidar"]["sweeps"]
    n_voxels = min(n_points, grid.n_voxels)  # a point occupies one voxel: this can't overflow
    n_vehicles = config["labels"]["max_vehicles"]
    n_image_bytes = image_room(config["images"]["size"])
    voxel_rows, bev = min(_VOXEL_ROWS, n_voxels), grid.bev_shape
    feature_rows = min(_FEATURE_ROWS, n_voxels)
    n_cameras, n_map = len(CAMERAS), len(MAP_CLASSES)
    specs = (
        ArraySpec("n_voxels", "int32", (), None, FAILED, "zstd", "occupied voxels; -1 = failed"),
        ArraySpec("n_points", "int32", (), None, -1, "zstd", "stored lidar returns"),
        ArraySpec("n_vehicles", "int32", (), None, -1, "zstd", "stored vehicle boxes"),
        ArraySpec(
            "image_offset",
            "int32",
            (n_cameras + 1,),
            None,
            -1,
            "zstd",
            "bytes [offset[c], offset[c+1]) of `images` are camera c's JPEG",
        ),
        ArraySpec("token", "uint8", (16,), None, 0, "zstd", "sample token, 32 hex digits"),
        ArraySpec("scene", "uint16", (), None, 65535, "zstd", "index into attribute `scenes`"),
        ArraySpec("split", "uint8", (), None, 255, "zstd", "index into attribute `splits`"),
        ArraySpec("timestamp_us", "int64", (), None, -1, "zstd", "lidar keyframe time"),
        ArraySpec("K", "float32", (n_cameras, 3, 3), None, np.nan, "zstd", "of stored images"),
        ArraySpec(
            "cam_T_ego", "float32", (n_cameras, 4, 4), None, np.nan, "zstd", "at camera's time"
        ),
        ArraySpec("ego_T_lidar", "float32", (4, 4), None, np.nan, "zstd", "keyframe lidar pose"),
        ArraySpec("global_T_ego", "float64", (4, 4), None, np.nan, "zstd", "ego at lidar's time"),
        ArraySpec(
            "voxel_index",
            "uint32",
            (n_voxels,),
            (voxel_rows,),
            2**32 - 1,
            "blosc-zstd-shuffle",
            "flat (Z, X, Y) indices of occupied voxels, ascending",
        ),
        ArraySpec(
            "features",
            "int8",
            (n_voxels, feature_dim),
            (feature_rows, feature_dim),
            -128,
            "blosc-lz4",
            "mean teacher feature / feature_scale, rounded",
        ),
        ArraySpec(
            "feature_scale", "float16", (n_voxels,), (voxel_rows,), np.nan, "zstd", "int8 step"
        ),
        ArraySpec(
            "feature_cameras",
            "uint8",
            (n_voxels,),
            (voxel_rows,),
            255,
            "zstd",
            "bit c = camera c sees the voxel; 0 = no feature target",
        ),
        ArraySpec(
            "images",
            "uint8",
            (n_image_bytes,),
            (_IMAGE_BYTES,),
            0,
            "none",
            "the cameras' JPEGs one after another",
        ),
        ArraySpec(
            "points",
            "int16",
            (n_points, 4),
            (min(_POINT_ROWS, n_points), 4),
            -32768,
            "zstd",
            "lidar in ego: x, y, z in steps of attribute `point_step_m`, intensity",
        ),
        ArraySpec(
            "vehicle_boxes",
            "float32",
            (n_vehicles, 8),
            (n_vehicles, 8),
            np.nan,
            "zstd",
            "in ego: centre x, y, z, length, width, height (m), yaw (rad), visibility 1-4",
        ),
        ArraySpec("vehicle", "uint8", bev, bev, 255, "zstd", "1 = cell centre in a vehicle"),
        ArraySpec(
            "vehicle_visible",
            "uint8",
            bev,
            bev,
            255,
            "zstd",
            "0 where only vehicles of visibility 1 lie, else 1",
        ),
        ArraySpec("map", "uint8", (n_map, *bev), (n_map, *bev), 255, "zstd", "`map_classes`"),
    )
    absent = set() if with_map else {"map"}
    if feature_dim == 0:
        absent |= {"features", "feature_scale"}
    return tuple(s for s in specs if s.name not in absent)


def image_room(size: tuple[int, int]) -> int:
    """Bytes of room for a frame's JPEGs of (height, width): one byte per pixel.

    About twice what quality 95 needs on a textured image.
    """
    return _IMAGE_BYTES * math.ceil(len(CAMERAS) * size[0] * size[1] / _IMAGE_BYTES)


def point_step_m(grid: VoxelGrid) -> float:
    """Length of one int16 step of ``points``: 2 mm, or more for grids beyond 65 m.

    Raises:
        ValueError: when the grid reaches so far that a step would exceed 1 cm.
    """
    reach = max(abs(bound) for lo, hi, _ in (grid.x, grid.y, grid.z) for bound in (lo, hi))
    step_mm = 2 * math.ceil(reach / (2e-3 * 32767))
    if step_mm > 10:
        raise ValueError(f"grid reaches {reach} m; int16 points allow at most 327 m at 1 cm")
    return step_mm / 1000


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem and path of a store url.

    Raises:
        StoreError: the url's protocol is unknown or its package is not installed.
    """
    try:
        return fsspec.url_to_fs(str(url))
    except (ImportError, ValueError) as error:
        raise StoreError(f"{url}: {error}") from error


def absolute(url: str) -> str:
    """A local path made absolute, since workers may run elsewhere; other urls as they are."""
    fs, path = filesystem(url)
    return path if isinstance(fs, LocalFileSystem) else str(url)


def find(url: str, below: str = "") -> list[str]:
    """All files of a store, or below one of its folders; listed afresh, no pattern matching."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    return fs.find(f"{path}/{below}" if below else path)


def zarr_store(url: str, read_only: bool) -> zarr.abc.store.Store:
    """Zarr's store object for a local path or any URL that fsspec opens."""
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        return LocalStore(path, read_only=read_only)
    return FsspecStore.from_url(str(url), read_only=read_only)


def create_arrays(group: zarr.Group, specs: tuple[ArraySpec, ...], n_frames: int, block: int):
    """Create all arrays of a store.

    Args:
        group: the root group, writable.
        specs: from :func:`array_specs`.
        n_frames: length of the frame axis.
        block: frames per shard.
    """
    for spec in specs:
        sharded = spec.chunk is not None
        group.create_array(
            spec.name,
            shape=(n_frames, *spec.shape),
            dtype=spec.dtype,
            chunks=(1, *spec.chunk) if sharded else (n_frames, *spec.shape),
            shards=(block, *_whole_chunks(spec)) if sharded else None,
            compressors=_CODECS[spec.codec],
            filters=None,
            fill_value=spec.fill,
            attributes={"description": spec.doc},
        )


def _whole_chunks(spec: ArraySpec) -> tuple[int, ...]:
    """Per-frame extent of a shard: the array's, rounded up to whole inner chunks."""
    return tuple(
        chunk * math.ceil(n / chunk) for n, chunk in zip(spec.shape, spec.chunk, strict=True)
    )


def dequantise(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Features float32 (V, C) from int8 codes (V, C) and float16 steps (V,)."""
    return codes.astype(np.float32) * scale.astype(np.float32)[:, None]


class TargetStore:
    """Read access to a finished store.

    Opens lazily and holds no state besides zarr's own, so open one per process.
    """

    def __init__(self, url: str, group: zarr.Group):
        self.url = str(url)
        self.group = group
        self.attrs = dict(group.attrs)

    @cached_property
    def grid(self) -> VoxelGrid:
        """The voxel grid of every target."""
        return VoxelGrid.from_dict(self.attrs["grid"])

    @cached_property
    def per_frame(self) -> dict[str, np.ndarray]:
        """The small arrays, whole: name -> (N, ...), as in :func:`array_specs`."""
        return {s.name: self.array(s.name)[:] for s in self.specs if s.chunk is None}

    @cached_property
    def specs(self) -> tuple[ArraySpec, ...]:
        """The arrays this store has."""
        return array_specs(
            self.attrs["config"], self.attrs["teacher"]["dim"], self.attrs["map_classes"] != []
        )

    def __len__(self) -> int:
        """Number of frames, failed ones included."""
        return self.array("n_voxels").shape[0]

    def array(self, name: str) -> zarr.Array:
        """One array of the store.

        Raises:
            StoreError: when the store lacks it.
        """
        try:
            return self.group[name]
        except KeyError:
            raise StoreError(f"{self.url} has no array {name!r}: the store is damaged") from None

    def token(self, i: int) -> str:
        """Sample token of frame i, 32 hex digits."""
        return self.per_frame["token"][i].tobytes().hex()

    def scene(self, i: int) -> str:
        """Scene name of frame i."""
        return self.attrs["scenes"][self.per_frame["scene"][i]]

    def split(self, i: int) -> str:
        """Official split of frame i."""
        return self.attrs["splits"][self.per_frame["split"][i]]

    def frame(self, i: int) -> dict[str, Any]:
        """Everything stored of frame i, trimmed to what is valid.

        Returns:
            The arrays of :func:`array_specs` without their frame axis; ``images`` is a list of
            one JPEG (bytes) per camera.

        Raises:
            StoreError: when the frame failed in the build.
        """
        frame: dict[str, Any] = {name: values[i] for name, values in self.per_frame.items()}
        if frame["n_voxels"] == FAILED:
            raise StoreError(
                f"{self.url}: frame {i} ({self.scene(i)}, sample {self.token(i)}) has no targets: "
                "it failed when the store was built"
            )
        offset = frame["image_offset"]
        lengths = {"points": frame["n_points"], "vehicle_boxes": frame["n_vehicles"]}
        lengths["images"] = offset[-1]
        for name in ("voxel_index", "features", "feature_scale", "feature_cameras"):
            lengths[name] = frame["n_voxels"]
        for spec in self.specs:
            if spec.chunk is not None:
                frame[spec.name] = self.array(spec.name)[i, : lengths.get(spec.name)]
        jpegs = frame["images"].tobytes()
        frame["images"] = [jpegs[a:b] for a, b in pairwise(offset)]
        return frame


def open_store(url: str, allow_incomplete: bool = False) -> TargetStore:
    """Open a store for reading.

    Raises:
        StoreError: one sentence each for nothing there, a foreign store, another format
            version, or an unfinished build (unless ``allow_incomplete``).
    """
    try:
        group = zarr.open_group(zarr_store(url, read_only=True), mode="r", zarr_format=3)
    except FileNotFoundError:
        raise StoreError(
            f"{url}: no targets store here (make one: occfeat-targets build)"
        ) from None
    attrs = dict(group.attrs)
    if attrs.get("format") != FORMAT:
        raise StoreError(f"{url} is a Zarr group but not an {FORMAT} store")
    if attrs.get("format_version") != FORMAT_VERSION:
        raise StoreError(
            f"{url} has format version {attrs.get('format_version')}, this program reads "
            f"{FORMAT_VERSION}: rebuild the store or use a matching version of occfeat"
        )
    if not attrs.get("complete") and not allow_incomplete:
        raise StoreError(f"{url} is not finished: run its occfeat-targets build again to continue")
    return TargetStore(url, group)
