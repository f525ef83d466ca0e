"""Run the experiments of a table of the paper, and print its numbers beside ours.

Each recipe of the table is pretrained, finetuned and evaluated for each seed by the very
occfeat-train commands that are printed. What is finished is not done again, within a table or in
another one; a stopped reproduction goes on where it was when it is started again.

\b
occfeat-reproduce --table 3 --store targets.zarr
occfeat-reproduce --table 1 --rows 'simplebev-*' --fraction 0.01 --seeds 3
"""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext, suppress
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from occfeat_pipelines.recipes import HERE, PRESETS, TABLES, Preset, load_recipes
from occfeat_targets.store.settings import ConfigError
from occfeat_train.tasks import TASKS

if TYPE_CHECKING:  # --help does not wait for torch
    from occfeat_pipelines.experiments import Experiment

LOOK_AGAIN_S = 2.0
"""Between looks at a run that another reproduction is at."""


class Stopped(RuntimeError):
    """A command failed, or all were asked to stop before they were done: see the message."""


class Machine:
    """Runs ``occfeat-train`` commands, ``jobs`` at a time, each on its share of GPUs or cores.

    Several at a time print to files in ``logs``: on a terminal they would confuse.
    """

    def __init__(self, jobs: int, gpus: list[str], logs: Path, say: Callable[[str], None]):
        self.jobs, self._logs, self._say = jobs, logs, say
        self._shares: SimpleQueue[list[str]] = SimpleQueue()
        for job in range(jobs):
            self._shares.put(gpus[job::jobs])
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._running: set[subprocess.Popen] = set()

    def run(self, arguments: list[str], batch: int, log: str) -> None:
        """Run a command to its end, on as many GPUs of a share as divide the batch (0: all).

        Raises:
            Stopped: it failed, or :meth:`stop` was called.
        """
        gpus, where = self._shares.get(), os.environ.copy()
        if gpus:
            where["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        elif self.jobs > 1:
            where["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.jobs))
        self._say("$ " + shlex.join(["occfeat-train", *arguments]))
        try:
            self._call([*launcher(batch, len(gpus)), *arguments], where, self._logs / f"{log}.txt")
        finally:
            self._shares.put(gpus)

    def _call(self, command: list[str], where: dict[str, str], log: Path) -> None:
        with log.open("a") if self.jobs > 1 else nullcontext() as output:
            with self._lock:  # so that stop() misses none
                self._go_on()
                process = subprocess.Popen(command, env=where, stdout=output, stderr=output)
                self._running.add(process)
            status = process.wait()
            self._running.discard(process)
        if status == 130:  # it heard Ctrl-C before we did
            self._stopping.set()
        self._go_on()
        if status:
            see = f"; its output is in {log}" if output else ""
            raise Stopped(f"this failed with status {status}{see}: {shlex.join(command)}")

    def _go_on(self) -> None:
        if self._stopping.is_set():
            raise Stopped("stopped; start it again to go on")

    @contextmanager
    def alone_with(self, path: Path) -> Iterator[None]:
        """Wait until no other reproduction is at this run: tables and rows share some."""
        with path.with_suffix(".lock").open("w") as file:
            for look in count():
                with suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if look == 0:
                    self._say(f"waiting for another reproduction, which is at {path.name}")
                self._stopping.wait(LOOK_AGAIN_S)
                self._go_on()
            yield

    def stop(self) -> None:
        """Ask what runs to save and stop, and start nothing more."""
        with self._lock:
            self._stopping.set()
            for process in list(self._running):
                process.terminate()


def launcher(batch: int, gpus: int) -> list[str]:
    """Starts ``occfeat-train`` in as many processes as there are GPUs that share a batch evenly
    (batch 0: all), without a GPU in one."""
    n = max((n for n in range(1, gpus + 1) if batch % n == 0), default=1)
    several = ["torch.distributed.run", "--standalone", f"--nproc-per-node={n}", "-m"]
    return [sys.executable, "-m", *(several if n > 1 else []), "occfeat_train"]


def run_all(experiments: list[Experiment], machine: Machine, corrupted: str | None) -> None:
    """Run what is missing; Ctrl-C and SIGTERM save and stop.

    Raises:
        Stopped: a run failed; the others were stopped. KeyboardInterrupt: all were.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    chains: dict[Path, list[Experiment]] = {}
    for experiment in experiments:
        experiment.require_possible()
        # Those that share a pretraining run one after another.
        chains.setdefault(experiment.trainings[0].path, []).append(experiment)

    with ThreadPoolExecutor(machine.jobs) as pool:
        futures = [pool.submit(run_chain, c, machine, corrupted) for c in chains.values()]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            machine.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def plan(experiments: list[Experiment], corrupted: str | None) -> Iterator[str]:
    """Lines of a shell script that does it all: each command once, after a remark on what it is,
    whether it is done already and what it would stumble over."""
    seen: set[Path] = set()
    for experiment in experiments:
        for training in experiment.trainings:
            if training.path in seen:
                continue
            seen.add(training.path)
            job, p, done = training.job, training.job.plan, training.is_finished()
            of = f", {100 * job.fraction:g} % of the labels" if job.task else ""
            schedule = f"{p.epochs} epochs, batch {p.batch} x {p.accumulate}, rate {p.lr:g}"
            yield f"\n# {job.title}{of}: {schedule}{', done' if done else ''}"
            for fault in () if done else filter(None, (training.missing, *training.faults())):
                yield f"# MISSING: {fault}"
            yield shlex.join(["occfeat-train", *training.command()])
            if job.task or training.texts:
                yield shlex.join(["occfeat-train", *training.evaluation(corrupted)])
    yield f"\n# {len(seen)} trainings for {len(experiments)} numbers; nothing was run"


def run_chain(chain: list[Experiment], machine: Machine, corrupted: str | None) -> None:
    """Pretrain, finetune and evaluate, one after another; what is done is left out."""
    for experiment in chain:
        for training in experiment.trainings:
            with machine.alone_with(training.path):
                result = experiment.result(corrupted)
                if result and not result.get("missing"):
                    break
                if not training.is_finished():
                    machine.run(training.command(), training.job.plan.batch, training.path.name)
                if training is experiment.trainings[-1]:
                    machine.run(training.evaluation(corrupted), 0, training.path.name)


CLICK = {"help_option_names": ["-h", "--help"], "show_default": True}
PRESET = "What rows start from; miniature: a demo world."
SET = "A training setting of all runs, as in occfeat-train; repeatable."
OUT = "Directory of all runs and of the reports."


@click.command(help=__doc__, context_settings=CLICK)
@click.option("--table", type=click.Choice(TABLES), required=True, help="c is nuScenes-C.")
@click.option("--preset", type=click.Choice(PRESETS), default="paper", help=PRESET)
@click.option("--store", metavar="PATH|URL", help="Targets store.  [default: the preset's]")
@click.option("--set", "overrides", metavar="SECTION.KEY=VALUE", multiple=True, help=SET)
@click.option("--rows", multiple=True, help="Only rows of this number or pattern; repeatable.")
@click.option("--task", "tasks", type=click.Choice(TASKS.names), multiple=True, help="Only this.")
@click.option("--fraction", "fractions", type=float, multiple=True, help="Only this one.")
@click.option("--seeds", type=click.IntRange(1), help="Runs of each row.  [default: the preset's]")
@click.option("--jobs", type=click.IntRange(1), help="At the same time, sharing GPUs or cores.")
@click.option("--corrupted", metavar="DIR", help="Of occfeat-targets corrupt: table c needs it.")
@click.option("--out", type=click.Path(path_type=Path), default="reproduction", help=OUT)
@click.option("--plan", is_flag=True, help="Run nothing and need no store; print all commands.")
@click.option("--report-only", is_flag=True, help="Run nothing; report what the same options ran.")
def main(**options: Any) -> None:
    """Run, then report; ``--help`` is the module's docstring."""
    from occfeat_targets.store.files import StoreError
    from occfeat_train.runs.run import RunError

    try:
        reproduce(SimpleNamespace(**options))
    except (ConfigError, StoreError, RunError, Stopped) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        raise click.ClickException("stopped; start it again to go on") from None


def reproduce(asked: SimpleNamespace) -> None:
    """Run what is missing of what was asked for, and report what is there, also after an error."""
    from tqdm import tqdm

    from occfeat_pipelines import report
    from occfeat_pipelines.experiments import Planner, with_stores
    from occfeat_targets.cluster import visible_gpus

    corrupted, out = asked.corrupted, asked.out
    if (asked.table == "c") != bool(corrupted):
        raise ConfigError(
            "--table c needs --corrupted DIR (what occfeat-targets corrupt made), no other does"
        )
    preset = Preset.load(HERE / f"reproduce_{asked.preset}.yaml")
    recipes = load_recipes(asked.table, asked.rows or preset.rows)
    planner = Planner(preset, asked.store or preset.store, out.resolve(), asked.overrides)
    seeds, tasks = asked.seeds or preset.seeds, asked.tasks or preset.tasks
    experiments = planner.experiments(recipes, seeds, tasks, asked.fractions)
    if asked.plan:
        click.echo("\n".join(plan(experiments, corrupted)))
        return
    experiments = with_stores(experiments, click.echo)
    out.mkdir(parents=True, exist_ok=True)
    try:
        if not asked.report_only:
            gpus = visible_gpus()
            jobs = asked.jobs or min(preset.jobs, len(gpus) or preset.jobs)
            if gpus and jobs > len(gpus):
                raise ConfigError(f"--jobs {jobs} is more than the {len(gpus)} GPUs there are")
            run_all(experiments, Machine(jobs, gpus, out, tqdm.write), corrupted)
    finally:
        name = f"table-{asked.table}-{asked.preset}"
        report.write(report.cells(experiments, corrupted), out / name)


if __name__ == "__main__":
    main()
