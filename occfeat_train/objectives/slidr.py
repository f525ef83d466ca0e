"""SLidR (Sautier et al., CVPR 2022): points and pixels of one superpixel attract each other.

Of each superpixel the mean of its points' features and the mean of its pixels' features; over all
superpixels with a point of a batch, InfoNCE from points to images at temperature 0.07 (SLIDR
``pretrain/criterion.py``). The image's side is a frozen model under a learned 1x1 convolution: here
on stored tokens, where it commutes with the bilinear upsampling that follows, to a quarter of the
stored image.

Unlike there: the lidar network is WaffleIron; images are neither cropped nor mirrored; superpixels
are those with a point (there, those whose mean is not exactly 0). The loss is not a mean over
superpixels of a step: each has the others of its micro-batch and process as negatives. So it
depends on how a step is split, and processes do not equal one process; ``pretrain.batch`` with
``accumulate`` 1 in one process is the paper's.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from occfeat_targets.store.files import StoreError
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.settings import Settings
from occfeat_train.objectives.base import Batch, Loss, Objective, Targets
from occfeat_train.objectives.pairs import camera_pairs
from occfeat_train.objectives.scalr import token_channels

SHRINK = 4
"""How much smaller than the stored image the dense features of its pixels are."""
_LABELS = 256
"""More than an image has superpixels."""


class SLidRSettings(Settings):
    """As published."""

    channels: int = Field(default=64, ge=1)
    """Of the space in which points and pixels meet."""
    temperature: float = Field(default=0.07, gt=0)


class SLidR(Objective):
    """InfoNCE between the means of superpixels."""

    Settings = SLidRSettings
    settings: SLidRSettings
    sensor = "lidar"
    arrays = ("tokens", "token_scale", "superpixels")
    no_picture = "learns features of superpixels, of which there is no picture yet"

    def __init__(self, settings: SLidRSettings, store: TargetStore, channels: int, turned: bool):
        """Raises StoreError: the store has no tokens or no superpixels."""
        super().__init__(settings, store, channels, turned)
        if "superpixels" not in store.specs:
            raise StoreError(
                f"{store.url} has no superpixels: rebuild it with --set "
                "'outputs={tokens: {}, superpixels: {}}'"
            )
        self.point_step_m: float = store.attrs["point_step_m"]
        self.image_hw: tuple[int, int] = tuple(store.attrs["config"]["images"]["size"])
        self.head = nn.Linear(channels, settings.channels)
        self.image_head = nn.Linear(token_channels(store), settings.channels)

    def targets(self, batch: Batch, angle: Tensor) -> Targets:
        """``row`` int64 (M,) and ``segment`` int64 (M,) of M pairs, segments numbered from 0 over
        those that have any; ``pixel_segment`` int64 (B·N, h', w'), likewise, -1 without points;
        and ``tokens`` float32 (B·N, h, w, D)."""
        pairs = camera_pairs(batch, self.point_step_m, self.image_hw)
        labels = batch["superpixels"].flatten(0, 1)  # (B·N, H, W)
        height, width = self.image_hw
        u, v = (pairs.place * pairs.place.new_tensor([width, height])).long().unbind(dim=1)
        at = labels[pairs.image, v.clamp(max=height - 1), u.clamp(max=width - 1)].long()
        used, segment = (pairs.image * _LABELS + at).unique(return_inverse=True)
        small = labels[:, SHRINK // 2 :: SHRINK, SHRINK // 2 :: SHRINK].long()
        image = torch.arange(len(labels), device=labels.device)[:, None, None]
        number = torch.full((len(labels) * _LABELS,), -1, device=labels.device)
        number[used] = torch.arange(len(used), device=labels.device)
        tokens = batch["tokens"].float() * batch["token_scale"].float()[..., None]
        return {
            "row": pairs.row,
            "segment": segment,
            "pixel_segment": number[image * _LABELS + small],
            "tokens": tokens.flatten(0, 1),
        }

    def counts(self, targets: Targets) -> Tensor:
        """None: the loss is no mean over items of a step."""
        return torch.zeros(1, dtype=torch.float64)

    def forward(
        self, rows: Tensor, targets: Targets, counts: Sequence[float], share: float
    ) -> Loss:
        """Term ``contrast``: the micro-batch's mean, times its share."""
        points = F.normalize(self.head(rows).float(), dim=1)[targets["row"]]
        pixel_segment = targets["pixel_segment"]
        dense = self.image_head(targets["tokens"]).float().permute(0, 3, 1, 2)
        size = pixel_segment.shape[1:]
        dense = F.interpolate(dense, tuple(size), mode="bilinear", align_corners=False)
        dense = F.normalize(dense, dim=1).permute(0, 2, 3, 1)
        there = pixel_segment >= 0
        n = int(targets["segment"].max()) + 1 if len(points) else 0
        of_points, n_points = _sums(points, targets["segment"], n)
        of_pixels, n_pixels = _sums(dense[there], pixel_segment[there], n)
        # A thin superpixel may have no pixel of the smaller image.
        whole = (n_points > 0) & (n_pixels > 0)
        k = (of_points / n_points.clamp(min=1)[:, None])[whole]
        q = (of_pixels / n_pixels.clamp(min=1)[:, None])[whole]
        with torch.autocast(k.device.type, enabled=False):  # it is divided by 0.07
            logits = k @ q.T / self.settings.temperature
        entropy = F.cross_entropy(logits, torch.arange(len(k), device=k.device), reduction="sum")
        contrast = share * entropy / max(1, len(k))
        return contrast, {"contrast": contrast}


def _sums(values: Tensor, index: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Sums (n, C) of rows by their index, and how many there are, (n,)."""
    sums = values.new_zeros(n, values.shape[1]).index_add(0, index, values)
    return sums, torch.bincount(index, minlength=n)
