"""What the worker holds: leases, publications, staged bytes, commits. No network."""

import hashlib
import time
from typing import Any

import pytest
from fake_engine import ADAPTER, SMALL, FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.errors import Refusal
from lightning_trainer.rpc.layout import content_digest
from lightning_trainer.rpc.limits import Limits
from lightning_trainer.worker.lease import Lease
from lightning_trainer.worker.resident import Resident, State

R = pb.ErrorDetail


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def held(clock: Clock) -> Resident:
    return Resident(FakeEngine(), Limits(max_chunk_bytes=1000), Lease(60.0, clock))


def filled(value: int, layout: Any = SMALL) -> dict[str, bytes]:
    return {entry.name: bytes([value]) * entry.nbytes for entry in layout}


def ref(tensors: dict[str, bytes], seq: int, run: str = "run") -> pb.WeightsRef:
    content = content_digest(hashlib.sha256(v).digest() for v in tensors.values())
    return pb.WeightsRef(run_id=run, global_step=seq, publish_seq=seq, content_sha256=content)


def request(held: Resident, tensors: dict[str, bytes], seq: int, run: str = "run", layout: Any = SMALL) -> Any:
    manifest = [entry.to_wire(hashlib.sha256(tensors[entry.name]).digest()) for entry in layout]
    return pb.BeginRequest(
        update_id=f"{run}-{seq}",
        identity=held.identity,
        kind=pb.UPDATE_KIND_MODEL,
        target=ref(tensors, seq, run),
        tensors=manifest,
    )


def begin(held: Resident, message: pb.BeginRequest) -> pb.BeginResponse:
    if held.admit(message):
        held.prepare(message)
    return held.begin(message)


def send(held: Resident, begun: Any, update_id: str, data: bytes, stream: object = "s", size: int = 1000) -> None:
    for start in range(begun.resume_offset, len(data), size):
        chunk = pb.UploadChunk(
            update_id=update_id, fencing_token=begun.fencing_token, offset=start, data=data[start : start + size]
        )
        held.chunk(chunk, stream)


def commit(held: Resident, begun: Any, message: pb.BeginRequest) -> None:
    held.apply(
        held.verify(
            pb.CommitRequest(update_id=message.update_id, fencing_token=begun.fencing_token, target=message.target)
        )
    )


def push(held: Resident, tensors: dict[str, bytes], seq: int, run: str = "run") -> pb.BeginResponse:
    message = request(held, tensors, seq, run)
    begun = begin(held, message)
    if not begun.already_resident:
        send(held, begun, message.update_id, b"".join(tensors[SMALL[n].name] for n in begun.needed))
        commit(held, begun, message)
    return begun


def reason(call: Any) -> int:
    with pytest.raises(Refusal) as refusal:
        call()
    return int(refusal.value.reason)


def test_a_push_becomes_resident_under_its_name(held: Resident) -> None:
    push(held, filled(1), 1)
    assert held.ref == ref(filled(1), 1)
    assert held.engine.content() == held.ref.content_sha256


def test_only_unequal_tensors_are_needed_and_equal_content_only_gets_a_new_name(held: Resident) -> None:
    push(held, filled(1), 1)
    second = {**filled(1), "c": bytes([2]) * 4000}
    assert list(push(held, second, 2).needed) == [2]
    assert held.engine.applied[-1] == ["c"]
    begun = begin(held, request(held, second, 3))
    assert begun.already_resident
    assert held.ref.publish_seq == 3


def test_tensors_staged_for_an_update_that_was_given_up_are_not_sent_again(held: Resident) -> None:
    message = request(held, filled(1), 1)
    begun = begin(held, message)
    send(held, begun, message.update_id, filled(1)["a"] + filled(1)["b"] + b"\1" * 10)
    newer = {**filled(3), "a": filled(1)["a"]}
    assert [SMALL[n].name for n in begin(held, request(held, newer, 2)).needed] == ["b", "c"]


def test_the_same_update_goes_on_where_it_was(held: Resident) -> None:
    message = request(held, filled(1), 1)
    begun = begin(held, message)
    data = b"".join(filled(1).values())
    send(held, begun, message.update_id, data[:1500])
    again = begin(held, message)
    assert (again.resume_offset, list(again.needed)) == (1500, list(begun.needed))
    send(held, again, message.update_id, data, stream="another")
    commit(held, again, message)
    assert held.ref == message.target


