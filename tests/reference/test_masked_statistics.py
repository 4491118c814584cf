"""Means, variances and whitening over a mask or a group, padding, positions."""

from __future__ import annotations

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from dressage.tensors import (
    group_mean,
    group_size,
    masked_mean,
    masked_var,
    pad_right,
    position_ids,
    whiten,
)

TABLE = tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
WHITE = tensor([[0.0508, 0.4381, 0.8254], [1.2127, 1.6000, 1.9873], [2.3746, 2.7619, 3.1492]])


def test_whitening_table() -> None:
    everything = torch.ones_like(TABLE, dtype=torch.bool)
    assert_close(whiten(TABLE, everything, shift_mean=False), WHITE, rtol=0, atol=5e-5)
    assert_close(whiten(TABLE, everything), WHITE - 1.6, rtol=0, atol=1e-4)


@pytest.mark.parametrize("garbage", [0.0, 1e6, float("nan"), float("inf")])
def test_whitening_sees_only_what_counts(garbage: float) -> None:
    """The table's nine numbers, strewn over a larger tensor that holds anything elsewhere."""
    mask = torch.zeros(5, 4, dtype=torch.bool)
    mask.view(-1)[[0, 1, 3, 6, 8, 9, 13, 14, 19]] = True
    values = torch.full((5, 4), garbage).masked_scatter(mask, TABLE)
    white = whiten(values, mask, shift_mean=False)
    assert_close(white[mask], WHITE.view(-1), rtol=0, atol=5e-5)
    assert (white[~mask] == 0).all()


def test_mean_and_variance_by_hand() -> None:
    values, mask = tensor([[1.0, 100.0], [2.0, 6.0]]), tensor([[True, False], [True, True]])
    assert masked_mean(values, mask).item() == 3.0
    assert_close(masked_var(values, mask), tensor(14 / 3))  # ((-2)^2 + (-1)^2 + 3^2) / 3: population, not sample


def test_statistics_of_nothing_are_0() -> None:
    values, nothing = tensor([[float("nan"), 2.0]]), tensor([[False, False]])
    assert masked_mean(values, nothing).item() == masked_var(values, nothing).item() == 0.0
    assert whiten(values, nothing).tolist() == [[0.0, 0.0]]


def test_eps_stands_inside_the_root() -> None:
    """Variance 1 and eps 3: divided by 2, not by 4 or by 2.73."""
    assert whiten(tensor([[1.0, -1.0]]), tensor([[True, True]]), eps=3.0).tolist() == [[0.5, -0.5]]


def test_equal_advantages_whiten_to_0() -> None:
    assert whiten(tensor([[0.7, 0.7, 0.7]]), tensor([[True] * 3])).abs().max() < 1e-2


def test_group_mean_by_hand_whatever_the_groups_are_called() -> None:
    values = tensor([1.0, 10.0, 3.0, 20.0, 30.0])
    group = tensor([7, -2, 7, -2, -2])
    assert group_mean(values, group).tolist() == [2.0, 20.0, 2.0, 20.0, 20.0]
    assert group_size(group).tolist() == [2, 3, 2, 3, 3]


def test_the_mean_of_equal_scores_is_that_score_exactly() -> None:
    """A rounding away from it, divided by the group's deviation of as little, would look like a difference."""
    values = tensor([0.1, 123.456, 1e-3, 7.7]).repeat_interleave(3)
    assert (group_mean(values, torch.arange(4).repeat_interleave(3)) == values).all()


def test_pad_right() -> None:
    assert_close(pad_right([[5, 8], [9], []], 0), tensor([[5, 8], [9, 0], [0, 0]]))
    assert_close(pad_right([[0.5], [1.0, 2.0]], -1.0), tensor([[0.5, -1.0], [1.0, 2.0]]))
    assert_close(pad_right([[True, True], [True]], False), tensor([[True, True], [True, False]]))
    assert pad_right([], 0).shape == (0, 0)


def test_positions_do_not_know_where_the_padding_is() -> None:
    right = tensor([[True, True, True, False, False]])
    left = right.flip(-1)
    assert position_ids(right)[right].tolist() == position_ids(left)[left].tolist() == [0, 1, 2]
    assert position_ids(left).tolist() == [[0, 0, 0, 1, 2]]
