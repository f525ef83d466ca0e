"""Recipes and ``pipelines/reproduce.py``: what is run, run once, and reported."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner
from conftest import LONG
from matplotlib.figure import Figure
from tiny_store import change_attributes, make_tiny_store
from train_runs import SMALL

from occfeat_pipelines import recipes, report, reproduce
from occfeat_pipelines.experiments import Planner, beside, with_stores
from occfeat_pipelines.recipes import HERE, TABLES, Preset, load_recipes
from occfeat_pipelines.report import Cell
from occfeat_targets import cluster
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.schema import SEVERITIES
from occfeat_targets.store.settings import ConfigError
from occfeat_train.cli import main as occfeat_train
from occfeat_train.runs.run import Run

TASKS = ("vehicle", "map")


@pytest.fixture(scope="module")
def store_for(tmp_path_factory):
    """A tiny store by the training preset that it is meant for."""
    folder = tmp_path_factory.mktemp("stores")
    return {
        preset: make_tiny_store(folder / f"{preset}.zarr", preset=preset)
        for preset in ("paper", "miniature")
    }


@pytest.fixture
def stores(store_for, tmp_path):
    """The main store, with all others that recipes name beside it."""
    for name in ("", *yaml.safe_load((HERE / "stores.yaml").read_text())):
        (tmp_path / beside("targets.zarr", name)).symlink_to(store_for["paper"])
    return str(tmp_path / "targets.zarr")


def _experiments(
    store, table, rows=("*",), seeds=1, preset="paper", tasks=TASKS, fractions=(), overrides=()
):
    planner = Planner(
        Preset.load(HERE / f"reproduce_{preset}.yaml"), store, Path("/runs"), overrides
    )
    return planner.experiments(load_recipes(table, rows), seeds, tasks, fractions)


def _settings(training):
    """Its ``--set`` options."""
    command = training.command()
    return {value for option, value in pairwise(command) if option == "--set"}


# Recipes


@pytest.mark.parametrize(
    ("table", "rows", "numbers"),
    [("1", 10, 60), ("2", 6, 18), ("3", 7, 14), ("4", 6, 6), ("c", 2, 2), ("variants", 5, 5)],
)
def test_every_row_is_there_and_its_settings_are_possible(stores, table, rows, numbers):
    assert len(load_recipes(table, ("*",))) == rows
    assert len(_experiments(stores, table)) == numbers
    assert len(_experiments(stores, table, seeds=2)) == 2 * numbers


def test_every_table_is_tested():
    methods = ("lidar", "lidar-miniature", "pop3d", "pop3d-miniature")
    assert ("1", "2", "3", "4", "c", *methods, "variants") == TABLES


@pytest.mark.parametrize("table", ["pop3d", "pop3d-miniature"])
def test_rows_that_answer_to_words_are_evaluated_without_finetuning(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    what = {"preset": table, "tasks": ("open-vocabulary",)}
    found = _experiments(str(tmp_path / "none.zarr"), table, **what)
    lifts = []
    for experiment in found:
        (pretraining,) = experiment.trainings
        assert pretraining.job.kind == "pretrain"
        assert pretraining.job.name == ("occfeat" if "occfeat" in experiment.recipe else "pop3d")
        lifts.append(pretraining.job.config.model.lift)
        said = shlex.join(pretraining.evaluation(None))
        assert f"--texts {tmp_path}/" in said
        assert any("occfeat-targets text" in fault for fault in pretraining.faults())
        assert (experiment.column, experiment.protocol) == ("open-vocabulary", "pop3d")
    wanted = ["simplebev", "bevformer", "tpv"]
    assert lifts == (["simplebev", "simplebev"] if "miniature" in table else wanted)


@pytest.mark.parametrize(
    ("table", "preset", "numbers"), [("lidar", "lidar", 16), ("lidar-miniature",) * 2 + (8,)]
)
def test_rows_of_lidar_networks_are_possible(table, preset, numbers, tmp_path):
    found = _experiments(str(tmp_path / "none.zarr"), table, preset=preset, tasks=("lidarseg",))
    assert len(found) == numbers
    for experiment in found:
        *pretrainings, finetuning = (t.job for t in experiment.trainings)
        assert finetuning.learns.sensor == "lidar" and finetuning.task == "lidarseg"
        probe = finetuning.config.finetune.freeze_backbone
        assert probe == ("probe" in experiment.recipe)
        assert [p.config.lidar.width for p in pretrainings] == [
            finetuning.config.lidar.width for _ in pretrainings
        ]
        assert not any(p.config.lidar.drop_path for p in pretrainings)
        assert experiment.protocol == "stored"


def test_rows_by_number_name_and_pattern():
    names = list(load_recipes("3", ("*",)))
    assert list(load_recipes("3", ("2",))) == ["simplebev-occupancy"] == names[1:2]
    assert list(load_recipes("3", ("bevformer-*", "1"))) == [names[0], *names[4:]]
    with pytest.raises(ConfigError, match="no row 'lss'; its rows are simplebev-none, "):
        load_recipes("3", ("lss",))


def test_rows_do_what_their_labels_say(stores):
    found = _experiments(stores, "3", fractions=(0.01,), tasks=("map",))
    by_name = {e.recipe: e for e in found}
    pretraining = {name: e.trainings[0] for name, e in by_name.items()}
    for name in ("simplebev-none", "bevformer-none"):
        assert [training.job.kind for training in by_name[name].trainings] == ["finetune"]
    assert "objectives.occfeat.features=false" in _settings(pretraining["simplebev-occupancy"])
    assert "objectives.occfeat.occupancy=false" in _settings(pretraining["simplebev-features"])
    assert _settings(pretraining["simplebev-both"]) == {"run.seed=0"}
    assert "model.lift=bevformer" in _settings(pretraining["bevformer-both"])
    assert "model.lift=bevformer" in _settings(by_name["bevformer-both"].trainings[-1])
    (finetuning,) = by_name["simplebev-none"].trainings
    command = finetuning.command()
    assert command[:5] == ["finetune", "--store", stores, "--config", "paper"]
    assert command[-8:-2] == ["--task", "map", "--fraction", "0.01", "--init", "none"]
    assert command[-2:] == ["--run-dir", str(finetuning.path)]


def test_a_finer_image_is_finetuned_from_a_coarse_pretraining_on_a_store_of_its_own(stores):
    (e,) = _experiments(stores, "2", ("448-occfeat-100-at-224",), fractions=(0.1,))
    pretraining, finetuning = e.trainings
    assert not any("image_size" in text for text in _settings(pretraining))
    assert pretraining.job.store.endswith("/targets.zarr")
    assert "model.image_size=[448,800]" in _settings(finetuning)
    assert finetuning.job.store.endswith("/targets-576x1024.zarr")


def test_the_weight_of_the_feature_loss(stores):
    weights = [_settings(e.trainings[0]) - {"run.seed=0"} for e in _experiments(stores, "4")]
    values = ("0.0001", "0.001", None, "0.1", "1")
    rest = [{f"objectives.occfeat.feature_weight={v}"} if v else set() for v in values]
    assert weights == [{"objectives.occfeat.features=false"}, *rest]


def test_what_tables_have_in_common_is_one_run(stores):
    def paths(table, row):
        only = {"fractions": (0.01,), "tasks": ("vehicle",)}
        (e,) = _experiments(stores, table, (row,), **only)
        return [training.path for training in e.trainings]

    assert paths("1", "simplebev-enb0-none") == paths("2", "224-none") == paths("3", "1")
    assert paths("1", "simplebev-enb0-occfeat") == paths("3", "simplebev-both")
    assert paths("4", "lambda-0") == paths("3", "simplebev-occupancy")
    assert paths("4", "lambda-0.01") == paths("2", "224-occfeat")
    assert paths("2", "448-occfeat-100-at-224")[0] == paths("2", "224-occfeat-100")[0]


def test_what_differs_is_another_run(stores):
    everything = [e for table in ("1", "3") for e in _experiments(stores, table, seeds=2)]
    finetunings = {e.trainings[-1].path for e in everything}
    # Of Table 3 only L_occ and L_feat of SimpleBEV and L_occ of BEVFormer are not in Table 1.
    assert len(finetunings) == 2 * (60 + 3 * 2)
    assert len({e.trainings[0].path for e in everything} - finetunings) == 2 * (7 + 3)


def test_a_setting_for_all_runs_makes_others_where_it_counts(stores):
    def paths(*overrides):
        (e,) = _experiments(stores, "4", ("1",), overrides=overrides)
        return [training.path for training in e.trainings]

    plain = paths()
    assert paths("data.workers=1", "run.precision=float32") == plain
    assert not {*paths("model.channels=64")} & {*plain}
    pretraining, finetuning = paths("finetune.epochs=7")
    assert pretraining == plain[0] and finetuning != plain[1]


def test_a_run_goes_on_with_the_settings_of_now_that_change_no_result(stores, tmp_path):
    overrides = ("data.workers=1", "model.channels=64")
    planner = Planner(Preset.load(HERE / "reproduce_paper.yaml"), stores, tmp_path, overrides)
    (e,) = planner.experiments(load_recipes("4", ("1",)), 1, TASKS, ())
    pretraining = e.trainings[0]
    here = ["--store", stores, "--run-dir", str(pretraining.path), "--set", "data.workers=1"]
    assert "model.channels=64" in pretraining.command()
    pretraining.path.mkdir()
    (pretraining.path / "run.json").write_text("{}")
    assert pretraining.command() == ["pretrain", "--resume", *here]
    assert pretraining.evaluation("x") == ["evaluate", *here, "--corrupted", "x"]


def test_the_miniature_s_fraction_stands_for_the_paper_s(store_for):
    store = str(store_for["miniature"])
    (e,) = _experiments(store, "3", ("1",), preset="miniature", fractions=(0.01,))[:1]
    assert e.trainings[-1].job.fraction == 0.12
    assert e.column == "vehicle, 1 % (here 12 %)"
    assert ("--fraction", "0.12") in pairwise(e.trainings[-1].command())


def test_a_store_of_another_preset_is_refused(tiny_store, store_for):
    for store, preset in ((tiny_store, "paper"), (store_for["paper"], "miniature")):
        with pytest.raises(ConfigError, match=f"this one trains with {preset}: name a store"):
            _experiments(str(store), "3", preset=preset)


def test_a_missing_store_says_how_to_build_it(store_for, tmp_path):
    nothing = _experiments(str(tmp_path / "m.zarr"), "3", preset="miniature")
    with pytest.raises(ConfigError, match=r"m\.zarr --config miniature"):
        with_stores(nothing, print)
    (tmp_path / "t.zarr").symlink_to(store_for["paper"])
    nothing = _experiments(str(tmp_path / "t.zarr"), "variants", ("sweeps-10",))
    with pytest.raises(ConfigError, match=r"build .*t-sweeps-10\.zarr .*--set lidar.sweeps=10"):
        with_stores(nothing, print)


def test_rows_whose_store_is_missing_are_left_out(store_for, tmp_path):
    for name in ("t.zarr", "t-sweeps-3.zarr"):
        (tmp_path / name).symlink_to(store_for["paper"])
    said = []
    there = with_stores(_experiments(str(tmp_path / "t.zarr"), "variants"), said.append)
    assert [e.recipe for e in there] == ["sweeps-3"]
    rows = ("sweeps-10", "teacher-base", "teacher-giant", "teacher-large")
    assert len(said) == len(rows)
    for row, line in zip(rows, said, strict=True):
        assert line.startswith(f"row {row} is left out: there is no store ")
        assert f"t-{row}.zarr; build it: occfeat-targets build" in line


def test_random_features_do_not_pass_for_the_paper_s(store_for, tmp_path):
    store = shutil.copytree(store_for["paper"], tmp_path / "targets.zarr")
    none, learned = _experiments(str(store), "3", ("1", "4"), tasks=("vehicle",))
    assert (learned.teacher, none.teacher) == ("tiny (RANDOM WEIGHTS)", "")
    change_attributes(store, source=open_store(store).attrs["source"] | {"dataset": "nuScenes"})
    with pytest.raises(ConfigError, match="random weights, which says nothing of the paper"):
        _experiments(str(store), "3")


def test_images_larger_than_the_stored_ones_are_refused(store_for):
    """The tiny store's are 64x96."""
    store = str(store_for["paper"])

    def require(size):
        (e,) = _experiments(store, "4", ("1",), overrides=(f"model.image_size={size}",))
        e.require_possible()

    require("[64,96]")
    with pytest.raises(ConfigError, match=r"\[64, 128\] is larger than the images \[64, 96\]"):
        require("[64,128]")


