"""ScaLR (Puy et al., CVPR 2024): a lidar network learns a frozen image model's features.

The cloud that one random camera sees goes through the network; a linear layer predicts, at each of
its points, the image's feature at its pixel. The loss is the mean distance of the unit vectors,
√(2 - 2 cos), over all pairs of a step (SCALR ``utils/distiller.py``), not squared. Its gradient has
no bound where they agree, and is cut off there.

Unlike there: features are sampled where they are (see ``pairs.sample_tokens``), a step's mean is
over all its pairs, whichever process has them, and a camera that sees no return gives its turn to
one that does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from occfeat_targets.store.files import StoreError
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.settings import Settings
from occfeat_train.objectives.base import Batch, Dots, Loss, Objective, Panel, Targets, divisors
from occfeat_train.objectives.pairs import camera_pairs, rows_in_ego, sample_tokens

_LEAST = 1e-6
"""Of a squared distance."""


class ScaLR(Objective):
    """L = mean ‖p - t‖ of unit vectors."""

    sensor = "lidar"
    arrays = ("tokens", "token_scale")
    one_camera = True

    def __init__(self, settings: Settings, store: TargetStore, channels: int, turned: bool):
        """Raises StoreError: the store has no tokens."""
        super().__init__(settings, store, channels, turned)
        self.point_step_m: float = store.attrs["point_step_m"]
        self.image_hw: tuple[int, int] = tuple(store.attrs["config"]["images"]["size"])
        self.head = nn.Linear(channels, token_channels(store))

    def targets(self, batch: Batch, angle: Tensor) -> Targets:
        """``row`` int64 (M,) and ``feature`` float32 (M, D), unit vectors, of M pairs."""
        pairs = camera_pairs(batch, self.point_step_m, self.image_hw)
        found = sample_tokens(batch["tokens"], batch["token_scale"], pairs.image, pairs.place)
        return {"row": pairs.row, "feature": F.normalize(found, dim=1)}

    def dots(self, rows: Tensor, batch: Batch) -> Dots:
        """Rows that a camera sees, by the teacher's feature, the mean over cameras, and ours."""
        pairs = camera_pairs(batch, self.point_step_m, self.image_hw)
        found = sample_tokens(batch["tokens"], batch["token_scale"], pairs.image, pairs.place)
        seen, which = pairs.row.unique(return_inverse=True)
        target = found.new_zeros(len(seen), found.shape[1]).index_add(0, which, found)
        target /= torch.bincount(which, minlength=len(seen))[:, None]
        predicted = self.head(rows[seen]).float()
        xyz = rows_in_ego(batch, self.point_step_m)[0][seen]
        colours = (self.paint(features.cpu().numpy()) for features in (target, predicted))
        return Dots(xyz.cpu().numpy(), *colours)

    def panels(self, rows: Tensor, batch: Batch) -> list[Panel]:
        """The same from above."""
        return [self.dots(rows, batch).panel("feature of the highest point", self.grid)]

    def counts(self, targets: Targets) -> Tensor:
        """Pairs."""
        return torch.tensor([len(targets["row"])], dtype=torch.float64)

    def forward(
        self, rows: Tensor, targets: Targets, counts: Sequence[float], share: float
    ) -> Loss:
        """Term ``distance``; and ``cosine``, which is only told."""
        predicted = F.normalize(self.head(rows).float()[targets["row"]], dim=1)
        cosine = (predicted * targets["feature"]).sum(dim=1)
        (n_pairs,) = divisors(counts)
        distance = (2 - 2 * cosine).clamp(min=_LEAST).sqrt().sum() / n_pairs
        return distance, {"distance": distance, "cosine": cosine.detach().sum() / n_pairs}


def token_channels(store: TargetStore) -> int:
    """Of a store's tokens; StoreError: it has none."""
    if "tokens" not in store.specs:
        raise StoreError(
            f"{store.url} has no tokens of a teacher: rebuild it with --set "
            "'outputs={tokens: {}}'"
        )
    return store.specs["tokens"].axes["channel"]
