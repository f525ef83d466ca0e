"""From recipes to the runs of ``occfeat-train`` that make their numbers."""

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from occfeat_pipelines.recipes import HERE, Preset, Recipe
from occfeat_targets.store.files import absolute, file_sha256
from occfeat_targets.store.reader import TargetStore, open_store
from occfeat_targets.store.settings import ConfigError, differences, read_yaml, settings_file
from occfeat_train.config import TrainConfig
from occfeat_train.models.encoder_weights import names_file
from occfeat_train.robustness import headline
from occfeat_train.runs.job import Job
from occfeat_train.runs.resolve import HOW
from occfeat_train.runs.run import Run, identity
from occfeat_train.tasks import TASKS
from occfeat_train.tasks.base import Task


@dataclass(frozen=True)
class Training:
    """One run of ``occfeat-train pretrain`` or ``finetune``."""

    job: Job
    preset: str
    settings: tuple[str, ...]
    """Over the preset's: together the job's."""
    path: Path
    """Its directory."""
    store: TargetStore | None
    """None if it is not there; then ``missing`` says how to build it."""
    missing: str = ""
    trusted: tuple[str, ...] = ()
    """Options that name the plug-ins of the run that it starts from."""
    texts: str = ""
    """File by which a pretraining is evaluated; empty: it is not."""

    def command(self) -> list[str]:
        """Arguments of ``occfeat-train`` to start it, or to go on with it."""
        job = self.job
        if (self.path / "run.json").exists():
            return [job.kind, "--resume", *self._here()]
        command = [job.kind, "--store", job.store, "--config", self.preset, *_set(self.settings)]
        if job.task:
            command += ["--task", job.task, "--fraction", f"{job.fraction:g}"]
            command += ["--init", job.init or "none", *self.trusted]
        return [*command, "--run-dir", str(self.path)]

    def evaluation(self, corrupted: str | None) -> list[str]:
        """Arguments to evaluate it, also on corrupted images if they are named."""
        options = ["--texts", self.texts] if self.texts else []
        return ["evaluate", *self._here(), *options, *_corrupted(corrupted)]

    def _here(self) -> list[str]:
        """Where things are now, and of the settings those that a resumed run may change."""
        how = (text for text in self.settings if text.partition("=")[0] in HOW)
        here = ["--store", self.job.store, "--run-dir", str(self.path), *_set(how)]
        return [*here, *self.job.plugin_options]

    def is_finished(self) -> bool:
        """Whether it came to its end."""
        return (self.path / "run.json").exists() and Run(self.path).is_finished()

    def faults(self) -> Iterator[str]:
        """What it would stumble over, not before its turn comes, which may be in weeks."""
        if self.texts and not Path(self.texts).is_file():
            yield f"there is no file {self.texts}: occfeat-targets text makes one"
        if self.job.learns.sensor != "camera":
            return
        weights, size = (
            getattr(self.job.config.model, k) for k in ("encoder_weights", "image_size")
        )
        if names_file(weights) and not Path(weights).expanduser().is_file():
            yield f"there is no file {weights}: put it there, or leave that row out with --rows"
        stored = self.store.attrs["config"]["images"]["size"] if self.store else size
        if any(small < large for small, large in zip(stored, size, strict=True)):
            yield (
                f"model.image_size {list(size)} is larger than the images {list(stored)} of "
                f"{self.job.store}: build that store with larger images.size"
            )


