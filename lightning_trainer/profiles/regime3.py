"""Marked answers in canonical arithmetic: `<<ANS_START>> (add 2 (mul 3 4)) = 14 <<ANS_END>>`."""

from __future__ import annotations

import random
from typing import ClassVar

from lightning_trainer.profiles.arithmetic import ArithmeticFault, Value, agree, parse_value
from lightning_trainer.profiles.base import DataProfile
from lightning_trainer.profiles.row_forms import text_of, with_text
from lightning_trainer.types import CheckResult, Message

ANS_START = "<<ANS_START>>"
ANS_END = "<<ANS_END>>"

_SYSTEM_PROMPT = f"""Today is {{date}}. You solve problems precisely.
Reason step by step before you answer.
Write every calculation in canonical form, (op arg1 arg2), where op is add, sub, mul, div, mod, \
pow, neg, max or min and arguments may be nested.
Give the final answer exactly once, between {ANS_START} and {ANS_END}, and keep it exact: do not round or estimate."""


class Regime3(DataProfile):
    """Every answer is marked, and answers in canonical form are computed and compared."""

    name: ClassVar[str] = "regime3"
    description: ClassVar[str] = "Marked answers in canonical form (op arg1 arg2), checked by computing them"
    version: ClassVar[str] = "1"
    system_prompt_template: str | None = _SYSTEM_PROMPT

    def transform_messages(self, messages: list[Message], rng: random.Random) -> list[Message]:
        """Markers around every assistant text; a turn that only calls a tool has none to mark."""
        return [
            with_text(message, marked(text_of(message)))
            if message["role"] == "assistant" and text_of(message).strip()
            else message
            for message in messages
        ]

    def check(self, prompt: str, golden: str | None, answer: str) -> CheckResult:
        """Contract: both markers once, in order, around something; right: the value equals the stated and golden ones.

        `correct` is None where there is nothing to compute, or nothing to compare a lone number with. A calculation
        without a value (division by zero, a power too large to write down) breaks the contract.
        """
        reason = _broken_markers(answer)
        if reason:
            return CheckResult(ok=False, reason=reason)
        try:
            values = _values(_between_markers(answer))
        except ArithmeticFault as fault:
            return CheckResult(ok=False, reason=str(fault))
        return _compared(values, _golden_value(golden))


def marked(text: str) -> str:
    """The text with both markers; a missing one is added at its end of the text.

    Raises:
        ValueError: The markers that are there are out of order, repeated, or have nothing between them.
    """
    starts, ends = ANS_START in text, ANS_END in text
    if not starts and not ends:
        text = f"{ANS_START} {text.strip()} {ANS_END}"
    elif not ends:
        text = f"{text.rstrip()} {ANS_END}"
    elif not starts:
        text = f"{ANS_START} {text.lstrip()}"
    reason = _broken_markers(text)
    if reason:
        raise ValueError(f"an assistant message breaks the marker contract: {reason}; correct it or drop the row")
    return text


def _broken_markers(text: str) -> str:
    """How the text misses "both markers once, in order, around something"; "" where it does not."""
    for marker in (ANS_START, ANS_END):
        if text.count(marker) != 1:
            return f"{marker} stands {text.count(marker)} times instead of once"
    if text.index(ANS_END) < text.index(ANS_START):
        return f"{ANS_END} stands before {ANS_START}"
    return "" if _between_markers(text).strip() else "nothing stands between the markers"


def _between_markers(text: str) -> str:
    return text.partition(ANS_START)[2].partition(ANS_END)[0]


def _values(text: str) -> list[Value]:
    """Of `calculation = result`, the sides that can be computed."""
    return [value for side in text.split("=") if (value := parse_value(side)) is not None]


def _golden_value(golden: str | None) -> Value | None:
    """The golden answer's value, markers or not; None where it has none."""
    if golden is None:
        return None
    try:
        values = _values(golden if _broken_markers(golden) else _between_markers(golden))
    except ArithmeticFault:  # the row's fault, not the answer's
        return None
    return values[0] if values else None


def _compared(values: list[Value], golden: Value | None) -> CheckResult:
    if not values:
        return CheckResult(ok=True)
    computed, *stated = values
    for value in stated:
        if not agree(computed, value):
            return CheckResult(ok=True, correct=False, reason=f"the answer computes {computed} and states {value}")
    if golden is None:
        return CheckResult(ok=True, correct=True if stated else None)
    if not agree(computed, golden):
        return CheckResult(ok=True, correct=False, reason=f"the answer is {computed}, the golden answer {golden}")
    return CheckResult(ok=True, correct=True)
