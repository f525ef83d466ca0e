"""Loads pretrained weights into an ``ImageEncoder``: strictly, or not at all.

Every tensor of the encoder's backbone must be in the source with the right shape, and the source
may hold nothing else but the parts that were cut off (layer4, the later blocks, heads). Which name
means which is written out here for each naming: transformers', torchvision's (also that of timm's
and MoCo's ResNets) and efficientnet_pytorch's. The paper's ResNet-50 is that of
https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar

EfficientNets from torchvision were trained with symmetric padding and another epsilon in the batch
norms than those from TensorFlow. The backbone is set to what its weights were trained with, and its
state dict keeps that (``EfficientNetBackbone``).
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from occfeat_train.models.encoders import ENCODERS, EfficientNetBackbone, EncoderSpec, ImageEncoder

_PICKLED = (".pth", ".pt", ".tar")  # .tar: MoCo's .pth.tar is no archive, only named so
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_MOCO_QUERY = "module.encoder_q."
_MOCO_OTHER = ("module.encoder_k.", "module.queue")


class WeightsError(RuntimeError):
    """Weights can't be had, or are not those of the encoder; the message says what to do."""


@dataclass(frozen=True)
class _Naming:
    """How a source calls the modules of a backbone: ``modules`` maps our names to its names.

    ``cut`` is a pattern of the names of what we cut off.
    """

    label: str
    modules: dict[str, str]
    cut: str
    torchvision: bool = False


def load_encoder_weights(encoder: ImageEncoder, source: str) -> str:
    """Load weights into an encoder's backbone, which stays as it was if that fails.

    Args:
        encoder: changed in place; what joins its two maps has no pretrained weights.
        source: ``random`` (keep what the encoder has), ``imagenet`` (the encoder's usual weights on
            the Hugging Face hub), another hub id ``org/name``, a directory with config.json and
            model.safetensors in transformers' format, or a file (.safetensors, .pth, .pt, .tar)
            that holds torchvision's or efficientnet_pytorch's names or a MoCo-v2 checkpoint, of
            which the query encoder is taken.

    Returns:
        One sentence that says what was loaded from where.

    Raises:
        WeightsError: the source can't be had or read, or is not this architecture.
    """
    if source == "random":
        return f"{encoder.name}: nothing loaded, random initial weights."
    spec = ENCODERS[encoder.name]
    place = spec.hub_id if source == "imagenet" else source
    path = Path(place).expanduser()
    is_hub_id = not (path.exists() or names_file(place)) and _HUB_ID.fullmatch(place)
    try:
        if path.is_dir():
            origin = _load_transformers(encoder, path / "config.json", path / "model.safetensors")
        elif is_hub_id:
            origin = _load_transformers(encoder, *_download(encoder, place))
        elif path.is_file() or names_file(place):
            origin = _load_file(encoder, path)
        else:
            raise WeightsError(f"there is no file or directory {place}")
    except WeightsError as error:
        advice = _advice(spec, place if is_hub_id else spec.hub_id)
        raise WeightsError(f"{error}.\n{advice}") from error.__cause__
    return f"{encoder.name}: loaded {origin} of {place}."


def names_file(source: str) -> bool:
    """Whether ``source`` of :func:`load_encoder_weights` is a file's name, by its ending."""
    return Path(source).suffix in (".safetensors", *_PICKLED)


def _load_transformers(encoder: ImageEncoder, config: Path, weights: Path) -> str:
    spec = ENCODERS[encoder.name]
    try:
        _check_config(spec, json.loads(config.read_text()))
        state = load_file(weights)
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsError(
            f"cannot load a {encoder.name} from {weights.parent}: {_first_line(error)} (pickled "
            ".bin files are not read)"
        ) from error
    prefix = f"{spec.family}."  # of models with a head
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    count = _load(encoder, state, _transformers_naming(encoder), str(weights.parent))
    return f"{count} tensors from {weights.name} (sha256 {_sha256(weights)})"


def _load_file(encoder: ImageEncoder, path: Path) -> str:
    state, moco = _unwrap(_read(path))
    namings = _file_namings(ENCODERS[encoder.name])

    def known(naming: _Naming) -> int:
        return sum(f"{theirs}.weight" in state for theirs in naming.modules.values())

    naming = max(namings, key=known)
    if not known(naming):
        accepted = (f"{n.label} ({next(iter(n.modules.values()))}.weight)" for n in namings)
        raise WeightsError(
            f"{path} has none of the names of a {encoder.name}; it has {_some(state)}. Known in "
            f"a file are the names of {', '.join(accepted)}; of a model in transformers' format, "
            "pass the directory that has its config.json"
        )
    count = _load(encoder, state, naming, str(path))
    label = "MoCo's query encoder" if moco else f"{naming.label}'s names"
    return f"{count} tensors ({label}, file sha256 {_sha256(path)})"


