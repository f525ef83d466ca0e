"""What is trained: a BEV network with an objective on top, as one module."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import nn

from occfeat_train.models.bev_net import BEVNet, ModelSettings
from occfeat_train.objectives.base import Batch, Objective, Targets


class Network(nn.Module):
    """One module for DDP; its submodules are ``bev_net`` and ``objective``."""

    def __init__(self, model: ModelSettings, objective: Objective):
        super().__init__()
        self.bev_net = BEVNet(model, objective.grid)
        self.objective = objective
        self.freeze_batch_norm = model.freeze_batch_norm
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(
        self, inputs: Batch, targets: Targets, counts: Sequence[float], share: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and terms of a micro-batch, see :meth:`Objective.forward`."""
        return self.objective(self.bev_net(**inputs), targets, counts, share)

    def train(self, mode: bool = True) -> Self:
        """As usual, but frozen batch norms stay in evaluation mode."""
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self
