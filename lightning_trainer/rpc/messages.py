"""Requests as messages, and messages as requests: what comes from the wire is checked before anything is done."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any

from lightning_trainer.rpc import limits as most
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.errors import Reason, Refusal
from lightning_trainer.rpc.limits import Limits
from lightning_trainer.types import (
    AfterSequence,
    FinishReason,
    ForbidTokens,
    LogitsRule,
    PenaltyWindow,
    PreviewRequest,
    RepetitionPenalty,
    SamplingParams,
    TokenPenalty,
)

RULE_KINDS = tuple(field.name for field in pb.LogitsRule.DESCRIPTOR.oneofs_by_name["rule"].fields)

FINISH: dict[FinishReason, Any] = {
    "eos": pb.FINISH_REASON_EOS,
    "length": pb.FINISH_REASON_LENGTH,
    "non_finite": pb.FINISH_REASON_NON_FINITE,
}


def to_wire(
    request_id: str, requests: Sequence[PreviewRequest], sampling: SamplingParams, weights: pb.WeightsSelector
) -> pb.GenerateRequest:
    """One batch of prompts."""
    return pb.GenerateRequest(
        request_id=request_id,
        weights=weights,
        prompts=[_prompt(request) for request in requests],
        sampling=pb.Sampling(
            greedy=sampling.temperature == 0,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
        ),
        stopping=pb.Stopping(max_new_tokens=sampling.max_new_tokens, stop_token_ids=sampling.stop_token_ids),
    )


def _prompt(request: PreviewRequest) -> pb.Prompt:
    return pb.Prompt(
        tokens=pb.TokenIds(ids=request.prompt_ids),
        prompt_id=request.prompt_id,
        rules=[_rule(rule) for rule in request.rules],
    )


def _rule(rule: LogitsRule) -> pb.LogitsRule:
    message = pb.LogitsRule(label=rule.label)
    if isinstance(rule, TokenPenalty):
        windows = [pb.TokenPenalty.Window(steps=w.steps, multiplier=w.multiplier) for w in rule.schedule]
        message.token_penalty.CopyFrom(
            pb.TokenPenalty(token_ids=rule.token_ids, penalty=rule.penalty, schedule=windows)
        )
    elif isinstance(rule, AfterSequence):
        message.after_sequence.CopyFrom(
            pb.AfterSequence(
                triggers=[pb.TokenIds(ids=trigger) for trigger in rule.triggers],
                base_penalty=rule.base_penalty,
                growth=rule.growth,
                max_penalty=rule.max_penalty,
                exempt_ids=rule.exempt_ids,
                exempt_bonus=rule.exempt_bonus,
            )
        )
    elif isinstance(rule, ForbidTokens):
        message.forbid.CopyFrom(pb.ForbidTokens(token_ids=rule.token_ids))
    else:
        message.repetition.CopyFrom(pb.RepetitionPenalty(penalty=rule.penalty, window=rule.window))
    return message


def requests_from_wire(message: pb.GenerateRequest, vocab_size: int, limits: Limits) -> list[PreviewRequest]:
    """The prompts of a Generate.

    Raises:
        Refusal: Something is missing, unknown or over its limit.
    """
    _require(0 < len(message.prompts) <= limits.max_prompts_per_request, "prompts", len(message.prompts))
    requests = [_request(prompt, vocab_size, limits) for prompt in message.prompts]
    longest = max(len(request.prompt_ids) for request in requests)
    total = len(requests) * (longest + message.stopping.max_new_tokens)
    if total > limits.total_tokens:
        raise Refusal(
            Reason.REASON_TOKEN_BUDGET,
            f"{total} tokens (prompts x (longest + new)) are more than {limits.total_tokens}",
            ["max_total_tokens"],
        )
    return requests


def _request(prompt: pb.Prompt, vocab_size: int, limits: Limits) -> PreviewRequest:
    _require(prompt.WhichOneof("body") == "tokens", "prompts.body", prompt.WhichOneof("body"))
    ids = tuple(prompt.tokens.ids)
    if len(ids) > limits.max_prompt_tokens:
        text = f"a prompt has {len(ids)} tokens, at most {limits.max_prompt_tokens} are taken"
        raise Refusal(Reason.REASON_PROMPT_TOO_LONG, text, ["max_prompt_tokens"])
    _require(len(ids) > 0, "prompts.tokens", "none")
    _require(len(prompt.prompt_id) <= most.NAME_BYTES, "prompts.prompt_id", len(prompt.prompt_id))
    _require(len(prompt.rules) <= most.RULES_PER_PROMPT, "prompts.rules", len(prompt.rules))
    _in_vocabulary(ids, vocab_size, "prompts.tokens")
    rules = tuple(_rule_from_wire(rule, vocab_size) for rule in prompt.rules)
    forbidden = {token for rule in rules if isinstance(rule, ForbidTokens) for token in rule.token_ids}
    _require(len(forbidden) < vocab_size, "forbid.token_ids", "every token")
    return PreviewRequest(prompt_ids=ids, rules=rules, prompt_id=prompt.prompt_id)


def sampling_from_wire(message: pb.GenerateRequest, vocab_size: int, limits: Limits) -> SamplingParams:
    """How tokens are chosen.

    Raises:
        Refusal: A value is out of its range.
    """
    sampling, stopping = message.sampling, message.stopping
    _require(0 < stopping.max_new_tokens <= limits.max_new_tokens, "max_new_tokens", stopping.max_new_tokens)
    _in_vocabulary(stopping.stop_token_ids, vocab_size, "stop_token_ids")
    _require(len(stopping.stop_token_ids) <= most.TOKENS_PER_RULE, "stop_token_ids", len(stopping.stop_token_ids))
    _require(sampling.greedy or sampling.temperature > 0, "temperature", sampling.temperature)
    _require(sampling.seed < 1 << 63, "seed", sampling.seed)
    try:
        return SamplingParams(
            max_new_tokens=stopping.max_new_tokens,
            temperature=0.0 if sampling.greedy else sampling.temperature,
            top_p=1.0 if sampling.greedy else sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            stop_token_ids=tuple(stopping.stop_token_ids),
        )
    except ValueError as error:
        raise Refusal(Reason.REASON_INVALID_ARGUMENT, str(error), ["sampling"]) from error


def _rule_from_wire(message: pb.LogitsRule, vocab_size: int) -> LogitsRule:
    kind = message.WhichOneof("rule")
    if kind is None:
        raise Refusal(Reason.REASON_UNKNOWN_RULE, "a logits rule of a kind this worker does not know", ["rules"])
    _require(len(message.label) <= most.NAME_BYTES, "rules.label", len(message.label))
    if kind == "token_penalty":
        return _token_penalty(message, vocab_size)
    if kind == "after_sequence":
        return _after_sequence(message, vocab_size)
    if kind == "forbid":
        return _forbid(message, vocab_size)
    return _repetition(message)


def _token_penalty(message: pb.LogitsRule, vocab_size: int) -> TokenPenalty:
    rule = message.token_penalty
    _require(len(rule.schedule) <= most.TOKENS_PER_RULE, "token_penalty.schedule", len(rule.schedule))
    windows = tuple(
        PenaltyWindow(w.steps, _finite(w.multiplier, "token_penalty.multiplier", least=0.0)) for w in rule.schedule
    )
    penalty = _finite(rule.penalty, "token_penalty.penalty", least=0.0)
    return TokenPenalty(_ids(rule.token_ids, vocab_size, "token_penalty"), penalty, windows, message.label)


def _after_sequence(message: pb.LogitsRule, vocab_size: int) -> AfterSequence:
    rule = message.after_sequence
    _require(0 < len(rule.triggers) <= most.TRIGGERS, "after_sequence.triggers", len(rule.triggers))
    for trigger in rule.triggers:
        _require(0 < len(trigger.ids) <= most.TRIGGER_TOKENS, "after_sequence.triggers", len(trigger.ids))
    return AfterSequence(
        triggers=tuple(_ids(trigger.ids, vocab_size, "after_sequence.triggers") for trigger in rule.triggers),
        base_penalty=_finite(rule.base_penalty, "after_sequence.base_penalty", least=0.0),
        growth=_finite(rule.growth, "after_sequence.growth", least=1.0),
        max_penalty=_finite(rule.max_penalty, "after_sequence.max_penalty", least=0.0),
        exempt_ids=_ids(rule.exempt_ids, vocab_size, "after_sequence.exempt_ids"),
        exempt_bonus=_finite(rule.exempt_bonus, "after_sequence.exempt_bonus", least=0.0),
        label=message.label,
    )


def _forbid(message: pb.LogitsRule, vocab_size: int) -> ForbidTokens:
    return ForbidTokens(_ids(message.forbid.token_ids, vocab_size, "forbid"), message.label)


def _repetition(message: pb.LogitsRule) -> RepetitionPenalty:
    rule = message.repetition
    penalty = _finite(rule.penalty, "repetition.penalty", least=0.0)
    _require(penalty > 0, "repetition.penalty", penalty)
    _require(rule.window > 0, "repetition.window", rule.window)
    return RepetitionPenalty(penalty, rule.window, message.label)


def _ids(ids: Sequence[int], vocab_size: int, field: str) -> tuple[int, ...]:
    _require(len(ids) <= most.TOKENS_PER_RULE, field, len(ids))
    _in_vocabulary(ids, vocab_size, field)
    return tuple(ids)


def _in_vocabulary(ids: Iterable[int], vocab_size: int, field: str) -> None:
    largest = max(ids, default=0)
    if largest >= vocab_size:
        text = f"{field}: token {largest} is not below the vocabulary's {vocab_size}"
        raise Refusal(Reason.REASON_TOKEN_OUT_OF_VOCAB, text, [field])


def _finite(value: float, field: str, least: float) -> float:
    _require(math.isfinite(value) and value >= least, field, value)
    return value


def _require(holds: bool, field: str, value: object) -> None:
    if not holds:
        raise Refusal(Reason.REASON_INVALID_ARGUMENT, f"{field} is {value}", [field])


def output_digest(answers: Sequence[Sequence[int]]) -> bytes:
    """sha256 over (prompt index, number of tokens, tokens), each 32 bits, little-endian, in order."""
    digest = hashlib.sha256()
    for number, tokens in enumerate(answers):
        digest.update(struct.pack(f"<{len(tokens) + 2}I", number, len(tokens), *tokens))
    return digest.digest()
