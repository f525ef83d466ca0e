"""How a network is built and trained: frozen dataclasses, from YAML and ``--set key=value``.

The defaults are the paper's SimpleBEV with EfficientNet-B0 at 224x400 (PAPER = OccFeat §4.1) and,
where it is silent, those of Simple-BEV's code.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from occfeat_common.settings import require

NETWORKS = ("simplebev", "bevformer")
ENCODERS = ("efficientnet-b0", "resnet-50", "resnet-101")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
START_METHODS = ("forkserver", "spawn", "fork")
PRETRAININGS = ("occfeat", "img-also")
"""What a network can be pretrained on."""
TASKS = ("vehicle", "map")
"""What a network can be finetuned for."""


@dataclass(frozen=True)
class ModelConfig:
    """The BEV network."""

    network: str = "simplebev"
    """How image features become BEV features: ``simplebev`` or ``bevformer``."""
    encoder: str = "efficientnet-b0"
    """``efficientnet-b0``, ``resnet-50`` or ``resnet-101``."""
    encoder_weights: str = "imagenet"
    """``imagenet`` (supervised, from the hub), a hub id, a local directory, a file of
    torchvision-named weights (MoCo-v2 included), or ``random``."""
    image_size: tuple[int, int] = (224, 400)
    """Height and width of the images the encoder sees."""
    channels: int = 128
    """Channels of lifted features and BEV map (N_B)."""
    drop_path: float = 0.2
    """Stochastic depth of EfficientNet."""
    freeze_batch_norm: bool = False
    """Keep batch-norm statistics as they are: for very small batches."""

    def __post_init__(self) -> None:
        rule = f"must be one of {', '.join(NETWORKS)}"
        require(self.network in NETWORKS, "model.network", rule, self.network)
        rule = f"must be one of {', '.join(ENCODERS)}"
        require(self.encoder in ENCODERS, "model.encoder", rule, self.encoder)
        size = list(self.image_size)
        require(min(size) >= 32, "model.image_size", "must be [height, width], >= 32", size)
        even = self.channels >= 2 and self.channels % 2 == 0
        require(even, "model.channels", "must be even and >= 2", self.channels)
        whole_heads = self.network != "bevformer" or self.channels % 4 == 0
        rule = "must be a multiple of 4, the attention heads of bevformer"
        require(whole_heads, "model.channels", rule, self.channels)
        require(0 <= self.drop_path < 1, "model.drop_path", "must be in [0, 1)", self.drop_path)


@dataclass(frozen=True)
class DataConfig:
    """Which frames, and how they are read."""

    train_split: str = "auto"
    """``auto`` is ``train`` or ``mini_train``, whichever the store has."""
    eval_split: str = "auto"
    """``auto`` is ``val`` or ``mini_val``."""
    workers: int = 4
    """Reading processes per training process; 0 reads in the training process itself."""
    start_method: str = "forkserver"
    """How reading processes start: ``forkserver``, ``spawn`` or ``fork``."""

    def __post_init__(self) -> None:
        require(self.workers >= 0, "data.workers", "must be >= 0", self.workers)
        known = self.start_method in START_METHODS
        rule = f"must be one of {', '.join(START_METHODS)}"
        require(known, "data.start_method", rule, self.start_method)


@dataclass(frozen=True)
class AugmentConfig:
    """Simple-BEV's training augmentation, drawn per camera or per sample."""

    resize: tuple[float, float] = (0.8, 1.2)
    """Images are resized by a factor drawn from here, then cropped at the centre."""
    shift: float = 0.2
    """The crop is moved by up to this share of the image's height, in both directions."""
    flip_images: bool = True
    """Mirror each image with probability 1/2; its features are mirrored back."""
    flip_bev: bool = True
    """Mirror the lifted features along x and y with probability 1/2 each, undone before the
    heads."""
    rotate_bev_deg: float = 180.0
    """Turn the BEV frame by up to this angle either way: cameras, voxels and labels together.
    Stands for Simple-BEV's random reference camera."""

    def __post_init__(self) -> None:
        low, high = self.resize
        require(0 < low <= high, "augment.resize", "must be [low, high], 0 < low", [low, high])
        require(0 <= self.shift < 1, "augment.shift", "must be in [0, 1)", self.shift)
        angle = self.rotate_bev_deg
        require(0 <= angle <= 180, "augment.rotate_bev_deg", "must be in [0, 180]", angle)


NO_AUGMENT = AugmentConfig((1.0, 1.0), 0.0, False, False, 0.0)
"""What evaluation uses: images resized to the network's size, nothing else."""


