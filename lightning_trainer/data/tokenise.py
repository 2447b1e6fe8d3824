"""Tokenise one split into a store, with a ledger of every row that was left out."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_trainer.data.encode import Encoded, Encoder
from lightning_trainer.data.render import Conversation
from lightning_trainer.data.rows import BadRow, RawRow
from lightning_trainer.data.split import OnBadRow, Recipe, Split
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


@dataclass(frozen=True)
class Kept:
    """One row of tokens that is trained on.

    Attributes:
        turn: 0, or which of several rows made from one conversation.
        cut_from: Tokens it had before it was truncated; None where it is whole.
    """

    encoded: Encoded
    turn: int
    cut_from: int | None


@dataclass(frozen=True)
class Dropped:
    """Why a row, or one of several made from it, is left out.

    Attributes:
        truncated: Whether it had been cut to max_length before something else was found wrong.
    """

    kind: Literal["bad", "too_long", "too_short"]
    reason: str
    truncated: bool = False


@dataclass(frozen=True)
class Sifted:
    """What became of one row of the split."""

    row: RawRow | BadRow
    kept: tuple[Kept, ...] = ()
    dropped: tuple[Dropped, ...] = ()


class Sieve:
    """Says of each row what is kept of it, and what is left out and why.

    The one place that decides: what is stored for training and what `inspect` shows both come through here.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.encode = Encoder(recipe.tokenizer, recipe.loss_on)

    def __call__(self, items: Sequence[tuple[RawRow, Conversation] | BadRow]) -> Iterator[Sifted]:
        """What becomes of each row, in order. They are tokenised in one call, so hand over many."""
        good = [item for item in items if not isinstance(item, BadRow)]
        encoded = iter(self.encode([conversation for _, conversation in good]))
        for item in items:
            if isinstance(item, BadRow):
                yield Sifted(item, dropped=(Dropped("bad", item.reason),))
            else:
                yield self._sift(item[0], next(encoded))

    def _sift(self, row: RawRow, result: list[Encoded] | ValueError) -> Sifted:
        if isinstance(result, ValueError):
            return Sifted(row, dropped=(Dropped("bad", str(result)),))
        if not any(part.trained_tokens for part in result):
            return Sifted(row, dropped=(Dropped("bad", "trains nothing: no assistant token to learn from"),))
        fates = [self._fit(part, turn) for turn, part in enumerate(result) if part.trained_tokens]
        kept = tuple(fate for fate in fates if isinstance(fate, Kept))
        return Sifted(row, kept, tuple(fate for fate in fates if isinstance(fate, Dropped)))

    def _fit(self, part: Encoded, turn: int) -> Kept | Dropped:
        length, most = len(part.ids), self.recipe.max_length
        if length <= most:
            return self._long_enough(Kept(part, turn, None))
        shorter = part.cut(most) if self.recipe.on_long_row == "truncate" else None
        if shorter is None or not shorter.trained_tokens:
            return Dropped("too_long", f"{length} tokens, more than max_length {most}")
        return self._long_enough(Kept(shorter, turn, length))

    def _long_enough(self, part: Kept) -> Kept | Dropped:
        length, least = len(part.encoded.ids), self.recipe.min_length
        if length >= least:
            return part
        reason = f"{length} tokens, fewer than min_length {least}"
        return Dropped("too_short", reason, truncated=part.cut_from is not None)


class _Tokeniser:
    """Fills one store and its ledger."""

    def __init__(self, split: Split, on_bad_row: OnBadRow) -> None:
        self.split, self.recipe, self.on_bad_row = split, split.recipe, on_bad_row
        self.sift = Sieve(split.recipe)
        self.files: dict[str, int] = {}
        self.faults: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.seen = array("Q")  # 8 bytes a row: there may be many millions
        self.lengths: Counter[int] = Counter()

    def run(self, folder: Path, show_progress: bool) -> None:
        from datasets.utils.tqdm import tqdm

        writer = StoreWriter(folder / TOKENS)
        name = self.split.name
        with tqdm(desc=f"tokenising {name}", unit=" rows", disable=not show_progress) as bar:
            for items in batched(self.split.conversations(), ENCODE_AT_ONCE):
                for sifted in self.sift(items):
                    self._add(sifted, writer)
                bar.update(len(items))
        writer.close()
        write_ledger(
            folder, {"split": name, "files": list(self.files), "report": self._report(), "faults": self.faults}
        )

    def _add(self, sifted: Sifted, writer: StoreWriter) -> None:
        row = sifted.row
        self.counts["read"] += 1
        if isinstance(row, RawRow):
            self.seen.append(row.identity)
        for dropped in sifted.dropped:
            self._drop(row, dropped)
        for kept in sifted.kept:
            self._keep(row, kept, writer)
        self.counts["kept"] += bool(sifted.kept)

    def _keep(self, row: RawRow | BadRow, kept: Kept, writer: StoreWriter) -> None:
        writer.add(kept.encoded, self.files.setdefault(row.file, len(self.files)), row.line, kept.turn)
        self.lengths[len(kept.encoded.ids)] += 1
        self.counts["tokens"] += len(kept.encoded.ids)
        self.counts["trained_tokens"] += kept.encoded.trained_tokens
        self.counts["truncated"] += kept.cut_from is not None

    def _drop(self, row: RawRow | BadRow, dropped: Dropped) -> None:
        if dropped.kind == "bad" and self.on_bad_row == "raise":
            raise InputError(f"{row.file}:{row.line}: {dropped.reason}", key="data.on_bad_row")
        if dropped.kind == "too_long" and self.recipe.on_long_row == "raise":
            raise InputError(
                f"{row.file}:{row.line}: {dropped.reason}; raise data.max_length, "
                "or set data.on_long_row to drop or truncate",
                key="data.on_long_row",
            )
        self.counts[dropped.kind] += 1
        self.counts["truncated"] += dropped.truncated
        self.faults.append({"file": row.file, "line": row.line, "kind": dropped.kind, "reason": dropped.reason})

    def _report(self) -> dict[str, Any]:
        names = ("read", "kept", "tokens", "trained_tokens", "truncated", "too_long", "too_short", "bad")
        return {
            **{name: self.counts[name] for name in names},
            "rows": self.lengths.total(),
            "duplicates": self._duplicates(),
            "lengths": percentiles(self.lengths),
        }

    def _duplicates(self) -> int:
        seen = np.frombuffer(self.seen, dtype=np.uint64)
        seen.sort()
        return int(np.count_nonzero(seen[1:] == seen[:-1]))


def percentiles(counts: Counter[int]) -> dict[str, int]:
    """Length percentiles for the data report, from how many rows have each length."""
    if not counts:
        return {}
    lengths = np.array(sorted(counts))
    ends = np.cumsum([counts[length] for length in lengths.tolist()])
    found = {}
    for point in (0, 50, 90, 95, 99, 100):
        place, hundredths = divmod(point * (int(ends[-1]) - 1), 100)
        below, above = lengths[np.searchsorted(ends, [place, place + bool(hundredths)], side="right")].tolist()
        found[f"p{point}"] = below + (above - below) * hundredths // 100
    return found


def batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of at most `size` items."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
