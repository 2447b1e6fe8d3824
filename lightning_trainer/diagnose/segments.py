"""Token ids -> the text they stand for, in the smallest pieces that are whole characters.

A byte-level BPE may spend several tokens on one emoji; decoded one by one each would read as U+FFFD.

    ids      10 240 159 167 160 2           (🧠 is four tokens)
    pieces   "a" "🧠"           "<|im_end|>"
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from lightning_trainer import template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HALF = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes a part of a character to."""

Kind = Literal["text", "special", "stop"]


@dataclass(frozen=True)
class Segment:
    """The smallest group of tokens that decodes to whole characters.

    Attributes:
        text: As it stands in the row; nothing is escaped.
        first: Place of its first token in its row of tokens.
        trained: How many of its tokens are trained on. All or none, but where training begins within a character.
        kind: `special`, also for what the tokenizer added; `stop`: a trained token that ends an answer.
    """

    text: str
    ids: tuple[int, ...]
    first: int
    trained: int
    kind: Kind = "text"


def stretches(segments: Sequence[Segment]) -> list[tuple[bool, list[Segment]]]:
    """Runs of segments that are trained, or not, in order."""
    return [(trained, list(run)) for trained, run in groupby(segments, key=lambda segment: segment.trained > 0)]


class Speller:
    """Spells out token ids.

    Args:
        tokenizer: With its chat template, which says what ends an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.stops = frozenset(template.stop_token_ids(tokenizer))
        self.alone = template.special_ids(tokenizer) | self.stops

    def __call__(self, ids: Sequence[int], trained: Sequence[int]) -> tuple[Segment, ...]:
        """The segments of one row of tokens.

        Args:
            ids: Token ids.
            trained: 1 where the token is trained on, else 0; as long as `ids`.
        """
        segments = []
        for first, last, text in self._pieces(ids):
            marks = sum(trained[first:last])
            segments.append(Segment(text, tuple(ids[first:last]), first, marks, self._kind(ids[first], marks)))
        return tuple(segments)

    def _kind(self, token: int, trained: int) -> Kind:
        if token in self.stops and trained:
            return "stop"
        return "special" if token in self.alone else "text"

    def _pieces(self, ids: Sequence[int]) -> Iterator[tuple[int, int, str]]:
        """First token, end and text of each piece."""
        before = start = 0
        for end in range(1, len(ids) + 1):
            closed = end == len(ids) or ids[end] in self.alone or ids[start] in self.alone
            text = self._behind(ids[before:start], ids[start:end])
            if closed or (text and not text.endswith(HALF)):
                yield start, end, text
                before, start = start, end

    def _behind(self, context: Sequence[int], ids: Sequence[int]) -> str:
        """Text of `ids` behind `context`: a SentencePiece tokenizer drops the space in front of what comes first."""
        known = self._decode(context)
        whole = self._decode([*context, *ids])
        return whole[len(known) :] if whole.startswith(known) else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)
