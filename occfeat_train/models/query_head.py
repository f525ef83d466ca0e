"""Img-ALSO's head: occupancy and intensity at points near a BEV cell (ALSO's ``decoder.py``).

Latents are a 1x1 convolution of the BEV map. The decoder is Linear, twice (ReLU, Linear), Linear:
it is linear in the latent at one end and has no activation before its last layer at the other, so
both pairs of matrices are multiplied first. The part that depends on the cell alone is computed
once per cell, and only for cells that are asked. Same parameters and same function as layer by
layer for each pair.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

WIDTH = 128
"""Channels of latents and hidden layers (ALSO)."""


class QueryHead(nn.Module):
    """Occupancy logit and intensity at given places relative to given cells, from BEV features.

    Args:
        channels: N_B, channels of the BEV map.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.latent = nn.Linear(channels, WIDTH)
        self.enter = nn.Linear(WIDTH + 3, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.leave = nn.Linear(WIDTH, WIDTH)
        self.output = nn.Linear(WIDTH, 2)

    def forward(
        self, bev: torch.Tensor, cell: torch.Tensor, relative: torch.Tensor
    ) -> torch.Tensor:
        """Predict.

        Args:
            bev: (B, N_B, X, Y).
            cell: int64 (M,), flat (B, X, Y) indices.
            relative: float (M, 3), metres, from the cell's centre at height 0 to the query.

        Returns:
            (M, 2): logit of being occupied, and intensity in 0..1 (not bounded); in the parameters'
            precision, also under autocast.
        """
        asked, which = cell.unique(return_inverse=True)
        of_latent, of_place = self.enter.weight.split([WIDTH, 3], dim=1)
        rows = bev.permute(0, 2, 3, 1).flatten(0, 2)[asked].to(of_latent.dtype)
        # Free and occupied are centimetres apart, which bfloat16 can't tell at some metres' height.
        with torch.autocast(bev.device.type, enabled=False):
            bias = of_latent @ self.latent.bias + self.enter.bias
            entered = F.linear(rows, of_latent @ self.latent.weight, bias)
            hidden = F.relu(entered[which] + F.linear(relative, of_place))
            hidden = F.relu(self.hidden(hidden))
            bias = self.output.weight @ self.leave.bias + self.output.bias
            return F.linear(hidden, self.output.weight @ self.leave.weight, bias)
