"""Many conversations at a time as their chat template renders them: texts up to each answer, or token ids with marks.

Plain conversations go a quick way of our own (see `plain_template`), if the first of them comes out of it as the
tokenizer itself renders it; all others, and all where it does not, go the tokenizer's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_trainer import template
from lightning_trainer.data.plain_template import PlainTemplate, is_plain, plain_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_trainer.types import Message

Result = TypeVar("Result")

Conversation = dict[str, Any]

Turns = list[tuple[str, str]]

Marked = tuple[list[int], list[int]]

AT_ONCE = 64
"""Conversations in one call of the tokenizer: where one is refused, these are done again one by one."""


def turns_of_all(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[Turns | ValueError]:
    """Of each conversation's answers that follow something: the text up to the answer, and with it.

    The text up to it ends with the template's generation prompt. What refuses a conversation stands in its place.
    """
    quick = _plain_template(tokenizer)
    quickly = None if quick is None else lambda given: [_turns(quick, one["messages"]) for one in given]
    return _by_the_quick_way(conversations, quickly, lambda given: _turn_by_turn(tokenizer, given))


def marked_token_ids(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]
) -> list[Marked | ValueError]:
    """Token ids of each conversation, and 1 for each that lies within the template's `{% generation %}` marks.

    What refuses a conversation stands in its place.
    """
    quick, backend = _plain_template(tokenizer), template.bare_backend(tokenizer)
    known = quick is not None and backend is not None and quick.has_tracker
    quickly = (lambda given: _marked_quickly(quick, backend, given)) if quick is not None and known else None

    def together(given: list[list[Message]], extras: dict[str, Any]) -> list[Marked]:
        out: Any = tokenizer.apply_chat_template(
            given, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **extras
        )
        return list(zip(out["input_ids"], out["assistant_masks"], strict=True))

    return _by_the_quick_way(conversations, quickly, lambda given: _together(given, together))


def _plain_template(tokenizer: PreTrainedTokenizerBase) -> PlainTemplate | None:
    return plain_template(tokenizer, template.chat_template(tokenizer)) if tokenizer.chat_template else None


def _by_the_quick_way(
    conversations: Sequence[Conversation],
    quickly: Callable[[Sequence[Conversation]], list[Result | ValueError]] | None,
    slowly: Callable[[Sequence[Conversation]], list[Result | ValueError]],
) -> list[Result | ValueError]:
    """What is made of each conversation: of plain ones quickly, if the first of them is the same made slowly."""
    flags = [is_plain(conversation) for conversation in conversations]
    plain = [conversation for conversation, flag in zip(conversations, flags, strict=True) if flag]
    if quickly is None or not plain or not _alike(quickly(plain[:1])[0], slowly(plain[:1])[0]):
        return slowly(conversations)
    others = [conversation for conversation, flag in zip(conversations, flags, strict=True) if not flag]
    made, rest = iter(quickly(plain)), iter(slowly(others))
    return [next(made) if flag else next(rest) for flag in flags]


def _alike(one: Any, other: Any) -> bool:
    return one == other or (isinstance(one, ValueError) and isinstance(other, ValueError))


# The quick way


def _turns(quick: PlainTemplate, messages: Sequence[Message]) -> Turns | ValueError:
    try:
        with template.refusals():
            turns = quick.turns(messages)
        for _, whole in turns:
            template.checked(whole)
    except ValueError as error:
        return error
    return turns


def _marked_quickly(
    quick: PlainTemplate, backend: Any, conversations: Sequence[Conversation]
) -> list[Marked | ValueError]:
    rendered: list[tuple[str, list[tuple[int, int]]] | ValueError] = []
    for conversation in conversations:
        try:
            with template.refusals():
                text, spans = quick.generated(conversation["messages"])
            rendered.append((template.checked(text), spans))
        except ValueError as error:
            rendered.append(error)
    texts = [one[0] for one in rendered if not isinstance(one, ValueError)]
    encodings = iter(backend.encode_batch(texts, add_special_tokens=False))
    return [one if isinstance(one, ValueError) else _flags_of_spans(next(encodings), one[1]) for one in rendered]


def _flags_of_spans(encoding: Any, spans: Sequence[tuple[int, int]]) -> Marked:
    """Token ids, and 1 for those that hold a character of a span."""
    ids: list[int] = encoding.ids
    marks = [0] * len(ids)
    for start, end in spans:
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
        if first is None:
            break
        stop = last + 1 if last else len(ids)
        marks[first:stop] = [1] * (stop - first)
    return ids, marks


# The tokenizer's way


def _turn_by_turn(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]
) -> list[Turns | ValueError]:
    """As `turns_of_all`: a conversation is rendered for each prompt, and for each answer."""
    ends = [
        [end for end, message in enumerate(conversation["messages"], start=1) if message["role"] == "assistant"]
        for conversation in conversations
    ]
    parts = [
        {**conversation, "messages": conversation["messages"][:end]}
        for conversation, mine in zip(conversations, ends, strict=True)
        for end in mine
        if end > 1
    ]
    prompts = [{**part, "messages": part["messages"][:-1]} for part in parts]
    begun = iter(_render_all(tokenizer, prompts, add_generation_prompt=True))
    wholes = iter(_render_all(tokenizer, parts))
    made: list[Turns | ValueError] = []
    for mine in ends:
        turns = [(next(begun), next(wholes)) for end in mine if end > 1]
        faults = [text for turn in turns for text in turn if isinstance(text, ValueError)]
        made.append(faults[0] if faults else [(str(prompt), str(whole)) for prompt, whole in turns])
    return made


def _render_all(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], add_generation_prompt: bool = False
) -> list[str | ValueError]:
    """The text of each conversation; what refuses one stands in its place."""

    def together(given: list[list[Message]], extras: dict[str, Any]) -> list[str]:
        texts: Any = tokenizer.apply_chat_template(
            given, tokenize=False, add_generation_prompt=add_generation_prompt, **extras
        )
        return [template.checked(text) for text in texts]

    return _together(conversations, together)


def _together(
    conversations: Sequence[Conversation], act: Callable[[list[list[Message]], dict[str, Any]], list[Result]]
) -> list[Result | ValueError]:
    """What `act` makes of conversations, AT_ONCE of them at a time."""
    starts = range(0, len(conversations), AT_ONCE)
    return [made for start in starts for made in _in_one_call(conversations[start : start + AT_ONCE], act)]


def _in_one_call(
    conversations: Sequence[Conversation], act: Callable[[list[list[Message]], dict[str, Any]], list[Result]]
) -> list[Result | ValueError]:
    """The same in one call for those without extras, unless that is refused; else one by one."""
    plain = [place for place, conversation in enumerate(conversations) if not template.extras_of(conversation)]
    made: dict[int, Result | ValueError] = {}
    if plain:
        with suppress(ValueError), template.refusals():
            made = dict(zip(plain, act([list(conversations[place]["messages"]) for place in plain], {}), strict=True))
    for place, conversation in enumerate(conversations):
        if place not in made:
            try:
                with template.refusals():
                    [made[place]] = act([list(conversation["messages"])], template.extras_of(conversation))
            except ValueError as error:
                made[place] = _in_words(error)
    return [made[place] for place in range(len(conversations))]


def _in_words(error: ValueError) -> ValueError:
    """A tokenizer's complaint of half a surrogate pair, as `checked` says it."""
    if isinstance(error, UnicodeEncodeError):
        try:
            template.checked(error.object)
        except ValueError as worded:
            return worded
    return error
