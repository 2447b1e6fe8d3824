"""One split: its rows as conversations, and their tokens on disk."""

from __future__ import annotations

import hashlib
import inspect
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lightning_trainer.data.encode import Conversation, Encoded, Encoder, LossOn
from lightning_trainer.data.rows import BadRow, RawRow, Source, read
from lightning_trainer.data.store import (
    TOKENS,
    Build,
    StoreWriter,
    TokenStore,
    batched,
    is_built,
    percentiles,
    write_ledger,
)
from lightning_trainer.profiles import row_forms
from lightning_trainer.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_trainer.profiles import DataProfile

STORE_FORMAT = 1
"""Part of every cache key: raised when the meaning of stored tokens changes."""

ENCODE_AT_ONCE = 512

SystemPromptMode = Literal["prepend", "replace"]
OnLongRow = Literal["drop", "truncate", "raise"]
OnBadRow = Literal["quarantine", "raise"]


@dataclass(frozen=True)
class Share:
    """Which rows of the files belong to a split: those whose hash lies in [low, high) of 2**64."""

    low: int = 0
    high: int = 2**64

    def holds(self, place: int) -> bool:
        """Whether a row at `place` belongs."""
        return self.low <= place < self.high


def place_of(identity: int, seed: int) -> int:
    """A row's place in [0, 2**64): a function of its content and the seed, not of where it stands."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{identity}".encode()).digest()[:8], "big")


def validation_bound(files: list[Source], seed: int, fraction: float, max_rows: int) -> int:
    """Rows whose place lies below this are the validation split: `fraction` of them, at most `max_rows`."""
    rows = (row for source in files for row in read(source) if isinstance(row, RawRow))
    places = np.unique(np.array([place_of(row.identity, seed) for row in rows], dtype=np.uint64))
    bound = int(fraction * 2**64)
    return min(bound, int(places[max_rows])) if len(places) > max_rows else bound


@dataclass(frozen=True)
class Recipe:
    """Everything the tokens of a split depend on, besides the rows themselves.

    Attributes:
        system_prompt: Already rendered, or None.
    """

    tokenizer: PreTrainedTokenizerBase
    profile: DataProfile
    system_prompt: str | None
    system_prompt_mode: SystemPromptMode
    seed: int
    max_length: int
    min_length: int
    loss_on: LossOn
    on_long_row: OnLongRow

    def key(self) -> dict[str, Any]:
        """The recipe in plain values, tokenizer, template and profile by hash."""
        return {
            "format": STORE_FORMAT,
            **recipe_hashes(self.tokenizer, self.profile),
            "row_forms": _sha(inspect.getsource(row_forms)),
            "system_prompt": self.system_prompt,
            "system_prompt_mode": self.system_prompt_mode,
            "seed": self.seed,
            "max_length": self.max_length,
            "min_length": self.min_length,
            "loss_on": self.loss_on,
            "on_long_row": self.on_long_row,
        }


def recipe_hashes(tokenizer: PreTrainedTokenizerBase, profile: DataProfile) -> dict[str, str]:
    """Hashes of tokenizer, chat template and profile (source and options)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    options = json.dumps(vars(profile), sort_keys=True, default=str)
    # A profile's own source and that of the classes it builds on, ours included.
    modules = [inspect.getmodule(cls) for cls in type(profile).__mro__[:-1]]
    source = f"{profile.version}\n" + "".join(inspect.getsource(module) for module in modules if module is not None)
    return {
        "tokenizer": _sha(vocabulary + json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)),
        "template": _sha(str(tokenizer.chat_template)),
        "profile": _sha(f"{type(profile).__qualname__}\n{options}\n{source}"),
    }


@lru_cache
def _keywords_of(transform: Callable[..., Any]) -> frozenset[str]:
    """Keywords a `transform_example` takes: a profile of the user's may know the three positional ones alone."""
    parameters = inspect.signature(transform).parameters
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return frozenset(["rng", "system_prompt_mode"] if any_keyword else parameters)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Split:
    """One split of the data.

    Attributes:
        name: `train`, `val`, `test` or `predict`; part of each row's random key.
        files: Where its rows stand.
        share: The part of the rows that belongs to it.
        counts_unreadable: Whether lines that are no rows at all are this split's to report.
    """

    name: str
    files: list[Source]
    share: Share
    recipe: Recipe
    counts_unreadable: bool = True

    def digest(self) -> str:
        """Hash of rows and recipe: the name of the split's folder in the cache."""
        rows = [source.digest() for source in self.files]
        key = {"split": self.name, "rows": rows, "names": [s.name for s in self.files], "share": vars(self.share)}
        return _sha(json.dumps({**key, **self.recipe.key()}, sort_keys=True))[:40]

    def conversations(self) -> Iterator[tuple[RawRow, Conversation] | BadRow]:
        """Each row of this split as its profile makes it, or why it cannot be used."""
        for source in self.files:
            for row in read(source):
                if isinstance(row, BadRow):
                    if self.counts_unreadable:
                        yield row
                elif self.share.holds(place_of(row.identity, self.recipe.seed)):
                    yield self._transform(row)

    def _transform(self, row: RawRow) -> tuple[RawRow, Conversation] | BadRow:
        recipe = self.recipe
        keywords: dict[str, Any] = {
            "rng": random.Random(f"{recipe.seed}:{self.name}:{row.identity}"),
            "system_prompt_mode": recipe.system_prompt_mode,
        }
        transform = recipe.profile.transform_example
        taken = {k: v for k, v in keywords.items() if k in _keywords_of(type(recipe.profile).transform_example)}
        try:
            conversation = transform(row.data, row.line, recipe.system_prompt, **taken)
        except ValueError as error:
            return BadRow(row.file, row.line, str(error))
        return row, conversation

    def build(self, folder: Path, on_bad_row: OnBadRow, show_progress: bool) -> TokenStore:
        """Tokenise the split into `folder`, or take it as it is when it is already there.

        Raises:
            InputError: A bad row under `on_bad_row: raise`, or a long one under `on_long_row: raise`.
        """
        if not is_built(folder):
            with Build(folder) as tmp:
                _Tokeniser(self, on_bad_row).run(tmp, show_progress)
        return TokenStore(folder)


