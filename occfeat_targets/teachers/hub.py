"""Teachers from the Hugging Face hub, or a directory of one of its models."""

from pathlib import Path

from safetensors import SafetensorError

from occfeat_targets.store.pretrained import load_whole
from occfeat_targets.store.settings import ConfigError
from occfeat_targets.teachers.base import TeacherError, TeacherSettings
from occfeat_targets.teachers.clip import ClipTeacher
from occfeat_targets.teachers.vit import IMAGENET, Pixels, VitTeacher

_HUB_SECONDS = 10
_KINDS = {
    "dinov2": ("AutoModel", VitTeacher),
    "dinov2_with_registers": ("AutoModel", VitTeacher),
    "dinov3_vit": ("AutoModel", VitTeacher),
    "siglip": ("SiglipVisionModel", VitTeacher),
    "siglip_vision_model": ("AutoModel", VitTeacher),
    "radio": ("AutoModel", VitTeacher),
    "clip": ("CLIPVisionModelWithProjection", ClipTeacher),
    "clip_vision_model": ("CLIPVisionModelWithProjection", ClipTeacher),
}
"""Type of a model: the class of transformers that reads it, and ours."""


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
    import transformers

    name = settings.name
    try:
        _find_config(name)
        kind = transformers.AutoConfig.from_pretrained(name).model_type
        if kind in _KINDS:
            reader, teacher = _KINDS[kind]
            model = load_whole(getattr(transformers, reader), name)
            return teacher(model, name, settings, _pixels(name, kind))
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
        f"teacher {name} is a {kind} model; read directly are {', '.join(_KINDS)}, use "
        "package.module:factory for others"
    )


def _pixels(name: str, kind: str) -> Pixels:
    """The normalisation of a checkpoint. OSError or ValueError: its file is missing, or odd."""
    if kind.startswith("dinov2"):
        return IMAGENET
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
