"""What the model will see of the first training rows: tokens, what is trained, the batches, what is left out.

Every decision is asked of the code that training uses (`Split`, `Sieve`, `plan_epoch`, `Collator`), none is made anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_trainer.data import ChatDataModule
from lightning_trainer.data.split import Split
from lightning_trainer.data.store import Origin, TokenStore, is_built
from lightning_trainer.data.tokenise import Kept, Sieve, Sifted, batched
from lightning_trainer.diagnose.layout import MicroBatch, ShownStore, micro_batches
from lightning_trainer.diagnose.segments import Segment, Speller, stretches
from lightning_trainer.types import IGNORE_INDEX, InputError

MOST_SCANNED = 2000
"""Rows read at most to find as many usable ones as asked for."""

MOST_DROPS = 10
"""Rows left out that are named; the others are counted."""

AT_ONCE = 32


@dataclass(frozen=True)
class Example:
    """One row of tokens as the model gets it.

    Attributes:
        several: Whether its conversation made several rows of tokens: the template rewrites earlier turns.
        cut_from: Tokens before it was truncated; None where it is whole.
    """

    origin: Origin
    several: bool
    segments: tuple[Segment, ...]
    tokens: int
    trained: int
    cut_from: int | None

    @property
    def endless(self) -> int:
        """Trained stretches without a token that ends an answer; a text that was cut off has no end to learn."""
        if self.cut_from is not None:
            return 0
        answers = [run for trained, run in stretches(self.segments) if trained]
        return sum(all(segment.kind != "stop" for segment in run) for run in answers)

    @property
    def place(self) -> str:
        """File and line, and which of several rows made from it."""
        turn = f" turn {self.origin.turn + 1}" if self.several else ""
        return f"{self.origin.file}:{self.origin.line}{turn}"


@dataclass(frozen=True)
class Drop:
    """A row that is left out; `kind` is bad, too_long or too_short."""

    file: str
    line: int
    kind: str
    reason: str


@dataclass(frozen=True)
class Setting:
    """What made the rows what they are."""

    profile: str
    tokenizer: str
    system_prompt: bool
    loss_on: str
    max_length: int
    min_length: int
    batch_size: int
    packing: bool
    shuffle: bool


@dataclass(frozen=True)
class View:
    """What there is to see.

    Attributes:
        asked: Usable rows asked for.
        found: Usable rows found.
        scanned: Rows of the training split read for them.
        exhausted: Whether the split ended there.
        drops: The first rows left out among those scanned.
        drop_counts: How many were, by kind.
        batches: All examples shown, in micro-batches.
        whole: Totals of the whole split, as its ledger has them; None where it was never tokenised.
        notes: How the split is made, and where the run would stop.
        faults: What is wrong and would harm training.
    """

    setting: Setting
    asked: int
    found: int
    scanned: int
    exhausted: bool
    examples: tuple[Example, ...]
    drops: tuple[Drop, ...]
    drop_counts: dict[str, int]
    batches: tuple[MicroBatch, ...]
    whole: dict[str, Any] | None
    notes: tuple[str, ...]
    faults: tuple[str, ...]


def look(data: ChatDataModule, rows: int) -> View:
    """Look at the first usable rows of the training split, in the order of the file.

    Args:
        data: Built, its `tokenizer` set; it need not be attached to a trainer, and nothing is written.
        rows: How many. A row that makes several rows of tokens counts once.

    Raises:
        InputError: `rows` is below 1, or a file is not there or cannot be read.
    """
    if rows < 1:
        raise InputError(f"must be at least 1, not {rows}", key="rows")
    split = data.split("train")
    speller = Speller(split.recipe.tokenizer)
    scan = _scan(split, rows)
    examples = tuple(_example(speller, row, kept) for row, kept in scan.kept)
    batches = tuple(_checked(speller, examples, batch) for batch in _batches(data, scan.kept))
    return View(
        setting=_setting(data),
        asked=rows,
        found=scan.found,
        scanned=scan.scanned,
        exhausted=scan.exhausted,
        examples=examples,
        drops=tuple(scan.drops[:MOST_DROPS]),
        drop_counts=dict(Counter(drop.kind for drop in scan.drops)),
        batches=batches,
        whole=_whole(data, split),
        notes=tuple(_notes(data, split, scan)),
        faults=tuple(_faults(examples, batches)),
    )


@dataclass
class _Scan:
    """What reading the split from its start has found so far."""

    kept: list[tuple[Sifted, Kept]] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    found: int = 0
    scanned: int = 0
    exhausted: bool = False

    def add(self, sifted: Sifted) -> None:
        row = sifted.row
        self.scanned += 1
        self.found += bool(sifted.kept)
        self.kept += [(sifted, kept) for kept in sifted.kept]
        self.drops += [Drop(row.file, row.line, dropped.kind, dropped.reason) for dropped in sifted.dropped]


def _scan(split: Split, rows: int) -> _Scan:
    scan = _Scan()
    for sifted in _sifted(split):
        if scan.found == rows or scan.scanned == MOST_SCANNED:
            return scan
        scan.add(sifted)
    scan.exhausted = True
    return scan


def _sifted(split: Split) -> Iterator[Sifted]:
    sift = Sieve(split.recipe)
    for items in batched(split.conversations(), AT_ONCE):
        yield from sift(items)


def _example(speller: Speller, sifted: Sifted, kept: Kept) -> Example:
    encoded = kept.encoded
    return Example(
        origin=_origin(sifted, kept),
        several=len(sifted.kept) > 1 or kept.turn > 0,
        segments=speller(encoded.ids, encoded.trained),
        tokens=len(encoded.ids),
        trained=encoded.trained_tokens,
        cut_from=kept.cut_from,
    )


def _origin(sifted: Sifted, kept: Kept) -> Origin:
    return Origin(sifted.row.file, sifted.row.line, kept.turn)


def _batches(data: ChatDataModule, kept: Sequence[tuple[Sifted, Kept]]) -> list[MicroBatch]:
    if not kept:
        return []
    store = ShownStore([one.encoded for _, one in kept], [_origin(sifted, one) for sifted, one in kept])
    pad_id = int(data.split("train").recipe.tokenizer.pad_token_id or 0)
    return micro_batches(store, data.packing, data.batch_size, data.max_length, pad_id)


def _setting(data: ChatDataModule) -> Setting:
    recipe = data.split("train").recipe
    return Setting(
        profile=type(recipe.profile).__name__,
        tokenizer=str(recipe.tokenizer.name_or_path) or type(recipe.tokenizer).__name__,
        system_prompt=bool(recipe.system_prompt),
        loss_on=recipe.loss_on,
        max_length=recipe.max_length,
        min_length=recipe.min_length,
        batch_size=data.batch_size,
        packing=data.packing,
        shuffle=data.shuffle,
    )


def _whole(data: ChatDataModule, split: Split) -> dict[str, Any] | None:
    folder = data.store_folder(split.name)
    return TokenStore(folder).ledger["report"] if is_built(folder) else None


def _notes(data: ChatDataModule, split: Split, scan: _Scan) -> Iterator[str]:
    if split.share.low and data.val_max_rows:
        yield (
            f"held out for validation, and not shown: {data.val_fraction:.3g} of the rows, at most "
            f"{data.val_max_rows}, chosen by their content and the seed ({data.data_seed})"
        )
    stops = {"bad": data.on_bad_row, "too_long": data.on_long_row}
    for kind, key in (("bad", "data.on_bad_row"), ("too_long", "data.on_long_row")):
        first = next((drop for drop in scan.drops if drop.kind == kind), None)
        if first is not None and stops[kind] == "raise":
            yield f"{key} is raise: the run stops at {first.file}:{first.line}"


def _faults(examples: Sequence[Example], batches: Sequence[MicroBatch]) -> Iterator[str]:
    for number, example in enumerate(examples, start=1):
        if example.endless:
            yield (
                f"example {number} ({example.place}): {example.endless} trained stretch(es) without a stop token; "
                "the model does not learn to end there"
            )
    for number, batch in enumerate(batches, start=1):
        yield from (f"micro-batch {number}: {fault}" for fault in batch.faults)


def _checked(speller: Speller, examples: Sequence[Example], batch: MicroBatch) -> MicroBatch:
    """The batch, with a fault where its labels do not read as what is shown as trained."""
    found = [
        f"example {placed.example + 1}: its labels do not decode to the text shown as trained"
        for placed in batch.placed
        if _trained_text(speller, placed.input_ids, placed.labels) != _shown(examples[placed.example])
    ]
    return replace(batch, faults=(*batch.faults, *found))


def _trained_text(speller: Speller, ids: Sequence[int], labels: Sequence[int]) -> str:
    """What the labels of a batch decode to, each behind the tokens that the batch has before it."""
    marks = [int(label != IGNORE_INDEX) for label in labels]
    known = [label if mark else token for token, label, mark in zip(ids, labels, marks, strict=True)]
    return "".join(segment.text for segment in speller(known, marks) if segment.trained)


def _shown(example: Example) -> str:
    return "".join(segment.text for segment in example.segments if segment.trained)
