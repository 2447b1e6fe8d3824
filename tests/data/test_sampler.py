"""The plan of an epoch: a pure function of seed and epoch, the same rows however a step is split."""

import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_trainer.data.sampler import EpochPlan, Layout, deal, plan_epoch

LENGTHS = np.random.default_rng(0).integers(1, 30, 53)
TRAINED = LENGTHS // 2


def plan(epoch: int = 0, lengths: Any = LENGTHS, trained: Any = TRAINED, **layout: Any) -> EpochPlan:
    return plan_epoch(np.asarray(lengths), np.asarray(trained), Layout(**{"batch_size": 1, **layout}), epoch)


def examples(planned: EpochPlan) -> list[list[list[int]]]:
    """Examples by micro-batch and rank."""
    ranks = range(planned.layout.world_size)
    return [[planned.examples(batch, rank).tolist() for rank in ranks] for batch in range(len(planned))]


@pytest.mark.parametrize("pack_to", [None, 30])
def test_order_is_a_function_of_seed_and_epoch(pack_to: int | None) -> None:
    np.random.seed(1)
    first = examples(plan(3, seed=7, pack_to=pack_to))
    np.random.seed(2)
    assert examples(plan(3, seed=7, pack_to=pack_to)) == first
    assert examples(plan(4, seed=7, pack_to=pack_to)) != first
    assert examples(plan(3, seed=8, pack_to=pack_to)) != first


def test_planning_leaves_the_global_generator_alone() -> None:
    before = np.random.get_state()[1].tolist()
    plan(pack_to=30)
    assert np.random.get_state()[1].tolist() == before


def test_every_epoch_has_as_many_batches() -> None:
    assert len({len(plan(epoch, batch_size=2, pack_to=30)) for epoch in range(20)}) == 1


def test_without_shuffling_the_order_is_the_datas() -> None:
    for epoch in (0, 5):
        assert examples(plan(epoch, batch_size=20, shuffle=False)) == [
            [list(range(20))],
            [list(range(20, 40))],
            [list(range(40, 53))],
        ]


def test_the_docstrings_layout() -> None:
    nine = [9, 8, 2, 1, 5, 5, 5, 5, 3]
    planned = plan(lengths=nine, trained=nine, batch_size=2, world_size=2, shuffle=False)
    assert examples(planned) == [[[0, 3], [1, 2]], [[4, 6], [5, 7]], [[8], []]]


