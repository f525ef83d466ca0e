"""Img-ALSO, the paper's baseline (§4.2): what is free and what occupied near BEV cells.

A lidar ray says that space is free up to its return and occupied just behind it. ALSO (Boulch et
al., CVPR 2023; its ``create_points.py``) draws *queries* on rays. Here each is answered from every
BEV cell whose centre is near it on the ground plane (its detection variant's column search), and
every such pair of query and cell is one prediction.

OccFeat §4.2 gives three distances (below) and leaves the rest to ALSO: kinds of query and their
number, decoder, both losses with weight 1. Ours: rays start at the lidar's place in ego, since the
lidar is not the BEV's origin; cells are at their centres, height 0; only the BEV map's x and y
bound queries. Returns that the store leaves out (the ego car's, those beyond its reach) have none.
"""

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from occfeat_targets.store.files import StoreError
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.settings import Settings
from occfeat_train.geometry import rotation_z
from occfeat_train.objectives.base import Batch, Loss, Objective, Targets
from occfeat_train.objectives.queries import (
    QueryHead,
    frame_queries,
    query_counts,
    query_loss,
    require_one_sweep,
)

RADIUS_M = 1.0
"""How far from a query, on the ground plane, the cells lie that answer it (paper §4.2)."""


class ImgAlsoSettings(Settings):
    """What is drawn."""

    queries: int = Field(default=2048, ge=3)
    """Points of space drawn per sample: as in ALSO's nuScenes configuration; those of its
    detection variant, whose column search this is, have 4096."""


class ImgAlso(Objective):
    """L = L_occupancy + L_intensity, ALSO's losses on BEV features."""

    Settings = ImgAlsoSettings
    settings: ImgAlsoSettings
    head: QueryHead
    arrays = ("points", "ego_T_lidar")
    no_picture = "learns points along lidar rays, of which there is no picture"

    def __init__(self, settings: ImgAlsoSettings, store: TargetStore, channels: int, turned: bool):
        """Raises StoreError if the store has several sweeps, or cells too large for the radius."""
        super().__init__(settings, store, channels, turned)
        require_one_sweep(store, "img-also")
        dx, dy, _ = store.grid.cell_size
        if math.hypot(dx, dy) > 2 * RADIUS_M:
            raise StoreError(
                f"{store.url} has BEV cells of {dx:g} x {dy:g} m, but img-also needs every point "
                f"within {RADIUS_M:g} m of a cell's centre: rebuild it with a finer grid"
            )
        self.head = QueryHead(channels)
        self.point_step_m: float = store.attrs["point_step_m"]

    def targets(self, batch: Batch, angle: Tensor) -> Targets:
        """See :func:`query_targets`."""
        return query_targets(batch, angle, self.grid, self.point_step_m, self.settings.queries)

    def counts(self, targets: Targets) -> Tensor:
        """Pairs of a query and a cell, and those whose intensity is known."""
        return query_counts(targets)

    def forward(self, bev: Tensor, targets: Targets, counts: Sequence[float], share: float) -> Loss:
        """Terms ``occupancy``, a binary cross-entropy, and ``intensity``, an absolute error."""
        cells = bev.permute(0, 2, 3, 1).flatten(0, 2)
        return query_loss(self.head, cells, targets["cell"], targets, counts)


def query_targets(
    batch: Batch, angle: Tensor, grid: VoxelGrid, point_step_m: float, n_queries: int
) -> dict[str, Tensor]:
    """What to predict for each pair of a query and a BEV cell near it.

    Queries outside of the BEV map are dropped; height does not matter, it is the decoder's input.

    From collated ``points`` int16 (P, 4), ``n_points`` (B,), ``ego_T_lidar`` (B, 4, 4) and ``seed``
    int64 (B,) on the host, from which follows what is random; ``angle`` as in
    :meth:`Objective.targets`; the store's ``grid`` and step; ``n_queries`` drawn per frame.

    Returns of M pairs ``cell`` int64 (M,), flat (B, X, Y) index; ``relative`` float32 (M, 3),
    metres, BEV frame: from the cell's centre at ego's height 0 (the ground) to the query;
    ``occupied`` float32 (M,), 1 behind a return and 0 in front; ``intensity`` float32 (M,), of the
    return, 0..1, 0 where it is not known; ``has_intensity`` bool (M,), not known far from it.
    """
    clouds = batch["points"].split(batch["n_points"].tolist())
    places, seeds = batch["ego_T_lidar"][:, :3, 3], batch["seed"].tolist()
    frames = [
        frame_queries(points, place, point_step_m, n_queries, seed)
        for points, place, seed in zip(clouds, places, seeds, strict=True)
    ]
    queries = {name: torch.cat([frame[name] for frame in frames]) for name in frames[0]}
    xyz_ego, device = queries.pop("xyz_ego"), batch["points"].device
    n_drawn = torch.tensor([len(frame["xyz_ego"]) for frame in frames], device=device)
    sample = torch.arange(len(frames), device=device).repeat_interleave(n_drawn)
    bev_T_ego = rotation_z(angle).to(device)[:, :3, :3]
    xyz_bev = torch.einsum("qij,qj->qi", bev_T_ego[sample], xyz_ego)
    query, cell, relative = near_cells(xyz_bev, grid)
    cell = cell + sample[query] * math.prod(grid.bev_shape)
    of_pairs = {name: values[query] for name, values in queries.items()}
    return {"cell": cell, "relative": relative} | of_pairs


def near_cells(xyz_bev: Tensor, grid: VoxelGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of a point and a BEV cell whose centre is within :data:`RADIUS_M` on the ground plane.

    Of points float (Q, 3), metres, BEV frame; those outside of the map have no pairs. Returns
    ``(query, cell, relative)``: int64 (M,) point; int64 (M,) flat (X, Y) index; (M, 3) from the
    cell's centre at height 0 to the point, metres.
    """
    lower, size = (xyz_bev.new_tensor(a[:2]) for a in (grid.lower, grid.cell_size))
    shape = torch.tensor(grid.bev_shape, device=xyz_bev.device)
    home = ((xyz_bev[:, :2] - lower) / size).floor().long()
    # A centre n cells away is at least n - 1/2 cells away.
    reach = [math.floor(RADIUS_M / edge + 0.5) for edge in grid.cell_size[:2]]
    steps = torch.cartesian_prod(*(torch.arange(-n, n + 1, device=home.device) for n in reach))
    cell = home[:, None] + steps  # (Q, S, 2)
    to_query = xyz_bev[:, None, :2] - (lower + (cell + 0.5) * size)
    in_map = ((home >= 0) & (home < shape)).all(dim=1)[:, None]
    in_map = in_map & ((cell >= 0) & (cell < shape)).all(dim=2)
    query, step = (in_map & (to_query.square().sum(dim=2) <= RADIUS_M**2)).nonzero(as_tuple=True)
    ix, iy = cell[query, step].unbind(dim=1)
    relative = torch.cat([to_query[query, step], xyz_bev[query, 2:]], dim=1)
    return query, ix * grid.bev_shape[1] + iy, relative
