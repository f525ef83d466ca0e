"""Checksums of a store's objects (files): crc32 and size of each, kept in the array ``checksums``.
It holds text: a line ``crc32 size key`` for every other object, sorted by key, and last a line of
the same form without a key for the text before it. Any changed byte, and any object that was
exchanged, lost or added, contradicts a line. It is zlib's crc32, not Zarr's crc32c, because small
arrays end in their own crc32c: over such data that one has always the same value."""

import zlib
from collections.abc import Iterator

import numpy as np
import zarr
from tqdm.contrib.concurrent import thread_map
from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import WrapperStore

from occfeat_targets.store.files import filesystem, find

NAME = "checksums"
DATA = f"{NAME}/c/0"
"""The object that holds the text."""

Checksum = tuple[int, int]
"""crc32 and size in bytes."""


class RecordingStore(WrapperStore[Store]):
    """A Zarr store that notes the checksum of every object written through it."""

    def __init__(self, store: Store):
        super().__init__(store)
        self.written: dict[str, Checksum] = {}

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object."""
        self.written[key] = checksum(value.to_bytes())
        await self._store.set(key, value)


def checksum(data: bytes) -> Checksum:
    """Of an object's content."""
    return zlib.crc32(data), len(data)


def write_checksums(
    url: str, group: zarr.Group, known: dict[str, Checksum], without: tuple[str, ...] = ()
) -> None:
    """Write the array into an otherwise finished store. Objects that are not ``known`` (key to
    checksum) from their writing are read; those of the folders ``without`` will not stay."""
    fs, root = filesystem(url)
    there = {key for key in find(url) if not key.startswith(without)}
    keys = sorted((there | {f"{NAME}/zarr.json"}) - {DATA})
    # Lines have a length that is known now: the array's own zarr.json, which holds it, is in them.
    n_bytes = len(_text(dict.fromkeys([*keys, ""], (0, 0))))
    array = group.create_array(
        NAME,
        shape=(n_bytes,),
        chunks=(n_bytes,),
        dtype="uint8",
        compressors=None,
        fill_value=0,
        dimension_names=("checksum_byte",),
        attributes={"description": "crc32, size and key of every other object, a line each"},
        overwrite=True,
    )
    sums = {key: known.get(key) or checksum(fs.cat_file(f"{root}/{key}")) for key in keys}
    sums[""] = checksum(_text(sums))
    array[:] = np.frombuffer(_text(sums), np.uint8)


def check_objects(url: str, quick: bool = False) -> Iterator[str]:
    """A line for each object of a finished store that is not what was written. All are read, unless
    ``quick``: then of what arrays hold only the sizes count."""
    fs, root = filesystem(url)
    found = find(url)
    try:
        wanted = _parse(fs.cat_file(f"{root}/{DATA}"))
    except FileNotFoundError:
        yield f"{DATA} is missing: nothing says what the other objects should be"
        return
    except ValueError:
        yield f"{DATA} is damaged: it does not match its own checksum"
        return
    yield from (f"{key} is missing" for key in sorted(wanted.keys() - found.keys()))
    others = sorted(found.keys() - {DATA, *wanted})
    yield from (f"{key} is no object of this store" for key in others)

    def read(key: str) -> str | None:
        if found[key] != wanted[key][1]:
            return f"{key} has {found[key]} bytes instead of {wanted[key][1]}"
        if quick and "/c/" in key:
            return None
        same = checksum(fs.cat_file(f"{root}/{key}")) == wanted[key]
        return None if same else f"{key} is damaged: it does not match its checksum"

    both = sorted(wanted.keys() & found.keys())
    problems = thread_map(  # the threads wait for storage, mostly
        read, both, max_workers=8, desc="checksums", unit="file", disable=None
    )
    yield from filter(None, problems)


def _text(sums: dict[str, Checksum]) -> bytes:
    return "".join(f"{crc:08x} {size:012d} {key}\n" for key, (crc, size) in sums.items()).encode()


def _parse(data: bytes) -> dict[str, Checksum]:
    """Inverse of :func:`_text`, without the last line. ValueError: that contradicts the others."""
    lines = data.decode().splitlines(keepends=True)
    body = "".join(lines[:-1]).encode()
    if not lines or lines[-1].encode() != _text({"": checksum(body)}):
        raise ValueError
    rows = (line.rstrip("\n").split(" ", 2) for line in lines[:-1])
    return {key: (int(crc, 16), int(size)) for crc, size, key in rows}
