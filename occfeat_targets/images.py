"""JPEG in, resized RGB out, JPEG again: every file is decoded exactly once."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


class ImageError(ValueError):
    """A camera image is missing, broken or not what its record says; the message names it."""


def check_jpeg(path: Path, hw: tuple[int, int]) -> str | None:
    """What is wrong with the file's header, or None. Reads the header only."""
    try:
        with Image.open(path) as image:
            if image.format != "JPEG":
                return f"is {image.format}, not JPEG"
            if image.size != (hw[1], hw[0]):
                return f"is {image.size[1]}x{image.size[0]}, its record says {hw[0]}x{hw[1]}"
    except FileNotFoundError:
        return "is missing"
    except OSError:  # PIL.UnidentifiedImageError among them
        return "is not a readable JPEG"
    return None


def decode_jpeg(path: Path, at_least_hw: tuple[int, int]) -> Image.Image:
    """Decode at the smallest DCT scale (1, 1/2, 1/4, 1/8) that covers ``at_least_hw``.

    Returns:
        RGB image, whose size may be a fraction of the file's.

    Raises:
        ImageError: naming the file, when it is missing, truncated or corrupt.
    """
    try:
        image = Image.open(path)
        image.draft("RGB", (at_least_hw[1], at_least_hw[0]))
        return image.convert("RGB")
    except FileNotFoundError:
        raise ImageError(f"{path} is missing") from None
    except (OSError, SyntaxError) as error:  # Pillow's words for truncated and corrupt data
        raise ImageError(f"{path}: cannot decode the JPEG: {error}") from error


def resize(image: Image.Image, hw: tuple[int, int]) -> Image.Image:
    """Antialiased bilinear resize to (H, W)."""
    return image.resize((hw[1], hw[0]), Image.Resampling.BILINEAR)


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """JPEG bytes of an RGB image, 4:2:0."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def to_array(image: Image.Image) -> np.ndarray:
    """RGB uint8 (H, W, 3)."""
    return np.asarray(image)
