"""Settings of optimisers and their schedules, of which ``optimiser`` makes them."""

from typing import Literal

from pydantic import Field

from occfeat_targets.store.settings import Settings


class OptimiserSettings(Settings):
    """How weights follow gradients."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of ``sgd``."""
    dampening: float = Field(default=0.1, ge=0, lt=1)
    """Of ``sgd`` (SLidR)."""
    schedule: Literal["constant", "onecycle", "cosine"] = "constant"
    """``onecycle`` rises and falls linearly (Simple-BEV); ``cosine`` falls to ``min_lr`` after a
    linear warm-up (WaffleIron, ScaLR)."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Of ``cosine``."""
    min_lr: float = Field(default=0.0, ge=0)
    """Of ``cosine``."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """The rate of each layer of the backbone is so many times the next one's, the last one's that
    of the head; vectors then have no weight decay (ScaLR). Of lidar networks."""
    head_lr_factor: float = Field(default=1.0, gt=0)
    """How many times the rate the head's is."""


class FinetuneOptimiser(OptimiserSettings):
    """The paper's for finetuning."""

    name: Literal["adam", "adamw", "sgd"] = "adamw"
    schedule: Literal["constant", "onecycle", "cosine"] = "onecycle"
