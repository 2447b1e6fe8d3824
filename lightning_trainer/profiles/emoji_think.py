"""Answers framed by emojis: the prompt names a thinking emoji and a stop emoji, the answer carries them exactly.

    user:       Why is the sky blue?

                For this task, think with 🧠 /three/ times.
                When finished, emit ⏹️ /twice/ to signal completion.
    assistant:  🧠🧠🧠
                Short waves scatter more.
                ⏹️⏹️

The instruction is read back from the prompt wherever it is needed (rows that carry one already, `check`, logits rules),
so that the text the model sees is the only source of what was asked.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

from lightning_trainer.profiles.base import DataProfile, same_text
from lightning_trainer.profiles.row_forms import text_of, with_text
from lightning_trainer.types import (
    AfterSequence,
    CheckResult,
    InputError,
    LogitsRule,
    Message,
    PenaltyWindow,
    TokenPenalty,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINKING_EMOJIS = ("🤔", "💭", "🧠", "💡", "🎯", "🔍", "🤨", "🧐", "⚡", "✨")
# The two with U+FE0F (variation selector 16) are two code points each.
STOP_EMOJIS = ("🛑", "⛔", "🚫", "❌", "🔴", "\u23f9\ufe0f", "🔚", "✋", "🚦", "\U0001f6e1\ufe0f")

_THINKING_COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
_STOP_COUNTS = {"twice": 2, "three times": 3, "four times": 4}

_THINK_INSTRUCTION = re.compile(rf"For this task, think with (\S{{1,16}}) /({'|'.join(_THINKING_COUNTS)})/ times\.")
_STOP_INSTRUCTION = re.compile(rf"When finished, emit (\S{{1,16}}) /({'|'.join(_STOP_COUNTS)})/ to signal completion\.")

_THINK_BLOCK = re.compile(r"<(think|thinking)>.*?</\1>\s*", re.DOTALL)
# Answers of models whose template opens the block in the prompt hold only its end.
_HEADLESS_THINK_BLOCK = re.compile(r"\A.*</(?:think|thinking)>\s*", re.DOTALL)
_UNCLOSED_THINK_BLOCK = re.compile(r"<(?:think|thinking)>")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")

_THINK_TAGS = ("<think>", "</think>", "<thinking>", "</thinking>")
_THINK_TAG_SCHEDULE = (PenaltyWindow(4, 8.0), PenaltyWindow(4, 2.0), PenaltyWindow(4, 1.5))
# Ends of an assistant turn in the chat templates of common model families, beside the tokenizer's own eos.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|eot|>")


@dataclass(frozen=True)
class Mark:
    """One emoji, repeated."""

    emoji: str
    count: int

    @property
    def text(self) -> str:
        """The emojis as an answer carries them."""
        return self.emoji * self.count


@dataclass(frozen=True)
class Instruction:
    """What a prompt asks for: `think` opens the answer and `stop` ends it. None: that half was not asked for."""

    think: Mark | None
    stop: Mark | None

    @classmethod
    def found_in(cls, text: str) -> Instruction | None:
        """The instruction `text` carries. The last one counts: it stands at the end of what the user said."""
        think = _last_mark(_THINK_INSTRUCTION, _THINKING_COUNTS, text)
        stop = _last_mark(_STOP_INSTRUCTION, _STOP_COUNTS, text)
        return cls(think, stop) if think or stop else None

    @classmethod
    def drawn(cls, rng: random.Random) -> Instruction:
        """A new one: four independent draws."""
        think = Mark(rng.choice(THINKING_EMOJIS), rng.choice(list(_THINKING_COUNTS.values())))
        return cls(think, Mark(rng.choice(STOP_EMOJIS), rng.choice(list(_STOP_COUNTS.values()))))

    @property
    def text(self) -> str:
        """The sentences that go under the user's text."""
        lines = []
        if self.think:
            words = {count: word for word, count in _THINKING_COUNTS.items()}
            lines.append(f"For this task, think with {self.think.emoji} /{words[self.think.count]}/ times.")
        if self.stop:
            words = {count: word for word, count in _STOP_COUNTS.items()}
            lines.append(f"When finished, emit {self.stop.emoji} /{words[self.stop.count]}/ to signal completion.")
        return "\n".join(lines)

    @property
    def prefix(self) -> str:
        """How the answer starts, newline included; "" where nothing was asked."""
        return f"{self.think.text}\n" if self.think else ""

    @property
    def suffix(self) -> str:
        """How the answer ends, newline included; "" where nothing was asked."""
        return f"\n{self.stop.text}" if self.stop else ""


