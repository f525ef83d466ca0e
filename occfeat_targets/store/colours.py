"""Features as colours, for pictures."""

import numpy as np


def feature_colours(features: np.ndarray, axes_of: np.ndarray | None = None) -> np.ndarray:
    """Colours by the first three principal components of the directions of ``features``, float (V,
    C), or of ``axes_of``, float (W, C), so that two sets can be compared: RGB float (V, 3) in 0..1;
    grey where features are zero, and all if fewer than three of the reference are not."""
    seen, unit = _directions(features)
    reference = unit if axes_of is None else _directions(axes_of)[1]
    colours = np.full((len(features), 3), 0.5)
    if len(reference) < 3:
        return colours
    mean = reference.mean(axis=0)
    centred = reference - mean
    components = np.linalg.eigh(centred.T @ centred)[1][:, :-4:-1]
    low, high = np.percentile(centred @ components, [2, 98], axis=0)
    projected = (unit - mean) @ components
    colours[seen] = np.clip((projected - low) / np.maximum(high - low, 1e-9), 0, 1)
    return colours


def _directions(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which features are not zero, bool (V,), and the unit vectors of those."""
    length = np.linalg.norm(features, axis=1)
    seen = length > 0
    return seen, features[seen] / length[seen, None]
