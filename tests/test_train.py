"""The loop: resuming, several processes, accumulation, stopping."""

import os
import shutil
import signal
import time

import pytest
import torch
from train_runs import (
    COMPARABLE,
    assert_same_state,
    log_of,
    options,
    run,
    start,
    stop_at_step,
)

from occfeat_common.settings import load_settings
from occfeat_train.config import TrainConfig
from occfeat_train.jobs import Job
from occfeat_train.runs import Run, RunError
from occfeat_train.train import make_learner

CURVE = ("loss", "occupancy", "features", "gradient_norm")


@pytest.fixture(scope="module")
def undisturbed(tiny_store, tmp_path_factory):
    """A pretraining of 9 steps that nothing disturbed."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    run("pretrain", "--store", tiny_store, "--run-dir", "a", *options(), cwd=cwd)
    return cwd / "a"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_in_mid_epoch_and_resumed_ends_bit_equal(
    workers, undisturbed, tiny_store, tmp_path
):
    settings = options(f"data.workers={workers}", "pretrain.epochs=3")
    process = start("pretrain", "--store", tiny_store, "--run-dir", "b", *settings, cwd=tmp_path)
    stop_at_step(process, tmp_path / "b", 5, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    (checkpoint,) = sorted((tmp_path / "b").glob("checkpoint-*.json"))[-1:]
    assert 4 <= int(checkpoint.stem[-8:]) < 9
    output = run("pretrain", "--resume", "--run-dir", "b", cwd=tmp_path)
    assert "resumed after step" in output
    assert_same_state(undisturbed, tmp_path / "b")
    wanted = [[line[k] for k in ("step", "epoch", *CURVE)] for line in log_of(undisturbed)]
    assert [[x[k] for k in ("step", "epoch", *CURVE)] for x in log_of(tmp_path / "b")] == wanted


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_reading_processes_change_nothing_and_never_hang(
    start_method, undisturbed, tiny_store, tmp_path
):
    settings = options("data.workers=2", f"data.start_method={start_method}")
    run("pretrain", "--store", tiny_store, "--run-dir", "b", *settings, cwd=tmp_path)
    assert_same_state(undisturbed, tmp_path / "b")


def test_ctrl_c_saves_says_how_to_go_on_and_loses_nothing(undisturbed, tiny_store, tmp_path):
    process = start("pretrain", "--store", tiny_store, *options(), cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (found := list(tmp_path.glob("runs/pretrain-*/run.json"))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    output = stop_at_step(process, found[0].parent, 4, signal.SIGINT)
    assert process.returncode == 130
    assert "occfeat-train pretrain --resume --run-dir runs/pretrain-" in output
    assert "Traceback" not in output
    (checkpoint,) = sorted(found[0].parent.glob("checkpoint-*.json"))[-1:]
    assert int(checkpoint.stem[-8:]) in (5, 6, 7)  # where it was, not the epoch's end
    run("pretrain", "--resume", cwd=tmp_path)  # finds the unfinished one
    assert_same_state(undisturbed, found[0].parent)


def test_sigterm_to_all_processes_saves_too(undisturbed, tiny_store, tmp_path):
    """As torchrun and Slurm send it: reading processes get it as well."""
    settings = options("data.workers=2")
    process = start("pretrain", "--store", tiny_store, "--run-dir", "b", *settings, cwd=tmp_path)
    while not any(line["step"] >= 4 for line in log_of(tmp_path / "b")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    run("pretrain", "--resume", "--run-dir", "b", cwd=tmp_path)
    assert_same_state(undisturbed, tmp_path / "b")


def test_a_run_stopped_before_its_first_checkpoint_can_go_on(undisturbed, tiny_store, tmp_path):
    settings = options("run.save_minutes=60")
    process = start("pretrain", "--store", tiny_store, "--run-dir", "b", *settings, cwd=tmp_path)
    stop_at_step(process, tmp_path / "b", 2, signal.SIGKILL)
    assert not list((tmp_path / "b").glob("checkpoint-*"))
    run("pretrain", "--resume", "--run-dir", "b", cwd=tmp_path)
    assert_same_state(undisturbed, tmp_path / "b")


def test_two_processes_can_t_train_the_same_run(undisturbed, tmp_path):
    copy = Run(shutil.copytree(undisturbed, tmp_path / "copy"))
    last = copy.checkpoints()[0]
    last.unlink()
    with copy.locked():
        output = run("pretrain", "--resume", "--run-dir", copy.path, cwd=tmp_path, code=1)
    assert "another process is training" in output
    with pytest.raises(RunError, match="was just taken"):
        copy.create({})


@pytest.mark.parametrize("total_steps", [1, 2, 18, 19, 20, 100])
def test_one_cycle_rises_to_the_peak_and_falls_in_any_number_of_steps(total_steps):
    config = load_settings(TrainConfig, None, ["finetune.lr=0.5", "run.precision=float32"])
    network = torch.nn.Linear(1, 1)
    learner = make_learner(Job("finetune", "", config), network, total_steps, torch.device("cpu"))
    rates = []
    for _ in range(total_steps):
        rates.append(learner.optimiser.param_groups[0]["lr"])
        learner.optimiser.step()
        learner.scheduler.step()
    assert rates[0] == pytest.approx(0.5 / 25)
    assert max(rates) <= 0.5
    if total_steps >= 18:
        assert max(rates) > 0.4
        assert rates[-1] < max(rates)


def _curve(directory):
    return torch.tensor([[line[k] for k in CURVE] for line in log_of(directory)])


def test_two_processes_follow_the_curve_of_one(tiny_store, tmp_path):
    settings = options(*COMPARABLE)
    for name, processes in (("one", 1), ("two", 2)):
        arguments = ("pretrain", "--store", tiny_store, "--run-dir", name, *settings)
        output = run(*arguments, cwd=tmp_path, processes=processes)
        assert f"{processes} process(es)" in output
    one, two = _curve(tmp_path / "one"), _curve(tmp_path / "two")
    assert len(one) == 9
    torch.testing.assert_close(two, one, rtol=1e-4, atol=2e-6)


def test_accumulation_is_one_large_batch(tiny_store, tmp_path):
    large = options(*COMPARABLE)
    small = options(*COMPARABLE, "pretrain.batch=2", "pretrain.accumulate=2")
    for name, settings in (("large", large), ("small", small)):
        run("pretrain", "--store", tiny_store, "--run-dir", name, *settings, cwd=tmp_path)
    large, small = _curve(tmp_path / "large"), _curve(tmp_path / "small")
    torch.testing.assert_close(small, large, rtol=1e-4, atol=2e-6)


def test_a_loss_that_is_not_finite_stops_before_the_step(tiny_store, tmp_path):
    settings = options("pretrain.lr=1e30")
    arguments = ("pretrain", "--store", tiny_store, "--run-dir", "a", *settings)
    output = run(*arguments, cwd=tmp_path, code=1)
    assert "the loss or gradient of step 2 is not finite, from frames [" in output
    assert "Traceback" not in output
    assert len(log_of(tmp_path / "a")) == 1


def test_finetuning_in_two_processes_and_counts_of_evaluation(tiny_store, tmp_path):
    """Curve as in one process; evaluation counts exactly equal."""
    settings = options(*COMPARABLE)
    for name, processes in (("one", 1), ("two", 2)):
        run(
            *("finetune", "--store", tiny_store, "--init", "none", "--run-dir", name, *settings),
            cwd=tmp_path,
            processes=processes,
        )
    keys = ("loss", "mask", "centre", "offset")
    one, two = (
        torch.tensor([[line[k] for k in keys] for line in log_of(tmp_path / name)])
        for name in ("one", "two")
    )
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    results = []
    for processes in (1, 2):
        run("evaluate", "--run-dir", "one", cwd=tmp_path, processes=processes)
        results.append((tmp_path / "one" / "result.json").read_text())
    assert results[0] == results[1]
    assert '"frames": 4' in results[0]
