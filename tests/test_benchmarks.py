"""The benchmarks run, at toy size; their figures mean something on an idle machine only."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from train_runs import SMALL

from occfeat_pipelines import bench_baselines as baselines
from occfeat_pipelines import bench_lidar
from occfeat_pipelines import bench_parts as benchmark
from occfeat_targets.build import read_dataset
from occfeat_targets.config import TargetsConfig
from occfeat_targets.store.reader import open_store
from occfeat_train.config import TrainConfig
from occfeat_train.data.dataset import FrameReader
from occfeat_train.models.lifts.simplebev import SimpleBEVLift
from occfeat_train.objectives.occfeat import OccFeatHead

TEACHER = ("--teacher", "teachers:PatchMeans")


def run(*arguments):
    """The lines that it printed, after the one that names the machine."""
    done = CliRunner().invoke(benchmark.main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    machine, *lines = done.stdout.splitlines()
    assert f"torch {torch.__version__}" in machine
    return [line for line in lines if line]


def test_memory_is_measured_apart():
    assert benchmark.peak_memory() > 50e6
    assert benchmark.apart(abs, -3) == 3


def test_the_loader_and_its_limits(demo_root, demo_store):
    options = ("--store", demo_store, "--dataroot", demo_root, "--workers", 0)
    lines = run("loader", *options, "--frames", 8, "--rounds", 2)
    title, ours, bare, original = lines
    assert title.split() == ["ms", "a", "sample", "ms", "a", "sample", "/", "first"]
    assert ours.startswith("occfeat loader") and ours.endswith(" 1.00")
    assert bare.startswith("bare pread") and original.startswith("original images")
    assert all(float(line.split()[-1]) > 0 for line in (bare, original))


def test_ways_take_turns_and_medians_are_compared(capsys):
    figures = iter([(10, 1), (5, 1), (20, 1), (30, 4), (40, 1), (50, 2)])
    ways = dict.fromkeys(("ours", "other"), lambda: next(figures))
    benchmark.compare("both", "ms, MB", ways, 3)
    _, *lines = (line.split() for line in capsys.readouterr().out.splitlines())
    assert lines == [
        ["both", "ms", "MB", "ms", "/", "first", "MB", "/", "first"],
        ["ours", "20.00", "1.00", "1.00", "1.00"],
        ["other", "30.00", "2.00", "1.25", "2.00"],
    ]


def test_the_bare_read_reads_all_that_the_loader_does(tiny_store, monkeypatch):
    names = benchmark.ARRAYS
    bare = baselines.BarePread(str(tiny_store), [3], names)[0]
    ours = FrameReader(str(tiny_store)).read(3, names)
    assert (bare["images"] == ours["images"]).all()
    reader = open_store(tiny_store).sharded["features"]
    (file, ranges) = reader.ranges(3, len(ours["features"]))
    assert (tiny_store / file).is_file() and len(ranges) == 1
    assert len(bare["features"]) == ranges[0][1] - 4


def test_the_dense_lift_computes_the_same(tiny_store, monkeypatch):
    monkeypatch.setattr(benchmark, "CHANNELS", 8)
    opened, batch = benchmark.one_frame(str(tiny_store))
    features = torch.randn(1, 6, 8, 28, 50)
    ours, dense = (
        make(opened.grid, 8)(features, batch["K"], batch["cam_T_ego"], batch["images"].shape[2:4])
        for make in (SimpleBEVLift, baselines.DenseLift)
    )
    torch.testing.assert_close(dense, ours, rtol=1e-3, atol=1e-4)


def test_the_dense_head_computes_the_same():
    bev, voxel = torch.randn(1, 8, 4, 5), torch.tensor([0, 7, 33])
    heads = [make(8, 2, 6) for make in (OccFeatHead, baselines.DenseHead)]
    heads[1].load_state_dict(heads[0].state_dict())
    for ours, dense in zip(*(head(bev, voxel) for head in heads), strict=True):
        torch.testing.assert_close(dense, ours, rtol=1e-4, atol=1e-4)


def test_parts_of_training(tiny_store, monkeypatch):
    monkeypatch.setattr(benchmark, "CONFIG", TrainConfig.load(None, [*SMALL, "pretrain.epochs=1"]))
    monkeypatch.setattr(benchmark, "IMAGE_HW", (32, 64))
    monkeypatch.setattr(benchmark, "CHANNELS", 8)
    monkeypatch.setattr(benchmark, "apart", lambda function, *arguments: function(*arguments))
    monkeypatch.setitem(benchmark.PARTS, "steps", benchmark.steps)
    lines = run("lifting", "head", "steps", "--store", tiny_store, "--rounds", 1, *TEACHER)
    for name in ("SimpleBEVLift", "DenseLift", "OccFeatHead", "DenseHead"):
        (line,) = (line for line in lines if line.startswith(name))
        milliseconds, megabytes, slower, _ = map(float, line.split()[1:])
        assert milliseconds > 0 and megabytes >= 0 and slower > 0
    assert re.search(r"% of it waiting for data, [1-9]\d*\.\d images/s", lines[-2])
    assert re.fullmatch(r"the teacher in the loop would add \d+\.\d+ s a step", lines[-1])


def test_the_teacher_of_a_step_has_its_threads(tiny_store, monkeypatch):
    monkeypatch.setattr(benchmark, "CONFIG", TrainConfig.load(None, [*SMALL, "pretrain.epochs=1"]))
    used, before = [], torch.get_num_threads()

    def timed(_):
        used.append(torch.get_num_threads())
        return 1, 0

    monkeypatch.setattr(benchmark, "timed", timed)
    try:
        torch.set_num_threads(3)
        benchmark.steps(SimpleNamespace(store=str(tiny_store), workers=0, teacher=TEACHER[1]))
    finally:
        torch.set_num_threads(before)
    assert used == [3]


def test_memory_is_0_where_the_system_does_not_say(monkeypatch):
    monkeypatch.setattr(benchmark, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(Path, "read_text", lambda path: "Name: python\n")
    assert benchmark.peak_memory() == 0


def test_stages_of_the_build(demo_root):
    lines = run("stages", "--dataroot", demo_root, *TEACHER, "--frames", 2)
    assert "2 frames:" in lines
    for name in ("(lidar)", "(dense_features)", "voxels.py", "(write_block)"):
        own, whole = (float(x) for x in next(x for x in lines if name in x).split()[1:4:2])
        assert whole >= own >= 0


def test_the_teacher_alone(demo_root):
    config = TargetsConfig.load(None, ["teacher.name=teachers:PatchMeans"])
    records = read_dataset(demo_root, None, config).records[:2]
    assert 0 < benchmark.forward(records[0], config, 1) < 60
    speed, megabytes = benchmark.apart(benchmark.teacher_alone, records, config, 2, 1)
    assert speed > 0 and megabytes > 50


def test_the_whole_build():
    sleep = [sys.executable, "-c", "x = bytearray(300_000_000); import time; time.sleep(0.3)"]
    speed, megabytes = benchmark.apart(benchmark.whole_build, sleep, 3)
    assert 0.1 < speed < 10 and 300 < megabytes < 2000
    with pytest.raises(subprocess.CalledProcessError):
        benchmark.whole_build([sys.executable, "-c", "raise SystemExit(1)"], 3)


def test_none_reaches_into_private_names():
    for path in Path(benchmark.__file__).parent.glob("b*.py"):
        assert not re.findall(r"\w\._(?!_)\w", path.read_text()), path


def test_steps_of_lidar_networks(tiny_lidar_store):
    options = ["--store", tiny_lidar_store, "--size", "2-8", "--steps", 1]
    options += ["--method", "scalr", "--method", "also"]
    done = CliRunner().invoke(bench_lidar.main, [str(option) for option in options])
    assert done.exit_code == 0, done.output
    machine, title, *rows = done.output.splitlines()
    assert "torch" in machine and title.split()[:2] == ["size", "method"]
    assert [row.split()[1] for row in rows] == ["scalr", "also"]
    for row in rows:
        _, _, n_rows, seconds, memory = row.split()
        assert 50 < int(n_rows) <= 300 and float(seconds) >= 0 and 0.1 < float(memory) < 8
