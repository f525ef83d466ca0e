"""A second, naive computation of what the trainer computes: float64, plain loops, no occfeat code.

Written from the papers' formulas and the conventions alone (OccFeat §3, Simple-BEV's losses, half
open grids, pixels that cover [0, W) x [0, H)). Slow on purpose: every rule stands in a loop where
it can be read. Only the dense OccFeat head uses torch, to have gradients of every parameter.

``bounds`` is ((lo, hi, n) of x, of y, of z); a ``box`` is centre x, y, z, length, width, height,
yaw, visibility.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

# --- grid -----------------------------------------------------------------------------------------


def bounds_of(grid):
    return tuple(grid.x), tuple(grid.y), tuple(grid.z)


def cell_centre(i, axis):
    lo, hi, n = axis
    return lo + (i + 0.5) * (hi - lo) / n


def voxel_centre(ix, iy, iz, bounds):
    return tuple(cell_centre(i, axis) for i, axis in zip((ix, iy, iz), bounds, strict=True))


def flat(ix, iy, iz, bounds):
    """Volume axes (Z, X, Y): y runs fastest, z slowest."""
    return (iz * bounds[0][2] + ix) * bounds[1][2] + iy


def unflat(index, bounds):
    nx, ny = bounds[0][2], bounds[1][2]
    return index // ny % nx, index % ny, index // (nx * ny)


def voxel_of(point, bounds):
    """Flat index of a point's voxel, or None outside the half-open box."""
    index = []
    for value, (lo, hi, n) in zip(point, bounds, strict=True):
        if not lo <= value < hi:
            return None
        index.append(math.floor((value - lo) / ((hi - lo) / n)))
    return flat(*index, bounds)


def border_distance(point, bounds):
    """Metres from a point to the nearest plane between two cells, on any axis."""
    nearest = math.inf
    for value, (lo, hi, n) in zip(point, bounds, strict=True):
        size = (hi - lo) / n
        position = (value - lo) / size
        nearest = min(nearest, abs(position - round(position)) * size)
    return nearest


def turn(point, angle):
    """A point turned counter-clockwise about z."""
    x, y, z = point
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x - sin * y, sin * x + cos * y, z


# --- lifting --------------------------------------------------------------------------------------


def project(point, K, cam_T_bev):
    """(u, v, depth) of a point; u and v are None where the depth is not positive."""
    p = [*point, 1.0]
    x, y, depth = (sum(float(cam_T_bev[r][c]) * p[c] for c in range(4)) for r in range(3))
    if depth <= 0:
        return None, None, depth
    u, v = ((float(K[r][0]) * x + float(K[r][1]) * y) / depth + float(K[r][2]) for r in range(2))
    return u, v, depth


def bilinear_cells(u, v, image_hw, feature_hw):
    """[(i, j, weight)] of the feature cells around a pixel; beyond the border, the nearest cell."""
    (H, W), (h, w) = image_hw, feature_hw
    x, y = u * w / W - 0.5, v * h / H - 0.5  # in cells, a whole number is a cell's centre
    j0, i0 = math.floor(x), math.floor(y)
    cells = []
    for i, wy in ((i0, 1 - (y - i0)), (i0 + 1, y - i0)):
        for j, wx in ((j0, 1 - (x - j0)), (j0 + 1, x - j0)):
            cells.append((min(max(i, 0), h - 1), min(max(j, 0), w - 1), wy * wx))
    return cells


def lifting_weights(point, K, cam_T_bev, image_hw, feature_hw):
    """How a voxel's vector is made of image features.

    Returns:
        [(camera, i, j, weight)], the mean over the cameras that see the point; and whether some
        camera's answer hangs on less than a thousandth of a pixel (or on a tenth of a millimetre
        of depth).
    """
    H, W = image_hw
    seen, close = [], False
    for camera in range(len(K)):
        u, v, depth = project(point, K[camera], cam_T_bev[camera])
        close |= abs(depth) < 1e-4
        if depth <= 0:
            continue
        near_u, near_v = min(abs(u), abs(u - W)), min(abs(v), abs(v - H))
        close |= near_u < 1e-3 and -1 < v < H + 1
        close |= near_v < 1e-3 and -1 < u < W + 1
        if 0 <= u < W and 0 <= v < H:
            seen.append((camera, bilinear_cells(u, v, image_hw, feature_hw)))
    weights = [(c, i, j, weight / len(seen)) for c, cells in seen for i, j, weight in cells]
    return weights, close


