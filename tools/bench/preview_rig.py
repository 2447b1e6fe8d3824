"""What the preview tables share: workers in processes of their own, and a trainer's side whose answers are numbers.

A worker shares neither the interpreter lock nor the memory of what measures it. The fake engine and the client of the
bare proto are those of the tests.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from fake_engine import FakeEngine
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from transformers.utils.logging import disable_progress_bar
from worker_thread import running_worker

from lightning_trainer import GrpcPreviewBackend
from lightning_trainer.generation import Generation, OnStep
from lightning_trainer.preview import Prompter
from lightning_trainer.preview.publication import publication_of
from lightning_trainer.profiles import Plain
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.layout import Entry
from lightning_trainer.rpc.limits import Limits
from lightning_trainer.types import PreviewRequest, PreviewResult, SamplingParams

SPAWN = multiprocessing.get_context("spawn")
"""Children begin anew: gRPC does not survive a fork."""

START_SECONDS = 120.0
"""For a worker to load what it serves, beside everything else on this machine."""

PROMPT = PreviewRequest((1, 2, 3), prompt_id="p")


class Numbers(Prompter):
    """Reads answers as their token ids, so that no tokenizer stands between tokens and what is compared."""

    def __init__(self) -> None:
        tokenizer: Any = PreTrainedTokenizerFast
        self.profile, self.tokenizer, self.stop_token_ids = Plain(), tokenizer, ()

    def decode(self, token_ids: Sequence[int]) -> str:
        """The ids, in decimal."""
        return " ".join(map(str, token_ids))


def save_model(folder: Path, **changes: Any) -> Any:
    """A Qwen3 of random fp32 weights, the same every time; a few thousand of them unless `changes` says otherwise."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen3Config(
        **{"vocab_size": 384, **shape, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True, **changes}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    disable_progress_bar()
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def nudge(model: Any) -> None:
    """Change every weight, as an optimizer step would."""
    for parameter in model.parameters():
        parameter.add_(1e-3)


@contextmanager
def served(folder: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(address, process) of `lightning-trainer serve` on this machine's CPU, unless the flags say otherwise."""
    words = [sys.executable, "-m", "lightning_trainer", "serve", "--pretrained", str(folder), "--threads", "1"]
    words += ["--listen", "127.0.0.1:0", "--device", "cpu", *flags]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker did not start: {' '.join(words)}")
        yield line.split()[2], process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def bound(address: str, model: Any, adapter: Any = None, **settings: Any) -> Iterator[GrpcPreviewBackend]:
    """A trainer's side that the worker has answered."""
    backend = GrpcPreviewBackend(address, preflight="require", **settings)
    backend.bind(Numbers(), model, adapter)
    try:
        yield backend
    finally:
        backend.close()


def one_preview(backend: GrpcPreviewBackend, step: int, tokens: int = 1) -> PreviewResult:
    """Weights there, answer back; greedy.

    Raises:
        RuntimeError: There is no answer.
    """
    backend.submit([PROMPT], SamplingParams(max_new_tokens=tokens, temperature=0.0), step)
    backend.settle()
    results: list[PreviewResult] = backend.collect(timeout=START_SECONDS)
    if len(results) != 1 or not results[0].success:
        raise RuntimeError(f"no preview: {[result.error_message for result in results]}")
    return results[0]


@dataclass(frozen=True)
class Stand:
    """What a fake worker stands for, in plain values, so that it reaches another process.

    Attributes:
        kind: An UpdateKind.
        identity: A ModelIdentity.
        layout: Of its updates.
        token_seconds: Time one token takes.
        tells_time: Whether its tokens are `micros()` as they are made, and not the digest of the weights.
    """

    kind: int
    identity: bytes
    layout: tuple[Entry, ...]
    token_seconds: float = 0.0
    tells_time: bool = False
    limits: Limits = field(default_factory=Limits)


def stand_for(model: Any, adapter: Any = None, **more: Any) -> Stand:
    """A fake worker that takes the weights of this model, or of these adapters on it."""
    sent = publication_of(model, adapter)
    return Stand(int(sent.kind), sent.identity.SerializeToString(), sent.layout, **more)


def micros() -> int:
    """The machine's monotonic clock, the same in every process, as a token id."""
    return time.monotonic_ns() // 1000 % (1 << 31)


class ClockEngine(FakeEngine):
    """Token by token it says when it made it."""

    def generate(
        self, requests: Sequence[PreviewRequest], sampling: SamplingParams, on_step: OnStep
    ) -> list[Generation]:
        """See Engine."""
        started, made = time.perf_counter(), []
        for _ in range(sampling.max_new_tokens):
            time.sleep(self.token_seconds)
            made.append(micros())
            on_step(0, [made[-1]] * len(requests))
        seconds = time.perf_counter() - started
        return [Generation(tuple(made), "length", seconds) for _ in requests]


def _engine_of(stand: Stand) -> FakeEngine:
    identity = pb.ModelIdentity.FromString(stand.identity)
    kind = ClockEngine if stand.tells_time else FakeEngine
    fields: dict[str, Any] = {"identity": identity, "token_seconds": stand.token_seconds}
    if stand.kind == pb.UPDATE_KIND_ADAPTER:
        return kind(adapter_layout=stand.layout, frozen_base=identity.frozen_base_sha256, **fields)
    return kind(stand.layout, **fields)


def _serve(stand: Stand, parent: Connection) -> None:
    """Until the parent hangs up, however it ends."""
    with running_worker(_engine_of(stand), limits=stand.limits) as worker:
        parent.send(worker.address)
        parent.poll(None)


class FakeWorker:
    """A worker with a fake engine in a process of its own, to be measured, frozen and killed.

    Attributes:
        pid: Of the process.
    """

    def __init__(self, stand: Stand) -> None:
        self._parent, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_serve, args=(stand, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.pid: int = self._process.pid or 0
        self._address = ""

    def is_ready(self, timeout: float = 0.0) -> bool:
        """Whether it serves; waits up to `timeout` seconds for it.

        Raises:
            EOFError: It has ended.
        """
        if not self._address and self._parent.poll(timeout):
            self._address = self._parent.recv()
        return bool(self._address)

    @property
    def address(self) -> str:
        """HOST:PORT, once it serves.

        Raises:
            RuntimeError: That takes too long.
        """
        if not self.is_ready(START_SECONDS):
            raise RuntimeError("the fake worker did not start")
        return self._address

    def kill(self) -> None:
        """End it at once, frozen or not."""
        self._process.kill()
        self._process.join()
        self._parent.close()

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


def seconds(act: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def freeze(pid: int) -> None:
    """Stop a process; it keeps its connections and answers nothing."""
    os.kill(pid, signal.SIGSTOP)


def own_bytes(pid: int | str = "self") -> int:
    """Memory that a process shares with nobody: what a leak would add to, without the slots."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))
