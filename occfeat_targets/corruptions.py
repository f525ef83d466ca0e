"""nuScenes-C: RoboBEV's eight image corruptions in three severities, on images of full size.

What they do and with which numbers is RoboBEV's (Xie et al. 2024, ``corruptions/project``): motion
blur, brightness, fog and snow are ImageNet-C's (Hendrycks & Dietterich 2019, in the form of the
``imagecorruptions`` package), the others its own. The code is ours. What differs:

- Every image has its own random numbers, from seed, corruption, sample token and camera: a result
  does not depend on what was processed before. The severity is not among them, so the severities of
  an image share their draws (the same plasma, snowflakes, blur angle; a camera that is lost at easy
  is lost at hard). RoboBEV's released set is one unseeded draw.
- Levels are rounded to the nearest one, the published code cuts them off: half a level of 255.
- RoboBEV stores a JPEG of full size and reads it again; here only the resized image becomes one.
"""

import hashlib
import math

import numpy as np
from numpy.random import Generator

from occfeat_targets.store.schema import CORRUPTIONS, SEVERITIES

CORRUPTED = tuple(f"{name}-{severity}" for name in CORRUPTIONS for severity in SEVERITIES)
"""What ``images.corruption`` can be besides ``none``."""

BGR_GREY = (0.114, 0.587, 0.299)
"""Weights of R, G, B in snow's grey: red's and blue's are swapped, since RoboBEV hands BGR images
to a function for RGB ones, and the published set was made so."""


def corrupt(
    image: np.ndarray, name: str, token: str, camera: str, cameras: tuple[str, ...], seed: int
) -> np.ndarray:
    """The image of ``camera``, one of the rig's ``cameras``, corrupted: uint8 (H, W, 3), RGB.
    ``image`` is the same, as the camera took it (1600x900): the sizes of blur and snowflakes are in
    its pixels. ``name`` is one of :data:`CORRUPTED`, ``token`` the keyframe's sample token,
    ``seed`` the whole set's. Raises KeyError or ValueError if there is no such ``name``."""
    corruption, _, severity = name.partition("-")
    level = SEVERITIES.index(severity)
    if corruption == "camera_crash":
        return np.zeros_like(image) if camera in crashed_cameras(level, cameras, seed) else image
    function, settings = _TABLE[corruption]
    return function(image, _generator(seed, corruption, token, camera), *settings[level])


def crashed_cameras(level: int, cameras: tuple[str, ...], seed: int) -> tuple[str, ...]:
    """CameraCrash: those of a rig's cameras that are dead in the whole set, in the rig's order.
    RoboBEV makes 2, 4 and 5 draws with replacement out of six, so that about 1.8, 3.1 and 3.6
    different cameras die. Ours are the first 2, 4 and 5 of one sequence: a harder set has the dead
    cameras of the easier one, and perhaps no others."""
    draws = _generator(seed, "camera_crash").integers(len(cameras), size=5)
    dead = set(draws[: (2, 4, 5)[level]].tolist())
    return tuple(camera for c, camera in enumerate(cameras) if c in dead)


def _generator(seed: int, *what: str) -> Generator:
    digest = hashlib.sha256(" ".join(what).encode()).digest()
    words = np.frombuffer(digest, dtype="<u4").tolist()
    return Generator(np.random.Philox(np.random.SeedSequence([seed, *words])))


def _frame_lost(image: np.ndarray, rng: Generator, probability: float) -> np.ndarray:
    """Black with a probability, each camera of each frame on its own."""
    return np.zeros_like(image) if rng.random() < probability else image


def _motion_blur(image: np.ndarray, rng: Generator, radius: int, sigma: float) -> np.ndarray:
    """ImageNet-C's motion blur, up to 45 degrees from horizontal."""
    return _levels(_smear(image.astype(np.float32), radius, sigma, rng.uniform(-45, 45)))