def _corrupted(folder: str | None) -> list[str]:
    return ["--corrupted", folder] if folder else []


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
    task: str
    trainings: tuple[Training, ...]
    """A pretraining, if there is one, and the finetuning, if the task has one; the last is
    evaluated."""

    @property
    def missing(self) -> list[str]:
        """Stores that are not there, and how to build them."""
        return [*dict.fromkeys(t.missing for t in self.trainings if t.missing)]

    @property
    def teacher(self) -> str:
        """Of the store that it pretrains on; empty without one."""
        *_, first = reversed(self.trainings)
        return "" if first.job.task or not first.store else teacher_of(first.store)

    @property
    def protocol(self) -> str:
        """Under which its IoU is measured."""
        job, task = self.trainings[-1].job, cast(type[Task], TASKS(self.task))
        return task.protocol_of(job.own_settings if job.task else task.Settings())

    @property
    def beside(self) -> dict[str, str]:
        """Columns of other rows of its result, named ``PROTOCOL, ROW``."""
        return {f"{self.column}, {name}": row for name, row in TASKS(self.task).beside.items()}

    def texts(self) -> str:
        """What made the texts that it was evaluated by; empty if it was by none."""
        return self.result(None).get("texts", {}).get("source", "")

    def require_possible(self) -> None:
        """Raise ConfigError if a training that is not done has faults."""
        for training in self.trainings:
            for fault in () if training.is_finished() else training.faults():
                raise ConfigError(f"row {self.recipe}: {fault}")

    def result(self, corrupted: str | None) -> dict[str, Any]:
        """What ``evaluate`` wrote; empty if it did not, or for half a training, other images, other
        texts, or before it named its protocol.

        The result on corrupted images may lack some that were not made then: its ``missing``.
        """
        path = self.trainings[-1].path / ("corrupted.json" if corrupted else "result.json")
        result: dict = json.loads(path.read_text()) if path.exists() else {"finished": False}
        is_of_these = not corrupted or result.get("corrupted") == absolute(corrupted)
        if (file := Path(self.trainings[-1].texts)).is_file():
            is_of_these = result.get("texts", {}).get("sha256") == file_sha256(file)
        said = result.get("clean", result)
        is_sound = said["finished"] and "protocol" in said["headline"]
        return result if is_of_these and is_sound else {}

    def scores(self, corrupted: str | None) -> dict[str, float | None]:
        """Column -> IoU; None, or on corrupted images no column, before it has been evaluated."""
        result = self.result(corrupted)
        if not corrupted:
            rows = self.beside.items() if result else ()
            beside = {name: result["rows"][row]["iou"] for name, row in rows}
            return {self.column: headline(result) if result else None, **beside}
        if not result:
            return {}
        return {"clean": headline(result["clean"]), **result["mean"], "mRR": result["mRR"]}


def with_stores(experiments: list[Experiment], say: Callable[[str], None]) -> list[Experiment]:
    """Those whose stores are there; of others, says how to build them. ConfigError: all others."""
    there = [e for e in experiments if not e.missing]
    missing = {(e.recipe, message) for e in experiments for message in e.missing}
    if not there:
        raise ConfigError(min(missing)[1])
    for recipe, message in sorted(missing):
        say(f"row {recipe} is left out: {message}")
    return there


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
        paper = recipe.paper[task][fraction]
        if not TASKS(task).finetuned:
            texts = str(Path(self.preset.texts).resolve())
            asked = tuple(replace(training, texts=texts) for training in trainings)
            return Experiment(name, recipe.label, task, paper, task, asked)
        used = self.preset.fractions.get(fraction, fraction)
        init = str(trainings[0].path) if trainings else None
        settings = (*common, *recipe.finetune, *recipe.finetune_by_fraction.get(fraction, ()))
        what = {"task": task, "fraction": used, "init": init}
        finetuning = self._training("finetune", recipe.finetune_store, settings, **what)
        trusted = tuple(word for t in trainings for word in t.job.plugin_options)
        trainings.append(replace(finetuning, trusted=trusted))
        here = f" (here {100 * used:g} %)" if used != fraction else ""
        column = f"{task}, {100 * fraction:g} %{here}"
        return Experiment(name, recipe.label, column, paper, task, tuple(trainings))

    def _training(
        self, kind: str, store_name: str, settings: tuple[str, ...], **what: Any
    ) -> Training:
        url, store = absolute(beside(self.store, store_name)), None
        missing = self._missing(url, store_name)
        if not missing:
            store = self._open(url)

        def job(settings: tuple[str, ...]) -> Job:
            config = TrainConfig.load(settings_file(self.preset.train, "occfeat_train"), settings)
            return Job(kind, url, config.for_fraction(what.get("fraction", 1)), **what)

        settings, shown = (*settings, *self.overrides), ("run.seed=", "pretrain.objective=")
        usual = job((*(text for text in settings if text.startswith(shown)), *self.overrides))
        path = self.out / _name(job(settings), usual, store_name, store)
        return Training(job(settings), self.preset.train, settings, path, store, missing)

    def _missing(self, url: str, name: str) -> str:
        """How to build a store, ``name`` in ``stores.yaml``; empty if it is there."""
        if "://" in url or Path(url).exists():
            return ""
        settings = _set(read_yaml(HERE / "stores.yaml")[name] if name else ())
        build = shlex.join(["build", "DATAROOT", url, "--config", self.preset.targets, *settings])
        return f"there is no store {url}; build it: occfeat-targets {build}"

    def _open(self, url: str) -> TargetStore:
        store, wanted = open_store(url), self.preset.train
        meant = store.attrs["config"].get("train_preset") or "paper"
        if meant != wanted:
            raise ConfigError(
                f"{url} was built to train with the preset {meant}, this one trains with "
                f"{wanted}: name a store of its kind, --store"
            )
        if store.attrs["source"]["dataset"] == "nuScenes" and store.has_random_teacher:
            raise ConfigError(
                f"the features in {url} come from a teacher with random weights, which says "
                "nothing of the paper: build it with DINOv2, --teacher facebook/dinov2-small"
            )
        return store


