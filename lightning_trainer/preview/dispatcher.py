"""The dispatcher: a process of its own beside training, which alone speaks gRPC.

It reads weights from memory it shares with the trainer, brings them to the worker, asks for answers and hands those
back. Whatever goes wrong here or beyond, training goes on. It ends with the trainer, however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from lightning_trainer.preview.asker import Answers, ask
from lightning_trainer.preview.batches import Part, parts_of
from lightning_trainer.preview.breaker import FIRST, Breaker
from lightning_trainer.preview.calls import CallFailed, as_call_failed, connect
from lightning_trainer.preview.dialogue import Lines, Setup, to_bytes
from lightning_trainer.preview.pusher import Pusher
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.layout import differing
from lightning_trainer.rpc.limits import RENEWS
from lightning_trainer.types import InputError

TICK = 0.2
"""Seconds between looks at the parent and at calls that stand still."""

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve the trainer whose socket is the standard input, and whose process id is the last argument."""
    parent = int(sys.argv[-1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal's whole group: the trainer decides when to end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    threading.excepthook = _die
    lines = Lines(socket.socket(fileno=os.dup(0)))
    dispatcher: Dispatcher | None = None
    while os.getppid() == parent:
        try:
            messages = lines.receive(TICK)
        except EOFError:
            break
        for message in messages:
            if dispatcher is None:
                dispatcher = Dispatcher(Setup.from_json(message), lines)
            elif message["type"] == "quit":
                dispatcher.quit()
            else:
                dispatcher.jobs.put(message)
        if dispatcher is not None:
            dispatcher.tick()
    os._exit(0)


def _die(args: Any) -> NoReturn:
    """A bug in a thread ends the process, and with it what the trainer waits for."""
    traceback.print_exception(args.exc_type, args.exc_value, args.exc_traceback)
    os._exit(70)


class Dispatcher:
    """Does one job after the other, in a thread; between them looks after a worker that does not answer.

    Args:
        setup: What the trainer said first.
        lines: To the trainer.

    Attributes:
        jobs: That wait.
    """

    def __init__(self, setup: Setup, lines: Lines) -> None:
        self._setup, self._lines = setup, lines
        size = sum(entry.nbytes for entry in setup.layout)
        self._slots = [memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ)) for fd in setup.slots]
        self._breaker = Breaker()
        self._state = ""
        self._described: pb.DescribeResponse | None = None
        self._renews = False
        self.jobs: queue.Queue[dict[str, Any]] = queue.Queue()
        try:
            self._worker = connect(setup)
        except InputError as error:  # the CA has gone since the trainer read it
            self._breaker.refused()
            self._tell("off", str(error), [])
        else:
            self._pusher = Pusher(self._worker, setup)
            threading.Thread(target=self._run, daemon=True).start()

    def tick(self) -> None:
        """What has to be done several times a second."""
        self._lines.flush()
        if self._breaker.state != "off":
            self._worker.watchdog.check()

    def quit(self) -> NoReturn:
        """End at once; the worker is free for another run, and what it holds half of is given up."""
        if self._breaker.state != "off":  # else there may be no pusher
            self._pusher.ends = True
        if self._breaker.state == "closed":
            with contextlib.suppress(CallFailed):  # its lease ends by itself, only later
                self._pusher.release()
        os._exit(0)

    def _run(self) -> None:
        self._probe(self._setup.deadlines.preflight)
        while True:
            try:
                job = self.jobs.get(timeout=self._pause())
            except queue.Empty:
                self._look_after()
            else:
                self._do(job)

    def _pause(self) -> float:
        """Seconds without a job until the worker is looked after."""
        if self._breaker.state == "open":
            return self._breaker.wait() or 0.0
        return FIRST if self._state == "lost" else self._setup.deadlines.idle

    def _look_after(self) -> None:
        """There is nothing to do: see whether the worker is back, or keep it for this run."""
        if self._breaker.state == "open" or self._state == "lost":
            self._probe(self._setup.deadlines.describe)
        elif self._breaker.state == "closed" and self._renews:
            try:
                self._pusher.renew()
            except CallFailed as error:
                self._failed(error)

    def _probe(self, deadline: float) -> None:
        """Ask the worker who it is and whose, if only to see whether it answers."""
        try:
            self._describe(deadline)
            self._refuse_taken(deadline)
        except CallFailed as error:
            self._failed(error)
        else:
            self._succeeded()

    def _describe(self, deadline: float) -> pb.DescribeResponse:
        with as_call_failed():
            found: pb.DescribeResponse = self._worker.preview.Describe(
                pb.DescribeRequest(), timeout=deadline, metadata=self._worker.metadata
            )
        differs = differing(pb.ModelIdentity.FromString(self._setup.identity), found.identity)
        if differs:
            fields = ", ".join(differs)
            raise CallFailed.never(f"the worker's model is another than the one in training: {fields} differ", fields)
        if self._setup.kind not in found.update_kinds or pb.ENCODING_RAW not in found.encodings:
            raise CallFailed.never("the worker does not take updates of this kind: it is older than the trainer")
        if self._setup.kind == pb.UPDATE_KIND_ADAPTER and not found.identity.frozen_base_sha256:
            raise CallFailed.never("the worker's directory has no weights, on which adapters could lie")
        self._described, self._renews = found, found.wire_minor >= RENEWS
        return found

    def _refuse_taken(self, deadline: float) -> None:
        with as_call_failed():
            status = self._worker.preview.GetStatus(
                pb.GetStatusRequest(), timeout=deadline, metadata=self._worker.metadata
            )
        if status.lease_run_id not in ("", self._setup.run_id):
            left = status.lease_remaining_millis / 1000
            raise CallFailed.taken(f"another run holds the worker for {left:.0f} s unless it goes on")

    def _do(self, job: dict[str, Any]) -> None:
        if self._breaker.state != "closed":
            self._answer(job, status="skipped", error="the preview worker does not answer")
            return
        pushed: dict[str, float] = {}
        try:
            request = pb.GenerateRequest.FromString(to_bytes(job["request"]))
            known, parts, refused = self._parts(request)
            done = self._pusher.push(self._slots[job["slot"]], job["step"], job["job"])
            pushed = {"push_seconds": done.seconds, "push_bytes": done.sent}
            self._lines.send({"type": "free", "job": job["job"], **pushed})
            answers = [ask(self._worker, part.request, done.ref, self._setup.deadlines) for part in parts]
            if self._pusher.instance != known.worker_instance_id:
                self._described = None  # another worker has taken the place
        except CallFailed as error:
            error = self._which_fields(error)
            self._failed(error)
            self._answer(job, status="failed", error=_one_line(error), **pushed)
            return
        self._succeeded()
        fields = _together(len(request.prompts), parts, answers, refused)
        self._answer(job, status="ok", step=done.ref.global_step, **fields, **pushed)

    def _parts(self, request: pb.GenerateRequest) -> tuple[pb.DescribeResponse, list[Part], dict[int, str]]:
        """Split the request by the worker's limits; a worker that would not take it all is asked for them anew."""
        known = self._described
        if known is not None:
            with contextlib.suppress(CallFailed):
                _check_rules(request, known)
                parts, refused = parts_of(request, known.limits)
                if not refused:
                    return known, parts, refused
        known = self._describe(self._setup.deadlines.describe)
        _check_rules(request, known)
        return known, *parts_of(request, known.limits)

    def _which_fields(self, error: CallFailed) -> CallFailed:
        """Of a model that turns out to be another, restarted on the same port, say."""
        if error.failure.reason != "IDENTITY_MISMATCH":
            return error
        try:
            self._describe(self._setup.deadlines.describe)
        except CallFailed as told:
            return told
        return error

    def _answer(self, job: dict[str, Any], **fields: Any) -> None:
        self._lines.send({"type": "result", "job": job["job"], **fields})

    def _succeeded(self) -> None:
        self._breaker.succeeded()
        self._tell("connected", "", [])

    def _failed(self, error: CallFailed) -> None:
        if error.failure.permanent:
            self._breaker.refused()
            fields = error.failure.reason if error.failure.code == "FAILED_PRECONDITION" else ""
            self._tell("off", _one_line(error), [field for field in fields.split(", ") if field])
        elif error.transient:
            self._described = None  # whoever answers next may be another
            self._breaker.failed()
            self._tell("paused" if self._breaker.state == "open" else "lost", _one_line(error), [])
        elif error.failure.reason == "LEASE_HELD":
            self._tell("lost", _one_line(error), [])
        else:  # it answers, but not with what was asked for
            self._succeeded()

    def _tell(self, state: str, why: str, fields: list[str]) -> None:
        if state != self._state:
            self._state = state
            self._lines.send({"type": "state", "state": state, "why": why, "fields": fields})