def test_last_rows_are_dealt_out_evenly_and_an_empty_rank_gets_none() -> None:
    five = np.ones(5, dtype=np.int64)
    planned = plan(lengths=five, trained=five, batch_size=3, world_size=3, shuffle=False)
    assert examples(planned) == [[[0, 3], [1, 4], [2]]]
    planned = plan(lengths=five[:2], trained=five[:2], batch_size=3, world_size=3, shuffle=False)
    assert examples(planned) == [[[0], [1], []]]


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(0, 500), max_size=24),
    ranks=st.integers(1, 5),
    spare=st.integers(0, 24),
)
def test_rows_are_dealt_once_and_evenly(tokens: list[int], ranks: int, spare: int) -> None:
    least = -(-len(tokens) // ranks)
    taken_by = deal(np.array(tokens, dtype=np.int64), ranks, least + spare)
    assert len(taken_by) == len(tokens)
    counts = np.bincount(taken_by, minlength=ranks)
    assert len(counts) == ranks
    assert counts.max() <= least + spare
    loads = np.bincount(taken_by, weights=tokens, minlength=ranks)
    if counts.max() < least + spare:  # no rank was full, so the last row went where the least was
        assert loads.max() - loads.min() <= max(tokens, default=0)


@pytest.mark.parametrize(
    ("tokens", "ranks", "most", "expected"),
    [
        ([9, 8, 2, 1], 2, 2, [0, 1, 1, 0]),
        ([5, 5, 5, 5], 2, 2, [0, 1, 0, 1]),
        ([9, 1, 1, 1], 2, 3, [0, 1, 1, 1]),
        ([9, 1, 1, 1], 2, 2, [0, 1, 1, 0]),  # rank 1 is full
        ([3, 7], 3, 1, [1, 0]),
        ([], 2, 4, []),
    ],
)
def test_dealing_by_hand(tokens: list[int], ranks: int, most: int, expected: list[int]) -> None:
    assert deal(np.array(tokens, dtype=np.int64), ranks, most).tolist() == expected


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60),
    split=st.sampled_from([(1, 1, 8), (1, 2, 4), (2, 1, 4), (2, 2, 2), (4, 2, 1), (8, 1, 1)]),
    pack_to=st.sampled_from([None, 20, 50]),
    epoch=st.integers(0, 3),
)
def test_a_step_trains_the_same_rows_however_it_is_split(
    lengths: list[int], split: tuple[int, int, int], pack_to: int | None, epoch: int
) -> None:
    trained = [length // 2 for length in lengths]
    world, accumulate, batch = split
    whole = plan(epoch, lengths, trained, batch_size=8, pack_to=pack_to)
    parts = plan(epoch, lengths, trained, batch_size=batch, accumulate=accumulate, world_size=world, pack_to=pack_to)
    batches = examples(parts)
    steps = [batches[first : first + accumulate] for first in range(0, len(batches), accumulate)]
    taken = [sorted(i for micro in step for rank in micro for i in rank) for step in steps]
    assert taken == [sorted(rank) for [rank] in examples(whole)]
    for number, step in enumerate(steps):
        tokens = sum(trained[i] for micro in step for rank in micro for i in rank)
        micro = range(number * accumulate, number * accumulate + len(step))
        assert [parts.step_tokens(batch) for batch in micro] == [tokens] * len(step)
    assert Counter(i for step in taken for i in step) == Counter(range(len(lengths)))


# Rows of 1, 2, 4, ... trained tokens show by their sum which of them were counted.
POWERS = 2 ** np.arange(7)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({}, [1, 2, 4, 8, 16, 32, 64]),
        ({"accumulate": 3}, [7, 7, 7, 56, 56, 56, 64]),
        ({"batch_size": 2, "accumulate": 2}, [15, 15, 112, 112]),
        ({"batch_size": 2, "accumulate": 3}, [63, 63, 63, 64]),
        ({"batch_size": 1, "world_size": 2, "accumulate": 3}, [63, 63, 63, 64]),
        ({"accumulate": 3, "limit": 5}, [7, 7, 7, 24, 24]),
        ({"batch_size": 2, "accumulate": 2, "limit": 3}, [15, 15, 48]),
        ({"batch_size": 2, "limit": 1}, [3]),
        ({"limit": 100}, [1, 2, 4, 8, 16, 32, 64]),
        ({"accumulate": 100}, [127] * 7),
        ({"limit": 0}, []),
    ],
)
def test_step_tokens_by_hand(layout: dict[str, Any], expected: list[int]) -> None:
    planned = plan(lengths=np.ones(7, dtype=np.int64), trained=POWERS, shuffle=False, **layout)
    assert [planned.step_tokens(batch) for batch in range(len(planned))] == expected
    assert len(planned) == len(expected)


@pytest.mark.parametrize("pack_to", [None, 2048])
def test_planning_takes_few_bytes_an_example(pack_to: int | None) -> None:
    """Beyond the two numbers an example has."""
    lengths = np.random.default_rng(0).integers(1, 400, 200_000, dtype=np.int32)
    tracemalloc.start()
    try:
        kept = plan(0, lengths, lengths, pack_to=pack_to, batch_size=8)
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(kept)
    assert held / len(lengths) < 14
    assert most / len(lengths) < 24


@pytest.mark.parametrize("pack_to", [None, 30])
def test_no_rows_make_no_batches(pack_to: int | None) -> None:
    empty = np.empty(0, dtype=np.int64)
    assert len(plan(lengths=empty, trained=empty, batch_size=4, accumulate=2, pack_to=pack_to)) == 0