def test_runs_have_readable_names(tmp_path):
    def names(table, row):
        experiments = _experiments(str(tmp_path / "t.zarr"), table, (row,), tasks=("vehicle",))
        return [training.path.name for training in experiments[0].trainings]

    x = "xxxxxxxx-seed0"  # without a store
    assert names("3", "simplebev-occupancy") == [
        f"pretrain-simplebev-occfeat-features-False-{x}",
        f"finetune-simplebev-vehicle-1pct-from-occfeat-features-False-{x}",
    ]
    assert names("1", "bevformer-enb0-none") == [f"finetune-bevformer-vehicle-1pct-from-none-{x}"]
    assert names("1", "simplebev-rn50-img-also") == [
        f"pretrain-simplebev-img-also-encoder-resnet-50-{x}",
        f"finetune-simplebev-vehicle-1pct-encoder-resnet-50-from-img-also-{x}",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"paper": {"vehicle": {0.01: 1}}, "pretrian": []}, "did you mean pretrain"),
        ({"paper": {"vehicles": {0.01: 1}}}, "no task 'vehicles' .did you mean vehicle"),
        ({"paper": {"vehicle": 13.7}}, "paper.vehicle must be a mapping"),
    ],
)
def test_impossible_recipes(tmp_path, monkeypatch, values, message):
    (tmp_path / "recipes" / "9").mkdir(parents=True)
    (tmp_path / "recipes/9/01-x.yaml").write_text(yaml.safe_dump({"label": "x"} | values))
    monkeypatch.setattr(recipes, "HERE", tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_recipes("9", ("*",))


# Reports

CELLS = [
    Cell("none", "vehicle, 1 %", 13.7, "", "simple-bev", [10.0, 12.0, 17.0]),
    Cell("both", "vehicle, 1 %", None, "random:0 (RANDOM WEIGHTS)", "simple-bev", [20.25]),
    Cell("none", "map, 1 %", 20.1, "", "ego", []),
]


def test_report_as_text():
    """13 and its deviation are by hand: squares 9 + 1 + 16 over n - 1 = 2."""
    lines = [" ".join(line.split()) for line in report.text(CELLS).splitlines()]
    assert lines[1:] == [
        "none vehicle, 1 % simple-bev 13.7 13.0 ± 3.6 (3) -0.7",
        "both vehicle, 1 % simple-bev - 20.2 (1) -",
        "none map, 1 % ego 20.1 - -",
    ]
    assert report.caption(CELLS) == (
        "teacher: random:0 (RANDOM WEIGHTS); IoU protocol: ego, simple-bev"
    )


def test_rows_are_compared_seed_by_seed():
    """By hand: differences 1, 2, 3 are 2 ± 1, so t = 2 sqrt(3); p = 1 - t / sqrt(t² + 2)."""
    table = [
        Cell("none", "vehicle, 1 %", protocol="ego", ours=[10.0, 12.0, 17.0]),
        Cell("both", "vehicle, 1 %", ours=[11.0, 14.0, 20.0]),
        Cell("L_occ", "vehicle, 1 %", ours=[11.0, 14.0]),
        Cell("none", "map, 1 %", ours=[1.0, 2.0, 3.0]),
    ]
    t = 2 * 3**0.5
    p = 1 - t / (t * t + 2) ** 0.5
    assert report.paired(table)[1:] == [
        ["vehicle, 1 %", "ego", "both", "none", "+2.0 ± 1.0", "3 of 3", f"{p:.3f}"]
    ]
    assert report.paired(CELLS) == []


def test_report_as_csv(tmp_path):
    report.write_csv(CELLS, tmp_path / "table.csv")
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert rows[0] == {
        "row": "none",
        "column": "vehicle, 1 %",
        "protocol": "simple-bev",
        "paper": "13.70",
        "mean": "13.00",
        "std": "3.61",
        "seeds": "3",
        "values": "10.00 12.00 17.00",
        "teacher": "",
    }
    assert [row["std"] for row in rows[1:]] == ["", ""]


def test_report_as_figure(tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
        report.draw(CELLS, "table-x", tmp_path / "figure.png")
    assert drawn[0].get_suptitle().startswith("table-x, ")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    report.draw([], "title", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# Planning


def test_a_plan_needs_no_store_and_prints_each_command_once(tmp_path):
    options = ["--table", "3", "--rows", "simplebev-[bn]*", "--plan", "--out", tmp_path / "out"]
    options += ["--store", tmp_path / "no.zarr"]
    result = CliRunner().invoke(reproduce.main, [str(option) for option in options])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    commands = [line.split()[1] for line in lines if line.startswith("occfeat-train ")]
    # Two rows, two tasks, one label fraction: one pretraining for both tasks.
    assert sorted(commands) == ["evaluate"] * 4 + ["finetune"] * 4 + ["pretrain"]
    assert "# occfeat pretraining: 50 epochs, batch 16 x 1, rate 0.001" in lines
    assert f"no store {tmp_path / 'no.zarr'}; build it: occfeat-targets build" in result.output
    assert not list(tmp_path.iterdir())


def test_what_is_planned_is_what_is_run(later):
    planned, commands = later(*BOTH, "--plan")
    assert commands == [] and planned.count(", done\n") == 2
    shutil.rmtree(later.out)
    planned = later(*BOTH, "--plan")[0]
    lines = [line.split()[1] for line in planned.splitlines() if line.startswith("occfeat-train")]
    assert lines == later(*BOTH)[1] == ["pretrain", "finetune", "evaluate"]
    assert all(f"/{path.name}" in planned for path in later.out.glob("*-seed0"))


# Running


@pytest.mark.parametrize(
    ("batch", "gpus", "processes"),
    [(16, 0, 1), (16, 1, 1), (16, 3, 2), (16, 6, 4), (6, 8, 6), (6, 4, 3), (0, 5, 5), (0, 0, 1)],
)
def test_as_many_gpus_as_divide_the_batch(batch, gpus, processes):
    command = reproduce.launcher(batch, gpus)
    assert command[-2:] == ["-m", "occfeat_train"]
    assert (f"--nproc-per-node={processes}" in command) == (processes > 1)
    assert ("torch.distributed.run" in command) == (processes > 1)


def test_a_run_at_which_another_is_can_be_waited_for_and_the_waiting_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "LOOK_AGAIN_S", 0.01)
    said = []
    other, ours = (reproduce.Machine(1, [], tmp_path, said.append) for _ in range(2))
    entered = threading.Event()

    def enter():
        with ours.alone_with(tmp_path / "run"):
            entered.set()

    with ThreadPoolExecutor(2) as pool:
        with other.alone_with(tmp_path / "run"):
            waiting = pool.submit(enter)
            assert not entered.wait(0.2)
        waiting.result(timeout=10)
        assert entered.is_set() and len(said) == 1 and "waiting" in said[0]
        with other.alone_with(tmp_path / "run"):
            waiting = pool.submit(enter)
            ours.stop()
            with pytest.raises(reproduce.Stopped):
                waiting.result(timeout=10)


def _machine(tmp_path, monkeypatch, code, jobs=2):
    """A machine on which every command is a Python program."""
    monkeypatch.setattr(reproduce, "launcher", lambda *_: [sys.executable, "-c", code])
    return reproduce.Machine(jobs, [], tmp_path, lambda _: None)


def test_a_failure_names_command_and_log(tmp_path, monkeypatch):
    machine = _machine(tmp_path, monkeypatch, "raise SystemExit('no such store')")
    with pytest.raises(reproduce.Stopped, match=r"status 1; its output is in .*one\.txt: .*x y"):
        machine.run(["x y"], 1, "one")
    assert (tmp_path / "one.txt").read_text() == "no such store\n"


def test_gpus_and_cores_are_shared_out(tmp_path, monkeypatch):
    code = "import os, time; e = os.environ; print(e.get('CUDA_VISIBLE_DEVICES'), flush=True)"
    for gpus, shares in ((["3", "5", "7"], {"3,7", "5"}), ([], {"None"})):
        out = tmp_path / str(len(gpus))
        out.mkdir()
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(reproduce, "launcher", lambda *_: [sys.executable, "-c", code])
        machine = reproduce.Machine(2, gpus, out, lambda _: None)
        for log in ("a", "b"):
            machine.run([], 1, log)
        assert {path.read_text().strip() for path in out.glob("*.txt")} == shares


@dataclass
class Endless:
    """Stands for an experiment whose training does not end."""

    path: Path

    job = SimpleNamespace(plan=SimpleNamespace(batch=1))
    recipe = "endless"

    @property
    def trainings(self):
        return (self,)

    def result(self, _corrupted):
        return {}

    def is_finished(self):
        return False

    def require_possible(self):
        pass

    def command(self):
        return [self.path.name]


SLEEPS = """
import sys, time
print("here", flush=True)
time.sleep(60 * (sys.argv[1] != "bad"))
raise SystemExit(1)
"""


def test_sigterm_stops_everything(tmp_path, monkeypatch):
    machine = _machine(tmp_path, monkeypatch, SLEEPS)
    experiments = [Endless(tmp_path / name) for name in "abc"]

    before, started = signal.getsignal(signal.SIGTERM), time.monotonic()

    def interrupt():
        while len([p for p in tmp_path.glob("*.txt") if p.read_text()]) < 2:
            if time.monotonic() - started > 30:
                return
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            reproduce.run_all(experiments, machine, None)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - started < 30
    assert sorted(path.stem for path in tmp_path.glob("*.txt")) == ["a", "b"]  # c never began


def test_the_error_that_stopped_the_others_is_the_one_reported(tmp_path, monkeypatch):
    machine = _machine(tmp_path, monkeypatch, SLEEPS)
    experiments = [Endless(tmp_path / name) for name in ("endless", "bad")]
    with pytest.raises(reproduce.Stopped, match=r"bad\.txt"):
        reproduce.run_all(experiments, machine, None)


class InThisThread:
    """An executor that needs no thread: in another one, training may not handle signals."""

    def __init__(self, _jobs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except reproduce.Stopped as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_):
        pass


QUICK = [f"--set={text}" for text in (*SMALL, "pretrain.epochs=1", "finetune.epochs=1")]
"""Three steps each, saved each time: a run can be taken back to the middle."""
BOTH = ("--table", "3", "--rows", "simplebev-both", "--task", "vehicle")
NONE = ("--table", "3", "--rows", "simplebev-none", "--task", "vehicle")


class Reproduction:
    """``reproduce`` on the tiny store with ``occfeat-train`` in this process."""

    def __init__(self, store_for, out, monkeypatch):
        self.store_for, self.out, self.commands = store_for, out, []
        monkeypatch.setattr(reproduce.Machine, "_call", self._call)
        monkeypatch.setattr(reproduce, "ThreadPoolExecutor", InThisThread)

    def _call(self, command, _where, _log):
        assert "torch.distributed.run" not in command  # no GPU, one process
        arguments = command[command.index("occfeat_train") + 1 :]
        self.commands.append(arguments[0])
        result = CliRunner().invoke(occfeat_train, arguments)
        if result.exit_code:
            raise reproduce.Stopped(result.output)

    def __call__(self, *arguments, code=0):
        """Output and kinds of commands run."""
        self.commands.clear()
        store = self.store_for["miniature" if "miniature" in arguments else "paper"]
        fixed = ["--store", str(store), "--out", str(self.out), *QUICK]
        result = CliRunner().invoke(reproduce.main, [*fixed, *arguments])
        assert result.exit_code == code, result.output
        return result.output, list(self.commands)


@pytest.fixture(scope="module")
def finished(store_for, tmp_path_factory):
    """A folder with two rows of table 3, and what was said and run; read-only by agreement."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run = Reproduction(store_for, out, monkeypatch)
        return out, *run(*BOTH, "--rows", "simplebev-none")


@pytest.fixture
def reproduction(store_for, tmp_path, monkeypatch):
    """Runs in an empty folder."""
    return Reproduction(store_for, tmp_path / "out", monkeypatch)


@pytest.fixture
def later(finished, reproduction):
    """Runs in a copy of the finished folder, as moving it changes no name."""
    shutil.copytree(finished[0], reproduction.out)
    return reproduction


def test_a_table_is_run_once_and_reported(finished):
    out, output, commands = finished
    assert commands == ["finetune", "evaluate", "pretrain", "finetune", "evaluate"]
    rows = list(csv.DictReader((out / "table-3-paper.csv").read_text().splitlines()))
    assert [row["paper"] for row in rows] == ["13.70", "24.30"]
    for row, line in zip(rows, output.splitlines()[-5:], strict=False):
        assert row["row"] in output and row["seeds"] == "1", line
    (none, both) = (float(row["mean"]) for row in rows)
    found = {
        json.loads(path.read_text())["init"]: json.loads(path.read_text())["rows"]
        for path in out.glob("finetune-*/result.json")
    }
    assert found.pop(None)["simple-bev, visible"]["iou"] == none
    (pretrained,) = found.values()
    assert pretrained["simple-bev, visible"]["iou"] == both
    assert (out / "table-3-paper.png").exists()


def test_what_is_there_is_not_done_again(later):
    assert later(*BOTH)[1] == []
    # A second seed, and another table that shares the pretraining.
    assert later(*BOTH, "--seeds", "2")[1] == ["pretrain", "finetune", "evaluate"]
    shared = ("--table", "1", "--rows", "simplebev-enb0-occfeat", "--fraction", "0.1")
    assert later(*shared, "--task", "vehicle")[1] == ["finetune", "evaluate"]


def test_an_unfinished_run_goes_on(later):
    (pretraining,) = later.out.glob("pretrain-*0")
    whole = Run(pretraining).load()[1]
    last = max(pretraining.glob("checkpoint-*.json"))
    last.with_suffix(".pt").unlink()
    last.unlink()
    for path in later.out.glob("finetune-*/*"):
        path.unlink()
    assert not Run(pretraining).is_finished()
    assert later(*BOTH)[1] == ["pretrain", "finetune", "evaluate"]
    assert Run(pretraining).load()[1] == whole


def test_a_failure_stops_with_its_message(reproduction):
    output, commands = reproduction(*BOTH, "--set", "pretrain.batch=1000", code=1)
    assert "do not fill one step" in output or "1000" in output
    assert commands == ["pretrain"]
    assert "SimpleBEV, L_occ + L_feat" in output  # the table, as far as it is


def test_the_result_of_half_a_training_is_not_taken(later):
    paths = later.out.glob("finetune-*/result.json")
    results = {path: json.loads(path.read_text()) for path in paths}
    (path,) = [path for path, result in results.items() if result["init"] is None]
    path.write_text(json.dumps(results[path] | {"finished": False}))
    line = later(*NONE, "--report-only")[0].splitlines()[1]
    assert line.endswith("13.7     -           -")
    assert later(*NONE)[1] == ["evaluate"]


def test_corrupted_images_that_come_later_are_evaluated_too(reproduction, tmp_path):
    folder = tmp_path / "corrupted"
    options = ("--table", "c", "--rows", "none", "--corrupted", str(folder))
    easy, *others = (f"fog-{severity}" for severity in SEVERITIES)
    for made, expected in (([easy], ["finetune", "evaluate"]), (others, ["evaluate"])):
        for fog in made:
            make_tiny_store(folder / f"{fog}.zarr", settings=[f"images.corruption={fog}"], dim=0)
        output, commands = reproduction(*options)
        assert commands == expected
        assert ("fog" in output.partition("clean")[2]) == (made == others)
    (path,) = (tmp_path / "out").glob("finetune-*/corrupted.json")
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"missing": []}))
    assert reproduction(*options)[1] == []
    folder.rename(tmp_path / "others")
    options = (*options[:-1], str(tmp_path / "others"))
    assert "fog" not in reproduction(*options, "--report-only")[0].partition("clean")[2]
    assert reproduction(*options)[1] == ["evaluate"]


def test_a_missing_weights_file_is_found_before_any_work(reproduction):
    options = ("--table", "1", "--rows", "*-none", "--fraction", "0.01", "--task", "vehicle")
    missing = ("--set", "model.encoder_weights=moco_v2_800ep_pretrain.pth.tar")
    output, commands = reproduction(*options, *missing, code=1)
    assert commands == []
    assert "row simplebev-enb0-none: there is no file moco_v2_800ep_pretrain.pth.tar" in output
    reproduction(*options, *missing, "--report-only")


def test_the_miniature_runs_on_a_single_gpu(reproduction, monkeypatch):
    monkeypatch.setattr(cluster, "visible_gpus", lambda: ["0"])
    options = ("--table", "3", "--preset", "miniature", "--rows", "simplebev-none", "--seeds", "1")
    options = (*options, "--task", "vehicle")
    assert reproduction(*options)[1] == ["finetune", "evaluate"]
    assert "--jobs 2 is more" in reproduction(*options, "--jobs", "2", code=1)[0]


def test_options_that_do_not_go_together(reproduction):
    assert "--table c" in reproduction("--table", "c", code=1)[0]
    assert "--table c" in reproduction("--table", "3", "--corrupted", "x", code=1)[0]
    nothing = reproduction("--table", "4", "--task", "map", code=1)[0]
    assert "these rows have vehicle at 0.01" in nothing


def test_reporting_alone_runs_nothing(reproduction):
    output, commands = reproduction("--table", "4", "--report-only")
    assert commands == []
    assert "lambda = 0.0001" in output and "22.9" in output


@LONG
def test_real_processes_two_at_a_time_under_slurm(store_for, tmp_path):
    """The Slurm script's row of the table, with commands as they are."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "SLURM_ARRAY_TASK_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path)}
    command = ["bash", HERE / "slurm.sh", "--table", "3", "--task", "vehicle", *QUICK]
    command += ["--store", store_for["paper"], "--jobs", "2", "--seeds", "2"]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "SimpleBEV, no pretraining" in done.stdout and "(2)" in done.stdout
    assert len(list((tmp_path / "reproduction").glob("finetune-*.txt"))) == 2


def test_installed_anywhere_it_has_all_it_needs(store_for, tmp_path, pytestconfig):
    """By pip, without the clone."""
    root, source, site = pytestconfig.rootpath, tmp_path / "source", tmp_path / "site"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("occfeat_targets", "occfeat_train", "pipelines"):
        shutil.copytree(root / name, source / name, ignore=skip)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    pip = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    python, run = [sys.executable, "-m"], {"check": True, "text": True, "capture_output": True}
    subprocess.run([*python, *pip, "--no-compile", "--target", site, source], **run)
    run |= {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(site)}}
    module = [*python, "occfeat_pipelines.reproduce"]
    assert "--report-only" in subprocess.run([*module, "--help"], **run).stdout
    options = ["--table", "4", "--report-only", "--store", store_for["paper"]]
    done = subprocess.run([*module, *options], **run)
    assert done.stdout.count("lambda = ") == 6
    for name in ("occfeat_targets", "occfeat_train", "pipelines"):
        wanted = {p.relative_to(source / name) for p in (source / name).rglob("*.*ml")}
        installed = site / name.replace("pipelines", "occfeat_pipelines")
        assert wanted <= {p.relative_to(installed) for p in installed.rglob("*")}
    assert "occfeat-reproduce" in {path.name for path in (site / "bin").iterdir()}
