"""Whatever bytes are in a file that we parse: a right result, or one of our errors that names it.

``make fuzz`` tries 10,000 cases a parser, the suite FEW; they are always the same.
"""

import copy
import io
import json
import math
import os
import resource
import shutil
import signal
import time
from contextlib import contextmanager, redirect_stderr, suppress
from functools import partial

import google_crc32c
import numpy as np
import pytest
import safetensors.numpy
import torch
import yaml
from conftest import FAST
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from occfeat_pipelines.retrieval import read_queries
from occfeat_targets.build import check_records, read_dataset
from occfeat_targets.config import TargetsConfig
from occfeat_targets.images import check_jpeg, decode_jpeg
from occfeat_targets.info import as_text, summarise
from occfeat_targets.sources import SOURCES, nuscenes_map
from occfeat_targets.sources.base import SourceError
from occfeat_targets.store.checksums import write_checksums
from occfeat_targets.store.files import StoreError, open_group
from occfeat_targets.store.reader import SEAL, open_store, seal
from occfeat_targets.store.settings import ConfigError
from occfeat_targets.store.texts import Texts
from occfeat_targets.texts import read_vocabulary
from occfeat_targets.verify import verify_store
from occfeat_train.config import TrainConfig
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run, RunError

FEW = 12
CASES = int(os.environ.get("OCCFEAT_FUZZ", FEW))
SECONDS, BYTES = 30, 2_000_000_000
"""What one case may take, and by how much memory may grow."""
ODD = (
    *(None, True, -1, 0, 2, 10**30, 1e308, math.nan, math.inf, "", "x", "../../../etc/hostname"),
    *("/etc/hostname", "\x00", "a" * 5000, [], {}, [[]], [None], {"x": None}, [1, 2, 3]),
)


@st.composite
def damaged(draw, data):
    """Bytes with something wrong: bits, holes, cuts, insertions, repetitions."""
    at = draw(st.integers(0, max(0, len(data) - 1)))
    end = min(len(data), at + draw(st.sampled_from((1, 4, 64, 1024))))
    match draw(st.sampled_from(("bit", "cut", "hole", "zeros", "more", "other", "again"))):
        case "bit" if data:
            new = bytes([data[at] ^ 1 << draw(st.integers(0, 7))])
            return data[:at] + new + data[at + 1 :]
        case "cut":
            return data[:at]
        case "hole":
            return data[:at] + data[end:]
        case "zeros":
            return data[:at] + bytes(end - at) + data[end:]
        case "more":
            return data[:at] + draw(st.binary(max_size=300)) + data[at:]
        case "again":
            return data[:end] + data[at:]
    new = draw(st.binary(min_size=1, max_size=64))
    return data[:at] + new + data[at + len(new) :]


