"""Asking a worker for answers by exactly these weights, and believing only what adds up."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_trainer.preview.calls import CallFailed, Worker
from lightning_trainer.preview.dialogue import Deadlines
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.messages import FINISH, output_digest
from lightning_trainer.types import FinishReason

QUEUE_SECONDS, TOKEN_SECONDS = 30.0, 0.5
"""What a generation may take: waiting its turn and the prompts, and for each new token."""

REASONS: dict[int, FinishReason] = {number: name for name, number in FINISH.items()}


@dataclass(frozen=True)
class Answers:
    """Of one request, in the order of its prompts.

    Attributes:
        seconds: On the worker, without the queue.
    """

    tokens: list[list[int]]
    reasons: list[FinishReason]
    seconds: float


def ask(worker: Worker, request: pb.GenerateRequest, ref: pb.WeightsRef, deadlines: Deadlines) -> Answers:
    """Have the prompts of `request` answered by the weights `ref`.

    Raises:
        CallFailed: The call failed, or what came is not whole or not by these weights.
    """
    request.weights.exact.CopyFrom(ref)
    new = request.stopping.max_new_tokens
    limit = min(deadlines.generate * max(1.0, new / 1024), QUEUE_SECONDS + TOKEN_SECONDS * new)
    call = worker.preview.Generate(request, timeout=limit, metadata=worker.metadata)
    reader = _Reader(ref, len(request.prompts))
    try:
        with worker.watchdog.over(call, deadlines.event, "generation"):
            for event in call:
                worker.watchdog.moved()
                reader.take(event)
        return reader.answers()
    finally:
        call.cancel()  # nothing, if it has ended


class _Reader:
    """Puts the events of one generation together."""

    def __init__(self, ref: pb.WeightsRef, prompts: int) -> None:
        self._ref, self._next = ref, 0
        self._tokens: list[list[int]] = [[] for _ in range(prompts)]
        self._reasons: list[FinishReason | None] = [None] * prompts
        self._started = False
        self._finished: pb.Finished | None = None

    def take(self, event: pb.GenerateEvent) -> None:
        _require(event.event_seq == self._next, f"event {event.event_seq} came, not {self._next}")
        _require(self._finished is None, "an event came after the last")
        self._next += 1
        kind = event.WhichOneof("event")
        if kind == "started":
            _require(event.started.weights == self._ref, "the worker started with other weights than asked")
            self._started = True
        elif kind == "delta":
            self._delta(event.delta)
        elif kind == "prompt_done":
            self._done(event.prompt_done)
        elif kind == "finished":
            _require(event.finished.weights == self._ref, "the worker finished with other weights than asked")
            self._finished = event.finished
        else:
            _require(kind == "queued", "an event of a kind that this side does not know")

    def _delta(self, delta: pb.Delta) -> None:
        _require(self._started and delta.prompt_index < len(self._tokens), "tokens of no prompt")
        tokens = self._tokens[delta.prompt_index]
        _require(delta.first_token_index == len(tokens), "tokens are missing")
        tokens.extend(delta.token_ids)

    def _done(self, done: pb.PromptDone) -> None:
        _require(self._started and done.prompt_index < len(self._tokens), "the end of no prompt")
        tokens = self._tokens[done.prompt_index]
        _require(done.generated_tokens <= len(tokens), "tokens are missing")
        del tokens[done.generated_tokens :]  # an answer that turns NON_FINITE takes back what it has told
        _require(done.reason in REASONS, "an answer ended for a reason that this side does not know")
        self._reasons[done.prompt_index] = REASONS[done.reason]

    def answers(self) -> Answers:
        reasons = [reason for reason in self._reasons if reason is not None]
        _require(self._finished is not None and len(reasons) == len(self._tokens), "the answers are not whole")
        assert self._finished is not None
        right = self._finished.output_sha256 == output_digest(self._tokens)
        _require(right, "the answers are not those the worker generated: their digest differs")
        return Answers(self._tokens, reasons, self._finished.decode_micros / 1e6)


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise CallFailed.wrong(text)
