"""ALSO (Boulch et al., CVPR 2023): a lidar network learns what is free and what occupied around it.

Each query (see ``queries``) is answered from every row within 1 m of it in space, from at most 32
of them, at random: ALSO's radius search stops at 32 in index order, where that is random too.
Queries far in front of a return that have no row near them teach nothing.

Unlike there: WaffleIron sees the points' places, ALSO's network only their intensity; all rows
answer, not 16,384 at random; cubes of decimation have their lower corner on multiples of their
edge, all of one size.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.settings import Settings
from occfeat_train.objectives.base import Batch, Loss, Objective, Targets
from occfeat_train.objectives.pairs import rows_in_ego
from occfeat_train.objectives.queries import (
    QueryHead,
    frame_queries,
    query_counts,
    query_loss,
    require_one_sweep,
)

RADIUS_M = 1.0
"""How far from a query, in space, the rows lie that answer it."""


class AlsoSettings(Settings):
    """As published."""

    queries: int = Field(default=2048, ge=3)
    """Points of space drawn per sample."""
    answers: int = Field(default=32, ge=1)
    """Most rows that answer one query."""


class Also(Objective):
    """L = L_occupancy + L_intensity."""

    Settings = AlsoSettings
    settings: AlsoSettings
    head: QueryHead
    sensor = "lidar"
    arrays = ()
    no_picture = "learns points along lidar rays, of which there is no picture"

    def __init__(self, settings: AlsoSettings, store: TargetStore, channels: int, turned: bool):
        """Raises StoreError if the store has several sweeps."""
        super().__init__(settings, store, channels, turned)
        require_one_sweep(store, "also")
        self.head = QueryHead(channels)
        self.point_step_m: float = store.attrs["point_step_m"]

    def targets(self, batch: Batch, angle: Tensor) -> Targets:
        """Of M pairs ``row`` int64 (M,); ``relative`` float32 (M, 3), metres, from the row to the
        query in the cloud's frame; ``occupied``, ``intensity`` and ``has_intensity`` (M,) as of
        ``queries.frame_queries``."""
        clouds = batch["points"].split(batch["n_points"].tolist())
        rows = rows_in_ego(batch, self.point_step_m)[0].split(batch["n_rows"].tolist())
        first, frames = 0, []
        for i, (points, near) in enumerate(zip(clouds, rows, strict=True)):
            seed, place = int(batch["seed"][i]), batch["ego_T_lidar"][i, :3, 3]
            queries = frame_queries(points, place, self.point_step_m, self.settings.queries, seed)
            xyz_ego = queries.pop("xyz_ego")
            query, row = near_rows(xyz_ego, near, self.settings.answers, seed ^ 1)
            offset = (xyz_ego[query] - near[row]) @ batch["cloud_T_ego"][i, :3, :3].T
            pairs = {name: values[query] for name, values in queries.items()}
            frames.append({"row": row + first, "relative": offset} | pairs)
            first += len(near)
        return {name: torch.cat([frame[name] for frame in frames]) for name in frames[0]}

    def counts(self, targets: Targets) -> Tensor:
        """Pairs of a query and a row, and those whose intensity is known."""
        return query_counts(targets)

    def forward(
        self, rows: Tensor, targets: Targets, counts: Sequence[float], share: float
    ) -> Loss:
        """Terms ``occupancy``, a binary cross-entropy, and ``intensity``, an absolute error."""
        return query_loss(self.head, rows, targets["row"], targets, counts)


def near_rows(queries: Tensor, rows: Tensor, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pairs of a query (Q, 3) and a row (R, 3) within :data:`RADIUS_M`, of a query at most so many,
    at random from the seed: ``(query, row)``, int64 (M,) each, by query."""
    near = torch.cdist(queries, rows, compute_mode="donot_use_mm_for_euclid_dist") <= RADIUS_M
    query, row = near.nonzero(as_tuple=True)
    generator = torch.Generator(queries.device).manual_seed(seed)
    drawn = torch.rand(len(query), generator=generator, device=queries.device, dtype=torch.float64)
    order = (query + drawn).argsort()
    count = torch.bincount(query, minlength=len(queries))
    rank = torch.arange(len(query), device=queries.device) - (count.cumsum(0) - count)[query]
    kept = order[rank < most].sort().values
    return query[kept], row[kept]
