"""The direct shard reader gives what zarr gives, and refuses what it does not know."""

import pickle
import warnings

import fsspec
import google_crc32c
import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

from occfeat_targets.store import shards
from occfeat_targets.store.files import StoreError
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.shards import ShardedArray


def _same(ours, theirs):
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


def test_every_array_and_frame_of_a_store(demo_store):
    store = open_store(demo_store)
    specs = [spec for spec in store.specs.values() if spec.chunk is not None]
    assert len(specs) == 11
    for spec in specs:
        array = store.array(spec.name)
        ours = ShardedArray(store.url, array)
        room = array.shape[1]
        rows = (
            store.per_frame[spec.rows].reshape(len(store), -1)[:, -1] if spec.rows else [room] * 4
        )
        for i, valid in enumerate(rows):
            written = min(room, -(-valid // spec.chunk) * spec.chunk)
            for n in {0, 1, valid, written} - {room}:
                _same(ours.read(i, n), array[i, :n])
            if written == room:
                _same(ours.read(i), array[i])
                _same(ours.read(i, room + 5), array[i])
            else:  # what was never written is no data
                with pytest.raises(StoreError, match="an inner chunk was never written"):
                    ours.read(i)


CODECS = {
    "none": (),
    "zstd": (ZstdCodec(level=1, checksum=True),),
    "blosc lz4": (BloscCodec(cname="lz4", clevel=1, shuffle="noshuffle", typesize=1),),
    "blosc zstd": (BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),),
}


ROWS = (21, 0, 0, 7, 8, 9, 16)


def _array(url, shape=(7, 21, 3), dtype="int16", shards=(3, 24, 3), codec=(), **more):
    """Frames of a ragged array; frame 1 is empty and frame 2 never written. Shape, chunk rows and
    block do not divide each other."""
    more = {"compressors": (*codec, Crc32cCodec())} | more
    group = zarr.open_group(str(url), mode="w", zarr_format=3)
    array = group.create_array(
        "a", shape=shape, dtype=dtype, chunks=(1, 8, 3), shards=shards, **more
    )
    rng = np.random.default_rng(0)
    for i, n in enumerate(ROWS):
        if n:
            array[i, :n] = rng.integers(-99, 99, (n, 3)).astype(dtype)
    return array


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["int8", "uint32", "float16"])
@pytest.mark.parametrize("fill", [0, 77])
def test_ragged_frames_and_missing_chunks(tmp_path, codec, dtype, fill):
    array = _array(tmp_path, dtype=dtype, codec=CODECS[codec], fill_value=fill)
    ours = ShardedArray(tmp_path, array)
    for i, rows in enumerate(ROWS):
        for n in (0, 1, 7, 8, 9, 16, 21, None):
            if (21 if n is None else n) <= 8 * -(-rows // 8):  # padded up to a whole chunk
                _same(ours.read(i, n), array[i, :n])
            else:
                key = f"a/c/{i // 3}/0/0"
                with pytest.raises(StoreError, match=f"{key} is damaged: .* was never written"):
                    ours.read(i, n)


def test_an_index_may_stand_first(tmp_path):
    array = _array(tmp_path, shards={"shape": (3, 24, 3), "index_location": "start"})
    _same(ShardedArray(tmp_path, array).read(4, 8), array[4, :8])


def test_an_index_is_read_once(tmp_path, monkeypatch):
    calls = []
    read = shards._read_local
    monkeypatch.setattr(shards, "_read_local", lambda *args: calls.append(args) or read(*args))
    ours = ShardedArray(tmp_path, _array(tmp_path))
    for i, n in ((0, 21), (1, 0), (0, 21)):
        ours.read(i, n)
    assert len(calls) == 3  # the index, frame 0 twice; frame 1 has no rows


def test_pickles_without_what_it_has_read(tmp_path):
    array = _array(tmp_path, shape=(50, 21, 3), shards=(50, 24, 3))
    ours = ShardedArray(tmp_path, array)
    size = len(pickle.dumps(ours))
    ours.read(3, 7)
    assert len(pickle.dumps(ours)) == size
    _same(pickle.loads(pickle.dumps(ours)).read(3, 7), array[3, :7])


def test_any_url(tmp_path):
    url = "memory://test-shards/targets.zarr"
    array = _array(tmp_path, codec=CODECS["zstd"])
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path), "/test-shards/targets.zarr", recursive=True)
    try:
        ours = ShardedArray(url, zarr.open_group(url, mode="r")["a"])
        ours = pickle.loads(pickle.dumps(ours))
        for i, n in enumerate(ROWS):
            _same(ours.read(i, n), array[i, :n])
        shard = "/test-shards/targets.zarr/a/c/1/0/0"
        fs.pipe_file(shard, fs.cat_file(shard)[:-9])
        fs.rm_file("/test-shards/targets.zarr/a/c/0/0/0")
        ours = pickle.loads(pickle.dumps(ours))
        with pytest.raises(StoreError, match=r"memory://test-shards.*a/c/1/0/0 is damaged"):
            ours.read(3, 7)
        with pytest.raises(StoreError, match=r"memory://test-shards.*a/c/0/0/0 is missing"):
            ours.read(0)
    finally:
        fs.rm("/test-shards", recursive=True)


