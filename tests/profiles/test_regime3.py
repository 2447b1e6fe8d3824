"""Markers and canonical arithmetic."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_trainer.profiles import Regime3
from lightning_trainer.profiles.arithmetic import parse_value
from lightning_trainer.types import CheckResult

S, E = "<<ANS_START>>", "<<ANS_END>>"


def _answer(text: str) -> str:
    row = {"prompt": "?", "response": text}
    content = Regime3().transform_example(row, 0, None)["messages"][-1]["content"]
    assert isinstance(content, str)
    return content


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" 14\n", f"{S} 14 {E}"),
        (f"So {S} 14", f"So {S} 14 {E}"),
        (f"14 {E} done", f"{S} 14 {E} done"),
        (f"So {S}14{E}.", f"So {S}14{E}."),
    ],
)
def test_missing_markers_are_added_at_their_end(text: str, expected: str) -> None:
    assert _answer(text) == expected
    assert _answer(expected) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{E} 14 {S}", f"{E} stands before {S}"),
        (f"{S} 1 {E} {S} 2 {E}", f"{S} stands 2 times instead of once"),
        (f"{S} 1 {E} 2 {E}", f"{E} stands 2 times instead of once"),
        (f"14 {S}", "nothing stands between the markers"),
        (f"{S}  {E}", "nothing stands between the markers"),
    ],
)
def test_rows_whose_markers_contradict_are_bad(text: str, reason: str) -> None:
    (problem,) = Regime3().problems({"prompt": "?", "response": text})
    assert reason in problem


def test_every_assistant_turn_is_marked_and_tool_calls_are_left() -> None:
    call: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    turns = [
        {"role": "user", "content": "q"},
        call,
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "4"},
    ]
    row = {"messages": [*turns, {"role": "user", "content": "r"}, {"role": "assistant", "content": "5"}]}
    messages = Regime3().transform_example(row, 0, None)["messages"]
    assert [m["content"] for m in messages] == ["q", None, "4", f"{S} 4 {E}", "r", f"{S} 5 {E}"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("14", 14),
        ("-3.50", Fraction(-7, 2)),
        ("1,234.5", Fraction(2469, 2)),
        ("2/6", Fraction(1, 3)),
        ("14.", 14),
        ("(add 2 (mul 3 4))", 14),
        ("( sub 2 5 )", -3),
        ("(div 1 8)", Fraction(1, 8)),
        ("(mod -7 3)", 2),
        ("(pow 2 10)", 1024),
        ("(pow 2 -2)", Fraction(1, 4)),
        ("(pow -1 1000000000000001)", -1),
        ("(pow 0 0)", 1),
        ("(pow 0 5)", 0),
        ("(neg (max 1.5 (min 9 2)))", -2),
        ("(add 1 2 3)", None),
        ("(neg 1 2)", None),
        ("(sqrt 4)", None),
        ("(pow 4 0.5)", None),
        ("(add 1 2", None),
        ("(add 1 2))", None),
        ("()", None),
        ("(add 1 x)", None),
        ("1e9", None),
        ("12,34", None),
        ("1/0", None),
        ("", None),
        ("two", None),
        ("(" * 9000, None),
        ("9" * 5000, None),
        ("(neg " * 1500 + "1" + ")" * 1500, 1),
    ],
)
def test_values_by_hand(text: str, value: int | Fraction | None) -> None:
    parsed = parse_value(text)
    assert (None if parsed is None else parsed.exact) == value


@pytest.mark.parametrize(
    ("region", "golden", "ok", "correct"),
    [
        ("(add 2 (mul 3 4)) = 14", None, True, True),
        ("(add 2 (mul 3 4)) = 14", "14", True, True),
        ("(add 2 (mul 3 4)) = 14", f"{S} (mul 7 2) {E}", True, True),
        ("(add 2 (mul 3 4)) = 15", "14", True, False),
        ("(add 2 3) = 5", "6", True, False),
        ("(add 2 (mul 3 4)) = (add 2 12) = 14", "14", True, True),
        ("(add 2 (mul 3 4)) = (add 2 13) = 14", "14", True, False),
        ("(add 2 3)", None, True, None),
        ("14", None, True, None),
        ("14", "14.0", True, True),
        ("x = 14", "14", True, True),
        ("(div 1 3) = 0.333", "(div 1 3)", True, True),
        ("(div 1 3) = 0.334", None, True, False),
        ("(div 1 3) = 0.3", None, True, False),
        ("(div 1 8) = 0.13", None, True, False),
        ("0.67", "2/3", True, True),
        ("a fox", "a fox", True, None),
        ("14", "fourteen", True, None),
        ("14", "(div 1 0)", True, None),
        ("(div 1 0) = 0", "0", False, None),
        ("(mod 1 (sub 2 2))", None, False, None),
        ("(pow 0 -1)", None, False, None),
        ("(pow 9 (pow 9 9))", None, False, None),
        ("(pow 10 999999999999999999)", None, False, None),
        (" ", "14", False, None),
    ],
)
def test_check_by_hand(region: str, golden: str | None, ok: bool, correct: bool | None) -> None:
    result = Regime3().check("?", golden, f"Steps. {S} {region} {E}")
    assert (result.ok, result.correct) == (ok, correct)
    assert bool(result.reason) == (not result.passed)


def test_repeated_multiplication_cannot_grow_without_bound() -> None:
    expression = "9" * 100
    for _ in range(20):
        expression = f"(mul {expression} {'9' * 100})"
    result = Regime3().check("?", None, f"{S} {expression} {E}")
    assert result == CheckResult(ok=False, reason="the result of (mul …) is too large to compare")


@pytest.mark.parametrize("answer", ["", "14", f"{S} 14", f"14 {E}", f"{E} 14 {S}", f"{S} 1 {E}{S} 1 {E}"])
def test_answers_without_the_marker_contract_are_not_ok(answer: str) -> None:
    result = Regime3().check("?", "14", answer)
    assert not result.ok
    assert result.reason


@settings(deadline=None)  # the machine may be busy
@given(
    st.recursive(
        st.integers(-9, 9).map(str),
        lambda child: st.tuples(st.sampled_from(["add", "sub", "mul", "min", "max"]), child, child).map(
            lambda t: f"({' '.join(t)})"
        ),
        max_leaves=20,
    )
)
def test_nested_expressions_agree_with_python(text: str) -> None:
    python = text.replace("(", " ( ").split()
    parsed = parse_value(text)
    assert parsed is not None
    assert parsed.exact == _reference(iter([token for part in python for token in _split_close(part)]))


def _split_close(token: str) -> list[str]:
    return [token.rstrip(")"), *[")"] * token.count(")")]


def _reference(tokens: Any) -> int:
    token = next(tokens)
    if token != "(":
        return int(token)
    operator, left, right = next(tokens), _reference(tokens), _reference(tokens)
    assert next(tokens) == ")"
    return {
        "add": left + right,
        "sub": left - right,
        "mul": left * right,
        "min": min(left, right),
        "max": max(left, right),
    }[operator]


def test_own_system_prompt_names_form_markers_and_date() -> None:
    template = Regime3().system_prompt_template
    assert template is not None
    prompt = Regime3.render_system_prompt(template, "2026-01-02")
    assert prompt is not None
    assert all(part in prompt for part in ("2026-01-02", "(op arg1 arg2)", S, E, "step by step"))
