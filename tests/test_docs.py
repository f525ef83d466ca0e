"""README, docs/ and CONTRIBUTING: every command and example runs as it stands there.

In this process, since starting one takes longer than most commands.
"""

import configparser
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from tiny_store import make_tiny_store

from occfeat_targets import __version__, cluster
from occfeat_targets.cli import main as occfeat_targets
from occfeat_targets.config import TargetsConfig
from occfeat_targets.frame import layout_of, make_outputs
from occfeat_targets.sources.nuscenes import CAMERAS
from occfeat_targets.sources.nuscenes_map import MAP_CLASSES
from occfeat_train.cli import main as occfeat_train
from occfeat_train.config import TrainConfig
from occfeat_train.rig import read_rig

ROOT = Path(__file__).parent.parent
PAGES = {p.stem: p for p in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
PROGRAMS = {"occfeat-targets": occfeat_targets, "occfeat-train": occfeat_train}
ELSEWHERE = {
    "occfeat-train view --scene scene-0103 --out scene.webp": "test_movie",
    "source .venv/bin/activate": "the shell's own",
    "dask scheduler --port 8786": "test_cluster",
    "dask worker tcp://HOST:8786 --nthreads 1 --nworkers 8": "test_cluster",
    "occfeat-targets build small-world all.zarr --teacher random:0 --scheduler tcp://HOST:8786": (
        "test_cluster"
    ),
    "occfeat-targets build /data/sets/nuscenes lidar.zarr --config lidar": "test_lidar_outputs",
    "occfeat-targets build /data/sets/nuscenes pop3d.zarr --config pop3d": "test_lidar_outputs",
    "occfeat-targets text texts.safetensors --clip clip-vit-base-patch16": "test_texts",
    "sbatch --array=1-10 pipelines/slurm.sh --table 1 --store /fast/targets.zarr": "test_reproduce",
}


def _blocks(page, kind):
    return re.findall(rf"```{kind}\n(.*?)```", TEXTS[page], flags=re.DOTALL)


def _commands(*pages, starts=""):
    """Lines of bash blocks, each once, but those that are run elsewhere."""
    texts = (text.replace("\\\n ", "") for page in pages for text in _blocks(page, "bash"))
    lines = [line for text in texts for line in text.splitlines()]
    return [line for line in dict.fromkeys(lines) if line.startswith(starts)]


TARGETS = [
    line
    for line in _commands("store", "robustness", "look", starts="occfeat-targets ")
    if line not in ELSEWHERE
]
TRAINING = [
    line
    for line in _commands(
        *("README", "look", "training", "robustness", "deploy"),
        starts=("occfeat-train ", "torchrun "),
    )
    if line not in ELSEWHERE
]
LIDAR = [line for line in _commands("lidar", starts="occfeat-train ") if line not in ELSEWHERE]
WORDS = [line for line in _commands("pop3d", starts="occfeat-") if line not in ELSEWHERE]
EXTENDING = _commands("extending")
MAKE = _commands(*PAGES, starts="make ")
SCRIPTS = _commands(
    *("README", "reproduce", "benchmarks", "lidar", "pop3d"), starts="python pipelines/"
)


def test_every_command_is_run():
    here = {*TARGETS, *TRAINING, *LIDAR, *WORDS, *EXTENDING, *MAKE, *SCRIPTS}
    assert here.isdisjoint(ELSEWHERE)
    assert {*_commands(*PAGES)} == here | ELSEWHERE.keys()
    programs = {line.split()[0] for line in EXTENDING}
    assert programs == {"export", "python", *PROGRAMS}


def run(line):
    """Run a command line in this process and folder; returns what it printed."""
    program, *arguments = shlex.split(line, comments=True)
    if program == "python":
        return _run_script(*arguments)
    result = CliRunner().invoke(PROGRAMS[program], arguments, catch_exceptions=False)
    assert result.exit_code == 0, f"{line}\n{result.output}"
    return result.output


def _run_script(path, *arguments):
    before = sys.argv, sys.path[:]
    sys.argv, sys.path[:0] = [path, *arguments], [str(Path(path).parent)]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        assert not end.code, f"{path} {arguments}: {end.code}"
    finally:
        sys.argv, sys.path[:] = before


@pytest.fixture
def in_process(monkeypatch):
    """Builds that name no number of workers have none: processes are ``test_cluster``'s."""
    executor = cluster.executor
    monkeypatch.setattr(
        cluster, "executor", lambda n, *args: executor(0 if n is None else n, *args)
    )


# Commands


def test_targets_commands_run_in_order(demo_root, demo_store, tmp_path, in_process):
    # What `make targets` makes, but smaller; and the world that the first command would render.
    (tmp_path / "demo-world").symlink_to(demo_root)
    shutil.copytree(demo_root, tmp_path / "small-world")
    shutil.copytree(demo_store, tmp_path / "targets.zarr")
    with chdir(tmp_path):
        printed = {line: run(line) for line in TARGETS}
    assert len(printed) == 12
    assert "0 problems" in printed["occfeat-targets verify targets.zarr"]
    assert (tmp_path / "view.png").exists()
    assert (tmp_path / "corrupted" / "fog-easy.zarr").exists()


def test_training_commands_run_in_order(tmp_path):
    _small_stores(tmp_path)
    printed = {}
    making, loading, running = _blocks("deploy", "python")
    with chdir(tmp_path):
        exec(making, {})
        for line in TRAINING:
            if "--resume" in line:
                _make_unfinished(Path("runs"))
            start = _torchrun if line.startswith("torchrun ") else run
            printed[line] = start(_quick(line))
        names = _an_exported_network_sees_a_frame()
        exec(loading, names)
        exec(running, {"images": names["images"].numpy()})
    assert len(printed) == 19
    assert names["probability"].shape == (1, 16, 16)
    assert (tmp_path / "seen/prediction.png").exists()
    assert "vehicle IoU in per cent" in printed["occfeat-train evaluate"]
    assert "mRR over 0 of 8 corruptions" in printed["occfeat-train evaluate --corrupted corrupted"]
    assert (tmp_path / "prediction.png").exists()
    assert names["images"].shape[:3] == (1, 6, 3) and 0.3 < names["images"].max() <= 1
    assert names["bev"].shape == (1, 32, 16, 16)


def test_lidar_commands_run_in_order(tmp_path):
    make_tiny_store(tmp_path / "targets.zarr", lidar=True)
    make_tiny_store(tmp_path / "lidar.zarr", preset="scalr", lidar=True)
    small = " --set lidar.size=2-8 --set pretrain.epochs=1 --set pretrain.batch=4"
    with chdir(tmp_path):
        printed = [run(line + small * ("--config" in line)) for line in LIDAR]
    assert len(printed) == 4
    assert "stored, mean" in printed[2]


def test_commands_of_words_run_in_order(tmp_path):
    make_tiny_store(tmp_path / "targets.zarr", lidar=True)
    small = " --set model.encoder_weights=random --set model.image_size=[64,96]"
    small += " --set augment.rotate_bev_deg=0 --set pretrain.epochs=15 --set pretrain.lr=0.01"
    printed = []
    with chdir(tmp_path):
        for line in WORDS:
            newest = next(iter(Path("runs").glob("pretrain-*")), Path("RUN"))
            line = line.replace("runs/RUN", str(newest))
            printed.append(run(line + small * (" pretrain " in line)))
        assert Path("query.png").exists()
    assert len(printed) == 4
    assert "STAND-INS" in printed[0] and "pop3d, mean with empty" in printed[2]


def _an_exported_network_sees_a_frame():
    loading, preparing = _blocks("training", "python")
    names: dict = {}
    exec(preparing, names)
    exec(loading, names)
    return names


def _small_stores(folder):
    """The store that the commands train on, and one of corrupted images."""
    splits = {"mini_train": 1, "mini_val": 1}
    preset = {
        "model": {"encoder_weights": "random", "image_size": [64, 96], "channels": 32},
        "data": {"workers": 0},
        "augment": {"rotate_bev_deg": 0},
        "pretrain": {"epochs": 1, "batch": 2},
        "finetune": {"epochs": 1, "batch": 2, "accumulate": 1, "lr": 0.001},
        "run": {"save_minutes": 0},
    }
    (folder / "quick.yaml").write_text(yaml.safe_dump(preset))
    make_tiny_store(folder / "targets.zarr", splits=splits)
    fog = folder / "corrupted" / "fog-easy.zarr"
    make_tiny_store(fog, settings=["images.corruption=fog-easy"], splits=splits, dim=0)


def _quick(line):
    """A command in small: with other settings than those that the store asks for."""
    fresh = " pretrain" in line or "--init none" in line
    asks = fresh and "--resume" not in line and "--config" not in line
    return f"{line.partition(' #')[0]} --config quick.yaml" if asks else line


def _torchrun(line):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        shlex.split(line), env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def _make_unfinished(runs):
    """Take the newest pretraining back to the checkpoint before its last."""
    newest = max(runs.glob("pretrain-*"))
    last = max(newest.glob("checkpoint-*.pt"))
    last.with_suffix(".json").unlink()
    last.unlink()


def test_the_examples_of_extending_run_together(tmp_path, monkeypatch, in_process):
    files = {}
    for kind in ("python", "yaml"):
        for text in _blocks("extending", kind):
            files[text.splitlines()[0].removeprefix("# ")] = text
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert EXTENDING[0] == "export PYTHONPATH=."
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = {Path(name).stem for name in files}
    for name in modules:  # other tests' toys have the same names
        monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        with chdir(tmp_path):
            printed = {line: run(line) for line in EXTENDING[1:]}
    finally:
        for name in modules:
            sys.modules.pop(name, None)
    assert len(files) == 8
    (evaluated,) = (
        printed[line] for line in EXTENDING if line.startswith("occfeat-train evaluate")
    )
    assert "find_tall:FindTall IoU in per cent" in evaluated
    assert {p.name for p in tmp_path.glob("*.png")} == {"drives.png", "guessed.png", "found.png"}


def test_the_example_of_a_calibration_is_one(tmp_path):
    (example,) = _blocks("deploy", "json")
    (tmp_path / "rig.json").write_text(example)
    (camera,) = read_rig(tmp_path / "rig.json")
    assert camera.file == "front.jpg" and camera.image_hw == (900, 1600)


def test_make_commands_are_the_makefile_s():
    for line in MAKE:
        command = [*shlex.split(line, comments=True), "--dry-run"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def test_make_help_names_every_target():
    helped = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True)
    named = set(re.findall(r"^make (\w+)", helped.stdout, re.M))
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert named == {*phony.split()} - {"help"}


@pytest.mark.parametrize("line", SCRIPTS)
def test_scripts_are_understood(line, tmp_path, capsys):
    """Reproduction is run by ``test_reproduce`` at toy size; benchmarks take minutes."""
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    if "reproduce" in line:
        make_tiny_store(tmp_path / "targets.zarr", preset="paper")
        make_tiny_store(tmp_path / "lidar.zarr", preset="scalr", lidar=True)
        make_tiny_store(tmp_path / "pop3d.zarr", preset="pop3d", lidar=True)
    with chdir(tmp_path):
        run(line + (" --report-only" if "reproduce" in line else " --help"))
    if "reproduce" in line:
        printed = capsys.readouterr().out
        rows = ("SimpleBEV", "WaffleIron", "POP-3D's objective")
        assert [printed.count(row) for row in rows] in ([8, 0, 0], [0, 11, 0], [1, 0, 3])


# Examples


@pytest.mark.parametrize("page", ["README", "store"])
def test_the_examples_of_reading_a_store_run(page, tiny_store, tmp_path, monkeypatch):
    (tmp_path / "targets.zarr").symlink_to(tiny_store)
    monkeypatch.chdir(tmp_path)
    results = []
    for code in _blocks(page, "python"):
        names: dict = {}
        exec(code, names)
        results.append(names["features"])
    assert results[0].dtype == "float32" and results[0].shape[1] == 8
    assert all((other == results[0]).all() for other in results)


def test_code_quoted_as_an_example_is_in_the_code():
    code = "\n".join(p.read_text() for p in ROOT.glob("occfeat_*/**/*.py"))
    assert len(_blocks("CONTRIBUTING", "python")) == 3
    for text in _blocks("CONTRIBUTING", "python"):
        assert text in code


# What is said of the code


def test_the_table_of_arrays_is_the_outputs():
    config, classes = TargetsConfig(), ("vehicle.car",)
    shared = {"cameras": CAMERAS, "box_classes": classes, "vehicle_classes": classes}
    layout = layout_of(config, shared | {"map_classes": MAP_CLASSES}, feature_dim=384)
    specs = [spec for output in make_outputs(config, layout) for spec in output.specs()]
    wanted = [(s.name, s.dtype, ", ".join(s.axes), s.rows or "") for s in specs]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([\w, ]*)\| (?:`(\w+)` )?\|", TEXTS["store"], re.M)
    assert [(name, dtype, axes.strip(), rows) for name, dtype, axes, rows in rows] == wanted


def test_new_names_of_settings_are_settings():
    rows = re.findall(r"^\| `(\S+)` \| `(\S+)` \| (\S+) \|", TEXTS["CHANGELOG"], re.M)
    assert len(rows) == 10
    for _, name, program in rows:
        config = TargetsConfig if program == "occfeat-targets" else TrainConfig
        section, *key = name.split(".")
        if len(key) == 2:  # of an objective or task
            sections = config.of({section: {key[0]: {}}}).plain()[section]
            assert key[1] in sections[key[0]], name
        else:
            assert key[0] in config().plain()[section], name


def _anchors(text):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_their_anchors_exist(page):
    prose = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target.read_text(encoding="utf-8")), link


