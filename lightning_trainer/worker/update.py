"""An update that was begun, and what its fields must be."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.errors import Reason, Refusal


@dataclass
class Update:
    """An update that was begun.

    Attributes:
        digests: That its tensors must have, in the order of the layout.
        needed: Numbers of the tensors whose bytes are sent.
        stream: The upload that may go on with it; None lets the next one.
    """

    update_id: str
    target: pb.WeightsRef
    digests: tuple[bytes, ...]
    needed: tuple[int, ...]
    stream: object | None = field(default=None)


def copied(ref: pb.WeightsRef) -> pb.WeightsRef:
    """A name that does not change with the message it came in."""
    copy = pb.WeightsRef()
    copy.CopyFrom(ref)
    return copy


def require(holds: bool, name: str) -> None:
    """Raises:
    Refusal: A field does not hold what it must.
    """
    if not holds:
        raise Refusal(Reason.REASON_INVALID_ARGUMENT, f"{name} is empty, too long or not as it was begun", [name])
