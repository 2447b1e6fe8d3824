"""Instructions, frames around answers, and the logits rules that go with them."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_trainer.profiles import EmojiThink
from lightning_trainer.profiles.emoji_think import STOP_EMOJIS, THINKING_EMOJIS, Instruction, Mark
from lightning_trainer.types import AfterSequence, PenaltyWindow, TokenPenalty

ASK = "For this task, think with 🧠 /three/ times.\nWhen finished, emit ⏹️ /twice/ to signal completion."
FRAMED = "🧠🧠🧠\nFour.\n⏹️⏹️"


def _turns(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def _texts(row: dict[str, Any], seed: object = 0, fraction: float = 1.0) -> list[str]:
    conversation = EmojiThink(fraction).transform_example(row, 0, None, rng=random.Random(str(seed)))
    return [message["content"] for message in conversation["messages"]]


def test_pools_are_ten_each_and_two_stops_carry_the_selector() -> None:
    assert len(set(THINKING_EMOJIS)) == len(set(STOP_EMOJIS)) == 10
    assert [emoji for emoji in STOP_EMOJIS if emoji.endswith("\ufe0f")] == ["⏹️", "🛡️"]


def test_instruction_reads_back_what_it_writes() -> None:
    instruction = Instruction(Mark("🧠", 3), Mark("⏹️", 2))
    assert instruction.text == ASK
    assert Instruction.found_in(f"What is 2+2?\n\n{ASK}") == instruction
    assert Instruction.found_in("What is 2+2?") is None


@pytest.mark.parametrize("seed", range(30))
def test_prompt_and_answer_say_the_same(seed: int) -> None:
    question, answer = _texts(_turns("What is 2+2?", "Four."), seed)
    instruction = Instruction.found_in(question)
    assert instruction is not None
    assert instruction.think is not None
    assert instruction.stop is not None
    assert question == f"What is 2+2?\n\n{instruction.text}"
    think, stop = instruction.think, instruction.stop
    assert answer == f"{think.emoji * think.count}\nFour.\n{stop.emoji * stop.count}"


def test_stop_draw_is_independent_of_the_thinking_draw() -> None:
    drawn = [Instruction.drawn(random.Random(f"42:train:{row}")) for row in range(4000)]
    pairs = {(i.think.emoji, i.stop.emoji) for i in drawn if i.think and i.stop}
    counts = {(i.think.count, i.stop.count) for i in drawn if i.think and i.stop}
    assert len(pairs) == 100
    assert counts == {(think, stop) for think in range(2, 9) for stop in range(2, 5)}


def test_splits_draw_apart() -> None:
    row = _turns("What is 2+2?", "Four.")
    train = [_texts(row, f"42:train:{i}")[0] for i in range(50)]
    val = [_texts(row, f"42:val:{i}")[0] for i in range(50)]
    assert sum(a == b for a, b in zip(train, val, strict=True)) < 10


def test_one_pair_for_all_turns() -> None:
    first, a, second, b = _texts(_turns("2+2?", "Four.", "3+3?", "Six."))
    instruction = Instruction.found_in(first)
    assert instruction is not None
    assert Instruction.found_in(second) == instruction
    assert (a, b) == tuple(f"{instruction.prefix}{text}{instruction.suffix}" for text in ("Four.", "Six."))


@pytest.mark.parametrize(
    "answer", ["Four.", FRAMED, "🧠🧠\nFour.\n⏹️⏹️⏹️", "🤔🤔🤔🤔\n\nFour.\n\n🛑🛑", "<think>2+2\n</think>\nFour.\n"]
)
def test_a_rows_own_instruction_is_followed(answer: str) -> None:
    row = _turns(f"2+2?\n\n{ASK}", answer)
    assert _texts(row, fraction=0.0) == [f"2+2?\n\n{ASK}", FRAMED]


def test_half_an_instruction_is_followed_by_half() -> None:
    think, stop = ASK.split("\n")
    assert _texts(_turns(f"2+2? {think}", "Four."))[1] == "🧠🧠🧠\nFour."
    assert _texts(_turns(f"2+2? {stop}", "Four."))[1] == "Four.\n⏹️⏹️"


def test_an_instruction_of_a_later_turn_holds_from_the_start() -> None:
    first, a, _, b = _texts(_turns("2+2?", "Four.", f"3+3?\n\n{ASK}", "Six."))
    assert first == f"2+2?\n\n{ASK}"
    assert (a, b) == (FRAMED, "🧠🧠🧠\nSix.\n⏹️⏹️")


@settings(deadline=None)  # the machine may be busy
@given(st.integers(), st.text(alphabet="ab 🤔🛑\n.", min_size=1).filter(str.strip))
def test_transforming_twice_changes_nothing_more(seed: int, answer: str) -> None:
    once = _texts(_turns("2+2?", answer), seed)
    assert EmojiThink().check(once[0], None, once[1]).ok
    assert _texts(_turns(*once), seed + 1) == once


def test_emoji_fraction_is_the_share_of_framed_rows() -> None:
    framed = [Instruction.found_in(_texts(_turns("2+2?", "Four."), i, 0.5)[0]) is not None for i in range(400)]
    assert 150 < sum(framed) < 250
    assert _texts(_turns("2+2?", "Four."), fraction=0.0) == ["2+2?", "Four."]


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), "0.5", None, True])
def test_emoji_fraction_outside_zero_to_one_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="emoji_fraction is"):
        EmojiThink(value)


@pytest.mark.parametrize(
    "answer",
    [
        "<think>2+2\nis 4</think>\n\nFour.",
        "<think>a</think>Four.<think>b</think>",
        "2+2 is 4</think>\nFour.",
        "<thinking>x</thinking> Four.",
    ],
)
def test_think_blocks_leave_with_their_content(answer: str) -> None:
    assert _texts(_turns("2+2?", answer), fraction=0.0)[1] == "Four."


@pytest.mark.parametrize(
    ("answer", "reason"), [("<think>2+2</think>", "is empty without"), ("<think>2+2", "never closes it")]
)
def test_rows_with_thinking_alone_are_bad(answer: str, reason: str) -> None:
    (problem,) = EmojiThink().problems(_turns("2+2?", answer))
    assert reason in problem


def test_reasoning_keys_leave_and_tool_calls_stay() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}], "reasoning_content": "r"}
    row = _turns("2+2?", "Four.")
    row["messages"].insert(1, call)
    messages = EmojiThink(0.0).transform_example(row, 0, None)["messages"]
    assert messages[1] == {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}


@pytest.mark.parametrize(
    ("prompt", "answer", "ok"),
    [
        (ASK, FRAMED, True),
        (ASK, "🧠🧠\nFour.\n⏹️⏹️", False),
        (ASK, "🧠🧠🧠🧠\nFour.\n⏹️⏹️", False),
        (ASK, "🧠🧠🧠 Four.\n⏹️⏹️", False),
        (ASK, "🧠🧠🧠\nFour.\n⏹️", False),
        (ASK, "🧠🧠🧠\nFour.\n⏹️⏹️⏹️", False),
        (ASK, "🧠🧠🧠\nFour.\n⏹⏹", False),
        (ASK, "🧠🧠🧠\nFour. ⏹️⏹️", False),
        (ASK, "🧠🧠🧠\nFour.\n⏹️⏹️\nMore.", False),
        (ASK, "🧠🧠🧠\n⏹️⏹️", False),
        (ASK, "Four.", False),
        (ASK, "", False),
        ("2+2?", "Four.", True),
        ("2+2?", "🤔 is an emoji.", True),
        ("2+2?", "🤔🤔\nFour.", False),
        ("2+2?", "Four.\n🛑🛑", False),
        ("2+2?", "", False),
    ],
)
def test_check_is_exact(prompt: str, answer: str, ok: bool) -> None:
    result = EmojiThink().check(prompt, None, answer)
    assert (result.ok, bool(result.reason)) == (ok, not ok)


def test_check_compares_bodies_with_framed_or_bare_golden() -> None:
    for golden in ("Four.", FRAMED):
        assert EmojiThink().check(ASK, golden, FRAMED).correct is True
        assert EmojiThink().check(ASK, golden, FRAMED.replace("Four", "4")).correct is None


# Logits rules


def _tokenizer(extra: list[str], merges: list[tuple[str, str]] | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE: one token per byte, and one for each pair merged."""
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges or []:
        vocab[left + right] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges or []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    tokenizer.add_tokens(extra, special_tokens=True)
    return tokenizer


