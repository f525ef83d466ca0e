"""Reading a store: the one reader of both programs."""

import json
from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise
from typing import Any

import google_crc32c
import numpy as np
import zarr

from occfeat_targets.store.files import StoreError, filesystem, open_group
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.lease import writer_of
from occfeat_targets.store.schema import (
    FAILED,
    FORMAT,
    FORMAT_VERSION,
    NEEDED,
    ArraySpec,
    Attributes,
)
from occfeat_targets.store.shards import ShardedArray, read_whole

SEAL = "attributes_crc32c"
"""Root attribute of a finished store: checksum of the others, checked when it is opened. Among
them is ``arrays``, which has a checksum of what each array's ``zarr.json`` says of it."""


NOT_OURS = (ValueError, LookupError, TypeError, AttributeError, RecursionError, ArithmeticError)
"""What zarr raises for a ``zarr.json`` that says something else."""


class TargetStore:
    """Read access to a store, one per process. Opens arrays when asked for, holds no open files."""

    check_reads = True
    """Whether a checksum is taken of what is read of the large arrays."""

    def __init__(self, url: str, group: zarr.Group):
        self.url = str(url)
        self.group = group
        self.attrs: dict[str, Any] = dict(group.attrs)
        self._arrays: dict[str, Any] = {}

    @cached_property
    def grid(self) -> VoxelGrid:
        """The voxel grid of every target."""
        return VoxelGrid.from_dict(self.attrs["grid"])

    @cached_property
    def specs(self) -> dict[str, ArraySpec]:
        """The arrays this store has, by name."""
        specs = {name: self._spec(name) for name in self.attrs["arrays"]}
        small = {s.name: (s.dtype, s.shape) for s in specs.values() if s.chunk is None}
        for name in NEEDED.keys() & specs.keys():
            if small.get(name) != NEEDED[name]:
                raise StoreError(f"{self.url}: {name}/zarr.json is of no array of ours")
        for name, spec in specs.items():
            if spec.rows and "int" not in small.get(spec.rows, ("",))[0]:
                raise StoreError(f"{self.url}: {name}/zarr.json counts its rows by no array")
        return specs

    def _spec(self, name: str) -> ArraySpec:
        array = self.array(name)
        try:
            spec = ArraySpec.of(array)
        except NOT_OURS as error:
            raise StoreError(f"{self.url}: {name}/zarr.json is of no array of ours") from error
        if array.shape[0] != len(self):
            raise StoreError(f"{self.url}: {name} is not of {len(self)} frames")
        return spec

    @cached_property
    def per_frame(self) -> dict[str, np.ndarray]:
        """The small arrays, whole: name to (N, ...). Raises StoreError: one is damaged or lost."""
        small = {s.name: self._whole(s) for s in self.specs.values() if s.chunk is None}
        for name, names in (("scene", "scenes"), ("split", "splits")):
            if (small[name] >= len(self.attrs[names])).any():
                raise StoreError(
                    f"{self.url}: {name} holds numbers that the attribute {names} has no name for"
                )
        return small

    def _whole(self, spec: ArraySpec) -> np.ndarray:
        try:
            values = read_whole(self.url, self.array(spec.name))
        except FileNotFoundError:
            raise StoreError(f"{self.url}: {spec.name} was lost, or never written") from None
        except (ValueError, RuntimeError, OSError, MemoryError, ArithmeticError) as error:
            raise StoreError(f"{self.url}: {spec.name} is damaged: {error}") from error
        if spec.missing(values).any():
            raise StoreError(f"{self.url}: {spec.name} was lost, or never written")
        return values

    @cached_property
    def sharded(self) -> dict[str, ShardedArray]:
        """The large arrays, by name."""
        large = (name for name, spec in self.specs.items() if spec.chunk is not None)
        return {name: ShardedArray(self.url, self.array(name), self.check_reads) for name in large}

    @property
    def has_random_teacher(self) -> bool:
        """Whether its features come from random weights: good for trying things out only."""
        return self.attrs["teacher"]["weights"].startswith("random")

    def __len__(self) -> int:
        """Number of frames, failed ones included."""
        return self.attrs["n_frames"]

    def array(self, name: str) -> zarr.Array:
        """One array, of zarr. Raises StoreError: there is none, or its ``zarr.json`` is damaged."""
        if name not in self._arrays:
            try:
                if array_seals(self.url, [name]) != {name: self.attrs["arrays"][name]}:
                    raise StoreError(f"{self.url}: {name}/zarr.json is damaged")
                self._arrays[name] = self.group[name]
            except (KeyError, FileNotFoundError):
                message = f"{self.url} has no array {name!r}: the store is damaged"
                raise StoreError(message) from None
            except NOT_OURS as error:
                raise StoreError(f"{self.url}: {name}/zarr.json is of no array of ours") from error
        return self._arrays[name]

    def token(self, i: int) -> str:
        """Sample token of frame i, 32 hex digits."""
        return self.per_frame["token"][i].tobytes().hex()

    def scene(self, i: int) -> str:
        """Scene name of frame i."""
        return self.attrs["scenes"][self.per_frame["scene"][i]]

    def split(self, i: int) -> str:
        """Official split of frame i."""
        return self.attrs["splits"][self.per_frame["split"][i]]

    def describe(self, i: int) -> str:
        """Frame i for messages: number, scene, sample."""
        return f"frame {i} ({self.scene(i)}, sample {self.token(i)})"

    def n_rows(self, i: int, name: str) -> int | None:
        """Rows that frame i has of a ragged array; None for one that is not."""
        counter = self.specs[name].rows
        return int(np.ravel(self.per_frame[counter][i])[-1]) if counter else None

    def read(self, i: int, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Arrays of frame i, without frame axis, trimmed to its rows. Raises StoreError, naming the
        frame: it failed in the build, or an array is lacking, never written, or damaged."""
        if self.per_frame["n_voxels"][i] == FAILED:
            raise StoreError(
                f"{self.url}: {self.describe(i)} has no targets: it failed when the store was built"
            )
        try:
            return {name: self._read(i, name) for name in names}
        except Exception as error:  # remote filesystems raise what they like
            self.require_same()
            raise StoreError(f"{self.url}: {self.describe(i)}: {error!s:.500}") from error

    def require_same(self) -> None:
        """After something went wrong: StoreError if it did since the store is another by now."""
        fs, root = filesystem(self.url)
        try:
            same = json.loads(fs.cat_file(f"{root}/zarr.json"))["attributes"] == self.attrs
        except (FileNotFoundError, ValueError, LookupError, TypeError):
            same = False
        if not same:
            raise StoreError(f"{self.url} was replaced or deleted meanwhile: start again with it")

    def frame(self, i: int) -> dict[str, Any]:
        """Everything of frame i, as :meth:`read` does; ``images`` as a list, one JPEG a camera."""
        frame: dict[str, Any] = self.read(i, self.specs)
        jpegs = frame["images"].tobytes()
        frame["images"] = [jpegs[a:b] for a, b in pairwise(frame["image_offset"])]
        return frame

    def _read(self, i: int, name: str) -> np.ndarray:
        if name not in self.specs:
            raise StoreError(f"the store has no {name!r}, it was built without")
        if name in self.per_frame:
            return self.per_frame[name][i]
        return self.sharded[name].read(i, self.n_rows(i, name))


def open_store(url: str, allow_incomplete: bool = False) -> TargetStore:
    """Open a store for reading. Raises StoreError, a sentence each: nothing there, foreign, another
    format version, unfinished (unless ``allow_incomplete``), and damaged attributes."""
    try:
        group = open_group(url, "r")
        attrs: dict[str, Any] = dict(group.attrs)
    except FileNotFoundError:
        raise StoreError(
            f"{url}: no targets store here (make one: occfeat-targets build)"
        ) from None
    except NOT_OURS as error:
        raise StoreError(f"{url}: its zarr.json is damaged, or not of a group") from error
    if attrs.get("format") != FORMAT:
        raise StoreError(f"{url} is a Zarr group but not an {FORMAT} store")
    if attrs.get("format_version") != FORMAT_VERSION:
        raise StoreError(
            f"{url} has format version {attrs.get('format_version')!r:.40}, this program reads "
            f"{FORMAT_VERSION}: rebuild the store or use a matching version of occfeat"
        )
    if not attrs.get("complete") and not allow_incomplete:
        if writer := writer_of(url):
            raise StoreError(f"{writer} is building {url} now: wait until it is finished")
        raise StoreError(f"{url} is not finished: run its occfeat-targets build again to continue")
    if attrs.get("complete") and attrs.get(SEAL) != seal(attrs):
        raise StoreError(f"{url}: the attributes in its zarr.json are damaged")
    try:
        Attributes.of(attrs, "attributes")
        VoxelGrid.from_dict(attrs["grid"])  # which has no defaults here
    except NOT_OURS as error:
        raise StoreError(f"{url}: its zarr.json is damaged: {error}") from error
    return TargetStore(url, group)


def array_seals(url: str, names: Iterable[str]) -> dict[str, int]:
    """The root attribute ``arrays``: name to checksum of the array's ``zarr.json``."""
    fs, root = filesystem(url)
    return {name: google_crc32c.value(fs.cat_file(f"{root}/{name}/zarr.json")) for name in names}


def seal(attributes: dict[str, Any]) -> int:
    """The value of :data:`SEAL` for root attributes."""
    others = {key: value for key, value in attributes.items() if key != SEAL}
    return google_crc32c.value(json.dumps(others, sort_keys=True).encode())
