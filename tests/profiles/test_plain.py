"""The system prompt rules, on the profile that does nothing else."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lightning_trainer.profiles import DataProfile, Plain
from lightning_trainer.types import Message

ROW = {"prompt": "Hi", "response": "Hello"}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_system_prompt_goes_first_and_nothing_else_changes() -> None:
    assert Plain().transform_example(ROW, 0, "Be kind.") == {
        "messages": [{"role": "system", "content": "Be kind."}, *TURNS]
    }


@pytest.mark.parametrize("prompt", [None, "", "  "])
def test_no_system_prompt_adds_no_message(prompt: str | None) -> None:
    assert Plain().transform_example(ROW, 0, prompt) == {"messages": TURNS}


@pytest.mark.parametrize(
    ("content", "prepended", "replaced"),
    [
        ("Own.", "Ours.\n\nOwn.", "Ours."),
        ("", "Ours.", "Ours."),
        (
            [{"type": "text", "text": "Own."}],
            [{"type": "text", "text": "Ours.\n\nOwn."}],
            [{"type": "text", "text": "Ours."}],
        ),
    ],
)
def test_a_rows_own_system_message(content: Any, prepended: Any, replaced: Any) -> None:
    row = {"messages": [{"role": "system", "content": content}, *TURNS]}
    assert Plain().transform_example(row, 0, "Ours.")["messages"] == [{"role": "system", "content": prepended}, *TURNS]
    other = Plain().transform_example(row, 0, "Ours.", system_prompt_mode="replace")
    assert other["messages"] == [{"role": "system", "content": replaced}, *TURNS]
    alone = Plain().transform_example(row, 0, None, system_prompt_mode="replace")
    assert alone["messages"][0]["content"] == content


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="system_prompt_mode is 'append'"):
        Plain().transform_example(ROW, 0, "x", system_prompt_mode="append")  # type: ignore[arg-type]


def test_text_rows_pass_and_tools_stay() -> None:
    assert Plain().transform_example({"text": "Once"}, 0, "Ours.") == {"text": "Once"}
    row = {**ROW, "tools": [{"type": "function"}]}
    assert Plain().transform_example(row, 0, None) == {"messages": TURNS, "tools": [{"type": "function"}]}


def test_only_the_date_is_filled_in() -> None:
    rendered = Plain.render_system_prompt('On {date}, {name} and {{"a": {}}} stay.', "2026-01-02")
    assert rendered == 'On 2026-01-02, {name} and {{"a": {}}} stay.'
    assert Plain.render_system_prompt(None, "2026-01-02") is None
    assert Plain.render_system_prompt(" ", "2026-01-02") is None


def test_check_knows_only_what_equals_the_golden_answer() -> None:
    plain = Plain()
    assert plain.check("Hi", "Hello", " Hello\n").correct is True
    assert plain.check("Hi", "Hello", "Good day").correct is None
    assert plain.check("Hi", None, "Hello").passed
    assert not plain.check("Hi", "Hello", " ").ok


def test_a_profile_of_ones_own_needs_one_method() -> None:
    class Shouting(DataProfile):
        def transform_messages(self, messages: list[Message], rng: random.Random) -> list[Message]:
            return [{**message, "content": message["content"].upper()} for message in messages]

    assert Shouting.name == "Shouting"
    assert Shouting().transform_example(ROW, 0, "be")["messages"][0] == {"role": "system", "content": "BE"}
    assert Shouting().problems({"text": "x"}) == [
        "a 'text' row has no turns for profile 'Shouting' to work on; "
        "use profile Plain, or give the row 'messages' or 'prompt' and 'response'"
    ]
