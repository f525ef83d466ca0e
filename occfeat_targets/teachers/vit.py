"""Vision transformers of transformers' classes, from the Hugging Face hub or a directory: DINOv2,
DINOv3, SigLIP and C-RADIO; and DINOv2's ViT-S/14 with random weights. transformers interpolates
DINOv2's position embedding to the token grid by its size; the authors' code adds 0.1 first: tokens
move by up to 1.4 px without registers."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from occfeat_targets.store.settings import ConfigError
from occfeat_targets.teachers.base import TeacherError, TeacherSettings, state_sha256

Pixels = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and deviation of R, G and B."""
_IMAGENET: Pixels = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HUB_SECONDS = 10
_NORMS = {
    "dinov2": "layernorm",
    "dinov2_with_registers": "layernorm",
    "dinov3_vit": "norm",
    "siglip": "post_layernorm",
    "siglip_vision_model": "post_layernorm",
    "radio": "",
}
"""What each type of model calls its final norm; C-RADIO has none."""


class VitTeacher:
    """A ViT's patch tokens, which come last in its sequence. The caller resizes images."""

    def __init__(
        self,
        model: Any,
        name: str,
        settings: TeacherSettings,
        pixels: Pixels = _IMAGENET,
        weights: str = "",
    ):
        """``pixels`` is the normalisation that the model was trained with, ``weights`` what to say
        instead of their hash. Raises ConfigError: it has no final norm to leave out."""
        kind = model.config.model_type
        self.name = name
        self.revision = getattr(model.config, "_commit_hash", None) or "local"
        self.architecture = f"{kind}-{model.config.hidden_size}"
        self.dim = model.config.hidden_size
        self.patch_size = model.config.patch_size
        self.weights = weights or state_sha256(model)
        self.layer = "last, after the final norm" if _NORMS[kind] else "last"
        if settings.layer == "before_norm":
            if not _NORMS[kind]:
                raise ConfigError(f"teacher.layer=before_norm: a {kind} model has no final norm")
            setattr(model, _NORMS[kind], torch.nn.Identity())
            self.layer = "last, before the final norm"
        self._device, self._dtype = settings.place()
        self.precision = str(self._dtype).removeprefix("torch.")
        self._model = model.eval().requires_grad_(False).to(self._device)
        self._mean, self._std = torch.tensor(pixels, device=self._device).view(2, 3, 1, 1)
        self._options = {"interpolate_pos_encoding": True} if kind.startswith("siglip") else {}

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features float32 (B, dim, h, w) on the CPU of RGB images (B, 3, H, W) in 0..1."""
        h, w = (side // self.patch_size for side in images.shape[-2:])
        pixels = (images.to(self._device) - self._mean) / self._std
        with torch.autocast(self._device.type, self._dtype, self._dtype != torch.float32):
            tokens = self._model(pixel_values=pixels, **self._options).last_hidden_state
        return tokens[:, -h * w :].float().cpu().unflatten(1, (h, w)).permute(0, 3, 1, 2)


def random_teacher(settings: TeacherSettings) -> VitTeacher:
    """``random:SEED``: a ViT-S/14 with random weights. ConfigError: SEED is no whole number."""
    from transformers import Dinov2Config, Dinov2Model

    text = settings.name.removeprefix("random:")
    if not text.isdigit():
        raise ConfigError(f"teacher.name random:SEED wants a whole number, got {settings.name!r}")
    shape = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(text))
        model = Dinov2Model(shape)
    return VitTeacher(model, settings.name, settings, weights=f"random({text})")


def _find_config(name: str) -> None:
    """OSError at once if a model is neither here nor on a hub that answers: transformers would ask
    for a minute, for each of its files."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if not Path(name).is_dir() and not try_to_load_from_cache(name, "config.json"):
            get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_HUB_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        pass  # it answers, or need not be asked: transformers says what is wrong
    except Exception as error:  # of whichever library it uses for HTTP
        raise OSError(f"no answer from huggingface.co: {error}") from error


def pretrained(settings: TeacherSettings) -> VitTeacher:
    """A model from a directory or the Hugging Face hub; safetensors only, never pickle. Raises
    TeacherError if it can't be loaded, and ConfigError if it is another kind of model."""
    from transformers import AutoConfig, AutoModel, SiglipVisionModel

    name = settings.name
    try:
        _find_config(name)
        shape = AutoConfig.from_pretrained(name)
        if shape.model_type in _NORMS:
            vision: Any = SiglipVisionModel if shape.model_type == "siglip" else AutoModel
            model, loading = vision.from_pretrained(
                name, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            if loading["missing_keys"]:  # transformers would fill them with random numbers
                raise ValueError(f"no weights for {', '.join(sorted(loading['missing_keys']))}")
            return VitTeacher(model, name, settings, _pixels(name, shape.model_type))
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        is_path = name.startswith((".", "/", "~")) or Path(name).is_dir()
        hub_id = name if name.count("/") == 1 and not is_path else TeacherSettings().name
        raise TeacherError(
            f"cannot load the teacher {name!r} ({reason}).\n"
            "On a machine with internet, fetch config.json, model.safetensors and, but for DINOv2, "
            f"preprocessor_config.json of https://huggingface.co/{hub_id} into one directory and "
            "pass it: --teacher DIR (make targets TEACHER=DIR). Without the weights, "
            "--teacher random:0 runs the pipeline on random features."
        ) from error
    raise ConfigError(
        f"teacher {name} is a {shape.model_type} model; read directly are {', '.join(_NORMS)}, use "
        "package.module:factory for others"
    )


def _pixels(name: str, kind: str) -> Pixels:
    """The normalisation of a checkpoint. OSError or ValueError: its file is missing, or odd."""
    if kind.startswith("dinov2"):
        return _IMAGENET
    if kind == "radio":  # it normalises by itself
        return (0, 0, 0), (1, 1, 1)
    from transformers.image_processing_base import ImageProcessingMixin

    # Not all of a family are alike: DINOv3 trained on satellite images has its own.
    said = ImageProcessingMixin.get_image_processor_dict(name)[0]
    mean, std = (said.get(key, 0) for key in ("image_mean", "image_std"))
    for values in (mean, std):
        if not (isinstance(values, list) and len(values) == 3 and all(0 < v < 1 for v in values)):
            raise ValueError("preprocessor_config.json has no image_mean and image_std of R, G, B")
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
