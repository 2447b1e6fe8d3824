"""Which rows are held out."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_trainer.data import split
from lightning_trainer.data.rows import RawRow


@given(
    places=st.lists(st.integers(0, 255).map(lambda n: n << 56), max_size=120),
    fraction=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    max_rows=st.integers(0, 9),
)
def test_the_bound_is_that_of_all_places_sorted(places: list[int], fraction: float, max_rows: int) -> None:
    rows = [RawRow("f", 1, {"text": str(place)}) for place in places]
    by_identity = {row.identity: place for row, place in zip(rows, places, strict=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "read", lambda source: iter(source.rows))
        patch.setattr(split, "place_of", lambda identity, seed: by_identity[identity])
        sources: Any = [SimpleNamespace(rows=rows[:50]), SimpleNamespace(rows=rows[50:])]
        found = split.validation_bound(sources, 0, fraction, max_rows)
    distinct, bound = sorted(set(places)), int(fraction * 2**64)
    assert found == (min(bound, distinct[max_rows]) if len(distinct) > max_rows else bound)
