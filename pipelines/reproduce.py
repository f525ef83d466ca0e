"""Run the experiments of a table of the paper, and print its numbers beside ours.

Each recipe of the table is pretrained, finetuned and evaluated for each seed by the very
occfeat-train commands that are printed. What is finished is not done again, within a table or in
another one; a stopped reproduction goes on where it was when it is started again.

\b
python pipelines/reproduce.py --table 3 --store targets.zarr
python pipelines/reproduce.py --table 1 --rows 'simplebev-*' --fraction 0.01 --seeds 3
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import click
import torch
from tqdm import tqdm

from occfeat_pipelines import report
from occfeat_pipelines.experiments import Experiment, Planner, Training, require_weights
from occfeat_pipelines.recipes import HERE, TABLES, Recipe, load_preset, load_recipes
from occfeat_pipelines.report import Cell
from occfeat_targets.store.files import StoreError, absolute
from occfeat_targets.store.settings import ConfigError
from occfeat_train.robustness import headline
from occfeat_train.runs.run import RunError
from occfeat_train.tasks import TASKS

LOOK_AGAIN_S = 2.0
"""Between looks at a run that another reproduction is at."""
PRESETS = sorted(path.stem.removeprefix("reproduce_") for path in HERE.glob("reproduce_*.yaml"))


class Stopped(RuntimeError):
    """All were asked to stop before they were done."""


class Failed(Stopped):
    """A command failed; the message names it."""


class Machine:
    """Runs ``occfeat-train`` commands, several at a time, each on its share of GPUs or cores."""

    def __init__(self, jobs: int, logs: Path, say: Callable[[str], None]):
        """Raises ConfigError when there are fewer GPUs than jobs."""
        gpus = torch.cuda.device_count()
        if 0 < gpus < jobs:
            raise ConfigError(f"--jobs {jobs} is more than the {gpus} GPUs there are")
        self.jobs, self.logs, self.say = jobs, logs, say
        self._shares: SimpleQueue[tuple[int, dict[str, str]]] = SimpleQueue()
        for job in range(jobs):
            mine = range(gpus)[job::jobs]
            where = {}
            if gpus:
                where["CUDA_VISIBLE_DEVICES"] = _device_names(mine)
            elif jobs > 1:
                where["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
            self._shares.put((len(mine), where))
        self._running: set[subprocess.Popen] = set()
        self._stopping = threading.Event()

    def run(self, arguments: list[str], batch: int, log: str) -> None:
        """Run a command to its end, on as many GPUs of a share as divide the batch (0: all).

        Raises:
            Failed: it failed. Stopped: :meth:`stop` was called.
        """
        gpus, where = share = self._shares.get()
        try:
            launcher = [sys.executable, "-m"]
            if (processes := processes_for(batch, gpus)) > 1:
                launcher += ["torch.distributed.run", "--standalone"]
                launcher += [f"--nproc-per-node={processes}", "-m"]
            command = [*launcher, "occfeat_train", *arguments]
            self.say("$ " + shlex.join(["occfeat-train", *arguments]))
            self._check_call(command, where, self.logs / f"{log}.txt")
        finally:
            self._shares.put(share)

    def _check_call(self, command: list[str], where: dict[str, str], log: Path) -> None:
        if self._stopping.is_set():
            raise Stopped("stopped; start it again to go on")
        output = {}
        with ExitStack() as stack:
            if self.jobs > 1:  # one at a time may write to the terminal, several would confuse
                file = stack.enter_context(log.open("a"))
                output = {"stdout": file, "stderr": file}
            process = subprocess.Popen(command, env=os.environ | where, **output)
            self._running.add(process)
            try:
                status = process.wait()
            finally:
                self._running.discard(process)
        if self._stopping.is_set() or status == 130:
            raise Stopped("stopped; start it again to go on")
        if status:
            see = f"; its output is in {log}" if self.jobs > 1 else ""
            raise Failed(f"this failed with status {status}{see}: {shlex.join(command)}")

    @contextmanager
    def alone_with(self, path: Path) -> Iterator[None]:
        """Wait until no other reproduction is at this run: tables and rows share some.

        Raises:
            Stopped: :meth:`stop` was called meanwhile.
        """
        with path.with_suffix(".lock").open("w") as file:
            waiting = False
            while not _try_lock(file):
                if not waiting:
                    self.say(f"waiting for another reproduction, which is at {path.name}")
                waiting = True
                if self._stopping.wait(LOOK_AGAIN_S):
                    raise Stopped("stopped; start it again to go on")
            yield

    def stop(self) -> None:
        """Ask what runs to save and stop, and start nothing more."""
        self._stopping.set()
        for process in list(self._running):
            process.terminate()


def processes_for(batch: int, gpus: int) -> int:
    """The most of ``gpus`` that share a batch evenly, 1 without a GPU; batch 0: all."""
    return max((n for n in range(1, gpus + 1) if batch % n == 0), default=1)


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _device_names(mine: range) -> str:
    """Names of GPUs for a child: a scheduler may have given us only some of the machine's."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return ",".join(names[i] for i in mine)


