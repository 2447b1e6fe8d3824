"""Who may connect: loopback by default; beyond it TLS and a token, or an explicit word that neither is wanted."""

from __future__ import annotations

import hmac
import ipaddress
import stat
from dataclasses import dataclass
from pathlib import Path

from lightning_trainer.types import InputError

TOKEN_BYTES = 32
"""Least length of a token."""


@dataclass(frozen=True)
class Address:
    """Where a worker listens.

    Attributes:
        host: An IP address, a name, or empty for a Unix socket.
        port: 0 lets the system choose.
        path: Of a Unix socket, or empty.
    """

    host: str
    port: int
    path: str = ""

    @property
    def target(self) -> str:
        """As gRPC takes it."""
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can be at the other end; a name other than localhost may be anything."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_address(text: str, key: str | None = None) -> Address:
    """Read HOST:PORT, [IPv6]:PORT or unix:PATH.

    Raises:
        InputError: It is none of them.
    """
    if text.startswith("unix:") and len(text) > len("unix:"):
        return Address("", 0, text.removeprefix("unix:"))
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not colon or not host or (":" in host) != bracketed or not port.isascii() or not port.isdigit():
        raise InputError(f"expected HOST:PORT, [IPv6]:PORT or unix:PATH, not {text!r}", key=key)
    if int(port) > 65535:
        raise InputError(f"there is no port {port}; the last is 65535", key=key)
    return Address(host, int(port))


def check_exposure(address: Address, tls: bool, token: bool, insecure_lan: bool, key: str | None = None) -> None:
    """Refuse what would let others in, or show them prompts, answers, weights and the token.

    Args:
        address: Listened on or connected to.
        tls: Whether there is TLS.
        token: Whether there is a token.
        insecure_lan: The user wants neither.

    Raises:
        InputError: See above.
    """
    if address.is_loopback:
        return
    if insecure_lan and not tls:
        if token:
            raise InputError("a token would cross the network in the clear: leave it out, or set up TLS", key=key)
        return
    missing = [name for name, there in (("TLS", tls), ("a token", token)) if not there]
    if missing:
        raise InputError(
            f"{address.target} can be reached from other machines and has not {' and '.join(missing)}: make both with "
            "tools/make_certs, stay on 127.0.0.1 behind `ssh -L`, or say so: --insecure-lan of `serve`, `insecure_lan: "
            "true` of the backend",
            key=key,
        )


def read_token(path: Path, key: str | None = None) -> str:
    """The token in a file that only its owner may read.

    Raises:
        InputError: It is not there, others may read it, or it is too short or no ASCII.
    """
    data = read_file(path, "the token file", key)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise InputError(f"others may read {str(path)!r} (mode {mode:04o}): chmod 600", key=key)
    try:
        token = data.decode("ascii").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} holds no ASCII text", key=key) from error
    if len(token) < TOKEN_BYTES or not token.isprintable() or " " in token:
        raise InputError(
            f"{str(path)!r} must hold one word of at least {TOKEN_BYTES} characters: openssl rand -hex 32", key=key
        )
    return token


def read_file(path: Path, what: str, key: str | None = None) -> bytes:
    """A small file.

    Raises:
        InputError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{what} {str(path)!r} cannot be read: {error.strerror}", key=key) from error


def same_token(given: str, wanted: str) -> bool:
    """Compare in a time that does not tell how much of it is right."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode("utf-8"))
