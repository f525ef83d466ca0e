"""The DINOv2 teacher against the same weights computed by hand, and what is refused."""

import sys
import time

import huggingface_hub.constants
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from occfeat_targets.store.settings import ConfigError
from occfeat_targets.teachers import load_teacher
from occfeat_targets.teachers.base import (
    TeacherError,
    TeacherSettings,
    dense_features,
    describe,
    state_sha256,
)
from occfeat_targets.teachers.vit import VitTeacher

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 70,
    "patch_size": 14,
}
FLOAT32 = TeacherSettings(precision="float32")
SIZE = (56, 98)  # 4 x 7 tokens: not square, and not the 5 x 5 of the position embedding


def tiny(seed=0, registers=False):
    """A small model with no weight at its initial 0 or 1, where a missing term would not show."""
    if registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**TINY, num_register_tokens=3))
    else:
        model = Dinov2Model(Dinov2Config(**TINY))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def images(seed=0, size=SIZE, n=2):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def by_hand(model, pixels, heads, layer="last"):
    """Patch tokens after the final norm, or before it, as (B, C, h, w), in plain torch, float64."""
    w = {name: value.double() for name, value in model.state_dict().items()}

    def get(*names):  # transformers renamed the projections in version 5
        return next(w[name] for name in names if name in w)

    def linear(x, *names):
        return x @ get(*(f"{n}.weight" for n in names)).T + get(*(f"{n}.bias" for n in names))

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / (variance + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    batch, _, height, width = pixels.shape
    h, v = height // 14, width // 14
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
    patches = F.unfold((pixels.double() - mean) / std, 14, stride=14).transpose(1, 2)
    kernel = w["embeddings.patch_embeddings.projection.weight"]
    x = patches @ kernel.flatten(1).T + w["embeddings.patch_embeddings.projection.bias"]
    dim = x.shape[-1]

    position = w["embeddings.position_embeddings"]
    side = round((position.shape[1] - 1) ** 0.5)
    registers = w.get("embeddings.register_tokens")
    stretched = F.interpolate(
        position[:, 1:].view(1, side, side, dim).permute(0, 3, 1, 2),
        size=(h, v),
        mode="bicubic",
        align_corners=False,
        antialias=registers is not None,  # as the two published families were trained
    )
    x = x + stretched.flatten(2).transpose(1, 2)
    first = [(w["embeddings.cls_token"] + position[:, :1]).expand(batch, 1, dim)]
    if registers is not None:  # registers have no position
        first.append(registers.expand(batch, -1, dim))
    x = torch.cat([*first, x], dim=1)

    for k in range(model.config.num_hidden_layers):
        at = f"encoder.layer.{k}"
        y = norm(x, f"{at}.norm1")
        q, key, value = (
            linear(y, f"{at}.attention.{new}_proj", f"{at}.attention.attention.{old}")
            .view(batch, -1, heads, dim // heads)
            .transpose(1, 2)
            for new, old in [("q", "query"), ("k", "key"), ("v", "value")]
        )
        weights = (q @ key.transpose(2, 3) / (dim // heads) ** 0.5).softmax(-1)
        y = (weights @ value).transpose(1, 2).reshape(batch, -1, dim)
        y = linear(y, f"{at}.attention.o_proj", f"{at}.attention.output.dense")
        x = x + y * w[f"{at}.layer_scale1.lambda1"]
        y = linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")
        y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
        x = x + linear(y, f"{at}.mlp.fc2") * w[f"{at}.layer_scale2.lambda1"]
    if layer == "last":
        x = norm(x, "layernorm")
    x = x[:, -h * v :]
    return x.transpose(1, 2).reshape(batch, dim, h, v)


def save_tiny(folder, registers=False):
    model = tiny(registers=registers)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def config(tmp_path):
    return TeacherSettings(name=str(tmp_path), input_size=SIZE, precision="float32")


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    """Offline and with an empty cache, as on a node without internet."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))


@pytest.mark.parametrize("size", [SIZE, (98, 56), (70, 70), (140, 28)])
def test_tokens_are_those_computed_by_hand(size):
    model = tiny()
    pixels = images(size=size)
    tokens = VitTeacher(model, "tiny", FLOAT32)(pixels)
    assert tokens.dtype == torch.float32
    assert tokens.shape == (2, 32, size[0] // 14, size[1] // 14)
    torch.testing.assert_close(tokens.double(), by_hand(model, pixels, 4), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", ["last", "before_norm"])
def test_random_vit_s_tokens_are_those_computed_by_hand(layer):
    settings = TeacherSettings(name="random:5", precision="float32", layer=layer)
    teacher = load_teacher(settings)
    assert settings.size_for(teacher) == (252, 448)  # the paper's
    pixels = images(n=1)
    tokens = teacher(pixels)
    assert (teacher.dim, teacher.patch_size) == (384, 14)
    assert tokens.shape == (1, 384, 4, 7)
    torch.manual_seed(5)  # not the teacher's own weights, of which it might have lost some
    shape = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    wanted = by_hand(Dinov2Model(Dinov2Config(**shape)), pixels, 6, layer)
    torch.testing.assert_close(tokens.double(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", ["last", "before_norm"])
@pytest.mark.parametrize("registers", [False, True])
def test_local_directory_loads_and_registers_are_dropped(tmp_path, config, registers, layer):
    model = save_tiny(tmp_path, registers)
    teacher = load_teacher(config.with_(layer=layer))
    assert TeacherSettings().size_for(teacher) == (252, 448)  # the paper's
    pixels = images()
    tokens = teacher(pixels)
    assert tokens.shape == (2, 32, 4, 7)
    wanted = by_hand(model, pixels, 4, layer)
    torch.testing.assert_close(tokens.double(), wanted, atol=1e-4, rtol=1e-4)
    assert teacher.weights == state_sha256(model)


def test_random_weights_follow_the_seed():
    one, same, other = (
        load_teacher(TeacherSettings(name=f"random:{seed}", input_size=SIZE)) for seed in (3, 3, 4)
    )
    assert state_sha256(one._model) == state_sha256(same._model) != state_sha256(other._model)
    assert (one.weights, other.weights) == ("random(3)", "random(4)")
    assert not torch.allclose(one(images()), other(images()), atol=0.1)


def test_random_teacher_leaves_the_callers_random_state_alone():
    torch.manual_seed(11)
    wanted = torch.rand(3)
    torch.manual_seed(11)
    load_teacher(TeacherSettings(name="random:0", input_size=SIZE))
    assert torch.equal(torch.rand(3), wanted)


def test_weights_sha_sees_every_parameter():
    shas = {state_sha256(tiny())}
    names = list(dict(tiny().named_parameters()))
    for name in names:
        model = tiny()
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] += 1
        shas.add(state_sha256(model))
    assert len(shas) == len(names) + 1


def test_teacher_cannot_be_trained():
    model = tiny().train()
    teacher = VitTeacher(model, "tiny", FLOAT32)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not teacher(images().requires_grad_()).requires_grad


def test_description_tells_what_made_the_targets(tmp_path, config):
    model = save_tiny(tmp_path)
    assert describe(load_teacher(config), config) == {
        "name": str(tmp_path),
        "revision": "local",
        "architecture": "dinov2-32",
        "layer": "last, after the final norm",
        "input_size": list(SIZE),
        "patch_size": 14,
        "dim": 32,
        "precision": "float32",
        "weights": state_sha256(model),
    }


@pytest.mark.parametrize("holds", [True, False])
def test_a_minimal_plug_in_is_described_by_what_it_is_or_holds(holds, config):
    class Minimal:
        name, dim, patch_size = "minimal", 32, 14

        def __init__(self):
            self.model = tiny().half() if holds else None

    said = describe(Minimal(), config)
    assert said["precision"] == ("float16" if holds else "float32")
    assert said["weights"] == (state_sha256(tiny().half()) if holds else "unknown")


@pytest.mark.parametrize("size", [(56, 100), (50, 98)])
def test_input_size_must_be_a_multiple_of_the_patch(tmp_path, size):
    save_tiny(tmp_path)
    with pytest.raises(ConfigError) as error:
        load_teacher(TeacherSettings(name=str(tmp_path), input_size=size))
    assert str(list(size)) in str(error.value)
    assert "patch size 14" in str(error.value)


def assert_says_what_to_do(error):
    for words in ("model.safetensors", "config.json", "one directory", "--teacher", "random:0"):
        assert words in str(error.value)


def test_directory_without_weights_says_what_to_do(tmp_path, config):
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(TeacherError) as error:
        load_teacher(config)
    assert_says_what_to_do(error)
    assert str(tmp_path) in str(error.value)


def test_hub_id_without_internet_says_what_to_do(no_hub):
    with pytest.raises(TeacherError) as error:
        load_teacher(TeacherSettings(name="facebook/dinov2-base"))
    assert_says_what_to_do(error)
    assert "https://huggingface.co/facebook/dinov2-base" in str(error.value)


def test_a_hub_that_does_not_answer_is_asked_once(no_hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    nowhere = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere)
    began = time.monotonic()
    with pytest.raises(TeacherError, match="no answer from huggingface.co"):
        load_teacher(TeacherSettings(name="facebook/dinov2-base"))
    assert time.monotonic() - began < 5


def test_pickled_weights_are_refused(tmp_path, config):
    model = save_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(TeacherError) as error:
        load_teacher(config)
    assert_says_what_to_do(error)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", b"\xff" * 64], ids=len)
def test_damaged_weights_say_what_to_do(tmp_path, config, content):
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(TeacherError) as error:
        load_teacher(config)
    assert_says_what_to_do(error)


def test_checkpoint_without_a_layer_is_refused(tmp_path, config):
    # transformers would fill it with random weights and only log that.
    save_tiny(tmp_path)
    Dinov2Config(**(TINY | {"num_hidden_layers": 3})).save_pretrained(tmp_path)
    with pytest.raises(TeacherError) as error:
        load_teacher(config)
    assert_says_what_to_do(error)


def test_checkpoint_of_another_width_is_refused(tmp_path, config):
    save_tiny(tmp_path)
    Dinov2Config(**(TINY | {"mlp_ratio": 2})).save_pretrained(tmp_path)
    with pytest.raises(TeacherError) as error:
        load_teacher(config)
    assert_says_what_to_do(error)


def test_other_architectures_are_refused(tmp_path, config):
    shape = {**TINY, "intermediate_size": 64}
    ViTModel(ViTConfig(**shape)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="package.module:factory"):
        load_teacher(config)


@pytest.mark.parametrize("name", ["random:", "random:x", "random:-1", "random:1.5"])
def test_random_seed_must_be_a_whole_number(name):
    with pytest.raises(ConfigError, match="whole number"):
        load_teacher(TeacherSettings(name=name))


PLUGIN = """
import torch

class Teacher:
    name, dim, patch_size = "plug-in", 2, 14
    def __call__(self, images):
        return images[:, :2, ::14, ::14]

class Short(Teacher):
    def __call__(self, images):
        return images[:, :2, ::14, 14::14]

class Nameless:
    dim, patch_size = 2, 14

class Dimless:
    name, patch_size = "dimless", 14

class Patchless:
    name, dim = "patchless", 2
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Name of an importable module that holds plug-in teachers."""
    (tmp_path / "teacher_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "teacher_plugin"
    sys.modules.pop("teacher_plugin", None)


def pictures(n=2):
    return [Image.new("RGB", SIZE[::-1], (255, 51 * k, 0)) for k in range(n)]


def test_plugin_sees_rgb_in_0_to_1(plugin):
    teacher = load_teacher(TeacherSettings(name=f"{plugin}:Teacher", input_size=SIZE))
    features = dense_features(teacher, pictures(), SIZE)
    assert features.shape == (2, 2, 4, 7)
    assert (features[:, 0] == 1).all()
    torch.testing.assert_close(features[:, 1, 0, 0], torch.tensor([0.0, 0.2]))


def test_plugin_with_the_wrong_shape_is_refused(plugin):
    teacher = load_teacher(TeacherSettings(name=f"{plugin}:Short", input_size=SIZE))
    with pytest.raises(TeacherError, match=r"\(2, 2, 4, 6\), promised \(2, 2, 4, 7\)"):
        dense_features(teacher, pictures(), SIZE)


@pytest.mark.parametrize(
    ("factory", "attribute"),
    [("Nameless", "name"), ("Dimless", "dim"), ("Patchless", "patch_size")],
)
def test_plugin_without_an_attribute_is_refused(plugin, factory, attribute):
    with pytest.raises(TeacherError, match=f"no attribute '{attribute}'"):
        load_teacher(TeacherSettings(name=f"{plugin}:{factory}", input_size=SIZE))


@pytest.mark.parametrize("name", ["no_such_module_here:Teacher", "{plugin}:NoSuchFactory"])
def test_plugin_that_cannot_be_imported_is_refused(plugin, name):
    name = name.format(plugin=plugin)
    with pytest.raises(ConfigError, match="PYTHONPATH") as error:
        load_teacher(TeacherSettings(name=name, input_size=SIZE))
    assert name in str(error.value)


def test_plugins_input_size_must_be_a_multiple_of_its_patch(plugin):
    with pytest.raises(ConfigError, match="patch size 14"):
        load_teacher(TeacherSettings(name=f"{plugin}:Teacher", input_size=(56, 99)))
