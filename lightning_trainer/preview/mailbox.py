"""Mailbox: one preview under way, and those that wait, all for one set of weights; newer weights take their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

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

    @property
    def asker(self) -> str:
        """Tells apart those who ask through one backend: the name of its first prompt."""
        return self.requests[0].prompt_id


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

    def count(self, status: Literal["ok", "failed", "dropped", "skipped"]) -> None:
        """One more is decided."""
        setattr(self, status, getattr(self, status) + 1)

    def as_dict(self) -> dict[str, int]:
        """With `pending`."""
        return {**asdict(self), "pending": self.pending}


MOST_ASKERS = 64
"""Whose turns are remembered."""


class Mailbox:
    """Jobs and the slots their weights lie in.

    Several may ask at one step; their jobs share one snapshot.

    Args:
        slots: For snapshots.

    Attributes:
        waiting: Not yet handed over, in the order of their turns; all of one snapshot, the newest.
        flying: Handed over, not yet answered.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = tuple(slots)
        self.waiting: list[Job] = []
        self.flying: Job | None = None
        self._being_read = False
        self._fresh: tuple[int, int] | None = None
        self._gave_way: list[str] = []

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        return not self.waiting and self.flying is None

    def present(self, step: int) -> int | None:
        """The slot that holds the weights of `step` as they are now; None where no snapshot was taken since."""
        return self._fresh[1] if self._fresh is not None and self._fresh[0] == step else None

    def room(self) -> int | None:
        """A slot for a snapshot: a free one, or that of the jobs that wait; None: all are being read."""
        read = self.flying.slot if self.flying is not None and self._being_read else None
        held = {job.slot for job in self.waiting}
        free = [slot for slot in range(len(self.slots)) if slot != read]
        return min(free, key=lambda slot: slot not in held, default=None)

    def snapshot(self, step: int, slot: int, tensors: Mapping[str, Tensor]) -> list[Job]:
        """Copy the weights of `step`.

        Returns:
            Jobs that waited, and give way.
        """
        replaced, self.waiting = self.waiting, []  # now: should the copy fail, the slot holds two steps
        self._gave_way = list(dict.fromkeys([*self._gave_way, *(job.asker for job in replaced)]))[-MOST_ASKERS:]
        self._fresh = None
        self.slots[slot].fill(tensors)
        self._fresh = (step, slot)
        return replaced

    def put(self, job: Job) -> None:
        """Have `job` wait for its turn; its weights lie in its slot.

        Whoever gave way before comes before those who did not: else of two that ask at the same steps a slow worker
        would answer one alone, for ever.
        """
        self.waiting.append(job)
        self.waiting.sort(key=self._turn)

    def _turn(self, job: Job) -> int:
        return self._gave_way.index(job.asker) if job.asker in self._gave_way else len(self._gave_way)

    def next(self, wait: bool) -> Job | None:
        """The first waiting job, to be handed over now; None where there is none, or its turn has not come.

        Args:
            wait: Whether to wait for its snapshot.
        """
        if not self.waiting or self.flying is not None:
            return None
        slot = self.slots[self.waiting[0].slot]
        if wait:
            slot.wait()
        if not slot.settled():
            return None
        self.flying, self._being_read = self.waiting.pop(0), True
        if self.flying.asker in self._gave_way:
            self._gave_way.remove(self.flying.asker)
        return self.flying

    def sent(self) -> None:
        """The worker has the weights of the job under way: its slot is read no more."""
        self._being_read = False

    def done(self) -> None:
        """The job under way is decided."""
        self.flying = None

    def drop_waiting(self) -> list[Job]:
        """Take the waiting jobs away."""
        jobs, self.waiting = self.waiting, []
        return jobs

    def settle(self) -> None:
        """The tensors are about to change: what is copied comes before that, and is of the past from here on."""
        if self._fresh is not None:
            self.slots[self._fresh[1]].settle()
            self._fresh = None

    def close(self) -> None:
        """Give the slots back."""
        self.waiting, self.flying, self._fresh = [], None, None
        for slot in self.slots:
            slot.close()
