"""Many clients of one worker, to be run in a process of their own: each with its own connection, as trainers have."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lightning_trainer.rpc import channel
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc import preview_pb2_grpc as stubs

Result = TypeVar("Result")

OPTIONS = (*channel.CLIENT, ("grpc.use_local_subchannel_pool", 1))
"""Without the last, all channels of a process are one connection."""

SECONDS = 60.0
"""Most that one call takes."""


@dataclass(frozen=True)
class Streams:
    """What concurrent streams brought.

    Attributes:
        events: Of all of them.
        tokens: In these events.
        errors: Streams that did not end as they should.
        seconds: From the first call to the end of the last.
    """

    events: int
    tokens: int
    errors: int
    seconds: float


@dataclass(frozen=True)
class Refusals:
    """What became of the calls of a crowd.

    Attributes:
        seconds: Of each call that was refused because the queue was full.
        answered: Calls that were.
        errors: Calls that failed in any other way.
    """

    seconds: tuple[float, ...]
    answered: int
    errors: int


def request(prompts: int, tokens: int, every: int = 1) -> pb.GenerateRequest:
    """By any weights, greedy; an event for every `every` tokens."""
    return pb.GenerateRequest(
        request_id=uuid.uuid4().hex,
        weights=pb.WeightsSelector(any_resident=True),
        prompts=[pb.Prompt(tokens=pb.TokenIds(ids=(1, 2, 3)))] * prompts,
        sampling=pb.Sampling(greedy=True, top_p=1),
        stopping=pb.Stopping(max_new_tokens=tokens),
        stream_every_tokens=every,
    )


def streams(address: str, count: int, prompts: int, tokens: int) -> Streams:
    """So many clients that all ask at once, and read every event."""

    async def read(stub: Any) -> tuple[int, int, bool]:
        events = told = 0
        kind = None
        try:
            async for event in stub.Generate(request(prompts, tokens), timeout=SECONDS):
                events, kind = events + 1, event.WhichOneof("event")
                told += len(event.delta.token_ids)
        except grpc.RpcError:
            return events, told, False
        return events, told, kind == "finished"

    async def all_at_once(clients: list[Any]) -> Streams:
        started = time.perf_counter()
        read_by = await asyncio.gather(*map(read, clients))
        seconds = time.perf_counter() - started
        events, told, whole = zip(*read_by, strict=True)
        return Streams(sum(events), sum(told), whole.count(False), seconds)

    return asyncio.run(_with_clients(address, count, all_at_once))


def burst(address: str, count: int, tokens: int) -> Refusals:
    """So many clients that all ask in one moment."""

    async def all_at_once(clients: list[Any]) -> Refusals:
        return _sum_up(await asyncio.gather(*(_ask(stub, tokens) for stub in clients)))

    return asyncio.run(_with_clients(address, count, all_at_once))


def siege(address: str, count: int, tokens: int, seconds: float, pause: float) -> Refusals:
    """So many clients that ask for so long, again and again.

    Args:
        pause: Before each call, on average; it varies by half of it.
    """

    async def one(stub: Any, rng: random.Random, end: float) -> list[tuple[str, float]]:
        found = []
        while (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, pause * rng.uniform(0.5, 1.5)))
            found.append(await _ask(stub, tokens))
        return found

    async def all_of_them(clients: list[Any]) -> Refusals:
        end = time.monotonic() + seconds
        found = await asyncio.gather(*(one(stub, random.Random(n), end) for n, stub in enumerate(clients)))
        return _sum_up([call for calls in found for call in calls])

    return asyncio.run(_with_clients(address, count, all_of_them))


async def _ask(stub: Any, tokens: int) -> tuple[str, float]:
    """(what the call ended with, its seconds)."""
    started = time.perf_counter()
    code = "OK"
    try:
        async for _ in stub.Generate(request(1, tokens, every=tokens), timeout=SECONDS):
            pass
    except grpc.RpcError as error:
        code = error.code().name
    return code, time.perf_counter() - started


def _sum_up(calls: list[tuple[str, float]]) -> Refusals:
    refused = tuple(seconds for code, seconds in calls if code == "RESOURCE_EXHAUSTED")
    answered = sum(code == "OK" for code, _ in calls)
    return Refusals(refused, answered, len(calls) - len(refused) - answered)


async def _with_clients(address: str, count: int, act: Callable[[list[Any]], Coroutine[Any, Any, Result]]) -> Result:
    """Give `act` the stubs of clients that are connected."""
    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(grpc.aio.insecure_channel(address, OPTIONS)) for _ in range(count)]
        await asyncio.gather(*map(_connected, channels))
        return await act([stubs.PreviewStub(each) for each in channels])  # type: ignore[no-untyped-call]


def _connected(to: Any) -> Awaitable[Any]:
    check: Awaitable[Any] = health_pb2_grpc.HealthStub(to).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
    return check
