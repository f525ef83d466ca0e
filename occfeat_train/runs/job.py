"""What a run is asked to do, as one plain description that its directory keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from occfeat_targets.store.files import absolute
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.settings import Settings
from occfeat_train.config import PretrainSettings, TrainConfig
from occfeat_train.objectives import OBJECTIVES
from occfeat_train.objectives.base import Objective
from occfeat_train.runs import run as runs
from occfeat_train.runs.run import Run, RunError
from occfeat_train.tasks import TASKS


@dataclass(frozen=True)
class Job:
    """One pretraining or finetuning."""

    kind: str
    """``pretrain`` or ``finetune``."""
    store: str
    config: TrainConfig
    fraction: float = 1.0
    """Share of the training frames."""
    fraction_unit: Literal["scene", "frame"] = "scene"
    init: str | None = None
    """Run directory whose network this one starts from; None starts from encoder weights."""
    task: str | None = None
    """What a finetuning learns, a name of ``tasks.TASKS``; None for a pretraining."""

    @property
    def plan(self) -> PretrainSettings:
        """The settings of its kind; a finetuning's have the same names for epochs, batch, rates."""
        return getattr(self.config, self.kind)

    @property
    def learns(self) -> type[Objective]:
        """Its objective, or task."""
        return TASKS(self.task) if self.task else OBJECTIVES(self.config.pretrain.objective)

    @property
    def own_settings(self) -> Settings:
        """Those of what it learns."""
        sections = self.config.tasks if self.task else self.config.objectives
        name = self.task or self.config.pretrain.objective
        return sections[name] if name in sections else self.learns.Settings()

    @property
    def title(self) -> str:
        """For people, such as ``occfeat pretraining``."""
        name = self.task or self.config.pretrain.objective
        return f"{name} {'finetuning' if self.task else 'pretraining'}"

    def objective(self, store: TargetStore) -> Objective:
        """What it learns, fresh, for a store.

        Raises:
            StoreError: the store lacks what that needs.
        """
        turned = self.config.augment.rotate_bev_deg != 0
        return self.learns(self.own_settings, store, self.config.model.channels, turned)

    def describe(self, store: TargetStore) -> dict[str, Any]:
        """For ``run.json``."""
        return {
            "kind": self.kind,
            "task": self.task,
            "created": runs.timestamp(),
            "store": self.store,
            "store_identity": runs.identity(store),
            "fraction": self.fraction,
            "fraction_unit": self.fraction_unit,
            "init": self.init,
            "config": self.config.plain(),
            "versions": runs.versions(),
        }

    @classmethod
    def of_run(cls, run: Run, store: str | None = None) -> Job:
        """The job of an existing run; ``store`` if it has moved.

        Raises:
            RunError: there is no run here, or one of another version of occfeat.
            ConfigError: its settings are not of this version.
        """
        said = run.description()
        names = ("kind", "store", "config", "fraction", "fraction_unit", "init", "task")
        if lacking := [name for name in names if name not in said]:
            raise RunError(
                f"{run.path} is of another version of occfeat: it says no {', '.join(lacking)}"
            )
        kind, where, config, *rest = (said[name] for name in names)
        return cls(kind, absolute(store or where), TrainConfig.of(config), *rest)
