"""What was made to do harm, or a broken disk left: refused in one sentence."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import FAST, build_store, reseal
from tiny_store import make_tiny_store
from train_runs import options
from train_runs import run as train

from occfeat_targets.build import BuildStopped, check_records, read_dataset
from occfeat_targets.cli import main
from occfeat_targets.config import TargetsConfig
from occfeat_targets.images import decode_jpeg
from occfeat_targets.sources.base import SourceError
from occfeat_targets.store.files import StoreError, open_group
from occfeat_targets.store.reader import SEAL, array_seals, open_store, seal
from occfeat_targets.store.settings import ConfigError
from occfeat_train.export import load_bev_net, load_network
from occfeat_train.rig import rig_of_frame, write_rig
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run


def _run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def check(dataroot):
    config = TargetsConfig.load(None, FAST)
    check_records(read_dataset(dataroot, None, config), config)


def change(dataroot, table, edit):
    (file,) = dataroot.glob(f"*/{table}.json")
    rows = json.loads(file.read_text())
    edit(rows)
    file.write_text(json.dumps(rows))


@pytest.mark.parametrize("name", ["/etc/hostname", "samples/../../secret.jpg", "a\0b"])
def test_files_outside_the_dataroot_are_not_read(dataroot, name):
    change(dataroot, "sample_data", lambda rows: [row.update(filename=name) for row in rows])
    with pytest.raises(SourceError, match=r"sample_data.json: row \w+: filename: .*inside"):
        check(dataroot)


def test_a_chain_of_samples_that_bites_its_tail(dataroot):
    def bite(rows):
        for row in rows:
            row["next"] = row["token"]

    change(dataroot, "sample", bite)
    with pytest.raises(SourceError, match=r"sample.json: row \w+ comes after itself: next goes"):
        check(dataroot)


def test_a_chain_of_sweeps_that_bites_its_tail(dataroot):
    change(dataroot, "sample_data", lambda rows: [r.update(prev=r["token"]) for r in rows])
    config = TargetsConfig.load(None, [*FAST, "lidar.sweeps=10"])
    with pytest.raises(SourceError, match=r"sample_data.json: row \w+ comes after itself: prev"):
        read_dataset(dataroot, None, config)


def test_a_token_may_be_empty(dataroot):
    """Found by 10,000 damaged tables: such a lidar row had no sweeps, not even itself."""

    def rename(rows):
        next(row for row in rows if "LIDAR_TOP" in row["filename"])["token"] = ""

    change(dataroot, "sample_data", rename)
    records = read_dataset(dataroot, None, TargetsConfig.load(None, FAST)).records
    assert {len(record.sweep_paths) for record in records} == {1}


def test_keyframes_are_not_dropped_silently(dataroot):
    change(dataroot, "sample", lambda rows: [row.update(next=None) for row in rows])
    with pytest.raises(SourceError, match=r"sample.json: row \w+: next: .*valid string, got None"):
        check(dataroot)


@pytest.mark.parametrize("sensor", ["CAM_FRONT", "LIDAR_TOP"])
def test_a_pipe_is_not_waited_for(dataroot, sensor):
    file = next(dataroot.glob(f"samples/{sensor}/*"))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(SourceError, match=f"{re.escape(file.name)} is no regular file"):
        check(dataroot)


def test_a_jpeg_that_claims_to_be_huge(dataroot):
    """By its header alone; the devkit lifts Pillow's own limit."""
    import nuscenes.utils.map_mask  # noqa: F401

    file = next(dataroot.glob("samples/CAM_FRONT/*"))
    data = bytearray(file.read_bytes())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 65_500, 65_500)
    file.write_bytes(data)
    with pytest.raises(SourceError, match=f"{re.escape(file.name)} claims 65500x65500 pixels"):
        check(dataroot)
    with pytest.raises(
        ValueError, match=f"{re.escape(file.name)}: cannot decode.*65500x65500 pixels"
    ):
        decode_jpeg(file, (100, 200))


@pytest.mark.parametrize("value", [-1.0, 255.5, 1e9])
def test_intensities_out_of_range(dataroot, tmp_path, value):
    file = next(dataroot.glob("samples/LIDAR_TOP/*"))
    rows = np.fromfile(file, "<f4").reshape(-1, 5)
    rows[7:9, 3] = value
    rows.tofile(file)
    with pytest.raises(
        BuildStopped, match=f"{re.escape(file.name)} has 2 points with an intensity outside"
    ):
        build_store(dataroot, tmp_path / "targets.zarr")


