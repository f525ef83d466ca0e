"""Image encoders as published: their tensors by name, and the same networks computed by hand."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from occfeat_train.models.encoders import ImageEncoder

# Table 1 of the ResNet paper: blocks, width of the 3x3 convolutions; a block gives 4 x the width.
RESNET_BLOCKS = {"resnet-50": (3, 4, 6), "resnet-101": (3, 4, 23)}
RESNET_WIDTHS = (64, 128, 256)
# Table 1 of the EfficientNet paper up to stride 16: expansion, kernel, stride, in, out, repeats.
B0_STAGES = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
)
ODD = (90, 74)  # 45 x 37, 23 x 19, 12 x 10, 6 x 5: both parities at every stride


def b0_blocks():
    """Each block of the cut network: its stage (from 1), index in it, and its numbers."""
    for stage, (ratio, kernel, stride, inputs, outputs, repeats) in enumerate(B0_STAGES, start=1):
        for j in range(repeats):
            yield stage, j, ratio, kernel, stride, inputs, outputs
            stride, inputs = 1, outputs


def images(size=(64, 96), n=1, seed=0):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def encoder(name, **settings):
    torch.manual_seed(0)
    return ImageEncoder(name, **settings)


class Random:
    """Tensors at which every term of a network shows: no scale is 1 and no shift 0."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def conv(self, outputs, inputs, kernel, groups=1):
        shape = (outputs, inputs // groups, kernel, kernel)
        scale = 1 / math.sqrt(math.prod(shape[1:]))
        return torch.randn(shape, generator=self.generator) * scale

    def vector(self, size):
        return torch.randn(size, generator=self.generator) * 0.2

    def norm(self, size):
        positive = [torch.rand(size, generator=self.generator) + 0.5 for _ in range(2)]
        return {
            "weight": positive[0],
            "bias": self.vector(size),
            "running_mean": self.vector(size),
            "running_var": positive[1],
            "num_batches_tracked": torch.tensor(7),
        }

    def fill(self, model):
        """Fill a transformers model, whose own initial weights hide the deeper layers."""
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                outputs, inputs, kernel, _ = module.weight.shape
                module.weight.data = self.conv(outputs, inputs, kernel)
            elif isinstance(module, nn.BatchNorm2d):
                module.load_state_dict(self.norm(module.num_features))
        return model.eval()


def named(prefix, tensors):
    return {f"{prefix}.{leaf}": tensor for leaf, tensor in tensors.items()}


def norm(x, w, name, eps):
    mean, var, weight, bias = (
        w[f"{name}.{leaf}"].view(-1, 1, 1)
        for leaf in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + eps).sqrt() * weight + bias


def normalised(pixels):
    """In float64, with constants of float32, which those of the encoder were."""
    mean = torch.tensor([0.485, 0.456, 0.406]).double().view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).double().view(3, 1, 1)
    return (pixels.double() - mean) / std


# ---------------------------------------------------------------- a ResNet as torchvision names it


def torchvision_resnet(name, seed=0):
    """A state dict with torchvision's names; the cut parts are there, in no particular shape."""
    random = Random(seed)
    state = {"conv1.weight": random.conv(64, 3, 7), **named("bn1", random.norm(64))}
    inputs = 64
    for layer, (blocks, width) in enumerate(
        zip(RESNET_BLOCKS[name], RESNET_WIDTHS, strict=True), start=1
    ):
        for j in range(blocks):
            block, outputs = f"layer{layer}.{j}", 4 * width
            shapes = ((width, inputs, 1), (width, width, 3), (outputs, width, 1))
            for i, shape in enumerate(shapes, start=1):
                state[f"{block}.conv{i}.weight"] = random.conv(*shape)
                state |= named(f"{block}.bn{i}", random.norm(shape[0]))
            if j == 0:
                state[f"{block}.downsample.0.weight"] = random.conv(outputs, inputs, 1)
                state |= named(f"{block}.downsample.1", random.norm(outputs))
            inputs = outputs
    cut = ("layer4.0.conv1.weight", "layer4.2.bn3.running_mean", "fc.weight", "fc.bias")
    return state | {name: torch.ones(3) for name in cut}


