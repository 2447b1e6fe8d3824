"""Which examples share a row: best-fit decreasing over the whole epoch, in numpy.

Lengths are small integers and many, so bins are handled by the thousand: all open bins with the same room left are
alike, and all examples of one length are alike. The loop runs over (length, room) pairs, never over examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.signedinteger[Any]]


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
        running = np.cumsum(values[self.order])
        last = running[self.starts[1:] - 1]  # every row holds an example
        return np.asarray(np.diff(last, prepend=0), dtype=np.int64)

    def take(self, rows: Ints) -> Rows:
        """These rows, in this order."""
        sizes = np.diff(self.starts)[rows]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        at = np.arange(starts[-1], dtype=self.order.dtype)
        at += np.repeat((self.starts[rows] - starts[:-1]).astype(at.dtype), sizes)
        return Rows(self.order[at], starts)


def one_per_row(examples: Ints) -> Rows:
    """Every example a row of its own, in the order given."""
    return Rows(examples, np.arange(len(examples) + 1))


def best_fit(lengths: Ints, capacity: int, examples: Ints) -> Rows:
    """Pack examples into rows of at most `capacity` tokens.

    How many rows come out depends on the lengths alone; which of several examples of one length goes where follows
    the order of `examples`, so shuffle them first.

    Args:
        lengths: Tokens of each example, by example index.
        capacity: Most tokens of a row.
        examples: Indices to pack, in the order in which equal lengths are placed.

    Raises:
        ValueError: An example is longer than a row, or empty.
    """
    if not len(examples):
        return one_per_row(examples)
    sizes = lengths[examples].astype(np.int32)
    if sizes.max() > capacity or sizes.min() < 1:
        raise ValueError(f"lengths lie between {sizes.min()} and {sizes.max()}; a row takes 1 to {capacity} tokens")
    # There may be many millions of examples: what is as long as they are is small, and not kept longer than needed.
    by_length = np.argsort(-sizes, kind="stable").astype(np.int32)
    row_of = np.empty(len(examples), dtype=np.int32)
    row_of[by_length] = _assign(sizes[by_length], capacity)
    del sizes, by_length
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
    return Rows(examples[np.argsort(row_of, kind="stable")], starts)


def _assign(sizes: Ints, capacity: int) -> Ints:
    """The row of each example; `sizes` descend."""
    # room[r]: stack of arrays of rows with r tokens left. Row numbers are handed out in order of opening.
    room: list[list[Ints]] = [[] for _ in range(capacity + 1)]
    waiting = np.zeros(capacity + 1, dtype=bool)
    first = np.concatenate([[0], np.flatnonzero(np.diff(sizes)) + 1])
    counts = np.diff(first, append=len(sizes))
    row_of = np.empty(len(sizes), dtype=np.int32)
    opened = 0
    for size, start, count in zip(sizes[first].tolist(), first.tolist(), counts.tolist(), strict=True):
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
    return row_of


def _push(room: list[list[Ints]], waiting: npt.NDArray[np.bool_], left: int, rows: Ints) -> None:
    if left and len(rows):
        room[left].append(rows)
        waiting[left] = True
