"""Requests over the wire and back; what is wrong is refused before anything is done with it."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.errors import Refusal
from lightning_trainer.rpc.limits import Limits
from lightning_trainer.rpc.messages import RULE_KINDS, output_digest, requests_from_wire, sampling_from_wire, to_wire
from lightning_trainer.types import (
    AfterSequence,
    ForbidTokens,
    PenaltyWindow,
    PreviewRequest,
    RepetitionPenalty,
    SamplingParams,
    TokenPenalty,
)

VOCABULARY = 500
ANY = pb.WeightsSelector(any_resident=True)

ids = st.integers(0, VOCABULARY - 1)
some = st.lists(ids, min_size=1, max_size=5).map(tuple)
amounts = st.floats(0, 1e6)
labels = st.text(max_size=8).filter(lambda text: text.isascii())
rules = st.one_of(
    st.builds(
        TokenPenalty,
        some,
        amounts,
        st.lists(st.builds(PenaltyWindow, st.integers(0, 99), amounts), max_size=3).map(tuple),
        labels,
    ),
    st.builds(
        AfterSequence,
        st.lists(some, min_size=1, max_size=3).map(tuple),
        amounts,
        st.floats(1, 10),
        amounts,
        some,
        amounts,
        labels,
    ),
    st.builds(ForbidTokens, some, labels),
    st.builds(RepetitionPenalty, st.floats(0.1, 10), st.integers(1, 99), labels),
)
requests = st.lists(
    st.builds(PreviewRequest, prompt_ids=some, rules=st.lists(rules, max_size=3).map(tuple), prompt_id=labels),
    min_size=1,
    max_size=4,
)
samplings = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 99),
    temperature=st.floats(1e-3, 5),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 99),
    seed=st.integers(0, 2**40),
    stop_token_ids=some,
)


@given(requests, samplings)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_there_and_back(asked: list[PreviewRequest], sampling: SamplingParams) -> None:
    """Numbers too, to the last bit: an answer there must be the answer here."""
    message = pb.GenerateRequest.FromString(to_wire("id", asked, sampling, ANY).SerializeToString())
    assert requests_from_wire(message, VOCABULARY, Limits()) == asked
    assert sampling_from_wire(message, VOCABULARY, Limits()) == sampling


def test_greedy() -> None:
    sampling = SamplingParams(temperature=0.0)
    message = to_wire("id", [PreviewRequest((1,))], sampling, ANY)
    assert message.sampling.greedy
    assert sampling_from_wire(message, VOCABULARY, Limits()) == sampling


def test_every_kind_of_rule_is_there() -> None:
    assert set(RULE_KINDS) == {"token_penalty", "after_sequence", "forbid", "repetition"}


def asked() -> pb.GenerateRequest:
    rule = AfterSequence(((1, 2),), 1.0, 1.1, 50.0, (3,))
    request = PreviewRequest((1, 2, 3), (rule, TokenPenalty((4,), 5.0)), "a")
    return to_wire("id", [request], SamplingParams(stop_token_ids=(3,)), ANY)


def read(message: pb.GenerateRequest) -> tuple[list[PreviewRequest], SamplingParams]:
    prompts = requests_from_wire(message, VOCABULARY, Limits())
    return prompts, sampling_from_wire(message, VOCABULARY, Limits())


def _set(path: str, value: Any) -> Any:
    def change(message: pb.GenerateRequest) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            message = message[int(parent)] if parent.isdigit() else getattr(message, parent)  # type: ignore[index]
        if value is None:
            message.ClearField(name)
        elif isinstance(value, list):
            getattr(message, name)[:] = value
        else:
            setattr(message, name, value)

    return change


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("prompts", None, "INVALID_ARGUMENT"),
        ("prompts.0.tokens", None, "INVALID_ARGUMENT"),
        ("prompts.0.tokens.ids", [], "INVALID_ARGUMENT"),
        ("prompts.0.tokens.ids", [VOCABULARY], "TOKEN_OUT_OF_VOCAB"),
        ("prompts.0.tokens.ids", [1] * 4097, "PROMPT_TOO_LONG"),
        ("prompts.0.prompt_id", "x" * 513, "INVALID_ARGUMENT"),
        ("prompts.0.rules.0.after_sequence", None, "UNKNOWN_RULE"),
        ("prompts.0.rules.0.after_sequence.max_penalty", math.inf, "INVALID_ARGUMENT"),
        ("prompts.0.rules.0.after_sequence.growth", 0.5, "INVALID_ARGUMENT"),
        ("prompts.0.rules.0.after_sequence.growth", math.nan, "INVALID_ARGUMENT"),
        ("prompts.0.rules.0.after_sequence.exempt_ids", [VOCABULARY], "TOKEN_OUT_OF_VOCAB"),
        ("prompts.0.rules.1.token_penalty.penalty", -1.0, "INVALID_ARGUMENT"),
        ("prompts.0.rules.1.token_penalty.token_ids", [1] * 4097, "INVALID_ARGUMENT"),
        ("sampling.temperature", math.nan, "INVALID_ARGUMENT"),
        ("sampling.temperature", -1.0, "INVALID_ARGUMENT"),
        ("sampling.temperature", 0.0, "INVALID_ARGUMENT"),
        ("sampling.top_p", 1.5, "INVALID_ARGUMENT"),
        ("sampling.seed", 2**63, "INVALID_ARGUMENT"),
        ("stopping.max_new_tokens", 0, "INVALID_ARGUMENT"),
        ("stopping.max_new_tokens", 1025, "INVALID_ARGUMENT"),
        ("stopping.stop_token_ids", [VOCABULARY], "TOKEN_OUT_OF_VOCAB"),
    ],
)
def test_what_is_wrong_is_refused(path: str, value: Any, reason: str) -> None:
    message = asked()
    _set(path, value)(message)
    with pytest.raises(Refusal) as refused:
        read(message)
    assert pb.ErrorDetail.Reason.Name(refused.value.reason) == f"REASON_{reason}"


def test_the_cache_has_its_budget() -> None:
    limits = dataclasses.replace(Limits(), max_total_tokens=100)
    with pytest.raises(Refusal, match="are more than 100"):
        requests_from_wire(asked(), VOCABULARY, limits)


def test_more_prompts_than_one_batch() -> None:
    message = to_wire("id", [PreviewRequest((1,))] * 17, SamplingParams(), ANY)
    with pytest.raises(Refusal, match="prompts is 17"):
        requests_from_wire(message, VOCABULARY, Limits())


def test_a_rule_of_a_later_version_is_not_left_out() -> None:
    """An unknown arm of the oneof parses as none."""
    message = asked()
    rule = pb.LogitsRule.FromString(b"\x0a\x01x\xfa\x07\x00")  # field 127
    message.prompts[0].rules.append(rule)
    with pytest.raises(Refusal, match="of a kind this worker does not know"):
        requests_from_wire(message, VOCABULARY, Limits())


def test_rules_that_together_forbid_every_token() -> None:
    halves = [ForbidTokens(tuple(range(start, VOCABULARY, 2))) for start in (0, 1)]
    message = to_wire("id", [PreviewRequest((1,), tuple(halves))], SamplingParams(), ANY)
    with pytest.raises(Refusal, match="every token"):
        requests_from_wire(message, VOCABULARY, Limits())


def test_the_digest_of_an_output_by_hand() -> None:
    raw = bytes.fromhex("000000000200000005000000060000000100000000000000")
    assert output_digest([[5, 6], []]) == hashlib.sha256(raw).digest()
