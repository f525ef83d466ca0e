"""CLIP as a teacher: features of image patches in the space of CLIP's texts, by MaskCLIP's rule
(Zhou et al., ECCV 2022).

CLIP's last attention mixes the image for its one class token. MaskCLIP leaves the mixing out: a
patch keeps its own value, through the rest of the block, the final norm and the projection into the
space of texts. Images are normalised as CLIP's own were; MaskCLIP's code uses ImageNet's numbers.
"""

from typing import Any

from torch import Tensor

from occfeat_targets.store.settings import ConfigError
from occfeat_targets.teachers.base import TeacherSettings
from occfeat_targets.teachers.vit import Pixels, VitTeacher


class ClipTeacher(VitTeacher):
    """A ``CLIPVisionModelWithProjection``, read as MaskCLIP does."""

    def __init__(self, model: Any, name: str, settings: TeacherSettings, pixels: Pixels):
        """ConfigError: another layer."""
        if settings.layer != "last":
            raise ConfigError(
                "teacher.layer=before_norm: CLIP's features are in the space of texts"
            )
        super().__init__(model, name, settings, pixels)
        self.dim = model.config.projection_dim
        self.layer = "last block's values, projected (MaskCLIP)"

    def _tokens(self, pixels: Tensor) -> Tensor:
        options = {"output_hidden_states": True, "interpolate_pos_encoding": True}
        vision = getattr(self._model, "vision_model", self._model)
        x = vision(pixel_values=pixels, **options).hidden_states[-2]
        block = vision.encoder.layers[-1]
        attention = block.self_attn
        x = x + attention.out_proj(attention.v_proj(block.layer_norm1(x)))
        x = x + block.mlp(block.layer_norm2(x))
        return self._model.visual_projection(vision.post_layernorm(x))
