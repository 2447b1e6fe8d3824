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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning_trainer import template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossOn = Literal["assistant", "all"]
Conversation = dict[str, Any]


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

    @property
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


@dataclass
class _Piece:
    """A stretch of text tokenised on its own."""

    text: str
    is_answer: bool


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
        self._special = _special_ids(tokenizer)
        self._blank: dict[int, bool] = {}

    def __call__(self, conversations: Sequence[Conversation]) -> list[list[Encoded] | ValueError]:
        """Rows of each conversation, in order; the error in its place where a conversation cannot be encoded."""
        results: list[list[Encoded] | ValueError] = [[] for _ in conversations]
        pieces: list[tuple[int, list[_Piece]]] = []
        for place, conversation in enumerate(conversations):
            try:
                if "text" in conversation:
                    pieces.append((place, [_Piece(str(conversation["text"]), True)]))
                elif self._marked and self.loss_on == "assistant":
                    results[place] = [self._by_marks(conversation)]
                else:
                    pieces += [(place, row) for row in self._rows_of_text(conversation)]
            except ValueError as error:
                results[place] = error
        for place, row in self._tokenise(pieces, conversations):
            done = results[place]
            if isinstance(done, list):
                done.append(row)
        return results

    # -------------------------------------------------------------------------------------------- text of rows

    def _rows_of_text(self, conversation: Conversation) -> list[list[_Piece]]:
        messages, extras = conversation["messages"], template.extras_of(conversation)
        if self.loss_on == "all":
            return [[_Piece(template.render(self.tokenizer, messages, extras), True)]]
        rows: list[list[_Piece]] = []
        so_far = ""
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, answer = self._turn(messages[: place + 1], extras)
            if rows and prompt.startswith(so_far):
                rows[-1] += [_Piece(prompt[len(so_far) :], False), _Piece(answer, True)]
            else:
                rows.append([_Piece(prompt, False), _Piece(answer, True)])
            so_far = prompt + answer
        if not rows:
            raise ValueError("trains nothing: there is no assistant turn")
        return rows

    def _turn(self, messages: Sequence[Any], extras: dict[str, Any]) -> tuple[str, str]:
        """Text of the prompt and of the answer of the last message, an assistant's."""
        if len(messages) == 1:
            raise ValueError("the conversation starts with the assistant: there is no prompt to answer")
        prompt = template.render(self.tokenizer, messages[:-1], extras, add_generation_prompt=True)
        whole = template.render(self.tokenizer, messages, extras)
        if not whole.startswith(prompt):
            raise ValueError("the chat template renders an answer that does not follow from its own prompt")
        return prompt, whole[len(prompt) :]

    # ------------------------------------------------------------------------------------------------- tokens

    def _tokenise(
        self, rows: Sequence[tuple[int, list[_Piece]]], conversations: Sequence[Conversation]
    ) -> list[tuple[int, Encoded]]:
        ids = iter(template.token_ids(self.tokenizer, [piece.text for _, row in rows for piece in row]))
        encoded = []
        for place, row in rows:
            parts = [next(ids) for _ in row]
            whole = self.loss_on == "all" or "text" in conversations[place]
            encoded.append(
                (place, self._whole(parts[0], "text" in conversations[place]) if whole else self._turns(row, parts))
            )
        return encoded

    def _turns(self, row: Sequence[_Piece], parts: Sequence[list[int]]) -> Encoded:
        ids: list[int] = []
        trained: list[int] = []
        ends = []
        for piece, part in zip(row, parts, strict=True):
            kept = self._end_of_turn(part) if piece.is_answer else 0
            trained += [1] * kept + [0] * (len(part) - kept)
            ids += part
            if piece.is_answer:
                ends.append(len(ids) - len(part) + kept)
        # What the template puts after the last turn's end (a newline) is neither trained nor looked at: dropped.
        return _first_untrained(ids[: ends[-1]], trained[: ends[-1]], tuple(ends))

    def _end_of_turn(self, part: Sequence[int]) -> int:
        """Tokens of an answer up to and with its end-of-turn token; all of them where the template has none."""
        end = len(part)
        while end and part[end - 1] not in self._special and self._is_blank(part[end - 1]):
            end -= 1
        return end if end and part[end - 1] in self._special else len(part)

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not str(self.tokenizer.decode([token])).strip()
        return self._blank[token]

    def _whole(self, ids: list[int], is_text: bool) -> Encoded:
        end = self.tokenizer.eos_token_id
        if is_text and end is not None and ids[-1:] != [end]:
            ids = [*ids, int(end)]
        # A text has no turns: it may be cut anywhere.
        ends = tuple(range(2, len(ids) + 1)) if is_text else (len(ids),)
        return _first_untrained(ids, [1] * len(ids), ends)

    def _by_marks(self, conversation: Conversation) -> Encoded:
        try:
            out: Any = self.tokenizer.apply_chat_template(
                conversation["messages"],
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **template.extras_of(conversation),
            )
        except Exception as error:  # jinja raises what the template's author chose: the row is bad, not the run
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        ids, marks = list(out["input_ids"]), list(out["assistant_masks"])
        ends = tuple(i + 1 for i in range(len(marks)) if marks[i] and not (i + 1 < len(marks) and marks[i + 1]))
        return _first_untrained(ids, marks, ends)


def _first_untrained(ids: list[int], trained: list[int], ends: tuple[int, ...]) -> Encoded:
    return Encoded(ids, [0, *trained[1:]] if trained else [], ends)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {int(i) for i, token in added.items() if token.special}
