"""Frozen image models that give dense features: DINOv2, the same ViT with random weights, plug-ins.

A teacher is any object with ``name`` (str), ``dim`` (int), ``patch_size`` (int) and
``__call__(images: float32 (B, 3, H, W) in 0..1) -> (B, dim, H / patch_size, W / patch_size)``,
RGB in, torch tensors both. A plug-in should also carry ``weights``, a string that identifies its
parameters (a ``torch.nn.Module`` gets the hash of its state), so that a build is not continued with
others. It is called without gradients; on a GPU worker from several threads at once.

``none`` is the teacher of a store without features: of no channels, and never called.
"""

from __future__ import annotations

import hashlib
import importlib
import threading
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from occfeat_common.settings import ConfigError
from occfeat_targets.config import TeacherConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_DINO_TYPES = ("dinov2", "dinov2_with_registers")


class TeacherError(RuntimeError):
    """The teacher can't be had or does not do what it promised; the message says what to do."""


class Teacher(Protocol):
    """What the pipeline asks of a teacher."""

    name: str
    dim: int
    patch_size: int

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Dense features (B, dim, H / patch_size, W / patch_size) of RGB images in 0..1."""
        ...


class DinoTeacher:
    """DINOv2 patch tokens of the last layer, after the final norm.

    CLS and register tokens are dropped; the position embedding is interpolated to the token grid
    by explicit size. No image processor: the caller resizes.
    """

    layer = "last, after the final norm"

    def __init__(self, model: torch.nn.Module, name: str, precision: str, weights: str = ""):
        self.name = name
        self.revision = getattr(model.config, "_commit_hash", None) or "local"
        self.architecture = f"{model.config.model_type}-{model.config.hidden_size}"
        self.dim = model.config.hidden_size
        self.patch_size = model.config.patch_size
        self.weights = weights or state_sha256(model)
        self._prefix = 1 + getattr(model.config, "num_register_tokens", 0)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = _dtype(precision, self._device)
        self.precision = str(self._dtype).removeprefix("torch.")
        self._model = model.eval().requires_grad_(False).to(self._device)
        self._mean = torch.tensor(IMAGENET_MEAN, device=self._device).view(3, 1, 1)
        self._std = torch.tensor(IMAGENET_STD, device=self._device).view(3, 1, 1)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features float32 (B, dim, h, w) on the CPU of RGB images (B, 3, H, W) in 0..1."""
        h, w = (side // self.patch_size for side in images.shape[-2:])
        pixels = (images.to(self._device) - self._mean) / self._std
        with torch.autocast(self._device.type, self._dtype, self._dtype != torch.float32):
            tokens = self._model(pixel_values=pixels).last_hidden_state[:, self._prefix :]
        return tokens.float().cpu().unflatten(1, (h, w)).permute(0, 3, 1, 2)


class NoTeacher:
    """Stands where a teacher would, in a store without features."""

    name = "none"
    weights = "none"
    dim = 0
    patch_size = 1

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Nothing of each pixel."""
        return images[:, :0]


def load_teacher(config: TeacherConfig) -> Teacher:
    """The teacher that a config names, checked against the input size.

    Raises:
        ConfigError: the name makes no sense, or the input size is no multiple of the patch.
        TeacherError: weights or plug-in can't be loaded.
    """
    if config.name == NoTeacher.name:
        teacher: Teacher = NoTeacher()
    elif config.name.startswith("random:"):
        teacher = _random_teacher(config)
    elif ":" in config.name:
        teacher = _plugin(config.name)
    else:
        teacher = _pretrained(config)
    if any(side % teacher.patch_size for side in config.input_size):
        raise ConfigError(
            f"teacher.input_size {list(config.input_size)} must be multiples of the patch size "
            f"{teacher.patch_size} of {config.name}"
        )
    return teacher


def describe(teacher: Teacher, config: TeacherConfig) -> dict:
    """The store's ``teacher`` attribute: which model, weights, layer and size made the targets."""

    def text(attribute: str, otherwise: str = "unknown") -> str:
        value = getattr(teacher, attribute, None)
        return value if isinstance(value, str) else otherwise  # a module may have a .layer

    return {
        "name": teacher.name,
        "revision": text("revision"),
        "architecture": text("architecture", type(teacher).__name__),
        "layer": text("layer"),
        "input_size": list(config.input_size),
        "patch_size": int(teacher.patch_size),
        "dim": int(teacher.dim),
        "precision": text("precision"),
        "weights": text("weights") if hasattr(teacher, "weights") else _plugin_weights(teacher),
    }


def _plugin_weights(teacher: Teacher) -> str:
    return state_sha256(teacher) if isinstance(teacher, torch.nn.Module) else "unknown"


def dense_features(
    teacher: Teacher, images: list[Image.Image], input_size: tuple[int, int]
) -> torch.Tensor:
    """Run the teacher once on images already resized to ``input_size``.

    Returns:
        float32 CPU tensor (N, C, h, w).

    Raises:
        TeacherError: when the shape is not what ``dim`` and ``patch_size`` promise.
    """
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    with torch.inference_mode():
        features = teacher(pixels.permute(0, 3, 1, 2).float().div_(255))
    h, w = (side // teacher.patch_size for side in input_size)
    wanted = (len(images), teacher.dim, h, w)
    if tuple(features.shape) != wanted:
        raise TeacherError(
            f"teacher {teacher.name} returned shape {tuple(features.shape)}, promised {wanted}"
        )
    return features.float().cpu()


def state_sha256(model: torch.nn.Module) -> str:
    """sha256 over a model's parameters, whatever they are called and whatever file held them."""
    tensors = (tensor.contiguous().cpu() for tensor in model.state_dict().values())
    digests = sorted(
        hashlib.sha256(f"{t.dtype} {tuple(t.shape)}".encode() + t.numpy().tobytes()).digest()
        for t in tensors
    )
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, precision)


def _random_teacher(config: TeacherConfig) -> DinoTeacher:
    from transformers import Dinov2Config, Dinov2Model

    text = config.name.removeprefix("random:")
    if not text.isdigit():
        raise ConfigError(f"teacher.name random:SEED wants a whole number, got {config.name!r}")
    shape = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(text))
        model = Dinov2Model(shape)
    return DinoTeacher(model, config.name, config.precision, weights=f"random({text})")


