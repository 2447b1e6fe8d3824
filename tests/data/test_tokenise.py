"""The figures of the data report."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_trainer.data.tokenise import percentiles


@given(st.lists(st.integers(1, 40), min_size=1, max_size=300))
def test_percentiles_are_numpys(lengths: list[int]) -> None:
    found = percentiles(Counter(lengths))
    assert list(found) == ["p0", "p50", "p90", "p95", "p99", "p100"]
    for name, value in found.items():
        assert value == int(np.percentile(lengths, int(name[1:])) + 1e-9)


@pytest.mark.parametrize(("lengths", "p50", "p90"), [([7], 7, 7), ([1, 4], 2, 3), ([1, 2, 3, 100], 2, 70)])
def test_percentiles_by_hand(lengths: list[int], p50: int, p90: int) -> None:
    found = percentiles(Counter(lengths))
    assert (found["p50"], found["p90"]) == (p50, p90)


def test_no_rows_have_no_percentiles() -> None:
    assert percentiles(Counter()) == {}