def _together(
    prompts: int, parts: Sequence[Part], answers: Sequence[Answers], refused: Mapping[int, str]
) -> dict[str, Any]:
    """The answers in the order of the whole request; a prompt that was not asked has none, and says why."""
    tokens: list[list[int]] = [[] for _ in range(prompts)]
    reasons: list[str] = ["error"] * prompts
    for part, found in zip(parts, answers, strict=True):
        for place, ids, reason in zip(part.places, found.tokens, found.reasons, strict=True):
            tokens[place], reasons[place] = ids, reason
    errors = [refused.get(place, "") for place in range(prompts)]
    return {"tokens": tokens, "reasons": reasons, "errors": errors, "seconds": sum(a.seconds for a in answers)}


def _check_rules(request: pb.GenerateRequest, known: pb.DescribeResponse) -> None:
    kinds = {str(rule.WhichOneof("rule")) for prompt in request.prompts for rule in prompt.rules}
    unknown = sorted(kinds - set(known.rule_kinds))
    if unknown:
        raise CallFailed.never(f"the worker is older than the trainer and knows no logits rule {', '.join(unknown)}")


def _one_line(error: CallFailed) -> str:
    failure = error.failure
    head = f"{failure.code} {failure.reason}".strip()
    return f"{failure.text} [{head}]"[:500]


if __name__ == "__main__":
    main()
