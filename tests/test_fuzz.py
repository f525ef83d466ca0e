"""Whatever bytes are in a file that we parse: a right result, or one of our errors that names it.

``make fuzz`` tries 10,000 cases a parser, the suite FEW; the cases of a seed are always the same.
"""

import copy
import json
import math
import os
import resource
import signal
import traceback
from contextlib import contextmanager
from functools import partial
from random import Random

import numpy as np
import pytest
import torch
import yaml
from conftest import FAST

from occfeat_targets.build import check_records, read_dataset
from occfeat_targets.config import TargetsConfig
from occfeat_targets.images import check_jpeg, decode_jpeg
from occfeat_targets.sources import SOURCES, nuscenes
from occfeat_targets.sources.base import SourceError
from occfeat_targets.store.files import StoreError
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.settings import ConfigError
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


def damaged(data, random):
    """Bytes with something wrong: bits, holes, cuts, insertions, repetitions."""
    data, at = bytearray(data), random.randrange(max(1, len(data)))
    end = min(len(data), at + random.choice((1, 4, 64, 1024)))
    match random.randrange(6):
        case 0 if data:
            data[at] ^= 1 << random.randrange(8)
        case 1:
            del data[at:]
        case 2:
            del data[at:end]
        case 3:
            data[at:end] = bytes(end - at)
        case 4:
            data[at:at] = random.randbytes(random.choice((1, 2, 8, 300)))
        case _:
            data[at:end] = random.randbytes(end - at)
    return bytes(data)


def bent(value, random):
    """A JSON document with something wrong: a value exchanged, dropped, nested or of another."""
    value = copy.deepcopy(value)
    holder = value
    for _ in range(random.randrange(1, 8)):
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        if not keys:
            break
        key = random.choice(keys)
        inner = holder[key]
        if isinstance(inner, dict | list) and inner and random.random() < 0.9:
            holder = inner
            continue
        match random.randrange(8):
            case 0:
                del holder[key]
            case 1:
                holder[key] = [inner]
            case 2:
                holder[key] = str(inner)
            case 3 if isinstance(inner, int | float):
                holder[key] = random.choice((-inner, inner * 1e6, inner + 1, int(inner) << 40))
            case 4:
                holder[key] = holder[random.choice(keys)]
            case _:
                holder[key] = random.choice(ODD)
        break
    return value


def bent_json(data, random):
    """JSON text of a bent document, or damaged text, or very deep."""
    kind = random.random()
    if kind < 0.02:
        return b"[" * 100_000
    if kind < 0.2:
        return damaged(data, random)
    return json.dumps(bent(json.loads(data), random)).encode()


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


def fuzz(file, make, parse, errors, names=None):
    """Parse what ``make(random)`` writes into a file, again and again: only ``errors`` may come,
    with a short message that names a place: one of ``names`` (the file's by default)."""
    names = names or (file.name,)
    refused, faults = 0, {}
    for seed in range(CASES):
        content = make(Random(seed))
        file.write_bytes(content)
        try:
            with bounded():
                parse()
        except errors as error:
            refused += 1
            text = ascii(str(error))
            if not any(name in text for name in names) or len(text) > 2000:
                faults.setdefault(f"poor message: {text[:300]}", seed)
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            faults.setdefault(f"{type(error).__name__} at {place.name}:{place.lineno}", seed)
    print(f"{CASES} cases, {refused} refused")
    shown = "".join(f"\n  case {seed}: {fault}" for fault, seed in faults.items())
    assert not faults, f"{len(faults)} kinds of fault:{shown}"


TABLES = (
    *("attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map"),
    *("sample", "sample_annotation", "sample_data", "scene", "sensor", "visibility"),
)


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_tables(table, dataroot):
    (file,) = dataroot.glob(f"*/{table}.json")
    whole = file.read_bytes()
    config = TargetsConfig.load(None, FAST)

    def parse():
        check_records(read_dataset(dataroot, None, config), config)

    fuzz(
        file,
        lambda random: bent_json(whole, random),
        parse,
        SourceError,
        ("v1.0-mini", "scene", "map expansion"),
    )


