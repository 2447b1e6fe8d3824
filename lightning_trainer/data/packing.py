"""Which examples share a row: best-fit decreasing over the whole epoch, in numpy.

Lengths are small integers and many, so bins are handled by the thousand: all open bins with the same room left are
alike, and all examples of one length are alike. The loop runs over (length, room) pairs, never over examples.

There may be many millions of examples. Whatever is as long as they are is therefore small, and what is looked up is
looked up a block at a time: numpy widens a whole index to 64 bits before it uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.signedinteger[Any]]

BLOCK = 1 << 14
"""Examples that are looked up at once."""

LOW = (1 << 32) - 1
"""The bits of a tagged number below its tag."""


@dataclass(frozen=True)
class Rows:
    """Examples laid out in rows.

    Row r holds the examples `order[starts[r] : starts[r + 1]]`.

    Attributes:
        order: Indices of examples, row after row.
        starts: Where each row starts in `order`; one more than there are rows.
    """

    order: Ints
    starts: Ints

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Ints:
        return self.order[self.starts[row] : self.starts[row + 1]]

    def sums(self, values: Ints) -> Ints:
        """Sum over each row of a value per example."""
        totals = np.empty(len(self), dtype=values.dtype)
        rows = max(1, BLOCK * len(self) // max(1, len(self.order)))
        for first in range(0, len(self), rows):
            starts = self.starts[first : first + rows + 1]
            running = np.cumsum(values[self.order[starts[0] : starts[-1]]])
            totals[first : first + rows] = np.diff(np.concatenate([[0], running])[starts - starts[0]])
        return totals


def one_per_row(examples: Ints) -> Rows:
    """Every example a row of its own, in the order given."""
    return Rows(examples, np.arange(len(examples) + 1, dtype=np.int32))


def best_fit(lengths: Ints, capacity: int, examples: Ints, rng: np.random.Generator | None = None) -> Rows:
    """Pack examples into rows of at most `capacity` tokens.

    How many rows come out depends on the lengths alone; which of several examples of one length goes where follows
    the order of `examples`, so shuffle them first.

    Args:
        lengths: Tokens of each example, by example index.
        capacity: Most tokens of a row.
        examples: Indices to pack, in the order in which equal lengths are placed.
        rng: Shuffles the rows; None leaves them as they were opened, the longest examples first.

    Raises:
        ValueError: An example is longer than a row, or empty.
    """
    if not len(examples):
        return one_per_row(examples)
    # One number for each example, sorted in place: what it is sorted by above, its place in `examples` below.
    tagged = np.arange(len(examples))
    _tag(tagged, lambda block: _room_left(capacity, lengths[examples[block]]))
    tagged.sort()
    opened = _tag_with_rows(tagged, capacity, rng)
    tagged.sort()
    starts = np.searchsorted(tagged, np.arange(opened + 1) << 32).astype(np.int32)
    tagged &= LOW
    return Rows(examples[tagged], starts)


def _room_left(capacity: int, lengths: Ints) -> Ints:
    """Of a row with one of these examples; the longest come first where it is sorted."""
    if lengths.max() > capacity or lengths.min() < 1:
        raise ValueError(f"lengths lie between {lengths.min()} and {lengths.max()}; a row takes 1 to {capacity} tokens")
    return capacity - lengths


def _tag_with_rows(tagged: npt.NDArray[np.int64], capacity: int, rng: np.random.Generator | None) -> int:
    """Instead of with the room that each example leaves, by which they are sorted; how many rows there are."""
    first = np.searchsorted(tagged, np.arange(capacity + 1) << 32)
    tagged &= LOW
    row_of, opened = _assign(first, len(tagged), capacity)
    places = np.arange(opened, dtype=np.int32)
    if rng is not None:
        rng.shuffle(places)
    _tag(tagged, lambda block: places[row_of[block]])
    return opened


def _tag(numbers: npt.NDArray[np.int64], above: Callable[[slice], Ints]) -> None:
    """Put above the low 32 bits of the numbers, which lie below 2**32, what they are to be sorted by."""
    for first in range(0, len(numbers), BLOCK):
        block = slice(first, first + BLOCK)
        numbers[block] |= above(block).astype(np.int64) << 32


def _assign(first: Ints, total: int, capacity: int) -> tuple[Ints, int]:
    """The row of each example, the longest first, and how many rows there are.

    Args:
        first: Where the examples of `capacity - k` tokens begin, by k.
        total: Examples.
        capacity: Tokens of a row.
    """
    # room[r]: stack of arrays of rows with r tokens left. Row numbers are handed out in order of opening.
    room: list[list[Ints]] = [[] for _ in range(capacity + 1)]
    waiting = np.zeros(capacity + 1, dtype=bool)
    row_of = np.empty(total, dtype=np.int32)
    opened = 0
    counts = np.diff(first, append=total)
    for k in np.flatnonzero(counts).tolist():
        size, start, count = capacity - k, int(first[k]), int(counts[k])
        placed = 0
        while placed < count:
            fits = np.flatnonzero(waiting[size:])
            if len(fits):
                left = size + int(fits[0])
                rows = room[left].pop()
                waiting[left] = bool(room[left])
            else:
                left = capacity
                need = -(-(count - placed) // (capacity // size))
                rows = np.arange(opened, opened + need, dtype=np.int32)
                opened += need
            # The fullest row that still fits is the best fit, and stays so until nothing more of this size fits.
            each = left // size
            used = min(len(rows), -(-(count - placed) // each))
            if used < len(rows):
                _push(room, waiting, left, rows[used:])
            take = min(used * each, count - placed)
            row_of[start + placed : start + placed + take] = np.repeat(rows[:used], each)[:take]
            full = take // each
            _push(room, waiting, left - each * size, rows[:full])
            if full < used:
                _push(room, waiting, left - (take - full * each) * size, rows[full:used])
            placed += take
    return row_of, opened


def _push(room: list[list[Ints]], waiting: npt.NDArray[np.bool_], left: int, rows: Ints) -> None:
    if left and len(rows):
        room[left].append(rows)
        waiting[left] = True
