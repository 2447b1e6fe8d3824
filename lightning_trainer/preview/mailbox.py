"""Mailbox: one preview under way and one that waits; a newer one takes the place of the one that waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lightning_trainer.preview.snapshot import Slot
from lightning_trainer.types import PreviewRequest, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Job:
    """Prompts, and the weights they are for, which lie in a slot.

    Attributes:
        number: Grows from job to job.
        step: Optimizer step of the weights.
    """

    number: int
    step: int
    slot: int
    requests: tuple[PreviewRequest, ...]
    sampling: SamplingParams


@dataclass
class Counters:
    """What became of the previews asked for.

    Attributes:
        triggered: Asked for; the sum of the others and of what is not decided yet.
        ok: Answered.
        failed: Tried in vain.
        dropped: Gave way to a newer one, or came when no slot was free.
        skipped: Not tried: the worker does not answer, or the weights are not to be shown.
    """

    triggered: int = 0
    ok: int = 0
    failed: int = 0
    dropped: int = 0
    skipped: int = 0

    @property
    def pending(self) -> int:
        """Not decided yet."""
        return self.triggered - self.ok - self.failed - self.dropped - self.skipped

    def as_dict(self) -> dict[str, int]:
        """With `pending`."""
        return {**asdict(self), "pending": self.pending}


class Mailbox:
    """Jobs and the slots their weights lie in.

    Args:
        slots: For snapshots.

    Attributes:
        waiting: The newest, not yet handed over.
        flying: Handed over, not yet answered.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = tuple(slots)
        self._free = set(range(len(self.slots)))
        self.waiting: Job | None = None
        self.flying: Job | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        return self.waiting is None and self.flying is None

    def room(self) -> int | None:
        """A slot that a snapshot may go to: the waiting job's, or a free one; None: there is none."""
        if self.waiting is not None:
            return self.waiting.slot
        return min(self._free, default=None)

    def put(self, job: Job, tensors: Mapping[str, Tensor]) -> None:
        """Take a snapshot for `job`, which waits from here on, in the place of any other."""
        self.waiting = None  # from here on its slot holds the weights of two steps, should the copy fail
        self._free.add(job.slot)
        self.slots[job.slot].fill(tensors)
        self._free.discard(job.slot)
        self.waiting = job

    def next(self, wait: bool) -> Job | None:
        """The waiting job, to be handed over now; None where there is none, or its turn has not come.

        Args:
            wait: Whether to wait for its snapshot.
        """
        job = self.waiting
        if job is None or self.flying is not None:
            return None
        if wait:
            self.slots[job.slot].settle()
        if not self.slots[job.slot].settled():
            return None
        self.waiting, self.flying = None, job
        return job

    def sent(self, job: Job) -> None:
        """The worker has the weights: the slot is free."""
        self._free.add(job.slot)

    def done(self) -> None:
        """The job under way is decided."""
        if self.flying is not None and (self.waiting is None or self.waiting.slot != self.flying.slot):
            self._free.add(self.flying.slot)
        self.flying = None

    def drop_waiting(self) -> Job | None:
        """Take the waiting job away."""
        job, self.waiting = self.waiting, None
        if job is not None:
            self._free.add(job.slot)
        return job

    def settle(self) -> None:
        """Wait until the tensors may be changed."""
        if self.waiting is not None:
            self.slots[self.waiting.slot].settle()

    def close(self) -> None:
        """Give the slots back."""
        self.waiting = self.flying = None
        self._free.clear()
        for slot in self.slots:
            slot.close()
