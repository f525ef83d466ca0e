"""Simple-BEV's BEV compressor and ResNet-18 decoder (Harley et al. 2022, ``segnet.py``)."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from occfeat_train.models.instance_norm import InstanceNorm


class Compressor(nn.Sequential):
    """(B, Z·C, X, Y) to (B, C, X, Y): conv 3x3, InstanceNorm, GELU."""

    def __init__(self, in_channels: int, channels: int):
        conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        super().__init__(conv, InstanceNorm(), nn.GELU())


class Decoder(nn.Module):
    """(B, C, X, Y) to BEV features (B, C, X, Y), Simple-BEV's ``raw_feat``.

    Conv 7x7 to half size, the first three stages of a randomly initialised ResNet-18 (full, half,
    quarter of that) and three bilinear steps back up, each with a skip connection. Widths are
    C/2, C and 2C: 64, 128 and 256 at the published C = 128.
    """

    def __init__(self, channels: int):
        super().__init__()
        widths = (channels // 2, channels, 2 * channels)
        conv = nn.Conv2d(channels, widths[0], 7, stride=2, padding=3, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.layer1, self.layer2, self.layer3 = _resnet18_stages(widths)
        self.up3 = UpAndAdd(widths[2], widths[1])
        self.up2 = UpAndAdd(widths[1], widths[0])
        self.up1 = UpAndAdd(widths[0], channels)

    def forward(self, x: Tensor) -> Tensor:
        """Decode (B, C, X, Y)."""
        layer1 = self.layer1(self.stem(x))
        layer2 = self.layer2(layer1)
        layer3 = self.layer3(layer2)
        return self.up1(self.up2(self.up3(layer3, layer2), layer1), x)


class UpAndAdd(nn.Module):
    """Bilinear up to the skip's size, conv 1x1, InstanceNorm, plus the skip."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm = InstanceNorm()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Bring ``x`` (B, C', X', Y') to the skip's (B, C, X, Y)."""
        # A 1x1 convolution and bilinear interpolation commute: convolve the small map.
        x = F.interpolate(self.conv(x), skip.shape[-2:], mode="bilinear", align_corners=False)
        return self.norm(x) + skip


class EveryOther(nn.Conv2d):
    """A 1x1 convolution of stride 2, as one of every other pixel: the same up to rounding.

    On a CPU, torch's own (2.13 and 2.14, oneDNN) writes past its memory in the channels-last
    gradient of 4, 8 or 12 input channels on 100x100 pixels.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y) to (B, C', ceil(X/2), ceil(Y/2))."""
        return F.conv2d(x[..., ::2, ::2], self.weight, self.bias)


def _resnet18_stages(widths: tuple[int, int, int]) -> list[nn.Module]:
    from transformers import ResNetConfig
    from transformers.models.resnet.modeling_resnet import ResNetStage

    config = ResNetConfig(layer_type="basic", hidden_act="relu")
    inputs, strides = (widths[0], *widths), (1, 2, 2)
    stages: list[Any] = [
        ResNetStage(config, inputs[i], widths[i], stride=strides[i], depth=2) for i in range(3)
    ]
    for stage in stages:
        for module in stage.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.kernel_size == (1, 1) and module.in_channels < 16:
                    module.__class__ = EveryOther
        for block in stage.layers:  # zero_init_residual: every block starts as its shortcut
            nn.init.zeros_(block.layer[-1].normalization.weight)
    return stages
