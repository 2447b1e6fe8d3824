"""Tokenise one split into a store, with a ledger of every row that was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lightning_trainer.data.encode import Conversation, Encoded, Encoder
from lightning_trainer.data.rows import BadRow, RawRow
from lightning_trainer.data.split import OnBadRow, Split
from lightning_trainer.data.store import TOKENS, Build, StoreWriter, TokenStore, is_built, write_ledger
from lightning_trainer.types import InputError

ENCODE_AT_ONCE = 512


def tokenise(split: Split, folder: Path, on_bad_row: OnBadRow, show_progress: bool) -> TokenStore:
    """Tokenise the split into `folder`, or take it as it is when it is already there.

    Raises:
        InputError: A bad row under `on_bad_row: raise`, or a long one under `on_long_row: raise`.
    """
    if not is_built(folder):
        with Build(folder) as tmp:
            _Tokeniser(split, on_bad_row).run(tmp, show_progress)
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
            for items in _batched(self.split.conversations(), ENCODE_AT_ONCE):
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
        if length <= most:
            return self._long_enough(row, part)
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
        return self._long_enough(row, shorter)

    def _long_enough(self, row: RawRow, part: Encoded) -> Encoded | None:
        if len(part.ids) >= self.recipe.min_length:
            return part
        self._drop(row, "too_short", f"{len(part.ids)} tokens, fewer than min_length {self.recipe.min_length}")
        return None

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
            "lengths": _percentiles(self.lengths),
        }


def _percentiles(values: list[int]) -> dict[str, int]:
    """Length percentiles for the data report."""
    if not len(values):
        return {}
    points = (0, 50, 90, 95, 99, 100)
    return {f"p{p}": int(v) for p, v in zip(points, np.percentile(values, points), strict=True)}


def _batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of at most `size` items."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
