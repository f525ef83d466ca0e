"""Vision transformers of transformers' classes: DINOv2, DINOv3, SigLIP and C-RADIO; and DINOv2's
ViT-S/14 with random weights. transformers interpolates DINOv2's position embedding to the token
grid by its size; the authors' code adds 0.1 first: tokens move by up to 1.4 px without registers.
"""

from typing import Any

import torch

from occfeat_targets.store.settings import ConfigError
from occfeat_targets.teachers.base import TeacherSettings, state_sha256

Pixels = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and deviation of R, G and B."""
IMAGENET: Pixels = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_NORMS = {
    "dinov2": "layernorm",
    "dinov2_with_registers": "layernorm",
    "dinov3_vit": "norm",
    "siglip": "post_layernorm",
    "siglip_vision_model": "post_layernorm",
    "radio": "",
    "clip_vision_model": "",
}
"""What each type of model calls its final norm, if it can be left out; C-RADIO has none."""


class VitTeacher:
    """A ViT's patch tokens, which come last in its sequence. The caller resizes images."""

    def __init__(
        self,
        model: Any,
        name: str,
        settings: TeacherSettings,
        pixels: Pixels = IMAGENET,
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
            tokens = self._tokens(pixels)
        return tokens[:, -h * w :].float().cpu().unflatten(1, (h, w)).permute(0, 3, 1, 2)

    def _tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, tokens, dim), patches last, of normalised images."""
        return self._model(pixel_values=pixels, **self._options).last_hidden_state


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
