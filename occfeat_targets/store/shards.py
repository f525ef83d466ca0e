"""Fast reads of arrays, of one frame if sharded: the same Zarr v3 files, without zarr's overhead.
zarr-python reads and parses a shard's index again for every frame, several milliseconds. Here each
process parses an index once and then reads just the inner chunks that it needs. Any layout or codec
but those of ``occfeat_targets.store.schema`` is refused, never guessed. No size that a file claims
is believed before the memory is taken for it."""

import math
import os
import struct
from typing import Any

import google_crc32c  # a dependency of zarr, which checks the same indices with it
import numcodecs
import numcodecs.blosc
import numpy as np
from zarr.storage import LocalStore

from occfeat_targets.store.files import StoreError, filesystem

# One loader worker per core is parallel enough, and blosc's own threads do not survive a fork.
numcodecs.blosc.use_threads = False

_MISSING = 2**64 - 1
"""Offset of an inner chunk that was never written: data never equals the fill value."""

MAX_BYTES = 2**30
"""Most that a frame of a sharded array may take, or another array as a whole; more is damage."""

Ranges = list[tuple[int, int]]
"""(start, length) in bytes; a negative start counts from the end of the file."""

_CODECS = (("bytes", "crc32c"), ("bytes", "zstd", "crc32c"), ("bytes", "blosc", "crc32c"))
_ZSTD, _BLOSC = numcodecs.Zstd(), numcodecs.Blosc()


def read_whole(url: str, array: Any) -> np.ndarray:
    """A store's array (of zarr) that is one chunk: ``array[:]``. Raises ValueError, OSError or
    RuntimeError: it is damaged, or FileNotFoundError; or too large, or laid out in another way."""
    codecs = array.metadata.to_dict()["codecs"]
    names = tuple(codec["name"] for codec in codecs)
    if names not in _CODECS or not _little_endian(codecs[0], array.dtype):
        raise ValueError(f"it has other codecs than none, zstd or blosc, and crc32c: {codecs}")
    if array.chunks != array.shape:
        raise ValueError(f"it has chunks {array.chunks}, should be one of {array.shape}")
    out = _room(array.shape, array.dtype)
    fs, root = filesystem(url)
    key = array.metadata.encode_chunk_key((0,) * array.ndim)
    _unpack(_checked(fs.cat_file(f"{root}/{array.path}/{key}"), "its chunk"), names, out)
    return out


def _room(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if (size := math.prod(shape) * dtype.itemsize) > MAX_BYTES:
        raise ValueError(f"it claims {size} bytes, the most is {MAX_BYTES}")
    return np.empty(shape, dtype)


def _zstd_size(data: bytes) -> int:
    """How much the header of a zstd frame (RFC 8878, 3.1.1.1) says that it holds; 0: it doesn't."""
    flags = data[4] if data[:4] == b"\x28\xb5\x2f\xfd" and len(data) > 4 else 0
    one_segment = flags >> 5 & 1
    start = 6 - one_segment + (0, 1, 2, 4)[flags & 3]
    size = data[start : start + (one_segment, 2, 4, 8)[flags >> 6]]
    return int.from_bytes(size, "little") + (256 if len(size) == 2 else 0)


def _unpack(data: bytes, codecs: tuple[str, ...], out: np.ndarray) -> None:
    if "blosc" in codecs:
        # Blosc trusts the sizes in the header: wrong ones make it read past the end of the data.
        if len(data) < 16 or struct.unpack_from("<I4xI", data, 4) != (out.nbytes, len(data)):
            raise ValueError("the blosc header of an inner chunk is wrong")
        _BLOSC.decode(data, out)
        return
    size = _zstd_size(data) if "zstd" in codecs else len(data)
    if size != out.nbytes:
        raise ValueError(f"a chunk is of {size} bytes instead of {out.nbytes}")
    if "zstd" in codecs:
        _ZSTD.decode(data, out)
        return
    out.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8)


