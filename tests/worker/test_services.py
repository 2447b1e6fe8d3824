"""Both services over a real connection, with an engine whose tokens prove which weights made them."""

import asyncio
import hashlib
import random
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from chaos import eventually
from fake_engine import ADAPTER, SMALL, FakeEngine, expected_tokens
from grpc_health.v1 import health_pb2, health_pb2_grpc
from worker_thread import RunningWorker, StockClient, answers_of, refused, running_worker

from lightning_trainer.rpc import channel
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc import preview_pb2_grpc as stubs
from lightning_trainer.rpc.layout import content_digest
from lightning_trainer.rpc.limits import Limits

PREVIEW, WEIGHTS = "lightning_trainer.preview.v1.Preview", "lightning_trainer.preview.v1.Weights"


@pytest.fixture
def worker() -> Iterator[RunningWorker]:
    with running_worker(FakeEngine(), limits=Limits(max_queue_depth=2), upload=0.5, reader=0.5, drain=0.3) as running:
        yield running


@pytest.fixture
def client(worker: RunningWorker) -> Iterator[StockClient]:
    with StockClient(worker.address) as made:
        yield made


def filled(value: int) -> dict[str, bytes]:
    return {entry.name: bytes([value]) * entry.nbytes for entry in SMALL}


def wait_for(condition: Any, seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.002)


def start(client: StockClient, request: pb.GenerateRequest) -> Any:
    """A Generate that has been started, as its call."""
    call = client.preview.Generate(request, **client.options)
    while next(call).WhichOneof("event") != "started":
        pass
    return call


def test_a_stock_client_describes_pushes_and_generates(client: StockClient) -> None:
    told = client.describe()
    assert (told.engine, told.wire_minor, told.limits.max_update_bytes) == ("fake", 1, 4046)
    assert [client.serving(name) for name in ("", PREVIEW, WEIGHTS)] == [True] * 3
    ref = client.push(SMALL, filled(1), 1, size=100)
    assert client.describe().resident == ref
    assert client.ask([[1, 2], [3]], 40, ref) == [expected_tokens(ref.content_sha256, 40)] * 2
    status = client.status()
    assert (status.state, status.resident, status.lease_run_id) == (pb.GetStatusResponse.STATE_READY, ref, "run")
    counted = {"commits_total": 1, "uploaded_bytes_total": 4046, "generate_ok_total": 1, "generated_tokens_total": 80}
    assert dict(status.counters) == counted
    second = client.push(SMALL, {**filled(1), "a": b"\2" * 16}, 2)
    assert client.status().counters["uploaded_bytes_total"] == 4046 + 16
    assert client.ask([[1]], 5, second) == [expected_tokens(second.content_sha256, 5)]


def test_events_say_what_and_in_which_order(client: StockClient) -> None:
    ref = client.push(SMALL, filled(1), 1)
    stop = expected_tokens(ref.content_sha256, 10)[9]
    stopping = pb.Stopping(max_new_tokens=30, stop_token_ids=[stop])
    events = client.generate(client.request([[1, 2], [3]], 1, ref, stopping=stopping, stream_every_tokens=3))
    assert answers_of(events, 2) == [expected_tokens(ref.content_sha256, 10)] * 2
    assert (events[0].queued.position, events[1].started.weights) == (0, ref)
    assert list(events[1].started.prompt_token_counts) == [2, 1]
    done = [event.prompt_done for event in events if event.HasField("prompt_done")]
    assert [(d.prompt_index, d.reason, d.generated_tokens) for d in done] == [
        (0, pb.FINISH_REASON_EOS, 10),
        (1, pb.FINISH_REASON_EOS, 10),
    ]