def lift(features, weights):
    """A voxel's vector (C,) from features (N, C, h, w) and its :func:`lifting_weights`."""
    vector = np.zeros(features.shape[1])
    for camera, i, j, weight in weights:
        vector += weight * features[camera, :, i, j]
    return vector


def lift_gradient(shape, weights, gradients):
    """Gradient (N, C, h, w) by the features: what each voxel's gradient (C,) sends back."""
    total = np.zeros(shape)
    for cells, gradient in zip(weights, gradients, strict=True):
        for camera, i, j, weight in cells:
            total[camera, :, i, j] += weight * gradient
    return total


# --- deformable attention -------------------------------------------------------------------------


def bilinear_zero(values, x, y):
    """A map (h, w, ...) at column x, row y, in cells; zero beyond. Differentiable if torch."""
    h, w = values.shape[:2]
    j0, i0 = (math.floor(a.item() if torch.is_tensor(a) else a) for a in (x, y))
    total = values[0, 0] * 0
    for i, wy in ((i0, 1 - (y - i0)), (i0 + 1, y - i0)):
        for j, wx in ((j0, 1 - (x - j0)), (j0 + 1, x - j0)):
            if 0 <= i < h and 0 <= j < w:
                total = total + wy * wx * values[i, j]
    return total


def deformable_sums(values, maps, positions, weights):
    """(S, heads, D) of maps (M, h, w, heads, D), positions (S, heads, P, 2), weights."""
    rows = []
    for s, head in np.ndindex(*positions.shape[:2]):
        plane = values[maps[s], :, :, head]
        points = zip(positions[s, head], weights[s, head], strict=True)
        rows.append(sum(weight * bilinear_zero(plane, x, y) for (x, y), weight in points))
    return torch.stack(rows).unflatten(0, positions.shape[:2])


def column_mean(maps, column, K, cam_T_bev, image_hw):
    """BEVFormer's spatial cross-attention of one query with equal weights and no offsets.

    Args:
        maps: (N, h, w, C), one camera each.
        column: points, the anchors of the query.

    Returns:
        The mean (C,) over the cameras that see an anchor, of the mean over all anchors, those
        outside the map or behind the camera as zeros; how many cameras; and whether one of them
        sees some of the anchors only.
    """
    (H, W), (h, w) = image_hw, maps.shape[1:3]
    total, n_cameras, partly = np.zeros(maps.shape[3]), 0, False
    for camera in range(len(maps)):
        pixels = [project(point, K[camera], cam_T_bev[camera]) for point in column]
        seen = [depth > 0 and 0 <= u < W and 0 <= v < H for u, v, depth in pixels]
        if any(seen):
            n_cameras += 1
            partly |= not all(seen)
            for u, v, depth in pixels:
                if depth > 0:
                    x, y = u * w / W - 0.5, v * h / H - 0.5
                    total += bilinear_zero(maps[camera], x, y) / len(column)
    return total / max(n_cameras, 1), n_cameras, partly


# --- OccFeat's head -------------------------------------------------------------------------------


def dense_head(head, bev):
    """The paper's §3.2 as it stands, on the whole volume.

    Returns:
        Occupancy logits (B, Z, X, Y) and features (B, N_y, Z, X, Y); None where the head lacks the
        layer.
    """
    p = dict(head.named_parameters())
    B, C, X, Y = bev.shape
    Z = p["unsplat.weight"].shape[0] // C

    def conv3d(x, name):
        return F.conv3d(x, p[f"{name}.weight"][:, :, None, None, None], p[f"{name}.bias"])

    x = F.conv2d(bev, p["mix.0.weight"], p["mix.0.bias"], padding=1)
    x = F.relu(F.instance_norm(x))
    x = F.conv2d(x, p["unsplat.weight"][:, :, None, None], p["unsplat.bias"])
    volume = x.view(B, Z, C, X, Y).transpose(1, 2)
    volume = conv3d(F.softplus(conv3d(volume, "expand")), "reduce")
    logits = conv3d(volume, "occupancy")[:, 0] if "occupancy.weight" in p else None
    features = conv3d(volume, "features") if "features.weight" in p else None
    return logits, features


def at_voxels(features, voxel):
    """(V, N_y) of (B, N_y, Z, X, Y) at flat (B, Z, X, Y) indices."""
    _, _, Z, X, Y = features.shape
    rows = []
    for index in voxel.tolist():
        sample, rest = divmod(index, Z * X * Y)
        z, rest = divmod(rest, X * Y)
        x, y = divmod(rest, Y)
        rows.append(features[sample, :, z, x, y])
    return torch.stack(rows) if rows else features.new_zeros(0, features.shape[1])


