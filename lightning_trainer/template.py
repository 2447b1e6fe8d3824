"""Chat templates: the one place that renders a conversation and turns the text into token ids.

Training, validation, previews and predictions all come through here, so a prompt looks the same everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_trainer.types import InputError, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_KEYS = ("tools", "documents")
"""What a row may hand to its chat template besides `messages`."""

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_generation_marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template says itself, with `{% generation %}`, which tokens the assistant wrote."""
    return bool(_GENERATION_MARK.search(chat_template(tokenizer)))


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's default template.

    Raises:
        InputError: The tokenizer has none.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; put chat_template.jinja beside it, "
            "or use rows with a `text` field",
            key="model.tokenizer",
        )
    return str(template)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    extras: dict[str, Any] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The text of a conversation, special tokens included.

    Raises:
        ValueError: The template refuses the conversation (order of roles, missing fields, …).
    """
    from jinja2.exceptions import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **(extras or {})
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error
    return str(text)


def extras_of(conversation: dict[str, Any]) -> dict[str, Any]:
    """What the conversation hands to the template besides its messages."""
    return {key: conversation[key] for key in TEMPLATE_KEYS if conversation.get(key) is not None}


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that already hold their special tokens; nothing is added, nothing truncated."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, conversation: dict[str, Any]) -> tuple[int, ...]:
    """Ids of a conversation that waits for the assistant's next turn."""
    text = render(tokenizer, conversation["messages"], extras_of(conversation), add_generation_prompt=True)
    return tuple(token_ids(tokenizer, [text])[0])


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end an answer: the end of text, and the special token the template closes an assistant turn with."""
    stops = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if tokenizer.chat_template:
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        tail = render(tokenizer, probe).rpartition("b")[2]
        special = set(tokenizer.all_special_ids)
        stops += [token for token in token_ids(tokenizer, [tail])[0] if token in special][:1]
    return tuple(dict.fromkeys(stops))
