"""Packing, against a best-fit-decreasing that handles one example at a time."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_trainer.data.packing import Rows, best_fit, one_per_row


def rows_of_slow_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Longest first, each into the fullest row that takes it, else into a new one."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 60))
    return draw(st.lists(st.integers(1, capacity), max_size=80)), capacity


@settings(deadline=None, max_examples=300)
@given(problems(), st.randoms(use_true_random=False))
def test_best_fit_is_best_fit_decreasing(problem: tuple[list[int], int], rng: random.Random) -> None:
    lengths, capacity = problem
    examples = list(range(len(lengths)))
    rng.shuffle(examples)
    rows = best_fit(np.array(lengths, dtype=np.int64), capacity, np.array(examples, dtype=np.int64))
    assert sorted(rows.order.tolist()) == list(range(len(lengths)))
    assert rows.starts[0] == 0
    assert rows.starts[-1] == len(lengths)
    # Rows with the same room are alike, so the sums are the same whichever of them is taken; the members need not be.
    sums = [sum(lengths[i] for i in rows[row]) for row in range(len(rows))]
    assert sorted(sums) == sorted(sum(row) for row in rows_of_slow_best_fit(lengths, capacity))
    assert all(0 < total <= capacity for total in sums)
    assert rows.sums(np.array(lengths, dtype=np.int64)).tolist() == sums


def test_a_share_of_the_examples_can_be_packed() -> None:
    rows = best_fit(np.array([4, 9, 3, 2, 9]), 5, np.array([3, 0, 2]))
    assert [rows[row].tolist() for row in range(len(rows))] == [[0], [3, 2]]


def test_equal_lengths_are_placed_in_the_order_given() -> None:
    rows = best_fit(np.array([2, 2, 2, 2]), 4, np.array([3, 1, 0, 2]))
    assert [rows[row].tolist() for row in range(len(rows))] == [[3, 1], [0, 2]]


def test_ten_thousand_rows_waste_little() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 400, 10_000)
    rows = best_fit(lengths, 2048, np.arange(10_000))
    assert rows.sums(lengths).max() <= 2048
    assert lengths.sum() / (len(rows) * 2048) > 0.99


@pytest.mark.parametrize("lengths", [[3, 6], [3, 0]])
def test_lengths_no_row_takes_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="a row takes 1 to 5 tokens"):
        best_fit(np.array(lengths), 5, np.arange(2))


def test_nothing_to_pack() -> None:
    rows = best_fit(np.array([], dtype=np.int64), 5, np.array([], dtype=np.int64))
    assert len(rows) == 0
    assert rows.sums(np.array([], dtype=np.int64)).tolist() == []
    assert len(rows.take(np.array([], dtype=np.int64))) == 0


def test_sums_and_take_by_hand() -> None:
    rows = Rows(np.array([4, 0, 2, 1, 3]), np.array([0, 2, 2, 3, 5]))  # [4 0] [] [2] [1 3]
    assert rows.sums(np.array([1, 10, 100, 1000, 10000])).tolist() == [10001, 0, 100, 1010]
    taken = rows.take(np.array([3, 1, 0, 3]))
    assert [taken[row].tolist() for row in range(len(taken))] == [[1, 3], [], [4, 0], [1, 3]]


@given(st.lists(st.lists(st.integers(0, 99), max_size=4), min_size=1, max_size=8), st.data())
def test_take_is_indexing(groups: list[list[int]], data: st.DataObject) -> None:
    flat = np.array([value for group in groups for value in group], dtype=np.int64)
    rows = Rows(flat, np.cumsum([0, *(len(group) for group in groups)]))
    wanted = data.draw(st.lists(st.integers(0, len(groups) - 1), max_size=10))
    taken = rows.take(np.array(wanted, dtype=np.int64))
    assert [taken[row].tolist() for row in range(len(taken))] == [groups[row] for row in wanted]


def test_one_per_row() -> None:
    rows = one_per_row(np.array([2, 0, 1]))
    assert [rows[row].tolist() for row in range(3)] == [[2], [0], [1]]
