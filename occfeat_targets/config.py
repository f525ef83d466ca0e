"""What a targets store is made of: each section's settings are declared beside their owner. All of
it changes the stored bytes and is recorded in the store; how a build is run (workers, scheduler,
places of dataroot and store) is not, so a build may be continued elsewhere."""

from typing import Any, Self

from pydantic import Field, model_validator

from occfeat_targets.outputs import OUTPUTS
from occfeat_targets.outputs.base import LidarSettings
from occfeat_targets.outputs.boxes import BoxesSettings
from occfeat_targets.outputs.images import ImagesSettings
from occfeat_targets.outputs.map import MapSettings
from occfeat_targets.outputs.points import point_step_m
from occfeat_targets.sources.base import FramesSettings
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.settings import Settings
from occfeat_targets.teachers.base import TeacherSettings


class TargetsConfig(Settings):
    """Everything that decides the bytes of a targets store."""

    source: str = "auto"
    """Whose dataroot: a name of ``sources.SOURCES``, ``package.module:name``, or ``auto``:
    whichever recognises it."""
    grid: VoxelGrid = VoxelGrid()
    lidar: LidarSettings = LidarSettings()
    teacher: TeacherSettings = TeacherSettings()
    images: ImagesSettings = ImagesSettings()
    boxes: BoxesSettings = BoxesSettings()
    map: MapSettings = MapSettings()
    outputs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What else to store: settings by a name of ``outputs.OUTPUTS`` or ``package.module:name``."""
    frames: FramesSettings = FramesSettings()
    block_frames: int = Field(default=32, ge=1)
    """Frames of one block: one task, one file of every large array, one unit of resuming."""
    train_preset: str = ""
    """The trainer preset to use with this store, by its name, unless told otherwise. The demo sets
    it."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        point_step_m(self.grid)
        for name, settings in self.outputs.items():
            OUTPUTS(name).Settings.of(settings, f"outputs.{name}")
        return self