def _after(tokenizer: PreTrainedTokenizerFast, prompt: str) -> AfterSequence:
    (rule,) = [r for r in EmojiThink().build_logits_rules(tokenizer, prompt) if isinstance(r, AfterSequence)]
    return rule


def test_think_tags_are_penalised_only_where_each_is_one_token() -> None:
    assert EmojiThink().build_logits_rules(_tokenizer([])) == ()
    tokenizer = _tokenizer(["<think>", "</think>"])
    ids = tuple(sorted(tokenizer.convert_tokens_to_ids(["<think>", "</think>"])))
    windows = (PenaltyWindow(4, 8.0), PenaltyWindow(4, 2.0), PenaltyWindow(4, 1.5))
    assert EmojiThink().build_logits_rules(tokenizer) == (TokenPenalty(ids, 80.0, windows, "think_tags"),)


def test_the_rule_waits_for_the_whole_instructed_sequence() -> None:
    tokenizer = _tokenizer(["<|im_end|>"])
    rule = _after(tokenizer, ASK.replace("twice", "four times").replace("⏹️", "🛑"))
    four = tuple(tokenizer.encode("🛑🛑🛑🛑", add_special_tokens=False))
    assert rule.triggers == (four,)
    assert len(four) == 16
    assert (rule.base_penalty, rule.growth, rule.exempt_bonus) == (100.0, 10.0, 50.0)
    assert rule.max_penalty <= 65504 / 4
    assert rule.exempt_ids == tuple(sorted((tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>"))))


def test_every_way_to_cut_the_sequence_triggers() -> None:
    tokenizer = _tokenizer(["🛑", "🛑🛑", "\n🛑"])
    a, aa, na = (tokenizer.convert_tokens_to_ids(token) for token in ("🛑", "🛑🛑", "\n🛑"))
    rule = _after(tokenizer, "When finished, emit 🛑 /three times/ to signal completion.")
    assert {(a, a, a), (a, aa), (aa, a), (na, a, a), (na, aa)} <= set(rule.triggers)
    assert all(tokenizer.decode(list(trigger)).strip() == "🛑🛑🛑" for trigger in rule.triggers)


@pytest.mark.parametrize("prompt", ["2+2?", ASK.split("\n")[0], ASK.replace("🧠 /three", "⏹️ /four")])
def test_no_stop_rule_where_none_is_asked_or_the_prefix_would_trigger_it(prompt: str) -> None:
    assert EmojiThink().build_logits_rules(_tokenizer([]), prompt) == ()


def test_processors_are_built_from_the_rules() -> None:
    assert EmojiThink().build_logits_processors(_tokenizer([]), "2+2?") == []
    assert len(EmojiThink().build_logits_processors(_tokenizer([]), ASK)) == 1
