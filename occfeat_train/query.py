"""Where in a frame a network sees what a text says."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from occfeat_targets.store.colours import directions
from occfeat_targets.store.files import StoreError
from occfeat_targets.store.pick import SCALE
from occfeat_targets.store.pretrained import TextTower
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.texts import Texts
from occfeat_train.evaluate import predict
from occfeat_train.geometry import project
from occfeat_train.network import frames_for
from occfeat_train.runs.job import Job
from occfeat_train.runs.resolve import require_words
from occfeat_train.runs.run import Run, check_same_teacher
from occfeat_train.view import Viewer, draw_bev, require_place

TOP = 5
"""How many places are told."""
_APART_M = 4.0
"""Two of them are at least so far apart, or one thing would be all of them."""


_STAR: Any = {"marker": "*", "linestyle": "none", "color": "white", "markeredgecolor": "black"}


class Answer(NamedTuple):
    """What a network says of a frame: V voxels that it takes for occupied."""

    xyz: np.ndarray
    """Their centres (V, 3), metres, ego."""
    likeness: np.ndarray
    """(V,), see ``Texts.likeness``."""
    contrast: bool
    """Whether the likeness to other classes was taken off, so that 0 means as like as another."""
    batch: dict[str, torch.Tensor]
    """The frame: images, K, cam_T_ego."""


def open_viewer(job: Job, run: Run, device: torch.device) -> Viewer:
    """RunError: the run learned no features of voxels, or of another teacher's; others as of
    ``Viewer``."""
    require_words(job)
    viewer = Viewer(job, run, device)
    check_same_teacher(run, viewer.store)
    return viewer


def texts_of(store: TargetStore, text: str, texts: Path | None, clip: Path | None) -> Texts:
    """What has a text in the space of a store's features: a file of texts, or, with it alone, the
    text tower of a CLIP's directory. StoreError: it is in another space; ConfigError: it lacks the
    text."""
    if texts:
        found = Texts.load(texts)
    else:
        tower = TextTower(Path(str(clip)))
        vector = tower.ensemble([text])
        found = Texts(vector[None], [text], [0], ["asked"], f"{clip}", tower.teacher)
    found.require_space_of(store)
    found.find(text)
    return found


def ask(viewer: Viewer, i: int, text: str, texts: Texts) -> Answer:
    """How like a text frame i is, where the network takes it for occupied."""
    network, job = viewer.network, viewer.job
    head: Any = network.objective.head
    dataset = frames_for(job, network, [i], ("images",))
    batch = dataset.collate([dataset[0]])
    on_device = {name: values.to(viewer.device) for name, values in batch.items()}

    def answer(bev: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        opened = head.open(bev)
        occupied = (head.logits(opened) > 0).flatten().nonzero()[:, 0]
        return occupied, head.features_of(opened, occupied)

    occupied, features = (part.cpu() for part in predict(network, on_device, answer))
    seen, unit = directions(features.float().numpy())
    xyz = viewer.store.grid.centres(occupied.numpy()[seen])
    return Answer(xyz, texts.likeness(text, unit), len(texts.class_names) > 1, batch)


def places(answer: Answer) -> list[int]:
    """Voxels that are nearest to the text, best first, none near another one."""
    found: list[int] = []
    for voxel in np.argsort(-answer.likeness, kind="stable"):
        apart = np.linalg.norm(answer.xyz[found] - answer.xyz[voxel], axis=1)
        if (apart >= _APART_M).all():
            found.append(int(voxel))
        if len(found) == TOP:
            break
    return found


def save_answer(viewer: Viewer, i: int | None, text: str, texts: Texts, out: Path) -> str:
    """Draw what is like a text in frame i, None the first of the evaluation split, to a PNG; and
    say what is most like it. Raises as ``save_frame`` does."""
    require_place(out)
    i = viewer.held_out()[0] if i is None else i
    if not 0 <= i < len(viewer.store):
        raise StoreError(f"no frame {i}: {viewer.store.url} has {len(viewer.store)} frames")
    answer = ask(viewer, i, text, texts)
    if not len(answer.xyz):
        return f"frame {i}: {viewer.run.path} takes no voxel for occupied"
    best = places(answer)
    title = f"“{text}” in frame {i} ({viewer.store.scene(i)}) as {viewer.run.path} sees it"
    _draw(title, viewer.store, answer, best).savefig(out, dpi=75, format="png")
    lines = [f"{out}: {title}"]
    if answer.contrast:
        n = int((answer.likeness > 0).sum())
        lines.append(f"  {n} of {len(answer.xyz)} voxels are more like it than like another class")
    lines += [f"  likeness: {_kind(answer)}", "  likeness  x ahead, y left, z up (m)"]
    for voxel in best:
        x, y, z = answer.xyz[voxel]
        lines.append(f"  {answer.likeness[voxel]:8.3f}  {x:7.1f} {y:7.1f} {z:6.1f}")
    return "\n".join(lines)


def _kind(answer: Answer) -> str:
    return "cosine with the text" + ", less that with the nearest other class" * answer.contrast


def _draw(title: str, store: TargetStore, answer: Answer, best: list[int]) -> Any:
    """The cameras with the voxels at the left, from above at the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scale = _scale(answer)
    names = store.attrs["cameras"]
    columns = -(-len(names) // 2)
    figure = Figure(figsize=(5.5 * columns + 8, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(1, 2, width_ratios=[5.5 * columns, 8])
    axes = parts[0].subplots(min(2, len(names)), columns, squeeze=False).ravel()
    for c, (axis, name) in enumerate(zip(axes, names, strict=False)):
        _draw_camera(axis, answer, c, scale, best, float(store.grid.cell_size.min()))
        axis.set_title(name, fontsize=10)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    grid, axis = store.grid, parts[1].subplots()
    index, _ = grid.flat_index(answer.xyz)
    _, x, y = np.unravel_index(index, grid.shape)
    picture = np.ones((*grid.bev_shape, 3))
    upwards = np.argsort(answer.likeness, kind="stable")  # of a column the most like one
    picture[x[upwards], y[upwards]] = scale.to_rgba(answer.likeness[upwards])[:, :3]
    draw_bev(axis, grid, picture, "from above: the most like voxel of each column")
    axis.plot(answer.xyz[best, 1], answer.xyz[best, 0], **_STAR, markersize=12)
    parts[1].colorbar(scale, ax=axis, shrink=0.6, label=_kind(answer))
    figure.suptitle(title, fontsize=11, wrap=True)
    return figure


def _scale(answer: Answer) -> Any:
    """Colours from the least to the most like voxel of a frame, since cosines with texts are all
    alike; with other classes the upper half of them is for what is more like this one."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm

    low, high = np.percentile(answer.likeness, [2, 100])
    plain = Normalize(low, max(high, low + 1e-6))
    halves = TwoSlopeNorm(0, min(low, -1e-6), max(high, 1e-6))
    colour = LinearSegmentedColormap.from_list("likeness", [*SCALE.items()])
    return ScalarMappable(halves if answer.contrast else plain, colour)


def _draw_camera(
    axis: Any, answer: Answer, c: int, scale: Any, best: list[int], edge: float
) -> None:
    """The voxels, ``edge`` metres wide, in camera c's image, the most like ones on top, with stars
    at the best places."""
    image, K, pose = (answer.batch[name][0, c] for name in ("images", "K", "cam_T_ego"))
    H, W = image.shape[:2]
    uv, depth = project(torch.from_numpy(answer.xyz).float(), K[None], pose[None])
    inside = (depth[0] > 1) & (uv[0] >= 0).all(dim=1) & (uv[0] < uv.new_tensor([W, H])).all(dim=1)
    shown = np.flatnonzero(inside.numpy())
    shown = shown[np.argsort(answer.likeness[shown], kind="stable")]
    axis.imshow(image.numpy(), extent=(0, W, H, 0))
    # Dots half as wide as a voxel there, in points: an image is about 400 wide.
    wide = 200 * edge * float(K[0, 0]) / W / depth[0][shown].numpy()
    axis.scatter(
        *uv[0][shown].numpy().T,
        c=scale.to_rgba(answer.likeness[shown]),
        s=wide.clip(2, 20) ** 2,
        alpha=0.5,
        lw=0,
    )
    stars = [voxel for voxel in best if inside[voxel]]
    axis.plot(*uv[0][stars].numpy().T, **_STAR, markersize=12)
    axis.set(xticks=[], yticks=[], xlim=(0, W), ylim=(H, 0))
