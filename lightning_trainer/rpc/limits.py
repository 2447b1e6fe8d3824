"""How large anything on the wire may be. The worker says so in Describe, and enforces it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.types import PROMPTS_PER_BATCH

WIRE_MINOR = 1
"""Revision of wire version 1; each only adds."""

RENEWS = 1
"""The revision since which a lease can be renewed and released."""

MESSAGE_BYTES = 4 << 20
"""gRPC's own default, which refuses larger messages, inflated ones too."""

CHUNK_BYTES = 1 << 20
"""Of weights in one message: one to two MiB are the fastest."""

TOKENS_PER_RULE = 4096
RULES_PER_PROMPT = 16
TRIGGERS = 64
TRIGGER_TOKENS = 16
ADAPTER_RANK = 1024
NAME_BYTES = 512
MANIFEST_NDIM = 8


@dataclass(frozen=True)
class Limits:
    """What one worker takes.

    Args:
        max_prompts_per_request: Prompts of a Generate, which are one batch.
        max_prompt_tokens: Tokens of a prompt.
        max_new_tokens: Tokens of an answer.
        max_total_tokens: prompts x (longest prompt + new tokens): the KV cache; 0: as many as the others allow.
        max_queue_depth: Requests that wait.
        max_chunk_bytes: Of weights in one message.
        max_manifest_tensors: Tensors of an update.
        max_update_bytes: Of an update; 0: as the model's layout has.
        max_message_bytes: Of any message.
    """

    max_prompts_per_request: int = PROMPTS_PER_BATCH
    max_prompt_tokens: int = 4096
    max_new_tokens: int = 1024
    max_total_tokens: int = 0
    max_queue_depth: int = 8
    max_chunk_bytes: int = CHUNK_BYTES
    max_manifest_tensors: int = 4096
    max_update_bytes: int = 0
    max_message_bytes: int = MESSAGE_BYTES

    @property
    def total_tokens(self) -> int:
        """Of a Generate's cache."""
        return self.max_total_tokens or self.max_prompts_per_request * (self.max_prompt_tokens + self.max_new_tokens)

    def to_wire(self) -> pb.Limits:
        """As the message."""
        return pb.Limits(**{**asdict(self), "max_total_tokens": self.total_tokens})
