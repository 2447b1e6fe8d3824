"""Remote previews under load: how many, how late, how many clients at once, what else they slow down or keep waiting.

Workers are processes of their own; so is the crowd of clients where others are timed beside it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import crowd
import torch
from measure import Row
from preview_rig import (
    PROMPT,
    SPAWN,
    START_SECONDS,
    FakeWorker,
    bound,
    freeze,
    micros,
    nudge,
    one_preview,
    own_bytes,
    save_model,
    seconds,
    served,
    stand_for,
)
from transformers import AutoModelForCausalLM
from worker_thread import StockClient

from lightning_trainer import GrpcPreviewBackend
from lightning_trainer.rpc.limits import Limits
from lightning_trainer.types import SamplingParams

FLUSH_SECONDS = 2.0
"""That the run which ends may wait for previews."""

RETRY_SECONDS = 1.0
"""After which a refused client is told to come again."""

SAMPLE_EVERY = 10
"""Previews between two looks at the memory."""


def run(quick: bool) -> list[Row]:
    """The table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tiny"
        tiny = save_model(folder)
        rounds = 3 if quick else 9
        return [
            *rates(tiny, rounds),
            events(tiny, rounds),
            *overload(tiny, 5.0 if quick else 20.0),
            token_latency(tiny, rounds),
            step_time(Path(name) / "large", rounds),
            ending("dead", folder, tiny, FakeWorker.kill),
            ending("frozen", folder, tiny, lambda worker: freeze(worker.pid)),
            *memory(folder, tiny, 200 if quick else 1000),
        ]


def rates(tiny: Any, rounds: int) -> list[Row]:
    """Of one client: bare requests, and previews as a run asks for them, each by other weights."""
    with FakeWorker(stand_for(tiny)) as worker:
        with StockClient(worker.address) as client:
            bare = _rate(lambda number: client.ask([PROMPT.prompt_ids], 8), rounds)
        with bound(worker.address, tiny) as backend:

            def preview(number: int) -> None:
                nudge(tiny)
                one_preview(backend, number, tokens=8)

            whole = _rate(preview, rounds)
    return [
        Row("answers of 8 tokens, one client", bare, "1/s", at_least=50.0),
        Row("previews, each with a push", whole, "1/s", at_least=50.0, note="snapshot, push, commit, 8 tokens"),
    ]


def _rate(act: Callable[[int], Any], rounds: int, calls: int = 40) -> tuple[float, ...]:
    """Calls a second, round by round, after one that does not count."""
    act(0)
    found = []
    for first in range(1, rounds * calls, calls):
        started = time.perf_counter()
        for number in range(first, first + calls):
            act(number)
        found.append(calls / (time.perf_counter() - started))
    return tuple(found)


def events(tiny: Any, rounds: int) -> Row:
    """Of 32 streams at once; one after the other is answered, 16 prompts and 1,000 tokens a second each."""
    stand = stand_for(tiny, token_seconds=0.001, tells_time=True, limits=Limits(max_queue_depth=32))
    with FakeWorker(stand) as worker:
        found = [crowd.streams(worker.address, count=32, prompts=16, tokens=16) for _ in range(rounds + 1)][1:]
    errors = sum(each.errors for each in found)
    values = tuple(each.events / each.seconds if not errors else 0.0 for each in found)
    rate = statistics.median(each.tokens / each.seconds for each in found)
    note = f"{errors} errors (any makes this 0), {rate:.0f} tokens/s"
    return Row("events of 32 streams", values, "1/s", at_least=5000.0, note=note)


def overload(tiny: Any, duration: float) -> list[Row]:
    """100 clients, of which nine at most are let in; each asks when the last refusal said, then all in one moment."""
    stand = stand_for(tiny, token_seconds=0.01, limits=Limits(max_queue_depth=8))
    with (
        FakeWorker(stand) as worker,
        ProcessPoolExecutor(1, mp_context=SPAWN) as pool,
        StockClient(worker.address) as client,
    ):
        siege = pool.submit(crowd.siege, worker.address, 100, 10, duration, RETRY_SECONDS)
        health = _health_while(siege, client)
        found = siege.result()
        at_once = [pool.submit(crowd.burst, worker.address, 100, 10).result() for _ in range(3)]
    errors = found.errors + sum(each.errors for each in at_once)
    told = f"{len(found.seconds)} refused, {found.answered} answered"
    last = tuple(1000 * max(each.seconds) for each in at_once)
    return [
        Row("refusal, 100 clients, queue 8", _thousandfold(found.seconds), "ms", at_most=10.0, note=told),
        Row("health, 99th percentile meanwhile", (1000 * percentile(health, 99),), "ms", at_most=100.0,
            note=f"of {len(health)} calls"),
        Row("calls that failed otherwise", (float(errors),), at_most=0.0),
        Row("100 in one moment: the last refusal", last, "ms", note=f"{len(at_once[0].seconds)} refused"),
    ]  # fmt: skip


def _health_while(siege: Future[Any], client: StockClient) -> list[float]:
    found = []
    while not siege.done():
        started = time.perf_counter()
        client.serving()
        found.append(time.perf_counter() - started)
        time.sleep(0.01)
    return found


