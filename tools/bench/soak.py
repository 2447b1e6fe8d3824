"""Remote previews under faults at random, for minutes: no text under another's weights, nothing lost count of.

The worker is killed and started again, frozen, cut off, throttled; the loop that stands for training goes on. The fake
engine's tokens are the digest of the weights that made them, so every answer says whether its label is right. Faults
come from a fixed seed; which of them meet what depends on the machine.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from chaos import ChaosProxy
from fake_engine import expected_tokens
from measure import Row
from preview_rig import FakeWorker, Numbers, Stand, freeze, own_bytes, save_model, stand_for
from remote_rig import QUICK, adds_up, content

from lightning_trainer import GrpcPreviewBackend
from lightning_trainer.types import PreviewRequest, PreviewResult, SamplingParams

SEED = 0
TOKENS = 8
STEP_SECONDS = 0.02
EVERY_STEPS = 4

KINDS = ("kill", "freeze", "reset", "blackhole", "throttle")

CALM, FAULT = (1.0, 6.0), (0.2, 3.0)
"""Least and most seconds between two faults, and of one; a killed worker is gone for as long as its start takes."""

RECOVERY_SECONDS = 90.0
"""For an answer once everything is well: probes of a worker that was gone for long are a minute apart at most."""

GROWTH_MB = 12.0
"""Four times the model's weights: buffers of uploads that a fault met, but no leak."""


