"""Packing, against a best-fit-decreasing that handles one example at a time."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_trainer.data.packing import BLOCK, Rows, best_fit, one_per_row


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


def test_sums_by_hand() -> None:
    rows = Rows(np.array([4, 0, 2, 1, 3]), np.array([0, 2, 2, 3, 5]))  # [4 0] [] [2] [1 3]
    assert rows.sums(np.array([1, 10, 100, 1000, 10000])).tolist() == [10001, 0, 100, 1010]


def test_sums_of_more_rows_than_a_block() -> None:
    values = np.random.default_rng(0).integers(1, 2**30, 3 * BLOCK, dtype=np.int32)
    order = np.arange(len(values), dtype=np.int32)
    assert one_per_row(order).sums(values).tolist() == values.tolist()
    pairs = Rows(order, np.arange(0, len(values) + 1, 2))
    assert pairs.sums(values).tolist() == (values[::2] + values[1::2]).tolist()


@settings(deadline=None)
@given(problems(), st.integers(0, 9))
def test_shuffling_moves_whole_rows(problem: tuple[list[int], int], seed: int) -> None:
    lengths, capacity = np.array(problem[0], dtype=np.int32), problem[1]
    examples = np.arange(len(lengths), dtype=np.int32)
    opened, shuffled = (
        [rows[row].tolist() for row in range(len(rows))]
        for rows in (
            best_fit(lengths, capacity, examples),
            best_fit(lengths, capacity, examples, np.random.default_rng(seed)),
        )
    )
    assert sorted(opened) == sorted(shuffled)


def test_rows_are_shuffled() -> None:
    lengths = np.full(1000, 5, dtype=np.int32)
    rows = best_fit(lengths, 5, np.arange(1000, dtype=np.int32), np.random.default_rng(0))
    assert rows.order.tolist() != list(range(1000))


def test_one_per_row() -> None:
    rows = one_per_row(np.array([2, 0, 1]))
    assert [rows[row].tolist() for row in range(3)] == [[2], [0], [1]]