def _load(encoder: ImageEncoder, state: dict, naming: _Naming, where: str) -> int:
    """Check all, then copy all; returns the number of tensors."""
    backbone = encoder.backbone
    targets = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
    pairs = {}
    for name, target in targets.items():
        module, _, leaf = name.rpartition(".")
        theirs = f"{naming.modules[module]}.{leaf}"
        # A counter that nothing reads and that old files don't have.
        if theirs in state or leaf != "num_batches_tracked":
            pairs[theirs] = target
    missing = [name for name in pairs if name not in state]
    unknown = [name for name in state.keys() - pairs.keys() if not re.match(naming.cut, name)]
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(target.shape)}"
        for name, target in pairs.items()
        if name in state and state[name].shape != target.shape
    ]
    problems = {"missing": missing, "of another shape": misshapen, "unknown": sorted(unknown)}
    if any(problems.values()):
        found = "; ".join(f"{len(v)} {k}: {_some(v)}" for k, v in problems.items() if v)
        raise WeightsError(
            f"{where} does not hold the weights of a {encoder.name}, tensors are {found}. Nothing "
            "was loaded"
        )
    with torch.no_grad():
        for name, target in pairs.items():
            target.copy_(state[name])
    if isinstance(backbone, EfficientNetBackbone):
        backbone.set_convention(torchvision=naming.torchvision)
    return len(pairs)


def _transformers_naming(encoder: ImageEncoder) -> _Naming:
    modules = {
        name: f"encoder.{name}" if name.startswith(("stages.", "blocks.")) else name
        for name, _ in encoder.backbone.named_modules()
    }
    if ENCODERS[encoder.name].family == "resnet":
        return _Naming("transformers", modules, r"encoder\.stages\.3\.|classifier\.")
    cut = rf"{_later_blocks('encoder.blocks')}|encoder\.top_(conv|bn)\.|classifier\."
    return _Naming("transformers", modules, cut)


def _file_namings(spec: EncoderSpec) -> list[_Naming]:
    if spec.family == "resnet":
        return [_Naming("torchvision", _torchvision_resnet(spec), r"layer4\.|fc\.")]
    torchvision, lukemelas = _efficientnet(spec)
    cut = rf"{_later_blocks('_blocks')}|_conv_head\.|_bn1\.|_fc\."
    return [
        _Naming("torchvision", torchvision, r"features\.[678]\.|classifier\.", torchvision=True),
        _Naming("efficientnet_pytorch", lukemelas, cut),
    ]


def _later_blocks(blocks: str) -> str:
    """Pattern of the blocks 11 to 15 of an EfficientNet-B0."""
    return rf"{re.escape(blocks)}\.1[1-5]\."


def _torchvision_resnet(spec: EncoderSpec) -> dict[str, str]:
    names = {
        "embedder.embedder.convolution": "conv1",
        "embedder.embedder.normalization": "bn1",
    }
    for stage, depth in enumerate(spec.config["depths"]):
        for block in range(depth):
            ours, theirs = f"stages.{stage}.layers.{block}", f"layer{stage + 1}.{block}"
            for i in range(3):
                names[f"{ours}.layer.{i}.convolution"] = f"{theirs}.conv{i + 1}"
                names[f"{ours}.layer.{i}.normalization"] = f"{theirs}.bn{i + 1}"
            if block == 0:
                names[f"{ours}.shortcut.convolution"] = f"{theirs}.downsample.0"
                names[f"{ours}.shortcut.normalization"] = f"{theirs}.downsample.1"
    return names


_BLOCK = (  # parts of an EfficientNet's block: ours, torchvision's, efficientnet_pytorch's
    ("expansion.expand_conv", "0.0", "_expand_conv"),
    ("expansion.expand_bn", "0.1", "_bn0"),
    ("depthwise_conv.depthwise_conv", "1.0", "_depthwise_conv"),
    ("depthwise_conv.depthwise_norm", "1.1", "_bn1"),
    ("squeeze_excite.reduce", "2.fc1", "_se_reduce"),
    ("squeeze_excite.expand", "2.fc2", "_se_expand"),
    ("projection.project_conv", "3.0", "_project_conv"),
    ("projection.project_bn", "3.1", "_bn2"),
)


