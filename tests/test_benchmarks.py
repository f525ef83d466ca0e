"""The benchmarks run, at toy size; their figures mean something on an idle machine only."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from train_runs import SMALL

from occfeat_pipelines import bench_loader, bench_targets, bench_train, benchmark
from occfeat_targets.build import read_dataset
from occfeat_targets.config import TargetsConfig
from occfeat_targets.store.reader import open_store
from occfeat_train.config import TrainConfig
from occfeat_train.data.dataset import FrameReader
from occfeat_train.models.lifts.simplebev import SimpleBEVLift
from occfeat_train.objectives.occfeat import OccFeatHead


def test_machine_and_memory(capsys):
    benchmark.say_machine()
    assert f"torch {torch.__version__}" in capsys.readouterr().out
    assert benchmark.peak_memory() > 50e6
    assert benchmark.peak_memory(2**30) == 0
    assert benchmark.apart(abs, -3) == 3


def test_the_loader_and_its_limits(demo_root, demo_store):
    options = ["--store", demo_store, "--dataroot", demo_root, "--workers", 0]
    options += ["--samples", 8, "--repetitions", 1]
    done = CliRunner().invoke(bench_loader.main, [str(option) for option in options])
    assert done.exit_code == 0, done.output
    assert done.output.count("occfeat / this") == 3


def test_the_bare_read_reads_all_that_the_loader_does(tiny_store, monkeypatch):
    names = bench_loader.ARRAYS
    bare = bench_loader.BarePread(str(tiny_store), [3], names)[0]
    ours = FrameReader(str(tiny_store)).read(3, names)
    assert (bare["images"] == ours["images"]).all()
    reader = open_store(tiny_store).sharded["features"]
    (file, ranges) = reader.ranges(3, len(ours["features"]))
    assert (tiny_store / file).is_file() and len(ranges) == 1
    assert len(bare["features"]) == ranges[0][1] - 4


def test_the_dense_lift_computes_the_same(tiny_store, monkeypatch):
    monkeypatch.setattr(bench_train, "CHANNELS", 8)
    inputs, _ = bench_train.batch_of(str(tiny_store), 1)
    features = torch.randn(1, 6, 8, 28, 50)
    ours, dense = (
        make(open_store(tiny_store).grid, 8)(features, inputs["K"], inputs["cam_T_bev"], (224, 400))
        for make in (SimpleBEVLift, bench_train.DenseLift)
    )
    torch.testing.assert_close(dense, ours, rtol=1e-3, atol=1e-4)


def test_the_dense_head_computes_the_same():
    bev, voxel = torch.randn(1, 8, 4, 5), torch.tensor([0, 7, 33])
    heads = [make(8, 2, 6) for make in (OccFeatHead, bench_train.DenseHead)]
    heads[1].load_state_dict(heads[0].state_dict())
    for ours, dense in zip(*(head(bev, voxel) for head in heads), strict=True):
        torch.testing.assert_close(dense, ours, rtol=1e-4, atol=1e-4)


def test_parts_of_training(tiny_store, monkeypatch):
    monkeypatch.setattr(
        bench_train, "CONFIG", TrainConfig.load(None, [*SMALL, "pretrain.epochs=1"])
    )
    monkeypatch.setattr(bench_train, "IMAGE_HW", (32, 64))
    monkeypatch.setattr(bench_train, "CHANNELS", 8)
    monkeypatch.setattr(bench_train, "apart", lambda function, *arguments: function(*arguments))
    options = ["--store", str(tiny_store), "--rounds", "1"]
    done = CliRunner().invoke(bench_train.main, options)
    assert done.exit_code == 0, done.output
    assert done.output.count("times the memory") == 2
    assert "% of it waiting for data" in done.output
    seconds, peak = bench_train.step(str(tiny_store), False, 2)  # otherwise on GPUs alone
    assert seconds > 0 and peak >= 0


def test_stages_of_the_build(demo_root, tmp_path, capsys):
    config = TargetsConfig.load(None, ["teacher.name=teachers:PatchMeans", "block_frames=2"])
    dataset = read_dataset(demo_root, None, config)
    bench_targets.stages(dataset, config, str(tmp_path / "stages.zarr"))
    lines = capsys.readouterr().out.splitlines()
    for name in ("lidar", "teacher", "output: Voxels", "output: Map", "write"):
        assert any(line.startswith(name) for line in lines), name

    gate = types.SimpleNamespace(wait=lambda: None)
    assert 0 < bench_targets.forward(dataset.records[:1], config, 1, gate) < 60


@pytest.mark.parametrize("code", ["import time; time.sleep(0.3)", "raise SystemExit(1)"])
def test_the_build_beside_the_teacher_alone(code, monkeypatch, capsys):
    monkeypatch.setattr(bench_targets, "teacher_alone", lambda *_: {"teacher alone": 0.1})
    command = [sys.executable, "-c", code]
    if "Exit" in code:
        with pytest.raises(SystemExit, match="the build failed"):
            bench_targets.whole_build(command, [None] * 4, None)
        return
    bench_targets.whole_build(command, [None] * 4, None)
    *_, alone, _ = capsys.readouterr().out.splitlines()
    name, speed, seconds, ratio = alone.rsplit(maxsplit=3)
    assert (name, speed, seconds) == ("teacher alone", "20.000", "0.200")
    assert float(ratio) > 1.5


def test_none_reaches_into_private_names():
    for path in Path(benchmark.__file__).parent.glob("bench*.py"):
        assert not re.findall(r"\w\._(?!_)\w", path.read_text()), path
