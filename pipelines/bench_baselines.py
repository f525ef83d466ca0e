"""What the benchmarks compare with: the same done in the ordinary way."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from occfeat_targets.store.settings import Size
from occfeat_train.data.dataset import FrameDataset, decode_images
from occfeat_train.geometry import volume_centres
from occfeat_train.models.lifts.simplebev import SimpleBEVLift, in_image, project
from occfeat_train.objectives.occfeat import OccFeatHead


class BarePread(FrameDataset):
    """The limit: reads the byte ranges that hold a frame's chunks, decodes nothing but images."""

    def __getitem__(self, position: int) -> dict[str, Any]:
        """A sample like the real one, but of compressed bytes."""
        i, store, calibration = int(self.frames[position]), self.reader.store, ("K", "cam_T_ego")
        sample: dict[str, Any] = {"frame": i} | self.reader.read(i, calibration)
        for name in (name for name in self.names if name not in calibration):
            key, ranges = store.sharded[name].ranges(i, store.n_rows(i, name))
            with open(f"{self.reader.url}/{key}", "rb", buffering=0) as file:  # but for checksums
                parts = [os.pread(file.fileno(), length - 4, at) for at, length in ranges]
            sample[name] = np.frombuffer(b"".join(parts), np.uint8)
        size, cameras = store.attrs["config"]["images"]["size"], store.attrs["cameras"]
        offset = store.per_frame["image_offset"][i]
        return sample | {"images": decode_images(sample["images"], offset, size, cameras)}


class OriginalImages(FrameDataset):
    """As without a store of images: whole JPEGs, OpenCV, INTER_AREA; the rest from the store."""

    def __init__(self, *arguments: Any, paths: Sequence[Sequence[str]]):
        """``paths``: of the images of some of the dataset's keyframes: for speed any do."""
        super().__init__(*arguments)
        self.paths = paths

    def __getitem__(self, position: int) -> dict[str, Any]:
        """A sample like the real one, but of other images."""
        import cv2

        cv2.setNumThreads(1)
        i, images = int(self.frames[position]), []
        height, width = self.reader.store.attrs["config"]["images"]["size"]
        for path in self.paths[i % len(self.paths)]:
            image: Any = cv2.imread(path)
            small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
            images.append(cv2.cvtColor(small, cv2.COLOR_BGR2RGB))
        rest = self.reader.read(i, [name for name in self.names if name != "images"])
        return {"frame": i, "images": np.stack(images)} | rest


class DenseLift(SimpleBEVLift):
    """Simple-BEV's form: sample a whole volume per camera, mask, average where not zero."""

    def forward(self, features: Tensor, K: Tensor, cam_T_bev: Tensor, image_hw: Size) -> Tensor:
        """As :meth:`SimpleBEVLift.forward`, for one sample."""
        _, N, C, _, _ = features.shape
        centres = volume_centres(self.grid, K.device)
        u, v, depth = (a.T for a in project(centres, K[0], cam_T_bev[0]))  # (N, V)
        uv = torch.stack([u, v], dim=-1) / depth.clamp(min=1e-6)[..., None]
        grid = (2 * uv / uv.new_tensor(image_hw[::-1]) - 1).clamp(-2, 2)[:, None]
        volumes = F.grid_sample(features[0], grid, padding_mode="border", align_corners=False)
        volumes = volumes.view(N, C, -1) * in_image(u, v, depth, image_hw)[:, None]
        seen = (volumes.abs() > 0).float()
        mean = (volumes * seen).sum(0) / (1e-6 + seen.sum(0))
        nz, nx, ny = self.grid.shape
        return mean.view(C, nx, ny, nz).permute(3, 0, 1, 2).reshape(1, nz * C, nx, ny)


class DenseHead(OccFeatHead):
    """The paper's form: every layer on the dense volume, features of every voxel."""

    def forward(self, bev: Tensor, voxel: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`OccFeatHead.forward`, for one sample."""
        assert self.occupancy and self.features
        rows = self.mix(bev)[0].permute(1, 2, 0)
        volume = self.unsplat(rows).unflatten(-1, (self.heights, -1)).permute(2, 0, 1, 3)
        volume = self.reduce(F.softplus(self.expand(volume)))  # (Z, X, Y, C)
        features = self.features(volume).flatten(0, 2)
        return self.occupancy(volume)[None, ..., 0], features[voxel]
