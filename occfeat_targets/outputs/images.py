"""The cameras' images as JPEGs, clean or corrupted: what the trainer's network sees."""

import io
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from occfeat_targets.corruptions import CORRUPTED, corrupt
from occfeat_targets.images import check_jpeg, encode_jpeg, resize
from occfeat_targets.outputs.base import FrameInputs, Layout, Output
from occfeat_targets.sources.base import FrameRecord
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.schema import ArraySpec
from occfeat_targets.store.settings import Settings, Size, did_you_mean

_CHUNK = 65536


class ImagesSettings(Settings):
    """The images stored for the trainer."""

    size: Size = (288, 512)
    """Stored height and width."""
    quality: int = Field(default=95, ge=1, le=100)
    """JPEG quality."""
    corruption: str = "none"
    """One of nuScenes-C's, such as ``fog-easy`` (see ``corruptions``), laid on the stored images
    and on nothing else: voxels, labels and what a teacher sees stay clean."""
    corruption_seed: int = Field(default=0, ge=0)
    """Of the corruption's random numbers. CameraCrash's dead cameras depend on nothing else."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        known = ("none", *CORRUPTED)
        if self.corruption not in known:
            near = did_you_mean(self.corruption, known)
            raise ValueError(f"no images.corruption {self.corruption}; {near}")
        return self


class Images(Output):
    """JPEGs of ``images.size``, one after another, and where each begins."""

    Settings = ImagesSettings

    def __init__(self, settings: ImagesSettings, layout: Layout):
        super().__init__(settings, layout)
        height, width = settings.size
        # A byte per pixel is about twice what quality 95 needs on a textured image.
        self.room = _CHUNK * math.ceil(len(layout.cameras) * height * width / _CHUNK)

    def specs(self) -> tuple[ArraySpec, ...]:
        """See :class:`Output`."""
        offsets = {"camera_edge": len(self.layout.cameras) + 1}
        doc = "bytes [offset[c], offset[c+1]) of `images` are camera c's JPEG"
        data = "the cameras' JPEGs one after another"
        ragged: dict[str, Any] = {"rows": "image_offset", "chunk": _CHUNK, "codec": "none"}
        return (
            ArraySpec("image_offset", "int32", offsets, doc, -1),
            ArraySpec("images", "uint8", {"image_byte": self.room}, data, 0, **ragged),
        )

    def compute(self, frame: FrameInputs) -> dict[str, np.ndarray]:
        """``images`` uint8 (bytes,) and ``image_offset`` int32 (N + 1,). Raises ValueError, naming
        the file, if one is missing or damaged; or if there is no room."""
        name, seed = self.settings.corruption, self.settings.corruption_seed
        token, cameras = frame.record.token, self.layout.cameras
        jpegs = []
        for camera, image in zip(cameras, frame.images, strict=True):
            if name != "none":
                pixels = corrupt(np.asarray(image), name, token, camera, cameras, seed)
                image = Image.fromarray(pixels)
            jpegs.append(encode_jpeg(resize(image, self.settings.size), self.settings.quality))
        packed = pack_images(jpegs)
        if (n := len(packed["images"])) > self.room:
            room = f"the store has room for {self.room}"
            raise ValueError(f"{n} bytes of JPEG, {room}: lower images.quality")
        return packed

    def faults(self, record: FrameRecord) -> Iterator[str]:
        """See :class:`Output`."""
        for path, hw in zip(record.image_paths, record.image_hw, strict=True):
            if problem := check_jpeg(Path(path), hw):
                yield f"{path} {problem}"

    def check(self, store: TargetStore, frame: dict[str, Any]) -> Iterator[str]:
        """See :class:`Output`."""
        height, width = self.settings.size
        for camera, jpeg in zip(self.layout.cameras, frame["images"], strict=True):
            try:
                with Image.open(io.BytesIO(jpeg)) as image:
                    image.load()
                    if image.size != (width, height):
                        yield f"{camera}: stored image is {image.size[1]}x{image.size[0]}"
            except (OSError, SyntaxError) as error:
                yield f"{camera}: stored image cannot be decoded: {error}"

    def compare(self, stored: dict[str, Any], again: dict[str, np.ndarray]) -> Iterator[str]:
        """An image's mean difference may be 1 level of 255: JPEG libraries round differently."""
        jpegs = [again["images"][a:b].tobytes() for a, b in pairwise(again["image_offset"])]
        for camera, *pair in zip(self.layout.cameras, stored["images"], jpegs, strict=True):
            old, new = (np.asarray(Image.open(io.BytesIO(jpeg)), dtype=np.int16) for jpeg in pair)
            difference = np.abs(old - new).mean()
            if difference > 1:
                yield f"{camera}: image differs from the recomputed one by {difference:.1f} levels"

    def draw_camera(self, axis: Any, store: TargetStore, frame: dict[str, Any], c: int) -> None:
        """The image itself, in continuous pixels: it covers [0, W) x [0, H)."""
        image = Image.open(io.BytesIO(frame["images"][c]))
        axis.imshow(image, extent=(0, image.width, image.height, 0))
        axis.set(xlim=(0, image.width), ylim=(image.height, 0), xticks=[], yticks=[])


def pack_images(jpegs: list[bytes]) -> dict[str, np.ndarray]:
    """JPEGs one after another as uint8 (bytes,), with int32 (N + 1,) offsets."""
    offset = np.cumsum([0, *map(len, jpegs)], dtype=np.int32)
    return {"images": np.frombuffer(b"".join(jpegs), dtype=np.uint8), "image_offset": offset}
