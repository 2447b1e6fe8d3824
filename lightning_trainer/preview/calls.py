"""Calls of a worker: none without a deadline, none that stands still, and one kind of error for all that goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from lightning_trainer.preview.dialogue import Setup
from lightning_trainer.rpc import preview_pb2_grpc as stubs
from lightning_trainer.rpc.channel import bearer, open_channel
from lightning_trainer.rpc.errors import Failure, failure_of
from lightning_trainer.rpc.security import parse_address

TRANSIENT = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "UNKNOWN", "INTERNAL", "CANCELLED")
"""The worker did not answer; every other code is an answer."""


class CallFailed(Exception):
    """A call of the worker did not bring what it should."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure

    @property
    def transient(self) -> bool:
        """The worker did not answer, or has no time now."""
        return self.failure.code in TRANSIENT or self.failure.reason == "QUEUE_FULL"

    @classmethod
    def wrong(cls, text: str) -> CallFailed:
        """An answer that cannot be right."""
        return cls(Failure("DATA_LOSS", "", text, permanent=False))

    @classmethod
    def unfit(cls, text: str) -> CallFailed:
        """More is asked for than the worker takes."""
        return cls(Failure("OUT_OF_RANGE", "", text, permanent=False))

    @classmethod
    def taken(cls, text: str) -> CallFailed:
        """The worker is another run's, for now."""
        return cls(Failure("FAILED_PRECONDITION", "LEASE_HELD", text, permanent=False))

    @classmethod
    def never(cls, text: str, reason: str = "") -> CallFailed:
        """Asking again would not help."""
        return cls(Failure("FAILED_PRECONDITION", reason, text, permanent=True))


class Watchdog:
    """Cancels a call that stands still.

    gRPC's deadlines bound a call as a whole. A thread of the dispatcher's asks `check` several times a second.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._call: Any = None
        self._seconds = self._end = 0.0
        self._barked = False

    @contextmanager
    def over(self, call: Any, seconds: float, doing: str) -> Iterator[None]:
        """Watch `call`; gRPC's errors leave as CallFailed.

        Args:
            seconds: Without `moved`, until the call is cancelled.
            doing: What the call is for, to be said in the error.

        Raises:
            CallFailed: The call failed or stood still.
        """
        with self._lock:
            self._call, self._seconds, self._end = call, seconds, time.monotonic() + seconds
            self._barked = False
        try:
            with as_call_failed():
                yield
        except CallFailed as error:
            if self._barked:
                text = f"{doing}: nothing moved for {seconds:g} s"
                raise CallFailed(Failure("DEADLINE_EXCEEDED", "", text, permanent=False)) from error
            raise
        finally:
            with self._lock:
                self._call = None

    def moved(self) -> None:
        """The call has got on."""
        self._end = time.monotonic() + self._seconds

    def check(self) -> None:
        """Cancel the call if it is time."""
        with self._lock:
            if self._call is not None and time.monotonic() > self._end and not self._barked:
                self._barked = True
                self._call.cancel()


@contextmanager
def as_call_failed() -> Iterator[None]:
    """gRPC's errors leave as CallFailed."""
    try:
        yield
    except grpc.RpcError as error:
        raise CallFailed(failure_of(error)) from error
    except (grpc.FutureCancelledError, grpc.FutureTimeoutError) as error:
        raise CallFailed(Failure("CANCELLED", "", "the call was cancelled", permanent=False)) from error


@dataclass(frozen=True)
class Worker:
    """A worker, and how it is called."""

    preview: Any
    weights: Any
    metadata: tuple[tuple[str, str], ...]
    channel: Any
    watchdog: Watchdog = field(default_factory=Watchdog)


def connect(setup: Setup) -> Worker:
    """Open a channel; the connection comes with the first call.

    Raises:
        InputError: The CA cannot be read.
    """
    channel = open_channel(parse_address(setup.address), None if setup.ca is None else Path(setup.ca))
    preview, weights = stubs.PreviewStub(channel), stubs.WeightsStub(channel)  # type: ignore[no-untyped-call]
    return Worker(preview, weights, bearer(setup.token), channel)