def chains(experiments: list[Experiment]) -> list[list[Experiment]]:
    """Experiments that share a pretraining together, in order; the others alone."""
    found: dict[Path, list[Experiment]] = {}
    for experiment in experiments:
        first = experiment.pretraining or experiment.finetuning
        found.setdefault(first.path, []).append(experiment)
    return list(found.values())


def run_chain(
    chain: list[Experiment], machine: Machine, corrupted: str | None, advance: Callable[[], None]
) -> None:
    """Pretrain, then finetune and evaluate each experiment; skip what is done."""

    def train(training: Training) -> None:
        if not training.is_finished():
            machine.run(training.command(), training.batch, training.path.name)

    for experiment in chain:
        finetuning = experiment.finetuning
        with machine.alone_with(finetuning.path):
            result = result_of(experiment, corrupted)
            if result is None or result.get("missing"):
                if experiment.pretraining:
                    with machine.alone_with(experiment.pretraining.path):
                        train(experiment.pretraining)
                train(finetuning)
                machine.run(finetuning.evaluation(corrupted), 0, finetuning.path.name)
        advance()


def result_of(experiment: Experiment, corrupted: str | None) -> dict[str, Any] | None:
    """What ``evaluate`` wrote; None if it did not, or for half a training or other images.

    The result on corrupted images may lack some that were not made then: its ``missing``.
    """
    name = "corrupted.json" if corrupted else "result.json"
    path = experiment.finetuning.path / name
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    if corrupted and result["corrupted"] != absolute(corrupted):
        return None
    return result if result.get("clean", result)["finished"] else None


def run_all(experiments: list[Experiment], machine: Machine, corrupted: str | None) -> None:
    """Run what is missing; Ctrl-C and SIGTERM save and stop.

    Raises:
        Failed: a run failed; the others were stopped. KeyboardInterrupt: all were.
    """

    def on_sigterm(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, on_sigterm)
    todo = chains(experiments)
    progress = tqdm(total=len(experiments), desc="experiments", disable=machine.jobs == 1)
    with progress, ThreadPoolExecutor(machine.jobs) as pool:
        futures = [
            pool.submit(run_chain, chain, machine, corrupted, progress.update) for chain in todo
        ]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            if not all(future.done() and not future.exception() for future in futures):
                machine.stop()
                pool.shutdown(wait=False, cancel_futures=True)
    errors = [e for future in futures if not future.cancelled() and (e := future.exception())]
    # One that failed stopped the others.
    for error in sorted(errors, key=lambda error: type(error) is Stopped):
        raise error


def measured(experiment: Experiment, corrupted: str | None) -> dict[str, float]:
    """Column -> IoU of an experiment, empty as long as it has not been evaluated."""
    result = result_of(experiment, corrupted)
    if result is None:
        return {}
    if corrupted:
        scores = {"clean": headline(result["clean"]), **result["mean"], "mRR": result["mRR"]}
        return {column: value for column, value in scores.items() if value is not None}
    iou = headline(result)
    return {} if iou is None else {_column(experiment): iou}


def _column(experiment: Experiment) -> str:
    paper, ours = (f"{100 * share:g} %" for share in (experiment.fraction, experiment.used))
    return f"{experiment.task}, {paper}" + (f" (here {ours})" if ours != paper else "")


