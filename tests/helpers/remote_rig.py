"""A trainer's side of remote previews around a model whose weights a test sets, and what the answers must be."""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fake_engine import FakeEngine, expected_tokens

from lightning_trainer.preview import Prompter
from lightning_trainer.preview.dialogue import Deadlines
from lightning_trainer.preview.remote import GrpcPreviewBackend
from lightning_trainer.rpc.layout import content_digest, identity_of, layout_of, model_tensors, raw_bytes
from lightning_trainer.types import PreviewRequest, PreviewResult, SamplingParams

TOKENS = 8

QUICK = Deadlines(preflight=1.0, describe=1.0, begin=2.0, stall=1.0, resume=6.0, commit=2.0, event=1.0, idle=0.2)
"""Short, so that tests are."""


def fake_for(model: Any, **more: Any) -> FakeEngine:
    """An engine that takes this model's weights."""
    return FakeEngine(layout_of(model_tensors(model)), identity=identity_of(model), **more)


def content(model: Any) -> bytes:
    """Names the weights as they are now, computed apart from what is tested."""
    return content_digest(hashlib.sha256(raw_bytes(tensor)).digest() for tensor in model_tensors(model).values())


@torch.no_grad()
def set_weights(model: Any, step: int) -> bytes:
    """As an optimizer would; returns their digest."""
    for parameter in model.parameters():
        parameter.fill_(step / 100)
    return content(model)


def ask(backend: GrpcPreviewBackend, step: int, prompts: int = 1, tokens: int = TOKENS, **more: Any) -> None:
    requests = [PreviewRequest((1, 2, 3 + n), prompt_id=f"{step}-{n}", prompt="p", step=step) for n in range(prompts)]
    backend.submit(requests, SamplingParams(max_new_tokens=tokens, seed=5), step, **more)


def collect(backend: GrpcPreviewBackend, count: int = 1, seconds: float = 10.0) -> list[PreviewResult]:
    """As training does: a look now and then."""
    found: list[PreviewResult] = []
    end = time.monotonic() + seconds
    while len(found) < count and time.monotonic() < end:
        found += backend.collect()
        backend.settle()
        time.sleep(0.005)
    return found


def right(result: PreviewResult, step: int, weights: bytes, prompter: Prompter, tokens: int = TOKENS) -> bool:
    """Whether the answer is by these weights and says so."""
    assert result.success, result.error_message
    assert (result.step, result.weights_step, result.backend_type) == (step, step, "remote")
    return result.text == prompter.decode(expected_tokens(weights, tokens))


def adds_up(backend: GrpcPreviewBackend) -> bool:
    """I10."""
    c = backend.counters
    return c["triggered"] == c["ok"] + c["failed"] + c["dropped"] + c["skipped"] + c["pending"] and c["pending"] >= 0


@contextmanager
def bound(address: str, prompter: Prompter, model: Any, **settings: Any) -> Iterator[GrpcPreviewBackend]:
    """A backend that is bound, and closed in time whatever happened."""
    deadlines, adapter = settings.pop("deadlines", QUICK), settings.pop("adapter", None)
    backend = GrpcPreviewBackend(address, **settings)
    backend._deadlines, backend.run_id = deadlines, "run"
    backend.bind(prompter, model, adapter)
    try:
        yield backend
    finally:
        started = time.monotonic()
        backend.close()
        assert time.monotonic() - started < 3.0
        assert adds_up(backend)
        assert backend.counters["pending"] == 0