def test_an_upload_that_another_took_over_is_fenced(held: Resident) -> None:
    message = request(held, filled(1), 1)
    begun = begin(held, message)
    send(held, begun, message.update_id, b"\1" * 100, "first")
    begun = begin(held, message)
    send(held, begun, message.update_id, b"\1" * 200, "second")
    begun.resume_offset = 200
    assert reason(lambda: send(held, begun, message.update_id, b"\1" * 300, "first")) == R.REASON_FENCED


def test_chunks_must_follow_each_other_and_end_with_the_update(held: Resident) -> None:
    message = request(held, filled(1), 1)
    begun = begin(held, message)
    total = sum(entry.nbytes for entry in SMALL)
    for offset, data in [(1, b"x"), (0, b""), (0, b"x" * 1001)]:
        chunk = pb.UploadChunk(update_id="run-1", fencing_token=begun.fencing_token, offset=offset, data=data)
        assert reason(lambda chunk=chunk: held.chunk(chunk, "s")) == R.REASON_INVALID_ARGUMENT
    assert reason(lambda: commit(held, begun, message)) == R.REASON_INVALID_ARGUMENT
    assert reason(lambda: send(held, begun, "run-1", b"\1" * (total + 1))) == R.REASON_INVALID_ARGUMENT


def test_23_a_flipped_bit_is_found_and_what_is_resident_stays(held: Resident) -> None:
    push(held, filled(1), 1)
    message = request(held, filled(2), 2)
    begun = begin(held, message)
    data = bytearray(b"".join(filled(2).values()))
    data[20] ^= 4  # in b
    send(held, begun, message.update_id, bytes(data))
    assert reason(lambda: commit(held, begun, message)) == R.REASON_DIGEST_MISMATCH
    assert (held.ref, held.engine.content()) == (ref(filled(1), 1), ref(filled(1), 1).content_sha256)
    again = begin(held, message)
    assert [SMALL[n].name for n in again.needed] == ["b"]
    send(held, again, message.update_id, filled(2)["b"])
    commit(held, again, message)
    assert held.ref == message.target


def test_23_a_content_digest_that_is_not_of_the_manifest_is_refused(held: Resident) -> None:
    message = request(held, filled(1), 1)
    message.target.content_sha256 = bytes(32)
    begun = begin(held, message)
    send(held, begun, message.update_id, b"".join(filled(1).values()))
    assert reason(lambda: commit(held, begun, message)) == R.REASON_DIGEST_MISMATCH
    assert held.ref is None


@pytest.mark.parametrize("after", [0, 2])
def test_17_an_update_that_breaks_off_poisons_until_every_tensor_is_written(held: Resident, after: int) -> None:
    push(held, filled(1), 1)
    held.engine.fail_apply_after = after
    assert reason(lambda: push(held, filled(2), 2)) == R.REASON_POISONED
    assert (held.state, held.ref, held.is_serving) == (State.STATE_POISONED, None, False)
    for want in ({"any_resident": True}, {"exact": ref(filled(1), 1)}):
        assert reason(lambda want=want: held.choose(pb.WeightsSelector(**want))) == R.REASON_POISONED
    assert len(push(held, filled(2), 3).needed) == len(SMALL)
    assert held.engine.applied[-1] == [entry.name for entry in SMALL]
    assert (held.state, held.ref) == (State.STATE_READY, ref(filled(2), 3))


def test_24_a_second_run_waits_until_the_lease_ends(held: Resident, clock: Clock) -> None:
    first = push(held, filled(1), 1)
    clock.now += 20
    with pytest.raises(Refusal) as refusal:
        begin(held, request(held, filled(2), 1, "other"))
    assert (refusal.value.reason, refusal.value.code) == (R.REASON_LEASE_HELD, "FAILED_PRECONDITION")
    assert refusal.value.retry_after_millis == pytest.approx(40_000, abs=2)
    clock.now += 41
    assert push(held, filled(2), 1, "other").fencing_token > first.fencing_token
    assert held.ref == ref(filled(2), 1, "other")


def test_24_generating_with_its_weights_keeps_a_run_its_lease(held: Resident, clock: Clock) -> None:
    push(held, filled(1), 1)
    for _ in range(5):
        clock.now += 50
        held.choose(pb.WeightsSelector(exact=ref(filled(1), 1)))
    assert held.lease.remaining == 60
    held.choose(pb.WeightsSelector(any_resident=True))
    clock.now += 50
    assert held.lease.remaining == 10