def test_every_page_is_linked_from_the_readme():
    for page in PAGES.keys() - {"README"}:
        assert f"({PAGES[page].relative_to(ROOT)})" in TEXTS["README"], page


def test_the_readme_is_short():
    assert len(TEXTS["README"].split()) <= 900


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short(page):
    """But rows of tables, which can't be broken."""
    lines = TEXTS[page].splitlines()
    assert not [line for line in lines if len(line) > 100 and not line.startswith("|")]


def test_the_workflow_and_hooks_call_what_exists():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = " ".join(step["run"] for step in steps if "run" in step)
    for path in re.findall(r"tests/\w+\.py|\.ci/run", commands):
        assert (ROOT / path).exists(), path
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["entry"].split()[0] for hook in hooks} == {".venv/bin/ruff", "make"}


def test_the_dockerfile_copies_all_that_pip_needs():
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    assert all((ROOT / name).exists() for name in copied)
    setup = configparser.ConfigParser()
    setup.read_string((ROOT / "setup.cfg").read_text())
    packages = setup["options"]["packages"].split()
    needed = {name.split(".")[0].replace("occfeat_pipelines", "pipelines") for name in packages}
    files = {"README.md", setup["metadata"]["license_files"], "setup.cfg", "pyproject.toml"}
    assert needed | files <= copied
    run = " ".join(line for line in lines if line.startswith("RUN "))
    (extra,) = re.findall(r"'\.\[(\w+)\]'", run)
    assert extra in setup["options.extras_require"]
    programs = {
        line.split(" = ")[0]
        for line in setup["options.entry_points"]["console_scripts"].split("\n")
        if line
    }
    assert programs == {*re.findall(r"occfeat-\w+", run)}
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.M)


def test_the_citation_says_what_the_readme_says():
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= said.keys()
    assert said["version"] == __version__
    paper = said["preferred-citation"]
    bibtex = " ".join(re.sub(r"[{}\\']", "", *_blocks("README", "bibtex")).split())
    assert paper["title"] in bibtex and f"= {paper['year']}" in bibtex
    names = [f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]]
    assert " and ".join(names).replace("é", "e") in bibtex


def test_the_notebook_runs_from_above(demo_store, tmp_path, monkeypatch):
    """Its cells one after another in one namespace; it shows pictures and leaves none open."""
    from matplotlib import pyplot

    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.close()))
    (tmp_path / "targets.zarr").symlink_to(demo_store)
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    space: dict = {}
    with chdir(tmp_path):
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), space)
    assert len(shown) == 2
    assert len(space["batch"]["voxel"]) == space["batch"]["n_voxels"].sum() > 1000