def resnet_by_hand(state, pixels, name):
    """Outputs of layer2 and layer3, float64."""
    w = {key: value.double() for key, value in state.items()}

    def conv_norm(x, conv, bn, stride=1):
        kernel = w[f"{conv}.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        return norm(x, w, bn, 1e-5)

    x = conv_norm(normalised(pixels), "conv1", "bn1", stride=2).relu()
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    outputs = []
    for layer, blocks in enumerate(RESNET_BLOCKS[name], start=1):
        for j in range(blocks):
            block, stride = f"layer{layer}.{j}", 2 if layer > 1 and j == 0 else 1
            y = conv_norm(x, f"{block}.conv1", f"{block}.bn1").relu()
            y = conv_norm(y, f"{block}.conv2", f"{block}.bn2", stride).relu()
            y = conv_norm(y, f"{block}.conv3", f"{block}.bn3")
            if j == 0:
                x = conv_norm(x, f"{block}.downsample.0", f"{block}.downsample.1", stride)
            x = (x + y).relu()
        outputs.append(x)
    return outputs[1:]


# --------------------------------------------- an EfficientNet-B0 as efficientnet_pytorch names it


def lukemelas_b0(seed=0):
    random = Random(seed)
    state = {"_conv_stem.weight": random.conv(32, 3, 3), **named("_bn0", random.norm(32))}
    for i, (_, _, ratio, kernel, _, inputs, outputs) in enumerate(b0_blocks()):
        block, inner, squeezed = f"_blocks.{i}", ratio * inputs, inputs // 4
        if ratio > 1:
            state[f"{block}._expand_conv.weight"] = random.conv(inner, inputs, 1)
            state |= named(f"{block}._bn0", random.norm(inner))
        state[f"{block}._depthwise_conv.weight"] = random.conv(inner, inner, kernel, groups=inner)
        state |= named(f"{block}._bn1", random.norm(inner))
        state[f"{block}._se_reduce.weight"] = random.conv(squeezed, inner, 1)
        state[f"{block}._se_reduce.bias"] = random.vector(squeezed)
        state[f"{block}._se_expand.weight"] = random.conv(inner, squeezed, 1)
        state[f"{block}._se_expand.bias"] = random.vector(inner)
        state[f"{block}._project_conv.weight"] = random.conv(outputs, inner, 1)
        state |= named(f"{block}._bn2", random.norm(outputs))
    cut = ("_blocks.11._bn0.weight", "_blocks.15._bn2.bias", "_conv_head.weight", "_bn1.bias")
    return state | {name: torch.ones(3) for name in (*cut, "_fc.weight")}


def torchvision_b0(seed=0):
    """The same tensors under torchvision's names."""
    source = lukemelas_b0(seed)
    modules = {"_conv_stem": "features.0.0", "_bn0": "features.0.1"}
    for i, (stage, j, ratio, *_) in enumerate(b0_blocks()):
        theirs, shift = f"features.{stage}.{j}.block", 0 if ratio > 1 else -1
        modules |= {
            f"_blocks.{i}._expand_conv": f"{theirs}.0.0",
            f"_blocks.{i}._bn0": f"{theirs}.0.1",
            f"_blocks.{i}._depthwise_conv": f"{theirs}.{1 + shift}.0",
            f"_blocks.{i}._bn1": f"{theirs}.{1 + shift}.1",
            f"_blocks.{i}._se_reduce": f"{theirs}.{2 + shift}.fc1",
            f"_blocks.{i}._se_expand": f"{theirs}.{2 + shift}.fc2",
            f"_blocks.{i}._project_conv": f"{theirs}.{3 + shift}.0",
            f"_blocks.{i}._bn2": f"{theirs}.{3 + shift}.1",
        }
    state = {}
    for name, tensor in source.items():
        module, _, leaf = name.rpartition(".")
        if module in modules:
            state[f"{modules[module]}.{leaf}"] = tensor
    cut = ("features.6.0.block.0.0.weight", "features.8.0.weight", "classifier.1.bias")
    return state | {name: torch.ones(3) for name in cut}


def same_padding(x, kernel, stride):
    """TensorFlow's "same", from its definition: outputs = ceil(size / stride)."""
    pads = []
    for size in reversed(x.shape[-2:]):
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def symmetric_padding(x, kernel, stride):
    return F.pad(x, [kernel // 2] * 4)


def b0_by_hand(state, pixels, pad, eps):
    """Maps after block 4 and block 10, float64, from efficientnet_pytorch's names."""
    w = {key: value.double() for key, value in state.items()}

    def swish(x):
        return x * x.sigmoid()

    x = F.conv2d(pad(normalised(pixels), 3, 2), w["_conv_stem.weight"], stride=2)
    x = swish(norm(x, w, "_bn0", eps))
    maps = []
    for i, (_, _, ratio, kernel, stride, inputs, outputs) in enumerate(b0_blocks()):
        block, y = f"_blocks.{i}", x
        if ratio > 1:
            y = F.conv2d(y, w[f"{block}._expand_conv.weight"])
            y = swish(norm(y, w, f"{block}._bn0", eps))
        depthwise = w[f"{block}._depthwise_conv.weight"]
        y = F.conv2d(pad(y, kernel, stride), depthwise, stride=stride, groups=ratio * inputs)
        y = swish(norm(y, w, f"{block}._bn1", eps))
        gate = y.mean((2, 3), keepdim=True)
        for part, activation in (("_se_reduce", swish), ("_se_expand", torch.sigmoid)):
            gate = F.conv2d(gate, w[f"{block}.{part}.weight"], w[f"{block}.{part}.bias"])
            gate = activation(gate)
        y = norm(F.conv2d(y * gate, w[f"{block}._project_conv.weight"]), w, f"{block}._bn2", eps)
        x = x + y if stride == 1 and inputs == outputs else y
        maps.append(x)
    return maps[4], maps[10]