def test_25_a_run_that_was_paused_for_longer_than_its_lease_is_fenced(held: Resident, clock: Clock) -> None:
    message = request(held, filled(1), 1)
    begun = begin(held, message)
    send(held, begun, message.update_id, b"\1" * 500)
    clock.now += 61
    begun.resume_offset = 500
    late = [
        lambda: send(held, begun, message.update_id, b"\1" * 600),
        lambda: commit(held, begun, message),
        lambda: held.abort(message.update_id, begun.fencing_token),
    ]
    assert [reason(call) for call in late] == [R.REASON_FENCED] * 3
    push(held, filled(2), 1, "other")
    assert [reason(call) for call in late] == [R.REASON_FENCED] * 3
    assert held.ref == ref(filled(2), 1, "other")


def test_a_run_that_has_ended_lets_the_next_begin_at_once(held: Resident) -> None:
    message = request(held, filled(1), 1)
    begun = begin(held, message)
    send(held, begun, message.update_id, b"\1" * 500)
    held.release(begun.fencing_token)
    late = [
        lambda: held.release(begun.fencing_token),
        lambda: held.abort(message.update_id, begun.fencing_token),
        lambda: commit(held, begun, message),
    ]
    assert [reason(call) for call in late] == [R.REASON_FENCED] * 3
    push(held, filled(2), 1, "other")
    assert held.ref == ref(filled(2), 1, "other")
    assert [reason(call) for call in late] == [R.REASON_FENCED] * 3


def test_26_publications_only_go_up_within_a_lease(held: Resident, clock: Clock) -> None:
    push(held, filled(1), 5)
    for seq in (4, 5):
        assert reason(lambda seq=seq: push(held, filled(2), seq)) == R.REASON_STALE_PUBLISH
    begin(held, request(held, filled(2), 7))
    assert reason(lambda: begin(held, request(held, filled(3), 6))) == R.REASON_STALE_PUBLISH
    clock.now += 61  # a new lease counts anew: after a resume, steps may be lower
    push(held, filled(2), 1)
    assert held.ref.publish_seq == 1


def test_40_a_commit_whose_answer_was_lost_is_answered_again(held: Resident) -> None:
    push(held, filled(1), 1)
    assert held.is_committed(ref(filled(1), 1))
    assert not held.is_committed(ref(filled(1), 2))
    assert begin(held, request(held, filled(1), 1)).already_resident


def test_41_the_time_of_day_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Resident(FakeEngine(), Limits(), Lease(60.0))
    push(held, filled(1), 1)
    for skew in (-86400, 86400):
        monkeypatch.setattr(time, "time", lambda skew=skew: 1.7e9 + skew)
        assert 59 < held.lease.remaining <= 60
        assert reason(lambda: begin(held, request(held, filled(2), 1, "other"))) == R.REASON_LEASE_HELD


def test_another_kind_takes_the_model_back_to_its_own_weights(held: Resident) -> None:
    push(held, filled(1), 1)
    tensors = filled(4, ADAPTER)
    message = request(held, tensors, 2, layout=ADAPTER)
    message.kind, message.adapter.rank = pb.UPDATE_KIND_ADAPTER, 2
    message.identity.frozen_base_sha256 = b"\1" * 32
    begun = begin(held, message)
    assert held.ref is None
    send(held, begun, message.update_id, b"".join(tensors.values()))
    commit(held, begun, message)
    assert held.engine.content() == message.target.content_sha256
    push(held, filled(1), 3)
    assert held.engine.content() == ref(filled(1), 3).content_sha256


def test_30_what_differs_is_named(held: Resident) -> None:
    for field, value in [("vocab_size", 1), ("layout_sha256", b"x"), ("dtype", pb.DTYPE_BF16), ("total_bytes", 1)]:
        message = request(held, filled(1), 1)
        setattr(message.identity, field, value)
        with pytest.raises(Refusal) as refusal:
            begin(held, message)
        assert (refusal.value.reason, refusal.value.fields) == (R.REASON_IDENTITY_MISMATCH, (field,))
    assert held.lease.remaining == 0


