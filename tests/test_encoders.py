"""Image encoders: the cut, the joining and stochastic depth."""

import math
import subprocess
import sys

import pytest
import torch
from encoder_reference import ODD, RESNET_BLOCKS, RESNET_WIDTHS, b0_blocks, encoder, images
from torch import nn
from torch.nn import functional as F

from occfeat_train.models.encoders import ENCODERS, DropPath, ImageEncoder


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
    rates = [m.p for m in model.modules() if isinstance(m, DropPath)]
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
