"""Every rank goes on with its own random numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_trainer.callbacks import generators


@pytest.fixture(autouse=True)
def _as_they_were() -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def trainer(rank: int = 0) -> Any:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(global_rank=rank, world_size=1, strategy=strategy)


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def draw() -> list[float]:
    # a second normal number comes out of what `random` and numpy keep from the first
    return [random.gauss(0, 1), np.random.normal(), torch.randn(()).item(), random.random()]


def state(number: int) -> dict[str, Any]:
    seed(number)
    draw()
    [found] = generators.states_of_ranks(trainer())
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_gets_its_own(rank: int, tmp_path: Any) -> None:
    torch.save([state(1), state(2)], tmp_path / "states.pt")
    states = torch.load(tmp_path / "states.pt", weights_only=True)
    state(rank + 1)
    expected = [draw(), draw()]
    seed(99)
    generators.restore(trainer(rank), states)
    assert [draw(), draw()] == expected


def test_a_rank_without_a_state_gets_other_numbers_than_the_first() -> None:
    drawn = []
    for rank in (0, 1, 2):
        seed(7)
        generators.restore(trainer(rank), [])
        drawn.append(draw())
    seed(7)
    assert drawn[0] == draw()
    assert len({number for numbers in drawn for number in numbers}) == 12
