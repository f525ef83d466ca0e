"""The teacher's feature maps themselves: what ScaLR and SLidR sample at lidar points. Six times
smaller than features of every point in every camera, and of no fixed choice of points."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from occfeat_targets.outputs.base import FrameInputs, Output
from occfeat_targets.outputs.voxels import quantise
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.schema import ArraySpec, dequantise


class Tokens(Output):
    """A feature per cell of each image, quantised; nothing in a store without a teacher. A cell
    (i, j) of h x w covers [j/w, (j+1)/w) x [i/h, (i+1)/h) of the image."""

    def specs(self) -> tuple[ArraySpec, ...]:
        """See :class:`Output`."""
        if self.layout.feature_dim == 0:
            return ()
        (h, w), n = self.layout.feature_hw, len(self.layout.cameras)
        places = {"camera": n, "feature_y": h, "feature_x": w}
        axes = places | {"channel": self.layout.feature_dim}
        doc = "teacher feature / token_scale, rounded"
        return (
            ArraySpec("tokens", "int8", axes, doc, -128, chunk=1, codec="lz4"),
            ArraySpec("token_scale", "float16", places, "int8 step", np.nan, chunk=n),
        )

    def compute(self, frame: FrameInputs) -> dict[str, np.ndarray]:
        """``tokens`` int8 (N, h, w, C) and ``token_scale`` float16 (N, h, w). Raises ValueError if
        features are not finite."""
        if self.layout.feature_dim == 0:
            return {}
        maps = frame.feature_maps.permute(0, 2, 3, 1).numpy()
        codes, scale = quantise(maps.reshape(-1, maps.shape[-1]))
        return {"tokens": codes.reshape(maps.shape), "token_scale": scale.reshape(maps.shape[:-1])}

    def check(self, store: TargetStore, frame: dict[str, Any]) -> Iterator[str]:
        """See :class:`Output`."""
        if "tokens" not in frame:
            return
        scale = frame["token_scale"].astype(np.float32)
        peak = np.abs(frame["tokens"].astype(np.int16)).max(axis=-1)
        if not np.isfinite(scale).all() or (scale < 0).any():
            yield "token_scale is not finite and positive"
        normal = scale >= np.finfo(np.float16).tiny  # a subnormal step can't reach 127 exactly
        if (peak[normal] != 127).any() or (peak > 127).any():
            yield "a token's largest code is not 127"

    def compare(self, stored: dict[str, Any], again: dict[str, np.ndarray]) -> Iterator[str]:
        """A cosine of at least 0.999, as of voxels' features."""
        if "tokens" not in again:
            return
        a, b = (
            dequantise(of["tokens"].reshape(-1, self.layout.feature_dim), of["token_scale"].ravel())
            for of in (stored, again)
        )
        norm = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosine = (a * b).sum(axis=1)[norm > 0] / norm[norm > 0]
        if cosine.min(initial=1.0) < 0.999:
            yield f"tokens differ from the recomputed ones: lowest cosine {cosine.min():.4f}"

    def draw_camera(self, axis: Any, store: TargetStore, frame: dict[str, Any], c: int) -> None:
        """Camera c's feature map, small, in the picture's upper right corner."""
        if "tokens" not in frame:
            return
        h, w, dim = frame["tokens"].shape[1:]
        flat = dequantise(frame["tokens"][c].reshape(-1, dim), frame["token_scale"][c].ravel())
        inset = axis.inset_axes([0.7, 0.7, 0.3, 0.3])
        inset.imshow(self.paint(flat).reshape(h, w, 3), aspect="auto")
        inset.set(xticks=[], yticks=[])
