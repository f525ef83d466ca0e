"""What a command works on where the user names only some of it: settings and runs."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
from click.core import ParameterSource

from occfeat_common.settings import ConfigError, from_plain, override, read_yaml, to_plain
from occfeat_targets.store.schema import absolute, open_store
from occfeat_train.config import TrainConfig
from occfeat_train.jobs import Job
from occfeat_train.runs import Run, RunError, newest, timestamp

RUNS = Path("runs")
HOW = (
    *("run.precision", "run.log_every", "run.save_minutes", "run.tensorboard"),
    *("data.workers", "data.start_method"),
)
"""Settings that a resumed run may change: how it runs, not what it computes."""
KEPT = ("config", "objective", "task", "fraction", "fraction_unit", "init")
"""Options that a resumed run keeps."""


def settings(
    store: str,
    config: str | None,
    pretraining: Run | None,
    overrides: tuple[str, ...],
    say: Callable[[str], None],
) -> TrainConfig:
    """Settings by --config, else the pretraining run's, else the store's preset.

    Raises:
        ConfigError: they can't be read, or one is unknown or impossible.
        StoreError: from ``open_store``.
    """
    preset = open_store(store).attrs["config"].get("train_preset")
    if config:
        values, source = read_yaml(_config_path(config)), config
    elif pretraining:
        values, source = pretraining.description()["config"], f"those of {pretraining.path}"
    else:
        source = preset or "paper"
        values = read_yaml(_config_path(source))
        source = f"preset {source}" + (f", as {store} asks" if preset else "")
    say(f"Settings: {source}")
    return from_plain(TrainConfig, override(values, overrides))


def _config_path(config: str) -> Path:
    """A file, or a preset that comes with the package."""
    if config.endswith((".yaml", ".yml")):
        return Path(config)
    presets = importlib.resources.files("occfeat_pipelines")
    path = Path(str(presets / f"train_{config}.yaml"))
    if not path.exists():
        found = sorted(p.stem.removeprefix("train_") for p in path.parent.glob("train_*.yaml"))
        raise ConfigError(
            f"there is no preset {config!r}; there are {', '.join(found)}, or give a .yaml file"
        )
    return path


def resumed(
    kind: str, run: Path | None, store: str | None, overrides: tuple[str, ...]
) -> tuple[Job, Path]:
    """The job and directory to go on with; of its settings only :data:`HOW` may change.

    Raises:
        RunError: an option would change what it computes, or there is no such run.
        ConfigError: a setting is impossible.
    """
    context = click.get_current_context()
    for name in KEPT:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise RunError(f"a resumed run keeps its --{name.replace('_', '-')}: leave it out")
    if fixed := [text for text in overrides if text.partition("=")[0] not in HOW]:
        raise RunError(
            f"a resumed run keeps its {fixed[0].partition('=')[0]}: leave --set {fixed[0]} out; "
            f"it can change {', '.join(HOW)}"
        )
    found = Run(run) if run else newest(RUNS, (kind,), finished=False)
    if found is None:
        raise RunError(f"there is no unfinished {kind} run in {RUNS}/: name it, --run-dir")
    job = Job.of_run(found, store and absolute(store))
    if job.kind != kind:
        raise RunError(f"{found.path} is a {job.kind} run: occfeat-train {job.kind}")
    config = from_plain(TrainConfig, override(to_plain(job.config), overrides))
    return replace(job, config=config), found.path


def pretraining(init: str | None, say: Callable[[str], None]) -> Run | None:
    """The run that --init names, by default the newest finished one; None for ``none``.

    Raises:
        RunError: there is no finished pretraining, or the named run has no checkpoint.
        ConfigError: its settings are not of this version.
    """
    if init == "none":
        return None
    run = Run(Path(init)) if init else newest(RUNS, ("pretrain",), finished=True)
    if run is None:
        raise RunError(
            f"there is no finished pretraining in {RUNS}/: occfeat-train pretrain makes one, "
            "--init RUN names one elsewhere, --init none does without"
        )
    title, position = Job.of_run(run).title, run.position()
    unfinished = "" if position["finished"] else f", NOT FINISHED: step {position['step']}"
    say(f"Starting from: {run.path} ({title}{unfinished})")
    return run


def newest_finished(*kinds: str) -> Run:
    """The newest finished run of one of some kinds, ``pretrain`` and ``finetune``.

    Raises:
        RunError: there is none.
    """
    run = newest(RUNS, kinds, finished=True)
    if run is None:
        raise RunError(
            f"there is no finished {' or '.join(kinds)} run in {RUNS}/: run occfeat-train "
            f"{kinds[0]}, or name --run-dir"
        )
    return run


def new_run(kind: str) -> Path:
    """A directory for a new run of a kind, named by the time."""
    return RUNS / f"{kind}-{timestamp()}"
