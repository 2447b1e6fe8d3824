"""A request is split as generation splits it, and further where the worker takes less."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_trainer.preview.batches import parts_of
from lightning_trainer.preview.calls import CallFailed
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.limits import Limits
from lightning_trainer.rpc.messages import requests_from_wire, sampling_from_wire, to_wire
from lightning_trainer.types import PROMPTS_PER_BATCH, PreviewRequest, SamplingParams

LIMITS = Limits()


def request(lengths: list[int], new: int = 8, seed: int = 5) -> pb.GenerateRequest:
    asked = [PreviewRequest((1,) * length, prompt_id=str(place)) for place, length in enumerate(lengths)]
    return to_wire("r", asked, SamplingParams(max_new_tokens=new, seed=seed), pb.WeightsSelector())


def test_sixteen_prompts_are_one_batch_and_the_next_has_a_seed_of_its_own() -> None:
    parts, refused = parts_of(request([3] * (PROMPTS_PER_BATCH + 2)), LIMITS.to_wire())
    assert [part.places for part in parts] == [tuple(range(16)), (16, 17)]
    assert [(part.request.sampling.seed, part.request.request_id) for part in parts] == [(5, "r-0"), (6, "r-1")]
    assert refused == {}


def test_a_prompt_that_is_too_long_is_named_and_the_others_are_asked() -> None:
    parts, refused = parts_of(request([3, 5000, 4]), LIMITS.to_wire())
    assert [part.places for part in parts] == [(0, 2)]
    assert [prompt.prompt_id for prompt in parts[0].request.prompts] == ["0", "2"]
    assert refused == {1: "the prompt has 5000 tokens, the worker takes 4096: start it with --max-prompt-tokens 5000"}


@pytest.mark.parametrize(
    ("lengths", "new", "words"),
    [([3], 1025, "gives at most 1024: start it with --max-new-tokens 1025"), ([4097], 8, "--max-prompt-tokens 4097")],
)
def test_what_the_worker_cannot_do_at_all_is_said_and_may_be_put_right(
    lengths: list[int], new: int, words: str
) -> None:
    with pytest.raises(CallFailed, match=words) as caught:
        parts_of(request(lengths, new), LIMITS.to_wire())
    assert not caught.value.failure.permanent
    assert not caught.value.transient


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=40),
    st.integers(1, 10),
    st.integers(1, 20),
    st.integers(20, 300),
)
def test_every_prompt_is_asked_once_within_the_limits(
    lengths: list[int], new: int, most_prompts: int, most_tokens: int
) -> None:
    limits = Limits(
        max_prompts_per_request=most_prompts, max_prompt_tokens=30, max_new_tokens=10, max_total_tokens=most_tokens
    )
    try:
        parts, refused = parts_of(request(lengths, new), limits.to_wire())
    except CallFailed:
        assert all(length > min(30, most_tokens - new) for length in lengths)
        return
    asked = [place for part in parts for place in part.places]
    assert sorted([*asked, *refused]) == list(range(len(lengths)))
    assert asked == sorted(asked)
    for part in parts:
        sampling_from_wire(part.request, 384, limits)  # the worker itself takes it
        found = requests_from_wire(part.request, 384, limits)
        assert [int(prompt.prompt_id) for prompt in found] == list(part.places)
        assert len({place // PROMPTS_PER_BATCH for place in part.places}) == 1