def cells(
    chosen: dict[str, Recipe], experiments: list[Experiment], corrupted: str | None
) -> list[Cell]:
    """The table: a cell per recipe and column, with the values of the seeds that are done."""
    ours: dict[tuple[str, str], list[float]] = {}
    paper: dict[tuple[str, str], float | None] = {}
    for experiment in experiments:
        name = experiment.recipe
        if not corrupted:
            said = chosen[name].paper[experiment.task][experiment.fraction]
            paper[name, _column(experiment)] = said
        for column, value in measured(experiment, corrupted).items():
            ours.setdefault((name, column), []).append(value)
    keys = list(dict.fromkeys([*paper, *ours]))
    return [
        Cell(
            chosen[name].label,
            column,
            paper.get((name, column)),
            tuple(ours.get((name, column), ())),
        )
        for name, column in keys
    ]


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--table", type=click.Choice(TABLES), required=True, help="c is nuScenes-C.")
@click.option(
    "--preset",
    "preset_name",
    type=click.Choice(PRESETS),
    default="paper",
    show_default=True,
    help="What rows start from. miniature: a demo world, an hour on two cores.",
)
@click.option("--store", metavar="PATH|URL", help="Targets store.  [default: the preset's]")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="A training setting of all runs, as in occfeat-train; repeatable.",
)
@click.option("--rows", multiple=True, help="Only rows of this number or pattern; repeatable.")
@click.option(
    "--task", "tasks", multiple=True, type=click.Choice(TASKS.names), help="Only this task."
)
@click.option("--fraction", "fractions", multiple=True, type=float, help="Only this fraction.")
@click.option("--seeds", type=click.IntRange(min=1), help="Runs of each row.  [default: preset's]")
@click.option("--jobs", type=click.IntRange(min=1), help="At the same time, sharing GPUs or cores.")
@click.option(
    "--corrupted", metavar="DIR", help="Table c needs it: what occfeat-targets corrupt made."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="reproduction",
    show_default=True,
    help="Directory of all runs and of the reports.",
)
@click.option("--report-only", is_flag=True, help="Run nothing; report what the same options ran.")
def main(
    table: str,
    preset_name: str,
    store: str | None,
    overrides: tuple[str, ...],
    rows: tuple[str, ...],
    tasks: tuple[str, ...],
    fractions: tuple[float, ...],
    seeds: int | None,
    jobs: int | None,
    corrupted: str | None,
    out: Path,
    report_only: bool,
) -> None:
    """Run, then report; ``--help`` is the module's docstring."""
    try:
        if (table == "c") != bool(corrupted):
            raise ConfigError(
                "--table c needs --corrupted DIR (what occfeat-targets corrupt made), no other does"
            )
        preset = load_preset(preset_name)
        chosen = load_recipes(table, rows or preset.rows)
        planner = Planner(preset, store or preset.store, out.resolve(), overrides)
        experiments = planner.experiments(
            chosen, seeds or preset.seeds, tasks or preset.tasks, fractions
        )
        out.mkdir(parents=True, exist_ok=True)
        try:
            if not report_only:
                require_weights(experiments)
                fewer = min(preset.jobs, torch.cuda.device_count() or preset.jobs)
                run_all(experiments, Machine(jobs or fewer, out, tqdm.write), corrupted)
        finally:  # also what is there when it stops half-way
            found = cells(chosen, experiments, corrupted)
            write_report(found, table, preset_name, out)
    except (ConfigError, StoreError, RunError, Stopped) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        raise click.ClickException("stopped; start it again to go on") from None


def write_report(found: list[Cell], table: str, preset: str, out: Path) -> None:
    """Print the table, and put it beside the runs as CSV and figure."""
    click.echo(report.as_text(found))
    path = out / f"table-{table}-{preset}"
    path.with_suffix(".csv").write_text(report.as_csv(found))
    report.draw(found, f"Table {table}, preset {preset}", path.with_suffix(".png"))
    click.echo(f"\n{path}.csv and .png")


if __name__ == "__main__":
    main()
