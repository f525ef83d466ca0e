"""The command line: what each flag becomes, what a mistake prints, which status it exits with."""

import json
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
from click.testing import CliRunner
from conftest import FAST

from occfeat_targets import info, verify
from occfeat_targets.cli import EXIT_SKIPPED, main
from occfeat_targets.config import TargetsConfig
from occfeat_targets.store.extras import EXTRAS
from occfeat_targets.store.reader import open_store

SETTINGS = [part for setting in FAST for part in ("--set", setting)]


def _run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def built(demo_store, tmp_path):
    return shutil.copytree(demo_store, tmp_path / "targets.zarr")


@pytest.mark.parametrize(
    "command",
    ["demo-data", "build", "check", "info", "settings", "verify", "view", "corrupt"],
)
def test_every_command_explains_itself(command):
    result = _run(command, "--help")
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 6


def test_build_info_verify_view(demo_root, tmp_path):
    store = tmp_path / "targets.zarr"
    result = _run("build", demo_root, store, *SETTINGS, "--workers", 0, "--limit", 3)
    assert result.exit_code == 0, result.output
    assert "3 frames, 0 failed" in result.output
    again = _run("build", demo_root, store, *SETTINGS, "--workers", 0, "--limit", 3)
    assert "is complete: 3 frames, nothing to do" in again.output
    summary = json.loads(_run("info", store, "--json").output)
    assert summary["complete"] and summary["frames"] == 3
    assert sum(summary["voxels_per_frame"]["histogram"].values()) == 3
    assert sum(split["frames"] for split in summary["splits"].values()) == 3
    assert "patch-means" in _run("info", store).output
    trusted = ("--plugin", "teachers:PatchMeans")
    verified = _run("verify", store, "--recompute", 2, "--dataroot", demo_root, *trusted)
    assert verified.exit_code == 0, verified.output
    assert "3 frames read, 2 recomputed, 0 problems" in verified.output
    drawn = _run("view", store, "--frame", 1, "--out", tmp_path / "view.png")
    assert drawn.exit_code == 0, drawn.output
    assert (tmp_path / "view.png").stat().st_size > 50_000


def test_flags_reach_the_config(demo_root, tmp_path):
    store = tmp_path / "targets.zarr"
    name = json.loads((demo_root / "v1.0-mini" / "scene.json").read_text())[1]["name"]
    flags = ["--teacher", "teachers:PatchMeans", "--precision", "float32", "--scene", name]
    result = _run("build", demo_root, store, *flags, "--limit", 1, "--workers", 0)
    assert result.exit_code == 0, result.output
    config = open_store(store).attrs["config"]
    assert config["teacher"]["name"] == "teachers:PatchMeans"
    assert config["teacher"]["precision"] == "float32"
    assert config["frames"] == {"scenes": [name], "splits": [], "limit": 1}
    assert open_store(store).scene(0) == name


def test_random_weights_are_never_passed_off_as_dinov2(demo_root, tmp_path):
    """Said by build, by the store and by info."""
    store = tmp_path / "targets.zarr"
    flags = ["--teacher", "random:3", "--limit", 1, "--workers", 0]
    small = ["--set", "teacher.input_size=[28, 42]"]
    result = _run("build", demo_root, store, *flags, *small)
    assert result.exit_code == 0, result.output
    assert "not DINOv2" in result.output
    assert open_store(store).attrs["teacher"]["weights"] == "random(3)"
    assert "RANDOM WEIGHTS" in _run("info", store).output


def test_skip_has_its_own_exit_status_and_info_lists_the_frame(dataroot, tmp_path):
    bad = sorted((dataroot / "samples" / "CAM_BACK").iterdir())[1]
    bad.write_bytes(bad.read_bytes()[:20_000])
    store = tmp_path / "targets.zarr"
    flags = [*SETTINGS, "--workers", 0]
    stopped = _run("build", dataroot, store, *flags)
    assert stopped.exit_code == 1
    assert bad.name in stopped.output and "--on-error skip" in stopped.output
    skipped = _run("build", dataroot, store, *flags, "--on-error", "skip")
    assert skipped.exit_code == EXIT_SKIPPED
    assert bad.name in skipped.output
    assert bad.name in _run("info", store).output
    assert _run("verify", store).exit_code == 0


