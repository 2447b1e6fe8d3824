"""Exchange: weights and prompts go to the dispatcher, what became of them comes back. Nothing in it waits for long."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_trainer.preview.companion import Companion
from lightning_trainer.preview.dialogue import Setup, to_text
from lightning_trainer.preview.mailbox import Job, Mailbox
from lightning_trainer.preview.publication import Publication
from lightning_trainer.preview.snapshot import Slot
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.messages import to_wire
from lightning_trainer.types import PreviewRequest, SamplingParams

DUTY = 0.25
"""Most of the time that pushes may take of the link: after a long one, the next has to wait."""

SHORT_PUSH = 1.0
"""Seconds of a push after which nothing has to wait."""


@dataclass(frozen=True)
class Outcome:
    """What became of one submit.

    Attributes:
        answer: The dispatcher's message, where it is `ok`: tokens, reasons, seconds and step.
        why: It is not.
    """

    status: Literal["ok", "failed", "dropped", "skipped"]
    requests: tuple[PreviewRequest, ...]
    sampling: SamplingParams
    why: str = ""
    answer: dict[str, Any] = field(default_factory=dict)


def outcome(job: Job, status: Literal["failed", "dropped", "skipped"], why: str) -> Outcome:
    """Of a job without answers."""
    return Outcome(status, job.requests, job.sampling, why)


class Exchange:
    """One run's.

    Args:
        publication: What is sent.
        slots: For snapshots of it.
        setup: For the dispatcher.

    Attributes:
        companion: The dispatcher.
        mailbox: Jobs under way.
        figures: Of the newest preview.

    Raises:
        OSError: The dispatcher cannot be started.
    """

    def __init__(self, publication: Publication, slots: Sequence[Slot], setup: Setup) -> None:
        self._publication, self._run_id, self._not_before = publication, setup.run_id, 0.0
        self._pushed = -1
        self.figures: dict[str, float] = {}
        self.mailbox = Mailbox(slots)
        self.companion = Companion(setup)

    def put(
        self, number: int, requests: Sequence[PreviewRequest], sampling: SamplingParams, step: int
    ) -> list[Outcome]:
        """Take a snapshot, unless there is one of these weights, and hand it over when it is its turn.

        Returns:
            What had to give way; this very preview, where no slot is free.
        """
        slot, replaced = self.mailbox.present(step), []
        if slot is None:
            slot = self.mailbox.room()
            if slot is None:
                return [outcome(Job(number, step, -1, tuple(requests), sampling), "dropped", "no slot is free")]
            started = time.perf_counter()
            replaced = self.mailbox.snapshot(step, slot, self._publication.tensors())
            self.figures["stall_ms"] = 1000 * (time.perf_counter() - started)
        self.mailbox.put(Job(number, step, slot, tuple(requests), sampling))
        self.hand_over(hurry=False)
        return [outcome(job, "dropped", "a newer one came") for job in replaced]

    def settle(self) -> None:
        """The tensors are about to change."""
        started = time.perf_counter()
        self.mailbox.settle()
        self.figures["stall_ms"] = self.figures.get("stall_ms", 0.0) + 1000 * (time.perf_counter() - started)
        self.hand_over(hurry=False)

    def hand_over(self, hurry: bool) -> None:
        """Give the first waiting job to the dispatcher, when it is its turn.

        Args:
            hurry: Somebody waits: neither the link is spared nor the snapshot left to itself.
        """
        waiting = self.mailbox.waiting
        pushes = bool(waiting) and waiting[0].step != self._pushed
        if pushes and time.monotonic() < self._not_before and not hurry:
            return
        job = self.mailbox.next(wait=hurry)
        if job is None:
            return
        self._pushed = job.step
        request = to_wire(f"{self._run_id}-{job.number}", job.requests, job.sampling, pb.WeightsSelector())
        message = {"type": "job", "job": job.number, "step": job.step, "slot": job.slot}
        self.companion.send({**message, "request": to_text(request.SerializeToString())})

    def take_in(self, timeout: float = 0.0) -> list[Outcome]:
        """What has been decided; waits up to `timeout` seconds for the dispatcher to say something."""
        found: list[Outcome] = []
        for message in self.companion.receive(timeout):
            job = self.mailbox.flying
            if message["type"] == "ended":
                found += self._ended(message["why"])
            elif job is not None and message["job"] == job.number:
                found += self._heard(message, job)
        return found

    def _heard(self, message: dict[str, Any], job: Job) -> list[Outcome]:
        if message["type"] == "free":
            took = message["push_seconds"]
            self.figures |= {"push_seconds": took, "push_mb": message["push_bytes"] / 1e6}
            if took > SHORT_PUSH:
                self._not_before = time.monotonic() + took * (1 / DUTY - 1)
            self.mailbox.sent()
            return []
        self.mailbox.done()
        if message["status"] != "ok":
            return [outcome(job, message["status"], message["error"])]
        if message["step"] != job.step:
            return [outcome(job, "failed", "the answers are by the weights of another step")]
        self.figures["generate_seconds"] = message["seconds"]
        return [Outcome("ok", job.requests, job.sampling, answer=message)]

    def _ended(self, why: str) -> list[Outcome]:
        """The dispatcher has, and with it what it was doing; what waits goes to the next, if there is one."""
        job = self.mailbox.flying
        self.mailbox.done()
        found = [] if job is None else [outcome(job, "failed", why)]
        if not self.companion.is_usable:
            found += [outcome(waiting, "skipped", self.companion.why) for waiting in self.mailbox.drop_waiting()]
        return found

    def end(self, why: str) -> list[Outcome]:
        """End the dispatcher, and with it everything under way; in bounded time."""
        self.companion.stop()
        jobs = [self.mailbox.flying] if self.mailbox.flying is not None else []
        jobs += self.mailbox.drop_waiting()
        self.mailbox.done()
        return [outcome(job, "failed", why) for job in jobs]

    def close(self) -> None:
        """Give the slots back, too."""
        self.companion.stop()
        self.mailbox.close()