def test_tokens_are_told_in_groups_or_after_a_tenth_of_a_second(worker: RunningWorker, client: StockClient) -> None:
    worker.engine.token_seconds = 0.002
    events = client.generate(client.request([[1]], 30))
    sizes = [len(event.delta.token_ids) for event in events if event.HasField("delta")]
    assert sum(sizes) == 30
    assert min(sizes[:-1]) >= 4
    assert len(sizes) >= 2
    worker.engine.token_seconds = 0.15
    events = client.generate(client.request([[1]], 3))
    assert sum(event.HasField("delta") for event in events) == 3


def rule(**arm: Any) -> list[pb.Prompt]:
    return [pb.Prompt(tokens=pb.TokenIds(ids=[1]), rules=[pb.LogitsRule(**arm)])]


UNKNOWN_RULE = pb.LogitsRule.FromString(bytes([15 << 3 | 2, 1, 0]))  # field 15: an arm of a later version
SAMPLED = {"temperature": 1.0, "top_p": 1.0}

WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "31 a token beyond the vocabulary": ("TOKEN_OUT_OF_VOCAB", {"prompts": [pb.Prompt(tokens=pb.TokenIds(ids=[384]))]}),
    "31 an empty prompt": ("INVALID_ARGUMENT", {"prompts": [pb.Prompt(tokens=pb.TokenIds())]}),
    "31 no prompt": ("INVALID_ARGUMENT", {"prompts": []}),
    "31 a prompt without a body": ("INVALID_ARGUMENT", {"prompts": [pb.Prompt()]}),
    "31 no new tokens": ("INVALID_ARGUMENT", {"stopping": pb.Stopping()}),
    "31 temperature NaN": ("INVALID_ARGUMENT", {"sampling": pb.Sampling(**{**SAMPLED, "temperature": float("nan")})}),
    "31 temperature Inf": ("INVALID_ARGUMENT", {"sampling": pb.Sampling(**{**SAMPLED, "temperature": float("inf")})}),
    "31 top_p 0": ("INVALID_ARGUMENT", {"sampling": pb.Sampling(**{**SAMPLED, "top_p": 0.0})}),
    "31 a seed of 64 bits": ("INVALID_ARGUMENT", {"sampling": pb.Sampling(**SAMPLED, seed=1 << 63)}),
    "31 no request_id": ("INVALID_ARGUMENT", {"request_id": ""}),
    "no weights": ("INVALID_ARGUMENT", {"weights": pb.WeightsSelector()}),
    "29 a rule of a later version": (
        "UNKNOWN_RULE",
        {"prompts": [pb.Prompt(tokens=pb.TokenIds(ids=[1]), rules=[UNKNOWN_RULE])]},
    ),
    "a growth of NaN": (
        "INVALID_ARGUMENT",
        {"prompts": rule(after_sequence=pb.AfterSequence(triggers=[pb.TokenIds(ids=[1])], growth=float("nan")))},
    ),
    "a repetition window of 0": ("INVALID_ARGUMENT", {"prompts": rule(repetition=pb.RepetitionPenalty(penalty=2))}),
    "34 a prompt that is too long": (
        "PROMPT_TOO_LONG",
        {"prompts": [pb.Prompt(tokens=pb.TokenIds(ids=[1] * 4097))]},
    ),
    "other weights": ("WEIGHTS_NOT_RESIDENT", {"weights": pb.WeightsSelector(exact=pb.WeightsRef(run_id="other"))}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_requests_that_make_no_sense_never_reach_the_engine(
    worker: RunningWorker, client: StockClient, kind: str
) -> None:
    reason, fields = WRONG[kind]
    assert refused(lambda: client.generate(client.request([[1]], 5, **fields)))[1] == reason
    assert worker.engine.steps == 0
    assert client.ask([[1]], 3)


def test_29_a_kind_of_update_of_a_later_version_is_refused_and_unknown_fields_are_ignored(client: StockClient) -> None:
    message = client.begin_request(SMALL, filled(1), client.ref(filled(1), 1), "u")
    later = pb.BeginRequest.FromString(message.SerializeToString() + bytes([0xFA, 0x01, 1, 0]))  # field 31
    assert later.ByteSize() > message.ByteSize()
    assert client.begin(later).needed
    message.kind = 9
    assert refused(lambda: client.begin(message)) == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")


def test_30_a_mismatch_names_its_fields(client: StockClient) -> None:
    identity = client.describe().identity
    identity.vocab_size, identity.layout_sha256 = 1, b"x"
    message = client.begin_request(SMALL, filled(1), client.ref(filled(1), 1), "u", identity=identity)
    with pytest.raises(grpc.RpcError) as error:
        client.begin(message)
    detail = pb.ErrorDetail.FromString(dict(error.value.trailing_metadata())["lt-error-bin"])
    assert (detail.reason, list(detail.fields)) == (
        pb.ErrorDetail.REASON_IDENTITY_MISMATCH,
        ["vocab_size", "layout_sha256"],
    )


def test_32_messages_beyond_four_mebibytes_are_refused_inflated_ones_too() -> None:
    bomb, large = pb.UploadChunk(data=bytes(64 << 20)), pb.UploadChunk(data=bytes(5 << 20))
    wide = [*channel.CLIENT, ("grpc.max_send_message_length", -1)]
    with running_worker(FakeEngine()) as running, grpc.insecure_channel(running.address, wide) as wire:
        upload = stubs.WeightsStub(wire).Upload
        before = resident_set()
        code, _ = refused(lambda: upload(iter([bomb]), timeout=20, compression=grpc.Compression.Gzip))
        assert code == "RESOURCE_EXHAUSTED"
        assert refused(lambda: upload(iter([large]), timeout=20))[0] == "RESOURCE_EXHAUSTED"
        assert resident_set() - before < 48 << 20  # less than the bomb inflated
        with StockClient(running.address) as client:
            assert client.serving(PREVIEW)


def resident_set() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_33_a_manifest_of_too_many_tensors_is_refused_fast(client: StockClient) -> None:
    message = client.begin_request(SMALL, filled(1), client.ref(filled(1), 1), "u")
    message.tensors.extend([message.tensors[0]] * 30_000)
    started = time.perf_counter()
    assert refused(lambda: client.begin(message)) == ("INVALID_ARGUMENT", "MANIFEST_INVALID")
    assert time.perf_counter() - started < 1


def test_34_what_does_not_fit_is_refused_and_the_next_request_is_fine(
    worker: RunningWorker, client: StockClient
) -> None:
    worker.engine.room = 20
    assert refused(lambda: client.ask([[1]], 20)) == ("RESOURCE_EXHAUSTED", "TOKEN_BUDGET")
    assert client.ask([[1]], 19)
    worker.engine.raise_next = torch.OutOfMemoryError("CUDA out of memory")
    assert refused(lambda: client.ask([[1]], 5)) == ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")
    assert client.serving(PREVIEW)
    assert client.ask([[1]], 5)


def test_a_fault_of_the_engine_ends_one_request(worker: RunningWorker, client: StockClient) -> None:
    worker.engine.raise_next = RuntimeError("boom")
    assert refused(lambda: client.ask([[1]], 5))[0] == "INTERNAL"
    assert client.ask([[1]], 5)
    assert client.status().counters["faults_total"] == 1


def test_the_queue_is_bounded_and_a_request_that_is_answered_is_not_taken_twice(
    worker: RunningWorker, client: StockClient
) -> None:
    worker.engine.token_seconds = 0.01
    first = client.request([[1]], 1000)
    running = start(client, first)
    assert refused(lambda: client.generate(first))[0] == "ALREADY_EXISTS"
    waiting = [client.preview.Generate(client.request([[1]], 2), **client.options) for _ in range(2)]
    assert sorted(next(call).queued.position for call in waiting) == [1, 2]  # at once: either may come first
    began = time.perf_counter()
    assert refused(lambda: client.ask([[1]], 2)) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert time.perf_counter() - began < 0.5
    assert client.serving(PREVIEW)
    assert (client.status().inflight, client.status().queue_depth) == (3, 2)
    waiting[0].cancel()
    running.cancel()
    assert len(answers_of([pb.GenerateEvent(queued=pb.Queued()), *waiting[1]], 1)[0]) == 2
    wait_for(lambda: client.status().inflight == 0)
    assert not worker.host.turns.taken


async def crowd(address: str) -> tuple[list[str], float]:
    """A hundred requests at once over four connections: how they came out, and the slowest health check meanwhile."""
    wires = [grpc.aio.insecure_channel(address, [*channel.CLIENT, ("crowd", k)]) for k in range(4)]

    async def ask(number: int) -> str:
        request = pb.GenerateRequest(
            request_id=str(number),
            weights=pb.WeightsSelector(any_resident=True),
            prompts=[pb.Prompt(tokens=pb.TokenIds(ids=[1]))],
            sampling=pb.Sampling(greedy=True),
            stopping=pb.Stopping(max_new_tokens=20),
        )
        try:
            async for _ in stubs.PreviewStub(wires[number % 4]).Generate(request, timeout=20):
                pass
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return "answered"

    async def check() -> float:
        began = time.monotonic()
        await health_pb2_grpc.HealthStub(wires[0]).Check(health_pb2.HealthCheckRequest(), timeout=5)
        return time.monotonic() - began

    asking = asyncio.gather(*map(ask, range(100)))
    slowest = 0.0
    while not asking.done():
        slowest = max(slowest, await check())
        await asyncio.sleep(0.01)
    for wire in wires:
        await wire.close()
    return await asking, slowest


def test_37_a_hundred_clients_do_not_drown_a_worker() -> None:
    with running_worker(FakeEngine(token_seconds=0.003)) as running:
        outcomes, slowest = asyncio.run(crowd(running.address))
    assert outcomes.count("answered") >= 9
    assert outcomes.count("answered") + outcomes.count("RESOURCE_EXHAUSTED") == 100
    assert outcomes.count("RESOURCE_EXHAUSTED") >= 60
    assert slowest < 0.5  # client and worker share one interpreter here


@pytest.mark.parametrize("place", ["prefill", "decode"])
def test_38_a_client_that_hangs_up_stops_the_work_within_a_token(
    worker: RunningWorker, client: StockClient, place: str
) -> None:
    engine, gate, entered = worker.engine, threading.Event(), threading.Event()
    at = 0 if place == "prefill" else 5

    def on_token(number: int) -> None:
        if number == at:
            entered.set()
            assert gate.wait(5)

    engine.on_token = on_token
    call = start(client, client.request([[1]], 1000))
    assert entered.wait(5)
    call.cancel()
    wait_for(lambda: client.status().inflight == 0)
    gate.set()
    wait_for(lambda: not worker.host.turns.taken)
    assert engine.steps == at + 1
    engine.on_token = lambda number: None
    assert client.ask([[1]], 3)


def test_36_a_client_that_does_not_read_is_cut_off_and_others_are_served(client: StockClient) -> None:
    many = Limits(max_new_tokens=1 << 20, max_total_tokens=1 << 24, max_prompts_per_request=16)
    with running_worker(FakeEngine(), limits=many, reader=0.5) as running, StockClient(running.address) as other:
        options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0), *channel.CLIENT]
        with grpc.insecure_channel(running.address, options) as raw:
            # Tokens of four to five bytes would need a larger vocabulary: many small events fill the window as well.
            request = other.request([[1]] * 16, 100_000, stream_every_tokens=1)
            call = stubs.PreviewStub(raw).Generate(request, timeout=60)
            next(call)
            wait_for(lambda: running.host.counters["slow_readers_total"] == 1, 20)
            assert other.ask([[1]], 3)
            wait_for(lambda: running.host.in_flight == set())
            assert running.engine.steps < 100_000
            call.cancel()