@dataclass(frozen=True)
class PretrainConfig:
    """Pretraining: Adam at a constant rate (PAPER)."""

    objective: str = "occfeat"
    """``occfeat``, or the paper's baseline ``img-also``; neither uses the other's settings."""
    epochs: int = 50
    batch: int = 16
    """Samples of one forward pass, over all processes together."""
    accumulate: int = 1
    """Forward passes per optimiser step."""
    lr: float = 1e-3
    weight_decay: float = 1e-7
    occupancy: bool = True
    """OccFeat: use L_occ."""
    features: bool = True
    """OccFeat: use L_feat."""
    feature_weight: float = 0.01
    """OccFeat: λ of L = L_occ + λ·L_feat."""
    queries: int = 2048
    """Img-ALSO: points of space drawn per sample (ALSO)."""

    def __post_init__(self) -> None:
        _require_schedule("pretrain", self)
        rule = f"must be one of {', '.join(PRETRAININGS)}"
        require(self.objective in PRETRAININGS, "pretrain.objective", rule, self.objective)
        require(self.queries >= 3, "pretrain.queries", "must be >= 3", self.queries)
        either = self.occupancy or self.features
        require(either, "pretrain.occupancy", "or pretrain.features must be true", "neither")


@dataclass(frozen=True)
class FinetuneConfig:
    """Finetuning on BEV segmentation: AdamW with one-cycle rates (PAPER, Simple-BEV).

    What is null takes the paper's value for the label fraction, see :data:`PAPER_SCHEDULES`.
    """

    epochs: int | None = None
    batch: int | None = None
    accumulate: int | None = None
    lr: float | None = None
    """Peak of the one-cycle schedule."""
    weight_decay: float = 1e-7
    pos_weight: float = 2.13
    """Weight of vehicle cells in the cross-entropy (Simple-BEV, from Lift-Splat)."""
    map_pos_weight: float = 1.0
    """Likewise of a map class's cells (PAPER names none)."""

    def __post_init__(self) -> None:
        _require_schedule("finetune", self)
        for name in ("pos_weight", "map_pos_weight"):
            weight = getattr(self, name)
            require(weight > 0, f"finetune.{name}", "must be > 0", weight)


PAPER_SCHEDULES = (
    (0.01, {"epochs": 100, "lr": 1e-4, "batch": 6, "accumulate": 1}),
    (0.1, {"epochs": 50, "lr": 1e-4, "batch": 6, "accumulate": 1}),
    (1.0, {"epochs": 30, "lr": 3e-4, "batch": 8, "accumulate": 5}),
)
"""Finetuning schedules of the paper's three label fractions; a fraction in between takes the
next larger one's."""


@dataclass(frozen=True)
class RunConfig:
    """The loop itself."""

    seed: int = 0
    precision: str = "auto"
    """``auto``: bfloat16 on GPUs that have it, float16 on others, float32 on a CPU."""
    clip_norm: float = 5.0
    """Gradients are scaled down to this norm."""
    log_every: int = 10
    """Optimiser steps between two lines of the log."""
    save_minutes: float = 10.0
    """Time between checkpoints; there is also one at the end, and one when stopped."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the tensorboard package)."""

    def __post_init__(self) -> None:
        require(self.seed >= 0, "run.seed", "must be >= 0", self.seed)
        known = self.precision in PRECISIONS
        require(known, "run.precision", f"must be one of {', '.join(PRECISIONS)}", self.precision)
        require(self.clip_norm > 0, "run.clip_norm", "must be > 0", self.clip_norm)
        require(self.log_every >= 1, "run.log_every", "must be >= 1", self.log_every)
        require(self.save_minutes >= 0, "run.save_minutes", "must be >= 0", self.save_minutes)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that ``pipelines/train_paper.yaml`` lists."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def for_fraction(self, fraction: float) -> TrainConfig:
        """With finetuning's open settings filled in by the paper's for this label fraction."""
        paper = next(values for limit, values in PAPER_SCHEDULES if fraction <= limit)
        open_ones = {k: v for k, v in paper.items() if getattr(self.finetune, k) is None}
        return replace(self, finetune=replace(self.finetune, **open_ones))


def _require_schedule(section: str, config: PretrainConfig | FinetuneConfig) -> None:
    for name in ("epochs", "batch", "accumulate"):
        value = getattr(config, name)
        require(value is None or value >= 1, f"{section}.{name}", "must be >= 1", value)
    require(config.lr is None or config.lr > 0, f"{section}.lr", "must be > 0", config.lr)
    decay = config.weight_decay
    require(decay >= 0, f"{section}.weight_decay", "must be >= 0", decay)