# --- losses ---------------------------------------------------------------------------------------


def cross_entropy(logit, target, pos_weight=1.0):
    """-w·t·log(σ(l)) - (1 - t)·log(1 - σ(l))."""
    log_p = -math.log1p(math.exp(-logit)) if logit > 0 else logit - math.log1p(math.exp(logit))
    log_not_p = log_p - logit
    return -pos_weight * target * log_p - (1 - target) * log_not_p


def occupancy_loss(logits, occupied):
    """Mean over all voxels (eq. 2); ``occupied`` is 0 or 1 of the same shape."""
    pairs = zip(logits.ravel().tolist(), occupied.ravel().tolist(), strict=True)
    return sum(cross_entropy(logit, target) for logit, target in pairs) / logits.size


def feature_loss(predicted, target, valid):
    """Negative mean cosine over valid voxels (eq. 3); 0 without any."""
    total, count = 0.0, 0
    for a, b, use in zip(predicted.tolist(), target.tolist(), valid.tolist(), strict=True):
        if use:
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            total -= dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))
            count += 1
    return total / max(count, 1)


def mask_loss(logits, target, valid, pos_weight):
    """Simple-BEV's cross-entropy: mean over valid cells."""
    total, count = 0.0, 0
    for logit, t, use in zip(*(a.ravel().tolist() for a in (logits, target, valid)), strict=True):
        if use:
            total += cross_entropy(logit, t, pos_weight)
            count += 1
    return total / max(count, 1)


def centre_loss(predicted, target):
    """Simple-BEV's balanced squared error: half the mean near centres plus half that elsewhere."""
    near, far = [], []
    for p, t in zip(predicted.ravel().tolist(), target.ravel().tolist(), strict=True):
        (near if t > 0.5 else far).append((p - t) ** 2)
    return sum(0.5 * sum(part) / max(len(part), 1) for part in (near, far))


def offset_loss(predicted, target, mask):
    """L1 over both components, mean over the cells of the mask (B, X, Y)."""
    total, count = 0.0, 0
    for b, x, y in np.ndindex(mask.shape):
        if mask[b, x, y]:
            total += abs(predicted[b, 0, x, y] - target[b, 0, x, y])
            total += abs(predicted[b, 1, x, y] - target[b, 1, x, y])
            count += 1
    return total / max(count, 1)


def segmentation_loss(mask, centre, offset, log_weights):
    """Simple-BEV's total: each term with a learned weight."""
    w_mask, w_centre, w_offset = log_weights
    total = 10 * mask * math.exp(-w_mask)
    total += 0.5 * centre * math.exp(-w_centre)
    total += 0.5 * offset * math.exp(-w_offset)
    return total + 0.5 * (w_mask + w_centre + w_offset)


def numerical_gradient(function, x, step=1e-5):
    """Central differences of a function of an array."""
    gradient = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        values = []
        for sign in (1, -1):
            moved = x.copy()
            moved[index] += sign * step
            values.append(function(moved))
        gradient[index] = (values[0] - values[1]) / (2 * step)
    return gradient


# --- vehicles -------------------------------------------------------------------------------------


def turned_box(box, angle):
    x, y, z = turn(box[:3], angle)
    return [x, y, z, *box[3:6], box[6] + angle, box[7]]


def inside_by(x, y, box):
    """How far inside the footprint (x, y) lies, in metres; negative outside."""
    dx, dy = x - box[0], y - box[1]
    cos, sin = math.cos(box[6]), math.sin(box[6])
    along, across = dx * cos + dy * sin, dy * cos - dx * sin
    return min(box[3] / 2 - abs(along), box[4] / 2 - abs(across))


