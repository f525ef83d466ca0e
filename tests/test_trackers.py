"""``--tracker``: the log goes to TensorBoard, trackio or wandb too, also of a resumed run."""

import sys
from types import ModuleType

import pytest
from tiny_store import make_tiny_store
from train_runs import log_of, options, run

SETTINGS = options("pretrain.epochs=2")
"""Six steps."""


@pytest.fixture
def workplace(tmp_path):
    make_tiny_store(tmp_path / "targets.zarr")
    return tmp_path


class Stop(Exception):
    """In place of a kill."""


def _train_in_two_parts(cwd, tracker, monkeypatch):
    """Killed after four steps, of which a checkpoint holds three; then resumed. What the log says,
    step by step."""
    from occfeat_train.runs.run import Run

    save, saved = Run.save, []

    def stop_early(self, state, position):
        if position["step"] == 4:
            raise Stop
        saved.append(position["step"])
        save(self, state, position)

    asked = ("pretrain", "--run-dir", "run", "--tracker", tracker)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", stop_early)
        assert "Stop" in run(*asked, "--store", "targets.zarr", *SETTINGS, cwd=cwd, code=1)
    assert saved == [1, 2, 3]
    run(*asked, "--resume", cwd=cwd)
    lines = log_of(cwd / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    return lines


def test_tensorboard_has_each_step_once(workplace, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = _train_in_two_parts(workplace, "tensorboard", monkeypatch)
    events = EventAccumulator(str(workplace / "run")).Reload()
    assert {*events.Tags()["scalars"]} == lines[0].keys() - {"step"}
    for name in ("loss", "occupancy", "samples_per_second"):
        found = events.Scalars(name)
        assert [event.step for event in found] == [line["step"] for line in lines]
        assert [event.value for event in found] == pytest.approx([line[name] for line in lines])


@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_others_are_told_who_a_run_is_and_each_line(workplace, monkeypatch, tracker):
    calls, fake = [], ModuleType(tracker)
    fake.init = lambda **told: calls.append(("init", told))
    fake.log = lambda values, step: calls.append(("log", {"step": step} | values))
    fake.finish = lambda: calls.append(("finish", None))
    monkeypatch.setitem(sys.modules, tracker, fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    lines = _train_in_two_parts(workplace, tracker, monkeypatch)
    logged = [told for what, told in calls if what == "log"]
    assert logged[:3] == lines[:3] and logged[4:] == lines[3:]
    first, second = (told for what, told in calls if what == "init")
    assert first == second and first["resume"] == "allow"
    assert first["name"].startswith("run-") and first["config"]["kind"] == "pretrain"
    assert first.get("id") == (first["name"] if tracker == "wandb" else None)
    assert [what for what, _ in calls].count("finish") == 2 and calls[-1][0] == "finish"


def test_the_log_says_how_fast_and_how_much_memory(workplace):
    run("pretrain", "--store", "targets.zarr", "--run-dir", "run", *SETTINGS, cwd=workplace)
    for line in log_of(workplace / "run"):
        assert line["samples_per_second"] == pytest.approx(4 / line["seconds"])
        assert 0.05 < line["peak_memory_gb"] < 100 and 0 <= line["waited"] <= 1