def test_an_upload_without_bytes_is_ended(client: StockClient) -> None:
    message = client.begin_request(SMALL, filled(1), client.ref(filled(1), 1), "u")
    client.begin(message)
    gate = threading.Event()

    def drip() -> Iterator[pb.UploadChunk]:
        yield from client.chunks("u", b"\1" * 100)
        gate.wait(5)

    began = time.monotonic()
    code = refused(lambda: client.weights.Upload(drip(), **client.options))[0]
    gate.set()
    assert (code, time.monotonic() - began < 3) == ("UNAVAILABLE", True)
    assert client.begin(message).resume_offset == 100


def test_39_a_commit_waits_for_a_generation_and_then_ends_it(worker: RunningWorker, client: StockClient) -> None:
    ref = client.push(SMALL, filled(1), 1)
    worker.engine.token_seconds = 0.005
    short = start(client, client.request([[1]], 20, ref))
    second = client.push(SMALL, filled(2), 2)
    head = [pb.GenerateEvent(queued=pb.Queued()), pb.GenerateEvent(event_seq=1, started=pb.Started(weights=ref))]
    assert answers_of([*head, *short], 1) == [expected_tokens(ref.content_sha256, 20)]
    long = start(client, client.request([[1]], 1000, second))
    third = client.push(SMALL, filled(3), 3)
    assert refused(lambda: list(long)) == ("ABORTED", "STALE_PUBLISH")
    assert client.ask([[1]], 3, third) == [expected_tokens(third.content_sha256, 3)]


