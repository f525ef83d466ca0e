"""What a command works on where the user names only some of it: jobs, settings and runs."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from occfeat_targets.store.files import absolute
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.settings import ConfigError, override, presets, read_yaml, settings_file
from occfeat_train.config import TrainConfig
from occfeat_train.distributed import note
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import DamagedError, Run, RunError, timestamp
from occfeat_train.tasks import TASKS

RUNS = Path("runs")
HOW = (
    *("run.precision", "run.log_every", "run.save_minutes", "run.tracker"),
    *("run.validate_every", "data.workers", "data.start_method", "data.check_reads"),
)
"""Settings that a resumed run may change: how it runs, not what it computes."""
LONGER = "pretrain.epochs"
"""One more of a pretraining whose rate is constant, so that it can be trained for longer."""
Asked = Mapping[str, Any]
"""Options: ``store``, ``config``, ``overrides`` (``section.key=value`` texts), ``run``, ``plugins``
(of a run); of pretrain ``objective``; of finetune ``task``, ``fraction``, ``fraction_unit`` and
``init``."""
KEPT = ("config", "objective", "task", "fraction", "fraction_unit", "init")
"""Options that a resumed run keeps."""


def new_job(kind: str, asked: Asked, say: Callable[[str], None]) -> tuple[Job, Path]:
    """What the options of ``pretrain`` or ``finetune`` ask for, and a directory for it.

    Of the options ``asked`` those that are None take the default; ``say`` is told what was chosen.
    Settings are those of --config, else the pretraining run's, else of the store's preset.

    RunError: there is no finished pretraining, or the one that --init names has no checkpoint;
    StoreError: from ``open_store``; ConfigError: settings are unreadable, unknown or impossible, or
    the store asks for a file of settings, or the run for a plug-in that the user didn't name.
    """
    run, overrides = None, asked["overrides"]
    if kind == "finetune":
        run = _pretraining(asked["init"], asked["plugins"], say)
        if not TASKS(asked["task"]).finetuned:
            raise ConfigError(
                f"nothing is finetuned for {asked['task']}: occfeat-train evaluate --texts FILE"
            )
    elif asked["objective"]:
        overrides = (*overrides, f"pretrain.objective={asked['objective']}")
    store = asked["store"] or (run and run.description()["store"]) or "targets.zarr"
    store, config_name = absolute(store), asked["config"]
    preset = open_store(store).attrs["config"].get("train_preset")
    if run and not config_name:
        values, source = run.description()["config"], f"those of {run.path}"
    else:
        if preset and not config_name and preset not in presets("occfeat_train"):
            raise ConfigError(  # a file may name code to run
                f"{store} asks for the settings {preset:.200}, which are no preset of occfeat: if "
                "you trust them, name their file, --config FILE"
            )
        source = config_name or preset or "paper"
        values = read_yaml(settings_file(source, "occfeat_train"))
        if not config_name:
            source = f"preset {source}" + (f", as {store} asks" if preset else "")
    say(f"Settings: {source}")
    config = TrainConfig.of(override(values, overrides))
    path = asked["run"] or RUNS / f"{kind}-{timestamp()}"
    if kind == "pretrain":
        return Job(kind, store, config), path
    fraction, init = asked["fraction"], str(run.path.resolve()) if run else None
    config = config.for_fraction(fraction)
    job = Job(kind, store, config, fraction, asked["fraction_unit"], init, asked["task"])
    return job, path


def resumed(kind: str, asked: Asked, given: Collection[str]) -> tuple[Job, Path]:
    """The job and directory to go on with; of its settings only :data:`HOW` and :data:`LONGER` may
    change.

    No ``run`` is the newest unfinished one of the kind; ``store`` is where its store is now, if
    not where it was. Of ``given``, the options that the user named, those of :data:`KEPT` are
    refused. Raises RunError: an option would change what it computes, or there is no such run;
    ConfigError: a setting is impossible.
    """
    overrides = asked["overrides"]
    if kept := [name for name in KEPT if name in given]:
        raise RunError(f"a resumed run keeps its --{kept[0].replace('_', '-')}: leave it out")
    free = (*HOW, LONGER) if kind == "pretrain" else HOW
    if fixed := [text for text in overrides if text.partition("=")[0] not in free]:
        name = fixed[0].partition("=")[0]
        why = ", whose rates rise and fall over them" if name == "finetune.epochs" else ""
        raise RunError(
            f"a resumed run keeps its {name}{why}: leave --set {fixed[0]} out; it can change "
            f"{', '.join(free)}"
        )
    missing = f"there is no unfinished {kind} run in {RUNS}/: name it, --run-dir"
    found = _named_or_newest(asked["run"], (kind,), False, missing)
    job = Job.of_run(found, asked["store"], asked["plugins"])
    if job.kind != kind:
        raise RunError(f"{found.path} is a {job.kind} run: occfeat-train {job.kind}")
    schedule = job.plan.optimiser.schedule
    if schedule != "constant" and any(text.startswith(f"{LONGER}=") for text in overrides):
        raise RunError(
            f"a resumed run keeps its {LONGER}, over which its rate follows a {schedule}: leave "
            f"--set {LONGER} out"
        )
    return changed(job, overrides), found.path


def all_runs() -> list[Path]:
    """The directories of all runs in :data:`RUNS`, by name; RunError: there is none."""
    if not (found := sorted(path.parent for path in RUNS.glob("*/run.json"))):
        raise RunError(f"there is no run in {RUNS}/: name some")
    return found


def changed(job: Job, overrides: tuple[str, ...]) -> Job:
    """A job with other settings; ConfigError: one is unknown or impossible."""
    return replace(job, config=TrainConfig.of(override(job.config.plain(), overrides)))


def require_words(job: Job) -> str:
    """The task that a pretraining is evaluated as without any finetuning; RunError: there is none,
    since it does not answer to words."""
    if name := "" if job.task else job.learns.zero_shot(job.own_settings):
        return name
    raise RunError(
        f"this {job.title} does not answer to words: name a pretraining that learned occupancy and "
        "features of voxels, such as pop3d's"
    )


def zero_shot(job: Job, texts: Path) -> Job:
    """A pretraining as the task that it is evaluated as without any finetuning, by a file of texts.
    RunError: as :func:`require_words`."""
    name = require_words(job)
    settings = TASKS(name).Settings(texts=absolute(str(texts)))
    config = job.config.with_(tasks={**job.config.tasks, name: settings})
    return replace(job, config=config, task=name)


def _pretraining(
    init: str | None, plugins: Collection[str], say: Callable[[str], None]
) -> Run | None:
    """The run that --init names, by default the newest finished one; None for ``none``."""
    if init == "none":
        return None
    missing = (
        f"there is no finished pretraining in {RUNS}/: occfeat-train pretrain makes one, "
        "--init RUN names one elsewhere, --init none does without"
    )
    run = _named_or_newest(init, ("pretrain",), True, missing)
    title, position = Job.of_run(run, plugins=plugins).title, run.position()
    unfinished = "" if position["finished"] else f", NOT FINISHED: step {position['step']}"
    say(f"Starting from: {run.path} ({title}{unfinished})")
    return run


def finished(path: Path | None, *kinds: str) -> Run:
    """The run of a path, else the newest finished one of some kinds; RunError: there is none."""
    missing = (
        f"there is no finished {' or '.join(kinds)} run in {RUNS}/: run occfeat-train {kinds[0]}, "
        "or name --run-dir"
    )
    return _named_or_newest(path, kinds, True, missing)


def _named_or_newest(
    named: Path | str | None, kinds: tuple[str, ...], finished: bool, missing: str
) -> Run:
    """The named run, else the newest of some kinds in :data:`RUNS` that came to its end, or that
    did not; one without a checkpoint only if there is no other. RunError: there is none."""
    if named:
        return Run(Path(named))
    runs = []
    for path in RUNS.glob("*/run.json"):
        run = Run(path.parent)
        try:
            if run.description().get("kind") in kinds and run.is_finished() == finished:
                runs.append(run)
        except DamagedError as error:
            note(f"left out: {error}")
        except RunError:
            pass  # another program's run.json
    if not runs:
        raise RunError(missing)

    def order(run: Run) -> tuple:
        return bool(run.checkpoints()), run.description()["created"], run.path.name

    return max(runs, key=order)
