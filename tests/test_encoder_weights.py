"""Encoder weights against the networks they are of, computed from the same named tensors."""

import copy
import json
import pickle

import huggingface_hub.constants
import pytest
import torch
from encoder_reference import (
    ODD,
    RESNET_BLOCKS,
    Random,
    b0_by_hand,
    encoder,
    images,
    lukemelas_b0,
    normalised,
    resnet_by_hand,
    same_padding,
    symmetric_padding,
    torchvision_b0,
    torchvision_resnet,
)
from safetensors.torch import load_file, save_file
from transformers import (
    EfficientNetConfig,
    EfficientNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTModel,
)

from occfeat_train.models.encoder_weights import (
    WeightsError,
    load_encoder_weights,
    published_weights,
)

B0_CONFIG = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}


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


@pytest.mark.parametrize(
    "name, theirs, cut",
    [
        ("resnet-50", lambda: torchvision_resnet("resnet-50"), ("layer4.", "fc.")),
        ("efficientnet-b0", torchvision_b0, ("features.6.", "features.7.", "features.8.", "class")),
        ("efficientnet-b0", lukemelas_b0, (*(f"_blocks.1{i}." for i in range(1, 6)), "_conv_head")),
    ],
)
def test_what_was_loaded_goes_out_by_the_names_it_came_with(tmp_path, name, theirs, cut):
    """All that its makers' network has but the parts cut off, and the same numbers."""
    state = theirs()
    save_file(state, tmp_path / "in.safetensors")
    model = encoder(name)
    load_encoder_weights(model, str(tmp_path / "in.safetensors"))
    label, published = published_weights(model)
    kept = {k: v for k, v in state.items() if not k.startswith((*cut, "_bn1", "_fc"))}
    assert published.keys() - kept.keys() == {
        k for k in published if k.endswith("num_batches_tracked") and k not in kept
    }
    assert len(kept) > 200 and all(torch.equal(published[k], v) for k, v in kept.items())
    save_file(published, tmp_path / "out.safetensors")
    again = encoder(name)
    assert f"({label}'s names" in load_encoder_weights(again, str(tmp_path / "out.safetensors"))
    with torch.no_grad():
        for a, b in zip(*(m.eval().features(images(ODD)) for m in (model, again)), strict=True):
            assert torch.equal(a, b)


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
