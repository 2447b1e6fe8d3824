"""The loader's whole state is (epoch, position); it draws from no generator but its own."""

import random
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
import torch

from lightning_trainer.data.collate import Collator
from lightning_trainer.data.loader import EvaluationLoader, PlannedLoader
from lightning_trainer.data.sampler import PLAN_FORMAT, Layout
from lightning_trainer.types import Batch, InputError


class Store:
    """Rows of tokens in memory, with what a TokenStore has."""

    def __init__(self, lengths: list[int]) -> None:
        self.rows = [np.full(length, number, dtype=np.int32) for number, length in enumerate(lengths)]
        self.lengths = np.array(lengths, dtype=np.int64)
        self.trained = self.lengths - 1

    def __getitem__(self, row: int) -> tuple[Any, Any]:
        marks = np.ones(len(self.rows[row]), dtype=np.uint8)
        marks[:1] = 0
        return self.rows[row], marks


STORE = Store([3, 5, 2, 7, 4, 6, 2, 3, 5, 4, 2])


def make_loader(workers: int = 0, store: Store = STORE, cls: type[PlannedLoader] = PlannedLoader, **layout: Any) -> Any:
    layout = {"batch_size": 2, "accumulate": 2, "seed": 5, **layout}
    return cls(Collator(store, True, 0), Layout(**layout), num_workers=workers)  # type: ignore[arg-type]


def epochs(loader: PlannedLoader, count: int) -> list[tuple[int, ...]]:
    return [batch.row_ids for _ in range(count) for batch in loader]


def endless(loader: PlannedLoader) -> Any:
    return chain.from_iterable(iter(loader) for _ in iter(int, 1))


@pytest.mark.parametrize("pack_to", [None, 8])
def test_going_on_from_any_place_gives_what_was_left(pack_to: int | None) -> None:
    whole = epochs(make_loader(pack_to=pack_to), 3)
    first = make_loader(pack_to=pack_to)
    batches = endless(first)
    for taken in range(len(whole)):
        resumed = make_loader(pack_to=pack_to)
        resumed.load_state_dict(first.state_dict())
        left = [batch.row_ids for batch in islice(endless(resumed), len(whole) - taken)]
        assert left == whole[taken:], taken
        assert next(batches).row_ids == whole[taken]


@pytest.mark.parametrize(("saved_with", "resumed_with"), [(0, 2), (2, 0)])
def test_the_number_of_workers_changes_nothing(saved_with: int, resumed_with: int) -> None:
    whole = epochs(make_loader(), 2)
    first = make_loader(saved_with)
    head = [batch.row_ids for batch in islice(iter(first), 2)]  # workers have made more than these by now
    resumed = make_loader(resumed_with)
    resumed.load_state_dict(first.state_dict())
    assert head + epochs(resumed, 2) == whole


def test_batches_of_workers_are_the_same_batches() -> None:
    for mine, theirs in zip(make_loader(), make_loader(2), strict=True):
        assert isinstance(theirs, Batch)
        for name, value in vars(mine).items():
            other = getattr(theirs, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


@pytest.mark.parametrize("workers", [0, 2])
def test_no_global_generator_is_touched(workers: int) -> None:
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert len(list(make_loader(workers))) == 6
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert random.getstate() == python_state


def test_the_state_is_plain_and_counts_batches_handed_out() -> None:
    loader = make_loader()
    batches = iter(loader)
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (0, 0)
    next(batches)
    next(batches)
    assert loader.state_dict() == {
        "epoch": 0,
        "position": 2,
        "layout": {
            "batch_size": 2,
            "accumulate": 2,
            "world_size": 1,
            "pack_to": None,
            "shuffle": True,
            "seed": 5,
            "limit": 1.0,
            "plan_format": PLAN_FORMAT,
        },
    }


def test_a_place_in_an_order_that_is_made_no_more_is_refused() -> None:
    loader = make_loader()
    next(iter(loader))
    state = loader.state_dict()
    del state["layout"]["plan_format"]  # as it was saved before there was more than one
    with pytest.raises(InputError, match="plan_format was 1 and is 2"):
        make_loader().load_state_dict(state)
    state["position"] = 0
    make_loader().load_state_dict(state)  # between epochs


def test_the_first_batch_is_the_first_of_all_wherever_the_loader_stands() -> None:
    loader = make_loader()
    first = next(iter(make_loader()))
    epochs(loader, 1)
    next(iter(loader))
    assert loader.first_batch().row_ids == first.row_ids
    assert (loader.epoch, loader.position) == (1, 1)


def test_epochs_differ_and_each_has_every_row_once() -> None:
    loader = make_loader(pack_to=8)
    first, second = epochs(loader, 1), epochs(loader, 1)
    assert first != second
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(11))
    assert len(loader) == len(first) == len(second)


@pytest.mark.parametrize(
    "change", [{"batch_size": 3}, {"accumulate": 4}, {"world_size": 2}, {"pack_to": 8}, {"seed": 6}]
)
def test_another_layout_is_refused_in_the_middle_of_an_epoch(change: dict[str, int]) -> None:
    loader = make_loader()
    start = loader.state_dict()
    next(iter(loader))
    [(name, value)] = change.items()
    other = make_loader(**change)
    with pytest.raises(InputError, match=f"{name} was .* and is {value}"):
        other.load_state_dict(loader.state_dict())
    other.load_state_dict(start)
    assert (other.epoch, other.position) == (0, 0)


def test_another_layout_is_welcome_between_epochs() -> None:
    loader = make_loader()
    whole = epochs(make_loader(batch_size=3), 2)
    list(loader)
    other = make_loader(batch_size=3)
    other.load_state_dict(loader.state_dict())
    assert epochs(other, 1) == whole[4:]


def test_another_limit_is_no_other_layout() -> None:
    loader = make_loader(limit=3)
    assert len(loader) == 6  # the Trainer applies its limit to this number himself
    assert len(list(loader)) == 3
    other = make_loader()
    other.load_state_dict(loader.state_dict())
    assert epochs(other, 1) == epochs(make_loader(), 1)[3:]


def test_ranks_share_an_epoch_out() -> None:
    layout = Layout(2, world_size=2, shuffle=False)
    loaders = [PlannedLoader(Collator(STORE, False, 0), layout, rank) for rank in (0, 1)]  # type: ignore[arg-type]
    assert [epochs(loader, 1) for loader in loaders] == [
        [(2, 3), (5, 6), (8,)],  # 2 + 7, 6 + 2 and 5 tokens
        [(0, 1), (4, 7), (9, 10)],  # 3 + 5, 4 + 3 and 4 + 2
    ]
    for batches in zip(*loaders, strict=True):
        assert len({batch.step_tokens for batch in batches}) == 1


def test_an_evaluation_starts_over_every_time() -> None:
    loader = make_loader(cls=EvaluationLoader, shuffle=False)
    next(iter(loader))
    assert epochs(loader, 2) == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10,)] * 2


def test_an_empty_split_has_no_batches() -> None:
    loader = make_loader(store=Store([]))
    assert len(loader) == 0
    assert list(loader) == []


def test_waiting_is_measured() -> None:
    loader = make_loader()
    list(loader)
    assert 0 < loader.wait_seconds < 5
