"""Chat templates: the one place that renders a conversation and turns the text into token ids.

Training, validation, previews and predictions all come through here, so a prompt looks the same everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_trainer.types import InputError, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_KEYS = ("tools", "documents")
"""What a row may hand to its chat template besides `messages`."""

_PROBE = "q7z"

_ANCHOR = "\0"

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
    with refusals():
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **(extras or {})
        )
    return checked(str(text))


@contextmanager
def refusals() -> Iterator[None]:
    """What a template raises for a conversation it does not take, as a ValueError."""
    from jinja2.exceptions import TemplateError

    try:
        yield
    except (TemplateError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error


def checked(text: str) -> str:
    """The text, if it can be written as UTF-8.

    Raises:
        ValueError: It holds half of a surrogate pair, which no tokenizer takes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"holds half of a cut emoji, {half!a}; write the file anew as UTF-8") from error
    return text


def extras_of(conversation: dict[str, Any]) -> dict[str, Any]:
    """What the conversation hands to the template besides its messages."""
    return {key: conversation[key] for key in TEMPLATE_KEYS if conversation.get(key) is not None}


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that already hold their special tokens; nothing is added, nothing truncated."""
    if not texts:
        return []
    if (backend := bare_backend(tokenizer)) is not None:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def bare_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """What a tokenizer hands its texts to, freed of padding and truncation, as its every call without them does.

    None where it does more with texts than hand them on.
    """
    from transformers import PreTrainedTokenizerFast

    own_way = getattr(type(tokenizer), "_encode_plus", None) is not PreTrainedTokenizerFast._encode_plus
    if own_way or type(tokenizer).__call__ is not PreTrainedTokenizerFast.__call__:
        return None
    backend = tokenizer.backend_tokenizer
    if backend.encode_special_tokens or getattr(tokenizer, "split_special_tokens", False):
        return None
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend


def continued_token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that stand behind others.

    A SentencePiece tokenizer puts a space before whatever it is given, which in the middle of a conversation is none:
    its texts are tokenised behind an anchor, which is cut off again.
    """
    alone, anchor, behind = token_ids(tokenizer, ["a", _ANCHOR, f"{_ANCHOR}a"])
    if behind[: len(anchor)] != anchor or behind[len(anchor) :] == alone:
        return token_ids(tokenizer, texts)
    return [ids[len(anchor) :] for ids in token_ids(tokenizer, [_ANCHOR + text for text in texts])]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, conversation: dict[str, Any]) -> tuple[int, ...]:
    """Ids of a conversation that waits for the assistant's next turn."""
    text = render(tokenizer, conversation["messages"], extras_of(conversation), add_generation_prompt=True)
    return tuple(token_ids(tokenizer, [text])[0])


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the special tokens, those added to the vocabulary included."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {int(i) for i, token in added.items() if token.special}


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end an answer: the end of text, and the special token the template closes an assistant turn with."""
    stops = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if tokenizer.chat_template:
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        tail = render(tokenizer, probe).rpartition(_PROBE)[2]
        special = special_ids(tokenizer)
        stops += [token for token in token_ids(tokenizer, [tail])[0] if token in special][:1]
    return tuple(dict.fromkeys(stops))
