"""Pusher: brings the weights in a slot to the worker, so that it holds exactly them."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

from lightning_trainer.preview.calls import CallFailed, Worker, as_call_failed
from lightning_trainer.preview.dialogue import Setup
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.layout import content_digest
from lightning_trainer.rpc.limits import CHUNK_BYTES, WIRE_MINOR

SLOWEST = 1 << 18
"""Bytes a second that an upload may always take: its deadline is there for what the watchdog does not see."""

PAUSES = (0.1, 0.5, 1.0, 2.0)
"""Seconds before an upload that broke off is taken up again; the last is repeated."""


@dataclass(frozen=True)
class Pushed:
    """Weights that the worker holds.

    Attributes:
        sent: Bytes that went over the wire.
    """

    ref: pb.WeightsRef
    seconds: float
    sent: int


@dataclass
class _Update:
    """One update under way."""

    begin: pb.BeginRequest
    view: memoryview
    sent: int = 0
    begun: bool = False
    uploaded: bool = False
    arrived: int = -1
    moved: float = 0.0


class Pusher:
    """Begin, Upload, Commit.

    Args:
        worker: To be called.
        setup: Says what the model is.

    Attributes:
        lease: Fencing token of the worker's lease, once it has been taken; None: it is another's.
        instance: Of the worker that last took an update.
        ends: Set when the run ends: nothing is begun any more.
    """

    def __init__(self, worker: Worker, setup: Setup) -> None:
        self._worker, self._setup = worker, setup
        self._best_rate = 4.0 * SLOWEST
        self.lease: int | None = None
        self.ends = False
        self.instance = ""

    def push(self, view: memoryview, step: int, sequence: int) -> Pushed:
        """Bring the weights in `view` to the worker.

        An upload that breaks off is taken up again where the worker says it has got to.

        Raises:
            CallFailed: They are not there.
        """
        started = time.monotonic()
        update = _Update(self._begin_request(view, step, sequence), view, moved=started)
        for pause in chain(PAUSES, repeat(PAUSES[-1])):
            try:
                self._once(update)
                break
            except CallFailed as error:
                late = time.monotonic() - update.moved > self._setup.deadlines.resume
                if not (error.transient and update.begun) or late:
                    raise
            time.sleep(pause)
        return Pushed(update.begin.target, time.monotonic() - started, update.sent)

    def _begin_request(self, view: memoryview, step: int, sequence: int) -> pb.BeginRequest:
        setup, digests, start = self._setup, [], 0
        for entry in setup.layout:
            digests.append(hashlib.sha256(view[start : start + entry.nbytes]).digest())
            start += entry.nbytes
        return pb.BeginRequest(
            update_id=f"{sequence}-{uuid.uuid4().hex[:16]}",
            wire_minor=WIRE_MINOR,
            identity=pb.ModelIdentity.FromString(setup.identity),
            kind=setup.kind,  # type: ignore[arg-type]
            target=pb.WeightsRef(
                run_id=setup.run_id, global_step=step, publish_seq=sequence, content_sha256=content_digest(digests)
            ),
            tensors=[entry.to_wire(digest) for entry, digest in zip(setup.layout, digests, strict=True)],
            adapter=pb.AdapterSpec.FromString(setup.adapter) if setup.adapter else None,
        )

    def _once(self, update: _Update) -> None:
        deadlines, update_id = self._setup.deadlines, update.begin.update_id
        if self.ends:
            raise CallFailed.never("the run has ended")
        with as_call_failed():
            plan = self._worker.weights.Begin(update.begin, timeout=deadlines.begin, metadata=self._worker.metadata)
        update.begun, self.instance, self.lease = True, plan.worker_instance_id, plan.fencing_token
        if plan.resume_offset > update.arrived:  # progress is what the worker has, not what was handed to gRPC
            update.arrived, update.moved = plan.resume_offset, time.monotonic()
        if plan.already_resident:
            return
        self._upload(update, plan)
        request = pb.CommitRequest(update_id=update_id, fencing_token=plan.fencing_token, target=update.begin.target)
        if not update.uploaded:  # one more Begin tells whether a Commit without an answer was carried out
            update.uploaded, update.moved = True, time.monotonic() + deadlines.commit
        with as_call_failed():
            done = self._worker.weights.Commit(request, timeout=deadlines.commit, metadata=self._worker.metadata)
        if done.resident != update.begin.target:
            raise CallFailed.wrong("the worker committed other weights than it was sent")

    def _upload(self, update: _Update, plan: pb.BeginResponse) -> None:
        runs = list(_runs([entry.nbytes for entry in self._setup.layout], plan.needed))
        total = sum(size for _, size in runs)
        if plan.resume_offset >= total:
            return
        worker, started, before = self._worker, time.monotonic(), update.sent
        limit = 30.0 + (total - plan.resume_offset) / (self._best_rate / 4)
        call = worker.weights.Upload.future(self._chunks(update, plan, runs), timeout=limit, metadata=worker.metadata)
        with worker.watchdog.over(call, self._setup.deadlines.stall, "upload of weights"):
            cursor = call.result(timeout=limit + 5).cursor
        if cursor != total:
            raise CallFailed.wrong(f"the worker has {cursor} bytes of {total}")
        self._best_rate = max(self._best_rate, (update.sent - before) / (time.monotonic() - started))

    def _chunks(
        self, update: _Update, plan: pb.BeginResponse, runs: Sequence[tuple[int, int]]
    ) -> Iterator[pb.UploadChunk]:
        """The bytes from `resume_offset` on; gRPC pulls the next as it has sent the one before."""
        size = min(CHUNK_BYTES, plan.chunk_bytes or CHUNK_BYTES)
        offset = 0  # of the run, in the needed tensors laid end to end
        for start, length in runs:
            for at in range(max(0, plan.resume_offset - offset), length, size):
                data = bytes(update.view[start + at : start + min(at + size, length)])
                update.sent += len(data)
                self._worker.watchdog.moved()
                yield pb.UploadChunk(
                    update_id=update.begin.update_id,
                    fencing_token=plan.fencing_token,
                    offset=offset + at,
                    data=data,
                )
            offset += length

    def renew(self) -> None:
        """Keep the worker for this run while there is nothing to push.

        Raises:
            CallFailed: It does not answer.
        """
        if self.lease is None:
            return
        request, deadline = pb.LeaseRequest(fencing_token=self.lease), self._setup.deadlines.renew
        try:
            with as_call_failed():
                self._worker.weights.Renew(request, timeout=deadline, metadata=self._worker.metadata)
        except CallFailed as error:
            self.lease = None  # the next push begins anew
            if error.failure.reason != "FENCED":
                raise

    def release(self) -> None:
        """Let another run have the worker, which forgets what it holds half of.

        Raises:
            CallFailed: It was not told; it will find out, only later.
        """
        if self.lease is None:
            return
        request, deadline = pb.LeaseRequest(fencing_token=self.lease), self._setup.deadlines.release
        with as_call_failed():
            self._worker.weights.Release(request, timeout=deadline, metadata=self._worker.metadata)


def _runs(sizes: Sequence[int], needed: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, length) of the needed tensors in the slot; those that touch are one.

    Raises:
        CallFailed: The worker asks for what there is not, or in another order.
    """
    if any(number >= len(sizes) for number in needed) or list(needed) != sorted(set(needed)):
        raise CallFailed.wrong("the worker asks for tensors that are not in the manifest, or out of order")
    wanted, at, run = set(needed), 0, 0
    for number, size in enumerate(sizes):
        if number in wanted:
            run += size
        elif run:
            yield at - run, run
            run = 0
        at += size
    if run:
        yield at - run, run
