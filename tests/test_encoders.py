"""Image encoders against the networks they are cut from, computed here from named tensors."""

import copy
import json
import math
import pickle
import subprocess
import sys

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    EfficientNetConfig,
    EfficientNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTModel,
)

from occfeat_train.models.encoder_weights import WeightsError, load_encoder_weights
from occfeat_train.models.encoders import ENCODERS, DropPath, ImageEncoder

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
B0_CONFIG = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
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


# ---------------------------------------------------------------------------------------- the cut


@pytest.mark.parametrize("name", ENCODERS)
def test_output_is_an_eighth_rounded_up(name):
    model = encoder(name, channels=24).eval()
    with torch.no_grad():
        for height, width in ((64, 112), (90, 160), (45, 77), (224, 400)):
            wanted = (1, 24, math.ceil(height / 8), math.ceil(width / 8))
            assert model(images((height, width))).shape == wanted
        shallow, deep = model.features(images((72, 136)))
    spec = ENCODERS[name]
    assert shallow.shape == (1, spec.shallow, 9, 17)
    assert deep.shape == (1, spec.deep, 5, 9)


def resnet_parameters(name):
    count, inputs = 64 * 3 * 49 + 2 * 64, 64
    for blocks, width in zip(RESNET_BLOCKS[name], RESNET_WIDTHS, strict=True):
        outputs = 4 * width
        count += inputs * outputs + 2 * outputs  # the shortcut
        for _ in range(blocks):
            count += inputs * width + 9 * width * width + width * outputs
            count += 2 * (width + width + outputs)
            inputs = outputs
    return count


def b0_parameters():
    count = 32 * 3 * 9 + 2 * 32
    for _, _, ratio, kernel, _, inputs, outputs in b0_blocks():
        inner, squeezed = ratio * inputs, inputs // 4
        count += inner * inputs + 2 * inner if ratio > 1 else 0
        count += inner * kernel**2 + 2 * inner
        count += 2 * inner * squeezed + squeezed + inner
        count += inner * outputs + 2 * outputs
    return count


@pytest.mark.parametrize(
    ("name", "backbone", "maps", "joined"),
    [
        ("efficientnet-b0", b0_parameters(), 40 + 112, 128),
        ("resnet-50", resnet_parameters("resnet-50"), 512 + 1024, 512),
        ("resnet-101", resnet_parameters("resnet-101"), 512 + 1024, 512),
    ],
)
def test_parameters_are_those_of_the_published_tables(name, backbone, maps, joined):
    model = encoder(name)
    assert sum(p.numel() for p in model.backbone.parameters()) == backbone
    head = 9 * maps * joined + 9 * joined * joined + joined * 128 + 128
    assert sum(p.numel() for p in model.parameters()) == backbone + head


