"""The ``occfeat-train`` command: thin shells over ``train``, ``evaluate``, ``export``, ``view``."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from occfeat_targets.store.registry import Registry
from occfeat_train import __version__
from occfeat_train.objectives import OBJECTIVES
from occfeat_train.tasks import TASKS

if TYPE_CHECKING:
    from occfeat_train.distributed import Process
    from occfeat_train.runs.job import Job


def _names(registry: Registry) -> str:
    return f"{', '.join(registry.names)}, or a plug-in, package.module:Class"


store_option = click.option(
    "--store",
    metavar="PATH|URL",
    help="Targets store (occfeat-targets build).  [default: targets.zarr, or the run's own]",
)
config_option = click.option(
    "--config",
    metavar="FILE.yaml|PRESET",
    help="Settings: a file, or a preset by name (paper, demo, miniature).  [default: what the "
    "store or the pretraining run asks for, else paper]",
)
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="One setting, over --config; repeatable. occfeat_train/presets/paper.yaml lists all.",
)
run_option = click.option(
    "--run-dir",
    "run",
    type=click.Path(path_type=Path),
    help="Run directory.  [default: a new one in runs/, named by the time]",
)
resume_option = click.option(
    "--resume",
    is_flag=True,
    help="Go on with --run-dir, or with the newest unfinished run of this kind in runs/.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="occfeat")
def main() -> None:
    """Pretrain and finetune BEV networks from a targets store, which is all they need.

    \b
    occfeat-train pretrain --store targets.zarr
    occfeat-train finetune --fraction 0.01
    occfeat-train evaluate

    On several GPUs: torchrun --nproc-per-node 4 -m occfeat_train pretrain ...
    """


@main.command()
@store_option
@config_option
@set_option
@run_option
@resume_option
@click.option(
    "--objective",
    metavar="NAME",
    help=f"What to learn: {_names(OBJECTIVES)}. Short for --set pretrain.objective=...  [default: "
    "what the settings say]",
)
def pretrain(
    store: str | None,
    config: str | None,
    overrides: tuple[str, ...],
    run: Path | None,
    resume: bool,
    objective: str | None,
) -> None:
    """Pretrain without labels: predict from images what the store has of lidar and a teacher.

    Ctrl-C saves and stops; --resume goes on, also after a crash.
    """
    with _session() as (process, say):
        from occfeat_targets.store.files import absolute
        from occfeat_train.runs import resolve
        from occfeat_train.runs.job import Job

        if resume:
            job, directory = resolve.resumed("pretrain", run, store, overrides, _given())
        else:
            store = absolute(store or "targets.zarr")
            if objective:
                overrides = (*overrides, f"pretrain.objective={objective}")
            settings = resolve.settings(store, config, None, overrides, say)
            job, directory = Job("pretrain", store, settings), run or resolve.new_run("pretrain")
        _train(job, directory, resume, process, say)
        say(f"Next: occfeat-train finetune --init {directory} --fraction 0.01")


@main.command()
@store_option
@config_option
@set_option
@run_option
@resume_option
@click.option(
    "--task",
    metavar="NAME",
    default=TASKS.names[0],
    show_default=True,
    help=f"What to learn: {_names(TASKS)}.",
)
@click.option(
    "--fraction",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Share of the training labels. 0.01 takes every 100th scene, at least one.",
)
@click.option(
    "--fraction-unit",
    type=click.Choice(["scene", "frame"]),
    default="scene",
    show_default=True,
    help="Whether the fraction is of scenes or of frames.",
)
@click.option(
    "--init",
    metavar="RUN|none",
    help="Pretraining run to start from; none starts from encoder weights alone.  [default: the "
    "newest finished one in runs/]",
)
def finetune(
    store: str | None,
    config: str | None,
    overrides: tuple[str, ...],
    run: Path | None,
    resume: bool,
    task: str,
    fraction: float,
    fraction_unit: str,
    init: str | None,
) -> None:
    """Finetune for a task with a share of the labels.

    Epochs, batch and learning rate follow the paper for the share, unless set.
    """
    with _session() as (process, say):
        from occfeat_targets.store.files import absolute
        from occfeat_train.runs import resolve
        from occfeat_train.runs.job import Job

        if resume:
            job, directory = resolve.resumed("finetune", run, store, overrides, _given())
        else:
            pretraining = resolve.pretraining(init, say)
            if not store and pretraining:
                store = pretraining.description()["store"]
            store = absolute(store or "targets.zarr")
            settings = resolve.settings(store, config, pretraining, overrides, say)
            job = Job(
                "finetune",
                store,
                settings.for_fraction(fraction),
                fraction,
                fraction_unit,
                str(pretraining.path.resolve()) if pretraining else None,
                task,
            )
            directory = run or resolve.new_run("finetune")
        _train(job, directory, resume, process, say)
        say(f"Next: occfeat-train evaluate --run-dir {directory}")


@main.command()
@store_option
@set_option
@click.option(
    "--run-dir",
    "run",
    type=click.Path(path_type=Path),
    help="Finetuning run.  [default: the newest finished one in runs/]",
)
@click.option(
    "--corrupted",
    metavar="FOLDER|URL",
    help="Also on the stores of corrupted images in there (occfeat-targets corrupt).",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def evaluate(
    store: str | None,
    overrides: tuple[str, ...],
    run: Path | None,
    corrupted: str | None,
    as_json: bool,
) -> None:
    """IoU of a finetuned network on the validation split.

    At probability 0.5, by distance, and at the best of seven thresholds. Written to result.json
    in the run.

    With --corrupted, IoU by corruption and severity of nuScenes-C, and the share of the clean IoU
    that remains: RR, and mRR over the corruptions. Written to corrupted.json in the run.
    """
    with _session() as (process, say):
        from occfeat_targets.store.files import absolute
        from occfeat_train import robustness
        from occfeat_train.evaluate import evaluate as evaluate_run
        from occfeat_train.evaluate import table
        from occfeat_train.runs import resolve
        from occfeat_train.runs.job import Job
        from occfeat_train.runs.run import Run, write_json

        finetuned = Run(run) if run else resolve.newest_finished("finetune")
        job = resolve.changed(Job.of_run(finetuned, store and absolute(store)), overrides)
        tell = (lambda _: None) if as_json else say
        if corrupted:
            folder = absolute(corrupted)
            result = robustness.evaluate_corrupted(job, finetuned, process, folder, tell)
            text, name = robustness.table(result), "corrupted.json"
        else:
            tell(f"Store: {job.store}")
            result = evaluate_run(job, finetuned, process)
            text, name = table(result), "result.json"
        result["set"] = list(overrides)
        say(json.dumps(result, indent=1) if as_json else text)
        if process.is_main:
            write_json(finetuned.path / name, result)


@main.command()
@click.option(
    "--run-dir",
    "run",
    type=click.Path(path_type=Path),
    help="Run to export.  [default: the newest finished pretraining in runs/]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Directory to make: model.safetensors and model.json.",
)
def export(run: Path | None, out: Path) -> None:
    """Write the BEV network of a run, without its head, for use elsewhere.

    occfeat_train.export.load_bev_net(DIRECTORY) loads it.
    """
    with _session() as (_, say):
        from occfeat_train.export import export as export_run
        from occfeat_train.runs import resolve
        from occfeat_train.runs.run import Run

        chosen = Run(run) if run else resolve.newest_finished("pretrain")
        export_run(chosen, out)
        say(f"{out}: the BEV network of {chosen.path}")


@main.command()
@store_option
@click.option(
    "--run-dir",
    "run",
    type=click.Path(path_type=Path),
    help="A run of either kind.  [default: the newest finished one in runs/]",
)
@click.option(
    "--frame", type=int, help="Frame number in the store.  [default: the first of validation]"
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="prediction.png",
    show_default=True,
    help="PNG to write.",
)
def view(store: str | None, run: Path | None, frame: int | None, out: Path) -> None:
    """Draw what a network predicts for one frame, and what it should, to a PNG.

    Seen from above. What is drawn is up to what the network learned.
    """
    with _session() as (process, say):
        from occfeat_targets.store.files import absolute
        from occfeat_train.runs import resolve
        from occfeat_train.runs.job import Job
        from occfeat_train.runs.run import Run
        from occfeat_train.view import draw_frame

        chosen = Run(run) if run else resolve.newest_finished("pretrain", "finetune")
        job = Job.of_run(chosen, store and absolute(store))
        if process.is_main:
            i = draw_frame(job, chosen, frame, process.device, out)
            say(f"{out}: frame {i} of {job.store} as {chosen.path} ({job.title}) sees it")


def _given() -> set[str]:
    """Names of this command's options that were given, not left to their defaults."""
    context = click.get_current_context()
    commandline = click.core.ParameterSource.COMMANDLINE
    return {name for name in context.params if context.get_parameter_source(name) is commandline}


