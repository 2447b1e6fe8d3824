"""Which rows make a batch, in which order: a pure function of (seed, epoch).

Every rank computes the same plan and takes its part of it, so the data order needs no communication, does not depend
on how many micro-batches or ranks an optimizer step is split into, and resumes from two numbers.

    rows of the epoch, shuffled:   r0 r1 r2 r3 | r4 r5 r6 r7 | r8
    their tokens:                   9  8  2  1 |  5  5  5  5 |  3
    batch_size 2, 2 ranks:         rank 0: (r0 r3) (r4 r6) (r8)     rank 1: (r1 r2) (r5 r7) ()

What a step trains on does not depend on the ranks; which of them takes a row does not change the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_trainer.data.packing import Ints, Rows, best_fit, one_per_row

PLAN_FORMAT = 2
"""Raised when the same layout is given another order: a run in the middle of an epoch cannot go on in it."""


@dataclass(frozen=True)
class Layout:
    """How a split is laid out into batches.

    Args:
        batch_size: Rows per rank and micro-batch.
        accumulate: Micro-batches per optimizer step.
        world_size: Ranks.
        pack_to: Tokens of a packed row; None gives each example its own row.
        shuffle: False keeps the order of the data, in every epoch.
        seed: Of the order.
        limit: Most micro-batches of an epoch, or a share of them, as the Trainer's `limit_train_batches`: the plan must
            know its own end, where the last optimizer step holds only what is left.
    """

    batch_size: int
    accumulate: int = 1
    world_size: int = 1
    pack_to: int | None = None
    shuffle: bool = True
    seed: int = 0
    limit: int | float = 1.0


@dataclass(frozen=True)
class EpochPlan:
    """One epoch: its rows in order, and what each optimizer step trains on.

    Attributes:
        rows: Every row of the epoch.
        row_tokens: Tokens of each row.
        trained_tokens: Trained tokens of each optimizer step, over all its micro-batches and ranks.
        batches: Micro-batches.
        unlimited: Micro-batches there would be without the layout's limit.
    """

    layout: Layout
    rows: Rows
    row_tokens: Ints
    trained_tokens: Ints
    batches: int
    unlimited: int

    def __len__(self) -> int:
        return self.batches

    def step_tokens(self, batch: int) -> int:
        """Trained tokens of the whole optimizer step that a micro-batch belongs to."""
        return int(self.trained_tokens[batch // self.layout.accumulate])

    def examples(self, batch: int, rank: int) -> Ints:
        """Examples of one rank's micro-batch; empty where the last rows do not reach this rank."""
        size, world = self.layout.batch_size, self.layout.world_size
        first, last = batch * size * world, min((batch + 1) * size * world, len(self.rows))
        mine = np.flatnonzero(deal(self.row_tokens[first:last], world, size) == rank) + first
        return np.concatenate([self.rows[row] for row in mine.tolist()]) if len(mine) else np.empty(0, dtype=np.int64)


def deal(tokens: Ints, ranks: int, most: int) -> Ints:
    """Share rows out so that ranks, which wait for each other, have about equally many tokens.

    The longest first, each to the rank with the fewest tokens so far; of several the one with the fewest rows.

    Args:
        tokens: Of each row; at most `ranks * most` rows.
        ranks: How many share them.
        most: Rows a rank takes at most.

    Returns:
        The rank of each row.
    """
    taken_by = np.zeros(len(tokens), dtype=np.int64)
    if ranks == 1:
        return taken_by
    loads, counts = [0] * ranks, [0] * ranks
    for row in np.argsort(-tokens, kind="stable").tolist():
        rank = min((r for r in range(ranks) if counts[r] < most), key=lambda r: (loads[r], counts[r], r))
        taken_by[row] = rank
        loads[rank] += int(tokens[row])
        counts[rank] += 1
    return taken_by


def plan_epoch(lengths: Ints, trained: Ints, layout: Layout, epoch: int) -> EpochPlan:
    """Lay out one epoch.

    Args:
        lengths: Tokens of each example.
        trained: Trained tokens of each example.
        layout: How rows and batches are made.
        epoch: From 0; without effect unless the layout shuffles.
    """
    rng = np.random.default_rng([layout.seed, epoch])
    examples = np.arange(len(lengths), dtype=np.int32)
    if layout.shuffle:
        rng.shuffle(examples)
    if layout.pack_to is None:
        rows = one_per_row(examples)
    else:
        rows = best_fit(lengths, layout.pack_to, examples, rng if layout.shuffle else None)
    group = layout.batch_size * layout.world_size
    unlimited = -(-len(rows) // group)
    limit = layout.limit
    batches = min(unlimited, limit) if isinstance(limit, int) else int(unlimited * limit)
    row_trained = rows.sums(trained)[: batches * group]
    steps = np.arange(0, len(row_trained), group * layout.accumulate)
    trained_tokens = np.add.reduceat(row_trained, steps, dtype=np.int64) if len(steps) else steps
    return EpochPlan(layout, rows, rows.sums(lengths), trained_tokens, batches, unlimited)