def vehicle_maps(boxes, bounds, tie_m=0.0):
    """Maps of one sample, cell by cell.

    Returns:
        ``vehicle``, ``visible``, ``centre`` (X, Y), ``offset`` (2, X, Y) and ``tie``: cells that
        lie within ``tie_m`` of some footprint's edge.
    """
    axis_x, axis_y = bounds[:2]
    nx, ny = axis_x[2], axis_y[2]
    maps = {name: np.zeros((nx, ny)) for name in ("vehicle", "centre", "tie")}
    maps |= {"visible": np.ones((nx, ny)), "offset": np.zeros((2, nx, ny))}
    in_cells = []
    for box in boxes:
        u = (box[0] - axis_x[0]) / ((axis_x[1] - axis_x[0]) / nx) - 0.5
        v = (box[1] - axis_y[0]) / ((axis_y[1] - axis_y[0]) / ny) - 0.5
        in_cells.append((u, v))
    for i, j in np.ndindex(nx, ny):
        x, y = cell_centre(i, axis_x), cell_centre(j, axis_y)
        depths = [inside_by(x, y, box) for box in boxes]
        maps["tie"][i, j] = any(abs(depth) <= tie_m for depth in depths)
        covering = [k for k, depth in enumerate(depths) if depth >= 0]
        if covering:
            maps["vehicle"][i, j] = 1
            maps["visible"][i, j] = any(boxes[k][7] != 1 for k in covering)
            u, v = in_cells[min(covering, key=lambda k: boxes[k][7] == 1)]  # a visible one first
            maps["offset"][:, i, j] = i - u, j - v
        for u, v in in_cells:
            square = (i - round(u)) ** 2 + (j - round(v)) ** 2
            heat = math.exp(-square / (2 * 3**2))
            if heat >= 0.001:
                maps["centre"][i, j] = max(maps["centre"][i, j], heat)
    return maps


# --- map ------------------------------------------------------------------------------------------


def map_loss(logits, target, known, pos_weight=1.0):
    """Mean over classes of the cross-entropy's mean over known cells; (B, K, X, Y), (B, X, Y)."""
    terms = [
        mask_loss(logits[:, k], target[:, k], known, pos_weight) for k in range(logits.shape[1])
    ]
    return sum(terms) / len(terms), terms


def turned_map(stored, angle, bounds, tie_m=0.0):
    """Masks (K, X, Y) seen in a frame turned by an angle, cell by cell.

    Returns:
        ``map`` and ``known``, and ``tie``: cells whose centre lies within ``tie_m`` of the edge
        between two stored cells.
    """
    flat_bounds = (*bounds[:2], (-1.0, 1.0, 1))
    nx, ny = bounds[0][2], bounds[1][2]
    turned = np.zeros((len(stored), nx, ny))
    known, tie = np.zeros((nx, ny), bool), np.zeros((nx, ny), bool)
    for i, j in np.ndindex(nx, ny):
        centre = cell_centre(i, bounds[0]), cell_centre(j, bounds[1])
        x, y, _ = turn((*centre, 0.0), -angle)  # back to ego
        tie[i, j] = border_distance((x, y), bounds[:2]) <= tie_m
        cell = voxel_of((x, y, 0.0), flat_bounds)
        if cell is not None:
            known[i, j] = True
            source_x, source_y, _ = unflat(cell, flat_bounds)
            turned[:, i, j] = stored[:, source_x, source_y]
    return turned, known, tie


# --- queries (ALSO's create_points.py and decoder.py, Img-ALSO of OccFeat §4.2) -----------------