def _train(
    job: Job, directory: Path, resume: bool, process: Process, say: Callable[[str], None]
) -> None:
    """Train, and say how it went."""
    from occfeat_targets.store.reader import open_store
    from occfeat_train.distributed import from_main
    from occfeat_train.runs.run import Run, check_same_store
    from occfeat_train.train import train

    store = open_store(job.store)
    run = Run(Path(from_main(str(directory))))
    if resume:
        check_same_store(run.description()["store_identity"], store)
    elif process.is_main:  # which makes it soon after
        run.require_new()
    say(f"Store: {job.store}")
    if store.attrs["teacher"]["weights"].startswith("random"):
        say(
            "The store's features come from a RANDOM-WEIGHTS teacher: good for trying things out, "
            "useless for results."
        )
    finished = train(job, run, process, resume)
    say(f"{run.path}: {'finished' if finished else 'stopped'}")
    if not finished:
        say(f"Go on with: occfeat-train {job.kind} --resume --run-dir {run.path}")
        raise SystemExit(130)


@contextmanager
def _session() -> Iterator[tuple[Process, Callable[[str], None]]]:
    """Join the process group; the main process speaks; known errors become one clear sentence."""
    from occfeat_targets.store.files import StoreError
    from occfeat_targets.store.settings import ConfigError
    from occfeat_train.distributed import process_group
    from occfeat_train.models.encoder_weights import WeightsError
    from occfeat_train.runs.run import RunError
    from occfeat_train.train import NonFiniteLoss

    try:
        with process_group() as process:
            yield process, click.echo if process.is_main else (lambda _: None)
    except (ConfigError, StoreError, RunError, WeightsError, NonFiniteLoss) as error:
        text = str(error)
        if text.startswith("Caught "):  # from a reading process: torch puts a traceback before it
            text = text.splitlines()[-1].partition("Error: ")[2] or text
        _leave(f"Error: {text}")
    except Exception:
        _leave(traceback.format_exc())


def _leave(text: str) -> NoReturn:
    """Exit with a message and code 1.

    At once if there are other processes: they may be waiting for this one in a collective, and
    an orderly exit would wait for them. torchrun then stops them.
    """
    click.echo(text, err=True)
    if "WORLD_SIZE" in os.environ:
        sys.stderr.flush()
        os._exit(1)
    raise SystemExit(1)
