"""Conversation -> token ids and the marks of what is trained.

Trained are the assistant's turns with their end-of-turn token, found by structure, never by searching for text:

* A template with `{% generation %}` marks says itself which tokens the assistant wrote; its marks are taken.
* Any other template: each assistant turn is rendered against its own prompt, and prompt and answer are tokenised
  apart, as they are at inference. Turns share one row where the template is prefix-stable for this conversation;
  where it rewrites earlier turns (Qwen3 drops their reasoning) each turn is a row of its own.

    <|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\n   hello<|im_end|>
    prompt: not trained                                        answer: trained
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightning_trainer import template
from lightning_trainer.data.pieces import PieceTokenizer
from lightning_trainer.data.render import Conversation, marked_token_ids, turns_of_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GROUP_CHARACTERS = 1 << 24
"""Of the texts that are rendered before the first of them is cut into pieces."""

_MARKED_RUN = re.compile(rb"\x01+")

LossOn = Literal["assistant", "all"]


@dataclass(frozen=True)
class Encoded:
    """One row of tokens.

    Attributes:
        ids: Token ids.
        trained: 1 where the token is trained on, else 0; as long as `ids`. The first is 0: nothing comes before it.
        turn_ends: Lengths at which the row may be cut: after each whole assistant turn.
    """

    ids: list[int]
    trained: list[int]
    turn_ends: tuple[int, ...]

    @cached_property
    def trained_tokens(self) -> int:
        """How many tokens are trained on."""
        return sum(self.trained)

    def cut(self, max_length: int) -> Encoded | None:
        """The row up to its last whole turn within `max_length`, or None where none fits."""
        fitting = [end for end in self.turn_ends if end <= max_length]
        if not fitting:
            return None
        end = fitting[-1]
        return Encoded(self.ids[:end], self.trained[:end], tuple(fitting))


class _Piece(NamedTuple):
    """A stretch of text tokenised on its own.

    Attributes:
        trained: `no`; `turn`: up to its end-of-turn token; `all`: whole; `text`: whole, and the end of text behind it.
    """

    text: str
    trained: Literal["no", "turn", "all", "text"]


class Encoder:
    """Turns conversations into token rows, many at a time: tokenising in one call is what makes it fast.

    Args:
        tokenizer: With its chat template.
        loss_on: `assistant`, or `all` to train on every token of the conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn = "assistant") -> None:
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self._marked = bool(tokenizer.chat_template) and template.has_generation_marks(tokenizer)
        self._special = template.special_ids(tokenizer)
        self._turn_ends = template.stop_token_ids(tokenizer)
        self._token_ids = PieceTokenizer(tokenizer)
        self._blank: dict[int, bool] = {}

    def __call__(self, conversations: Sequence[Conversation]) -> list[list[Encoded] | ValueError]:
        """Rows of each conversation, in order; the error in its place where a conversation cannot be encoded."""
        results: list[list[Encoded] | ValueError] = [[] for _ in conversations]
        turns = [place for place, conversation in enumerate(conversations) if self._has_turns(conversation)]
        chosen = [conversations[place] for place in turns]
        if self._marked:
            for place, found in zip(turns, marked_token_ids(self.tokenizer, chosen), strict=True):
                results[place] = found if isinstance(found, ValueError) else [_by_marks(*found)]
            turns, chosen = [], []
        made = dict(zip(turns, self._rows_of_turns(chosen), strict=True))
        made |= {n: self._row_of_text(c) for n, c in enumerate(conversations) if not self._has_turns(c)}
        rows: list[tuple[int, list[_Piece]]] = []
        for place, pieces in sorted(made.items()):
            if isinstance(pieces, ValueError):
                results[place] = pieces
            else:
                rows += [(place, row) for row in pieces]
        for (place, _), encoded in zip(rows, self._tokenise([row for _, row in rows]), strict=True):
            done = results[place]
            assert isinstance(done, list)
            done.append(encoded)
        return results

    def _has_turns(self, conversation: Conversation) -> bool:
        return self.loss_on == "assistant" and "text" not in conversation

    def _row_of_text(self, conversation: Conversation) -> list[list[_Piece]] | ValueError:
        """One row, trained whole."""
        try:
            if "text" in conversation:
                return [[_Piece(template.checked(str(conversation["text"])), "text")]]
            return [self._whole_row(conversation["messages"], template.extras_of(conversation))]
        except ValueError as error:
            return error

    def _rows_of_turns(self, conversations: Sequence[Conversation]) -> Iterator[list[list[_Piece]] | ValueError]:
        """Of each conversation its rows, or why there are none; many are rendered at a time."""
        for group in _groups(conversations):
            yield from self._rows_of_group(group)

    def _rows_of_group(self, conversations: Sequence[Conversation]) -> Iterator[list[list[_Piece]] | ValueError]:
        for conversation, turns in zip(conversations, turns_of_all(self.tokenizer, conversations), strict=True):
            try:
                if conversation["messages"][:1] and conversation["messages"][0]["role"] == "assistant":
                    raise ValueError("the conversation starts with the assistant: there is no prompt to answer")
                if isinstance(turns, ValueError):
                    raise turns
                yield self._rows_of(turns)
            except ValueError as error:
                yield error

    def _rows_of(self, turns: Sequence[tuple[str, str]]) -> list[list[_Piece]]:
        """From the text up to each answer, and with it."""
        rows: list[list[_Piece]] = []
        so_far = ""
        for prompt, whole in turns:
            if not whole.startswith(prompt):
                raise ValueError("the chat template renders an answer that does not follow from its own prompt")
            answer = whole[len(prompt) :]
            if rows and prompt.startswith(so_far):
                rows[-1] += [_Piece(prompt[len(so_far) :], "no"), _Piece(answer, "turn")]
            else:
                rows.append([_Piece(prompt, "no"), _Piece(answer, "turn")])
            so_far = whole
        if not rows:
            raise ValueError("trains nothing: there is no assistant turn")
        return rows

    def _whole_row(self, messages: Sequence[Any], extras: dict[str, Any]) -> list[_Piece]:
        """All of a conversation, in pieces that end where a turn does: there a long row may be cut."""
        whole = template.render(self.tokenizer, messages, extras)
        starts = [template.render(self.tokenizer, messages[:end], extras) for end in _ends_of_turns(messages)[:-1]]
        cuts = [0, *(len(start) for start in starts if whole.startswith(start)), len(whole)]
        return [_Piece(whole[a:b], "all") for a, b in pairwise(cuts) if a < b]

    def _tokenise(self, rows: Sequence[list[_Piece]]) -> list[Encoded]:
        parts_of_all = self._token_ids([[piece.text for piece in row] for row in rows])
        return [
            self._text(parts[0]) if row[0].trained == "text" else self._row(row, parts)
            for row, parts in zip(rows, parts_of_all, strict=True)
        ]

    def _row(self, row: Sequence[_Piece], parts: Sequence[list[int]]) -> Encoded:
        ids: list[int] = []
        trained: list[int] = []
        ends = []
        for piece, part in zip(row, parts, strict=True):
            if piece.trained == "no":
                trained += [0] * len(part)
            else:
                end = self._end_of_turn(part)
                kept = end if piece.trained == "turn" else len(part)
                ends.append(len(ids) + (end if piece is not row[-1] else kept))
                trained += [1] * kept + [0] * (len(part) - kept)
            ids += part
        # What the template puts after the last turn's end (a newline) is neither trained nor looked at: dropped.
        return _first_untrained(ids[: ends[-1]], trained[: ends[-1]], tuple(ends))

    def _end_of_turn(self, part: Sequence[int]) -> int:
        """Tokens of an answer up to and with its end-of-turn token; all of them where the template has none.

        It stands in the run of special tokens and white space that closes the answer; a template may close the
        conversation behind it (`<|end|>\\n<|endoftext|>`), which is not the answer's.
        """
        known = special = 0
        for end in range(len(part), 0, -1):
            token = part[end - 1]
            if token in self._special:
                special = end
            elif not self._is_blank(token):
                break
            if token in self._turn_ends:
                known = end
        return known or special or len(part)

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not str(self.tokenizer.decode([token])).strip()
        return self._blank[token]

    def _text(self, ids: list[int]) -> Encoded:
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if start is not None and ids[:1] != [start] and self._begins_texts_with(start):
            ids = [int(start), *ids]
        if end is not None and ids[-1:] != [end]:
            ids = [*ids, int(end)]
        # A text has no turns: it may be cut anywhere.
        return _first_untrained(ids, [1] * len(ids), tuple(range(2, len(ids) + 1)))

    def _begins_texts_with(self, token: int) -> bool:
        return list(self.tokenizer("a")["input_ids"])[:1] == [token]


def _groups(conversations: Sequence[Conversation]) -> Iterator[list[Conversation]]:
    """Conversations whose rendered texts, which repeat what comes before each turn, fit together into memory."""
    group: list[Conversation] = []
    size = 0
    for conversation in conversations:
        messages = conversation["messages"]
        size += len(messages) * sum(len(str(message.get("content"))) for message in messages)
        group.append(conversation)
        if size > GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _by_marks(ids: list[int], marks: list[int]) -> Encoded:
    ends = tuple(match.end() for match in _MARKED_RUN.finditer(bytes(marks)))
    return _first_untrained(ids, marks, ends)


def _ends_of_turns(messages: Sequence[Any]) -> list[int]:
    """How many messages there are up to and with each assistant turn."""
    return [place + 1 for place, message in enumerate(messages) if message["role"] == "assistant"]


def _first_untrained(ids: list[int], trained: list[int], ends: tuple[int, ...]) -> Encoded:
    return Encoded(ids, [0, *trained[1:]] if trained else [], ends)