class EmojiThink(DataProfile):
    """Answers open with the thinking emojis and end with the stop emojis that their prompt asks for."""

    name: ClassVar[str] = "emoji_think"
    description: ClassVar[str] = "Answers framed by the thinking and stop emojis their prompt asks for"
    version: ClassVar[str] = "1"
    system_prompt_template: str | None = "Today is {date}. You are happy. You enjoy helping others."

    def __init__(self, emoji_fraction: float = 1.0) -> None:
        """Set the share of rows under the contract.

        Args:
            emoji_fraction: Share of rows, from 0 to 1, that get an instruction and a framed answer; the others are
                direct answers. Rows that carry an instruction already follow it in any case.
        """
        if isinstance(emoji_fraction, bool) or not isinstance(emoji_fraction, int | float):
            raise InputError(f"emoji_fraction is {emoji_fraction!r}; it must be a number from 0 to 1")
        if not 0 <= emoji_fraction <= 1:
            raise InputError(f"emoji_fraction is {emoji_fraction}; it must lie between 0 and 1")
        self.emoji_fraction = float(emoji_fraction)

    def transform_messages(self, messages: list[Message], rng: random.Random) -> list[Message]:
        """One instruction for the whole conversation: under every user text, around every assistant text."""
        instruction = _carried_instruction(messages) or self._draw(rng)
        transformed = []
        for message in messages:
            if message["role"] == "user":
                own = Instruction.found_in(text_of(message))
                instruction = own or instruction
                message = message if own else _with_instruction(message, instruction)
            elif message["role"] == "assistant":
                message = _with_frame(message, instruction)
            transformed.append(message)
        return transformed

    def _draw(self, rng: random.Random) -> Instruction | None:
        framed = rng.random() < self.emoji_fraction
        return Instruction.drawn(rng) if framed else None

    def check(self, prompt: str, golden: str | None, answer: str) -> CheckResult:
        """Contract: exactly the prefix and suffix that the prompt asks for, or neither where it asks for none."""
        instruction = Instruction.found_in(prompt)
        reason = _broken_frame(instruction, answer) if instruction else _unasked_frame(answer)
        if reason:
            return CheckResult(ok=False, reason=reason)
        golden_body = None if golden is None else _unframed(golden, instruction)
        return CheckResult(ok=True, correct=same_text(golden_body, _unframed(answer, instruction)))

    def build_logits_rules(self, tokenizer: PreTrainedTokenizerBase, prompt: str = "") -> tuple[LogitsRule, ...]:
        """Away from thinking tags, and towards the end of the turn once the instructed stop sequence is complete."""
        rules: list[LogitsRule] = []
        tags = _known_ids(tokenizer, _THINK_TAGS)
        if tags:
            rules.append(TokenPenalty(tags, penalty=80.0, schedule=_THINK_TAG_SCHEDULE, label="think_tags"))
        instruction = Instruction.found_in(prompt)
        after_stop = _after_stop(tokenizer, instruction) if instruction else None
        return (*rules, after_stop) if after_stop else tuple(rules)


# Rows


def _carried_instruction(messages: list[Message]) -> Instruction | None:
    found = (Instruction.found_in(text_of(message)) for message in messages if message["role"] == "user")
    return next((instruction for instruction in found if instruction), None)


def _last_mark(pattern: re.Pattern[str], counts: dict[str, int], text: str) -> Mark | None:
    matches = pattern.findall(text)
    return Mark(matches[-1][0], counts[matches[-1][1]]) if matches else None


def _with_instruction(message: Message, instruction: Instruction | None) -> Message:
    return with_text(message, f"{text_of(message)}\n\n{instruction.text}") if instruction else message


def _with_frame(message: Message, instruction: Instruction | None) -> Message:
    message = {key: value for key, value in message.items() if key not in _REASONING_KEYS}
    # A turn that only calls a tool has no text to frame.
    if not text_of(message).strip():
        return message
    body = _unframed(_without_think_blocks(text_of(message)), instruction)
    if not body.strip():
        if message.get("tool_calls"):
            return with_text(message, "")
        raise ValueError("an assistant message is empty without its <think> block; give it an answer or drop the row")
    return with_text(message, f"{instruction.prefix}{body}{instruction.suffix}" if instruction else body)


def _without_think_blocks(text: str) -> str:
    text = _HEADLESS_THINK_BLOCK.sub("", _THINK_BLOCK.sub("", text))
    if _UNCLOSED_THINK_BLOCK.search(text):
        raise ValueError("an assistant message opens a <think> block and never closes it; close it or drop the row")
    return text


def _unframed(text: str, instruction: Instruction | None) -> str:
    """The answer without a prefix or suffix line, whatever its count: another count would contradict the prompt."""
    lines = text.lstrip("\n").rstrip().split("\n")
    # A single line of emojis is the answer itself.
    if len(lines) > 1:
        start = 1 if _is_repeated(lines[0], _emojis(instruction, "think")) else 0
        end = -1 if _is_repeated(lines[-1], _emojis(instruction, "stop")) else None
        lines = lines[start:end]
    return "\n".join(lines).lstrip("\n").rstrip()