def _smear(values: np.ndarray, radius: int, sigma: float, degrees: float) -> np.ndarray:
    """Mean of ``2 radius + 1`` copies of an image, float32 (H, W, C), moved along a line (none the
    other way), the i-th by i pixels with weight exp(-i² / 2 sigma²). What comes in over an edge is
    the edge's pixel. ``degrees`` go from image right (0) to image down (90)."""
    height, width, channels = values.shape
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).astype(np.float32)
    angle = math.radians(degrees)
    # Where each copy takes its pixels from, relative to where they go.
    right = np.ceil(steps * math.cos(angle) - 0.5).astype(int)
    down = np.ceil(steps * math.sin(angle) - 0.5).astype(int)
    pad = 2 * radius + 1
    padded = np.pad(values, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    padded = padded.reshape(height + 2 * pad, -1)
    result = np.empty((height, width * channels), dtype=np.float32)
    rows = 32  # few enough to stay in the processor's cache
    for top in range(0, height, rows):
        out = result[top : top + rows]
        out[:] = 0
        for weight, dx, dy in zip(weights, right, down, strict=True):
            first = (pad + dx) * channels
            moved = padded[pad + top + dy :, first : first + width * channels][: len(out)]
            out += weight * moved
    return result.reshape(values.shape)


def _color_quant(image: np.ndarray, rng: Generator, bits: int) -> np.ndarray:
    """Only the leading bits of each channel stay (Pillow's posterize)."""
    return image & np.uint8(256 - (1 << (8 - bits)))


def _brightness(image: np.ndarray, rng: Generator, added: float) -> np.ndarray:
    """HSV value plus ``added``, at most 1; hue and saturation stay, so RGB is proportional to the
    value; black has none and becomes grey."""
    value = image.max(axis=2, keepdims=True).astype(np.float32) / 255
    brighter = np.minimum(value + np.float32(added), 1)
    gain = np.divide(brighter, value, out=np.zeros_like(value), where=value > 0)
    return _levels(np.where(value > 0, image * gain, 255 * brighter))


def _low_light(
    image: np.ndarray, rng: Generator, scale: float, photons: float, sigma: float
) -> np.ndarray:
    """Range stretched to 0..1, squared, darkened to at most ``scale``; then photon noise (a value
    of 1 expects ``photons``), then sensor noise, drawn first: the severities share it, as they
    can't share photon counts."""
    low, high = int(image.min()), int(image.max())
    stretched = (np.arange(256) - low) / max(high - low, 1)
    sensor = rng.standard_normal(image.shape, dtype=np.float32)
    expected = stretched**2 * scale * photons
    light = rng.poisson(expected[image]).astype(np.float32) / np.float32(photons)
    return _levels(255 * np.clip(np.minimum(light, 1) + np.float32(sigma) * sensor, 0, 1))


def _fog(image: np.ndarray, rng: Generator, amount: float, decay: float) -> np.ndarray:
    """ImageNet-C's fog: a plasma is added, and all of it scaled back to the image's range."""
    height, width, _ = image.shape
    size = 1 << (max(height, width) - 1).bit_length()
    fog = np.float32(amount) * plasma(size, decay, rng)[:height, :width, None]
    brightest = float(image.max()) / 255
    return _levels((image + 255 * fog) * np.float32(brightest / (brightest + amount)))


def plasma(size: int, decay: float, rng: Generator) -> np.ndarray:
    """Plasma fractal by diamond-square on a torus, as in ImageNet-C's fog: float32 (size, size)
    from 0 to 1, for a power of two. From one point on, each round halves the spacing: first the
    centres of the squares, the mean of their four corners plus noise, then the middles of the
    sides, the mean of two corners and two centres plus noise. ImageNet-C multiplies its ``wibble``
    with noise of the same range: the noise gets smaller by the square of ``decay`` (above 1; small
    is rough). Draws do not depend on it."""
    corners, range_ = np.zeros((1, 1), dtype=np.float32), 1.0
    while (n := len(corners)) < size:
        noise = (rng.random((3, n, n), dtype=np.float32) - 0.5) * np.float32(2 * range_)
        pairs = corners + np.roll(corners, -1, axis=0)
        centres = (pairs + np.roll(pairs, -1, axis=1)) / 4 + noise[0]
        tops = corners + np.roll(corners, -1, axis=1) + centres + np.roll(centres, 1, axis=0)
        lefts = pairs + centres + np.roll(centres, 1, axis=1)
        finer = np.empty((2 * n, 2 * n), dtype=np.float32)
        finer[::2, ::2], finer[1::2, 1::2] = corners, centres
        finer[::2, 1::2], finer[1::2, ::2] = tops / 4 + noise[1], lefts / 4 + noise[2]
        corners, range_ = finer, range_ / decay**2
    corners -= corners.min()
    return corners / corners.max()


def _snow(
    image: np.ndarray,
    rng: Generator,
    noise: tuple[float, float],
    zoom: float,
    threshold: float,
    blur: tuple[int, float],
    keep: float,
) -> np.ndarray:
    """ImageNet-C's snow: a whitened image (``keep`` of it, the rest at least 1.5 times its grey
    plus a half), and flakes on it, twice: ``noise`` (mean, spread), its middle enlarged by
    ``zoom``, where it reaches ``threshold``, smeared (``blur``: radius, sigma) in a direction drawn
    last."""
    height, width, _ = image.shape
    mean, spread = map(np.float32, noise)
    flakes = mean + spread * rng.standard_normal((height, width), dtype=np.float32)
    flakes = _zoom_middle(flakes, zoom)
    flakes = np.where(flakes < threshold, 0, np.minimum(flakes, 1))
    flakes = _smear(flakes[:, :, None], *blur, rng.uniform(-135, -45))[:height, :width]
    flakes = np.rint(255 * flakes)
    kept, levels = np.float32(keep), image.astype(np.float32)
    whitened = levels @ np.array(BGR_GREY, dtype=np.float32)[:, None] * 1.5 + 127.5
    levels = kept * levels + (1 - kept) * np.maximum(levels, whitened)
    return _levels(levels + flakes + flakes[::-1, ::-1])


def _zoom_middle(values: np.ndarray, zoom: float) -> np.ndarray:
    """The middle 1 / zoom of an image (H, W), linearly enlarged to H, W or slightly more; first and
    last samples stay first and last (as ``scipy.ndimage.zoom`` of order 1)."""
    for axis, n in enumerate(values.shape):
        kept = math.ceil(n / zoom)
        first = (n - kept) // 2
        at = np.linspace(0, kept - 1, round(kept * zoom))
        lower = np.minimum(at.astype(int), max(kept - 2, 0))
        upper = np.minimum(lower + 1, kept - 1)
        weight = np.expand_dims((at - lower).astype(np.float32), 1 - axis)
        below, above = (values.take(first + index, axis) for index in (lower, upper))
        values = below + weight * (above - below)
    return values


def _levels(values: np.ndarray) -> np.ndarray:
    """Float levels to uint8: rounded, and cut off at 0 and 255."""
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


_SNOW = (
    ((0.1, 0.3), 3, 0.5, (10, 4), 0.8),
    ((0.2, 0.3), 2, 0.5, (12, 4), 0.7),
    ((0.55, 0.3), 4, 0.9, (12, 8), 0.7),
)
_TABLE = {
    "frame_lost": (_frame_lost, ((2 / 6,), (4 / 6,), (5 / 6,))),
    "motion_blur": (_motion_blur, ((15, 5), (15, 12), (20, 15))),
    "color_quant": (_color_quant, ((4,), (3,), (2,))),
    "brightness": (_brightness, ((0.2,), (0.4,), (0.5,))),
    # RoboBEV looks up its severities 2, 3, 4 from 0, not from 1: one row harder than meant.
    "low_light": (_low_light, ((0.4, 120, 0.018), (0.3, 50, 0.026), (0.2, 30, 0.038))),
    "fog": (_fog, ((2.0, 2), (2.5, 1.5), (3.0, 1.4))),
    "snow": (_snow, _SNOW),
}
"""Function and settings by severity; CameraCrash is a matter of the set, not of an image."""
