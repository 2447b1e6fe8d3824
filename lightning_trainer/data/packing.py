"""Which examples share a row: best-fit decreasing over the whole epoch, in numpy.

Lengths are small integers and many, so bins are handled by the thousand: all open bins with the same room left are
alike, and all examples of one length are alike. The loop runs over (length, room) pairs, never over examples.

There may be many millions of examples. Whatever is as long as they are is therefore small, and what is looked up is
looked up a block at a time: numpy widens a whole index to 64 bits before it uses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.signedinteger[Any]]

BLOCK = 1 << 14
LOW = (1 << 32) - 1


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


def best_fit(lengths: Ints, capacity: int, examples: Ints, shuffle: np.random.Generator | None = None) -> Rows:
    """Pack examples into rows of at most `capacity` tokens.

    How many rows come out depends on the lengths alone; which of several examples of one length goes where follows
    the order of `examples`, so shuffle them first.

    Args:
        lengths: Tokens of each example, by example index.
        capacity: Most tokens of a row.
        examples: Indices to pack, in the order in which equal lengths are placed.
        shuffle: Orders the rows; None leaves them as they were opened, the longest examples first.

    Raises:
        ValueError: An example is longer than a row, or empty.
    """
    if not len(examples):
        return one_per_row(examples)
    keys = _look_up(lengths, examples)
    if keys.max() > capacity or keys.min() < 1:
        raise ValueError(f"lengths lie between {keys.min()} and {keys.max()}; a row takes 1 to {capacity} tokens")
    np.subtract(capacity, keys, out=keys)  # the longest first
    tagged = _sorted(keys, np.arange(len(keys), dtype=np.int32))
    del keys
    first = np.searchsorted(tagged, np.arange(capacity + 1) << 32)
    tagged &= LOW
    by_length = tagged.astype(np.int32)
    del tagged
    row_of, opened = _assign(first, len(examples), capacity)
    if shuffle is not None:
        places = np.arange(opened, dtype=np.int32)
        shuffle.shuffle(places)
        row_of = _look_up(places, row_of)
    tagged = _sorted(row_of, by_length)
    del row_of, by_length
    starts = np.searchsorted(tagged, np.arange(opened + 1) << 32).astype(np.int32)
    tagged &= LOW
    return Rows(examples[tagged], starts)


def _look_up(values: Ints, index: Ints) -> Ints:
    """`values[index]`, a block at a time."""
    found = np.empty(len(index), dtype=values.dtype)
    for first in range(0, len(index), BLOCK):
        found[first : first + BLOCK] = values[index[first : first + BLOCK]]
    return found


def _sorted(keys: Ints, tags: Ints) -> npt.NDArray[np.int64]:
    """`key << 32 | tag` of each pair, in ascending order: half the memory of a stable argsort, and sorted in place."""
    pairs = keys.astype(np.int64)
    pairs <<= 32
    pairs |= tags
    pairs.sort()
    return pairs


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
