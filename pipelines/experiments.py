"""From recipes to the runs of ``occfeat-train`` that make their numbers."""

import hashlib
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from occfeat_pipelines.recipes import HERE, Preset, Recipe
from occfeat_targets.store.files import absolute
from occfeat_targets.store.reader import TargetStore, open_store
from occfeat_targets.store.settings import ConfigError, read_yaml, settings_file
from occfeat_train.config import TrainConfig
from occfeat_train.models.encoder_weights import names_file
from occfeat_train.robustness import headline
from occfeat_train.runs.job import Job
from occfeat_train.runs.resolve import HOW
from occfeat_train.runs.run import Run, identity


@dataclass(frozen=True)
class Training:
    """One run of ``occfeat-train pretrain`` or ``finetune``."""

    job: Job
    preset: str
    settings: tuple[str, ...]
    """Over the preset's: together the job's."""
    path: Path
    """Its directory."""

    def command(self) -> list[str]:
        """Arguments of ``occfeat-train`` to start it, or to go on with it."""
        job = self.job
        if (self.path / "run.json").exists():
            return [job.kind, "--resume", *self._here()]
        command = [job.kind, "--store", job.store, "--config", self.preset, *_set(self.settings)]
        if job.task:
            command += ["--task", job.task, "--fraction", f"{job.fraction:g}"]
            command += ["--init", job.init or "none"]
        return [*command, "--run-dir", str(self.path)]

    def evaluation(self, corrupted: str | None) -> list[str]:
        """Arguments to evaluate it, also on corrupted images if they are named."""
        return ["evaluate", *self._here(), *(["--corrupted", corrupted] if corrupted else [])]

    def _here(self) -> list[str]:
        """Where things are now, and of the settings those that a resumed run may change."""
        how = (text for text in self.settings if text.partition("=")[0] in HOW)
        return ["--store", self.job.store, "--run-dir", str(self.path), *_set(how)]

    def is_finished(self) -> bool:
        """Whether it came to its end."""
        return (self.path / "run.json").exists() and Run(self.path).is_finished()

    def require_weights(self, row: str) -> None:
        """Raise ConfigError for a file that is missing: not after weeks, when the row begins."""
        weights = self.job.config.model.encoder_weights
        is_missing = names_file(weights) and not Path(weights).expanduser().is_file()
        if is_missing and not self.is_finished():
            raise ConfigError(
                f"there is no file {weights}, which {row} starts from: put it there, or leave that "
                "row out with --rows"
            )


def _set(settings: Iterable[str]) -> list[str]:
    return [word for text in settings for word in ("--set", text)]


@dataclass(frozen=True)
class Experiment:
    """A recipe with a seed, finetuned for one task with one label fraction."""

    recipe: str
    label: str
    """Its row of the table."""
    column: str
    paper: float | None
    trainings: tuple[Training, ...]
    """A pretraining, if there is one, and the finetuning, which is evaluated."""

    def result(self, corrupted: str | None) -> dict[str, Any]:
        """What ``evaluate`` wrote; empty if it did not, or for half a training or other images.

        The result on corrupted images may lack some that were not made then: its ``missing``.
        """
        path = self.trainings[-1].path / ("corrupted.json" if corrupted else "result.json")
        result: dict = json.loads(path.read_text()) if path.exists() else {"finished": False}
        is_of_these = not corrupted or result.get("corrupted") == absolute(corrupted)
        return result if is_of_these and result.get("clean", result)["finished"] else {}

    def scores(self, corrupted: str | None) -> dict[str, float | None]:
        """Column -> IoU; None, or on corrupted images no column, before it has been evaluated."""
        result = self.result(corrupted)
        if not corrupted:
            return {self.column: headline(result) if result else None}
        if not result:
            return {}
        return {"clean": headline(result["clean"]), **result["mean"], "mRR": result["mRR"]}


