"""Cameras: images to BEV features."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from occfeat_targets.store.grid import VoxelGrid
from occfeat_train.augment import NO_AUGMENT, draw, network_inputs
from occfeat_train.distributed import pick_precision
from occfeat_train.models.bev_net import BEVNet
from occfeat_train.models.encoder_weights import load_encoder_weights
from occfeat_train.objectives.base import Batch, Objective
from occfeat_train.sensors.base import Sensor


class Camera(Sensor):
    """All cameras of the rig, by the settings ``model`` and ``augment``."""

    backbone_name, section = "bev_net", "model"
    arrays = ("images",)

    @property
    def channels(self) -> int:
        """See :class:`Sensor`."""
        return self.config.model.channels

    @property
    def freeze_batch_norm(self) -> bool:
        """See :class:`Sensor`."""
        return self.config.model.freeze_batch_norm

    def backbone(self, grid: VoxelGrid) -> BEVNet:
        """See :class:`Sensor`."""
        return BEVNet(self.config.model, grid)

    def load_first_weights(self, backbone: BEVNet) -> str:
        """Those of ``model.encoder_weights``."""
        report = load_encoder_weights(backbone.encoder, self.config.model.encoder_weights)
        return f"encoder: {report}"

    def prepare(
        self, batch: Batch, objective: Objective, epoch: int, device: torch.device
    ) -> tuple[Batch, Batch]:
        """See :class:`Sensor`."""
        config, frames, n_cameras = self.config, batch["frame"], batch["K"].shape[1]
        draws = draw(config.augment, config.run.seed, epoch, frames, n_cameras)
        batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
        batch["seed"] = draws.seed
        size, shift = config.model.image_size, config.augment.shift
        with torch.no_grad():
            inputs = network_inputs(batch, draws, size, shift, objective.frame(batch))
            return inputs, objective.targets(batch, draws.angle)

    def predict(
        self,
        backbone: BEVNet,
        batch: Batch,
        head: Callable[[torch.Tensor], Any],
        frames: Sequence[torch.Tensor | None],
    ) -> list[Any]:
        """See :class:`Sensor`."""
        device = batch["images"].device
        draws = draw(NO_AUGMENT, 0, 0, batch["frame"], batch["K"].shape[1])
        dtype, _ = pick_precision(self.config.run.precision, device)
        # Geometry stays in float32: half a pixel would be lost in bfloat16.
        inputs = network_inputs(batch, draws, self.config.model.image_size, 0.0)
        images, K, poses = inputs["images"], inputs["K"], {}
        for frame in frames:  # several may be ego, whose BEV is then made once
            pose = inputs["cam_T_bev"] if frame is None else batch["cam_T_ego"] @ frame[:, None]
            poses[id(frame)] = pose
        *_, H, W = images.shape
        with torch.autocast(device.type, dtype, dtype != torch.float32):
            features = backbone.encode(images)  # nothing is mirrored
            found = {k: head(backbone.see(features, K, p, (H, W))) for k, p in poses.items()}
        return [found[id(frame)] for frame in frames]
