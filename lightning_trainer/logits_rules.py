"""Logits rules, which are data, carried out on the scores of a batch.

Everything is derived from the token ids at each step, so nothing can go stale: rows that are reordered (beam search) or
added keep their own state.

Shapes: B rows, T tokens so far (prompt included), V scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import assert_never

import torch
from torch import Tensor

from lightning_trainer.types import (
    AfterSequence,
    ForbidTokens,
    LogitsRule,
    PenaltyWindow,
    RepetitionPenalty,
    TokenPenalty,
)

LARGEST_SCORE = 1e30
"""In size: divided by the least temperature it is still finite, and so is what is drawn from."""


def bounded(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Scores that `dtype` can hold, and no larger than may be drawn from."""
    most = min(LARGEST_SCORE, torch.finfo(dtype).max)
    return scores.clamp(-most, most)


class RuleProcessor:
    """Applies each row's own rules; also fits transformers' `generate(logits_processor=[...])`."""

    def __init__(self, rules: Sequence[Sequence[LogitsRule]], prompt_length: int | None = None) -> None:
        """Set the rules of one generation.

        Args:
            rules: One sequence of rules per prompt of the batch. Where a prompt has several rows (beams, several
                answers), they stand next to each other, as `generate` lays them.
            prompt_length: Padded prompt length; only tokens after it are looked at. None: the length at the first
                call, for `generate`, which calls with the bare prompt first; use one processor per call of it.

        Raises:
            ValueError: A repetition penalty or window is not positive.
        """
        # Forbidding comes last: what the other rules add must not bring a forbidden token back.
        self._rules = [sorted(row, key=lambda rule: isinstance(rule, ForbidTokens)) for row in rules]
        self._prompt_length = prompt_length
        for rule in (rule for row in self._rules for rule in row if isinstance(rule, RepetitionPenalty)):
            if rule.penalty <= 0 or rule.window < 1:
                raise ValueError(f"logits rule {rule.label!r} needs penalty > 0 and window >= 1, not {rule}")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """New scores for the next token; `scores` itself is not changed.

        Args:
            input_ids: (B, T) int64.
            scores: (B, V) of any floating dtype.

        Returns:
            (B, V) in the dtype of `scores`. Finite scores stay finite but for forbidden tokens, which get -inf.

        Raises:
            ValueError: The batch does not fit the rules, or a rule names a token that is not scored.
        """
        if not any(self._rules):
            return scores
        rows_per_prompt = self._rows_per_prompt(input_ids.shape[0])
        start = self._generation_start(input_ids.shape[1])
        scores = scores.clone()
        for row, generated in enumerate(input_ids[:, start:].tolist()):  # waits for the device once
            rules = self._rules[row // rows_per_prompt]
            if rules:
                scores[row] = apply_rules(rules, generated, scores[row])
        return scores

    def _rows_per_prompt(self, rows: int) -> int:
        if rows % len(self._rules):
            raise ValueError(f"a batch of {rows} rows does not fit logits rules for {len(self._rules)} prompts")
        return rows // len(self._rules)

    def _generation_start(self, length: int) -> int:
        if self._prompt_length is None:
            self._prompt_length = length
        if length < self._prompt_length:
            raise ValueError(
                f"got {length} tokens where the prompt alone has {self._prompt_length}; "
                f"make a new RuleProcessor for each generation"
            )
        return self._prompt_length


def apply_rules(rules: Sequence[LogitsRule], generated: list[int], scores: Tensor) -> Tensor:
    """The scores of one row under its rules.

    Args:
        rules: In the order they apply.
        generated: Tokens of the answer so far.
        scores: (V,).

    Returns:
        (V,) in the same dtype; finite scores stay finite, except that a forbidden token's becomes -inf.
    """
    for rule in rules:
        match rule:
            case TokenPenalty():
                scores = _penalise_tokens(rule, generated, scores)
            case AfterSequence():
                scores = _push_to_end(rule, generated, scores)
            case ForbidTokens():
                scores = _forbid(rule, scores)
            case RepetitionPenalty():
                scores = _penalise_repetition(rule, generated, scores)
            case _:
                assert_never(rule)
    return scores


def schedule_multiplier(schedule: Sequence[PenaltyWindow], step: int) -> float:
    """Multiplier for the token generated at `step` (the first is 0); 1 once every window has passed.

    Windows 4 x 8.0, 4 x 2.0: steps 0-3 -> 8.0, steps 4-7 -> 2.0, from 8 on -> 1.0.
    """
    end = 0
    for window in schedule:
        end += window.steps
        if step < end:
            return window.multiplier
    return 1.0


def tokens_after_trigger(triggers: Sequence[tuple[int, ...]], generated: list[int]) -> int | None:
    """Tokens generated since a trigger was first complete; None where none is."""
    ends = [end for trigger in triggers if trigger and (end := _end_of(trigger, generated)) is not None]
    return len(generated) - min(ends) if ends else None


def penalty_after(rule: AfterSequence, k: int) -> float:
    """`base_penalty * growth**k`, at most `max_penalty`."""
    try:
        penalty = rule.base_penalty * rule.growth**k
    except OverflowError:  # growth**k passes 1e308: the cap is what counts
        penalty = math.inf
    return min(penalty, rule.max_penalty)


def _end_of(trigger: tuple[int, ...], tokens: list[int]) -> int | None:
    """Position after the first occurrence of the trigger."""
    first, size = trigger[0], len(trigger)
    for position in range(len(tokens) - size + 1):
        if tokens[position] == first and tuple(tokens[position : position + size]) == trigger:
            return position + size
    return None


def _penalise_tokens(rule: TokenPenalty, generated: list[int], scores: Tensor) -> Tensor:
    penalty = rule.penalty * schedule_multiplier(rule.schedule, len(generated))
    ids = _kept_index(rule.token_ids, rule.label, len(scores), scores.device)
    return _changed(scores, ids, lambda values: values - penalty)


def _push_to_end(rule: AfterSequence, generated: list[int], scores: Tensor) -> Tensor:
    k = tokens_after_trigger(rule.triggers, generated)
    if k is None:
        return scores
    exempt = _marks(rule.exempt_ids, rule.label, len(scores), scores.device)
    penalty = penalty_after(rule, k)
    return _new(scores, lambda values: torch.where(exempt, values + rule.exempt_bonus, values - penalty))


def _penalise_repetition(rule: RepetitionPenalty, generated: list[int], scores: Tensor) -> Tensor:
    ids = _index(generated[-rule.window :], rule.label, len(scores), scores.device)
    return _changed(scores, ids, lambda values: torch.where(values > 0, values / rule.penalty, values * rule.penalty))


def _forbid(rule: ForbidTokens, scores: Tensor) -> Tensor:
    ids = _kept_index(rule.token_ids, rule.label, len(scores), scores.device)
    if len(ids) == scores.shape[0]:
        raise ValueError(f"logits rule {rule.label!r} forbids all {len(ids)} tokens; leave one to generate")
    return scores.index_fill(0, ids, -math.inf)


def _index(token_ids: Sequence[int], label: str, vocabulary: int, device: torch.device) -> Tensor:
    """The ids, each once, on the scores' device."""
    unique = sorted(set(token_ids))
    if unique and not 0 <= unique[0] <= unique[-1] < vocabulary:
        raise ValueError(
            f"logits rule {label!r} names tokens {unique[0]} to {unique[-1]}, the model scores {vocabulary}; "
            f"build the rules with the model's own tokenizer"
        )
    return torch.tensor(unique, dtype=torch.long, device=device)


@lru_cache(maxsize=64)
def _kept_index(token_ids: tuple[int, ...], label: str, vocabulary: int, device: torch.device) -> Tensor:
    """The same of ids that do not change, kept: a GPU is waited for where it is given numbers."""
    return _index(token_ids, label, vocabulary, device)


@lru_cache(maxsize=16)
def _marks(token_ids: tuple[int, ...], label: str, vocabulary: int, device: torch.device) -> Tensor:
    """(V,) bool, True at the ids."""
    marks = torch.zeros(vocabulary, dtype=torch.bool, device=device)
    return marks.index_fill_(0, _index(token_ids, label, vocabulary, device), value=True)


def _changed(scores: Tensor, ids: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The scores with `change` made at `ids`."""
    return scores.index_copy(0, ids, _new(scores[ids], change))


def _new(scores: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The scores after `change`, made in fp32 and clamped: in fp16, -6e4 - 1e4 would become -inf."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    new = bounded(change(wide), scores.dtype).to(scores.dtype)
    # What was infinite (already ruled out by someone else) stays as it was.
    return torch.where(scores.isfinite(), new, scores)
