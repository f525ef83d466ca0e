"""The store contract, format version 2: what an array of a store is, and how one is made. A targets
store is one Zarr v3 group. The first axis of every array is the frame. Large arrays are sharded by
*block* of frames: one block = one file of each such array = one writer. Small per-frame arrays are
one chunk each, written by the client alone. An array whose ``rows`` names another one is ragged: of
frame i, only as many rows as that array says mean anything. Which arrays a store has is said by the
modules of ``outputs``; a reader needs none of them, since each array carries its description, axes
and ``rows``. Every inner chunk ends in a crc32c."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import zarr
from pydantic import ConfigDict, Field, model_validator
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.settings import Settings, Size

FORMAT = "occfeat-targets"
FORMAT_VERSION = 2
FAILED = -1
"""``n_voxels`` of a frame that could not be processed (``build --on-error skip``)."""
NEEDED: dict[str, tuple[str, tuple[int, ...]]] = {
    "token": ("uint8", (16,)),
    "scene": ("uint16", ()),
    "split": ("uint8", ()),
    "n_voxels": ("int32", ()),
}
"""The arrays by which a reader tells frames apart: dtype and shape, without the frame axis."""
MARKERS = "build/blocks"
"""Folder of an unfinished store: a JSON file for each block that is done."""
MAX_CAMERAS = 16
INVISIBLE = 1
"""nuScenes' lowest visibility, 0-40 %: such vehicles are left out of loss and metric."""
JPEG_HOLE = bytes(512)
"""JPEG data never has so many zeros in a row; a lost disk block does, which decoders paint grey."""
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

_CODECS = {
    "none": (),
    "zstd": (ZstdCodec(level=1),),
    "shuffle": (BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"),),
    # int8 directions hardly compress; lz4 at memcpy speed only drops the padding
    "lz4": (BloscCodec(cname="lz4", clevel=1, shuffle="noshuffle", typesize=1),),
}


@dataclass(frozen=True)
class ArraySpec:
    """One array of the store, without its leading frame axis."""

    name: str
    dtype: str
    axes: dict[str, int]
    """Name to size, in order; of a ragged array the first is the most rows a frame may have."""
    doc: str
    fill: Any
    """A value that real data never has: what was never written can't be taken for data."""
    rows: str | None = None
    """Name of the array that counts a frame's rows (or of offsets, whose last entry does)."""
    chunk: int | None = None
    """Rows of an inner chunk, for arrays sharded by block; None: one chunk over all frames."""
    codec: str = "zstd"
    setting: str = "its spec"
    """Where there is room for more rows: what a frame that has too many is told to raise."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(self.axes.values())

    def missing(self, values: np.ndarray) -> np.ndarray:
        """Which frames of ``values`` (N, ...) were never written: bool (N,)."""
        unset = np.isnan(values) if self.fill != self.fill else values == self.fill
        return unset.reshape(len(values), -1).all(axis=1)

    @classmethod
    def of(cls, array: Any) -> Self:
        """Of an array (of zarr) that :func:`create_arrays` made; codec and setting are not told.
        Raises what Python does of one that it did not make."""
        chunk = array.chunks[1] if array.shards else None
        axes = dict(zip(array.metadata.dimension_names[1:], array.shape[1:], strict=True))
        doc, rows = (array.attrs.get(key) for key in ("description", "rows"))
        if not isinstance(rows, str | None):
            raise TypeError(f"rows are counted by {rows!r:.40}")
        return cls(array.basename, str(array.dtype), axes, str(doc), array.fill_value, rows, chunk)


class _Some(Settings):
    """Keys that must be there, among others."""

    model_config = ConfigDict(extra="allow")


class _Images(_Some):
    size: Size
    corruption: str


class _Config(_Some):
    images: _Images
    block_frames: int = Field(gt=0, lt=1 << 31)
    train_preset: str = ""


class _Teacher(_Some):
    name: str
    weights: str
    dim: int = Field(ge=0, lt=1 << 31)


class _Source(_Some):
    dataset: str
    version: str


class Attributes(_Some):
    """What readers need of the root attributes of a store; there are more."""

    complete: bool
    n_frames: int = Field(gt=0, lt=1 << 31)
    grid: VoxelGrid
    config: _Config
    point_step_m: float = Field(gt=0)
    cameras: list[str] = Field(min_length=1, max_length=MAX_CAMERAS)
    scenes: list[str]
    splits: list[str]
    box_classes: list[str]
    vehicle_classes: list[str]
    map_classes: list[str]
    source: _Source
    software: dict[str, str]
    arrays: dict[str, int] = Field(default_factory=dict)
    teacher: _Teacher | None = None
    failed: dict[str, str] | None = None
    """These three come in the course of the build."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        needed = {*NEEDED, "images", "image_offset"}
        if self.complete and not (self.teacher and needed <= self.arrays.keys()):
            raise ValueError(f"lack the teacher, or one of the arrays {', '.join(sorted(needed))}")
        if self.complete and self.failed is None:
            raise ValueError("lack failed")
        return self


def create_arrays(group: zarr.Group, specs: Iterable[ArraySpec], n_frames: int, block: int) -> None:
    """Create all arrays of a store of ``n_frames`` frames, ``block`` of them per shard."""
    for spec in specs:
        chunks, shards = (n_frames, *spec.shape), None
        if spec.chunk is not None:
            rows, *rest = spec.shape
            chunks = (1, spec.chunk, *rest)
            shards = (block, spec.chunk * math.ceil(rows / spec.chunk), *rest)
        group.create_array(
            spec.name,
            shape=(n_frames, *spec.shape),
            dtype=spec.dtype,
            chunks=chunks,
            shards=shards,
            compressors=(*_CODECS[spec.codec], Crc32cCodec()),
            filters=None,
            fill_value=spec.fill,
            dimension_names=("frame", *spec.axes),
            attributes={"description": spec.doc, **({"rows": spec.rows} if spec.rows else {})},
        )


def dequantise(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Features float32 (V, C) from int8 codes (V, C) and float16 steps (V,)."""
    return codes.astype(np.float32) * scale.astype(np.float32)[:, None]
