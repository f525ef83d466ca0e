"""Lidar: points to features of points."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import TargetStore
from occfeat_train.data.cloud import CloudWork
from occfeat_train.distributed import pick_precision
from occfeat_train.models.waffle_iron import WaffleIron
from occfeat_train.objectives.base import Batch, Objective
from occfeat_train.sensors.base import Sensor


class Lidar(Sensor):
    """The lidar's keyframe returns, by the settings ``lidar``."""

    backbone_name, section = "lidar_net", "lidar"
    arrays = ("points", "ego_T_lidar")

    @property
    def channels(self) -> int:
        """See :class:`Sensor`."""
        return self.config.lidar.width

    def backbone(self, grid: VoxelGrid) -> WaffleIron:
        """See :class:`Sensor`."""
        return WaffleIron(self.config.lidar)

    def work(self, store: TargetStore, objective: Objective, training: bool) -> CloudWork:
        """See ``data.cloud``."""
        return CloudWork(
            settings=self.config.lidar,
            point_step_m=store.attrs["point_step_m"],
            image_hw=tuple(store.attrs["config"]["images"]["size"]),
            seed=self.config.run.seed,
            training=training,
            one_camera=training and objective.one_camera,
        )

    def prepare(
        self, batch: Batch, objective: Objective, epoch: int, device: torch.device
    ) -> tuple[Batch, Batch]:
        """See :class:`Sensor`; what is random was drawn by the reading processes."""
        seed = batch["seed"]
        batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
        batch["seed"] = seed
        with torch.no_grad():
            angle = torch.zeros(len(seed), device=device)
            return network_inputs(batch), objective.targets(batch, angle)

    def predict(
        self,
        backbone: WaffleIron,
        batch: Batch,
        head: Callable[[torch.Tensor], Any],
        frames: Sequence[torch.Tensor | None],
    ) -> list[Any]:
        """See :class:`Sensor`."""
        device = batch["points"].device
        dtype, _ = pick_precision(self.config.run.precision, device)
        with torch.autocast(device.type, dtype, dtype != torch.float32):
            found = head(backbone(**network_inputs(batch)))
        return [found for _ in frames]


def network_inputs(batch: Batch) -> Batch:
    """The arguments of ``WaffleIron.forward``."""
    names = ("features", "neighbours", "cells")
    return {name: batch[f"row_{name}"] for name in names} | {"n_rows": batch["n_rows"]}
