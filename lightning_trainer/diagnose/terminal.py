"""A view as text, for a terminal or a file.

Without colour, brackets say what colour would; where a row holds such a bracket itself, it is escaped.

    │ <|im_start|>user↵
    │ what is 1 plus 2?<|im_end|>↵
    │ <|im_start|>assistant↵
    ┃ ⟦3⟧⟪<|im_end|>⟫
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.text import Text

from lightning_trainer.diagnose.inspect_rows import Example, View
from lightning_trainer.diagnose.layout import MicroBatch, Placed
from lightning_trainer.diagnose.segments import Segment
from lightning_trainer.diagnose.summary import (
    about_batch,
    about_drops,
    about_plan,
    about_rows,
    about_setting,
    about_whole,
    agreement,
    extent,
)
from lightning_trainer.diagnose.visible import NEWLINE, parts, visible

LEAST_WIDTH = 24

PLAIN, STRONG, FAINT = Style.null(), Style(bold=True), Style(dim=True)
TRAINED, STOP = Style(color="green"), Style(color="green", bold=True, reverse=True)
ESCAPED, LOUD = Style(color="yellow"), Style(color="red", bold=True)

BRACKETS = {TRAINED: ("⟦", "⟧"), STOP: ("⟪", "⟫")}


def as_text(view: View, colour: bool, width: int) -> str:
    """The view as lines of at most `width` columns.

    Args:
        view: From `look`.
        colour: Whether ANSI codes may be used; without, brackets mark what is trained.
        width: Columns; at least 24 are used.
    """
    out = io.StringIO()
    system: Literal["standard"] | None = "standard" if colour else None
    width = max(width, LEAST_WIDTH)
    console = Console(file=out, width=width, color_system=system, force_terminal=colour, highlight=False, _environ={})
    for line in _Lines(not colour, width).of(view):
        console.print(line, soft_wrap=True)
    return out.getvalue()


@dataclass(frozen=True)
class _Lines:
    """The lines of a view.

    Attributes:
        brackets: Whether brackets mark what is trained.
    """

    brackets: bool
    width: int

    def of(self, view: View) -> Iterator[Text]:
        yield from self._head(view)
        for number, example in enumerate(view.examples, start=1):
            yield Text()
            yield from self._example(number, example)
        yield from self._batches(view)
        yield Text()
        yield from self._drops(view)
        if view.whole is not None:
            yield Text()
            yield from self._said(about_whole(view.whole))

    def _head(self, view: View) -> Iterator[Text]:
        for fault in view.faults:
            yield from self._said(f"!! {fault}", LOUD, rest="   ")
        for text in (about_setting(view), about_rows(view), *view.notes):
            yield from self._said(text)
        yield from self._legend()

    def _legend(self) -> Iterator[Text]:
        text = Text()
        for words, style in (("trained", TRAINED), ("trained stop token", STOP)):
            text.append_text(self._bracketed(Text(words, style), style)).append(" ")
        text.append(f"seen, not trained; {NEWLINE} newline; ")
        text.append("\\x1b", ESCAPED).append(" escaped; ┃ a line with trained text")
        yield from self._said(text)

    def _said(self, text: str | Text, style: Style = PLAIN, first: str = "", rest: str = "") -> Iterator[Text]:
        """The text in lines, `first` before the first of them and `rest` before each other."""
        text = Text(visible(text), style) if isinstance(text, str) else text
        for number, line in enumerate(_folded(text, self.width - max(len(first), len(rest)))):
            line.rstrip()
            yield Text(rest if number else first).append_text(line)

    def _example(self, number: int, example: Example) -> Iterator[Text]:
        yield from self._said(f"example {number}: {example.place}", STRONG)
        cut = "" if example.cut_from is None else f"; truncated, it had {example.cut_from}"
        yield from self._said(f"{example.tokens} tokens, {example.trained} trained{cut}")
        for line in self._body(example.segments).split("\n", allow_blank=True):
            for part in _folded(line, self.width - 2):
                trained = any(span.style in (TRAINED, STOP) for span in part.spans)
                yield Text.assemble(("┃ ", TRAINED) if trained else ("│ ", FAINT)).append_text(part)

    def _body(self, segments: Iterable[Segment]) -> Text:
        """What the model gets, with a line break behind each newline but the last."""
        text = Text()
        for style, run in groupby(segments, key=_style):
            text.append_text(self._bracketed(self._spelled(run, style), style))
        if text.plain.endswith("\n"):
            text.right_crop(1)
        return text

    def _spelled(self, segments: Iterable[Segment], style: Style) -> Text:
        marks = NEWLINE + "".join(chain(*BRACKETS.values())) if self.brackets else NEWLINE
        text = Text()
        for special, run in groupby(segments, key=lambda segment: segment.kind == "special"):
            own = FAINT if special and style is PLAIN else style
            for escaped, shown in parts("".join(segment.text for segment in run), also=marks):
                text.append(shown.replace("\n", f"{NEWLINE}\n"), own)
                if escaped:
                    text.stylize(ESCAPED, len(text) - len(shown))
        return text

    def _bracketed(self, text: Text, style: Style) -> Text:
        if not self.brackets or style is PLAIN:
            return text
        opening, closing = BRACKETS[style]
        breaks = text.plain.endswith("\n")
        if breaks:
            text.right_crop(1)
        return Text(opening, style).append_text(text).append(closing, style).append("\n" * breaks)

    def _batches(self, view: View) -> Iterator[Text]:
        if view.batches:
            yield Text()
            yield from self._said(about_plan(view))
        for number, batch in enumerate(view.batches, start=1):
            yield from self._said(f"micro-batch {number}: {about_batch(view, batch)}", STRONG)
            for pack, placed in groupby(batch.placed, key=lambda placed: placed.pack):
                if batch.packed:
                    yield from self._said(extent(view, batch, pack), first="  ", rest="    ")
                for one in placed:
                    yield from self._placed(view, batch, one)
            yield from self._said(agreement(batch), LOUD if batch.faults else PLAIN, first="  ", rest="    ")

    def _placed(self, view: View, batch: MicroBatch, placed: Placed) -> Iterator[Text]:
        last = placed.first + placed.length - 1
        padding = "" if batch.packed else f", padding {placed.padding}"
        yield from self._said(
            f"example {placed.example + 1}: columns {placed.first}-{last}, position_ids {placed.position_ids[0]}-"
            f"{placed.position_ids[-1]}, {placed.trained} labels{padding}  ({view.examples[placed.example].place})",
            first="    ",
            rest="      ",
        )

    def _drops(self, view: View) -> Iterator[Text]:
        yield from self._said(about_drops(view), STRONG)
        for drop in view.drops:
            yield from self._said(f"{drop.file}:{drop.line}: {drop.reason}", first="  ", rest="    ")
        more = sum(view.drop_counts.values()) - len(view.drops)
        if more:
            yield Text(f"  and {more} more")


def _style(segment: Segment) -> Style:
    if segment.kind == "stop":
        return STOP
    return TRAINED if segment.trained else PLAIN


def _folded(line: Text, width: int) -> list[Text]:
    """The line in parts of at most `width` columns, broken behind a space where there is one; nothing is lost."""
    cuts: list[int] = []
    start = used = space = 0
    for place, character in enumerate(line.plain):
        size = cell_len(character)
        if used + size > width:
            start = space if space > start else place
            cuts.append(start)
            used = cell_len(line.plain[start:place])
        used += size
        space = place + 1 if character == " " else space
    return list(line.divide(cuts))