def test_settings_come_from_presets_and_files(demo_root, tmp_path):
    printed = _run("settings", "demo")
    assert printed.exit_code == 0
    mine = tmp_path / "mine.yaml"
    mine.write_text(printed.output.replace("block_frames: 4", "block_frames: 3"))
    assert TargetsConfig.load(mine).block_frames == 3
    fast = ("--teacher", "none", "--limit", 1, "--workers", 0)
    for config, block_frames in (("demo", 4), (mine, 3)):
        store = tmp_path / f"{block_frames}.zarr"
        result = _run("build", demo_root, store, "--config", config, *fast)
        assert result.exit_code == 0, result.output
        stored = open_store(store).attrs["config"]
        assert (stored["train_preset"], stored["block_frames"]) == ("demo", block_frames)
    assert _run("settings").output.startswith("# Targets of a dataset (nuScenes, or")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["settings", "demmo"],
            "there is no preset 'demmo'; there are demo, lidar-miniature, lidar, miniature",
        ),
        (["check", ".", "--config", "demmo"], "there is no preset 'demmo'"),
        (["check", ".", "--config", "mine.yaml"], "cannot read mine.yaml: No such file"),
        (["check", ".", "--set", "=3"], "unknown setting"),
        (["check", ".", "--set", "source=kitti"], "no source 'kitti' (known: nuscenes)"),
        (["info", "nothing.zarr"], "no targets store here"),
        (["verify", "nothing.zarr"], "no targets store here"),
        (["view", "nothing.zarr"], "no targets store here"),
        (["check", "nowhere"], "no such directory: nowhere\n"),
        (["check", "."], "name its reader: --set source=module:Name)\n"),
        (["build", "nowhere", "x.zarr"], "no such directory: nowhere"),
        (["build", "nowhere", "x.zarr", "--set", "lidar.sweps=2"], "did you mean lidar.sweeps?"),
    ],
)
def test_mistakes_get_one_message_and_status_1(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = _run(*arguments)
    assert result.exit_code == 1
    assert result.output.startswith(("Error:", "Note:"))
    assert message in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("module", "workers"), [("nuscenes", 0), ("distributed", 2)])
def test_a_missing_library_is_named_with_its_extra(
    module, workers, demo_root, tmp_path, monkeypatch
):
    """As after ``pip install .``, without ``[targets]``."""
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    result = _run("build", demo_root, tmp_path / "x.zarr", *SETTINGS, "--workers", workers)
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: this needs {module}, which is not installed: pip")
    (extra,) = (extra for extra, modules in EXTRAS.items() if module in modules)
    assert result.output.endswith(f"pip install 'occfeat[{extra}]'\n")
    assert extra in metadata.metadata("occfeat").get_all("Provides-Extra")


def test_a_missing_module_of_ours_is_a_bug_and_raises(monkeypatch):
    error = ModuleNotFoundError("No module named 'occfeat_targets.x'", name="occfeat_targets.x")
    monkeypatch.setattr(verify, "verify_store", fail_with(error))
    assert _run("verify", "targets.zarr").exception is error


def test_other_mistakes(built, demo_root):
    assert "frames 0 to 3" in _run("view", built, "--frame", 4).output
    assert _run("verify", built, "--recompute", 1).exit_code == 2
    other = _run("build", demo_root, built, *SETTINGS, "--set", "lidar.sweeps=2")
    assert other.exit_code == 1
    assert "config.lidar.sweeps: 1 -> 2" in other.output


def test_a_broken_pipe_of_the_work_says_its_message(monkeypatch):
    """Such as a worker's socket or a remote store's connection: not the end of our own output."""
    monkeypatch.setattr(verify, "verify_store", fail_with(BrokenPipeError(32, "Broken pipe")))
    result = _run("verify", "targets.zarr")
    assert (result.exit_code, result.output) == (1, "Error: [Errno 32] Broken pipe\n")


def test_a_bug_in_printing_raises(built, monkeypatch):
    monkeypatch.setattr(info, "as_text", fail_with(ValueError("Unknown format code")))
    result = _run("info", built)
    assert isinstance(result.exception, ValueError)
    assert result.output == ""


def fail_with(error):
    def fail(*_):
        raise error

    return fail


def test_info_tells_how_far_an_unfinished_build_is(built):
    import zarr

    from occfeat_targets.store.files import zarr_store

    zarr.open_group(zarr_store(built, read_only=False), mode="r+").attrs["complete"] = False
    output = _run("info", built).output
    assert "unfinished: run its build again" in output
    assert "0 of 2 done" in output


def test_check_counts_frames(demo_root):
    result = _run("check", demo_root)
    assert result.exit_code == 0
    assert "v1.0-mini, 2 scenes, 4 keyframes: ok" in result.output


def test_demo_data_refuses_nonsense(tmp_path):
    result = _run("demo-data", tmp_path / "world", "--scenes", 1)
    assert result.exit_code == 1
    assert result.output.startswith("Error:")


def test_the_makefile_passes_its_variables_on(pytestconfig):
    def commands(*variables):
        make = ["make", "--dry-run", "--always-make", "targets", *variables]
        run = subprocess.run(
            make, capture_output=True, text=True, check=True, cwd=pytestconfig.rootpath
        )
        return [line for line in run.stdout.splitlines() if "occfeat-targets" in line]

    demo = commands()
    assert [line.split()[1] for line in demo] == ["demo-data", "build", "verify", "info"]
    real = commands(
        "NUSCENES=/data", "STORE=s.zarr", "VERSION=v1.0-mini", "TEACHER=dir", "WORKERS=3",
        "SCHEDULER=tcp://h:1",
    )  # fmt: skip
    assert [line.split()[1] for line in real] == ["build", "info"]
    for part in ("'/data' 's.zarr'", "--version v1.0-mini", "--teacher dir", "--workers 3"):
        assert part in real[0]
    assert "--scheduler tcp://h:1" in real[0] and "--config" not in real[0]
