"""The corruptions of nuScenes-C once more: pixel by pixel in float64, from the published formulas.

Shares nothing with ``occfeat_targets.corruptions`` but the order in which numbers are drawn.
Severities are RoboBEV's numbers (``nuscenes_c.py``), the tables those of ImageNet-C and RoboBEV.
"""

import colorsys
import math

import numpy as np

SEVERITY = {
    "motion_blur": (2, 4, 5),
    "color_quant": (1, 2, 3),
    "brightness": (2, 4, 5),
    "low_light": (2, 3, 4),
    "fog": (2, 4, 5),
    "snow": (1, 2, 3),
}


def smeared(values, radius, sigma, degrees):
    """One-sided motion blur of (H, W, C), edges replicated."""
    height, width = values.shape[:2]
    kernel = [math.exp(-(i * i) / (2 * sigma * sigma)) for i in range(2 * radius + 1)]
    down, right = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    out = np.zeros(values.shape)
    for y in range(height):
        for x in range(width):
            for i, weight in enumerate(kernel):
                dy, dx = -math.ceil(i * down - 0.5), -math.ceil(i * right - 0.5)
                row, column = min(max(y - dy, 0), height - 1), min(max(x - dx, 0), width - 1)
                out[y, x] += weight / sum(kernel) * values[row, column]
    return out


def motion_blur(image, severity, rng):
    radius, sigma = [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)][severity - 1]
    return smeared(image.astype(float), radius, sigma, rng.uniform(-45, 45))


def color_quant(image, severity, rng):
    step = 2 ** (8 - (5 - severity))
    return image // step * step


def brightness(image, severity, rng):
    added = [0.1, 0.2, 0.3, 0.4, 0.5][severity - 1]
    out = np.zeros(image.shape)
    for at in np.ndindex(image.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*(image[at] / 255))
        out[at] = colorsys.hsv_to_rgb(h, s, min(v + added, 1))
    return 255 * out


def low_light(image, severity, rng):
    scale = [0.60, 0.50, 0.40, 0.30, 0.20][severity]  # sic: not severity - 1
    photons = 10 * [60, 25, 12, 5, 3][severity]
    sigma = 0.1 * [0.08, 0.12, 0.18, 0.26, 0.38][severity]
    x = image / 255
    dark = ((x - x.min()) / (x.max() - x.min())) ** 2 * scale
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    light = np.clip(rng.poisson(dark * photons) / photons, 0, 1)
    return 255 * np.clip(light + sigma * noise, 0, 1)


def plasma(size, decay, rng):
    """Diamond-square on a torus, point by point."""
    grid = {(0, 0): 0.0}
    step, wibble = size, 100.0
    while step >= 2:
        n, half = size // step, step // 2
        noise = wibble * wibble * (2 * rng.random((3, n, n), dtype=np.float32).astype(float) - 1)

        def mean(*points):
            return sum(grid[y % size, x % size] for y, x in points) / 4

        for i, j in np.ndindex(n, n):
            y, x = i * step, j * step
            corners = (y, x), (y + step, x), (y, x + step), (y + step, x + step)
            grid[y + half, x + half] = mean(*corners) + noise[0, i, j]
        for i, j in np.ndindex(n, n):
            y, x = i * step, j * step
            above = (y, x), (y, x + step), (y + half, x + half), (y - half, x + half)
            grid[y, x + half] = mean(*above) + noise[1, i, j]
            beside = (y, x), (y + step, x), (y + half, x + half), (y + half, x - half)
            grid[y + half, x] = mean(*beside) + noise[2, i, j]
        step //= 2
        wibble /= decay
    values = np.array([[grid[y, x] for x in range(size)] for y in range(size)])
    return (values - values.min()) / (values.max() - values.min())


def fog(image, severity, rng):
    amount, decay = [(1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)][severity - 1]
    x, size = image / 255, 1
    while size < max(image.shape):
        size *= 2
    layer = plasma(size, decay, rng)[: image.shape[0], : image.shape[1]]
    return 255 * np.clip((x + amount * layer[..., None]) * x.max() / (x.max() + amount), 0, 1)


def zoomed(values, zoom):
    """The middle, enlarged: linear between samples, corners on corners."""
    height, width = (math.ceil(n / zoom) for n in values.shape)
    top, left = (values.shape[0] - height) // 2, (values.shape[1] - width) // 2
    middle = values[top : top + height, left : left + width]
    out = np.zeros((round(height * zoom), round(width * zoom)))
    for y, x in np.ndindex(out.shape):
        v, u = y * (height - 1) / (len(out) - 1), x * (width - 1) / (out.shape[1] - 1)
        i, j = min(int(v), height - 2), min(int(u), width - 2)
        b, a = v - i, u - j
        out[y, x] = (1 - b) * ((1 - a) * middle[i, j] + a * middle[i, j + 1])
        out[y, x] += b * ((1 - a) * middle[i + 1, j] + a * middle[i + 1, j + 1])
    return out


def snow(image, severity, rng):
    mean, spread, zoom, threshold, radius, sigma, keep = [
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    ][severity - 1]
    height, width, _ = image.shape
    layer = zoomed(mean + spread * rng.standard_normal((height, width), dtype=np.float32), zoom)
    layer[layer < threshold] = 0
    layer = smeared(np.clip(layer, 0, 1)[..., None], radius, sigma, rng.uniform(-135, -45))
    layer = np.round(255 * layer[:height, :width]) / 255
    x = image / 255
    grey = x @ [0.114, 0.587, 0.299]  # the grey of RGB images, applied to BGR ones
    x = keep * x + (1 - keep) * np.maximum(x, grey[..., None] * 1.5 + 0.5)
    return 255 * np.clip(x + layer + np.rot90(layer, 2), 0, 1)