def run(quick: bool) -> list[Row]:
    """The table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        model = save_model(Path(name), vocab_size=22_000)
    stand = stand_for(model, token_seconds=0.005)
    with (
        ChaosProxy("127.0.0.1:1") as proxy,
        Faults(stand, proxy, random.Random(SEED)) as faults,
        _backend(proxy.address, quick) as backend,
    ):
        backend.bind(Numbers(), model)
        soak = Soak(backend, model, faults)
        soak.go(60.0 if quick else 600.0)
        faults.end()
        recovered = soak.recover()
        soak.finish()
    return rows_of(soak, recovered)


@contextmanager
def _backend(address: str, quick: bool) -> Iterator[GrpcPreviewBackend]:
    """With short deadlines where time is short."""
    backend = GrpcPreviewBackend(address)
    if quick:
        backend._deadlines = QUICK
    try:
        yield backend
    finally:
        backend.close()


class Faults:
    """One at a time, and calm between them; never waits.

    Args:
        stand: Of the worker.
        proxy: Between trainer and worker.
        rng: Chooses kinds and times.

    Attributes:
        worker: That serves, or is about to.
        count: Of each kind so far.
    """

    def __init__(self, stand: Stand, proxy: ChaosProxy, rng: random.Random) -> None:
        self._stand, self._proxy, self._rng = stand, proxy, rng
        self.worker = FakeWorker(stand)
        proxy.target = self.worker.address
        self.count: Counter[str] = Counter()
        self._kind, self._until = "", time.monotonic() + 2.0

    def tick(self) -> None:
        """Begin or end a fault, when it is time."""
        if self._kind == "kill" and self.worker.is_ready():
            self.end()
        elif self._kind != "kill" and time.monotonic() > self._until:
            if self._kind:
                self.end()
            else:
                self._begin(self._rng.choice(KINDS))

    def _begin(self, kind: Any) -> None:
        self._kind, self._until = kind, time.monotonic() + self._rng.uniform(*FAULT)
        self.count[kind] += 1
        if kind == "kill":
            self.worker.kill()
            self.worker = FakeWorker(self._stand)
        elif kind == "freeze":
            freeze(self.worker.pid)
        else:
            self._proxy.set(kind)

    def end(self) -> None:
        """All is well, for a while."""
        if self._kind == "kill":
            self._proxy.target = self.worker.address
        elif self._kind == "freeze":
            os.kill(self.worker.pid, signal.SIGCONT)
        elif self._kind:
            self._proxy.set("pass")
        self._kind, self._until = "", time.monotonic() + self._rng.uniform(*CALM)

    def __enter__(self) -> Faults:
        return self

    def __exit__(self, *error: object) -> None:
        self.worker.kill()


@dataclass
class Memory:
    """Own memory of a process, in MB, as time goes on; a process that takes the place of another goes on with it."""

    samples: list[float] = field(default_factory=list)

    def look(self, pid: int | str) -> None:
        """Take a sample; a process that is just being started, or has ended, gives none."""
        try:
            self.samples.append(own_bytes(pid) / 1e6)
        except (FileNotFoundError, ProcessLookupError, StopIteration):
            return

    @property
    def growth(self) -> float:
        """Peak of the second half above that of the first, whose first tenth is left out."""
        half, first = len(self.samples) // 2, len(self.samples) // 10
        return max(self.samples[half:]) - max(self.samples[first:half])


class Soak:
    """The loop that stands for training, and what it saw.

    Args:
        backend: Bound to `model`.
        faults: That happen meanwhile.

    Attributes:
        counters: Of the backend, at the end.
        right: Answers by the weights they name.
        wrong: Answers by others.
        unanswered: Results without an answer.
        amiss: Steps at which the counters did not add up.
        longest: Seconds that one step waited for the backend.
        memory: Of each process.
    """

    def __init__(self, backend: GrpcPreviewBackend, model: Any, faults: Faults) -> None:
        self._backend, self._model, self._faults = backend, model, faults
        self._digests: dict[int, bytes] = {}
        self._step = 0
        self.counters: dict[str, int] = {}
        self.right = self.wrong = self.unanswered = self.amiss = 0
        self.longest = 0.0
        self.memory = {name: Memory() for name in ("trainer", "dispatcher", "worker")}

    def go(self, seconds: float) -> None:
        """Train for so long."""
        end = look = time.monotonic()
        while time.monotonic() < end + seconds:
            self._faults.tick()
            self._one_step()
            if time.monotonic() > look:
                look += seconds / 100
                self._look()

    def _one_step(self) -> None:
        """Weights change; now and then a preview is asked for; what has come is judged."""
        self._step += 1
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.fill_(self._step / 100)
        asks = self._step % EVERY_STEPS == 0
        if asks:
            self._digests[self._step] = content(self._model)
        started = time.perf_counter()
        if asks:
            for number in range(1 + (self._step % (5 * EVERY_STEPS) == 0)):  # now and then two share a snapshot
                request = PreviewRequest((1, 2, 3 + number), prompt_id=str(number), step=self._step)
                self._backend.submit([request], SamplingParams(max_new_tokens=TOKENS), self._step)
        done = self._backend.collect()
        self._backend.settle()
        self.longest = max(self.longest, time.perf_counter() - started)
        self._judge(done)
        time.sleep(STEP_SECONDS)

    def _judge(self, done: list[PreviewResult]) -> None:
        for result in done:
            if not result.success:
                self.unanswered += 1
            elif result.weights_step == result.step and result.text == self._answer_of(result.step):
                self.right += 1
            else:
                self.wrong += 1
        self.amiss += not adds_up(self._backend)

    def _answer_of(self, step: int) -> str:
        return " ".join(map(str, expected_tokens(self._digests[step], TOKENS)))

    def _look(self) -> None:
        pids = {"trainer": "self", "dispatcher": self._backend._bound.companion.pid, "worker": self._faults.worker.pid}
        for name, pid in pids.items():
            self.memory[name].look(pid)

    def recover(self) -> float:
        """Seconds until there is an answer again; RECOVERY_SECONDS where none comes."""
        started, before = time.monotonic(), self.right
        while self.right == before and time.monotonic() < started + RECOVERY_SECONDS:
            self._one_step()
        return time.monotonic() - started

    def finish(self) -> None:
        """End as a run does."""
        self._judge(self._backend.finish())
        self._backend.close()
        self._judge(self._backend.collect())
        self.counters = self._backend.counters
        told = (self.right + self.wrong, self.unanswered)
        counted = (self.counters["ok"], self.counters["failed"] + self.counters["skipped"])
        self.amiss += (told != counted) + (self.counters["pending"] != 0)


def rows_of(soak: Soak, recovered: float) -> list[Row]:
    """The table."""
    counters, faults = soak.counters, ", ".join(f"{n} {kind}" for kind, n in sorted(soak._faults.count.items()))
    least = {"ok": 1.0}
    became = [
        Row(f"previews {name}", (float(counters[name]),), at_least=least.get(name))
        for name in ("ok", "failed", "dropped", "skipped")
    ]
    growth = [
        Row(f"memory of the {name}, second half", (memory.growth,), "MB", at_most=GROWTH_MB, note="peak above first's")
        for name, memory in soak.memory.items()
    ]
    return [
        Row("previews asked", (float(counters["triggered"]),), note=f"{soak._step} steps; {faults}"),
        *became,
        Row("mislabelled", (float(soak.wrong),), at_most=0.0),
        Row("counters that did not add up", (float(soak.amiss),), at_most=0.0),
        Row("all well until an answer", (recovered,), "s", at_most=RECOVERY_SECONDS - 1),
        Row("longest wait of a step", (1000 * soak.longest,), "ms", note="a snapshot included"),
        *growth,
    ]