@st.composite
def bent(draw, document):
    """A JSON document with something wrong: a value exchanged, dropped, nested or of another."""
    document = copy.deepcopy(document)
    holder = document
    while holder:
        keys = st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder)))
        key = draw(keys)
        inner = holder[key]
        if isinstance(inner, dict | list) and inner and draw(st.integers(0, 9)):
            holder = inner
            continue
        match draw(
            st.sampled_from(("odd", "odd", "odd", "drop", "nest", "text", "swap", "number"))
        ):
            case "drop":
                del holder[key]
            case "nest":
                holder[key] = [inner]
            case "text":
                holder[key] = str(inner)
            case "swap":
                holder[key] = holder[draw(keys)]
            case "number" if isinstance(inner, int | float):
                holder[key] = draw(
                    st.sampled_from((-inner, inner * 1e6, inner + 1, int(inner) << 40))
                )
            case _:
                holder[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
        break
    return document


def bent_json(data):
    """JSON text of a bent document, or damaged text, or very deep."""
    documents = bent(json.loads(data)).map(lambda document: json.dumps(document).encode())
    # Of ten, eight are well-formed: the parser behind the parser is what is tried.
    return st.integers(0, 49).flatmap(
        lambda n: st.just(b"[" * 100_000) if n == 49 else damaged(data) if n > 39 else documents
    )


class Late(BaseException):
    """Not an Exception, which the code under test may catch."""


@contextmanager
def bounded():
    """No case may hang or hoard."""

    def late(*_):
        raise Late(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory)
    assert grown < BYTES, f"took {grown / 1e9:.1f} GB"


def fuzz(file, contents, parse, errors, names=None):
    """Parse each of the ``contents`` written into a file: only ``errors`` may come, with a short
    message that names a place: one of ``names`` (the file's by default)."""
    names, refused, began = names or (file.name,), [], time.monotonic()

    @settings(
        max_examples=CASES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(contents)
    def case(content):
        file.write_bytes(content)
        try:
            with bounded():
                parse()
        except errors as error:
            text = ascii(str(error))
            refused.append(text)
            assert any(name in text for name in names) and len(text) < 2000, f"poor message: {text}"
        except Late as error:
            raise AssertionError(str(error)) from None

    case()
    print(f"{CASES} cases, {len(refused)} refused, {time.monotonic() - began:.1f} s")


TABLES = (
    *("attribute", "calibrated_sensor", "category", "ego_pose", "instance", "lidarseg", "log"),
    *("map", "sample", "sample_annotation", "sample_data", "scene", "sensor", "visibility"),
)


@pytest.fixture
def small_world(dataroot):
    """Little to read: one scene of two keyframes, three boxes in each, two things of a kind on the
    map."""
    (tables,) = (path.parent for path in dataroot.glob("*/sample.json"))

    def keep(table, column, wanted, most=None):
        rows = json.loads((tables / f"{table}.json").read_text())
        rows = [row for row in rows if row[column] in wanted]
        rows = [row for i, row in enumerate(rows) if most is None or i < most]
        (tables / f"{table}.json").write_text(json.dumps(rows))
        return rows

    (scene,) = keep("scene", "name", {json.loads((tables / "scene.json").read_text())[0]["name"]})
    samples = {row["token"] for row in keep("sample", "scene_token", {scene["token"]})}
    data = keep("sample_data", "sample_token", samples)
    keep("ego_pose", "token", {row["ego_pose_token"] for row in data})
    boxes = keep("sample_annotation", "sample_token", samples, most=6)
    keep("instance", "token", {row["instance_token"] for row in boxes})
    file = next(dataroot.glob("maps/expansion/*.json"))
    layers = json.loads(file.read_text())
    few = {k: v[:2] if k in ("road_divider", *nuscenes_map.AREAS.values()) else v
           for k, v in layers.items()}  # fmt: skip
    named = json.dumps([v for k, v in few.items() if k not in ("node", "polygon", "line")])
    for kind in ("polygon", "line", "node"):
        few[kind] = [row for row in few[kind] if row["token"] in named]
        named += json.dumps(few[kind])
    file.write_text(json.dumps(few))
    return dataroot


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_tables(table, small_world):
    dataroot = small_world
    (file,) = dataroot.glob(f"*/{table}.json")
    whole = file.read_bytes()
    config = TargetsConfig.load(None, FAST)

    def parse():
        check_records(read_dataset(dataroot, None, config), config)

    fuzz(
        file,
        bent_json(whole),
        parse,
        SourceError,
        ("v1.0-mini", "scene", "map expansion"),
    )


def test_splits(small_world):
    dataroot = small_world
    (tables,) = (p.parent for p in dataroot.glob("*/sample.json"))
    (scene,) = json.loads((tables / "scene.json").read_text())
    splits = {"train": [scene["name"]], "val": ["scene-0002"]}
    whole, config = json.dumps(splits).encode(), TargetsConfig.load(None, FAST)
    fuzz(
        tables / "splits.json",
        bent_json(whole),
        lambda: read_dataset(dataroot, None, config),
        SourceError,
        ("splits.json", "v1.0-mini"),
    )


def test_map_expansion(small_world):
    file = next(small_world.glob("maps/expansion/*.json"))
    whole = file.read_bytes()

    def parse():
        nuscenes_map._read_map.cache_clear()
        for layers in vars(SOURCES("nuscenes")().read_map(str(file))).values():
            for shapes in layers.values():
                list(shapes.near(np.zeros(2), 50))

    fuzz(file, bent_json(whole), parse, ValueError)


def test_lidar(dataroot):
    file = next(dataroot.glob("samples/LIDAR_TOP/*"))
    whole, source = file.read_bytes()[:40_000], SOURCES("nuscenes")()
    fuzz(file, damaged(whole), lambda: source.read_lidar(file), ValueError)


@pytest.mark.parametrize("part", ["header", "anywhere"])
def test_jpeg(part, dataroot):
    file = next(dataroot.glob("samples/CAM_FRONT/*"))
    whole = file.read_bytes()
    size = 700 if part == "header" else len(whole)

    def parse():
        wrong = check_jpeg(file, (900, 1600))
        if wrong:
            raise ValueError(f"{file} {wrong}")
        decode_jpeg(file, (100, 200))

    fuzz(file, damaged(whole[:size]).map(lambda start: start + whole[size:]), parse, ValueError)


@pytest.mark.parametrize("config", [TargetsConfig, TrainConfig])
def test_settings_files(config, tmp_path):
    odd = st.sampled_from((b"a: " * 3000, b"[" * 5000, b"a: &a [*a]", b"x: " + b"9" * 5000))
    texts = bent(config().plain()).map(lambda values: yaml.safe_dump(values).encode())
    contents = st.integers(0, 19).flatmap(
        lambda n: odd if n == 19 else texts.flatmap(damaged) if n > 11 else texts
    )
    file = tmp_path / "settings.yaml"
    names = ("settings.yaml", "setting", "plug-in", *config.model_fields)
    fuzz(file, contents, lambda: config.load(file), ConfigError, names)


def test_set_texts(tmp_path):
    keys = ["grid.x", "model.channels", "lidar", "x", "", ".", '"', "a.b.c.d", "teacher.name=1"]
    keys += ["block_frames", "run.seed", "finetune.lr", "data.workers", "run", "images.quality"]
    values = [
        "1",
        "[" * 300,
        "{a: &x [*x]}",
        "9" * 5000,
        "\x00",
        "0x",
        "1e999",
        "!!python/x y",
        "é",
    ]

    texts = st.tuples(st.sampled_from(keys), st.sampled_from(values)).map("=".join)
    file = tmp_path / "text"
    for config in (TargetsConfig, TrainConfig):
        fuzz(
            file,
            texts.flatmap(lambda text: damaged(text.encode())),
            lambda: config.load(None, [file.read_text(errors="surrogateescape")]),  # noqa: B023
            ConfigError,
            ("--set", "setting", "plug-in", "config", *config.model_fields),
        )


@pytest.fixture
def sealed(tiny_store, tmp_path):
    """A copy of a store of two frames, and what makes its seals fit again, as whoever means harm
    would: crc32c keeps nobody out."""
    store = shutil.copytree(tiny_store, tmp_path / "store.zarr")

    def seal_again(name):
        with suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):
            root = json.loads((store / "zarr.json").read_bytes())
            if name != "zarr.json":
                said = (store / name).read_bytes()
                root["attributes"]["arrays"][name.split("/")[0]] = google_crc32c.value(said)
            root["attributes"][SEAL] = seal(root["attributes"])
            (store / "zarr.json").write_text(json.dumps(root))

    return store, seal_again


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zarr.json", "features/zarr.json", "token/zarr.json"])
def test_metadata_of_a_store(name, sealed):
    """All that a reader may ask for, and info."""
    store, seal_again = sealed

    def parse():
        seal_again(name)
        as_text(summarise(str(store)))
        opened = open_store(str(store))
        opened.sharded, opened.grid.n_voxels  # noqa: B018
        for i in range(min(2, len(opened))):
            opened.describe(i)
            opened.frame(i)

    fuzz(store / name, bent_json((store / name).read_bytes()), parse, StoreError, (str(store),))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zarr.json", "points/zarr.json"])
def test_verify_of_any_metadata(name, sealed):
    """verify reports what a reader refuses, though checksums are as they should be."""
    store, seal_again = sealed

    def parse():
        seal_again(name)
        with suppress(Exception):  # what can't be opened is not opened by verify either
            write_checksums(str(store), open_group(str(store), "r+"), {})
        with redirect_stderr(io.StringIO()):
            verify_store(str(store))

    whole, errors = (store / name).read_bytes(), (StoreError, ConfigError)
    fuzz(store / name, bent_json(whole), parse, errors, (str(store), *TargetsConfig.model_fields))


def test_texts(tmp_path):
    vectors = np.eye(3, 8, dtype=np.float32)
    said = {"prompts": ["a", "b", "c"], "class_names": ["car", "bus"], "classes": [0, 0, 1]}
    said |= {"source": "by hand", "teacher": ""}

    def written(said):
        return safetensors.numpy.save({"embeddings": vectors}, {"texts": json.dumps(said)})

    file = tmp_path / "texts.safetensors"
    contents = st.one_of(damaged(written(said)), bent(said).map(written))
    fuzz(file, contents, lambda: Texts.load(file), StoreError)


def test_vocabularies(tmp_path):
    said = {"templates": ["a {}.", "the {}"], "classes": {"car": ["van", "jeep"], "x": ["y"]}}
    file = tmp_path / "words.json"
    whole = json.dumps(said).encode()
    fuzz(file, bent_json(whole), lambda: read_vocabulary(file), ConfigError)


@pytest.mark.parametrize("name", ["retrieval_anns_val.csv", "true.npy", "visible.npy"])
def test_retrieval_benchmarks(name, tmp_path):
    np.save(tmp_path / "true.npy", np.arange(200)[:, None] % 7 == 0)
    np.save(tmp_path / "visible.npy", np.arange(0, 200, 3))
    table = tmp_path / "retrieval_anns_val.csv"
    table.write_text("a;val;true.npy;visible.npy;a red car\nb;val;true.npy;visible.npy;grass\n")
    whole = (tmp_path / name).read_bytes()
    names = table.name, "true.npy", "visible.npy"
    parse = partial(read_queries, tmp_path, "val")
    fuzz(tmp_path / name, damaged(whole), parse, StoreError, names)


def test_run_json(tmp_path):
    description = {
        "format": "occfeat-run",
        "kind": "pretrain",
        "store": "x.zarr",
        "fraction": 1.0,
        "fraction_unit": "scene",
        "init": None,
        "task": None,
        "created": "20260101-000000",
        "config": TrainConfig().plain(),
    }
    whole = json.dumps(description).encode()
    file = tmp_path / "run.json"
    fuzz(
        file,
        bent_json(whole),
        lambda: Job.of_run(Run(tmp_path)).title,
        (RunError, ConfigError),
        (str(tmp_path), "config", "plug-in", *TrainConfig.model_fields),
    )


def test_checkpoints(tmp_path):
    run = Run(tmp_path)
    run.create({"kind": "pretrain"})
    state = {"network": {"a": torch.arange(5000.0)}, "step": 1}
    run.save(state, {"step": 1, "finished": False})
    file = next(tmp_path.glob("*.pt"))
    whole = file.read_bytes()

    def parse():
        loaded = run.load()[0]
        assert torch.equal(loaded["network"]["a"], state["network"]["a"])

    fuzz(file, damaged(whole), parse, RunError)