def test_a_commit_goes_before_those_who_wait_and_they_are_told(worker: RunningWorker, client: StockClient) -> None:
    ref = client.push(SMALL, filled(1), 1)
    worker.engine.token_seconds = 0.01
    running = start(client, client.request([[1]], 20, ref))
    waiting = client.preview.Generate(client.request([[1]], 5, ref), **client.options)
    next(waiting)
    client.push(SMALL, filled(2), 2)
    assert refused(lambda: list(waiting)) == ("FAILED_PRECONDITION", "WEIGHTS_NOT_RESIDENT")
    assert list(running)[-1].finished.weights == ref


def test_17_a_poisoned_worker_says_so_and_a_full_push_puts_it_right(worker: RunningWorker, client: StockClient) -> None:
    ref = client.push(SMALL, filled(1), 1)
    worker.engine.fail_apply_after = 1
    assert refused(lambda: client.push(SMALL, filled(2), 2)) == ("FAILED_PRECONDITION", "POISONED")
    assert [client.serving(name) for name in ("", PREVIEW, WEIGHTS)] == [True, False, True]
    assert client.status().state == pb.GetStatusResponse.STATE_POISONED
    assert refused(lambda: client.ask([[1]], 3, ref)) == ("FAILED_PRECONDITION", "POISONED")
    third = client.push(SMALL, filled(2), 3)
    assert client.serving(PREVIEW)
    assert client.ask([[1]], 3, third) == [expected_tokens(third.content_sha256, 3)]