def _cut_end(data):
    return data[:-100]


def _cut_all_but_a_byte(data):
    return data[:1]


def _flip_in_index(data):
    return data[:-30] + bytes([data[-30] ^ 1]) + data[-29:]


def _empty(data):
    return b""


DAMAGE = {
    _cut_end: "does not match its checksum",
    _cut_all_but_a_byte: "ends early",
    _empty: "ends early",
    _flip_in_index: "does not match its checksum",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("codec", CODECS)
def test_damage_names_the_file(tmp_path, codec, damage):
    array = _array(tmp_path, codec=CODECS[codec])
    shard = tmp_path / "a" / "c" / "1" / "0" / "0"
    shard.write_bytes(damage(shard.read_bytes()))
    ours = ShardedArray(tmp_path, array)
    with pytest.raises(StoreError, match=rf"{shard} is damaged: .*{DAMAGE[damage]}"):
        ours.read(4, 8)
    _same(ours.read(0), array[0])  # the other block is fine


@pytest.mark.parametrize("codec", CODECS)
def test_a_good_index_of_chunks_that_are_gone(tmp_path, codec):
    shards = {"shape": (3, 24, 3), "index_location": "start"}
    array = _array(tmp_path, shards=shards, codec=CODECS[codec])
    shard = tmp_path / "a" / "c" / "0" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(StoreError, match=f"{shard} is damaged: it ends early"):
        ShardedArray(tmp_path, array).read(0)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("checksum_fits", [False, True])
def test_damage_in_a_chunk(tmp_path, codec, checksum_fits):
    """Even of one whose checksum is of the damaged bytes, where decoding can notice."""
    array = _array(tmp_path, codec=CODECS[codec])
    shard = tmp_path / "a" / "c" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    index = np.frombuffer(content[-(16 * 9 + 4) : -4], "<u8").reshape(3, 3, 2)
    start, length = index[0, 0].tolist()
    content[start + 4 : start + 12] = b"\xff" * 8  # of blosc: sizes that crash a trusting reader
    if checksum_fits:
        chunk = bytes(content[start : start + length - 4])
        content[start + length - 4 : start + length] = google_crc32c.value(chunk).to_bytes(
            4, "little"
        )
    shard.write_bytes(content)
    ours = ShardedArray(tmp_path, array)
    if checksum_fits and codec == "none":
        assert ours.read(0).flat[2:6].tolist() == [-1] * 4  # a wrong value, checksum and all
        return
    message = "" if checksum_fits else "does not match its checksum"
    with pytest.raises(StoreError, match=f"{shard} is damaged: .*{message}"):
        ours.read(0)


def test_a_deleted_shard_is_damage_unless_nothing_is_asked_of_it(tmp_path):
    array = _array(tmp_path)
    shard = tmp_path / "a" / "c" / "0" / "0" / "0"
    shard.unlink()
    ours = ShardedArray(tmp_path, array)
    assert ours.read(0, 0).shape == (0, 3)
    with pytest.raises(StoreError, match=f"{shard} is missing"):
        ours.read(0, 1)


STRANGE = {
    "codec": {"codec": (GzipCodec(),)},
    "two codecs": {"codec": (ZstdCodec(), ZstdCodec())},
    "no checksum of chunks": {"compressors": (ZstdCodec(),)},
    "the checksum is compressed": {"compressors": (Crc32cCodec(), ZstdCodec())},
    "big endian": {"serializer": zarr.codecs.BytesCodec(endian="big")},
    "two shards a frame": {"shards": (3, 16, 3)},
    "not sharded": {"shards": None},
}


@pytest.mark.parametrize("what", STRANGE)
def test_unknown_layouts_and_codecs_are_refused(tmp_path, what):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = _array(tmp_path, **STRANGE[what])
    with pytest.raises(StoreError, match=f"{tmp_path}: cannot read array 'a'"):
        ShardedArray(tmp_path, array)
