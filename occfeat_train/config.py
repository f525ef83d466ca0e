"""How a network is built and trained: sections of settings, from YAML and ``--set key=value``.

Each section is declared beside what it is of; here are those of the schedules and the whole.
Defaults are the paper's SimpleBEV with EfficientNet-B0 at 224x400 (PAPER = OccFeat §4.1) and, where
it is silent, those of Simple-BEV's code.
"""

from typing import Literal, Self

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator

from occfeat_targets.store.settings import ConfigError, Settings
from occfeat_train.augment import AugmentSettings
from occfeat_train.models.bev_net import ModelSettings
from occfeat_train.models.lidar_settings import LidarSettings
from occfeat_train.objectives import OBJECTIVES
from occfeat_train.optimiser_settings import FinetuneOptimiser, OptimiserSettings
from occfeat_train.tasks import TASKS


class DataSettings(Settings):
    """Which frames, and how they are read."""

    train_split: str = "auto"
    """``auto`` is ``train`` or ``mini_train``, whichever the store has."""
    eval_split: str = "auto"
    """``auto`` is ``val`` or ``mini_val``."""
    workers: int = Field(default=4, ge=0)
    """Reading processes per training process; 0 reads in the training process itself."""
    start_method: Literal["forkserver", "spawn", "fork"] = "forkserver"
    """How reading processes start."""
    check_reads: bool = True
    """Compare what is trained on with its checksums."""


Clip = Literal["mean", "sum"]
"""Which gradient of an optimiser step ``run.clip_norm`` bounds: the mean over its ``accumulate``
micro-batches; or their sum, as Simple-BEV, which does not divide the losses: that is so many times
as strict. Of one micro-batch they are the same."""


class PretrainSettings(Settings):
    """Pretraining: by default Adam at a constant rate (PAPER)."""

    objective: str = "occfeat"
    """A name of ``objectives.OBJECTIVES``, or a plug-in's."""
    epochs: int = Field(default=50, ge=1)
    batch: int = Field(default=16, ge=1)
    """Samples of one forward pass, over all processes together."""
    accumulate: int = Field(default=1, ge=1)
    """Forward passes per optimiser step, which takes the mean over them."""
    clip: Clip = "mean"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=1e-7, ge=0)
    optimiser: OptimiserSettings = OptimiserSettings()

    @field_validator("objective")
    @classmethod
    def _is_known(cls, name: str) -> str:
        OBJECTIVES(name)
        return name


class FinetuneSettings(Settings):
    """Finetuning: by default AdamW with one-cycle rates (PAPER, Simple-BEV). What is null
    takes the paper's value for the label fraction, see :data:`PAPER_SCHEDULES`."""

    epochs: int | None = Field(default=None, ge=1)
    batch: int | None = Field(default=None, ge=1)
    accumulate: int | None = Field(default=None, ge=1)
    clip: Clip | None = None
    """Null is ``mean`` with an ``accumulate`` of your own: the paper's belongs to the paper's."""
    lr: float | None = Field(default=None, gt=0)
    """Highest of the schedule."""
    weight_decay: float = Field(default=1e-7, ge=0)
    optimiser: FinetuneOptimiser = FinetuneOptimiser()
    freeze_backbone: bool = False
    """Let the head alone learn, and batch norms keep their statistics: a linear probe."""


PAPER_SCHEDULES = (
    (0.01, {"epochs": 100, "lr": 1e-4, "batch": 6, "accumulate": 1, "clip": "mean"}),
    (0.1, {"epochs": 50, "lr": 1e-4, "batch": 6, "accumulate": 1, "clip": "mean"}),
    (1.0, {"epochs": 30, "lr": 3e-4, "batch": 8, "accumulate": 5, "clip": "sum"}),
)
"""The paper's, for three label fractions; one in between takes the next larger one's. It names no
clipping: that is Simple-BEV's, whose 8 x 5 it took."""


class RunSettings(Settings):
    """The loop itself."""

    seed: int = Field(default=0, ge=0)
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto``: bfloat16 on GPUs that have it, float16 on others, float32 on a CPU."""
    clip_norm: float = Field(default=5.0, gt=0)
    """A step's gradient is scaled down to this norm: the one that :data:`Clip` names."""
    log_every: int = Field(default=10, ge=1)
    """Optimiser steps between two lines of the log."""
    save_minutes: float = Field(default=10.0, ge=0)
    """Time between checkpoints; there is also one at the end, and one when stopped."""
    validate_every: int = Field(default=0, ge=0)
    """Epochs between two looks at the evaluation split, also after the last: its loss while
    pretraining, its IoU while finetuning. They change nothing; 0 takes none."""
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Where the log goes too; needs the package of that name."""


class TrainConfig(Settings):
    """Everything that ``presets/paper.yaml`` lists."""

    model: ModelSettings = ModelSettings()
    lidar: LidarSettings = LidarSettings()
    data: DataSettings = DataSettings()
    augment: AugmentSettings = AugmentSettings()
    pretrain: PretrainSettings = PretrainSettings()
    objectives: dict[str, SerializeAsAny[Settings]] = Field(default_factory=dict)
    """By name, settings of objectives: each its own ``Settings``. Those not named have defaults."""
    finetune: FinetuneSettings = FinetuneSettings()
    tasks: dict[str, SerializeAsAny[Settings]] = Field(default_factory=dict)
    """Likewise of tasks."""
    run: RunSettings = RunSettings()

    @field_validator("objectives", "tasks", mode="plain")
    @classmethod
    def _by_name(cls, values: object, info: ValidationInfo) -> dict[str, Settings]:
        """Each by its thing's own settings class; imports only what is named."""
        section, registry = info.field_name, TASKS if info.field_name == "tasks" else OBJECTIVES
        if not isinstance(values, dict):
            raise ConfigError(f"{section} must be a mapping, got {values!r:.200}")
        sections = dict(values)
        for name, given in values.items():
            if not isinstance(given, Settings):
                sections[name] = registry(name).Settings.of(given, f"{section}.{name}")
        return sections

    def for_fraction(self, fraction: float) -> Self:
        """With finetuning's open settings filled in by the paper's for this label fraction."""
        paper = next(values for limit, values in PAPER_SCHEDULES if fraction <= limit)
        if self.finetune.accumulate is not None:
            paper = paper | {"clip": "mean"}
        open_ones = {k: v for k, v in paper.items() if getattr(self.finetune, k) is None}
        return self.with_(finetune=self.finetune.with_(**open_ones))