def _pretrained(config: TeacherConfig) -> DinoTeacher:
    """DINOv2 from a local directory or the Hugging Face hub; safetensors only, never pickle."""
    from transformers import AutoConfig, AutoModel

    try:
        shape = AutoConfig.from_pretrained(config.name)
        if shape.model_type in _DINO_TYPES:
            model, loading = AutoModel.from_pretrained(
                config.name, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            if loading["missing_keys"]:  # transformers would fill them with random numbers
                raise ValueError(f"no weights for {', '.join(sorted(loading['missing_keys']))}")
            return DinoTeacher(model, config.name, config.precision)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise TeacherError(
            f"cannot load the teacher {config.name!r} ({reason}).\n"
            f"On a machine with internet, fetch config.json and model.safetensors of "
            f"https://huggingface.co/{_hub_id(config.name)}, put both into one directory and pass "
            "it: --teacher DIR (make targets TEACHER=DIR). Without the weights, --teacher random:0 "
            "runs the pipeline on random features."
        ) from error
    raise ConfigError(
        f"teacher {config.name} is a {shape.model_type} model; only DINOv2 (with or without "
        "registers) is read directly, use package.module:factory for others"
    )


def _hub_id(name: str) -> str:
    is_path = name.startswith((".", "/", "~")) or Path(name).is_dir()
    return name if name.count("/") == 1 and not is_path else TeacherConfig.name


def _plugin(name: str) -> Teacher:
    module_name, _, factory_name = name.partition(":")
    try:
        teacher = getattr(importlib.import_module(module_name), factory_name)()
    except (ImportError, AttributeError) as error:
        raise TeacherError(
            f"cannot load the plug-in teacher {name!r}: {error}. It must be importable as "
            "package.module:factory, with the package on PYTHONPATH"
        ) from error
    for attribute in ("name", "dim", "patch_size"):
        if not hasattr(teacher, attribute):
            raise TeacherError(f"plug-in teacher {name!r} has no attribute {attribute!r}")
    return teacher


_load_once = lru_cache(maxsize=1)(load_teacher)
_load_lock = threading.Lock()


def shared_teacher(config: TeacherConfig) -> Teacher:
    """This process's one instance of a teacher, loaded on first use.

    Torch is held to one thread: workers are the parallelism, and a result then can't depend on
    how many threads a machine has.
    """
    with _load_lock:  # lru_cache alone would load twice when two threads ask at once
        torch.set_num_threads(1)
        return _load_once(config)
