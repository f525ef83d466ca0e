"""The loop: resuming, several processes, accumulation, stopping."""

import math
import os
import shutil
import signal
import socket
import time

import pytest
import torch
from conftest import LONG
from train_runs import (
    COMPARABLE,
    TORCHRUN,
    assert_same_state,
    final_state,
    log_of,
    options,
    run,
    start,
    stop_at_step,
)

from occfeat_train.config import TrainConfig
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run, RunError
from occfeat_train.train import make_learner

CURVE = ("loss", "occupancy", "features", "gradient_norm")


@pytest.fixture(scope="module")
def undisturbed(tiny_store, tmp_path_factory):
    """A pretraining of 9 steps that nothing disturbed."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    run("pretrain", "--store", tiny_store, "--run-dir", "a", *options(), cwd=cwd)
    return cwd / "a"


@pytest.mark.parametrize("workers", [pytest.param(0, marks=LONG), 2])
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


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=LONG), "forkserver"])
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


@LONG
def test_sigterm_to_all_processes_saves_too(undisturbed, tiny_store, tmp_path):
    """As torchrun and Slurm send it: reading processes get it as well."""
    settings = options("data.workers=2")
    process = start("pretrain", "--store", tiny_store, "--run-dir", "b", *settings, cwd=tmp_path)
    output = stop_at_step(process, tmp_path / "b", 4, signal.SIGTERM, group=True)
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
    assert f"process {os.getpid()} on {socket.gethostname()} is training {copy.path}" in output
    with pytest.raises(RunError, match="is not empty"):
        copy.create({})


@pytest.mark.parametrize("total_steps", [1, 2, 18, 19, 20, 100])
def test_one_cycle_rises_to_the_peak_and_falls_in_any_number_of_steps(total_steps):
    config = TrainConfig.load(None, ["finetune.lr=0.5", "run.precision=float32"])
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


def test_two_processes_and_accumulation_follow_the_curve_of_one_large_batch(tiny_store, tmp_path):
    """Each alone and both together (where DDP must not average before the last micro-batch).

    With a seed whose steps make less than most of how a sum is rounded.
    """
    same = (*COMPARABLE, "run.seed=1", "pretrain.epochs=1")
    small = ("pretrain.batch=2", "pretrain.accumulate=2")
    cases = {"one": (1, ()), "two": (2, ()), "parts": (1, small), "both": (2, small)}
    for name, (processes, settings) in cases.items():
        arguments = ("--store", tiny_store, "--run-dir", name, *options(*same, *settings))
        output = run("pretrain", *arguments, cwd=tmp_path, processes=processes)
        assert f"{'one process' if processes == 1 else '2 processes'} on CPU" in output
    one, *others = (_curve(tmp_path / name) for name in cases)
    assert len(one) == 3
    for other in others:
        torch.testing.assert_close(other, one, rtol=1e-4, atol=2e-6)


@LONG
def test_two_processes_stop_together_and_resume_in_float16(tiny_store, tmp_path):
    """The loss's scale is part of a checkpoint."""
    small = ("pretrain.batch=2", "pretrain.accumulate=2", "pretrain.epochs=2")
    settings = options("run.precision=float16", "model.image_size=[32,32]", *small)
    whole = ("pretrain", "--store", tiny_store, "--run-dir", "whole", *settings)
    assert "float16 (asked for)" in run(*whole, cwd=tmp_path, processes=2)
    process = start(*whole[:4], "parts", *settings, cwd=tmp_path, launcher=TORCHRUN)
    output = stop_at_step(process, tmp_path / "parts", 2, signal.SIGTERM, group=True)
    assert "Go on with: occfeat-train pretrain --resume --run-dir parts" in output
    assert 2 <= Run(tmp_path / "parts").position()["step"] < 6
    resumed = ("pretrain", "--resume", "--run-dir", "parts")
    run(*resumed, cwd=tmp_path, processes=2)
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    assert ".scaler.scale" in final_state(tmp_path / "whole")


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_gradient_that_is_not_finite_changes_nothing(precision):
    """In float16 the schedule waits too, until the scaler gives up."""
    settings = ["finetune.lr=0.5", f"run.precision={precision}"]
    config = TrainConfig.load(None, settings)
    network = torch.nn.Linear(1, 1)
    learner = make_learner(Job("finetune", "", config), network, 99, torch.device("cpu"))
    before = [p.clone() for p in network.parameters()]
    rate = learner.optimiser.param_groups[0]["lr"]

    def update(factor):
        learner.optimiser.zero_grad()
        learner.scaler.scale(network(torch.ones(1, 1)).sum() * factor).backward()
        return learner.update(clip_norm=5.0)

    outcomes = [update(math.inf)[1] for _ in range(27)]
    assert outcomes == [precision == "float16"] * 26 + [False]
    assert all(map(torch.equal, network.parameters(), before))
    assert learner.optimiser.param_groups[0]["lr"] == rate
    learner.scaler.update(1024.0)
    norm, is_sound = update(1.0)
    assert is_sound and norm == pytest.approx(2**0.5)
    assert not all(map(torch.equal, network.parameters(), before))
    assert learner.optimiser.param_groups[0]["lr"] > rate


def test_a_clipped_sum_is_that_of_undivided_micro_batches():
    """As in Simple-BEV's loop: five losses, backward each, one clipping, one step."""
    config = TrainConfig().for_fraction(1.0)
    assert (config.finetune.accumulate, config.finetune.clip) == (5, "sum")
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    learners = [
        make_learner(Job("finetune", "", config), network, 99, torch.device("cpu"))
        for network in (ours, theirs)
    ]
    for size in (10.0, 1e-3, 0.5, 30.0):  # some beyond the norm, as a sum or as a mean too
        micro = torch.randn(5, 4, 3) * size
        for learner in learners:
            learner.optimiser.zero_grad()
        for batch in micro:
            (ours(batch).square().mean() / 5).backward()
            theirs(batch).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 5.0)
        found, _ = learners[0].update(5.0, parts=5)
        learners[1].optimiser.step()
        learners[1].scheduler.step()
        assert found == pytest.approx(norm.item() / 5)  # the log's is the mean's
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad / 5, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_run_clips_what_its_settings_say(tiny_store, tmp_path):
    """The sum of two at 0.2 is the mean at 0.1, and nothing else changes."""
    small = ("finetune.epochs=1", "finetune.batch=2", "finetune.accumulate=2")
    for name, norm in (("sum", 0.2), ("mean", 0.1)):
        asked = options(*small, f"finetune.clip={name}", f"run.clip_norm={norm}")
        where = ("--store", tiny_store, "--init", "none", "--run-dir", name)
        run("finetune", *where, *asked, cwd=tmp_path)
    assert min(line["gradient_norm"] for line in log_of(tmp_path / "sum")) > 0.2
    assert_same_state(tmp_path / "sum", tmp_path / "mean")


def test_a_loss_that_is_not_finite_stops_before_the_step(tiny_store, tmp_path):
    settings = options("pretrain.lr=1e30")
    arguments = ("pretrain", "--store", tiny_store, "--run-dir", "a", *settings)
    output = run(*arguments, cwd=tmp_path, code=1)
    assert "the loss or gradient of step 2 is not finite, from frames [" in output
    assert "Traceback" not in output
    assert len(log_of(tmp_path / "a")) == 1


@LONG
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
