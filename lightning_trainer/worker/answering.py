"""The answers of one Generate while they are made: written by the thread that computes, read by the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from lightning_trainer.generation import Generation
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.messages import FINISH, output_digest

EVERY_TOKENS = 4
"""Tokens that a Delta holds at least, if the client names no number."""


class Stopped(Exception):
    """Nobody waits for the answers any more."""


class Answering:
    """Tokens so far, and how many of them the client was told.

    A client that reads slowly gets fewer and larger events: nothing queues up but the tokens themselves.

    Args:
        rows: Prompts.
        stop_token_ids: Tokens that end an answer.
        every: Tokens that a Delta holds at least, unless time is up; 0 takes the default.
        loop: That of the reader.
    """

    def __init__(self, rows: int, stop_token_ids: Sequence[int], every: int, loop: asyncio.AbstractEventLoop) -> None:
        self._tokens: list[list[int]] = [[] for _ in range(rows)]
        self._told = [0] * rows
        self._open = [True] * rows
        self._stops, self._every, self._loop = frozenset(stop_token_ids), every or EVERY_TOKENS, loop
        self._fault: Exception | None = None
        self.news = asyncio.Event()

    def stop(self, fault: Exception) -> None:
        """Raise `fault` where the tokens are made, before the next one is kept."""
        self._fault = self._fault or fault

    def on_step(self, first: int, tokens: list[int]) -> None:
        """One new token per row; see generation.OnStep."""
        if self._fault is not None:
            raise self._fault
        for row, token in enumerate(tokens, first):
            self._open[row] = self._open[row] and token >= 0
            if self._open[row]:
                self._tokens[row].append(token)
                self._open[row] = token not in self._stops
        if any(self._untold(row) >= self._every for row in range(len(self._tokens))):
            self._loop.call_soon_threadsafe(self.news.set)

    def _untold(self, row: int) -> int:
        return len(self._tokens[row]) - self._told[row]

    def deltas(self, least: int | None = None) -> Iterator[pb.GenerateEvent]:
        """News of the rows that have `least` tokens of it; None takes the client's number."""
        for row, tokens in enumerate(self._tokens):
            first, new = self._told[row], tokens[self._told[row] :]
            if new and len(new) >= (self._every if least is None else least):
                self._told[row] += len(new)
                delta = pb.Delta(prompt_index=row, first_token_index=first, token_ids=new)
                yield pb.GenerateEvent(delta=delta)

    def last_events(
        self, answers: Sequence[Generation], weights: pb.WeightsRef, waited: float, seconds: float
    ) -> Iterator[pb.GenerateEvent]:
        """What is left to tell once the answers are there.

        An answer that became NON_FINITE has no tokens, whatever was told of it before.
        """
        for row, answer in enumerate(answers):
            self._tokens[row] = list(answer.token_ids)
        yield from self.deltas(least=1)
        for row, answer in enumerate(answers):
            done = pb.PromptDone(
                prompt_index=row, reason=FINISH[answer.finish_reason], generated_tokens=len(answer.token_ids)
            )
            yield pb.GenerateEvent(prompt_done=done)
        finished = pb.Finished(
            weights=weights,
            queue_micros=round(waited * 1e6),
            decode_micros=round(seconds * 1e6),
            total_generated_tokens=sum(len(answer.token_ids) for answer in answers),
            output_sha256=output_digest([answer.token_ids for answer in answers]),
        )
        yield pb.GenerateEvent(finished=finished)
