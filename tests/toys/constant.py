"""A teacher in one file: ``--teacher constant:Constant``."""

import torch


class Constant:
    """The same three numbers at every place of every image."""

    name = "constant"
    weights = "none"
    dim = 3
    patch_size = 7

    def __call__(self, images):
        h, w = (side // self.patch_size for side in images.shape[-2:])
        return torch.tensor([1.0, -2.0, 0.5]).view(1, 3, 1, 1).expand(len(images), 3, h, w)
