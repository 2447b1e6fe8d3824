"""What the training process and its dispatcher say to each other: JSON, an object a line, over a pair of sockets.

Neither side waits for the other to read. No object of Python's crosses, only text and numbers.
"""

from __future__ import annotations

import base64
import json
import select
import socket
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_trainer.rpc.layout import Entry

READ_BYTES = 1 << 16


@dataclass(frozen=True)
class Deadlines:
    """Seconds until a call is given up, or made.

    Args:
        preflight: The first Describe, for which the start of training waits.
        describe: Every other Describe.
        begin: Begin, for which the worker may have to load its model anew.
        stall: An upload from which no chunk has gone.
        resume: Since the last chunk of an upload that broke off, before it is no longer taken up again.
        commit: Commit: verify, wait for a running generation, apply.
        event: Between two events of a generation.
        generate: A whole generation of up to 1,024 tokens, at most; of more, in proportion.
        idle: Without a job, until the worker's lease is renewed, which lasts a minute.
        renew: Renew.
        release: Release, when the run ends.
    """

    preflight: float = 2.4
    describe: float = 3.0
    begin: float = 30.0
    stall: float = 10.0
    resume: float = 30.0
    commit: float = 30.0
    event: float = 15.0
    generate: float = 120.0
    idle: float = 15.0
    renew: float = 3.0
    release: float = 0.3


@dataclass(frozen=True)
class Setup:
    """What a dispatcher is told first.

    Attributes:
        kind: An UpdateKind.
        identity: A ModelIdentity.
        adapter: An AdapterSpec; empty where the whole model is sent.
        layout: Of a slot: tensors laid end to end.
        slots: File descriptors of memory shared with the trainer.
    """

    address: str
    ca: str | None
    token: str | None = field(repr=False)
    run_id: str
    kind: int
    identity: bytes
    adapter: bytes
    layout: tuple[Entry, ...]
    slots: tuple[int, ...]
    deadlines: Deadlines = Deadlines()

    def to_json(self) -> dict[str, Any]:
        """As a message."""
        layout = [[entry.name, int(entry.dtype), list(entry.shape)] for entry in self.layout]
        coded = {"identity": to_text(self.identity), "adapter": to_text(self.adapter), "layout": layout}
        return {**asdict(self), **coded, "type": "setup"}

    @classmethod
    def from_json(cls, message: Mapping[str, Any]) -> Setup:
        """From the message."""
        fields = {name: message[name] for name in cls.__dataclass_fields__}
        fields["identity"], fields["adapter"] = to_bytes(message["identity"]), to_bytes(message["adapter"])
        fields["layout"] = tuple(Entry(name, dtype, tuple(shape)) for name, dtype, shape in message["layout"])
        fields["slots"] = tuple(message["slots"])
        fields["deadlines"] = Deadlines(**message["deadlines"])
        return cls(**fields)


def to_text(data: bytes) -> str:
    """Bytes within JSON."""
    return base64.b64encode(data).decode("ascii")


def to_bytes(text: str) -> bytes:
    """The bytes again."""
    return base64.b64decode(text, validate=True)


class Lines:
    """One end. Sending never waits: what the socket does not take stays here until `flush` or the next call.

    Args:
        sock: Its own from here on.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._in, self._out = bytearray(), bytearray()
        self._lock = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        """Hand a message over, now or later."""
        with self._lock:
            self._out += json.dumps(message).encode("ascii") + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it."""
        with self._lock:
            try:
                while self._out:
                    del self._out[: self._sock.send(self._out)]
            except BlockingIOError:
                pass
            except OSError:  # the other end is gone, which `receive` tells
                self._out.clear()

    def receive(self, timeout: float = 0.0) -> list[dict[str, Any]]:
        """Messages that have come; waits up to `timeout` seconds for the first.

        Raises:
            EOFError: The other end is gone.
        """
        if self._out:
            self.flush()
        if not self._poll.poll(1000 * timeout):
            return []
        try:
            data = self._sock.recv(READ_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        self._in += data
        *whole, rest = self._in.split(b"\n")
        self._in = bytearray(rest)
        return [json.loads(line) for line in whole]

    def close(self) -> None:
        """Close this end."""
        self._sock.close()
