"""Which weights the worker holds, and how others take their place: all of them, verified, or none."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.errors import Reason, Refusal
from lightning_trainer.rpc.layout import check_manifest, content_digest, differing
from lightning_trainer.rpc.limits import NAME_BYTES, Limits
from lightning_trainer.worker.engine import Engine
from lightning_trainer.worker.lease import Lease
from lightning_trainer.worker.staging import Staging
from lightning_trainer.worker.update import Update, copied, require

State = pb.GetStatusResponse
KINDS = (pb.UPDATE_KIND_MODEL, pb.UPDATE_KIND_ADAPTER)


class Resident:
    """The weights in the model and the update that waits beside them.

    All methods belong to one thread, except `prepare` and `apply`: these run where the model runs, while nobody
    generates, and the one thread waits for them.

    Args:
        engine: Holds the model.
        limits: That updates keep.
        lease: Who may change the weights.

    Attributes:
        draining: The worker is about to end; nothing new begins.
        ref: Names the weights in the model; None for those it was started with.
        instance_id: New with every start of the worker.
    """

    def __init__(self, engine: Engine, limits: Limits, lease: Lease) -> None:
        self.engine, self.limits, self.lease = engine, limits, lease
        self.draining = False
        self._state: Any = State.STATE_READY
        self.ref: pb.WeightsRef | None = None
        self.instance_id = uuid.uuid4().hex
        self._update: Update | None = None
        self._look()

    def _look(self) -> None:
        """Take in what kind of update the engine is prepared for, and what it holds."""
        engine = self.engine
        self._layout = tuple(engine.layout)
        self._staging = Staging(self._layout)
        self._digests: list[bytes | None] = [*engine.digests()] if engine.has_weights else [None] * len(self._layout)
        self.identity = engine.identity

    @property
    def state(self) -> Any:
        """READY, APPLYING, POISONED or DRAINING of GetStatusResponse.State."""
        return State.STATE_DRAINING if self.draining else self._state

    @property
    def is_serving(self) -> bool:
        """Whether it can generate."""
        return bool(self.state == State.STATE_READY and self.engine.has_weights)

    @property
    def update_bytes(self) -> int:
        """Of a full update."""
        return sum(entry.nbytes for entry in self._layout)

    def choose(self, selector: pb.WeightsSelector) -> pb.WeightsRef:
        """Name of the weights that a generation which starts now is made with.

        Raises:
            Refusal: They are not those that are asked for, or the model has none.
        """
        want = selector.WhichOneof("want")
        if want is None or (want == "any_resident" and not selector.any_resident):
            raise Refusal(Reason.REASON_INVALID_ARGUMENT, "weights: none are asked for", ["weights"])
        if self.state == State.STATE_POISONED:
            raise Refusal(Reason.REASON_POISONED, "an update broke off half-way; push all weights again")
        self.refuse_when_draining()
        if not self.engine.has_weights or (want == "exact" and selector.exact != self.ref):
            raise Refusal(Reason.REASON_WEIGHTS_NOT_RESIDENT, "the worker does not hold these weights", ["weights"])
        if want == "exact":
            self.lease.renew(selector.exact.run_id)
        chosen = pb.WeightsRef()
        if self.ref is not None:
            chosen.CopyFrom(self.ref)
        return chosen

    def refuse_when_draining(self) -> None:
        """Raises:
        Refusal: The worker is about to end.
        """
        if self.draining:
            raise Refusal(Reason.REASON_UNAVAILABLE, "the worker is about to end")

    def admit(self, request: pb.BeginRequest) -> bool:
        """Check what can be checked before the model is touched.

        Returns:
            Whether `prepare` must be called before `begin`.

        Raises:
            Refusal: It is of another model or another run, or makes no sense.
        """
        self.refuse_when_draining()
        target = request.target
        require(0 < len(request.update_id) <= NAME_BYTES, "update_id")
        require(0 < len(target.run_id) <= NAME_BYTES, "target.run_id")
        require(len(target.content_sha256) == 32, "target.content_sha256")
        require(request.kind in KINDS, "kind")
        if len(request.tensors) > self.limits.max_manifest_tensors:
            text = f"the manifest has {len(request.tensors)} tensors"
            raise Refusal(Reason.REASON_MANIFEST_INVALID, text, ["max_manifest_tensors"])
        self._same_model(request)
        self.lease.refuse_others(target.run_id)
        return not self.engine.is_prepared(request.kind, request.adapter)

    def _same_model(self, request: pb.BeginRequest) -> None:
        unlike = differing(self.identity, request.identity)
        if request.kind == pb.UPDATE_KIND_ADAPTER and not request.identity.frozen_base_sha256:
            unlike.append("frozen_base_sha256")
        if unlike:
            text = f"trainer and worker differ in {', '.join(unlike)}"
            raise Refusal(Reason.REASON_IDENTITY_MISMATCH, text, unlike)

    def prepare(self, request: pb.BeginRequest) -> None:
        """Get the model ready for an update of another kind; what was resident is gone then.

        Raises:
            Refusal: The adapters described do not fit the model.
        """
        self._update, self.ref = None, None
        try:
            self.engine.prepare(request.kind, request.adapter)
        finally:
            self._look()
        self._state = State.STATE_READY  # POISONED or not, the model was built anew
        self._same_model(request)  # what lies on the disk may be another by now

    def begin(self, request: pb.BeginRequest) -> pb.BeginResponse:
        """Begin an update, or go on with it.

        Raises:
            Refusal: The manifest is not the layout, another run holds the worker, or something newer is resident.
        """
        target = request.target
        check_manifest(request.tensors, self._layout)
        self.lease.take(target.run_id)
        digests = tuple(entry.sha256 for entry in request.tensors)
        response = pb.BeginResponse(
            worker_instance_id=self.instance_id,
            fencing_token=self.lease.token,
            chunk_bytes=self.limits.max_chunk_bytes,
        )
        self._refuse_stale(target)
        if self._is_live(digests, target):
            self._label(target)
            response.already_resident = True
            return response
        update = self._resumed(request.update_id, target, digests)
        update.stream = None
        response.needed.extend(update.needed)
        response.resume_offset = self._staging.cursor
        return response

    def _refuse_stale(self, target: pb.WeightsRef) -> None:
        lease = self.lease
        goes_on = target.publish_seq > lease.last_seq and target.publish_seq >= lease.begun_seq
        if not goes_on and target != self.ref:
            text = f"publication {target.publish_seq} comes after {max(lease.last_seq, lease.begun_seq)}"
            raise Refusal(Reason.REASON_STALE_PUBLISH, text, ["publish_seq"])
        lease.begun_seq = max(lease.begun_seq, target.publish_seq)

    def _is_live(self, digests: Sequence[bytes], target: pb.WeightsRef) -> bool:
        same = [*digests] == self._digests and content_digest(digests) == target.content_sha256
        return same and self.is_serving

    def _resumed(self, update_id: str, target: pb.WeightsRef, digests: tuple[bytes, ...]) -> Update:
        now = self._update
        if now is None or (now.update_id, now.target, now.digests) != (update_id, target, digests):
            needed = self._lacking(digests)
            self._staging.expect(needed)
            now = self._update = Update(update_id, copied(target), digests, tuple(needed))
        return now

    def chunk(self, chunk: pb.UploadChunk, stream: object) -> int:
        """Take bytes.

        Args:
            stream: Stands for the upload they came by: once another goes on with the update, it may not.

        Returns:
            Bytes taken of the needed tensors, laid end to end.

        Raises:
            Refusal: They are not those that come next.
        """
        update = self._current(chunk.update_id, chunk.fencing_token)
        if update.stream is not None and update.stream is not stream:
            raise Refusal(Reason.REASON_FENCED, "another upload goes on with this update", ["update_id"])
        update.stream = stream
        size, cursor = len(chunk.data), self._staging.cursor
        require(0 < size <= self.limits.max_chunk_bytes, "data")
        if chunk.offset != cursor:
            text = f"bytes from {chunk.offset} came where those from {cursor} are next"
            raise Refusal(Reason.REASON_INVALID_ARGUMENT, text, ["offset"])
        self._staging.take(chunk.data)
        return self._staging.cursor

    def _current(self, update_id: str, token: int) -> Update:
        self.refuse_when_draining()
        self.lease.check(token)
        if self._update is None or self._update.update_id != update_id:
            raise Refusal(Reason.REASON_FENCED, "this update is no longer there: begin again", ["update_id"])
        return self._update

    def abort(self, update_id: str, token: int) -> None:
        """Forget an update; one that is not there any more is no fault.

        Raises:
            Refusal: The token is of a lease that has ended.
        """
        self.lease.check(token)
        if self._update is not None and self._update.update_id == update_id:
            self._update = None

    def release(self, token: int) -> None:
        """Forget the update under way, and the run's right to begin others.

        Raises:
            Refusal: The token is of a lease that has ended.
        """
        self.lease.release(token)
        self._update = None

    def is_committed(self, target: pb.WeightsRef) -> bool:
        """Whether the model has these weights already, under this name."""
        return self.ref is not None and target == self.ref

    def verify(self, request: pb.CommitRequest) -> Update:
        """The update, once all of its bytes are there and right.

        Raises:
            Refusal: Some are missing, or digests differ; what is resident stays.
        """
        update = self._current(request.update_id, request.fencing_token)
        require(request.target == update.target, "target")
        if self._staging.cursor != self._staging.total:
            text = f"{self._staging.cursor} of {self._staging.total} bytes have come"
            raise Refusal(Reason.REASON_INVALID_ARGUMENT, text, ["cursor"])
        wrong = [self._layout[n].name for n in self._lacking(update.digests)]
        if wrong or content_digest(update.digests) != update.target.content_sha256:
            self._update = None
            text = f"digests differ: {', '.join(wrong[:3]) or 'content_sha256'}"
            raise Refusal(Reason.REASON_DIGEST_MISMATCH, text, wrong or ["content_sha256"])
        return update

    def apply(self, update: Update) -> None:
        """Write a verified update into the model.

        Raises:
            Refusal: That broke off; the worker is POISONED until an update of every tensor has been written.
        """
        changed = [n for n, digest in enumerate(update.digests) if self._digests[n] != digest]
        self._update, self._state = None, State.STATE_APPLYING
        try:
            self.engine.apply({self._layout[n].name: self._staging.bytes_of(n) for n in changed})
        except Exception as error:  # whatever it was, the model is half one thing and half another
            self.ref, self._state, self._digests = None, State.STATE_POISONED, [None] * len(self._layout)
            self._staging.held.clear()
            raise Refusal(Reason.REASON_POISONED, "the update broke off half-way; push all weights again") from error
        self._digests, self._state = [*update.digests], State.STATE_READY
        self._label(update.target)

    def _label(self, target: pb.WeightsRef) -> None:
        self.ref, self.lease.last_seq = copied(target), target.publish_seq

    def _lacking(self, digests: Sequence[bytes]) -> list[int]:
        """Numbers of the tensors that are neither resident nor staged."""
        held = self._staging.held
        return [n for n, digest in enumerate(digests) if self._digests[n] != digest and held.get(n) != digest]
