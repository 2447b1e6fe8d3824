"""The worker as a process: it listens, loads its model, serves, and ends when it is told to."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2_grpc

from lightning_trainer.rpc import preview_pb2_grpc
from lightning_trainer.rpc.channel import SERVER
from lightning_trainer.rpc.limits import Limits
from lightning_trainer.rpc.security import Address, read_file
from lightning_trainer.signals import in_main_thread
from lightning_trainer.types import InputError
from lightning_trainer.worker.answering import Stopped
from lightning_trainer.worker.auth import TokenGate
from lightning_trainer.worker.engine import Engine
from lightning_trainer.worker.host import DeviceLost, Host, Patience
from lightning_trainer.worker.services import Preview
from lightning_trainer.worker.weights_service import Weights

log = logging.getLogger(__name__)

Ready = Callable[[str], None]


@dataclass(frozen=True)
class Serving:
    """How a worker serves.

    Args:
        address: Where it listens; port 0 lets the system choose.
        tls: Files of the certificate and its key; None is plaintext.
        token: What callers must show; None lets everyone in.
        limits: What it takes.
        patience: How long it waits for others.
    """

    address: Address
    tls: tuple[Path, Path] | None = None
    token: str | None = field(default=None, repr=False)
    limits: Limits = field(default_factory=Limits)
    patience: Patience = field(default_factory=Patience)


class Worker:
    """A server and its host. Made and used within one event loop.

    Raises:
        InputError: The address cannot be listened on, or a file of the certificate cannot be read.
    """

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.host = Host(serving.limits, serving.patience)
        gates = [] if serving.token is None else [TokenGate(serving.token)]
        self._server = grpc.aio.server(interceptors=gates, options=SERVER)
        preview_pb2_grpc.add_PreviewServicer_to_server(Preview(self.host), self._server)  # type: ignore[no-untyped-call]
        preview_pb2_grpc.add_WeightsServicer_to_server(Weights(self.host), self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self.host.health, self._server)
        self.address = self._bind()

    def _bind(self) -> Address:
        address = self.serving.address
        _refuse_taken(address)
        try:
            port = self._add_port(address.target)
        except RuntimeError as error:
            reason = _reason(address) or "certificate and key must be PEM files that belong together"
            raise InputError(f"cannot listen on {address.target}: {reason}", key="listen") from error
        return address if address.path else replace(address, port=port)

    def _add_port(self, target: str) -> int:
        if self.serving.tls is None:
            return int(self._server.add_insecure_port(target))
        certificate, key = self.serving.tls
        pair = (read_file(key, "the key", "tls-key"), read_file(certificate, "the certificate", "tls-cert"))
        return int(self._server.add_secure_port(target, grpc.ssl_server_credentials([pair])))

    async def start(self, make_engine: Callable[[], Engine]) -> None:
        """Listen, and load the model.

        Raises:
            InputError: There is no such model.
        """
        await self._server.start()
        await self.host.load(make_engine)

    async def stop(self) -> bool:
        """Refuse what is new, give running calls time to end, and end.

        Returns:
            Whether the thread that computes has ended, too.
        """
        await self.host.drain()
        await self._server.stop(self.serving.patience.stop)
        if self.host.running is not None:
            self.host.running.stop(Stopped())
        return await asyncio.to_thread(self.host.compute.close, 2.0)


async def serve(serving: Serving, make_engine: Callable[[], Engine], on_ready: Ready) -> bool:
    """Serve until SIGTERM or SIGINT; a second one ends the process at once.

    Args:
        make_engine: Builds the model, in the thread that will use it.
        on_ready: Called with the address once there is a model.

    Returns:
        As Worker.stop.

    Raises:
        InputError: The address cannot be listened on, or there is no such model.
        DeviceLost: The device has failed.
    """
    worker = Worker(serving)
    asked = asyncio.Event()
    _hear(asked)
    starting = asyncio.ensure_future(worker.start(make_engine))
    ends = {asyncio.ensure_future(asked.wait()), asyncio.ensure_future(worker.host.lost.wait())}
    await asyncio.wait({starting, *ends}, return_when=asyncio.FIRST_COMPLETED)
    try:
        if starting.done():
            starting.result()
            on_ready(worker.address.target)
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        starting.cancel()
    finally:
        ended = await worker.stop()
    if worker.host.lost.is_set():
        raise DeviceLost("the device does not compute any more; start the worker again")
    return ended


def _hear(asked: asyncio.Event) -> None:
    if not in_main_thread():
        return
    loop = asyncio.get_running_loop()

    def stop(signum: signal.Signals) -> None:
        if asked.is_set():
            os._exit(128 + signum)
        log.warning("%s: ending; once more ends at once", signum.name)
        asked.set()

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop, signum)


def _refuse_taken(address: Address) -> None:
    """gRPC deletes the file of a Unix socket that someone listens on, and takes its place."""
    if not address.path:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(address.path) == 0:
            raise InputError(f"cannot listen on {address.target}: address in use", key="listen")


def _reason(address: Address) -> str:
    """gRPC does not say why it could not bind; empty where the address is not to blame."""
    if address.path:
        return "is its directory there, and may you write to it?"
    try:
        for family, kind, _, _, where in socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as probe:
                probe.bind(where)
    except OSError as error:
        return "address in use" if error.errno == errno.EADDRINUSE else str(error.strerror)
    return ""