class _Tokeniser:
    """Fills one store and its ledger."""

    def __init__(self, split: Split, on_bad_row: OnBadRow) -> None:
        self.split, self.recipe, self.on_bad_row = split, split.recipe, on_bad_row
        self.encode = Encoder(split.recipe.tokenizer, split.recipe.loss_on)
        self.files: dict[str, int] = {}
        self.faults: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.seen: Counter[int] = Counter()
        self.lengths: list[int] = []

    def run(self, folder: Path, show_progress: bool) -> None:
        from datasets.utils.tqdm import tqdm

        writer = StoreWriter(folder / TOKENS)
        name = self.split.name
        with tqdm(desc=f"tokenising {name}", unit=" rows", disable=not show_progress) as bar:
            for items in batched(self.split.conversations(), ENCODE_AT_ONCE):
                self._batch(items, writer)
                bar.update(len(items))
        writer.close()
        write_ledger(
            folder, {"split": name, "files": list(self.files), "report": self._report(), "faults": self.faults}
        )

    def _batch(self, items: list[tuple[RawRow, Conversation] | BadRow], writer: StoreWriter) -> None:
        good = [item for item in items if not isinstance(item, BadRow)]
        encoded = iter(self.encode([conversation for _, conversation in good]))
        for item in items:
            self.counts["read"] += 1
            if isinstance(item, BadRow):
                self._bad(item)
                continue
            row, _ = item
            self.seen[row.identity] += 1
            result = next(encoded)
            if isinstance(result, ValueError):
                self._bad(BadRow(row.file, row.line, str(result)))
            elif not any(part.trained_tokens for part in result):
                self._bad(BadRow(row.file, row.line, "trains nothing: no assistant token to learn from"))
            else:
                self._keep(row, result, writer)

    def _keep(self, row: RawRow, parts: list[Encoded], writer: StoreWriter) -> None:
        file = self.files.setdefault(row.file, len(self.files))
        kept = 0
        for turn, part in enumerate(parts):
            fitted = self._fit(row, part)
            if fitted is not None:
                writer.add(fitted, file, row.line, turn)
                self.lengths.append(len(fitted.ids))
                self.counts["tokens"] += len(fitted.ids)
                self.counts["trained_tokens"] += fitted.trained_tokens
                kept += 1
        self.counts["kept"] += kept > 0

    def _fit(self, row: RawRow, part: Encoded) -> Encoded | None:
        length, most = len(part.ids), self.recipe.max_length
        if not part.trained_tokens:
            return None
        if length < self.recipe.min_length:
            self._drop(row, "too_short", f"{length} tokens, fewer than min_length {self.recipe.min_length}")
            return None
        if length <= most:
            return part
        if self.recipe.on_long_row == "raise":
            raise InputError(
                f"{row.file}:{row.line}: {length} tokens, more than max_length {most}; raise data.max_length, "
                "or set data.on_long_row to drop or truncate",
                key="data.on_long_row",
            )
        shorter = part.cut(most) if self.recipe.on_long_row == "truncate" else None
        if shorter is None or not shorter.trained_tokens:
            self._drop(row, "too_long", f"{length} tokens, more than max_length {most}")
            return None
        self.counts["truncated"] += 1
        return shorter

    def _drop(self, row: RawRow, kind: str, reason: str) -> None:
        self.counts[kind] += 1
        self.faults.append({"file": row.file, "line": row.line, "kind": kind, "reason": reason})

    def _bad(self, row: BadRow) -> None:
        if self.on_bad_row == "raise":
            raise InputError(f"{row.file}:{row.line}: {row.reason}", key="data.on_bad_row")
        self.counts["bad"] += 1
        self.faults.append({"file": row.file, "line": row.line, "kind": "bad", "reason": row.reason})

    def _report(self) -> dict[str, Any]:
        names = ("read", "kept", "tokens", "trained_tokens", "truncated", "too_long", "too_short", "bad")
        return {
            **{name: self.counts[name] for name in names},
            "rows": len(self.lengths),
            "duplicates": sum(count - 1 for count in self.seen.values()),
            "lengths": percentiles(self.lengths),
        }
