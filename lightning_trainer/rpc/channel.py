"""gRPC options of both sides. They belong together: pings faster than the server allows end the connection."""

from __future__ import annotations

from pathlib import Path

import grpc

from lightning_trainer.rpc.limits import MESSAGE_BYTES
from lightning_trainer.rpc.security import Address, read_file

CLIENT: tuple[tuple[str, int], ...] = (
    ("grpc.enable_http_proxy", 0),  # with http_proxy set, even 127.0.0.1 would go through the proxy, tokens and all
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # without it a frozen peer is noticed after a minute
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.enable_retries", 0),  # ours: we know what may be repeated
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
)

SERVER: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),  # by default a second worker takes the same port, silently
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.max_concurrent_streams", 32),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
)


def open_channel(address: Address, ca: Path | None) -> grpc.Channel:
    """A channel to a worker; connecting comes with the first call.

    Args:
        address: Of the worker.
        ca: Certificate of the CA that signed the worker's; the system's own CAs are not asked. None is plaintext.
    """
    if ca is None:
        return grpc.insecure_channel(address.target, CLIENT)
    return grpc.secure_channel(address.target, grpc.ssl_channel_credentials(read_file(ca, "the CA")), CLIENT)


def bearer(token: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata that shows the token."""
    return () if token is None else (("authorization", f"Bearer {token}"),)
