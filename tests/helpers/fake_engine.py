"""An engine without a model: its tokens are the bytes of the digest of the weights it holds as it makes them.

Token k of an answer is byte k (mod 32) of content_digest(...) of what lies in its tensors at that moment. So the
answer to a prompt says which weights made it, and an answer made of two sets of weights says so, too.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_trainer.generation import Generation, OnStep
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.errors import Refusal
from lightning_trainer.rpc.layout import Entry, content_digest, layout_digest
from lightning_trainer.types import PreviewRequest, SamplingParams

SMALL = (
    Entry("a", pb.DTYPE_F32, (4,)),
    Entry("b", pb.DTYPE_BF16, (3, 5)),
    Entry("c", pb.DTYPE_F32, (1000,)),
    Entry("empty", pb.DTYPE_F32, (0,)),
)

ADAPTER = (Entry("x.lora_A", pb.DTYPE_F32, (2, 4)), Entry("x.lora_B", pb.DTYPE_F32, (4, 2)))


def identity_for(layout: Sequence[Entry], vocab_size: int = 384) -> pb.ModelIdentity:
    return pb.ModelIdentity(
        architecture="Fake",
        dtype=pb.DTYPE_F32,
        vocab_size=vocab_size,
        config_sha256=hashlib.sha256(b"config").digest(),
        layout_sha256=layout_digest(layout),
        total_bytes=sum(entry.nbytes for entry in layout),
    )


def expected_tokens(content_sha256: bytes, count: int) -> list[int]:
    """What an answer of `count` tokens must be."""
    return [content_sha256[k % 32] for k in range(count)]


class FakeEngine:
    """See above.

    Args:
        layout: Of the model.
        adapter_layout: Of any adapters.
        identity: Of the model; by default one made up for `layout`. Use rpc.layout.identity_of(model) and
            layout_of(model_tensors(model)) to stand for a real model.
        has_weights: Whether it starts with some.
        token_seconds: Time one token takes.
        frozen_base: Digest of its own weights, on which adapters lie.

    Attributes:
        fail_apply_after: Write this many tensors of an update, then raise; once.
        on_token: Called with the number of each token before it is made, in the computing thread.
        raise_next: Raised by the next generation; once.
        room: check_room refuses batches of more tokens.
        steps: Tokens made, over all generations.
        alive: Whether the device computes.
    """

    name = "fake"

    def __init__(
        self,
        layout: Sequence[Entry] = SMALL,
        *,
        adapter_layout: Sequence[Entry] = ADAPTER,
        identity: pb.ModelIdentity | None = None,
        has_weights: bool = True,
        token_seconds: float = 0.0,
        frozen_base: bytes = b"\1" * 32,
    ) -> None:
        self._layouts = {pb.UPDATE_KIND_MODEL: tuple(layout), pb.UPDATE_KIND_ADAPTER: tuple(adapter_layout)}
        self._identity = identity or identity_for(layout)
        self._started_with = has_weights
        self.token_seconds, self._frozen_base = token_seconds, frozen_base
        self.fail_apply_after: int | None = None
        self.on_token: Callable[[int], Any] = lambda number: None
        self.raise_next: BaseException | None = None
        self.room: int | None = None
        self.steps, self.alive = 0, True
        self.applied: list[list[str]] = []
        self.prepared: list[Any] = []
        self._threads: set[int] = set()
        self._reset(pb.UPDATE_KIND_MODEL, pb.AdapterSpec())

    def _reset(self, kind: Any, spec: pb.AdapterSpec) -> None:
        self._kind, self._spec = kind, spec
        self.tensors = {entry.name: bytes(entry.nbytes) for entry in self._layouts[kind]}
        self.has_weights = self._started_with

    @property
    def identity(self) -> pb.ModelIdentity:
        found = pb.ModelIdentity()
        found.CopyFrom(self._identity)
        if self._started_with:
            found.frozen_base_sha256 = self._frozen_base
        return found

    @property
    def layout(self) -> Sequence[Entry]:
        return self._layouts[self._kind]

    def is_prepared(self, kind: Any, spec: pb.AdapterSpec) -> bool:
        return bool(kind == self._kind and (kind == pb.UPDATE_KIND_MODEL or spec == self._spec))

    def prepare(self, kind: Any, spec: pb.AdapterSpec) -> None:
        self.prepared.append(kind)
        kept = pb.AdapterSpec()
        kept.CopyFrom(spec)
        self._reset(kind, kept)

    def digests(self) -> list[bytes]:
        return [hashlib.sha256(values).digest() for values in self.tensors.values()]

    def content(self) -> bytes:
        return content_digest(self.digests())

    def apply(self, tensors: Mapping[str, memoryview]) -> None:
        self._threads.add(threading.get_ident())
        self.applied.append(list(tensors))
        for number, (name, values) in enumerate(tensors.items()):
            if number == self.fail_apply_after:
                self.fail_apply_after = None
                raise RuntimeError("the device fell off the bus")
            assert len(values) == len(self.tensors[name])
            self.tensors[name] = bytes(values)
        self.has_weights = True

    def generate(
        self, requests: Sequence[PreviewRequest], sampling: SamplingParams, on_step: OnStep
    ) -> list[Generation]:
        self._threads.add(threading.get_ident())
        if self.raise_next is not None:
            fault, self.raise_next = self.raise_next, None
            raise fault
        started, made = time.perf_counter(), []
        for number in range(sampling.max_new_tokens):
            if self.token_seconds:
                time.sleep(self.token_seconds)
            self.on_token(number)
            token = self.content()[number % 32]
            made.append(token)
            self.steps += 1
            on_step(0, [token] * len(requests))
            if token in sampling.stop_token_ids:
                break
        reason = "eos" if made[-1] in sampling.stop_token_ids else "length"
        seconds = time.perf_counter() - started
        return [Generation(tuple(made), reason, seconds) for _ in requests]  # type: ignore[arg-type]

    def check_room(self, rows: int, tokens: int) -> None:
        if self.room is not None and rows * tokens > self.room:
            raise Refusal(pb.ErrorDetail.REASON_TOKEN_BUDGET, "no room", ["device_bytes_free"])

    def memory(self) -> tuple[int, int]:
        return 0, 0

    def is_alive(self) -> bool:
        return self.alive
