"""From recipes to the runs of ``occfeat-train`` that make their numbers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from occfeat_pipelines.recipes import Preset, Recipe, store_settings
from occfeat_targets.store.files import absolute
from occfeat_targets.store.reader import TargetStore, open_store
from occfeat_targets.store.settings import ConfigError, settings_file
from occfeat_train.config import TrainConfig
from occfeat_train.models.encoder_weights import names_file
from occfeat_train.runs.job import Job
from occfeat_train.runs.resolve import HOW
from occfeat_train.runs.run import Run, identity


@dataclass(frozen=True)
class Training:
    """One run of ``occfeat-train pretrain`` or ``finetune``."""

    kind: str
    options: tuple[str, ...]
    """Of the command, all but ``--run-dir``."""
    store: str
    batch: int
    """Samples of a forward pass, which its processes share evenly."""
    path: Path
    """Its directory."""
    weights: str = "random"
    """What its image encoder starts from: ``model.encoder_weights``."""
    how: tuple[str, ...] = ()
    """Of its settings those that a resumed run may change."""

    def command(self) -> list[str]:
        """Arguments of ``occfeat-train`` to start it, or to go on with it."""
        if (self.path / "run.json").exists():
            return [self.kind, "--resume", *self._on_this_machine()]
        return [self.kind, *self.options, "--run-dir", str(self.path)]

    def evaluation(self, corrupted: str | None) -> list[str]:
        """Arguments of ``occfeat-train`` to evaluate it, also on corrupted images if they are
        named."""
        images = ["--corrupted", corrupted] if corrupted else []
        return ["evaluate", *self._on_this_machine(), *images]

    def _on_this_machine(self) -> list[str]:
        settings = [word for text in self.how for word in ("--set", text)]
        return ["--store", self.store, "--run-dir", str(self.path), *settings]

    def is_finished(self) -> bool:
        """Whether it came to its end."""
        return (self.path / "run.json").exists() and Run(self.path).is_finished()


@dataclass(frozen=True)
class Experiment:
    """A recipe with a seed, finetuned for one task with one label fraction."""

    recipe: str
    seed: int
    task: str
    fraction: float
    """The paper's."""
    used: float
    """The one of this finetuning: a preset may use another in the paper's place."""
    pretraining: Training | None
    finetuning: Training


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
        self,
        chosen: dict[str, Recipe],
        seeds: int,
        tasks: tuple[str, ...],
        fractions: tuple[float, ...],
    ) -> list[Experiment]:
        """Experiments with seeds 0, 1, ..., seed by seed: the first seed's table is there early.

        Args:
            chosen: recipes by name.
            seeds: how many.
            tasks: which of those that the recipes have numbers of.
            fractions: likewise, in the paper's terms; empty: all.

        Raises:
            ConfigError, StoreError: naming the first thing that can't be, before any work.
        """
        found = [
            self._experiment(name, recipe, seed, task, fraction)
            for seed in range(seeds)
            for name, recipe in chosen.items()
            for task in recipe.paper
            if task in tasks
            for fraction in recipe.paper[task]
            if not fractions or fraction in fractions
        ]
        if not found:
            papers = [recipe.paper for recipe in chosen.values()]
            offered = {(task, f) for paper in papers for task in paper for f in paper[task]}
            has = ", ".join(f"{task} at {fraction:g}" for task, fraction in sorted(offered))
            raise ConfigError(f"nothing chosen: these rows have {has}")
        return found

    def _experiment(
        self, name: str, recipe: Recipe, seed: int, task: str, fraction: float
    ) -> Experiment:
        common = (*recipe.set, f"run.seed={seed}")
        pretraining = None
        if recipe.pretrain is not None:
            settings = (*common, *recipe.pretrain)
            pretraining = self._training("pretrain", recipe.pretrain_store, settings, {})
        used = self.preset.fractions.get(fraction, fraction)
        options = {
            "task": task,
            "fraction": f"{used:g}",
            "init": str(pretraining.path) if pretraining else "none",
        }
        settings = (*common, *recipe.finetune)
        finetuning = self._training("finetune", recipe.finetune_store, settings, options)
        return Experiment(name, seed, task, fraction, used, pretraining, finetuning)

    def _training(
        self, kind: str, store_name: str, settings: tuple[str, ...], options: dict[str, str]
    ) -> Training:
        store = absolute(beside(self.store, store_name))
        base = settings_file(self.preset.train, "occfeat_train")
        settings = (*settings, *self.overrides)
        config = TrainConfig.load(base, settings).for_fraction(float(options.get("fraction", 1)))
        arguments = ["--store", store, "--config", str(base)]
        for text in settings:
            arguments += ["--set", text]
        for key, value in options.items():
            arguments += [f"--{key}", value]
        # Moving the directory of runs, or the store, changes no name.
        named = options | {"init": Path(options.get("init", "")).name}
        targets = identity(self._open(store, store_name))
        decides = [kind, _what_it_computes(config, kind, options.get("task")), named, targets]
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        path = self.out / f"{kind}-{digest[:12]}-seed{config.run.seed}"
        how = tuple(text for text in self.overrides if text.partition("=")[0] in HOW)
        batch, weights = getattr(config, kind).batch, config.model.encoder_weights
        return Training(kind, tuple(arguments), store, batch, path, weights, how)

    def _open(self, url: str, name: str) -> TargetStore:
        """A store, ``name`` in ``stores.yaml``.

        Raises:
            ConfigError: saying how to build it, when it is not there; or it is for another preset.
            StoreError: it can't be used.
        """
        if "://" not in url and not Path(url).exists():
            settings = store_settings(name) if name else ()
            raise ConfigError(
                f"there is no store {url}; build it: occfeat-targets build DATAROOT {url} --config "
                f"{self.preset.targets} " + " ".join(f"--set '{text}'" for text in settings)
            )
        store = open_store(url)
        meant = store.attrs["config"].get("train_preset") or "paper"
        if meant != self.preset.train:
            raise ConfigError(
                f"{url} was built to train with the preset {meant}, this one trains with "
                f"{self.preset.train}: name a store of its kind, --store"
            )
        return store


def require_weights(experiments: list[Experiment]) -> None:
    """Find out now that a file is missing, not after weeks when its row begins.

    Raises:
        ConfigError: naming it and the recipe.
    """
    for experiment in experiments:
        for training in (experiment.pretraining, experiment.finetuning):
            if training is None or training.is_finished() or not names_file(training.weights):
                continue
            if not Path(training.weights).expanduser().is_file():
                raise ConfigError(
                    f"there is no file {training.weights}, which {experiment.recipe} starts from: "
                    "put it there, or leave that row out with --rows"
                )


def beside(store: str, name: str) -> str:
    """Path or URL of the store ``name`` of ``stores.yaml`` beside a main one, ``""`` being that."""
    return f"{store.rstrip('/').removesuffix('.zarr')}-{name}.zarr" if name else store


def _what_it_computes(config: TrainConfig, kind: str, task: str | None) -> dict:
    """Settings that decide a run's result: not how it runs, nor those of what it does not learn."""
    plain, own = config.plain(), Job(kind, "", config, task=task).own_settings
    for name in HOW:
        section, key = name.split(".")
        del plain[section][key]
    for section in ("finetune" if kind == "pretrain" else "pretrain", "objectives", "tasks"):
        del plain[section]
    return plain | {"own": own.plain()}
