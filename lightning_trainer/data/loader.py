"""A loader whose order is planned: its whole state is (epoch, position)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_trainer.data.collate import Collator
from lightning_trainer.data.sampler import PLAN_FORMAT, EpochPlan, Layout, plan_epoch
from lightning_trainer.types import Batch, InputError


class _Batches(Dataset[Batch]):
    """The micro-batches of one epoch, by number."""

    def __init__(self, collate: Collator, plan: EpochPlan, rank: int) -> None:
        self.collate, self.plan, self.rank = collate, plan, rank

    def __getitem__(self, batch: int) -> Batch:
        return self.collate(self.plan.examples(batch, self.rank), self.plan.step_tokens(batch))


class PlannedLoader:
    """Iterates over the planned micro-batches of this rank.

    Each `iter()` goes on where the last one stopped; at the end of an epoch the next begins. How many workers make
    the batches does not change them: a run may be resumed with another number.

    Args:
        collate: Makes a batch from example numbers.
        layout: How the split is laid out.
        rank: Whose part.
        num_workers: Processes that make batches ahead; 0 makes them in this one.
        pin_memory: Whether batches are made in page-locked memory.

    Attributes:
        wait_seconds: Time spent waiting for batches so far.
    """

    def __init__(
        self, collate: Collator, layout: Layout, rank: int = 0, num_workers: int = 0, pin_memory: bool = False
    ) -> None:
        self.collate, self.layout, self.rank = collate, layout, rank
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.epoch, self.position = 0, 0
        self.wait_seconds = 0.0
        self._planned: tuple[int, EpochPlan] | None = None

    def plan(self, epoch: int) -> EpochPlan:
        """What the batches of this epoch hold."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = None  # one epoch's plan at a time: there may be many millions of rows
            store = self.collate.store
            self._planned = epoch, plan_epoch(store.lengths, store.trained, self.layout, epoch)
        return self._planned[1]

    def first_batch(self) -> Batch:
        """The first of the first epoch, whatever has been taken since."""
        return _Batches(self.collate, self.plan(0), self.rank)[0]

    def __len__(self) -> int:
        """Micro-batches of an epoch as the Trainer counts them, who applies its limit to this number himself."""
        return self.plan(self.epoch).unlimited

    def __iter__(self) -> Iterator[Batch]:
        if self.position >= len(self.plan(self.epoch)):
            self.epoch, self.position = self.epoch + 1, 0
        plan = self.plan(self.epoch)
        batches = iter(self._batches(_Batches(self.collate, plan, self.rank)))
        for _ in range(self.position, len(plan)):
            asked = time.perf_counter()
            batch = next(batches)
            self.wait_seconds += time.perf_counter() - asked
            self.position += 1
            yield batch

    def _batches(self, planned: _Batches) -> Any:
        left = range(self.position, len(planned.plan))
        if not self.num_workers and not self.pin_memory:
            return (planned[batch] for batch in left)
        # A generator of its own: a DataLoader otherwise draws its workers' seed from the one that training uses.
        return DataLoader(
            planned,
            batch_size=None,
            sampler=left,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch will be taken from, and under which layout that is meant."""
        layout = {**vars(self.layout), "plan_format": PLAN_FORMAT}
        return {"epoch": self.epoch, "position": self.position, "layout": layout}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place.

        Raises:
            InputError: Batches are laid out otherwise than when the place was saved, so it means other rows now.
        """
        mine, saved = {**vars(self.layout), "plan_format": PLAN_FORMAT}, {"plan_format": 1, **state["layout"]}
        changed = [name for name in mine if name != "limit" and mine[name] != saved.get(name)]
        epoch, position = int(state["epoch"]), int(state["position"])
        store = self.collate.store
        if changed and position >= len(plan_epoch(store.lengths, store.trained, _layout(saved), epoch)):
            epoch, position = epoch + 1, 0
        if changed and position:
            both = ", ".join(f"{name} was {saved.get(name)} and is {mine[name]}" for name in changed)
            raise InputError(
                f"the checkpoint stands in the middle of an epoch laid out otherwise: {both}; resume with the old "
                "values, or start a new run from these weights with model.pretrained: CHECKPOINT"
            )
        self.epoch, self.position = epoch, position


def _layout(saved: dict[str, Any]) -> Layout:
    return Layout(**{name: value for name, value in saved.items() if name != "plan_format"})


class ConversationBatches:
    """Conversations, a list of at most `batch_size` at a time; the ranks take turns.

    All ranks have as many: the last list of some may be empty.
    """

    def __init__(
        self, conversations: Sequence[dict[str, Any]], batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.conversations, self.batch_size = conversations, batch_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-len(self.conversations) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for turn in range(len(self)):
            start = (turn * self.world_size + self.rank) * self.batch_size
            yield list(self.conversations[start : start + self.batch_size])


class EvaluationLoader(PlannedLoader):
    """The same batches from the first to the last, every time; nothing to resume."""

    def __iter__(self) -> Iterator[Batch]:
        self.epoch, self.position = 0, 0
        return super().__iter__()