class ShardedArray:
    """Reads frames of one array (N, rows, ...) that is sharded by block of frames: one of a store's
    arrays, as zarr has it, with inner chunks (1, chunk_rows, ...). Holds neither open files nor
    connections, only the shard indices read so far (16 bytes per inner chunk): safe after a fork,
    and pickled without them. Without ``check`` inner chunks' checksums are passed over. Raises
    StoreError, naming the array, for any other layout or codec."""

    def __init__(self, url: str, array: Any, check: bool = True):
        self.url, self.name, self._check = str(url), array.path, check
        self.shape, self.dtype = array.shape, array.dtype
        sharding = _sharding(array)
        self._codecs = tuple(codec["name"] for codec in sharding.get("codecs", ()))
        if self._codecs not in _CODECS:
            raise StoreError(
                f"{self.url}: cannot read array {self.name!r}, it is not sharded by frames or has "
                "other codecs than none, zstd or blosc, and crc32c behind it: "
                f"{array.metadata.to_dict()['codecs']}"
            )
        self._local_root = str(array.store.root) if isinstance(array.store, LocalStore) else None
        self._encode_key = array.metadata.encode_chunk_key
        self._chunk_rows = array.chunks[1]
        self._frames, self._row_chunks = array.shards[0], array.shards[1] // array.chunks[1]
        self._index_first = sharding["index_location"] == "start"
        self._indices: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_indices": {}}

    def read(self, i: int, n: int | None = None) -> np.ndarray:
        """The first n rows of frame i, or all: ``array[i, :n]``. Raises StoreError, naming the
        shard's file, if it is missing, truncated or damaged."""
        rows = self.shape[1] if n is None else min(int(n), self.shape[1])
        chunks, key = -(-rows // self._chunk_rows), self._key(i)
        try:
            out = _room((chunks, self._chunk_rows, *self.shape[2:]), self.dtype)
            if chunks:  # a block without any row, such as a vehicle, may have no file
                entries = self._entries(key, i)[:chunks]
                if (entries[:, 0] == _MISSING).any():
                    raise ValueError("an inner chunk was never written")
                # A frame's chunks lie apart (zarr's Morton order): there is nothing to merge.
                for data, target in zip(self._read(key, entries.tolist()), out, strict=True):
                    data = _checked(data, "an inner chunk") if self._check else data[:-4]
                    _unpack(data, self._codecs, target)
        except FileNotFoundError:
            raise StoreError(f"{self.url}/{key} is missing") from None
        except (OSError, ValueError, RuntimeError) as error:  # numcodecs raises RuntimeError
            raise StoreError(f"{self.url}/{key} is damaged: {error}") from error
        return out.reshape(-1, *self.shape[2:])[:rows]

    def ranges(self, i: int, n: int | None = None) -> tuple[str, Ranges]:
        """Where :meth:`read` finds its rows: a file below the store, and byte ranges in it."""
        key, rows = self._key(i), self.shape[1] if n is None else n
        return key, self._entries(key, i)[: -(-rows // self._chunk_rows)].tolist()

    def _key(self, i: int) -> str:
        """The shard of frame i, as a path below the store."""
        shard = (int(i) // self._frames,) + (0,) * (len(self.shape) - 1)
        return f"{self.name}/{self._encode_key(shard)}"

    def _entries(self, key: str, i: int) -> np.ndarray:
        """Where the inner chunks of frame i are: uint64 (chunks, (offset, length))."""
        if key not in self._indices:
            size = 16 * self._frames * self._row_chunks + 4
            (data,) = self._read(key, [(0 if self._index_first else -size, size)])
            index = np.frombuffer(_checked(data, "the shard index"), "<u8")
            self._indices[key] = index.reshape(self._frames, self._row_chunks, 2)
        return self._indices[key][int(i) % self._frames]

    def _read(self, key: str, ranges: Ranges) -> list[bytes]:
        """Byte ranges of a shard; ValueError when it is too short."""
        if self._local_root is not None:  # in a quarter of the time fsspec takes
            parts = _read_local(self._local_root, key, ranges)
        else:
            fs, root = filesystem(self.url)  # not kept: fsspec knows which survive a fork
            starts = [start for start, _ in ranges]
            ends = [start + length or None for start, length in ranges]
            paths = [f"{root}/{key}"] * len(ranges)
            parts = fs.cat_ranges(paths, starts, ends, on_error="raise")
        for data, (_, length) in zip(parts, ranges, strict=True):
            if len(data) != length:
                raise ValueError(f"it ends early: {len(data)} of {length} bytes are there")
        return parts


def _checked(data: bytes, what: str) -> bytes:
    """What the crc32c in the last four bytes is of."""
    if google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise ValueError(f"{what} does not match its checksum")
    return data[:-4]


def _sharding(array: Any) -> dict:
    """The sharding codec's configuration; empty if the array is not laid out as expected."""
    codecs = array.metadata.to_dict()["codecs"]
    if [codec["name"] for codec in codecs] != ["sharding_indexed"] or array.ndim < 2:
        return {}
    sharding = codecs[0]["configuration"]
    data, index = sharding["codecs"], sharding["index_codecs"]
    chunks, shards = array.chunks, array.shards
    by_frame = chunks[0] == 1 and chunks[2:] == shards[2:] == array.shape[2:]
    whole = shards[1] >= array.shape[1]
    checked = [codec["name"] for codec in index] == ["bytes", "crc32c"]
    little = _little_endian(data[0], array.dtype) and _little_endian(index[0], np.dtype(np.uint64))
    return sharding if by_frame and whole and checked and little else {}


def _little_endian(codec: dict, dtype: np.dtype) -> bool:
    """Whether a ``bytes`` codec stores the dtype little-endian; single bytes have no order."""
    return dtype.itemsize == 1 or codec.get("configuration", {}).get("endian") == "little"


def _read_local(root: str, key: str, ranges: Ranges) -> list[bytes]:
    # Opened anew each time: 4 us, and neither a limit on open files nor a fork can ever matter.
    file = os.open(f"{root}/{key}", os.O_RDONLY)
    try:
        size = os.fstat(file).st_size
        starts = [max(0, size + start) if start < 0 else min(start, size) for start, _ in ranges]
        wanted = zip(starts, ranges, strict=True)
        return [os.pread(file, min(length, size - at), at) for at, (_, length) in wanted]
    finally:
        os.close(file)
