"""Gradients of whole networks: they must not depend on how a batch is split.

A layer whose backward pass goes wrong for some memory format or batch size shows here and nowhere
else: values, and so losses, stay right.
"""

import numpy as np
import pytest
import torch
from tiny_store import make_tiny_store
from torch import nn
from torch.nn import functional as F
from train_runs import COMPARABLE, SMALL

from occfeat_targets.store.reader import open_store
from occfeat_train.config import TrainConfig
from occfeat_train.data.dataset import FrameDataset
from occfeat_train.models.instance_norm import InstanceNorm
from occfeat_train.network import build_network
from occfeat_train.runs.job import Job
from occfeat_train.train import prepare

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {
    "occfeat": ("pretrain", None),
    "bevformer": ("pretrain", None, "model.lift=bevformer"),
    "resnet": ("pretrain", None, "model.encoder=resnet-50"),
    "img-also": ("pretrain", None, "pretrain.objective=img-also"),
    "vehicle": ("finetune", "vehicle"),
    "map": ("finetune", "map"),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One scene of four frames, with a map."""
    path = tmp_path_factory.mktemp("gradients") / "targets.zarr"
    return open_store(str(make_tiny_store(path, splits={"mini_train": 1}, with_map=True)))


def _network(case, store, *settings):
    kind, task, *others = CASES[case]
    config = TrainConfig.load(None, [*SMALL, *COMPARABLE, *others, *settings])
    job = Job(kind, store.url, config, task=task)
    torch.manual_seed(0)
    network = build_network(job, store, load_weights=False)[0].train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # drawn anew for each forward pass
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.ones_(module.weight)  # zero at the start, which would hide a whole branch
    return job, network.double().to(DEVICE)  # norms of so few cells make much of rounding errors


def _gradients(job, network, parts):
    """Of a step on some frames, cut into parts."""
    data = FrameDataset(job.store, range(4), ("images", *network.objective.arrays))
    parts = [
        prepare(data.collate([data[i] for i in part]), job, network, 0, DEVICE) for part in parts
    ]
    counts = sum(network.objective.counts(targets) for _, targets in parts).tolist()
    network.zero_grad()
    for inputs, targets in parts:
        inputs |= {"images": inputs["images"].double()}
        targets = {k: v.double() if v.is_floating_point() else v for k, v in targets.items()}
        network(inputs, targets, counts, 1 / len(parts))[0].backward()
    return {name: p.grad.clone() for name, p in network.named_parameters()}


def _assert_close(got, expected):
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (got[name] - gradient).norm()
        # A bias before a normalisation has no gradient but rounding errors.
        assert error < 1e-3 * gradient.norm() + 1e-6 * largest * gradient.numel() ** 0.5, name


@pytest.mark.parametrize("case", CASES)
def test_four_samples_at_once_and_one_by_one_have_the_same_gradient(case, store):
    job, network = _network(case, store)
    together = _gradients(job, network, [range(4)])
    _assert_close(_gradients(job, network, [[0], [1], [2], [3]]), together)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_memory_format_changes_no_gradient(case, batch, store):
    """With batch norms at work, which the test above must freeze."""
    job, network = _network(case, store, "model.freeze_batch_norm=false")
    frames = [range(batch)]
    fast = _gradients(job, network, frames)
    plain = network.to(memory_format=torch.contiguous_format)
    _assert_close(_gradients(job, plain, frames), fast)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("channels", [4, 33])
@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("g_format", [torch.contiguous_format, torch.channels_last])
def test_instance_norm_in_float64(batch, channels, x_format, g_format):
    rng = np.random.default_rng(0)
    x, g = (rng.normal(size=(batch, channels, 5, 6)) for _ in range(2))
    x = (x * rng.uniform(0.05, 1, (channels, 1, 1)) + 3).astype(np.float32).astype(float)
    leaf = torch.from_numpy(x).float().to(DEVICE).contiguous(memory_format=x_format)
    got = InstanceNorm()(leaf.requires_grad_())
    got.backward(torch.from_numpy(g).float().to(DEVICE).contiguous(memory_format=g_format))
    expected, slope = np.empty_like(x), np.empty_like(x)
    for b, c in np.ndindex(batch, channels):
        scale = 1 / np.sqrt(x[b, c].var() + 1e-5)
        normal = (x[b, c] - x[b, c].mean()) * scale
        expected[b, c] = normal
        slope[b, c] = scale * (g[b, c] - g[b, c].mean() - normal * (g[b, c] * normal).mean())
    np.testing.assert_allclose(got.detach().cpu(), expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(leaf.grad.cpu(), slope, rtol=1e-5, atol=2e-5)


def test_instance_norm_keeps_autocast_out(monkeypatch):
    """On a GPU it would make float32 of half precision."""
    seen, original = [], F.group_norm

    def group_norm(*arguments):
        seen.append(torch.is_autocast_enabled("cpu"))
        return original(*arguments)

    monkeypatch.setattr(F, "group_norm", group_norm)
    x = torch.randn(1, 4, 5, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert InstanceNorm()(x).dtype == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]