# --- stores -------------------------------------------------------------------------------------

EVIL = """
import pathlib
from teachers import PatchMeans as Teacher
from occfeat_targets.outputs.base import Output
from occfeat_targets.sources.nuscenes import NuScenesSource as Source
pathlib.Path(__file__).with_name("harm").touch()
"""


@pytest.fixture
def store(demo_store, tmp_path, monkeypatch):
    """A copy that a test may spoil; beside it a module ``evil``, whose import makes ``harm``."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text(EVIL)
    yield Path(shutil.copytree(demo_store, tmp_path / "targets.zarr"))
    sys.modules.pop("evil", None)


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        ({"teacher": {"name": "evil:Teacher"}}, "teacher"),
        ({"source": "evil:Source"}, "source"),
        ({"outputs": {"evil:Output": {}}}, "output"),
    ],
)
def test_code_that_a_store_names_runs_only_if_the_user_names_it_too(
    store, demo_root, tmp_path, setting, kind
):
    group = open_group(str(store), "r+")
    group.attrs["config"] = group.attrs["config"] | setting
    reseal(store)
    recompute = ("--recompute", 1, "--dataroot", demo_root, "--plugin", FAST[0].split("=")[1])
    commands = {
        "teacher": [("verify", store, *recompute[:-1], "toys:Other")],
        "source": [("verify", store, *recompute), ("corrupt", demo_root, store, tmp_path / "out")],
        "output": [("verify", store), ("view", store), ("corrupt", demo_root, store, "out")],
    }[kind]
    assert _run("info", store).exit_code == 0
    for command in commands:
        result = _run(*command)
        assert result.exit_code == 1, result.output
        name = f"evil:{kind.capitalize()}"
        said = result.output.splitlines()[-1]
        assert said.startswith(f"Error: {store} was made with the plug-in {name}"), result.output
        assert f"again, --plugin {name}, if you trust it" in said
        assert not (tmp_path / "harm").exists()
    result = _run(*commands[0], "--plugin", f"evil:{kind.capitalize()}")
    assert (tmp_path / "harm").exists()


def _bomb(n_bytes):
    """A zstd frame of zeros, by its own words as long: 4 bytes for every 128 KiB, and crc32c."""
    size = 2**17
    blocks = [(size << 3 | 1 << 1).to_bytes(3, "little") + b"\0"] * (n_bytes // size)
    blocks[-1] = (size << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0"
    frame = b"\x28\xb5\x2f\xfd\xa0" + n_bytes.to_bytes(4, "little") + b"".join(blocks)
    return frame + google_crc32c.value(frame).to_bytes(4, "little")


def _edit_arrays(store, edit, names=None):
    """Change what ``zarr.json`` says of arrays."""
    for path in store.glob("*/zarr.json"):
        if path.parent.name in (names or open_group(str(store), "r").attrs["arrays"]):
            said = json.loads(path.read_text())
            edit(said)
            path.write_text(json.dumps(said))


def _bill_of_frames(store):
    """A thousand million frames in every array."""
    n = 10**9
    open_group(str(store), "r+").attrs["n_frames"] = n

    def edit(said):
        said["shape"][0] = n
        grid = said["chunk_grid"]["configuration"]["chunk_shape"]
        grid[0] = grid[0] if said["codecs"][0]["name"] == "sharding_indexed" else n

    _edit_arrays(store, edit)


def _long_frames(store):
    """Frames whose voxels would fill two thousand million rows."""
    array = open_group(str(store), "r+")["n_voxels"]
    array[:] = 2**31 - 2

    def edit(said):
        said["shape"][1] = said["chunk_grid"]["configuration"]["chunk_shape"][1] = 2**31

    _edit_arrays(store, edit, ["features", "voxel_index", "feature_scale", "feature_cameras"])


def _large_chunks(store):
    """Inner chunks of so many rows."""

    def edit(said):
        shape = said["codecs"][0]["configuration"]["chunk_shape"]
        said["shape"][1] = said["chunk_grid"]["configuration"]["chunk_shape"][1] = shape[1] = 2**34

    _edit_arrays(store, edit, ["points"])


def _seal_arrays(store):
    """Make what the root says of ``zarr.json`` files fit."""
    attrs = open_group(str(store), "r+").attrs
    attrs["arrays"] = array_seals(str(store), list(attrs["arrays"]))
    attrs[SEAL] = seal(dict(attrs))


SIZES = {
    "frames, by the attributes": (
        lambda store: open_group(str(store), "r+").attrs.update({"n_frames": 10**9}),
        "is not of 1000000000 frames",
    ),
    "frames": (_bill_of_frames, "is damaged: it claims [0-9]+ bytes, the most is"),
    "rows": (_long_frames, "is damaged: it claims [0-9]+ bytes, the most is"),
    "chunks": (_large_chunks, "points.* is damaged: it claims [0-9]+ bytes, the most is"),
    "a bomb": (
        lambda store: (store / "n_voxels/c/0").write_bytes(_bomb(2**31)),
        "n_voxels is damaged: a chunk is of 2147483648 bytes instead of 16",
    ),
}
READ = """
import resource, sys, time
from occfeat_targets.store.files import StoreError
from occfeat_targets.store.reader import open_store
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 300_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
began = time.monotonic()
try:
    store = open_store(sys.argv[1])
    for i in range(len(store)):
        store.frame(i)