def _emojis(instruction: Instruction | None, half: str) -> tuple[str, ...]:
    pool = THINKING_EMOJIS if half == "think" else STOP_EMOJIS
    mark: Mark | None = getattr(instruction, half, None)
    return (*pool, mark.emoji) if mark else pool


def _is_repeated(line: str, emojis: tuple[str, ...]) -> bool:
    """Whether the line is one of the emojis, twice or more, and nothing else."""
    line = line.strip()
    return any(line == emoji * (len(line) // len(emoji)) and len(line) > len(emoji) for emoji in emojis)


# Answers


def _broken_frame(instruction: Instruction, answer: str) -> str:
    """How the answer misses what was asked; "" where it does not."""
    if not answer.startswith(instruction.prefix):
        asked = instruction.prefix.rstrip("\n")
        return f"starts with {_line(answer, 0)!r}; the prompt asked for {asked!r} and a newline"
    if not answer.endswith(instruction.suffix):
        asked = instruction.suffix.lstrip("\n")
        return f"ends with {_line(answer, -1)!r}; the prompt asked for a newline and {asked!r}"
    body = answer[len(instruction.prefix) : len(answer) - len(instruction.suffix)]
    return "" if body.strip() else "nothing stands between the emojis"


def _unasked_frame(answer: str) -> str:
    if not answer.strip():
        return "the answer is empty"
    if _is_repeated(_line(answer.strip(), 0), THINKING_EMOJIS):
        return "starts with thinking emojis that the prompt did not ask for"
    if _is_repeated(_line(answer.strip(), -1), STOP_EMOJIS):
        return "ends with stop emojis that the prompt did not ask for"
    return ""


def _line(text: str, position: int) -> str:
    """The first or last line, cut to what a reason can show."""
    line = text.split("\n")[position]
    return line if len(line) <= 40 else (line[:40] + "…" if position == 0 else "…" + line[-40:])


# Logits rules


def _after_stop(tokenizer: PreTrainedTokenizerBase, instruction: Instruction) -> AfterSequence | None:
    stop, ends = instruction.stop, _turn_end_ids(tokenizer)
    # Without an end of turn there is nothing to push towards; a prefix that holds the stop sequence would trigger it.
    if stop is None or not ends or stop.text in instruction.prefix:
        return None
    triggers = _tokenisations(tokenizer, stop)
    if not triggers:
        return None
    return AfterSequence(
        triggers=triggers,
        base_penalty=100.0,
        growth=10.0,
        max_penalty=1e4,  # well inside fp16 (65504) and far above any logit
        exempt_ids=ends,
        exempt_bonus=50.0,
        label="after_stop",
    )


def _tokenisations(tokenizer: PreTrainedTokenizerBase, mark: Mark) -> tuple[tuple[int, ...], ...]:
    """Every way the tokens of the whole sequence may be cut at emojis, with and without the newline before it.

    Four emojis may come as one token, as 2 + 2, as four singles, …; a tokenizer may also join the newline to the first.
    """
    found: set[tuple[int, ...]] = set()
    for cut in _compositions(mark.count):
        pieces = [mark.emoji * size for size in cut]
        tail = list(chain.from_iterable(_ids_in_text(tokenizer, piece) for piece in pieces[1:]))
        found.add((*_ids_in_text(tokenizer, pieces[0]), *tail))
        found.add((*_ids(tokenizer, f"\n{pieces[0]}"), *tail))
    unknown = getattr(tokenizer, "unk_token_id", None)
    known = [ids for ids in found if ids and unknown not in ids]
    # One that ends with another completes with it and adds nothing.
    return tuple(sorted(ids for ids in known if not any(ids != o and ids[-len(o) :] == o for o in known)))


def _compositions(total: int) -> Iterator[tuple[int, ...]]:
    """Ordered sums: 3 -> (3,), (1, 2), (2, 1), (1, 1, 1)."""
    yield (total,)
    for first in range(1, total):
        for rest in _compositions(total - first):
            yield (first, *rest)


def _ids_in_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Ids of `text` as they are inside a text: SentencePiece puts a space before the first word of an input."""
    newline, ids = _ids(tokenizer, "\n"), _ids(tokenizer, f"\n{text}")
    return ids[len(newline) :] if newline and ids[: len(newline)] == newline else _ids(tokenizer, text)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def _turn_end_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    ends = set(_known_ids(tokenizer, _TURN_ENDS))
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    return tuple(sorted(ends))


def _known_ids(tokenizer: PreTrainedTokenizerBase, tokens: tuple[str, ...]) -> tuple[int, ...]:
    """Ids of those that are one token of the vocabulary; the others are left out, never taken apart."""
    ids = (tokenizer.convert_tokens_to_ids(token) for token in tokens)
    # The way back tells a token from the unknown token that stands in for it.
    return tuple(sorted(i for i in ids if isinstance(i, int) and tokenizer.convert_ids_to_tokens(i) in tokens))
