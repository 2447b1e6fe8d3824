"""A worker in a thread of the test's own process, on a port that the system chose, and a client of the bare proto."""

import asyncio
import hashlib
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lightning_trainer.rpc import channel
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc import preview_pb2_grpc as stubs
from lightning_trainer.rpc.errors import failure_of
from lightning_trainer.rpc.layout import Entry, content_digest
from lightning_trainer.rpc.limits import Limits
from lightning_trainer.rpc.messages import output_digest
from lightning_trainer.rpc.security import Address
from lightning_trainer.worker.host import Host, Patience
from lightning_trainer.worker.server import Serving, Worker


class RunningWorker:
    """See `running_worker`.

    Attributes:
        address: HOST:PORT.
        engine: What it generates with.
        host: Its inside; look, but do not touch while it serves.
    """

    def __init__(self, make_engine: Callable[[], Any], serving: Serving, while_loading: Any = None) -> None:
        self.address, self.engine = "", None
        self._while_loading = while_loading
        self.host: Host
        self._make, self._serving = make_engine, serving
        self._fault: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="worker", daemon=True)
        self._thread.start()
        assert self._ready.wait(30), "the worker did not start"
        if self._fault is not None:
            self._thread.join()
            raise self._fault

    async def _serve(self) -> None:
        self._loop, self._asked = asyncio.get_running_loop(), asyncio.Event()
        try:
            worker = Worker(self._serving)
            self.host = worker.host
            loading = asyncio.ensure_future(worker.start(self._make))
            if self._while_loading is not None:
                await asyncio.to_thread(self._while_loading, worker.address.target)
            await loading
            assert self.host.loaded is not None
            self.engine, self.address = self.host.loaded.engine, worker.address.target
        except BaseException as fault:  # raised where the worker is wanted
            self._fault = fault
            return
        finally:
            self._ready.set()
        await self._asked.wait()
        await worker.stop()

    def stop(self) -> None:
        """End it, as SIGTERM would; the port is free then."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._asked.set)
            self._thread.join(30)
            assert not self._thread.is_alive(), "the worker did not end"


@contextmanager
def running_worker(
    engine: Any,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    path: str = "",
    token: str | None = None,
    tls: Any = None,
    limits: Limits | None = None,
    while_loading: Callable[[str], Any] | None = None,
    **patience: float,
) -> Iterator[RunningWorker]:
    """A worker that serves `engine` (an engine, or a function that makes one) within.

    Args:
        while_loading: Called with the address while the engine is being made.
        patience: Seconds of Patience: lease, upload, reader, drain, stop (1 by default here).
    """
    make = engine if callable(engine) else lambda: engine
    serving = Serving(Address(host, port, path), tls, token, limits or Limits(), Patience(**{"stop": 1.0, **patience}))
    worker = RunningWorker(make, serving, while_loading)
    try:
        yield worker
    finally:
        worker.stop()


class StockClient:
    """A client that knows only the proto. Every call has a deadline."""

    def __init__(self, address: str, token: str | None = None, run_id: str = "run", seconds: float = 10.0) -> None:
        self.channel = grpc.insecure_channel(address, channel.CLIENT)
        self.preview, self.weights = stubs.PreviewStub(self.channel), stubs.WeightsStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        self.address, self.run_id, self.fencing_token = address, run_id, 0
        self.options: dict[str, Any] = {"timeout": seconds, "metadata": channel.bearer(token)}

    def __enter__(self) -> "StockClient":
        return self

    def __exit__(self, *error: object) -> None:
        self.channel.close()

    def describe(self) -> pb.DescribeResponse:
        return self.preview.Describe(pb.DescribeRequest(), **self.options)

    def status(self) -> pb.GetStatusResponse:
        return self.preview.GetStatus(pb.GetStatusRequest(), **self.options)

    def serving(self, service: str = "") -> bool:
        found = self.health.Check(health_pb2.HealthCheckRequest(service=service), **self.options)
        return bool(found.status == health_pb2.HealthCheckResponse.SERVING)

    def ref(self, tensors: dict[str, bytes], seq: int, step: int | None = None) -> pb.WeightsRef:
        content = content_digest(hashlib.sha256(values).digest() for values in tensors.values())
        step = seq * 10 if step is None else step
        return pb.WeightsRef(run_id=self.run_id, global_step=step, publish_seq=seq, content_sha256=content)

    def begin_request(
        self, layout: Sequence[Entry], tensors: dict[str, bytes], target: pb.WeightsRef, update_id: str, **more: Any
    ) -> pb.BeginRequest:
        manifest = [entry.to_wire(hashlib.sha256(tensors[entry.name]).digest()) for entry in layout]
        fields = {"kind": pb.UPDATE_KIND_MODEL, "identity": self.describe().identity, **more}
        return pb.BeginRequest(update_id=update_id, target=target, tensors=manifest, **fields)

    def begin(self, request: pb.BeginRequest) -> pb.BeginResponse:
        begun = self.weights.Begin(request, **self.options)
        self.fencing_token = begun.fencing_token
        return begun

    def chunks(self, update_id: str, data: bytes, offset: int = 0, size: int = 1 << 20) -> Iterator[pb.UploadChunk]:
        for start in range(offset, len(data), size):
            yield pb.UploadChunk(
                update_id=update_id,
                fencing_token=self.fencing_token,
                offset=start,
                data=data[start : start + size],
            )

    def upload(self, update_id: str, data: bytes, offset: int = 0, size: int = 1 << 20) -> int:
        return int(self.weights.Upload(self.chunks(update_id, data, offset, size), **self.options).cursor)

    def commit(self, update_id: str, target: pb.WeightsRef) -> pb.CommitResponse:
        request = pb.CommitRequest(update_id=update_id, fencing_token=self.fencing_token, target=target)
        return self.weights.Commit(request, **self.options)

    def push(
        self, layout: Sequence[Entry], tensors: dict[str, bytes], seq: int, size: int = 1 << 20, **more: Any
    ) -> pb.WeightsRef:
        """A whole update: what is needed, and no more."""
        target, update_id = self.ref(tensors, seq), f"{self.run_id}-{seq}"
        begun = self.begin(self.begin_request(layout, tensors, target, update_id, **more))
        if not begun.already_resident:
            data = b"".join(tensors[layout[number].name] for number in begun.needed)
            if len(data) > begun.resume_offset:
                self.upload(update_id, data, begun.resume_offset, size)
            assert self.commit(update_id, target).resident == target
        return target

    def request(
        self, prompts: Sequence[Sequence[int]], tokens: int, ref: pb.WeightsRef | None = None, /, **more: Any
    ) -> pb.GenerateRequest:
        selector = pb.WeightsSelector(any_resident=True) if ref is None else pb.WeightsSelector(exact=ref)
        fields: dict[str, Any] = {
            "request_id": uuid.uuid4().hex,
            "weights": selector,
            "prompts": [pb.Prompt(tokens=pb.TokenIds(ids=ids)) for ids in prompts],
            "sampling": pb.Sampling(greedy=True, top_p=1),
            "stopping": pb.Stopping(max_new_tokens=tokens),
        }
        return pb.GenerateRequest(**{**fields, **more})

    def generate(self, request: pb.GenerateRequest) -> list[pb.GenerateEvent]:
        return list(self.preview.Generate(request, **self.options))

    def ask(self, prompts: Sequence[Sequence[int]], tokens: int, ref: Any = None, /, **more: Any) -> list[list[int]]:
        """Answers, put together from their deltas."""
        return answers_of(self.generate(self.request(prompts, tokens, ref, **more)), len(prompts))


def answers_of(events: Sequence[pb.GenerateEvent], rows: int) -> list[list[int]]:
    """What the events of a Generate say, checked against each other."""
    answers: list[list[int]] = [[] for _ in range(rows)]
    assert [event.event_seq for event in events] == list(range(len(events)))
    kinds = [event.WhichOneof("event") for event in events]
    assert (kinds[0], kinds[1], kinds[-1]) == ("queued", "started", "finished")
    for event in events:
        if event.HasField("delta"):
            answer = answers[event.delta.prompt_index]
            assert event.delta.first_token_index == len(answer)
            answer.extend(event.delta.token_ids)
        elif event.HasField("prompt_done"):
            done = event.prompt_done
            answers[done.prompt_index] = answers[done.prompt_index][: done.generated_tokens]
    finished = events[-1].finished
    assert finished.weights == events[1].started.weights
    assert finished.total_generated_tokens == sum(map(len, answers))
    assert finished.output_sha256 == output_digest(answers)
    return answers


def refused(call: Callable[[], Any]) -> tuple[str, str]:
    """(status code, reason) that a call fails with."""
    try:
        call()
    except grpc.RpcError as error:
        failure = failure_of(error)
        return failure.code, failure.reason
    raise AssertionError("the call was answered")
