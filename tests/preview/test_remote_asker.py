"""Answers are believed only where they are whole and by the weights that were asked."""

from collections.abc import Callable
from typing import Any

import pytest

from lightning_trainer.preview.asker import _Reader
from lightning_trainer.preview.calls import CallFailed
from lightning_trainer.preview.pusher import _runs
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.messages import output_digest

REF = pb.WeightsRef(run_id="run", global_step=40, publish_seq=7, content_sha256=b"\1" * 32)
OTHER = pb.WeightsRef(run_id="run", global_step=39, publish_seq=7, content_sha256=b"\1" * 32)


def events() -> list[pb.GenerateEvent]:
    """Two answers, [5, 6, 7] and [8]."""
    made = [
        pb.GenerateEvent(queued=pb.Queued()),
        pb.GenerateEvent(started=pb.Started(weights=REF)),
        pb.GenerateEvent(delta=pb.Delta(prompt_index=0, first_token_index=0, token_ids=[5, 6])),
        pb.GenerateEvent(delta=pb.Delta(prompt_index=1, first_token_index=0, token_ids=[8])),
        pb.GenerateEvent(delta=pb.Delta(prompt_index=0, first_token_index=2, token_ids=[7])),
        pb.GenerateEvent(prompt_done=pb.PromptDone(prompt_index=0, reason=pb.FINISH_REASON_LENGTH, generated_tokens=3)),
        pb.GenerateEvent(prompt_done=pb.PromptDone(prompt_index=1, reason=pb.FINISH_REASON_EOS, generated_tokens=1)),
        pb.GenerateEvent(
            finished=pb.Finished(weights=REF, decode_micros=1500, output_sha256=output_digest([[5, 6, 7], [8]]))
        ),
    ]
    for number, event in enumerate(made):
        event.event_seq = number
    return made


def read(given: list[pb.GenerateEvent]) -> Any:
    reader = _Reader(REF, 2)
    for event in given:
        reader.take(event)
    return reader.answers()


def test_answers_are_put_together_by_prompt() -> None:
    answers = read(events())
    assert (answers.tokens, answers.reasons) == ([[5, 6, 7], [8]], ["length", "eos"])
    assert answers.seconds == 0.0015


def test_an_answer_that_turned_non_finite_takes_its_tokens_back() -> None:
    given = events()
    given[5].prompt_done.CopyFrom(pb.PromptDone(prompt_index=0, reason=pb.FINISH_REASON_NON_FINITE))
    given[7].finished.output_sha256 = output_digest([[], [8]])
    answers = read(given)
    assert (answers.tokens, answers.reasons) == ([[], [8]], ["non_finite", "eos"])


def _set(number: int, path: str, value: Any) -> Callable[[list[pb.GenerateEvent]], None]:
    def change(given: list[pb.GenerateEvent]) -> None:
        *parents, leaf = path.split(".")
        target: Any = given[number]
        for name in parents:
            target = getattr(target, name)
        if isinstance(value, pb.WeightsRef):
            getattr(target, leaf).CopyFrom(value)
        else:
            setattr(target, leaf, value)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set(1, "started.weights", OTHER), "started with other weights"),
        (_set(7, "finished.weights", OTHER), "finished with other weights"),
        (_set(7, "finished.output_sha256", b"\0" * 32), "digest differs"),
        (_set(4, "event_seq", 5), "event 5 came, not 4"),
        (_set(4, "delta.first_token_index", 3), "tokens are missing"),
        (_set(2, "delta.prompt_index", 2), "tokens of no prompt"),
        (_set(5, "prompt_done.generated_tokens", 4), "tokens are missing"),
        (_set(6, "prompt_done.reason", 0), "for a reason that this side does not know"),
        (lambda given: given.pop(), "not whole"),
        (lambda given: given[0].ClearField("event"), "of a kind that this side does not know"),
    ],
)
def test_what_does_not_add_up_is_no_answer(change: Any, words: str) -> None:
    given = events()
    change(given)
    with pytest.raises(CallFailed, match=words) as caught:
        read(given)
    assert not caught.value.transient
    assert not caught.value.failure.permanent


def test_tensors_that_touch_are_sent_as_one() -> None:
    sizes = [10, 20, 0, 30, 40]
    assert list(_runs(sizes, [0, 1, 2, 3, 4])) == [(0, 100)]
    assert list(_runs(sizes, [0, 2, 3])) == [(0, 10), (30, 30)]
    assert list(_runs(sizes, [1, 4])) == [(10, 20), (60, 40)]
    assert list(_runs(sizes, [])) == []


@pytest.mark.parametrize("needed", [[5], [1, 0], [1, 1]])
def test_a_worker_that_asks_for_nonsense_is_not_obeyed(needed: list[int]) -> None:
    with pytest.raises(CallFailed, match="not in the manifest, or out of order"):
        list(_runs([10] * 5, needed))