def bomb(change: dict[str, Any]) -> Any:
    def explode(message: pb.BeginRequest) -> None:
        for name, value in change.items():
            if name == "shape":
                del message.tensors[0].shape[:]
                message.tensors[0].shape.extend(value)
            else:
                setattr(message.tensors[0], name, value)

    return explode


BOMBS = {
    "u64": bomb({"nbytes": 2**64 - 1, "encoded_nbytes": 2**64 - 1}),
    "overflow": bomb({"shape": [4194305, 4194305, 211106198978564]}),
    "many dimensions": bomb({"shape": [1] * 100_000}),
    "unknown name": bomb({"name": "z"}),
    "a path": bomb({"name": "../../etc/passwd"}),
    "duplicate": lambda message: message.tensors[0].CopyFrom(message.tensors[1]),
    "one too few": lambda message: message.tensors.pop(),
    "compressed": bomb({"encoded_nbytes": 1}),
    "another encoding": bomb({"encoding": 2}),
    "no encoding": bomb({"encoding": 0}),
    "unknown dtype": bomb({"dtype": 77}),
    "short digest": bomb({"sha256": b"x"}),
    "a million": lambda message: message.tensors.extend([message.tensors[0]] * 1_000_000),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_33_a_manifest_only_selects(held: Resident, kind: str) -> None:
    message = request(held, filled(1), 1)
    BOMBS[kind](message)
    staging, started = held._staging, time.perf_counter()
    assert reason(lambda: begin(held, message)) == R.REASON_MANIFEST_INVALID
    assert time.perf_counter() - started < 0.1
    assert held._staging is staging


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "name": st.text(max_size=20),
            "dtype": st.integers(0, 100),
            "shape": st.lists(st.integers(0, 2**64 - 1), max_size=9),
            "nbytes": st.integers(0, 2**64 - 1),
            "sha256": st.binary(max_size=40),
            "encoding": st.integers(0, 5),
            "encoded_nbytes": st.integers(0, 2**64 - 1),
        },
    ).filter(bool),
    st.integers(0, len(SMALL) - 1),
)
@settings(max_examples=150, deadline=None)
def test_33_no_manifest_but_the_layout_is_taken(entry: dict[str, Any], place: int) -> None:
    held = Resident(FakeEngine(), Limits(), Lease())
    message = request(held, filled(1), 1)
    right = pb.TensorEntry()
    right.CopyFrom(message.tensors[place])
    for name in entry:
        message.tensors[place].ClearField(name)
    message.tensors[place].MergeFrom(pb.TensorEntry(**entry))
    given = message.tensors[place]
    wrong = {name for name in entry if name != "sha256" and getattr(right, name) != getattr(given, name)}
    if wrong or len(given.sha256) != 32:
        assert reason(lambda: begin(held, message)) == R.REASON_MANIFEST_INVALID


@pytest.mark.parametrize("field", ["update_id", "run_id", "content_sha256", "kind"])
def test_begin_needs_all_its_fields(held: Resident, field: str) -> None:
    message = request(held, filled(1), 1)
    (message if field in ("update_id", "kind") else message.target).ClearField(field)
    assert reason(lambda: begin(held, message)) == R.REASON_INVALID_ARGUMENT


def test_a_worker_that_ends_begins_nothing(held: Resident) -> None:
    message = request(held, filled(1), 1)
    begun = begin(held, message)
    held.draining = True
    assert held.state == State.STATE_DRAINING
    calls = [
        lambda: begin(held, message),
        lambda: send(held, begun, message.update_id, b"\1"),
        lambda: held.choose(pb.WeightsSelector(any_resident=True)),
    ]
    assert [reason(call) for call in calls] == [R.REASON_UNAVAILABLE] * 3


def test_generate_names_the_weights_it_wants(held: Resident) -> None:
    for selector in (pb.WeightsSelector(), pb.WeightsSelector(any_resident=False)):
        assert reason(lambda selector=selector: held.choose(selector)) == R.REASON_INVALID_ARGUMENT
    assert held.choose(pb.WeightsSelector(any_resident=True)) == pb.WeightsRef()
    push(held, filled(1), 1)
    chosen = held.choose(pb.WeightsSelector(exact=ref(filled(1), 1)))
    push(held, filled(2), 2)
    assert chosen == ref(filled(1), 1)
    assert reason(lambda: held.choose(pb.WeightsSelector(exact=chosen))) == R.REASON_WEIGHTS_NOT_RESIDENT
