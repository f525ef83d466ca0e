"""What a sensor is: the backbone of the networks that look through it, and how stored frames become
its inputs. Neither knows of what is learned on top, nor of the other sensor."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import TargetStore
from occfeat_train.config import TrainConfig
from occfeat_train.data.dataset import Work
from occfeat_train.objectives.base import Batch, Objective


class Sensor:
    """Base of all sensors, found by name in ``sensors.SENSORS`` (an objective's ``sensor``); made
    of the settings of a training."""

    backbone_name: ClassVar[str]
    """What the network calls its backbone, and its weights begin with."""
    section: ClassVar[str]
    """Of the settings of its backbone."""
    arrays: ClassVar[tuple[str, ...]]
    """The store's arrays that it needs besides calibration."""

    def __init__(self, config: TrainConfig):
        self.config = config

    @property
    def channels(self) -> int:
        """Of the features that the backbone gives."""
        raise NotImplementedError

    @property
    def freeze_batch_norm(self) -> bool:
        """Whether batch norms keep their statistics in training."""
        return False

    def backbone(self, grid: VoxelGrid) -> nn.Module:
        """What is pretrained, with random weights."""
        raise NotImplementedError

    def load_first_weights(self, backbone: Any) -> str:
        """Give a backbone the weights that nothing here pretrained, if there are any, and say which
        they are. Raises WeightsError."""
        return f"{self.backbone_name}: random weights"

    def work(self, store: TargetStore, objective: Objective, training: bool) -> Work | None:
        """What reading processes do beyond reading, with what is random in ``training``."""
        return None

    def prepare(
        self, batch: Batch, objective: Objective, epoch: int, device: torch.device
    ) -> tuple[Batch, Batch]:
        """A collated batch moved to the device and augmented: inputs of the backbone and the
        objective's targets."""
        raise NotImplementedError

    def predict(
        self,
        backbone: Any,
        batch: Batch,
        head: Callable[[torch.Tensor], Any],
        frames: Sequence[torch.Tensor | None],
    ) -> list[Any]:
        """What ``head`` makes of the features of a batch on the device, not augmented, in each of
        some BEV frames (see :meth:`Objective.frame`), which only cameras know."""
        raise NotImplementedError
