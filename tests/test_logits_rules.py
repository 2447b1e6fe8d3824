"""Logits rules carried out on scores, values by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_trainer.logits_rules import RuleProcessor, penalty_after, schedule_multiplier, tokens_after_trigger
from lightning_trainer.types import (
    AfterSequence,
    ForbidTokens,
    LogitsRule,
    PenaltyWindow,
    RepetitionPenalty,
    TokenPenalty,
)

V = 8
EOS = 7
WINDOWS = (PenaltyWindow(4, 8.0), PenaltyWindow(4, 2.0), PenaltyWindow(4, 1.5))
STOP = AfterSequence(((3, 3),), base_penalty=100.0, growth=10.0, max_penalty=1e4, exempt_ids=(EOS,), exempt_bonus=50.0)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _run(rules: list[LogitsRule], generated: list[int], scores: list[float] | None = None) -> list[float]:
    """New scores of one row after a prompt of two tokens, which would trigger everything."""
    ids = torch.tensor([[3, 3, *generated]])
    new: list[float] = RuleProcessor([rules], prompt_length=2)(ids, torch.tensor([scores or [0.0] * V]))[0].tolist()
    return new


def test_schedule_by_hand() -> None:
    multipliers = [schedule_multiplier(WINDOWS, step) for step in range(14)]
    assert multipliers == [8.0] * 4 + [2.0] * 4 + [1.5] * 4 + [1.0] * 2
    assert schedule_multiplier((), 0) == 1.0


@pytest.mark.parametrize(("step", "penalty"), [(0, 640.0), (3, 640.0), (4, 160.0), (8, 120.0), (12, 80.0)])
def test_token_penalty_follows_the_schedule(step: int, penalty: float) -> None:
    new = _run([TokenPenalty((1, 2), 80.0, WINDOWS)], [0] * step)
    assert new == [0.0, -penalty, -penalty, 0.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("generated", "k"),
    [
        ([], None),
        ([3], None),
        ([3, 1, 3], None),
        ([3, 3], 0),
        ([3, 3, 1], 1),
        ([1, 3, 3, 3], 1),
        ([3, 3, 0, 3, 3], 3),
        ([5, 6, 3, 3], 2),
    ],
)
def test_tokens_after_the_first_complete_trigger(generated: list[int], k: int | None) -> None:
    assert tokens_after_trigger(((3, 3), (5, 6)), generated) == k


@pytest.mark.parametrize(("k", "penalty"), [(0, 100.0), (1, 1000.0), (2, 1e4), (3, 1e4), (5000, 1e4)])
def test_after_sequence_grows_to_its_cap(k: int, penalty: float) -> None:
    assert penalty_after(STOP, k) == penalty
    assert _run([STOP], [3, 3] + [0] * k) == [-penalty] * EOS + [50.0]


def test_the_prompt_and_half_a_sequence_never_trigger() -> None:
    assert _run([STOP], []) == [0.0] * V
    assert _run([STOP], [3]) == [0.0] * V  # the prompt's last 3 and this one are no pair
    four = AfterSequence(((3,) * 4,), 100.0, 10.0, 1e4, (EOS,))
    assert _run([four], [3, 3, 3]) == [0.0] * V
    assert _run([four], [3, 3, 3, 3])[0] == -100.0


def test_forbidden_stays_forbidden_whatever_adds_to_it() -> None:
    new = _run([ForbidTokens((EOS, 0)), STOP], [3, 3])
    assert new == [-math.inf] + [-100.0] * 6 + [-math.inf]


def test_repetition_looks_at_the_window_and_counts_a_token_once() -> None:
    new = _run([RepetitionPenalty(2.0, window=3)], [0, 1, 2, 2], [4.0, 4.0, -4.0, 4.0, 0.0, 0.0, 0.0, 0.0])
    assert new == [4.0, 2.0, -8.0, 4.0, 0.0, 0.0, 0.0, 0.0]


def test_each_row_has_its_own_rules_and_input_is_left_alone() -> None:
    other = AfterSequence(((5,),), 1.0, 1.0, 1.0, (EOS,))
    ids = torch.tensor([[0, 3, 3], [0, 3, 3], [0, 1, 5], [0, 5, 1]])
    scores = torch.randn(4, V, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    new = RuleProcessor([[STOP], [], [other], [other]], prompt_length=1)(ids, scores)
    assert torch.equal(scores, before)
    assert torch.equal(new[1], scores[1])
    assert torch.allclose(new[0, :EOS], scores[0, :EOS] - 100)
    assert torch.allclose(new[2:, :EOS], scores[2:, :EOS] - 1)
    assert torch.equal(new[2:, EOS], scores[2:, EOS])


def test_several_rows_of_one_prompt_share_its_rules() -> None:
    new = RuleProcessor([[TokenPenalty((0,), 1.0)], []], 1)(torch.zeros(4, 1, dtype=torch.long), torch.zeros(4, V))
    assert new[:, 0].tolist() == [-1.0, -1.0, 0.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.lists(st.floats(-60000, 60000), min_size=V, max_size=V),
    st.lists(st.integers(0, V - 1), max_size=30),
    st.floats(1e-3, 1e30),
)
def test_finite_scores_stay_finite(dtype: torch.dtype, scores: list[float], generated: list[int], size: float) -> None:
    wild = AfterSequence(((3,),), size, 1e6, math.inf, (EOS,), size)
    rules = [wild, STOP, TokenPenalty((1,), size, WINDOWS), RepetitionPenalty(max(size, 1.0), 4)]
    ids = torch.tensor([[0, *generated]])
    new = RuleProcessor([rules], 1)(ids, torch.tensor([scores], dtype=dtype))
    assert new.dtype is dtype
    assert bool(new.isfinite().all())


def test_what_was_ruled_out_stays_ruled_out_and_no_nan_arises() -> None:
    for dtype in (torch.float16, torch.float32):
        scores = torch.tensor([[0.0, -math.inf, torch.finfo(dtype).min, 0.0, 0.0, 0.0, 0.0, 1.0]], dtype=dtype)
        new = RuleProcessor([[STOP, RepetitionPenalty(1.5, 4), ForbidTokens((4,))]], 1)(
            torch.tensor([[0, 3, 3, 1, 2]]), scores
        )
        assert [bool(x) for x in new[0].isinf()] == [False, True, False, False, True, False, False, False]
        assert torch.softmax(new.float(), -1)[0].tolist() == [0.0] * 7 + [1.0]


@pytest.mark.parametrize(
    ("rules", "rows", "reason"),
    [
        ([[ForbidTokens((V,))]], 1, "names tokens 8 to 8, the model scores 8"),
        ([[TokenPenalty((-1,), 1.0)]], 1, "names tokens -1 to -1"),
        ([[ForbidTokens(tuple(range(V)))]], 1, "forbids all 8 tokens"),
        ([[STOP], [STOP]], 3, "a batch of 3 rows does not fit logits rules for 2 prompts"),
    ],
)
def test_rules_that_do_not_fit_are_refused(rules: list[list[LogitsRule]], rows: int, reason: str) -> None:
    ids = torch.tensor([[0, 3, 3]] * rows)
    with pytest.raises(ValueError, match=reason):
        RuleProcessor(rules, 1)(ids, torch.zeros(rows, V))


@pytest.mark.parametrize("rule", [RepetitionPenalty(0.0, 4), RepetitionPenalty(2.0, 0)])
def test_bad_repetition_penalty_is_refused(rule: RepetitionPenalty) -> None:
    with pytest.raises(ValueError, match="needs penalty > 0 and window >= 1"):
        RuleProcessor([[rule]])


def test_a_processor_serves_one_generation() -> None:
    processor = RuleProcessor([[STOP]])
    processor(torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, V))
    with pytest.raises(ValueError, match="make a new RuleProcessor"):
        processor(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, V))


def test_generate_takes_it_as_it_is() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    stop_at_once = AfterSequence(((0,),), 100.0, 10.0, 1e4, (EOS,), 50.0)
    only_zero: list[LogitsRule] = [
        TokenPenalty(tuple(range(1, V)), 1e3, (PenaltyWindow(2, 1.0), PenaltyWindow(99, 0.0))),
        stop_at_once,
    ]
    out = model.generate(
        torch.tensor([[0, 0, 1], [0, 0, 1]]),
        attention_mask=torch.ones(2, 3, dtype=torch.long),
        logits_processor=[RuleProcessor([only_zero, [ForbidTokens((EOS,))]])],
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    # Row 0: both rules pull at step 0 and 1 (the end gains only 50 against 1000), then the end wins.
    assert out[0, 3:].tolist() == [0, 0, EOS, EOS, EOS, EOS]
    assert EOS not in out[1, 3:].tolist()