def test_23_a_flipped_bit_is_data_loss(client: StockClient) -> None:
    ref = client.push(SMALL, filled(1), 1)
    target = client.ref(filled(2), 2)
    client.begin(client.begin_request(SMALL, filled(2), target, "u"))
    client.upload("u", b"\3" + b"".join(filled(2).values())[1:])
    assert refused(lambda: client.commit("u", target)) == ("DATA_LOSS", "DIGEST_MISMATCH")
    assert client.ask([[1]], 3, ref) == [expected_tokens(ref.content_sha256, 3)]


def test_24_25_a_second_trainer_is_refused_until_the_first_is_silent() -> None:
    with (
        running_worker(FakeEngine(), lease=0.4) as running,
        StockClient(running.address, run_id="one") as one,
        StockClient(running.address, run_id="two") as two,
    ):
        one.push(SMALL, filled(1), 1)
        assert refused(lambda: two.push(SMALL, filled(2), 1)) == ("FAILED_PRECONDITION", "LEASE_HELD")
        late = one.begin_request(SMALL, filled(3), one.ref(filled(3), 2), "late")
        one.begin(late)
        time.sleep(0.5)
        ref = two.push(SMALL, filled(2), 1)
        for call in (lambda: one.upload("late", b"\3" * 9), lambda: one.commit("late", late.target)):
            assert refused(call) == ("ABORTED", "FENCED")
        assert two.describe().resident == ref


