"""A TCP proxy that does to a connection what networks do, switched while it runs; and certificates, good and bad."""

import asyncio
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Literal

Mode = Literal["pass", "refuse", "blackhole", "reset", "corrupt", "throttle"]

RST_ON_CLOSE = struct.pack("ii", 1, 0)


class ChaosProxy:
    """Between a client and a worker.

    pass: forwards. refuse: nobody listens, and connections end. blackhole: connections stay, nothing goes through.
    reset: connections end with RST, new ones too. corrupt: one byte to the worker is changed, once, then pass.
    throttle: `rate` bytes a second to the worker.

    Args:
        target: HOST:PORT of the worker; may be changed for connections to come.

    Attributes:
        address: HOST:PORT for the client.
        to_worker: Bytes that went through to the worker.
        accepted: Connections.
    """

    def __init__(self, target: str) -> None:
        self.target, self.rate, self.to_worker, self.accepted = target, 1e6, 0, 0
        self.mode: Mode = "pass"
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._port = 0
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos", daemon=True)
        self._thread.start()
        self._do(self._listen())
        self.address = f"127.0.0.1:{self._port}"

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
            self._port = self._server.sockets[0].getsockname()[1]

    def set(self, mode: Mode) -> None:
        """Switch, from any thread."""
        self._do(self._set(mode))

    async def _set(self, mode: Mode) -> None:
        self.mode = mode
        if mode == "refuse":
            if self._server is not None:
                self._server.close()
                self._server = None
        else:
            await self._listen()
        if mode in ("refuse", "reset"):
            self._cut(hard=mode == "reset")

    def _cut(self, hard: bool) -> None:
        for writer in list(self._writers):
            if hard:
                sock: Any = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            if self.mode == "reset":
                self._cut(hard=True)
                return
            await self._open()
            host, _, port = self.target.rpartition(":")
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            self._writers.add(far_writer)
            try:
                await asyncio.gather(self._pump(reader, far_writer, True), self._pump(far_reader, writer, False))
            finally:
                self._writers.discard(far_writer)
                far_writer.transport.abort()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.transport.abort()

    async def _open(self) -> None:
        while self.mode == "blackhole":
            await asyncio.sleep(0.01)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, to_worker: bool) -> None:
        while data := await reader.read(1 << 14):
            await self._open()
            if to_worker:
                if self.mode == "corrupt" and len(data) > 4000:
                    self.mode, middle = "pass", len(data) // 2
                    data = data[:middle] + bytes([data[middle] ^ 0x55]) + data[middle + 1 :]
                if self.mode == "throttle":
                    await asyncio.sleep(len(data) / self.rate)
                self.to_worker += len(data)
            writer.write(data)
            await writer.drain()
        writer.transport.abort()

    def close(self) -> None:
        """End it."""
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _end(self) -> None:
        await self._set("refuse")
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def __enter__(self) -> "ChaosProxy":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _openssl(*words: str, cwd: Path) -> None:
    subprocess.run(["openssl", *words], cwd=cwd, check=True, capture_output=True, timeout=30)


def make_ca(folder: Path, name: str = "ca") -> Path:
    """A CA of its own; returns its certificate."""
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    out = ("-keyout", f"{name}.key", "-out", f"{name}.pem", "-days", "2", "-subj", f"/CN={name}")
    _openssl("req", "-x509", *key, *out, cwd=folder)
    return folder / f"{name}.pem"


def make_certificate(
    folder: Path, ca: str = "ca", name: str = "worker", alt: str = "IP:127.0.0.1"
) -> tuple[Path, Path]:
    """A certificate for `alt` signed by the CA, valid for a day; returns it and its key."""
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    _openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", "/CN=w", cwd=folder)
    (folder / f"{name}.ext").write_text(f"subjectAltName={alt}\n")
    signed = ("-req", "-in", f"{name}.csr", "-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial")
    out = ("-out", f"{name}.pem", "-extfile", f"{name}.ext", "-days", "1")
    _openssl("x509", *signed, *out, cwd=folder)
    return folder / f"{name}.pem", folder / f"{name}.key"


def make_expired(folder: Path, ca: str = "ca", name: str = "expired") -> tuple[Path, Path]:
    """The same, but its time ended years ago."""
    make_certificate(folder, ca, name)
    for file, text in (("index.txt", ""), ("serial", "01\n")):
        (folder / file).write_text(text)
    (folder / "ca.conf").write_text(
        "[ca]\ndefault_ca=d\n[d]\ndatabase=index.txt\nserial=serial\nnew_certs_dir=.\ndefault_md=sha256\npolicy=p\n"
        "[p]\ncommonName=supplied\n"
    )
    who = ("-config", "ca.conf", "-cert", f"{ca}.pem", "-keyfile", f"{ca}.key", "-in", f"{name}.csr")
    when = ("-startdate", "20200101000000Z", "-enddate", "20200102000000Z", "-extfile", f"{name}.ext")
    _openssl("ca", "-batch", "-notext", *who, *when, "-out", f"{name}.pem", cwd=folder)
    return folder / f"{name}.pem", folder / f"{name}.key"


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether it holds before the time is over."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


_WORKER = """
import base64, sys, threading
sys.path.insert(0, sys.argv[1])
from fake_engine import FakeEngine
from lightning_trainer.preview.dialogue import Setup
from lightning_trainer.rpc import preview_pb2 as pb
from worker_thread import running_worker
import json
setup = Setup.from_json(json.loads(sys.argv[2]))
engine = FakeEngine(setup.layout, identity=pb.ModelIdentity.FromString(setup.identity), token_seconds=0.05)
with running_worker(engine) as worker:
    print(worker.address, flush=True)
    threading.Event().wait()
"""


class WorkerProcess:
    """A worker with a fake engine in a process of its own, to be frozen and killed.

    Args:
        setup: Of a dispatcher, as JSON: the worker takes its layout and identity.
    """

    def __init__(self, setup: str) -> None:
        words = [sys.executable, "-c", _WORKER, str(Path(__file__).parent), setup]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        assert self.address, "the worker did not start"

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()
