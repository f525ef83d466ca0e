"""ALSO's queries (Boulch et al., CVPR 2023, ``create_points.py``): points of space along lidar
rays, free in front of a return and occupied just behind it; what predicts them; and both losses.

Latents are linear in features. The decoder is Linear, twice (ReLU, Linear), Linear:
it is linear in the latent at one end and has no activation before its last layer at the other, so
both pairs of matrices are multiplied first. What depends on the features alone is computed once,
and only for those that are asked. Same parameters and function as layer by layer for each pair.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from occfeat_targets.store.files import StoreError
from occfeat_targets.store.reader import TargetStore
from occfeat_train.objectives.base import Loss, Targets, divisors

DECIMATION_MM = 100
"""One return is kept per cube of this size (paper §4.2)."""
BAND_M = 0.1
"""How far in front of and behind a return queries go (paper §4.2)."""
FREE_NEAR, FREE_FAR, OCCUPIED = range(3)
"""Kinds of query: just in front of a return, anywhere between sensor and return, just behind."""
WIDTH = 128
"""Channels of latents and hidden layers (ALSO)."""


def require_one_sweep(store: TargetStore, objective: str) -> None:
    """StoreError: the store has several sweeps, and so rays of unknown origin."""
    if (sweeps := store.attrs["config"]["lidar"]["sweeps"]) > 1:
        raise StoreError(
            f"{store.url} accumulates {sweeps} lidar sweeps and says of no point from where it was "
            f"seen, which {objective} must know: rebuild it with lidar.sweeps=1"
        )


def frame_queries(
    points: Tensor, sensor_ego: Tensor, point_step_m: float, n_queries: int, seed: int
) -> dict[str, Tensor]:
    """Queries of one frame, in the ego frame, from ``points`` int16 (P, 4) as stored.

    Rays start at ``sensor_ego`` float32 (3,), the lidar, in metres, not at ego's origin. A query's
    ``u`` is the share of the way: from the sensor to the return if far, else of :data:`BAND_M` from
    the return. The same seed draws the same queries, on the same kind of device.

    Returns ``xyz_ego`` float32 (Q, 3), metres; ``occupied``, ``intensity``, ``has_intensity`` (Q,),
    as in :func:`query_targets`.
    """
    points = points[_decimated(points, point_step_m)]
    generator = torch.Generator(points.device).manual_seed(seed)
    source, kind, u = draw_queries(len(points), n_queries, generator)
    xyz, intensity = points[source].float().split([3, 1], dim=1)
    xyz, is_occupied, is_far = xyz * point_step_m, kind == OCCUPIED, kind == FREE_FAR
    ray = xyz - sensor_ego
    length = ray.norm(dim=1)
    beyond = torch.where(is_occupied, BAND_M * u, -BAND_M * u)  # the return, in metres
    beyond = torch.where(is_far, (u - 1) * length, beyond)
    # A return at the sensor itself has no direction: its queries stay there.
    return {
        "xyz_ego": xyz + beyond[:, None] * ray / length.clamp(min=1e-6)[:, None],
        "occupied": is_occupied.float(),
        "intensity": intensity[:, 0] / 255 * ~is_far,
        "has_intensity": ~is_far,
    }


def _decimated(points: Tensor, point_step_m: float) -> Tensor:
    """Index of the first return in each occupied cube of the ego frame, cubes in order.

    Cubes are half-open, as all of the project's; ALSO truncates towards zero, which makes those at
    the origin twice as wide. In whole millimetres, lest rounding move a return to another cube.
    """
    xyz_mm = points[:, :3].long() * round(point_step_m * 1000)
    x, y, z = xyz_mm.div(DECIMATION_MM, rounding_mode="floor").unbind(dim=1)
    cube, order = ((x << 32) + (y << 16) + z).sort(stable=True)  # each below 2^15 in size
    is_first = torch.ones_like(cube, dtype=torch.bool)
    is_first[1:] = cube[1:] != cube[:-1]
    return order[is_first]


def draw_queries(
    n_points: int, n_queries: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """What is random in a frame's queries.

    A third of them is near and free, a third far and free, the rest occupied. A kind takes no
    return twice, so of less than it wants it takes each once and the frame has fewer queries.
    Returns ``(source, kind, u)``: int64 (Q,) returns that queries are drawn from; int64 (Q,) kinds;
    float32 (Q,), uniform in [0, 1).
    """
    device, third = generator.device, n_queries // 3
    sources = [
        torch.randperm(n_points, generator=generator, device=device)[:wanted]
        for wanted in (third, third, n_queries - 2 * third)
    ]
    kind = torch.cat([torch.full_like(source, kind) for kind, source in enumerate(sources)])
    return torch.cat(sources), kind, torch.rand(len(kind), generator=generator, device=device)


def query_counts(targets: Targets) -> Tensor:
    """Pairs of a query and what answers it, and those whose intensity is known."""
    n_known = targets["has_intensity"].sum().item()
    return torch.tensor([len(targets["occupied"]), n_known], dtype=torch.float64)


def query_loss(
    head: "QueryHead", rows: Tensor, source: Tensor, targets: Targets, counts: Sequence[float]
) -> Loss:
    """ALSO's losses with weight 1, means over pairs: terms ``occupancy``, a binary cross-entropy,
    and ``intensity``, an absolute error. Rows and sources as of :class:`QueryHead`; ``targets`` are
    ``relative``, ``occupied``, ``intensity`` and ``has_intensity`` of M pairs."""
    predicted = head(rows, source, targets["relative"])
    logits, intensity = predicted.float().unbind(dim=1)
    entropy = F.binary_cross_entropy_with_logits(logits, targets["occupied"], reduction="sum")
    error = ((intensity - targets["intensity"]).abs() * targets["has_intensity"]).sum()
    n_pairs, n_known = divisors(counts)
    terms = {"occupancy": entropy / n_pairs, "intensity": error / n_known}
    return terms["occupancy"] + terms["intensity"], terms


class QueryHead(nn.Module):
    """Occupancy logit and intensity at given places relative to given features' (ALSO)."""

    def __init__(self, channels: int):
        super().__init__()
        self.latent = nn.Linear(channels, WIDTH)
        self.enter = nn.Linear(WIDTH + 3, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.leave = nn.Linear(WIDTH, WIDTH)
        self.output = nn.Linear(WIDTH, 2)

    def forward(self, rows: Tensor, source: Tensor, relative: Tensor) -> Tensor:
        """Predict for M pairs, from features ``rows`` (R, C), the row ``source`` int64 (M,) of each
        pair and its query's place ``relative`` float32 (M, 3) to that row's.

        Returns (M, 2): logit of being occupied, and intensity in 0..1 (not bounded); in the
        parameters' precision, also under autocast.
        """
        asked, which = source.unique(return_inverse=True)
        of_latent, of_place = self.enter.weight.split([WIDTH, 3], dim=1)
        rows = rows[asked].to(of_latent.dtype)
        # Free and occupied are centimetres apart, which bfloat16 can't tell at some metres' height.
        with torch.autocast(rows.device.type, enabled=False):
            bias = of_latent @ self.latent.bias + self.enter.bias
            entered = F.linear(rows, of_latent @ self.latent.weight, bias)
            hidden = F.relu(entered[which] + F.linear(relative, of_place))
            hidden = F.relu(self.hidden(hidden))
            bias = self.output.weight @ self.leave.bias + self.output.bias
            return F.linear(hidden, self.output.weight @ self.leave.weight, bias)
