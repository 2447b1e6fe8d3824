"""The two services on the wire: Preview, which generates, and Weights, which changes what it generates with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

import grpc
import torch

from lightning_trainer import __version__
from lightning_trainer.generation import Generation
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.errors import Reason, Refusal
from lightning_trainer.rpc.limits import NAME_BYTES, WIRE_MINOR
from lightning_trainer.rpc.messages import RULE_KINDS, requests_from_wire, sampling_from_wire
from lightning_trainer.rpc.preview_pb2_grpc import PreviewServicer
from lightning_trainer.types import PreviewRequest, SamplingParams
from lightning_trainer.worker.answering import Answering, Stopped
from lightning_trainer.worker.boundary import answered
from lightning_trainer.worker.compute import note_exception
from lightning_trainer.worker.host import Host
from lightning_trainer.worker.resident import KINDS

TELL_SECONDS = 0.1
"""Tokens are told after this time, however few they are."""


class Preview(PreviewServicer):
    """Describe, Generate, GetStatus."""

    def __init__(self, host: Host) -> None:
        self.host = host

    @answered
    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        """What a trainer must know before it sends anything."""
        weights = self.host.resident
        limits = self.host.limits.to_wire()
        limits.max_update_bytes = limits.max_update_bytes or weights.update_bytes
        return pb.DescribeResponse(
            wire_minor=WIRE_MINOR,
            worker_version=__version__,
            worker_instance_id=weights.instance_id,
            identity=weights.identity,
            limits=limits,
            rule_kinds=RULE_KINDS,
            encodings=[pb.ENCODING_RAW],
            engine=weights.engine.name,
            resident=weights.ref,
            update_kinds=KINDS,
        )

    @answered
    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        """How the worker stands; answered while the model is loaded, too."""
        host, weights = self.host, self.host.loaded
        status = pb.GetStatusResponse(
            state=pb.GetStatusResponse.STATE_LOADING,
            queue_depth=host.turns.waiting,
            inflight=len(host.in_flight),
            counters=host.counters,
            uptime_millis=round((time.monotonic() - host.started) * 1000),
        )
        if weights is not None:
            free, total = weights.engine.memory()
            left = weights.lease.remaining
            status.MergeFrom(pb.GetStatusResponse(resident=weights.ref, device_bytes_free=free))
            status.state, status.device_bytes_total = weights.state, total
            status.lease_run_id = weights.lease.run_id if left else ""
            status.lease_remaining_millis = round(left * 1000)
        return status

    @answered
    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        """One batch, with the weights that are asked for and no others."""
        host, weights = self.host, self.host.resident
        vocab = weights.identity.vocab_size
        if not 0 < len(request.request_id) <= NAME_BYTES:
            raise Refusal(Reason.REASON_INVALID_ARGUMENT, "request_id is empty or too long", ["request_id"])
        if request.request_id in host.in_flight:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "a request of this request_id is being answered")
        sampling = sampling_from_wire(request, vocab, host.limits)
        prompts = requests_from_wire(request, vocab, host.limits)
        weights.choose(request.weights)
        if len(host.in_flight) > host.limits.max_queue_depth:  # one has the turn, the others wait
            raise Refusal(Reason.REASON_QUEUE_FULL, "too many requests wait", ["max_queue_depth"], 1000)
        host.in_flight.add(request.request_id)
        try:
            await Conversation(host, request, context).hold(prompts, sampling)
        finally:
            host.in_flight.discard(request.request_id)


class Conversation:
    """The events of one Generate."""

    def __init__(self, host: Host, request: pb.GenerateRequest, context: Any) -> None:
        self._host, self._request, self._context = host, request, context
        self._event_seq = 0

    async def hold(self, prompts: list[PreviewRequest], sampling: SamplingParams) -> None:
        """Wait for the turn, generate, tell."""
        host, came = self._host, time.monotonic()
        loop = asyncio.get_running_loop()
        answering = Answering(len(prompts), sampling.stop_token_ids, self._request.stream_every_tokens, loop)
        # At once, so that no two are told the same; where the turn is free it is held while that is told.
        ahead, place = host.turns.waiting + host.turns.taken, host.turns.enter()
        try:
            await self._tell([pb.GenerateEvent(queued=pb.Queued(position=ahead))])
            await place
        except BaseException:
            host.turns.leave(place)
            raise
        waited = time.monotonic() - came
        ref, future = self._set_off(prompts, sampling, answering)
        try:
            counts = [len(prompt.prompt_ids) for prompt in prompts]
            await self._tell([pb.GenerateEvent(started=pb.Started(weights=ref, prompt_token_counts=counts))])
            answers = await self._follow(answering, future)
        except BaseException:
            answering.stop(Stopped())
            host.counters["generate_failed_total"] += 1
            raise
        await self._tell(answering.last_events(answers, ref, waited, time.monotonic() - came - waited))
        host.counters["generate_ok_total"] += 1
        host.counters["generated_tokens_total"] += sum(len(answer.token_ids) for answer in answers)

    def _set_off(
        self, prompts: list[PreviewRequest], sampling: SamplingParams, answering: Answering
    ) -> tuple[pb.WeightsRef, Future[list[Generation]]]:
        """Begin to generate; the turn is given back when that has ended, not when the client has."""
        host, loop, weights = self._host, asyncio.get_running_loop(), self._host.resident
        try:
            ref = weights.choose(self._request.weights)  # they may have changed meanwhile; now they cannot
            longest = max(len(prompt.prompt_ids) for prompt in prompts)
            weights.engine.check_room(len(prompts), longest + sampling.max_new_tokens)
        except BaseException:
            host.turns.give()
            raise
        host.running = answering
        future = host.compute.submit(lambda: weights.engine.generate(prompts, sampling, answering.on_step))
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._end_turn))
        return ref, future

    def _end_turn(self) -> None:
        self._host.running = None
        self._host.turns.give()

    async def _follow(self, answering: Answering, future: Future[list[Generation]]) -> list[Generation]:
        done = asyncio.wrap_future(future)
        done.add_done_callback(lambda _: answering.news.set())
        done.add_done_callback(note_exception)
        while not done.done():
            self._host.resident.lease.renew(self._request.weights.exact.run_id)
            try:
                await asyncio.wait_for(answering.news.wait(), TELL_SECONDS)
                answering.news.clear()
                await self._tell(answering.deltas())
            except TimeoutError:
                await self._tell(answering.deltas(least=1))
        try:
            return done.result()
        except torch.OutOfMemoryError as error:
            text = "the device's memory is exhausted: fewer prompts, or fewer tokens"
            raise Refusal(Reason.REASON_OUT_OF_MEMORY, text) from error

    async def _tell(self, events: Iterable[pb.GenerateEvent]) -> None:
        for event in events:
            event.event_seq = self._event_seq
            self._event_seq += 1
            try:
                async with asyncio.timeout(self._host.patience.reader):
                    await self._context.write(event)
            except TimeoutError as error:
                self._host.counters["slow_readers_total"] += 1
                raise Refusal(Reason.REASON_UNAVAILABLE, "the events are not read") from error