def test_a_lease_is_kept_by_renewing_it_and_given_up_by_releasing_it() -> None:
    with (
        running_worker(FakeEngine(), lease=1.0) as running,
        StockClient(running.address, run_id="one") as one,
        StockClient(running.address, run_id="two") as two,
    ):
        one.push(SMALL, filled(1), 1)
        mine = pb.LeaseRequest(fencing_token=one.fencing_token)
        for _ in range(4):
            time.sleep(0.3)
            assert one.weights.Renew(mine, **one.options).remaining_millis > 0
        assert refused(lambda: two.push(SMALL, filled(2), 1)) == ("FAILED_PRECONDITION", "LEASE_HELD")
        assert one.weights.Release(mine, **one.options).remaining_millis == 0
        ref = two.push(SMALL, filled(2), 1)
        for call in (one.weights.Renew, one.weights.Release):
            assert refused(lambda call=call: call(mine, **one.options)) == ("ABORTED", "FENCED")
        assert two.describe().resident == ref


def test_a_device_that_has_failed_for_good_ends_the_worker(worker: RunningWorker, client: StockClient) -> None:
    worker.engine.raise_next, worker.engine.alive = RuntimeError("CUDA error: an illegal memory access"), False
    assert refused(lambda: client.ask([[1]], 5))[0] == "INTERNAL"
    assert eventually(worker.host.lost.is_set)
    assert [client.serving(name) for name in (PREVIEW, WEIGHTS)] == [False, False]
    assert refused(lambda: client.ask([[1]], 5))[0] == "UNAVAILABLE"


def test_a_device_that_fails_while_weights_are_written_ends_the_worker(
    worker: RunningWorker, client: StockClient
) -> None:
    worker.engine.fail_apply_after, worker.engine.alive = 1, False
    assert refused(lambda: client.push(SMALL, filled(1), 1)) == ("FAILED_PRECONDITION", "POISONED")
    assert eventually(worker.host.lost.is_set)
    assert not client.serving(WEIGHTS)


def test_26_an_older_publication_is_refused(client: StockClient) -> None:
    client.push(SMALL, filled(1), 5)
    assert refused(lambda: client.push(SMALL, filled(2), 4)) == ("ABORTED", "STALE_PUBLISH")


def test_40_a_commit_that_outlives_its_deadline_is_answered_the_second_time(
    worker: RunningWorker, client: StockClient
) -> None:
    apply, applied = worker.engine.apply, []

    def slowly(tensors: Any) -> None:
        time.sleep(0.4)
        apply(tensors)
        applied.append(1)

    worker.engine.apply = slowly
    target = client.ref(filled(1), 1)
    client.begin(client.begin_request(SMALL, filled(1), target, "u"))
    client.upload("u", b"".join(filled(1).values()))
    commit = pb.CommitRequest(update_id="u", fencing_token=client.fencing_token, target=target)
    assert refused(lambda: client.weights.Commit(commit, timeout=0.1))[0] == "DEADLINE_EXCEEDED"
    assert client.commit("u", target).resident == target
    assert applied == [1]
    assert client.ask([[1]], 3, target) == [expected_tokens(target.content_sha256, 3)]


def test_abort_forgets_an_update(client: StockClient) -> None:
    client.begin(client.begin_request(SMALL, filled(1), client.ref(filled(1), 1), "u"))
    client.weights.Abort(pb.AbortRequest(update_id="u", fencing_token=client.fencing_token), **client.options)
    assert refused(lambda: client.upload("u", b"\1" * 10)) == ("ABORTED", "FENCED")