@dataclass(frozen=True)
class Planner:
    """Makes experiments of recipes."""

    preset: Preset
    store: str
    """The main store; others are beside it, see :func:`beside`."""
    out: Path
    """Where runs are."""
    overrides: tuple[str, ...] = ()
    """Settings of all runs, over the recipes'."""

    def experiments(
        self, recipes: dict[str, Recipe], seeds: int, tasks: tuple[str, ...], fractions: Iterable
    ) -> list[Experiment]:
        """Experiments with seeds 0, 1, ..., seed by seed: the first seed's table is there early.

        Of what the recipes have numbers of: some tasks and, if any are given, label fractions.

        Raises:
            ConfigError, StoreError: naming the first thing that can't be, before any work.
        """
        rows = [(n, t, f) for n, r in recipes.items() for t, row in r.paper.items() for f in row]
        chosen = [row for row in rows if row[1] in tasks and (not fractions or row[2] in fractions)]
        if not chosen:
            has = sorted({f"{task} at {fraction:g}" for _, task, fraction in rows})
            raise ConfigError(f"nothing chosen: these rows have {', '.join(has)}")
        return [
            self._experiment(name, recipes[name], seed, task, fraction)
            for seed in range(seeds)
            for name, task, fraction in chosen
        ]

    def _experiment(
        self, name: str, recipe: Recipe, seed: int, task: str, fraction: float
    ) -> Experiment:
        common, trainings = (*recipe.set, f"run.seed={seed}"), []
        if recipe.pretrain is not None:
            settings = (*common, *recipe.pretrain)
            trainings.append(self._training("pretrain", recipe.pretrain_store, settings))
        used = self.preset.fractions.get(fraction, fraction)
        init = str(trainings[0].path) if trainings else None
        settings, what = (*common, *recipe.finetune), {"task": task, "fraction": used, "init": init}
        trainings.append(self._training("finetune", recipe.finetune_store, settings, **what))
        here = f" (here {100 * used:g} %)" if used != fraction else ""
        column, paper = f"{task}, {100 * fraction:g} %{here}", recipe.paper[task][fraction]
        return Experiment(name, recipe.label, column, paper, tuple(trainings))

    def _training(
        self, kind: str, store_name: str, settings: tuple[str, ...], **what: Any
    ) -> Training:
        store, settings = self._open(store_name), (*settings, *self.overrides)
        config = TrainConfig.load(settings_file(self.preset.train, "occfeat_train"), settings)
        job = Job(kind, store.url, config.for_fraction(what.get("fraction", 1)), **what)
        path = self.out / f"{kind}-{_digest(job, store)}-seed{config.run.seed}"
        return Training(job, self.preset.train, settings, path)

    def _open(self, name: str) -> TargetStore:
        """A store, ``name`` in ``stores.yaml``; ConfigError says how to build it if need be."""
        url, preset = absolute(beside(self.store, name)), self.preset
        if "://" not in url and not Path(url).exists():
            settings = _set(read_yaml(HERE / "stores.yaml")[name] if name else ())
            build = shlex.join(["build", "DATAROOT", url, "--config", preset.targets, *settings])
            raise ConfigError(f"there is no store {url}; build it: occfeat-targets {build}")
        store = open_store(url)
        meant = store.attrs["config"].get("train_preset") or "paper"
        if meant != preset.train:
            raise ConfigError(
                f"{url} was built to train with the preset {meant}, this one trains with "
                f"{preset.train}: name a store of its kind, --store"
            )
        return store


def beside(store: str, name: str) -> str:
    """Path or URL of the store ``name`` of ``stores.yaml`` beside a main one, ``""`` being that."""
    return f"{store.rstrip('/').removesuffix('.zarr')}-{name}.zarr" if name else store


def _digest(job: Job, store: TargetStore) -> str:
    """Of what decides a run's result: neither how it runs, nor settings of what it does not learn,
    nor where store and runs lie."""
    plain = job.config.plain() | {"own": job.own_settings.plain()}
    for section, _, key in (name.partition(".") for name in HOW):
        del plain[section][key]
    for section in ("finetune" if job.kind == "pretrain" else "pretrain", "objectives", "tasks"):
        del plain[section]
    init = job.init and Path(job.init).name
    decides = [job.kind, plain, job.task, job.fraction, init, identity(store)]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