def first_in_cubes(steps, step_mm):
    """Indices of the first point in each 100 mm cube, cubes in order; whole steps (P, 3)."""
    first = {}
    for i, point in enumerate(steps):
        first.setdefault(tuple(int(value) * step_mm // 100 for value in point), i)
    return [first[cube] for cube in sorted(first)]


def query(point, sensor, kind, u):
    """A query ("front", "between" or "behind") on the ray of a point, and its label."""
    ray = [p - s for p, s in zip(point, sensor, strict=True)]
    length = math.sqrt(sum(r * r for r in ray))
    if kind == "between":
        return [s + u * r for s, r in zip(sensor, ray, strict=True)], 0
    sign = 1 if kind == "behind" else -1
    moved = [p + sign * 0.1 * u * r / length for p, r in zip(point, ray, strict=True)]
    return moved, int(kind == "behind")


def near_pairs(points, bounds, tie_m=0.0):
    """{(point, flat (X, Y) cell): relative place} of cells with a centre within 1 m of a point.

    Returns:
        The pairs, and those of them and others that hang on less than ``tie_m``.
    """
    (lo_x, hi_x, nx), (lo_y, hi_y, ny) = bounds[:2]
    pairs, ties = {}, set()
    for q, (x, y, z) in enumerate(points):
        edge = min(abs(x - lo_x), abs(x - hi_x), abs(y - lo_y), abs(y - hi_y))
        in_map = lo_x <= x < hi_x and lo_y <= y < hi_y
        for i, j in np.ndindex(nx, ny):
            dx, dy = x - cell_centre(i, bounds[0]), y - cell_centre(j, bounds[1])
            distance = math.hypot(dx, dy)
            if abs(distance - 1) <= tie_m or edge <= tie_m:
                ties.add((q, i * ny + j))
            if in_map and distance <= 1:
                pairs[q, i * ny + j] = (dx, dy, z)
    return pairs, ties


def query_loss(head, bev, pairs):
    """Img-ALSO's two terms, layer by layer for each pair; torch, for its gradients.

    Args:
        head: with the layers ``latent``, ``enter``, ``hidden``, ``leave``, ``output``.
        bev: (B, C, X, Y).
        pairs: [(sample, ix, iy, relative place, label, intensity or None)].
    """
    occupancy, intensity = [], []
    for sample, ix, iy, relative, label, brightness in pairs:
        x = head.latent(bev[sample, :, ix, iy])
        x = head.enter(torch.cat([x, x.new_tensor(relative)]))
        for layer in (head.hidden, head.leave):
            x = layer(x.clamp(min=0))
        logit, predicted = head.output(x)
        p = 1 / (1 + torch.exp(-logit))
        occupancy.append(-torch.log(p if label else 1 - p))
        if brightness is not None:
            intensity.append(abs(predicted - brightness))
    return sum(occupancy) / len(occupancy), sum(intensity) / len(intensity)


# --- metric ---------------------------------------------------------------------------------------


def iou_counts(probability, target, visible, bounds, thresholds, ring_edges):
    """int (2, R, T, 3): visible cells only or all; ring; threshold; TP, FP, FN."""
    counts = np.zeros((2, len(ring_edges) + 1, len(thresholds), 3), dtype=np.int64)
    for b, i, j in np.ndindex(probability.shape):
        distance = math.hypot(cell_centre(i, bounds[0]), cell_centre(j, bounds[1]))
        ring = sum(distance >= edge for edge in ring_edges)
        for t, threshold in enumerate(thresholds):
            predicted, true = probability[b, i, j] > threshold, target[b, i, j] == 1
            if not predicted and not true:
                continue
            outcome = 0 if predicted and true else 1 if predicted else 2
            counts[1, ring, t, outcome] += 1
            if visible[b, i, j]:
                counts[0, ring, t, outcome] += 1
    return counts


# --- images ---------------------------------------------------------------------------------------


def published_intrinsics(K, old_wh, new_wh, resize, shift_px, whole_pixels):
    """Simple-BEV's intrinsics after resizing by ``resize`` x the new size and cropping.

    Args:
        K: (3, 3) of the image of ``old_wh``.
        old_wh, new_wh: sizes before, and of the crop.
        resize: factor on the new size.
        shift_px: (x, y) by which the window is moved from the middle.
        whole_pixels: sizes and offsets are cut to whole numbers, as in the published code.

    Returns:
        (fx, fy, x0, y0).
    """
    result = []
    for axis, row in ((0, K[0]), (1, K[1])):
        cut = int if whole_pixels else float
        size = cut(new_wh[axis] * resize)
        crop = cut((size - new_wh[axis]) / 2) + cut(shift_px[axis])
        scale = size / old_wh[axis]
        result.append((row[axis] * scale, row[2] * scale - crop))
    (fx, x0), (fy, y0) = result
    return fx, fy, x0, y0


def bilinear_pixel(image, u, v):
    """Colour (C,) of an image (C, H, W) at a continuous pixel, the border repeated."""
    hw = image.shape[-2:]
    return sum(weight * image[:, i, j] for i, j, weight in bilinear_cells(u, v, hw, hw))


# --- batches --------------------------------------------------------------------------------------


def collated(frames, n_voxels):
    """Frames of a store, as :func:`with_vehicles` gives them, as one batch without images."""

    def joined(name):
        return torch.from_numpy(np.concatenate([frame[name] for frame in frames]))

    def stacked(name):
        return torch.from_numpy(np.stack([frame[name] for frame in frames]))

    voxel = [frame["voxel_index"].astype(np.int64) + b * n_voxels for b, frame in enumerate(frames)]
    batch = {"voxel": torch.from_numpy(np.concatenate(voxel).astype(np.int32))}
    for name in ("features", "feature_scale", "feature_cameras", "points", "vehicles"):
        batch[name] = joined(name)
    batch |= {name: stacked(name) for name in ("K", "cam_T_ego", "vehicle", "vehicle_visible")}
    for name in ("points", "vehicles"):
        batch[f"n_{name}"] = torch.tensor([len(frame[name]) for frame in frames])
    return batch


def with_vehicles(frame, attrs):
    """A frame of a store with its ``boxes`` of vehicles alone as ``vehicles``."""
    classes = [attrs["box_classes"][number] for number in frame["box_class"]]
    chosen = [name in attrs["vehicle_classes"] for name in classes]
    return frame | {"vehicles": frame["boxes"][np.array(chosen, bool)]}
