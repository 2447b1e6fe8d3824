"""Errors on the wire: a closed set of reasons, each with its status code, and what a client makes of them.

Codes are gRPC's names for them: the process that trains reads this and never imports grpc.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_trainer.rpc import preview_pb2 as pb

if TYPE_CHECKING:
    import grpc

DETAIL = "lt-error-bin"
"""Key of the trailing metadata that holds an ErrorDetail."""

Reason = pb.ErrorDetail

_CODES = {
    "FAILED_PRECONDITION": (
        Reason.REASON_WEIGHTS_NOT_RESIDENT,
        Reason.REASON_IDENTITY_MISMATCH,
        Reason.REASON_LEASE_HELD,
        Reason.REASON_POISONED,
    ),
    "ABORTED": (Reason.REASON_FENCED, Reason.REASON_STALE_PUBLISH),
    "RESOURCE_EXHAUSTED": (
        Reason.REASON_QUEUE_FULL,
        Reason.REASON_PROMPT_TOO_LONG,
        Reason.REASON_TOKEN_BUDGET,
        Reason.REASON_OUT_OF_MEMORY,
    ),
    "INVALID_ARGUMENT": (
        Reason.REASON_UNKNOWN_RULE,
        Reason.REASON_WIRE_VERSION,
        Reason.REASON_MANIFEST_INVALID,
        Reason.REASON_TOKEN_OUT_OF_VOCAB,
        Reason.REASON_INVALID_ARGUMENT,
    ),
    "DATA_LOSS": (Reason.REASON_DIGEST_MISMATCH,),
    "UNAVAILABLE": (Reason.REASON_UNAVAILABLE,),
}

PERMANENT = (
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "UNIMPLEMENTED",
    "INVALID_ARGUMENT",
)
"""Asking again would be answered the same."""

_PASSING = (
    Reason.REASON_WEIGHTS_NOT_RESIDENT,
    Reason.REASON_LEASE_HELD,
    Reason.REASON_POISONED,
)
"""Reasons of FAILED_PRECONDITION that may pass: the weights are pushed again, another trainer ends."""

_HINTS = {
    "connection refused": "nobody listens there: is `lightning-trainer serve` running?",
    "hostname verification": "the worker's certificate is not for this host name: make one with tools/make_certs HOST",
    "certificate_verify_failed": "the worker's certificate is not of the CA in `ca`, or not valid at this time",
    "certificate has expired": "the worker's certificate has expired",
    "handshake": "no TLS connection: one side has TLS and the other has not, or `ca` is of another CA",
    "ssl": "no TLS connection: one side has TLS and the other has not, or `ca` is of another CA",
    "socket closed": "the connection was closed: the worker ended, or it has TLS and `ca` is not set",
}


class Refusal(Exception):
    """What a worker answers instead.

    Args:
        reason: One of ErrorDetail.Reason.
        message: For people; no prompt, no path.
        fields: Names of what differs or is over its limit.
        retry_after_millis: When asking again may help; 0 says nothing.
    """

    def __init__(self, reason: Any, message: str, fields: Sequence[str] = (), retry_after_millis: int = 0) -> None:
        super().__init__(message)
        self.reason, self.fields, self.retry_after_millis = reason, tuple(fields), retry_after_millis

    @property
    def code(self) -> str:
        """Name of the status the call ends with."""
        return next(code for code, reasons in _CODES.items() if self.reason in reasons)

    def metadata(self) -> tuple[tuple[str, bytes], ...]:
        """Trailing metadata of the call."""
        detail = pb.ErrorDetail(reason=self.reason, fields=self.fields[:32], retry_after_millis=self.retry_after_millis)
        return ((DETAIL, detail.SerializeToString()),)


@dataclass(frozen=True)
class Failure:
    """Why a call failed, as a client sees it.

    Attributes:
        code: Name of the status code.
        reason: Name of the reason, or empty.
        text: One line for people.
        permanent: Asking again would be answered the same.
    """

    code: str
    reason: str
    text: str
    permanent: bool


def failure_of(error: grpc.RpcError) -> Failure:
    """What a call's error says.

    TLS faults arrive as UNAVAILABLE and are told by their text alone; they are no reason to give up for good, since the
    worker may be put right, but the likely cause is named.
    """
    call: Any = error
    code, text = str(call.code().name), " ".join(str(call.details() or "").split())
    reason = _reason(call)
    permanent = reason not in _PASSING if code == "FAILED_PRECONDITION" else code in PERMANENT
    if code == "UNAVAILABLE":
        hint = next((hint for mark, hint in _HINTS.items() if mark in text.lower()), "")
        text = f"{hint} ({text})" if hint else text
    name = pb.ErrorDetail.Reason.Name(reason) if reason else ""
    return Failure(code, name.removeprefix("REASON_"), text, permanent)


def _reason(call: Any) -> Any:
    for key, value in call.trailing_metadata() or ():
        if key == DETAIL:
            detail = pb.ErrorDetail()
            try:
                detail.ParseFromString(value)
            except Exception:  # protobuf's DecodeError is private to its runtimes
                return 0
            return detail.reason if detail.reason in pb.ErrorDetail.Reason.values() else 0
    return 0