def test_calls_are_refused_while_the_model_is_loaded() -> None:
    gate = threading.Event()

    def slowly() -> FakeEngine:
        gate.wait(5)
        return FakeEngine(has_weights=False)

    found: list[Any] = []

    def look(address: str) -> None:
        with StockClient(address) as client:
            found.append([client.serving(name) for name in ("", PREVIEW, WEIGHTS)])
            found.append(client.status().state)
            found.append(refused(client.describe)[0])
        gate.set()

    with running_worker(slowly, while_loading=look) as running, StockClient(running.address) as client:
        assert found == [[True, False, False], pb.GetStatusResponse.STATE_LOADING, "UNAVAILABLE"]
        assert [client.serving(name) for name in ("", PREVIEW, WEIGHTS)] == [True, False, True]
        client.push(SMALL, filled(1), 1)
        assert client.serving(PREVIEW)


def test_a_worker_that_ends_lets_a_generation_end_and_takes_no_other(worker: RunningWorker) -> None:
    worker.engine.token_seconds = 0.01
    with StockClient(worker.address) as client:
        call = start(client, client.request([[1]], 40))
        ending = threading.Thread(target=worker.stop)
        ending.start()
        wait_for(lambda: worker.host.resident.draining)
        # Which of them depends on whether the call came before the server had closed its door.
        assert refused(lambda: client.ask([[1]], 3))[0] in ("UNAVAILABLE", "CANCELLED")
        assert list(call)[-1].finished.total_generated_tokens == 40
        ending.join(5)
        assert not ending.is_alive()


def test_a_worker_ends_though_a_generation_does_not(worker: RunningWorker) -> None:
    worker.engine.token_seconds = 0.05
    with StockClient(worker.address) as client:
        call = start(client, client.request([[1]], 1000))
        began = time.monotonic()
        worker.stop()
        assert time.monotonic() - began < 3
        assert refused(lambda: list(call))[0] in ("UNAVAILABLE", "CANCELLED")


async def interleave(address: str, seed: int, pushes: int, asks: int) -> list[str]:
    """Push and ask at the same time, in an order that `seed` draws; say how each answer came out."""
    rng = random.Random(seed)
    outcomes: list[str] = []
    known: list[pb.WeightsRef] = []
    async with grpc.aio.insecure_channel(address, channel.CLIENT) as wire:
        preview, weights = stubs.PreviewStub(wire), stubs.WeightsStub(wire)
        identity = (await preview.Describe(pb.DescribeRequest(), timeout=5)).identity

        async def push(seq: int) -> None:
            tensors = {entry.name: rng.randbytes(entry.nbytes) for entry in SMALL}
            digests = [hashlib.sha256(tensors[entry.name]).digest() for entry in SMALL]
            ref = pb.WeightsRef(run_id="r", global_step=seq, publish_seq=seq, content_sha256=content_digest(digests))
            manifest = [entry.to_wire(digest) for entry, digest in zip(SMALL, digests, strict=True)]
            begun = await weights.Begin(
                pb.BeginRequest(
                    update_id=str(seq), identity=identity, kind=pb.UPDATE_KIND_MODEL, target=ref, tensors=manifest
                ),
                timeout=5,
            )
            data = b"".join(tensors[SMALL[n].name] for n in begun.needed)
            token = begun.fencing_token
            chunk = pb.UploadChunk(update_id=str(seq), fencing_token=token, data=data)
            await weights.Upload(iter([chunk]), timeout=5)
            await asyncio.sleep(rng.random() * 0.002)
            request = pb.CommitRequest(update_id=str(seq), fencing_token=token, target=ref)
            assert (await weights.Commit(request, timeout=5)).resident == ref
            known.append(ref)

        async def ask(number: int) -> None:
            wanted = rng.choice(known[-2:]) if known and rng.random() < 0.7 else None
            selector = pb.WeightsSelector(any_resident=True) if wanted is None else pb.WeightsSelector(exact=wanted)
            request = pb.GenerateRequest(
                request_id=str(number),
                weights=selector,
                prompts=[pb.Prompt(tokens=pb.TokenIds(ids=[1]))],
                sampling=pb.Sampling(greedy=True),
                stopping=pb.Stopping(max_new_tokens=rng.choice([1, 8, 24])),
            )
            call = preview.Generate(request, timeout=5)
            give_up = rng.random() < 0.1
            started, tokens, finished = None, [], None
            try:
                async for event in call:
                    if event.HasField("started"):
                        started = event.started.weights
                    tokens += event.delta.token_ids
                    if event.HasField("finished"):
                        finished = event.finished.weights
                    if give_up and started is not None:
                        call.cancel()
            except asyncio.CancelledError:
                outcomes.append("cancelled")
            except grpc.aio.AioRpcError as error:
                outcomes.append(error.code().name)
            else:
                assert started == finished
                assert wanted in (None, started)
                outcomes.append("answered")
            if started is not None and started.content_sha256:
                assert tokens == expected_tokens(started.content_sha256, len(tokens))

        async def pusher() -> None:
            for seq in range(1, pushes + 1):
                await push(seq)
                await asyncio.sleep(rng.random() * 0.004)

        async def asker(first: int) -> None:
            for number in range(asks):
                await ask(first + number)
                await asyncio.sleep(rng.random() * 0.002)

        await asyncio.gather(pusher(), *(asker(10_000 * k) for k in range(3)))
    return outcomes


