"""DINOv2, with or without registers, from the Hugging Face hub or a directory; and the same ViT
with random weights. transformers interpolates the position embedding to the token grid by its size;
the authors' code adds 0.1 first: tokens move by up to 1.4 px without registers."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from occfeat_targets.store.settings import ConfigError
from occfeat_targets.teachers.base import TeacherError, TeacherSettings, state_sha256

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of R, G, B
_HUB_SECONDS = 10
_TYPES = ("dinov2", "dinov2_with_registers")


class DinoTeacher:
    """Patch tokens (without CLS and registers) after the final norm. The caller resizes images."""

    layer = "last, after the final norm"

    def __init__(self, model: Any, name: str, precision: str, weights: str = ""):
        self.name = name
        self.revision = getattr(model.config, "_commit_hash", None) or "local"
        self.architecture = f"{model.config.model_type}-{model.config.hidden_size}"
        self.dim = model.config.hidden_size
        self.patch_size = model.config.patch_size
        self.weights = weights or state_sha256(model)
        self._prefix = 1 + getattr(model.config, "num_register_tokens", 0)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        auto = "bfloat16" if self._device.type == "cuda" else "float32"
        self._dtype = getattr(torch, auto if precision == "auto" else precision)
        self.precision = str(self._dtype).removeprefix("torch.")
        self._model = model.eval().requires_grad_(False).to(self._device)
        self._mean, self._std = torch.tensor(_IMAGENET, device=self._device).view(2, 3, 1, 1)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features float32 (B, dim, h, w) on the CPU of RGB images (B, 3, H, W) in 0..1."""
        h, w = (side // self.patch_size for side in images.shape[-2:])
        pixels = (images.to(self._device) - self._mean) / self._std
        with torch.autocast(self._device.type, self._dtype, self._dtype != torch.float32):
            tokens = self._model(pixel_values=pixels).last_hidden_state[:, self._prefix :]
        return tokens.float().cpu().unflatten(1, (h, w)).permute(0, 3, 1, 2)


def random_teacher(settings: TeacherSettings) -> DinoTeacher:
    """``random:SEED``: a ViT-S/14 with random weights. ConfigError: SEED is no whole number."""
    from transformers import Dinov2Config, Dinov2Model

    text = settings.name.removeprefix("random:")
    if not text.isdigit():
        raise ConfigError(f"teacher.name random:SEED wants a whole number, got {settings.name!r}")
    shape = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(text))
        model = Dinov2Model(shape)
    return DinoTeacher(model, settings.name, settings.precision, weights=f"random({text})")


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


def pretrained(settings: TeacherSettings) -> DinoTeacher:
    """DINOv2 from a local directory or the Hugging Face hub; safetensors only, never pickle. Raises
    TeacherError if it can't be loaded, and ConfigError if it is another kind of model."""
    from transformers import AutoConfig, AutoModel

    name = settings.name
    try:
        _find_config(name)
        shape = AutoConfig.from_pretrained(name)
        if shape.model_type in _TYPES:
            model, loading = AutoModel.from_pretrained(
                name, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            if loading["missing_keys"]:  # transformers would fill them with random numbers
                raise ValueError(f"no weights for {', '.join(sorted(loading['missing_keys']))}")
            return DinoTeacher(model, name, settings.precision)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        is_path = name.startswith((".", "/", "~")) or Path(name).is_dir()
        hub_id = name if name.count("/") == 1 and not is_path else TeacherSettings().name
        raise TeacherError(
            f"cannot load the teacher {name!r} ({reason}).\n"
            "On a machine with internet, fetch config.json and model.safetensors of "
            f"https://huggingface.co/{hub_id}, put both into one directory and "
            "pass it: --teacher DIR (make targets TEACHER=DIR). Without the weights, "
            "--teacher random:0 runs the pipeline on random features."
        ) from error
    raise ConfigError(
        f"teacher {name} is a {shape.model_type} model; only DINOv2 (with or without "
        "registers) is read directly, use package.module:factory for others"
    )
