"""Running ``occfeat-train`` at toy size in tests: as a user does, in a process of its own."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import chdir, contextmanager
from pathlib import Path

import torch
from click.testing import CliRunner

from occfeat_train.cli import main

SCHEDULE = [
    "data.workers=0",
    "pretrain.batch=4",
    "pretrain.epochs=3",
    "finetune.batch=4",
    "finetune.accumulate=1",
    "finetune.epochs=3",
    "run.log_every=1",
    "run.save_minutes=0",
    "run.validate_every=0",
]
"""For the tiny store: 3 steps an epoch."""
SMALL = [
    "model.encoder=efficientnet-b0",
    "model.encoder_weights=random",
    "model.channels=8",
    "model.image_size=[32,64]",
    *SCHEDULE,
    "finetune.lr=0.001",
]
"""A network for it, and :data:`SCHEDULE`."""
COMPARABLE = [
    "model.freeze_batch_norm=true",
    "model.drop_path=0",
    "pretrain.lr=1e-5",
    "finetune.lr=1e-5",
]
"""Nothing that depends on how a batch is split over processes, and steps so small that Adam, which
divides by the size of a gradient, does not blow rounding errors up."""


def options(*settings):
    """``--set`` options of :data:`SMALL` with others on top."""
    return [text for setting in (*SMALL, *settings) for text in ("--set", setting)]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
FORKED = (str(Path(__file__).parent / "forked.py"), "2")


def start(*arguments, cwd, launcher=("-m",)):
    """Start ``occfeat-train``; two threads would only get in each other's way here."""
    return subprocess.Popen(
        [sys.executable, *launcher, "occfeat_train", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(*arguments, cwd, processes=1, code=0):
    """Run ``occfeat-train`` to its end; returns what it printed. One process is this one: several
    seconds of imports less, and all that is random follows from the run's seed anyway."""
    if processes == 1:
        with chdir(cwd):
            result = CliRunner().invoke(main, list(map(str, arguments)))
        unexpected = result.exception and not isinstance(result.exception, SystemExit)
        assert result.exit_code == code and not unexpected, result.output
        return result.output
    process = start(*arguments, cwd=cwd, launcher=FORKED)
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == code, output
    return output


def stop_at_step(process, directory, step, signal_number, group=False):
    """Send a signal once the run's log has reached a step, or to its whole process group.

    Returns what it printed.
    """
    try:
        return _stop_at_step(process, directory, step, signal_number, group)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def _stop_at_step(process, directory, step, signal_number, group):
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in log_of(directory)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    (os.killpg if group else os.kill)(process.pid, signal_number)
    return process.communicate(timeout=60)[0]


def log_of(directory):
    """Lines of a run's log as dicts."""
    path = Path(directory) / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def curve(directory):
    """All that a run logged of its steps but times and memory."""
    lines = [line for line in log_of(directory) if "loss" in line]
    times = ("seconds", "waited", "samples_per_second", "peak_memory_gb")
    return [{k: v for k, v in x.items() if k not in times} for x in lines]


def flip(path, at):
    """Damage a byte of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 + at % 255
    path.write_bytes(content)


@contextmanager
def full_disk(size):
    """No file can grow beyond a size."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def final_state(directory):
    """The newest checkpoint's content, flat: name -> tensor or plain value."""
    newest = max(Path(directory).glob("checkpoint-*.pt"))
    return dict(_flat(torch.load(newest, weights_only=True), ""))


def _flat(value, name):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for key, item in enumerate(value):
            yield from _flat(item, f"{name}.{key}")
    else:
        yield name, value


def assert_same_state(a, b):
    """Two final checkpoints are equal bit for bit, optimiser and schedule included."""
    a, b = final_state(a), final_state(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = torch.equal(value, b[name]) if torch.is_tensor(value) else value == b[name]
        assert same, name
