"""Row forms in, conversations out."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from lightning_trainer.profiles.row_forms import conversation_from_row, text_of, with_text

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"messages": (USER, ASSISTANT), "id": 7},
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": "Hi", "answer": "Hello", "response": None},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"instruction": "Hi", "input": "", "output": "Hello", "text": "the whole, as in Alpaca's file"},
        {"instruction": "Hi", "output": "Hello", "input": None},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": [USER, ASSISTANT], "messages": None, "text": None},
        {"prompt": "Hi", "response": "Hello", "text": "unused"},
    ],
)
def test_each_form_becomes_the_same_two_messages(row: dict[str, Any]) -> None:
    assert conversation_from_row(row) == {"messages": [USER, ASSISTANT]}


def test_alpaca_input_stands_under_the_instruction() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert conversation_from_row(row)["messages"][0]["content"] == "Add.\n\n1 2"


@pytest.mark.parametrize(
    "row", [{"text": " Once "}, {"text": " Once ", "prompt": "a seed"}, {"text": " Once ", "id": 1}]
)
def test_text_rows_stay_as_they_are(row: dict[str, Any]) -> None:
    assert conversation_from_row(row) == {"text": " Once "}


@pytest.mark.parametrize("row", [{"prompt": "Hi"}, {"instruction": "Hi"}, {"messages": [USER]}])
def test_a_prompt_alone_is_accepted(row: dict[str, Any]) -> None:
    assert conversation_from_row(row) == {"messages": [USER]}


def test_sharegpt_speakers_and_system_column() -> None:
    turns = [("human", "Hi"), ("tool", "4"), ("gpt", "Hello")]
    row = {"system": "Be kind.", "conversations": [{"from": who, "value": what} for who, what in turns]}
    messages = conversation_from_row(row)["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "tool", "assistant"]
    assert messages[0]["content"] == "Be kind."
    assert set(messages[1]) == {"role", "content"}


def test_what_the_template_reads_is_kept_and_copied() -> None:
    caller = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    thinker = {"role": "assistant", "content": "4", "reasoning_content": "2+2", "name": "bot"}
    result = {"role": "tool", "content": "", "tool_call_id": "x"}
    row = {
        "messages": [USER, caller, result, thinker],
        "tools": [{"type": "function"}],
        "documents": [{"text": "d"}],
        "n": 1,
    }
    before = copy.deepcopy(row)
    conversation = conversation_from_row(row)
    assert conversation == {key: row[key] for key in ("messages", "tools", "documents")}
    conversation["messages"][1]["tool_calls"][0]["function"]["arguments"]["a"] = 2
    conversation["tools"].append({})
    assert row == before


def test_nulls_of_parquet_columns_are_absent_keys() -> None:
    row = {"messages": [{**USER, "name": None, "tool_calls": None}], "tools": None, "documents": []}
    assert conversation_from_row(row) == {"messages": [USER]}


def test_tools_may_be_json_text() -> None:
    assert conversation_from_row({"messages": [USER], "tools": '[{"type": "function"}]'})["tools"] == [
        {"type": "function"}
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([], "the row is a list, not an object"),
        ({}, "no known form in a row with keys (none that are not null)"),
        ({"question": "?", "reply": "!"}, "no known form in a row with keys 'question', 'reply'; accepted keys"),
        ({"messages": None, "id": 3}, "no known form in a row with keys 'id'"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": "[]"}, "'messages' is text; it must be a list of messages"),
        ({"messages": {"role": "user"}}, "'messages' is an object"),
        ({"messages": [USER, "Hello"]}, "messages[1] is text; a message is an object"),
        ({"messages": [{"content": "Hi"}]}, "messages[0] has role None"),
        ({"messages": [{"role": 3, "content": "Hi"}]}, "messages[0] has role 3"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1] (assistant) has no content and no tool_calls"),
        ({"messages": [{**ASSISTANT, "content": None, "tool_calls": []}]}, "no content and no tool_calls"),
        ({"messages": [{**USER, "content": 5}]}, "messages[0] (user) has content that is a number"),
        ({"messages": [{**USER, "content": {"text": "Hi"}}]}, "content that is an object"),
        ({"messages": [{**USER, "content": " \n"}]}, "messages[0] (user) has empty content"),
        ({"messages": [USER, {**ASSISTANT, "content": ""}]}, "messages[1] (assistant) has empty content"),
        ({"messages": [{**USER, "content": []}]}, "empty content"),
        ({"messages": [{**USER, "content": [{"type": "image"}]}]}, "content part 0 of type 'image'"),
        ({"messages": [{**USER, "content": ["Hi"]}]}, "content part 0 of type text"),
        ({"messages": [{**USER, "content": [{"type": "text", "text": None}]}]}, "whose 'text' is null"),
        ({"messages": [{**USER, "content": "\ud83d"}]}, "half of a cut emoji, '\\ud83d'"),
        ({"prompt": "Hi", "response": 4}, "'response' is a number; it must be text"),
        ({"prompt": "", "response": "Hello"}, "'prompt' is empty"),
        ({"prompt": "Hi", "response": "  "}, "'response' is empty"),
        ({"instruction": "Hi", "input": 4, "output": "x"}, "'input' is a number"),
        (
            {"conversations": [{"from": "narrator", "value": "x"}]},
            "conversations[0] is from 'narrator'; known speakers",
        ),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "is from ['gpt']"),
        ({"conversations": [{"from": "gpt"}]}, "conversations[0] has no text in 'value'"),
        ({"text": ""}, "'text' is empty"),
        ({"text": True}, "'text' is a boolean"),
        ({"messages": [USER], "tools": "{"}, "'tools' is text that is not JSON"),
        ({"messages": [USER], "tools": {"a": 1}}, "'tools' is an object; it must be a list"),
    ],
)
def test_bad_rows_are_refused_with_a_reason(row: Any, reason: str) -> None:
    with pytest.raises(ValueError) as error:
        conversation_from_row(row)
    assert reason in str(error.value)


def test_text_of_reads_strings_parts_and_null() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert [text_of({"role": "user", "content": content}) for content in ("ab", parts, None)] == ["ab", "ab", ""]


def test_with_text_keeps_the_kind_of_content() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "n"}
    assert with_text(parts, "b") == {"role": "user", "content": [{"type": "text", "text": "b"}], "name": "n"}
    assert with_text(USER, "b") == {"role": "user", "content": "b"}
    assert USER["content"] == "Hi"
