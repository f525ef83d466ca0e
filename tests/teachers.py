"""Plug-in teachers for tests: fast, and their features depend on what is in the image."""

import os
import time

import torch
from torch.nn import functional as F


class PatchMeans:
    """Mean colour of each patch, its products and the cell's position: 8 channels."""

    name = "patch-means"
    weights = "none"
    dim = 8
    patch_size = 14

    def __call__(self, images):
        means = F.avg_pool2d(images, self.patch_size)
        _, _, h, w = means.shape
        rows = torch.linspace(-1, 1, h).view(1, 1, h, 1).expand(len(images), 1, h, w)
        columns = torch.linspace(-1, 1, w).view(1, 1, 1, w).expand(len(images), 1, h, w)
        return torch.cat([means, means**2 - 0.3, rows, columns], dim=1)


class Slow(PatchMeans):
    """The same features, late: a build lasts long enough to be killed in the middle."""

    def __call__(self, images):
        time.sleep(float(os.environ.get("SLOW_SECONDS", 0.4)))
        return super().__call__(images)


class Suicidal(PatchMeans):
    """Takes its process with it, as the out-of-memory killer would."""

    def __call__(self, images):
        os.kill(os.getpid(), 9)


class DiesLoading(PatchMeans):
    """Takes its process with it before it has done anything."""

    def __init__(self):
        os.kill(os.getpid(), 9)


class Learned(torch.nn.Module):
    """A plug-in as users write them: a module with parameters, nothing about gradients."""

    name, dim, patch_size = "learned", 4, 14

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 4, 14, 14)
        torch.nn.init.constant_(self.layer.weight, 0.01)
        torch.nn.init.constant_(self.layer.bias, 0.5)

    def forward(self, images):
        return self.layer(images)


class NotFinite(PatchMeans):
    """NaN features, as a broken half-precision run would give."""

    def __call__(self, images):
        return super().__call__(images) * float("nan")


class WrongShape(PatchMeans):
    """Promises 8 channels, gives 3."""

    def __call__(self, images):
        return super().__call__(images)[:, :3]
