"""One worker from the inside: its model, who uses it, what it counts, and the health that others see."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from grpc_health.v1 import health, health_pb2

from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.errors import Reason, Refusal
from lightning_trainer.rpc.limits import Limits
from lightning_trainer.worker import lease
from lightning_trainer.worker.compute import Compute, Turns
from lightning_trainer.worker.engine import Engine
from lightning_trainer.worker.lease import Lease
from lightning_trainer.worker.resident import Resident

if TYPE_CHECKING:
    from lightning_trainer.worker.answering import Answering

PREVIEW = pb.DESCRIPTOR.services_by_name["Preview"].full_name
WEIGHTS = pb.DESCRIPTOR.services_by_name["Weights"].full_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long the worker waits for others, in seconds.

    Args:
        lease: A run that is not heard of keeps the worker.
        upload: An upload may pause between two messages.
        reader: A client may leave an event unread.
        drain: A generation may run on while an update waits to be written.
        stop: Calls may run on once the worker is asked to end.
    """

    lease: float = lease.SECONDS
    upload: float = 10.0
    reader: float = 10.0
    drain: float = 5.0
    stop: float = 10.0


class DeviceLost(Exception):
    """The device does not compute any more in this process; a new process may find it well."""


@dataclass
class Host:
    """What both services share. Belongs to one event loop.

    Attributes:
        compute: The thread in which the model is used.
        turns: Who may use it.
        running: The generation that has the turn.
        counters: Only grow; as GetStatus says them.
        lost: Set once the device does not compute any more.
    """

    limits: Limits
    patience: Patience
    compute: Compute = field(default_factory=Compute)
    turns: Turns = field(default_factory=Turns)
    running: Answering | None = None
    in_flight: set[str] = field(default_factory=set)
    counters: Counter[str] = field(default_factory=Counter)
    health: Any = field(default_factory=health.aio.HealthServicer)
    started: float = field(default_factory=time.monotonic)
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    _suspicions: set[asyncio.Task[None]] = field(default_factory=set)
    loaded: Resident | None = None

    async def load(self, make_engine: Callable[[], Engine]) -> None:
        """Build the model; until then calls are refused.

        Raises:
            InputError: There is no such model.
        """
        await self.show_health()
        self.loaded = await self.compute.run(lambda: Resident(make_engine(), self.limits, Lease(self.patience.lease)))
        await self.show_health()

    @property
    def resident(self) -> Resident:
        """The weights.

        Raises:
            Refusal: They are being loaded.
        """
        if self.loaded is None:
            raise Refusal(Reason.REASON_UNAVAILABLE, "the worker is loading its model")
        return self.loaded

    async def show_health(self) -> None:
        """Tell the health service how things stand."""
        weights = self.loaded
        takes_weights = weights is not None and not weights.draining
        shown = {"": True, PREVIEW: weights is not None and weights.is_serving, WEIGHTS: takes_weights}
        for service, serving in shown.items():
            status = health_pb2.HealthCheckResponse
            await self.health.set(service, status.SERVING if serving else status.NOT_SERVING)

    def suspect_device(self) -> None:
        """See to the device, while whoever called is answered: it may be busy for long."""
        task = asyncio.ensure_future(self.see_to_device())
        self._suspicions.add(task)
        task.add_done_callback(self._suspicions.discard)

    async def see_to_device(self) -> None:
        """Serve no more where the device has failed for good, as a GPU does at an illegal access.

        The process then ends with status 1, so that whatever watches it can start another.
        """
        weights = self.loaded
        if weights is None or await self.compute.run(weights.engine.is_alive):
            return
        log.error("the device does not compute any more: ending")
        weights.draining = True
        await self.show_health()
        self.lost.set()

    async def drain(self) -> None:
        """Begin nothing more."""
        if self.loaded is not None:
            self.loaded.draining = True
        await self.health.enter_graceful_shutdown()


def log_fault(what: str, error: BaseException) -> None:
    """Say where an unexpected error arose, without its text: that may quote a prompt."""
    places = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s failed: %s\n%s", what, type(error).__name__, places)