def test_39_no_answer_is_mislabelled_or_of_two_sets_of_weights() -> None:
    engine = FakeEngine()
    rng = random.Random(0)
    engine.on_token = lambda number: time.sleep(0.0002) if rng.random() < 0.3 else None
    with running_worker(engine, drain=0.002) as running:
        outcomes = asyncio.run(interleave(running.address, seed=0, pushes=250, asks=340))
    assert len(outcomes) == 1020
    assert outcomes.count("answered") > 300
    assert {"ABORTED", "FAILED_PRECONDITION", "cancelled"} <= set(outcomes)
    assert len(engine._threads) == 1


class SlowToPrepare(FakeEngine):
    """Gets ready for adapters once it may."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def prepare(self, kind: Any, spec: Any) -> None:
        self.gate.wait(10)
        super().prepare(kind, spec)


def begin_of_adapters(client: StockClient) -> pb.BeginRequest:
    tensors = {entry.name: bytes(entry.nbytes) for entry in ADAPTER}
    about = {"kind": pb.UPDATE_KIND_ADAPTER, "adapter": pb.AdapterSpec(rank=1, alpha=1, target_modules=["x"])}
    return client.begin_request(ADAPTER, tensors, client.ref(tensors, 1), "u", **about)


def test_a_run_that_has_ended_before_its_begin_was_answered_holds_nothing() -> None:
    engine = SlowToPrepare()
    with running_worker(engine) as running:
        with StockClient(running.address, run_id="one") as one:
            request = begin_of_adapters(one)
            assert refused(lambda: one.weights.Begin(request, timeout=0.1))[0] == "DEADLINE_EXCEEDED"
        engine.gate.set()
        with StockClient(running.address, run_id="two") as two:
            assert two.push(SMALL, filled(2), 1) == two.describe().resident
            assert two.status().lease_run_id == "two"


def test_begins_whose_clients_hang_up_do_not_pile_up() -> None:
    engine = SlowToPrepare()
    with running_worker(engine) as running, StockClient(running.address) as client:
        request = begin_of_adapters(client)
        codes = [refused(lambda: client.weights.Begin(request, timeout=0.1)) for _ in range(12)]
        engine.gate.set()
        assert codes.count(("RESOURCE_EXHAUSTED", "QUEUE_FULL")) == 4
