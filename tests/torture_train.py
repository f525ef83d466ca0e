"""Seeded rounds of harm to trainings: ``python tests/torture_train.py --rounds 100 --seed 1``.

Each ends with the weights and losses of an undisturbed run, or with one clear sentence. Prints what
came of it by fault, and exits with 1 if anything went wrong. Not run by pytest, but for a few
rounds in ``test_runs.py``.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import psutil
from tiny_store import make_tiny_store
from train_runs import TORCHRUN, assert_same_state, curve, flip, full_disk, options, run, start

FAULTS = {}
RESUME = ("pretrain", "--resume", "--run-dir", "run")


def fault(function):
    """A round of it: ``function(rig)`` returns in a word what came of the harm."""
    FAULTS[function.__name__.replace("_", " ")] = function
    return function


class Rig:
    """One round's directory and chances."""

    def __init__(self, home, store, cwd, seed):
        self.home, self.cwd, self.rng = home, cwd, random.Random(seed)
        self.run = cwd / "run"
        self.new = ("pretrain", "--store", store, "--run-dir", "run", *options())

    def whole(self, processes=1):
        """The run that nothing disturbed, made once."""
        path = self.home / f"whole-{processes}"
        if not path.exists():
            arguments = [path if word == "run" else word for word in self.new]
            run(*arguments, cwd=self.home, processes=processes)
        return path

    def start(self, **how):
        """The training, or what is left of it, in processes of its own."""
        return start(*self.command(), cwd=self.cwd, **how)

    def command(self):
        return RESUME if (self.run / "run.json").exists() else self.new

    def wait(self, process):
        """Until the run was begun and a random moment more."""
        while not (self.run / "run.json").exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(self.rng.uniform(0, 2.5))

    def finish(self, processes=1):
        """Go on to the end, and compare; returns what was printed."""
        output = run(*self.command(), cwd=self.cwd, processes=processes)
        self.compare(processes)
        return output

    def compare(self, processes=1):
        assert_same_state(self.whole(processes), self.run)
        assert curve(self.whole(processes)) == curve(self.run)


def one_sentence(output):
    lines = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and "Traceback" not in output, output


@fault
def kill_9(rig):
    for _ in range(rig.rng.randint(1, 3)):
        process = rig.start()
        if rig.rng.random() < 0.25:
            time.sleep(rig.rng.uniform(0, 6))
        else:
            rig.wait(process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    rig.finish()
    return "equal"


@fault
def damage(rig):
    """Of the newest checkpoint, or of everything."""
    shutil.copytree(rig.whole(), rig.run)
    pattern = rig.rng.choice(["*9.pt", "*9.json", "*9.*", "checkpoint-*", "run.json"])
    for path in sorted(rig.run.glob(pattern)):
        how, size = rig.rng.choice(["flip", "cut", "empty", "lose"]), path.stat().st_size
        if how == "flip":
            flip(path, rig.rng.randrange(size))
        elif how == "lose":
            path.unlink()
        else:
            os.truncate(path, 0 if how == "empty" else rig.rng.randrange(size))
    try:
        output = run(*RESUME, cwd=rig.cwd)
    except AssertionError as refused:
        one_sentence(str(refused).partition("\nassert ")[0].removeprefix("AssertionError: "))
        return "refused"
    rig.compare()
    return "fell back" if "Note: " in output else "equal"


@fault
def two_trainers(rig):
    first = rig.start()
    try:
        while not (rig.run / "run.json").exists():
            assert first.poll() is None, first.communicate()[0]
            time.sleep(0.005)
        time.sleep(rig.rng.uniform(0, 1))
        first.send_signal(signal.SIGSTOP)  # or it might be done before the second has begun
        kind = rig.rng.choice([RESUME, rig.new])
        one_sentence(run(*kind, cwd=rig.cwd, code=1))
    finally:
        first.send_signal(signal.SIGCONT)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 0, output
    rig.compare()
    return "second refused"


@fault
def full_disk_while_saving(rig):
    """Of run.json, of the log, or of a checkpoint, in mid-run or at the start."""
    if rig.rng.random() < 0.5:
        shutil.copytree(rig.whole(), rig.run)
        for path in rig.run.glob("checkpoint-*9.*"):
            path.unlink()
    size = int(10 ** rig.rng.uniform(0, 7))
    with full_disk(size):
        one_sentence(run(*rig.command(), cwd=rig.cwd, code=1))
    rig.finish()
    return "stopped, then equal"


@fault
def torchrun_loses_a_process(rig):
    process = rig.start(launcher=TORCHRUN)
    try:
        rig.wait(process)
        family = psutil.Process(process.pid).children(recursive=True)
        rank = rig.rng.choice("01")
        victims = [p for p in family if p.environ().get("RANK") == rank]
        for victim in victims:
            victim.kill()
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (1 if victims else 0), output
    if victims and "run: finished" not in output:
        # torchrun may end the other one first.
        told = f"process {1 - int(rank)} of 2 lost another one" in output
        assert told or "Signal 15 (SIGTERM)" in output, output
        assert "Signal 9 (SIGKILL)" in output[output.index("Root Cause") :], output
    rig.finish(processes=2)
    return "ended, then equal"


def torture(rounds, seed, home):
    """Do so many rounds; returns how many went wrong."""
    store = make_tiny_store(home / "tiny.zarr")
    came, wrong = Counter(), 0
    for i in range(rounds):
        name = [*FAULTS][i % len(FAULTS)]
        cwd = home / f"round-{i}"
        cwd.mkdir()
        try:
            end = FAULTS[name](Rig(home, store, cwd, f"{seed} {i}"))
        except Exception:
            wrong += 1
            print(f"WRONG: round {i} of seed {seed}, {name}, in {cwd}:\n{traceback.format_exc()}")
            continue
        came[name, end] += 1
        print(f"{i + 1}/{rounds} {name}: {end}", flush=True)
        shutil.rmtree(cwd)
    for (name, what), n in sorted(came.items()):
        print(f"{name:26} {what:20} {n:4}")
    print(f"{rounds} rounds with seed {seed}: {wrong} went wrong")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="torture-train-"))
    wrong = torture(asked.rounds, asked.seed, home)
    if not wrong:
        shutil.rmtree(home)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
