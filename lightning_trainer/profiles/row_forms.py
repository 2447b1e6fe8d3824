"""From a row as it stands in the user's file to one conversation.

Every accepted form becomes `{"messages": [...]}` or `{"text": ...}` plus the keys a chat template reads beside the
messages. A row that fits no form raises ValueError with a reason its author can act on: the reason is written to
`quarantine.jsonl` next to the file and line, so it names the key and the value but not the place.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_trainer.types import Message, Row

FORMS = "messages | conversations | prompt + response | instruction (+ input) + output | text"
"""The accepted forms, as error messages list them."""

_ANSWER_KEYS = ("response", "completion", "answer")
"""Keys that hold the answer to `prompt`; the first that is present and not null counts."""

_TEMPLATE_KEYS = ("tools", "documents")
"""Lists a chat template reads beside the messages."""

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


def conversation_from_row(row: Row) -> dict[str, Any]:
    """One row as a new conversation; the row itself is not changed and shares nothing with the result.

    A key whose value is null counts as absent: parquet gives every row every column. Where several forms are present
    the one that holds an answer wins, so Alpaca's own `text` column or a `prompt` beside a `text` does no harm.

        {"prompt": "Hi", "response": "Hello"}
        -> {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}

    Returns:
        `{"messages": [...]}` or `{"text": str}`, with `tools` and `documents` where the row has them. Other columns
        are left out. The last message may be the user's: whether a row trains anything is judged elsewhere.

    Raises:
        ValueError: The row has none of the forms, or the form it has is malformed or empty.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"the row is {_kind(row)}, not an object; accepted keys: {FORMS}")
    present = {key: value for key, value in row.items() if value is not None}
    if _is_text_row(present):
        return {"text": _text(present["text"], "text")}
    return {"messages": _messages(present), **_template_extras(present)}


def text_of(message: Message) -> str:
    """The plain text of a message: its content, its text parts one after the other, or "" for null content."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content if isinstance(content, str) else ""


def with_text(message: Message, text: str) -> Message:
    """A copy of `message` that says `text`; content given as parts stays a list, of one part."""
    parts = isinstance(message.get("content"), list)
    return {**message, "content": [{"type": "text", "text": text}] if parts else text}


# Which form a row has


def _is_text_row(row: Row) -> bool:
    return "text" in row and not (_has_messages(row) or _has_answer(row))


def _has_messages(row: Row) -> bool:
    return "messages" in row or "conversations" in row


def _has_answer(row: Row) -> bool:
    prompt_answered = "prompt" in row and _answer_key(row) is not None
    return prompt_answered or ("instruction" in row and "output" in row)


def _answer_key(row: Row) -> str | None:
    return next((key for key in _ANSWER_KEYS if key in row), None)


def _messages(row: Row) -> list[Message]:
    if "messages" in row:
        return _turns(row["messages"], "messages")
    if "conversations" in row:
        return _with_system_column(row, _turns(row["conversations"], "conversations"))
    if "prompt" in row and (_answer_key(row) or "instruction" not in row):
        return _with_system_column(row, _prompt_and_answer(row))
    if "instruction" in row:
        return _with_system_column(row, _instruction_and_output(row))
    raise ValueError(f"no known form in a row with keys {_shown_keys(row)}; accepted keys: {FORMS}")


def _prompt_and_answer(row: Row) -> list[Message]:
    messages = _speech(row["prompt"], "prompt", "user")
    key = _answer_key(row)
    return messages if key is None else messages + _speech(row[key], key, "assistant")


def _instruction_and_output(row: Row) -> list[Message]:
    question = _text(row["instruction"], "instruction")
    extra = row.get("input", "")
    if not isinstance(extra, str):
        raise ValueError(f"'input' is {_kind(extra)}; it must be text")
    if extra.strip():
        question = f"{question}\n\n{_text(extra, 'input')}"
    messages: list[Message] = [{"role": "user", "content": question}]
    return messages + _speech(row["output"], "output", "assistant") if "output" in row else messages


def _speech(value: Any, key: str, role: str) -> list[Message]:
    """Text becomes one message of `role`; a list is taken as messages already."""
    if isinstance(value, list | tuple):
        return _turns(value, key)
    return [{"role": role, "content": _text(value, key)}]


def _with_system_column(row: Row, messages: list[Message]) -> list[Message]:
    """Alpaca and ShareGPT files often keep the system prompt in a `system` column of its own."""
    system = row.get("system")
    if not isinstance(system, str) or not system.strip() or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": _text(system, "system")}, *messages]


# One message


def _turns(value: Any, key: str) -> list[Message]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{key!r} is {_kind(value)}; it must be a list of messages")
    if not value:
        raise ValueError(f"{key!r} is empty; a row needs at least one message")
    return [
        {"role": turn["role"], "content": turn["content"]} if _is_sound(turn) else _message(turn, f"{key}[{position}]")
        for position, turn in enumerate(value)
    ]


def _is_sound(turn: Any) -> bool:
    """Whether it is a sound message of a role and a text and nothing else, as most are."""
    if type(turn) is not dict or len(turn) != 2:
        return False
    role, content = turn.get("role"), turn.get("content")
    if not (isinstance(role, str) and isinstance(content, str) and role.strip() and content.strip()):
        return False
    return content.isascii() or _is_encodable(content)


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} is {_kind(turn)}; a message is an object with 'role' and 'content'")
    # A parquet struct column gives each message every key: null says that this message does not have it.
    message: Message = {key: copy.deepcopy(value) for key, value in turn.items() if value is not None}
    if "role" not in message and "from" in message:
        message = _from_sharegpt(message, where)
    role = message.get("role")
    if not isinstance(role, str) or not role.strip():
        raise ValueError(f"{where} has role {role!r}; each message needs one, such as 'user' or 'assistant'")
    content = _content(message, f"{where} ({role})")
    return {"role": role, "content": content, **{k: v for k, v in message.items() if k not in ("role", "content")}}


def _from_sharegpt(message: Message, where: str) -> Message:
    speaker = message["from"]
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
        raise ValueError(f"{where} is from {speaker!r}; known speakers: {', '.join(_SHAREGPT_ROLES)}")
    if "value" not in message:
        raise ValueError(f"{where} has no text in 'value'")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {**rest, "role": _SHAREGPT_ROLES[speaker], "content": message["value"]}


def _content(message: Message, where: str) -> Any:
    """The message's content, checked; null stays null where a tool call stands in its place."""
    content = message.get("content")
    if content is None:
        if not message.get("tool_calls"):
            raise ValueError(f"{where} has no content and no tool_calls; give it text or leave it out")
        return None
    if isinstance(content, list):
        _check_parts(content, where)
    elif not isinstance(content, str):
        raise ValueError(f"{where} has content that is {_kind(content)}; it must be text or a list of text parts")
    text = text_of(message)
    _check_encodable(text, where)
    # A tool may return nothing and a system message may be blank, but an empty question or answer is a damaged row.
    if not text.strip() and message["role"] in ("user", "assistant") and not message.get("tool_calls"):
        raise ValueError(f"{where} has empty content; give it text or leave the row out")
    return content


