"""What the pipeline asks of a teacher, and how it runs one."""

from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image

from occfeat_targets.store.pretrained import state_sha256
from occfeat_targets.store.settings import Settings, Size


class TeacherError(RuntimeError):
    """The teacher can't be had or does not do what it promised; the message says what to do."""


class TeacherSettings(Settings):
    """The frozen image model whose features are the targets."""

    name: str = "facebook/dinov2-small"
    """Hub id or local directory of a DINOv2, DINOv3, SigLIP, C-RADIO or CLIP;
    ``efficientnet-lite0`` (needs no download); ``random:SEED`` (ViT-S/14 with random weights, for
    tests); a plug-in, ``package.module:factory``; or ``none`` for a store without features: enough
    to finetune and evaluate on, and built much faster."""
    input_size: Size | None = None
    """Image height and width the teacher sees; multiples of its patch size. None: 18 x 32 patches,
    the paper's 252 x 448 for DINOv2."""
    layer: Literal["last", "before_norm"] = "last"
    """``before_norm``: a ViT's tokens before its final norm, as ScaLR distils them."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto`` is float32 on CPU and bfloat16 on CUDA."""

    def size_for(self, teacher: "Teacher") -> tuple[int, int]:
        """Height and width that a teacher sees."""
        return self.size_of(teacher.patch_size)

    def size_of(self, patch_size: int) -> tuple[int, int]:
        """Height and width that a teacher of such patches sees."""
        return self.input_size or (18 * patch_size, 32 * patch_size)

    def place(self) -> tuple[torch.device, torch.dtype]:
        """Where a teacher runs, and in which precision."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        auto = "bfloat16" if device.type == "cuda" else "float32"
        return device, getattr(torch, auto if self.precision == "auto" else self.precision)


class Teacher(Protocol):
    """A frozen image model that gives dense features. A plug-in, ``package.module:factory`` in a
    folder on ``PYTHONPATH``, should also have ``weights``, a string that identifies its parameters
    (by default the hash of the state of the ``torch.nn.Module`` that it is or holds): a build
    refuses others; and ``precision``, if that is not its parameters' or float32. Called without
    gradients; on a GPU worker from several threads at once."""

    name: str
    dim: int
    patch_size: int

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """RGB, float32 (B, 3, H, W) in 0..1, to (B, dim, H / patch_size, W / patch_size)."""
        ...


class NoTeacher:
    """Stands where a teacher would, in a store without features."""

    name = "none"
    weights = "none"
    dim = 0
    patch_size = 1

    def __init__(self, settings: TeacherSettings | None = None):
        pass

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Nothing of each pixel."""
        return images[:, :0]


def describe(teacher: Teacher, settings: TeacherSettings) -> dict:
    """The store's ``teacher`` attribute: which model, weights, layer and size made the targets."""

    def text(attribute: str, otherwise: str = "unknown") -> str:
        value = getattr(teacher, attribute, None)
        return value if isinstance(value, str) else otherwise  # a module may have a .layer

    parts = [teacher, *vars(teacher).values()] if hasattr(teacher, "__dict__") else []
    modules = torch.nn.ModuleList(part for part in parts if isinstance(part, torch.nn.Module))
    parameters = list(modules.parameters())
    dtype = parameters[0].dtype if parameters else torch.float32
    weights = text("weights", "")
    if not weights:
        weights = state_sha256(modules) if parameters else "unknown"
    return {
        "name": teacher.name,
        "revision": text("revision"),
        "architecture": text("architecture", type(teacher).__name__),
        "layer": text("layer"),
        "input_size": list(settings.size_for(teacher)),
        "patch_size": int(teacher.patch_size),
        "dim": int(teacher.dim),
        "precision": text("precision", str(dtype).removeprefix("torch.")),
        "weights": weights,
    }


def dense_features(
    teacher: Teacher, images: list[Image.Image], input_size: tuple[int, int]
) -> torch.Tensor:
    """Run the teacher once on images already resized to ``input_size``: float32 CPU tensor (N, C,
    h, w). Raises TeacherError if its shape is not what ``dim`` and ``patch_size`` promise."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    with torch.inference_mode():
        features = teacher(pixels.permute(0, 3, 1, 2).float().div_(255))
    wanted = (len(images), teacher.dim, *(side // teacher.patch_size for side in input_size))
    if tuple(features.shape) != wanted:
        raise TeacherError(
            f"teacher {teacher.name} returned shape {tuple(features.shape)}, promised {wanted}"
        )
    return features.float().cpu()
