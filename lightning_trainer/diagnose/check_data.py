"""The rows of a split: all of them where they are few or tokenised already, else the first of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lightning_trainer import template
from lightning_trainer.data import ChatDataModule
from lightning_trainer.data.packing import Ints
from lightning_trainer.data.render import Conversation
from lightning_trainer.data.rows import BadRow, RawRow, read
from lightning_trainer.data.split import Split, place_of
from lightning_trainer.data.store import TokenStore, is_built
from lightning_trainer.data.tokenise import tokenise

SAMPLE = 1000
"""Rows tokenised at most: a second or two."""

PERCENTILES = (0, 50, 90, 95, 99, 100)

REASONS = 3
"""Bad rows that are shown."""


@dataclass(frozen=True)
class SplitFacts:
    """One split. Where `exact` is False every count but `read` and `duplicates` is the sample's, scaled up.

    Attributes:
        exact: Whether all rows were looked at.
        looked_at: Rows that were.
        read: Rows of the files that belong to the split.
        kept: Rows of which something is trained on.
        examples: Token rows made of them; a conversation may become several.
        duplicates: Rows whose content stands in an earlier row.
        lengths: Percentiles of the examples' tokens: p0, p50, …, p100.
        stops: Share of the examples that train a token which ends an answer.
        reasons: Of the first bad rows, with file and line.
    """

    exact: bool
    looked_at: int
    read: int
    kept: int
    bad: int
    too_long: int
    too_short: int
    truncated: int
    duplicates: int
    examples: int
    tokens: int
    trained_tokens: int
    lengths: dict[str, int]
    stops: float
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """A split's facts, and the tokens of each example (of as many as there are about)."""

    facts: SplitFacts
    lengths: Ints
    trained: Ints


@dataclass(frozen=True)
class _Part(Split):
    """The first rows of a split, drawn already."""

    items: tuple[tuple[RawRow, Conversation] | BadRow, ...] = field(default=())

    def conversations(self) -> Iterator[tuple[RawRow, Conversation] | BadRow]:
        yield from self.items


def look_at(data: ChatDataModule, name: str) -> Rows:
    """Count a split; nothing is left on disk.

    Raises:
        InputError: The path is not set, or a file is not there or cannot be read at all.
    """
    split = data.split(name)
    built = data.store_folder(name)
    if is_built(built):
        return _rows(split, TokenStore(built), None)
    items = tuple(islice(split.conversations(), SAMPLE + 1))
    # What would raise is counted, and told with the rest.
    on_long_row = "drop" if split.recipe.on_long_row == "raise" else split.recipe.on_long_row
    recipe = replace(split.recipe, on_long_row=on_long_row)
    part = _Part(split.name, split.files, split.share, recipe, split.counts_unreadable, items[:SAMPLE])
    with TemporaryDirectory() as folder:
        store = tokenise(part, Path(folder) / "part", "quarantine", show_progress=False)
        return _rows(split, store, None if len(items) <= SAMPLE else _count(split))


def _count(split: Split) -> tuple[int, int]:
    """Rows of a split and how many of them are duplicates, without making anything of them."""
    seen: Counter[int] = Counter()
    unreadable = 0
    for source in split.files:
        for row in read(source):
            if isinstance(row, BadRow):
                unreadable += split.counts_unreadable
            elif split.share.holds(place_of(row.identity, split.recipe.seed)):
                seen[row.identity] += 1
    return seen.total() + unreadable, seen.total() - len(seen)


def _rows(split: Split, store: TokenStore, counted: tuple[int, int] | None) -> Rows:
    report: dict[str, Any] = store.ledger["report"]
    read, duplicates = counted or (report["read"], report["duplicates"])
    scale = read / max(report["read"], 1)
    names = ("kept", "bad", "too_long", "too_short", "truncated")
    examples = round(len(store) * scale)
    lengths, trained = (np.resize(values, examples) for values in (store.lengths, store.trained))
    facts = SplitFacts(
        exact=counted is None,
        looked_at=report["read"],
        read=read,
        **{name: round(report[name] * scale) for name in names},
        duplicates=duplicates,
        examples=examples,
        tokens=int(lengths.sum()),
        trained_tokens=int(trained.sum()),
        lengths=report["lengths"],
        stops=_stops(store, template.stop_token_ids(split.recipe.tokenizer)),
        reasons=_reasons(store),
    )
    return Rows(facts, lengths, trained)


def _stops(store: TokenStore, stop_ids: tuple[int, ...]) -> float:
    looked_at = min(len(store), SAMPLE)
    pairs = (store[row] for row in range(looked_at))
    return sum(bool(np.isin(ids[marks == 1], stop_ids).any()) for ids, marks in pairs) / max(looked_at, 1)


def _reasons(store: TokenStore) -> tuple[str, ...]:
    bad = [fault for fault in store.ledger["faults"] if fault["kind"] == "bad"]
    return tuple(f"{fault['file']}:{fault['line']}: {fault['reason']}" for fault in bad[:REASONS])
