"""JPEG in, resized RGB out, JPEG again: every file is decoded exactly once."""

import io
import struct
from pathlib import Path

from PIL import Image

from occfeat_targets.store.schema import JPEG_HOLE

MAX_PIXELS = 100_000_000
"""A header that claims more is damaged. Pillow's own limit is lifted by nuscenes-devkit."""


def check_jpeg(path: Path, hw: tuple[int, int]) -> str | None:
    """What is wrong with the file's header, or None. Reads the header only."""
    try:
        if path.exists() and not path.is_file():
            return "is no regular file"  # a pipe would be waited for
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                return f"claims {image.height}x{image.width} pixels"
            if image.format != "JPEG":
                return f"is {image.format}, not JPEG"
            if image.size != (hw[1], hw[0]):
                return f"is {image.size[1]}x{image.size[0]}, its record says {hw[0]}x{hw[1]}"
    except FileNotFoundError:
        return "is missing"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return "is not a readable JPEG"
    return None


def decode_jpeg(path: Path, at_least_hw: tuple[int, int]) -> Image.Image:
    """Decode at the smallest DCT scale (1, 1/2, 1/4, 1/8) that covers ``at_least_hw``: an RGB
    image, whose size may be a fraction of the file's. Raises ValueError, naming the file, if it is
    missing, truncated, has a hole, or breaks the decoder. Flipped bits in the middle can't be told
    from image content."""
    try:
        content = path.read_bytes()
        if JPEG_HOLE in content:  # decoders paint such damage grey and say nothing
            raise ValueError(f"{path}: the JPEG has a hole of zero bytes in it")
        image = Image.open(io.BytesIO(content))
        if image.width * image.height > MAX_PIXELS:
            raise SyntaxError(f"it claims {image.height}x{image.width} pixels")
        image.draft("RGB", (at_least_hw[1], at_least_hw[0]))
        return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, SyntaxError, struct.error, Image.DecompressionBombError) as error:  # Pillow's
        raise ValueError(f"{path}: cannot decode the JPEG: {error}") from error


def resize(image: Image.Image, hw: tuple[int, int]) -> Image.Image:
    """Antialiased bilinear resize to (H, W)."""
    return image.resize((hw[1], hw[0]), Image.Resampling.BILINEAR)


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """JPEG bytes of an RGB image, 4:2:0."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()
