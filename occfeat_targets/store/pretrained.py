"""Models that transformers reads, whole or not at all; and CLIP's text tower."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from occfeat_targets.store.settings import ConfigError


def load_whole(reader: Any, name: str) -> Any:
    """A model by its class of transformers, float32. ValueError: weights are missing, which
    transformers would fill with random numbers; others as of its ``from_pretrained``."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it tells at length of each tensor that it does not need
    try:
        model, loading = reader.from_pretrained(
            name, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    finally:
        logging.set_verbosity(before)
    if loading["missing_keys"]:
        raise ValueError(f"no weights for {', '.join(sorted(loading['missing_keys']))}")
    return model


class TextTower:
    """The text side of a CLIP in a directory."""

    teacher: str
    """Weights of its image side, as a store of its features names them."""

    def __init__(self, clip: Path):
        """ConfigError: it can't be loaded."""
        from transformers import (
            AutoTokenizer,
            CLIPTextModelWithProjection,
            CLIPVisionModelWithProjection,
        )

        try:
            if not clip.is_dir():
                raise ValueError("no such directory")
            self._model = load_whole(CLIPTextModelWithProjection, str(clip)).eval()
            self._tokenizer = AutoTokenizer.from_pretrained(clip)
            self.teacher = state_sha256(load_whole(CLIPVisionModelWithProjection, str(clip)))
        except Exception as error:  # of its files, whatever transformers makes of them
            raise ConfigError(
                f"cannot load the texts of {clip} ({(str(error) or repr(error)).splitlines()[0]}): "
                "it must hold config.json, model.safetensors and the tokenizer's files of a CLIP, "
                "such as https://huggingface.co/openai/clip-vit-base-patch16"
            ) from error

    @torch.inference_mode()
    def ensemble(self, sentences: Sequence[str]) -> np.ndarray:
        """The mean direction of sentences: float32 (C,), of length 1."""
        tokens = self._tokenizer(
            list(sentences), padding=True, truncation=True, return_tensors="pt"
        )
        found = self._model(**tokens).text_embeds
        mean = torch.nn.functional.normalize(found, dim=1).mean(dim=0)
        return torch.nn.functional.normalize(mean, dim=0).numpy()


def state_sha256(model: torch.nn.Module) -> str:
    """sha256 over a model's parameters, whatever they are called and whatever file held them."""
    tensors = (tensor.contiguous().cpu() for tensor in model.state_dict().values())
    digests = sorted(
        hashlib.sha256(f"{t.dtype} {tuple(t.shape)}".encode() + t.numpy().tobytes()).digest()
        for t in tensors
    )
    return hashlib.sha256(b"".join(digests)).hexdigest()
