"""What a run is asked to do, as one plain description that its directory keeps."""

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Self

from occfeat_targets.store.files import absolute
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.registry import only_plugins
from occfeat_targets.store.settings import Settings
from occfeat_train.config import PretrainSettings, TrainConfig
from occfeat_train.objectives import OBJECTIVES
from occfeat_train.objectives.base import Objective
from occfeat_train.runs import run as runs
from occfeat_train.runs.run import Run, RunError
from occfeat_train.sensors import SENSORS
from occfeat_train.tasks import TASKS

if TYPE_CHECKING:  # it knows of runs' settings
    from occfeat_train.sensors.base import Sensor


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
    def name(self) -> str:
        """Of the task or objective that it learns."""
        return self.task or self.config.pretrain.objective

    @property
    def learns(self) -> type[Objective]:
        """Its objective, or task."""
        return (TASKS if self.task else OBJECTIVES)(self.name)

    @property
    def sensor(self) -> "Sensor":
        """What its network looks through."""
        return SENSORS(self.learns.sensor)(self.config)

    @property
    def own_settings(self) -> Settings:
        """Those of what it learns."""
        sections = self.config.tasks if self.task else self.config.objectives
        return sections[self.name] if self.name in sections else self.learns.Settings()

    @property
    def title(self) -> str:
        """For people, such as ``occfeat pretraining``."""
        return f"{self.name} {'finetuning' if self.task else 'pretraining'}"

    @property
    def plugin_options(self) -> list[str]:
        """Those of a command that follows its run, which loads no plug-in by the run's word."""
        config = self.config
        named = (config.model.lift, config.pretrain.objective, *config.objectives, *config.tasks)
        plugins = dict.fromkeys(name for name in (*named, self.task or "") if ":" in name)
        return [word for name in plugins for word in ("--plugin", name)]

    def objective(self, store: TargetStore) -> Objective:
        """What it learns, fresh, for a store, or StoreError: the store lacks what that needs."""
        turned = self.config.augment.rotate_bev_deg != 0
        return self.learns(self.own_settings, store, self.sensor.channels, turned)

    def describe(self, store: TargetStore) -> dict[str, Any]:
        """For ``run.json``."""
        return vars(self) | {
            "created": runs.timestamp(),
            "store_identity": runs.identity(store),
            "source": store.attrs["source"],
            "config": self.config.plain(),
            "versions": runs.versions(),
        }

    @classmethod
    def of_run(cls, run: Run, store: str | None = None, plugins: Collection[str] = ()) -> Self:
        """The job of an existing run; ``store`` if it has moved. RunError: there is no run, or one
        of another version of occfeat; ConfigError: its settings are not of this one, or name a
        plug-in that is not among ``plugins``."""
        said = run.description()
        names = [field.name for field in fields(cls)]
        if lacking := [name for name in names if name not in said]:
            raise RunError(
                f"{run.path} is of another version of occfeat: it says no {', '.join(lacking)}"
            )
        said |= {"store": absolute(store or said["store"])}
        with only_plugins(str(run.path), plugins):  # all that it names: none is loaded later
            said |= {"config": TrainConfig.of(said["config"])}
            if said["task"]:
                TASKS(str(said["task"]))
        return cls(**{name: said[name] for name in names})