def test_splits(dataroot):
    (tables,) = (p.parent for p in dataroot.glob("*/sample.json"))
    splits = {"train": ["scene-0001"], "val": ["scene-0002"]}
    whole, config = json.dumps(splits).encode(), TargetsConfig.load(None, FAST)
    fuzz(
        tables / "splits.json",
        lambda random: bent_json(whole, random),
        lambda: read_dataset(dataroot, None, config),
        SourceError,
        ("splits.json", "v1.0-mini"),
    )


def test_map_expansion(dataroot):
    file = next(dataroot.glob("maps/expansion/*.json"))
    whole = file.read_bytes()

    def parse():
        nuscenes._read_map.cache_clear()
        for layers in vars(SOURCES("nuscenes")().read_map(str(file))).values():
            for shapes in layers.values():
                list(shapes.near(np.zeros(2), 50))

    fuzz(file, lambda random: bent_json(whole, random), parse, ValueError)


def test_lidar(dataroot):
    file = next(dataroot.glob("samples/LIDAR_TOP/*"))
    whole, source = file.read_bytes(), SOURCES("nuscenes")()
    fuzz(file, lambda random: damaged(whole, random), lambda: source.read_lidar(file), ValueError)


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

    def make(random):
        return damaged(whole[:size], random) + whole[size:]

    fuzz(file, make, parse, ValueError)


@pytest.mark.parametrize("config", [TargetsConfig, TrainConfig])
def test_settings_files(config, tmp_path):
    plain = config().plain()

    def make(random):
        if random.random() < 0.05:
            return random.choice((b"a: " * 3000, b"[" * 5000, b"a: &a [*a]", b"x: " + b"9" * 5000))
        text = yaml.safe_dump(bent(plain, random)).encode()
        return damaged(text, random) if random.random() < 0.4 else text

    file = tmp_path / "settings.yaml"
    names = ("settings.yaml", "setting", "plug-in", *config.model_fields)
    fuzz(file, make, lambda: config.load(file), ConfigError, names)


def test_set_texts(tmp_path):
    keys = ["grid.x", "model.channels", "lidar", "x", "", ".", '"', "a.b.c.d", "teacher.name=1"]
    values = [
        "1",
        "[" * 3000,
        "{a: &x [*x]}",
        "9" * 5000,
        "\x00",
        "0x",
        "1e999",
        "!!python/x y",
        "é",
    ]

    def parse():
        config.load(None, [file.read_text(errors="surrogateescape")])

    for config in (TargetsConfig, TrainConfig):
        file = tmp_path / "text"
        fuzz(
            file,
            lambda random: damaged(
                f"{random.choice(keys)}={random.choice(values)}".encode(), random
            ),
            parse,
            ConfigError,
            ("--set", "setting", "plug-in", "config", *config.model_fields),
        )


def read_all(url, allow_incomplete):
    """Everything a reader may ask for."""
    store = open_store(url, allow_incomplete)
    for i in range(len(store)):
        store.describe(i)
        if store.per_frame["n_voxels"][i] >= 0:
            store.frame(i)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zarr.json", "features/zarr.json", "token/zarr.json"])
def test_metadata_of_a_store(name, tiny_store, tmp_path):
    import shutil

    store = shutil.copytree(tiny_store, tmp_path / "store.zarr")
    whole = (store / name).read_bytes()
    for allow_incomplete in (False, True):
        fuzz(
            store / name,
            lambda random: bent_json(whole, random),
            partial(read_all, str(store), allow_incomplete),
            StoreError,
            (str(store),),
        )


@pytest.mark.slow
def test_verify_of_any_metadata(tiny_store, tmp_path):
    """verify reports what a reader refuses."""
    import shutil

    store = shutil.copytree(tiny_store, tmp_path / "store.zarr")
    whole = (store / "zarr.json").read_bytes()
    fuzz(
        store / "zarr.json",
        lambda random: bent_json(whole, random),
        lambda: list(verify_store(str(store))),
        StoreError,
        (str(store),),
    )


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
        lambda random: bent_json(whole, random),
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

    fuzz(file, lambda random: damaged(whole, random), parse, RunError)
