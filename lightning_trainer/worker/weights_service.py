"""Weights on the wire: Begin, Upload, Commit, Abort, and the lease under which they come: Renew, Release."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import grpc

from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.errors import Reason, Refusal
from lightning_trainer.rpc.preview_pb2_grpc import WeightsServicer
from lightning_trainer.worker.boundary import answered
from lightning_trainer.worker.compute import note_exception
from lightning_trainer.worker.host import Host

Response = TypeVar("Response")

log = logging.getLogger(__name__)


MOST_WAITING = 8
"""Calls of Begin and Commit, their clients gone or not: each holds its request."""


@dataclass
class Caller:
    """Whoever waits for the answer of a call.

    Attributes:
        until: Seconds of the monotonic clock; nobody waits for longer.
        has_hung_up: Nobody waits any more.
    """

    until: float
    has_hung_up: bool = False

    def refuse_gone(self) -> None:
        """Raises:
        Refusal: Nobody waits.
        """
        if self.has_hung_up or time.monotonic() > self.until:
            raise Refusal(Reason.REASON_UNAVAILABLE, "the client has gone")


class Weights(WeightsServicer):
    """Begin and Commit come one after the other; they go on when their client hangs up, so that it may ask again."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._one = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    @answered
    async def Begin(self, request: pb.BeginRequest, context: Any) -> pb.BeginResponse:
        """Begin an update, or go on with it."""
        self.host.resident.admit(request)  # what can be refused at once need not wait
        caller = Caller(time.monotonic() + (context.time_remaining() or float("inf")))
        try:
            return await self._whole(self._begin(request, caller))
        except asyncio.CancelledError:
            caller.has_hung_up = True
            raise

    async def _begin(self, request: pb.BeginRequest, caller: Caller) -> pb.BeginResponse:
        weights = self.host.resident
        async with self._one:
            caller.refuse_gone()
            if weights.admit(request):
                await self._take_turn()
                try:
                    await self.host.compute.run(lambda: weights.prepare(request))
                finally:
                    self.host.turns.give()
                    await self.host.show_health()
            caller.refuse_gone()  # a run that has ended would hold the worker
            return weights.begin(request)

    @answered
    async def Upload(self, request_iterator: Any, context: Any) -> pb.UploadResponse:
        """Take bytes until the client has sent all."""
        weights, cursor = self.host.resident, 0
        while True:
            try:
                async with asyncio.timeout(self.host.patience.upload):
                    chunk = await context.read()
            except TimeoutError as error:
                raise Refusal(Reason.REASON_UNAVAILABLE, "no bytes came for too long") from error
            if chunk is grpc.aio.EOF:
                return pb.UploadResponse(cursor=cursor)
            cursor = weights.chunk(chunk, context)
            self.host.counters["uploaded_bytes_total"] += len(chunk.data)

    @answered
    async def Commit(self, request: pb.CommitRequest, context: Any) -> pb.CommitResponse:
        """Verify an update and write it into the model between two generations."""
        return await self._whole(self._commit(request))

    async def _commit(self, request: pb.CommitRequest) -> pb.CommitResponse:
        weights = self.host.resident
        async with self._one:
            if weights.is_committed(request.target):
                return pb.CommitResponse(resident=weights.ref)
            times = [time.monotonic()]
            update = weights.verify(request)
            times.append(time.monotonic())
            await self._take_turn()
            times.append(time.monotonic())
            try:
                await self.host.compute.run(lambda: weights.apply(update))
            except Refusal:  # it broke off half-way
                self.host.suspect_device()
                raise
            finally:
                self.host.turns.give()
                await self.host.show_health()
            times.append(time.monotonic())
            self.host.counters["commits_total"] += 1
            step, content = request.target.global_step, request.target.content_sha256.hex()
            log.info("weights of step %d (%.8s) are resident", step, content)
            verify, drain, apply = (round((b - a) * 1e6) for a, b in pairwise(times))
            return pb.CommitResponse(resident=weights.ref, verify_micros=verify, drain_micros=drain, apply_micros=apply)

    async def _take_turn(self) -> None:
        """Before those who wait; a generation that goes on for too long is ended."""
        timer = asyncio.get_running_loop().call_later(self.host.patience.drain, self._supersede)
        try:
            await self.host.turns.take(urgent=True)
        finally:
            timer.cancel()

    def _supersede(self) -> None:
        if self.host.running is not None:
            self.host.running.stop(Refusal(Reason.REASON_STALE_PUBLISH, "newer weights took the place of these"))

    async def _whole(self, steps: Coroutine[Any, Any, Response]) -> Response:
        if len(self._tasks) >= MOST_WAITING:
            steps.close()
            raise Refusal(Reason.REASON_QUEUE_FULL, "too many updates wait", [], 1000)
        task = asyncio.ensure_future(steps)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(note_exception)
        return await asyncio.shield(task)

    @answered
    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        """Forget an update."""
        self.host.resident.abort(request.update_id, request.fencing_token)
        return pb.AbortResponse()

    @answered
    async def Renew(self, request: pb.LeaseRequest, context: Any) -> pb.LeaseResponse:
        """Keep the worker for the run."""
        lease = self.host.resident.lease
        lease.check(request.fencing_token)
        return pb.LeaseResponse(remaining_millis=round(lease.remaining * 1000))

    @answered
    async def Release(self, request: pb.LeaseRequest, context: Any) -> pb.LeaseResponse:
        """Let another run begin; what this one was sending is forgotten."""
        self.host.resident.release(request.fencing_token)
        return pb.LeaseResponse()