def _check_parts(parts: list[Any], where: str) -> None:
    for position, part in enumerate(parts):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            found = repr(part.get("type")) if isinstance(part, Mapping) else _kind(part)
            raise ValueError(f"{where} has content part {position} of type {found}; only 'text' parts are trained")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where} has content part {position} whose 'text' is {_kind(part.get('text'))}")


# Values


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {_kind(value)}; it must be text")
    if not value.strip():
        raise ValueError(f"{key!r} is empty; give it text or leave the row out")
    _check_encodable(value, repr(key))
    return value


def _is_encodable(text: str) -> bool:
    try:
        _check_encodable(text, "")
    except ValueError:
        return False
    return True


def _check_encodable(text: str, where: str) -> None:
    """A lone surrogate is valid JSON but no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = error.object[error.start]
        raise ValueError(f"{where} holds half of a cut emoji, {bad!a}; write the file anew as UTF-8") from error


def _template_extras(row: Row) -> dict[str, Any]:
    """`tools` and `documents`, if any; both are also taken as JSON text, the only way some columns can hold them."""
    extras: dict[str, Any] = {}
    for key in _TEMPLATE_KEYS:
        value = _parsed_json(row[key], key) if isinstance(row.get(key), str) else copy.deepcopy(row.get(key))
        if value is not None and not isinstance(value, list):
            raise ValueError(f"{key!r} is {_kind(value)}; it must be a list")
        if value:
            extras[key] = value
    return extras


def _parsed_json(text: str, key: str) -> Any:
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{key!r} is text that is not JSON ({error}); it must be a list") from error


def _kind(value: Any) -> str:
    """What a JSON author would call the value: `a number`, not `int`."""
    if value is None:
        return "null"
    names: Iterable[tuple[type | tuple[type, ...], str]] = (
        (bool, "a boolean"),
        ((int, float), "a number"),
        (str, "text"),
        ((list, tuple), "a list"),
        (Mapping, "an object"),
    )
    return next((name for kind, name in names if isinstance(value, kind)), f"a {type(value).__name__}")


def _shown_keys(row: Row) -> str:
    return ", ".join(repr(key) for key in list(row)[:12]) or "(none that are not null)"
