"""Counts for IoU against a loop over cells."""

import numpy as np
import pytest
import torch
import train_reference as reference

from occfeat_targets.store.grid import VoxelGrid
from occfeat_train.tasks.masks import HEADLINE, RANGES_M, THRESHOLDS, IoUCounter, iou

# Cells of every ring, many just at its edge: centres at whole metres, (12, 16) at 20 m.
GRID = VoxelGrid((-8.5, 62.5, 71), (-20.5, 22.5, 43), (-1.0, 1.0, 2))
BOUNDS = reference.bounds_of(GRID)
CPU = torch.device("cpu")


def scene(seed=0, batch=2):
    """Random probabilities, many exactly at a threshold; targets and visibility."""
    rng = np.random.default_rng(seed)
    shape = (batch, *GRID.bev_shape)
    probability = rng.uniform(0.3, 0.7, shape).astype(np.float32)
    exact = rng.choice([*THRESHOLDS, 0.0, 1.0], shape).astype(np.float32)
    probability = np.where(rng.uniform(size=shape) < 0.4, exact, probability)
    target = (rng.uniform(size=shape) < 0.3).astype(np.uint8)
    visible = (rng.uniform(size=shape) < 0.8).astype(np.uint8)
    return probability, target, visible


def add(counter, arrays):
    """A scene of one class."""
    probability, target, visible = map(torch.as_tensor, arrays)
    counter.add(probability[:, None], target[:, None], visible)


def count(*scenes):
    """(2, R, T, 3) of the only class."""
    counter = IoUCounter(GRID, CPU)
    for arrays in scenes:
        add(counter, arrays)
    return counter.counts()[0]


def naive(arrays):
    thresholds = [np.float32(t) for t in THRESHOLDS]
    return reference.iou_counts(*arrays, BOUNDS, thresholds, RANGES_M)


def test_counts_equal_a_loop_over_cells():
    arrays = scene()
    counts = count(arrays)
    assert counts.dtype == torch.int64
    expected = naive(arrays)
    assert (expected[:, :, HEADLINE] > 0).all()  # every ring, with and without hidden cells
    np.testing.assert_array_equal(counts.numpy(), expected)


def test_a_probability_at_the_threshold_is_not_positive():
    target = visible = np.ones((1, *GRID.bev_shape), dtype=np.uint8)
    n = target.size
    at = count((np.full(target.shape, 0.5, np.float32), target, visible)).sum(1)[0, HEADLINE]
    assert at.tolist() == [0, 0, n]
    barely = np.full(target.shape, np.nextafter(np.float32(0.5), np.float32(1)))
    above = count((barely, target, visible)).sum(1)[0, HEADLINE]
    assert above.tolist() == [n, 0, 0]


def test_the_headline_is_the_threshold_of_one_half():
    assert THRESHOLDS[HEADLINE] == 0.5
    assert THRESHOLDS == (0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65)


def test_counts_of_two_halves_add_up():
    first, second = scene(1, batch=1), scene(2, batch=3)
    whole = tuple(np.concatenate(pair) for pair in zip(first, second, strict=True))
    assert torch.equal(count(first) + count(second), count(whole))
    assert torch.equal(count(first, second), count(whole))


def test_counting_again_does_not_change_what_was_counted():
    counter = IoUCounter(GRID, CPU)
    add(counter, scene())
    assert torch.equal(counter.counts(), counter.counts())


def test_every_class_has_the_counts_of_its_own():
    scenes = [scene(seed) for seed in range(3)]
    counter, halves = IoUCounter(GRID, CPU, 3), [IoUCounter(GRID, CPU, 3) for _ in range(2)]
    probability, target = (
        torch.from_numpy(np.stack([s[part] for s in scenes], axis=1)) for part in (0, 1)
    )
    visible = torch.from_numpy(scenes[0][2])
    counter.add(probability, target, visible)
    counts = counter.counts()
    assert counts.shape == (3, 2, len(RANGES_M) + 1, len(THRESHOLDS), 3)
    for mine, (one_probability, one_target, _) in zip(counts, scenes, strict=True):
        expected = naive((one_probability, one_target, scenes[0][2]))
        np.testing.assert_array_equal(mine.numpy(), expected)
    for b, half in enumerate(halves):
        half.add(probability[b : b + 1], target[b : b + 1], visible[b : b + 1])
    assert torch.equal(sum(half.counts() for half in halves), counts)


def test_hidden_cells_count_only_among_all_cells():
    probability, target, _ = scene()
    hidden = np.zeros_like(target)
    counts = count((probability, target, hidden))
    assert not counts[0].any()
    visible = np.ones_like(target)
    assert torch.equal(counts[1], count((probability, target, visible))[0])


def test_a_cell_at_the_edge_of_a_ring_belongs_to_the_outer_one():
    i, j = 12 + 8, 16 + 20  # 20 m from ego
    probability, target, visible = (np.zeros((1, *GRID.bev_shape), t) for t in ("f4", "u1", "u1"))
    target[0, i, j] = visible[0, i, j] = 1
    found = count((probability, target, visible))[0, :, HEADLINE]
    assert found.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_lower_precision_and_other_dtypes_count_alike():
    probability, target, visible = (torch.from_numpy(a) for a in scene())
    probability = probability.bfloat16()
    expected = naive((probability.float().numpy(), target.numpy(), visible.numpy()))
    counter = IoUCounter(GRID, CPU)
    strided = probability.transpose(1, 2).contiguous().transpose(1, 2)
    add(counter, (strided, target.float(), visible.bool()))
    np.testing.assert_array_equal(counter.counts()[0].numpy(), expected)


def test_iou_is_true_positives_over_the_union_and_undefined_without_one():
    counts = torch.tensor([[3, 2, 1], [0, 4, 0], [5, 0, 0], [0, 0, 0]])
    values = iou(counts)
    assert values.dtype == torch.float64
    assert values[:3].tolist() == pytest.approx([0.5, 0.0, 1.0])
    assert values[3].isnan()


def test_counts_do_not_overflow_where_float32_would_round():
    exact = torch.tensor([2**30 + 1, 0, 2**30])
    assert iou(exact).item() == (2**30 + 1) / (2**31 + 1)