@pytest.mark.parametrize("name", ENCODERS)
def test_every_parameter_gets_a_gradient(name):
    """Also those of blocks that are dropped: DDP waits for every one of them."""
    model = encoder(name, drop_path=0.5)
    (model(images((64, 64), n=2)) * torch.randn(1, 128, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model = encoder(name, drop_path=0)
    (model(images((64, 64), n=2)) * torch.randn(1, 128, 8, 8)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_joining_puts_the_shallow_map_first_and_takes_its_size():
    model = encoder("efficientnet-b0", channels=5).eval().double()
    pixels = images(ODD).double()
    with torch.no_grad():
        shallow, deep = model.features(pixels)
        assert (shallow.shape[-2:], deep.shape[-2:]) == ((12, 10), (6, 5))
        x = torch.cat([shallow, F.interpolate(deep, (12, 10), mode="bilinear")], dim=1)
        for conv in (model.join[0], model.join[3]):
            x = F.conv2d(x, conv.weight, padding=1)
            centred = x - x.mean((2, 3), keepdim=True)
            x = (centred / (centred.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()).relu()
        x = F.conv2d(x, model.project.weight, model.project.bias)
        torch.testing.assert_close(model(pixels), x)


def test_batch_norms_of_the_efficientnet_have_pytorchs_momentum():
    model = encoder("efficientnet-b0")
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 1 + 3 * 11 - 1
    assert {(m.momentum, m.eps) for m in norms} == {(0.01, 1e-3)}


def test_random_weights_let_the_signal_through():
    with torch.no_grad():
        shallow, deep = encoder("efficientnet-b0").train().features(images((128, 128), n=2))
    assert shallow.std() > 0.5
    assert deep.std() > 0.5


def test_runs_in_bfloat16():
    model = encoder("efficientnet-b0")
    with torch.autocast("cpu", torch.bfloat16):
        features = model(images(n=2))
    assert features.dtype == torch.bfloat16
    features.float().sum().backward()


def test_importing_does_not_load_transformers():
    code = (
        "import sys, occfeat_train.models.encoder_weights; "
        "sys.exit(any(m in sys.modules for m in ('transformers', 'huggingface_hub')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("settings", [{"name": "resnet-18"}, {"drop_path": 1.0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=r"resnet-18.*efficientnet-b0|drop_path.*1\.0"):
        ImageEncoder(**({"name": "efficientnet-b0"} | settings))


# -------------------------------------------------------------------------------- stochastic depth


def freeze_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


@pytest.mark.parametrize(("rate", "same"), [(0, True), (0.5, False)])
def test_drop_path_is_what_makes_training_random(rate, same):
    model = freeze_norms(encoder("efficientnet-b0", drop_path=rate).train())
    with torch.no_grad():
        first, second = (model(images((64, 64), n=4)) for _ in range(2))
        evaluated = model.eval()(images((64, 64), n=4))
    assert torch.equal(first, second) == same
    assert torch.equal(first, evaluated) == same


def test_drop_path_rises_with_the_block():
    model = encoder("efficientnet-b0", drop_path=0.2)
    rates = [m.rate for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.2 * i / 11 for i in range(11)])


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.rand(4000, 2, 3, 1) + 1
    dropped = DropPath(0.2)(x)
    kept = dropped.flatten(1).any(1)
    assert kept.float().mean() == pytest.approx(0.8, abs=0.03)
    torch.testing.assert_close(dropped[kept], x[kept] / 0.8)
    assert not dropped[~kept].any()
    assert DropPath(0.2).eval()(x) is x
    assert DropPath(0)(x) is x


# ------------------------------------------------------------------------------ weights from files


def check_features(model, pixels, wanted):
    with torch.no_grad():
        found = copy.deepcopy(model).eval().double().features(pixels.double())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def resnet50_state():
    return torchvision_resnet("resnet-50")


@pytest.mark.parametrize("name", RESNET_BLOCKS)
def test_resnet_from_torchvision_names(tmp_path, name):
    state = torchvision_resnet(name)
    torch.save(state, tmp_path / "weights.pth")
    model = encoder(name)
    said = load_encoder_weights(model, str(tmp_path / "weights.pth"))
    convolutions = 1 + 3 * sum(RESNET_BLOCKS[name]) + 3
    assert f"{name}: loaded {6 * convolutions} tensors (torchvision's names, file sha256" in said
    check_features(model, images(ODD), resnet_by_hand(state, images(ODD), name))


def test_resnet_from_moco_takes_the_query_encoder(tmp_path, resnet50_state):
    query = {f"module.encoder_q.{name}": value for name, value in resnet50_state.items()}
    key = {f"module.encoder_k.{name}": torch.zeros_like(v) for name, v in resnet50_state.items()}
    head = {"module.encoder_q.fc.0.weight": torch.ones(2, 2), "module.encoder_k.fc.2.bias": key}
    queue = {"module.queue": torch.ones(2, 3), "module.queue_ptr": torch.zeros(1)}
    checkpoint = {"epoch": 800, "arch": "resnet50", "optimizer": {"state": {}}}
    path = tmp_path / "moco.pth.tar"
    torch.save({**checkpoint, "state_dict": key | head | queue | query}, path)
    model = encoder("resnet-50")
    said = load_encoder_weights(model, str(path))
    assert "MoCo's query encoder" in said
    assert str(path) in said
    check_features(model, images(), resnet_by_hand(resnet50_state, images(), "resnet-50"))


def test_old_files_without_counters_and_with_ddp_prefix(tmp_path, resnet50_state):
    state = {
        f"module.{name}": value
        for name, value in resnet50_state.items()
        if not name.endswith("num_batches_tracked")
    }
    save_file(state, tmp_path / "old.safetensors")
    model = encoder("resnet-50")
    load_encoder_weights(model, str(tmp_path / "old.safetensors"))
    check_features(model, images(), resnet_by_hand(resnet50_state, images(), "resnet-50"))


@pytest.mark.parametrize("size", [(64, 96), ODD])
def test_efficientnet_from_efficientnet_pytorch_names(tmp_path, size):
    torch.save(lukemelas_b0(), tmp_path / "b0.pth")
    model = encoder("efficientnet-b0")
    said = load_encoder_weights(model, str(tmp_path / "b0.pth"))
    tensors = 2 * 6 + 11 * (3 * 6 + 4) - 2 * 6 + 6  # less the first block's expansion
    assert f"loaded {tensors - 6} tensors (efficientnet_pytorch's names" in said
    wanted = b0_by_hand(lukemelas_b0(), images(size), same_padding, eps=1e-3)
    check_features(model, images(size), wanted)


@pytest.mark.parametrize("size", [(64, 96), ODD])
def test_efficientnet_from_torchvision_pads_and_normalises_as_it_was_trained(tmp_path, size):
    save_file(torchvision_b0(), tmp_path / "b0.safetensors")
    model = encoder("efficientnet-b0")
    assert "torchvision's names" in load_encoder_weights(model, str(tmp_path / "b0.safetensors"))
    wanted = b0_by_hand(lukemelas_b0(), images(size), symmetric_padding, eps=1e-5)
    check_features(model, images(size), wanted)
    again = encoder("efficientnet-b0")
    again.load_state_dict(model.state_dict())  # a checkpoint keeps the convention
    check_features(again, images(size), wanted)
    torch.save(lukemelas_b0(), tmp_path / "b0.pth")
    load_encoder_weights(again, str(tmp_path / "b0.pth"))  # and other weights bring theirs
    check_features(
        again, images(size), b0_by_hand(lukemelas_b0(), images(size), same_padding, eps=1e-3)
    )


# ------------------------------------------------------- weights from directories and from the hub


def save_b0(path, **settings):
    model = EfficientNetForImageClassification(EfficientNetConfig(**B0_CONFIG | settings))
    Random().fill(model).save_pretrained(path)
    return model


def test_efficientnet_from_a_transformers_directory(tmp_path):
    source = save_b0(tmp_path)
    model = encoder("efficientnet-b0").eval()
    before = model(images())
    said = load_encoder_weights(model, str(tmp_path))
    assert said.startswith("efficientnet-b0: loaded ")
    assert "tensors from model.safetensors (sha256 " in said
    assert not torch.allclose(model(images()), before)
    with torch.no_grad():
        states = source.efficientnet.double()(
            normalised(images((224, 224))), output_hidden_states=True
        ).hidden_states
    check_features(model, images((224, 224)), (states[5], states[11]))


def test_resnet_from_a_transformers_directory(tmp_path):
    source = Random().fill(ResNetForImageClassification(ResNetConfig()))
    source.save_pretrained(tmp_path)
    model = encoder("resnet-50")
    load_encoder_weights(model, str(tmp_path))
    with torch.no_grad():
        states = source.resnet.double()(normalised(images()), output_hidden_states=True)
    check_features(model, images(), states.hidden_states[2:4])
    with pytest.raises(WeightsError, match=r"depths \(3, 4, 6\), wanted is \(3, 4, 23\)"):
        load_encoder_weights(encoder("resnet-101"), str(tmp_path))


def assert_unchanged(model, before):
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_random_keeps_the_weights():
    model = encoder("efficientnet-b0")
    before = copy.deepcopy(model.state_dict())
    said = load_encoder_weights(model, "random")
    assert said == "efficientnet-b0: nothing loaded, random initial weights."
    assert_unchanged(model, before)


# --------------------------------------------------------------------------------- what is refused


def refused(source, name="efficientnet-b0"):
    """The message of the error, after which the encoder is as it was and the way out is told."""
    model = encoder(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WeightsError) as error:
        load_encoder_weights(model, str(source))
    assert_unchanged(model, before)
    message = str(error.value)
    for part in (name, "config.json", "model.safetensors", "--set model.encoder_weights=random"):
        assert part in message
    return message


def test_missing_misshapen_and_unknown_tensors_are_named(tmp_path):
    state = lukemelas_b0()
    del state["_blocks.3._se_reduce.bias"]
    state["_conv_stem.weight"] = torch.ones(32, 4, 3, 3)
    state |= {"_blocks.16._bn0.weight": torch.ones(1), "adapter.weight": torch.ones(1)}
    torch.save(state, tmp_path / "b0.pth")
    message = refused(tmp_path / "b0.pth")
    assert "1 missing: _blocks.3._se_reduce.bias" in message
    assert "_conv_stem.weight (32, 4, 3, 3) instead of (32, 3, 3, 3)" in message
    assert "2 unknown: _blocks.16._bn0.weight, adapter.weight" in message
    assert str(tmp_path / "b0.pth") in message


def test_a_deeper_resnet_is_refused(tmp_path):
    torch.save(torchvision_resnet("resnet-101"), tmp_path / "rn101.pth")
    message = refused(tmp_path / "rn101.pth", "resnet-50")
    assert "unknown: layer3.10." in message
    assert ", ..." in message


def test_files_with_other_names_are_refused(tmp_path):
    torch.save(torchvision_b0(), tmp_path / "b0.pth")
    message = refused(tmp_path / "b0.pth", "resnet-50")
    assert "none of the names of a resnet-50; it has features.0.0.weight" in message
    assert "torchvision (conv1.weight)" in message
    for content in ([1, 2], {"state_dict": 3}, {"epoch": 3}):
        torch.save(content, tmp_path / "other.pt")
        assert "it has no tensors" in refused(tmp_path / "other.pt")


class Innocent:
    """An object that a checkpoint may hold; unpickling it leaves a trace."""

    unpickled = False

    def __setstate__(self, state):
        Innocent.unpickled = True


def test_pickled_objects_are_not_unpickled(tmp_path):
    harmful = Innocent()
    harmful.x = 1
    torch.save({"state_dict": lukemelas_b0(), "config": harmful}, tmp_path / "b0.pth")
    message = refused(tmp_path / "b0.pth")
    assert "can't be read with weights_only" in message
    assert "save_file" in message
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(harmful, protocol=2))
    refused(tmp_path / "plain.pth")
    assert not Innocent.unpickled


@pytest.mark.parametrize("name", ["b0.pth", "b0.safetensors", "b0.pth.tar"])
@pytest.mark.parametrize("content", [None, b"", b"<html>Not found</html>" * 20])
def test_unreadable_files_are_named(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in refused(tmp_path / name)


def test_directories_of_something_else_are_refused(tmp_path):
    assert f"efficientnet-b0 from {tmp_path}" in refused(tmp_path)  # an empty one
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ViTModel(ViTConfig(**shape, intermediate_size=8)).save_pretrained(tmp_path)
    assert "that of a vit" in refused(tmp_path)


def test_directories_of_other_efficientnets_are_refused(tmp_path):
    save_b0(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"batch_norm_eps": 1e-5}))
    assert "batch_norm_eps 1e-05, wanted is 0.001" in refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    del tensors["efficientnet.encoder.blocks.2.projection.project_bn.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert "1 missing: encoder.blocks.2.projection.project_bn.bias" in refused(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path)


def test_paths_that_are_not_there(tmp_path):
    missing = tmp_path / "weights" / "b0"
    assert f"no file or directory {missing}" in refused(missing)
    assert "no file or directory efficientnet" in refused("efficientnet")


@pytest.mark.parametrize(
    ("source", "hub_id"),
    [("imagenet", "google/efficientnet-b0"), ("someone/b0", "someone/b0")],
)
def test_hub_without_internet_says_what_to_do(tmp_path, monkeypatch, source, hub_id):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    message = refused(source)
    assert f"https://huggingface.co/{hub_id}," in message
    assert f"weights {hub_id}: no directory of that name" in message


def test_hub_id_loads_what_the_hub_gives(tmp_path, monkeypatch):
    save_b0(tmp_path)
    asked = []

    def download(hub_id, name):
        asked.append((hub_id, name))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model = encoder("efficientnet-b0")
    assert load_encoder_weights(model, "imagenet").endswith("of google/efficientnet-b0.")
    assert asked == [("google/efficientnet-b0", n) for n in ("config.json", "model.safetensors")]
