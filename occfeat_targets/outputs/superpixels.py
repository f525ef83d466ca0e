"""Superpixels of the stored images, which SLidR contrasts with the lidar points that fall in them:
SLIC (Achanta et al., 2012), as SLidR's ``superpixel_segmenter.py`` calls it, but on the stored
image in place of the one at full size: as many, at a tenth of the time."""

import io
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from occfeat_targets.outputs.base import FrameInputs, Output
from occfeat_targets.sources.base import FrameRecord
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.schema import ArraySpec
from occfeat_targets.store.settings import Settings

_UNSET = 255
_SLIDR_HEIGHT = 900
"""Of the images that SLidR's ``sigma`` is for."""


class SuperpixelsSettings(Settings):
    """SLIC's, as SLidR has them."""

    n_segments: int = Field(default=150, ge=1, lt=_UNSET)
    """About as many an image, rather fewer."""
    compactness: float = Field(default=6.0, gt=0)
    """How much nearness counts against likeness of colour."""
    sigma: float = Field(default=3.0, ge=0)
    """Blur before it, in pixels of an image 900 high: less in proportion on a stored one."""


class Superpixels(Output):
    """The superpixel of each pixel of the stored images."""

    Settings = SuperpixelsSettings

    def specs(self) -> tuple[ArraySpec, ...]:
        """See :class:`Output`."""
        height, width = self.layout.image_size
        axes = {"camera": len(self.layout.cameras), "v": height, "u": width}
        doc = "superpixel of each stored pixel, by camera from 0"
        return (ArraySpec("superpixels", "uint8", axes, doc, _UNSET, chunk=1),)

    def compute(self, frame: FrameInputs) -> dict[str, np.ndarray]:
        """``superpixels`` uint8 (N, H, W), of the JPEGs as they are stored. Raises ValueError if
        an image falls into more than 255."""
        jpegs, edges = frame.arrays["images"], frame.arrays["image_offset"]
        images = [jpegs[a:b].tobytes() for a, b in pairwise(edges)]
        return {"superpixels": np.stack([slic(jpeg, self.settings) for jpeg in images])}

    def faults(self, record: FrameRecord) -> Iterator[str]:
        """See :class:`Output`. Raises ModuleNotFoundError: scikit-image is not installed."""
        import_module("skimage")
        return iter(())

    def check(self, store: TargetStore, frame: dict[str, Any]) -> Iterator[str]:
        """See :class:`Output`."""
        for camera, labels in zip(self.layout.cameras, frame["superpixels"], strict=True):
            if len(np.unique(labels)) != int(labels.max()) + 1:
                yield f"{camera}: superpixels are not numbered one after another"

    def compare(self, stored: dict[str, Any], again: dict[str, np.ndarray]) -> Iterator[str]:
        """Those of the stored JPEGs: the same image must give the same."""
        for c, camera in enumerate(self.layout.cameras):
            wanted = slic(stored["images"][c], self.settings)
            if not np.array_equal(stored["superpixels"][c], wanted):
                yield f"{camera}: superpixels are not those that scikit-image finds here"

    def draw_camera(self, axis: Any, store: TargetStore, frame: dict[str, Any], c: int) -> None:
        """Their borders."""
        labels = frame["superpixels"][c]
        border = np.zeros((*labels.shape, 4))
        border[:-1, :, 3] += labels[1:] != labels[:-1]
        border[:, :-1, 3] += labels[:, 1:] != labels[:, :-1]
        border[..., :2], border[..., 3] = 1.0, 0.6 * (border[..., 3] > 0)
        axis.imshow(border, extent=(0, labels.shape[1], labels.shape[0], 0))


def slic(jpeg: bytes, settings: SuperpixelsSettings) -> np.ndarray:
    """Superpixel of each pixel of an image, uint8 (H, W), from 0. Raises ValueError: there are more
    than 255."""
    from skimage.segmentation import slic

    image = np.asarray(Image.open(io.BytesIO(jpeg), formats=("JPEG",)))
    labels = slic(
        image,
        n_segments=settings.n_segments,
        compactness=settings.compactness,
        sigma=settings.sigma * image.shape[0] / _SLIDR_HEIGHT,
        start_label=0,
    )
    if labels.max() >= _UNSET:
        raise ValueError(f"{labels.max() + 1} superpixels: lower outputs.superpixels.n_segments")
    return labels.astype(np.uint8)
