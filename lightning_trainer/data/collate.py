"""Token rows -> Batch.

Packed: every example of the micro-batch end to end in one row, positions from 0 within each, no padding. Attention is
kept within each example by `example_lengths`, so where one pack ends and the next begins does not matter.

    examples  [a b c] [d e]        input_ids     a b c d e
    trained   [0 1 1] [0 1]        position_ids  0 1 2 0 1
                                   labels        . b c . e      predict_at 0 1 3   targets b c e
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from lightning_trainer.data.packing import Ints
from lightning_trainer.data.store import TokenStore
from lightning_trainer.types import IGNORE_INDEX, Batch

TokenRow = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]


class Collator:
    """Makes batches from a store.

    Args:
        packed: One row, or one row per example padded on the right.
        pad_id: Token of the padding.
    """

    def __init__(self, store: TokenStore, packed: bool, pad_id: int) -> None:
        self.store, self.packed, self.pad_id = store, packed, pad_id

    def __call__(self, examples: Ints, step_tokens: int) -> Batch:
        """The micro-batch of these examples.

        A rank that gets none (the last rows of an epoch do not reach it) takes example 0 with nothing trained: its
        gradient is zero, and the other ranks need not wait for a batch that never comes.
        """
        rows = [self.store[int(i)] for i in examples]
        if not rows:
            ids, marks = self.store[0]
            rows = [(ids, np.zeros_like(marks))]
        row_ids = tuple(int(i) for i in examples)
        if self.packed:
            return _pack(rows, step_tokens, row_ids)
        return _pad(rows, self.pad_id, step_tokens, row_ids)


def _pack(rows: list[TokenRow], step_tokens: int, row_ids: tuple[int, ...]) -> Batch:
    lengths = np.array([len(ids) for ids, _ in rows])
    ids = np.concatenate([ids for ids, _ in rows]).astype(np.int64)
    marks = np.concatenate([marks for _, marks in rows])
    positions = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return _batch(ids[None], marks[None], positions[None], None, lengths, step_tokens, row_ids)


def _pad(rows: list[TokenRow], pad_id: int, step_tokens: int, row_ids: tuple[int, ...]) -> Batch:
    lengths = np.array([len(ids) for ids, _ in rows])
    shape = (len(rows), int(lengths.max()))
    ids, marks = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.uint8)
    for place, (row, row_marks) in enumerate(rows):
        ids[place, : len(row)], marks[place, : len(row)] = row, row_marks
    columns = np.arange(shape[1])
    mask = (columns < lengths[:, None]).astype(np.int64)
    return _batch(ids, marks, np.broadcast_to(columns, shape) * mask, mask, lengths, step_tokens, row_ids)


def _batch(
    ids: npt.NDArray[np.int64],
    marks: npt.NDArray[np.uint8],
    positions: npt.NDArray[np.int64],
    mask: npt.NDArray[np.int64] | None,
    lengths: npt.NDArray[np.int64],
    step_tokens: int,
    row_ids: tuple[int, ...],
) -> Batch:
    trained = np.flatnonzero(marks)
    return Batch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(np.where(marks == 1, ids, IGNORE_INDEX)),
        predict_at=torch.from_numpy(trained - 1),
        targets=torch.from_numpy(ids.reshape(-1)[trained]),
        position_ids=torch.from_numpy(positions),
        attention_mask=None if mask is None else torch.from_numpy(mask),
        example_lengths=tuple(lengths.tolist()),
        step_tokens=step_tokens,
        row_ids=row_ids,
    )