def beside(store: str, name: str) -> str:
    """Path or URL of the store ``name`` of ``stores.yaml`` beside a main one, ``""`` being that."""
    return f"{store.rstrip('/').removesuffix('.zarr')}-{name}.zarr" if name else store


def teacher_of(store: TargetStore) -> str:
    """Its name for people, with a warning if its weights are random."""
    name = store.attrs["teacher"]["name"]
    return f"{name} (RANDOM WEIGHTS)" if store.has_random_teacher else name


def _name(job: Job, usual: Job, store_name: str, store: TargetStore | None) -> str:
    """Of a run: what it learns, what its row sets that a ``usual`` job does not, where it starts
    if that is not said yet, and a digest of all that decides its result (without a store, x)."""
    seen_by = job.config.model.lift if job.learns.sensor == "camera" else job.config.lidar.size
    words = [job.kind, seen_by, job.name]
    words += [f"{100 * job.fraction:g}pct"] if job.task else []
    for line in differences(_decides(usual), _decides(job)):
        key, _, change = line.partition(": ")
        if key not in ("model.lift", "model.encoder_weights", "lidar.size"):
            value = re.sub(r"[^\w.]+", "-", change.partition(" -> ")[2]).strip("-")
            words.append(f"{key.rpartition('.')[2]}-{value}")
    words += [store_name] if store_name else []
    if job.task:
        start = Path(job.init).name.rsplit("-", 2)[0] if job.init else "none"
        for said in ("pretrain", *words):
            start = f"-{start}-".replace(f"-{said}-", "-").strip("-")
        words.append(f"from-{start}")
    digest = _digest(job, store) if store else 8 * "x"
    return "-".join([*words, digest, f"seed{job.config.run.seed}"])


def _decides(job: Job) -> dict[str, Any]:
    """The settings that decide a run's result: neither how it runs, nor of what it does not learn,
    nor where store and runs lie."""
    plain = job.config.plain() | {"own": job.own_settings.plain()}
    for section, _, key in (name.partition(".") for name in HOW):
        del plain[section][key]
    other = "finetune" if job.kind == "pretrain" else "pretrain"
    unseen = ("lidar",) if job.learns.sensor == "camera" else ("model", "augment")
    for section in (other, "objectives", "tasks", *unseen):
        del plain[section]
    # What came later is left out where it is as before: names of older runs stay.
    later, plan = ("optimiser", "freeze_backbone"), type(job.plan)().plain()
    for key in later:
        if key in plan and plain[job.kind][key] == plan[key]:
            del plain[job.kind][key]
    return plain


def _digest(job: Job, store: TargetStore) -> str:
    init = job.init and Path(job.init).name
    decides = [job.kind, _decides(job), job.task, job.fraction, init, identity(store)]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