def token_latency(tiny: Any, rounds: int) -> Row:
    """From the engine's on_step to the client's read; the tokens say when they were made."""
    found = []
    with (
        FakeWorker(stand_for(tiny, token_seconds=0.005, tells_time=True)) as worker,
        StockClient(worker.address) as client,
    ):
        for _ in range(rounds + 1):
            late = []
            for event in client.preview.Generate(client.request([(1, 2, 3)], 200, stream_every_tokens=1), timeout=60):
                now = micros()
                late += [(now - token) / 1000 for token in event.delta.token_ids]
            found.append(statistics.median(late))
    return Row("from a token to its reader, median", tuple(found[1:]), "ms", at_most=1.0)


def step_time(folder: Path, rounds: int) -> Row:
    """Median step of a small training-like loop while weights are pushed, of that while nothing is."""
    vocabulary = (64 << 20) // 4 // 256
    large = save_model(folder, vocab_size=vocabulary, hidden_size=256, head_dim=64)
    step, found = _training_step(), []
    with served(folder, "--dtype", "fp32") as (address, _), bound(address, large) as backend:
        for number in range(1, rounds + 2):
            alone = [seconds(step) for _ in range(50)]
            nudge(large)
            beside = _steps_while_pushing(backend, number, step)
            alone += [seconds(step) for _ in range(50)]
            found.append(statistics.median(beside) / statistics.median(alone))
    note = f"{len(beside)} of {1000 * statistics.median(alone):.1f} ms in the last push; informative on shared cores"
    return Row("step while 64 MiB are pushed / without", tuple(found[1:]), note=note)


def _steps_while_pushing(backend: GrpcPreviewBackend, number: int, step: Callable[[], Any]) -> list[float]:
    """Seconds of each step from when the weights are handed over until the worker has them."""
    found: list[float] = []
    backend.submit([PROMPT], SamplingParams(max_new_tokens=1, temperature=0.0), number)
    backend.settle()
    done = backend.collect(timeout=1e-3)  # in a hurry: now, however long the last push took
    while backend._bound.mailbox.room() is None:
        found.append(seconds(step))
        done += backend.collect()
    while not done:
        done = backend.collect(timeout=START_SECONDS)
    if not done[0].success:
        raise RuntimeError(f"no preview: {done[0].error_message}")
    return found


def _training_step() -> Callable[[], Any]:
    """Forward, backward and update of a small network; some milliseconds."""
    width = 256
    layers = [module for _ in range(4) for module in (torch.nn.Linear(width, width), torch.nn.GELU())]
    network = torch.nn.Sequential(*layers)
    optimizer, data = torch.optim.AdamW(network.parameters()), torch.randn(128, width)

    def step() -> None:
        optimizer.zero_grad()
        network(data).square().mean().backward()
        optimizer.step()

    return step


def ending(state: str, folder: Path, tiny: Any, harm: Callable[[FakeWorker], None]) -> Row:
    """Seconds from the last step of a run, whose worker then is dead or frozen, to the end of its process."""
    found = []
    for _ in range(2):
        ours, theirs = SPAWN.Pipe()
        with FakeWorker(stand_for(tiny, token_seconds=0.01)) as worker:
            process = SPAWN.Process(target=_run_that_ends, args=(theirs, worker.address, folder), daemon=True)
            process.start()
            theirs.close()
            ours.recv()
            harm(worker)
            started = time.perf_counter()
            ours.send("end")
            process.join(START_SECONDS)
            found.append(time.perf_counter() - started)
            process.kill()
        ours.close()
    note = f"process exit; flush_timeout {FLUSH_SECONDS:g} s"
    return Row(f"end of a run, its worker {state}", tuple(found), "s", at_most=FLUSH_SECONDS + 3.0, note=note)


def _run_that_ends(parent: Connection, address: str, folder: Path) -> None:
    """A trainer's process: one preview that comes, and one at its end."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with bound(address, model, flush_timeout=FLUSH_SECONDS) as backend:
        one_preview(backend, 1)
        parent.send("ready")
        parent.recv()
        nudge(model)
        backend.submit([PROMPT], SamplingParams(max_new_tokens=8, temperature=0.0), 2)
        backend.settle()
        backend.finish()


def memory(folder: Path, tiny: Any, previews: int) -> list[Row]:
    """Growth over so many updates and generations, of the worker, the dispatcher and the trainer."""
    samples: dict[str, list[float]] = {"worker": [], "dispatcher": [], "trainer": []}
    with served(folder, "--dtype", "fp32") as (address, worker), bound(address, tiny) as backend:
        pids = {"worker": worker.pid, "dispatcher": backend._bound.companion.pid, "trainer": "self"}
        for number in range(1, previews + 1):
            nudge(tiny)
            one_preview(backend, number, tokens=8)
            if number % SAMPLE_EVERY == 0:
                for name, pid in pids.items():
                    samples[name].append(own_bytes(pid) / 1e6)
    note = f"of {previews} updates and answers; the first fifth does not count"
    return [
        Row(f"memory of the {name}, per 100 previews", (_slope(values),), "MB", at_most=1.0, note=note)
        for name, values in samples.items()
    ]


def _slope(values: Sequence[float]) -> float:
    """Per 100 previews, by least squares."""
    late = values[len(values) // 5 :]
    return statistics.linear_regression(range(len(late)), late).slope * 100 / SAMPLE_EVERY


def percentile(values: Sequence[float], share: int) -> float:
    """The value that so many percent do not exceed."""
    return statistics.quantiles(values, n=100, method="inclusive")[share - 1]


def _thousandfold(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(1000 * value for value in values)