except StoreError as error:
    print(time.monotonic() - began, error)
"""


@pytest.mark.parametrize("what", SIZES)
def test_sizes_that_a_store_claims_are_not_believed(store, what):
    """With 300 MB and in a moment, though all its checksums are right."""
    make, message = SIZES[what]
    make(store)
    _seal_arrays(store)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(store)], capture_output=True, text=True, timeout=60
    )
    seconds, _, said = done.stdout.partition(" ")
    assert re.search(message, said) and said.count("\n") == 1, done.stdout + done.stderr
    assert float(seconds) < 5


@pytest.mark.parametrize(
    ("array", "edit", "message"),
    [
        ("points", lambda said: said["attributes"].update(rows=["n_points"]), "of no array"),
        ("points", lambda said: said["attributes"].update(rows="images"), "rows by no array"),
        ("points", lambda said: said["attributes"].update(rows="K"), "rows by no array"),
        ("scene", lambda said: said.update(data_type="float32"), "of no array"),
    ],
)
def test_arrays_that_are_others_than_a_reader_reads(store, array, edit, message):
    """Rows counted by several, by a large one, by fractions; scenes numbered by fractions."""
    _edit_arrays(store, edit, [array])
    _seal_arrays(store)
    with pytest.raises(StoreError, match=f"{array}/zarr.json .*{message}"):
        open_store(str(store)).per_frame  # noqa: B018


# --- runs and exported networks ------------------------------------------------------------------

EVIL_TOO = """
import pathlib
from occfeat_train.models.lifts import LIFTS
from occfeat_train.objectives import OBJECTIVES
from occfeat_train.tasks import TASKS
Lift, Objective, Task = LIFTS("simplebev"), OBJECTIVES("occfeat"), TASKS("vehicle")
pathlib.Path(__file__).with_name("harm").touch()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A store, a pretraining, a finetuning with its result and export, images and their rig."""
    cwd, short = tmp_path_factory.mktemp("trained"), options("pretrain.epochs=1")
    make_tiny_store(cwd / "targets.zarr")
    train("pretrain", "--run-dir", "pre", *short, cwd=cwd)
    fine = ("--run-dir", "fine", "--set", "finetune.epochs=1")
    train("finetune", "--init", "pre", *fine, cwd=cwd)
    train("evaluate", "--run-dir", "fine", cwd=cwd)
    train("export", "--run-dir", "fine", "--out", "net", cwd=cwd)
    rig = write_rig(rig_of_frame(Job.of_run(Run(cwd / "fine")), 0))
    images = open_store(str(cwd / "targets.zarr")).frame(0)["images"]
    for camera, jpeg in zip(rig["cameras"], images, strict=True):
        camera["file"] = f"{camera['name']}.jpg"
        (cwd / camera["file"]).write_bytes(jpeg)
    (cwd / "rig.json").write_text(json.dumps(rig))
    return cwd


@pytest.fixture
def spoilt(trained, tmp_path, monkeypatch):
    """A copy that a test may spoil; in it a module ``evil``, whose import makes ``harm``."""
    cwd = Path(shutil.copytree(trained, tmp_path / "trained"))
    monkeypatch.syspath_prepend(cwd)
    (cwd / "evil.py").write_text(EVIL_TOO)
    yield cwd
    sys.modules.pop("evil", None)


def _edit_json(path, edit):
    """Change a JSON file, and make its seal fit."""
    said = json.loads(path.read_text())
    sealed = said.pop(SEAL, None)
    edit(said)
    path.write_text(json.dumps(said | ({SEAL: seal(said)} if sealed else {})))


def _name_lift(cwd):
    for run in ("pre", "fine"):
        _edit_json(cwd / run / "run.json", lambda s: s["config"]["model"].update(lift="evil:Lift"))
    _edit_json(cwd / "net/model.json", lambda said: said["model"].update(lift="evil:Lift"))


def _name_objective(cwd):
    def edit(said):
        said["config"]["pretrain"]["objective"] = "evil:Objective"

    _edit_json(cwd / "pre/run.json", edit)


def _name_task(cwd):
    for file in ("fine/run.json", "fine/result.json", "net/model.json"):
        _edit_json(cwd / file, lambda said: said.update(task="evil:Task"))


def _name_settings(cwd):
    def edit(said):
        said["config"]["tasks"] = {"evil:Task": {}}

    for run in ("pre", "fine"):
        _edit_json(cwd / run / "run.json", edit)


OF_PRE = (
    "view --run-dir pre --out pre.png",
    "finetune --init pre --run-dir new --set finetune.epochs=1",
    "pretrain --resume --run-dir pre",
)
OF_FINE = (
    "evaluate --run-dir fine",
    "view --run-dir fine --out fine.png",
    "finetune --resume --run-dir fine",
    "report fine --out report.html",
)
OF_NETWORK = (
    "export --run-dir fine --out copy",
    "predict fine --calibration rig.json --out seen",
    "predict net --calibration rig.json --out seen",
)
ENCODER = "export --run-dir fine --encoder encoder.safetensors"


@pytest.mark.parametrize(
    ("name", "make", "commands"),
    [
        ("evil:Lift", _name_lift, (*OF_PRE, *OF_FINE, *OF_NETWORK, ENCODER)),
        ("evil:Objective", _name_objective, OF_PRE),
        ("evil:Task", _name_task, (*OF_FINE, *OF_NETWORK, ENCODER)),
        ("evil:Task", _name_settings, (*OF_PRE, *OF_FINE)),
    ],
)
def test_code_that_a_run_names_runs_only_if_the_user_names_it_too(spoilt, name, make, commands):
    pytest.importorskip("plotly")
    make(spoilt)
    harm = spoilt / "harm"
    for command in commands:
        tolerant = command in OF_FINE[-1:] and make is not _name_task  # a report says so itself
        said = train(*command.split(), cwd=spoilt, code=0 if tolerant else 1)
        if tolerant:
            said = (spoilt / "report.html").read_text()
        assert f"was made with the plug-in {name}" in said, command
        assert f"again, --plugin {name}, if you trust it" in said, command
        assert not harm.exists(), command
        sys.modules.pop("evil", None)
        train(*command.split(), "--plugin", name, cwd=spoilt)
        assert harm.exists(), command
        harm.unlink()
        sys.modules.pop("evil", None)


@pytest.mark.parametrize("load", [load_network, load_bev_net])
def test_code_that_an_exported_network_names_is_not_run(spoilt, load):
    _name_lift(spoilt)
    with pytest.raises(ConfigError, match=r"net was made with the plug-in evil:Lift \(lift\)"):
        load(spoilt / "net")
    assert not (spoilt / "harm").exists()
    load(spoilt / "net", plugins=["evil:Lift"])
    assert (spoilt / "harm").exists()


@pytest.mark.parametrize("named", ["{}/theirs.yaml", "{}/theirs", "../../../../../../..{}/theirs"])
def test_settings_that_a_store_names_are_presets_alone(spoilt, named):
    """A file may name code, and lie anywhere."""
    (spoilt / "theirs.yaml").write_text("model: {lift: 'evil:Lift'}")
    group, named = open_group(str(spoilt / "targets.zarr"), "r+"), named.format(spoilt)
    group.attrs["config"] = group.attrs["config"] | {"train_preset": named}
    reseal(str(spoilt / "targets.zarr"))
    for command in (("pretrain",), ("finetune", "--init", "none")):
        said = train(*command, "--run-dir", "new", cwd=spoilt, code=1)
        assert f"targets.zarr asks for the settings {named}, which are no preset" in said
        assert "--config FILE" in said and not (spoilt / "harm").exists()
    train("pretrain", "--config", "theirs.yaml", *options("pretrain.epochs=1"), cwd=spoilt)
    assert (spoilt / "harm").exists()