def _efficientnet(spec: EncoderSpec) -> tuple[dict[str, str], dict[str, str]]:
    """Modules of torchvision's and efficientnet_pytorch's EfficientNet."""
    torchvision = {"embeddings.convolution": "features.0.0", "embeddings.batchnorm": "features.0.1"}
    lukemelas = {"embeddings.convolution": "_conv_stem", "embeddings.batchnorm": "_bn0"}
    index = 0
    stages = zip(spec.config["num_block_repeats"], spec.config["expand_ratios"], strict=True)
    for stage, (repeats, ratio) in enumerate(stages, start=1):
        # torchvision numbers the parts: without the expansion the others are one less.
        parts = _BLOCK if ratio != 1 else _BLOCK[2:]
        for block in range(repeats):
            for ours, theirs, other in parts:
                number = int(theirs[0]) - (ratio == 1)
                theirs = f"features.{stage}.{block}.block.{number}{theirs[1:]}"
                torchvision[f"blocks.{index}.{ours}"] = theirs
                lukemelas[f"blocks.{index}.{ours}"] = f"_blocks.{index}.{other}"
            index += 1
    return torchvision, lukemelas


def _check_config(spec: EncoderSpec, config: object) -> None:
    """Compare what shapes of tensors don't tell: strides, epsilon, which network this is at all.

    Raises:
        ValueError: it is another network.
    """
    if not isinstance(config, dict):
        raise ValueError("config.json holds no settings")
    if config.get("model_type") != spec.family:
        raise ValueError(f"config.json is that of a {config.get('model_type')}")
    for key, ours in spec.config.items():
        theirs = config.get(key, ours)
        if isinstance(ours, tuple) and isinstance(theirs, list):
            theirs = tuple(theirs[: len(ours)])  # we keep the first stages
        if theirs != ours:
            raise ValueError(f"config.json has {key} {theirs}, wanted is {ours}")


def _download(encoder: ImageEncoder, hub_id: str) -> tuple[Path, Path]:
    """Paths of config.json and model.safetensors of a hub model, in the cache or fetched."""
    from huggingface_hub import hf_hub_download

    try:
        files = [hf_hub_download(hub_id, name) for name in ("config.json", "model.safetensors")]
    except Exception as error:  # those of its HTTP client have no other base
        raise WeightsError(
            f"cannot get the {encoder.name} weights {hub_id}: no directory of that name is here, "
            f"and the Hugging Face hub did not give them ({_first_line(error)})"
        ) from error
    return Path(files[0]), Path(files[1])


def _read(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} can't be read with weights_only: it holds other objects than tensors, or is "
            "no PyTorch file. Objects are not unpickled, because that runs code. If you trust the "
            "file, load it yourself and save its state dict with safetensors.torch.save_file"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError) as error:
        raise WeightsError(f"cannot read {path}: {_first_line(error)}") from error


def _unwrap(content: object) -> tuple[dict[str, torch.Tensor], bool]:
    """The state dict in a file without a wrapper's prefix, and whether it is MoCo's."""
    inner = content.get("state_dict", content) if isinstance(content, dict) else None
    items = inner.items() if isinstance(inner, dict) else ()
    state = {str(name): value for name, value in items if isinstance(value, torch.Tensor)}
    if any(name.startswith(_MOCO_QUERY) for name in state):
        kept = {name: v for name, v in state.items() if not name.startswith(_MOCO_OTHER)}
        return {name.removeprefix(_MOCO_QUERY): v for name, v in kept.items()}, True
    return {name.removeprefix("module."): v for name, v in state.items()}, False


def _advice(spec: EncoderSpec, hub_id: str) -> str:
    file = "or MoCo-v2 (.pth.tar)" if spec.family == "resnet" else "or efficientnet_pytorch (.pth)"
    return (
        "On a machine with internet, fetch config.json and model.safetensors of "
        f"https://huggingface.co/{hub_id}, put both into one directory and pass it: "
        "--set model.encoder_weights=DIR. A file of this architecture from torchvision (.pth, "
        f".safetensors) {file} can be passed in the same way. --set model.encoder_weights=random "
        "starts from random weights."
    )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "no tensors"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
