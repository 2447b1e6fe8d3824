"""Token ids of texts in pieces, each tokenised apart from its neighbours.

Calling a tokenizer costs more than a short text does, so the pieces of a row go through it as one text with a special
token between them: it cuts a text at its special tokens before it looks at anything else.

    prompt <sep> answer <sep> prompt        one call; the ids are cut at the separator's
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_trainer.template import bare_backend, continued_token_ids, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBES = ("a", " b", "\n", "C\n\n", "\n d", "é ", "", "1 2")


class _Separator(NamedTuple):
    text: str
    token: int


class PieceTokenizer:
    """See the module.

    Args:
        tokenizer: Any; those that do not cut at special tokens are given each piece by itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._separator = _separator_of(tokenizer)

    def __call__(self, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Ids of each piece of each row. All but a row's first piece stand behind others; nothing is added to any."""
        if self._separator is None:
            return _apart(self.tokenizer, rows)
        text, token = self._separator
        joined = token_ids(self.tokenizer, [text.join(row) for row in rows])
        found = [_cut(ids, token) for ids in joined]
        # Where a text holds the separator itself, its pieces are not told apart by it.
        unclear = [place for place, row in enumerate(rows) if any(text in piece for piece in row)]
        for place, parts in zip(unclear, _apart(self.tokenizer, [rows[place] for place in unclear]), strict=True):
            found[place] = parts
        return found


def _apart(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    firsts = token_ids(tokenizer, [row[0] for row in rows])
    laters = iter(continued_token_ids(tokenizer, [piece for row in rows for piece in row[1:]]))
    return [[first, *(next(laters) for _ in row[1:])] for row, first in zip(rows, firsts, strict=True)]


def _cut(ids: list[int], token: int) -> list[list[int]]:
    parts, start = [], 0
    for _ in range(ids.count(token)):
        end = ids.index(token, start)
        parts.append(ids[start:end])
        start = end + 1
    parts.append(ids[start:])
    return parts


def _separator_of(tokenizer: PreTrainedTokenizerBase) -> _Separator | None:
    """A special token that texts seldom hold, if pieces come out between it as they do by themselves."""
    if bare_backend(tokenizer) is None:
        return None
    added = tokenizer.added_tokens_decoder
    template = str(tokenizer.chat_template)
    chosen = next(
        (
            _Separator(token.content, number)
            for number, token in added.items()
            if token.content not in template and _stands_alone(token, [other.content for other in added.values()])
        ),
        None,
    )
    if chosen is None:
        return None
    rows = [[one, other] for one in _PROBES for other in _PROBES]
    joined = token_ids(tokenizer, [chosen.text.join(row) for row in rows])
    return chosen if [_cut(ids, chosen.token) for ids in joined] == _apart(tokenizer, rows) else None


def _stands_alone(token: Any, added: Sequence[str]) -> bool:
    """Whether it is found as it stands whatever is beside it, and its neighbours as if it were the end of the text."""
    if not token.special or token.lstrip or token.rstrip or token.single_word or token.normalized:
        return False
    text = token.content
    is_word = any(text[place].isalnum() or text[place] == "_" for place in (0, -1))
    return not is_word and not any(_overlap(text, other) for other in added if other != text)


def _overlap(one: str, other: str) -> bool:
    """Whether one text could begin within the other, or hold it."""
    ends = range(1, min(len(one), len(other)) + 1)
    return any(one[-n:] == other[:n] or other[-n:] == one[:n] for n in ends) or one in other or other in one
