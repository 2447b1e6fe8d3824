"""A view as one HTML page that needs nothing beside itself; every text of a row is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from itertools import groupby

from lightning_trainer.diagnose.inspect_rows import Example, View
from lightning_trainer.diagnose.layout import MicroBatch, Placed
from lightning_trainer.diagnose.page_style import CSS
from lightning_trainer.diagnose.segments import Segment
from lightning_trainer.diagnose.summary import (
    about_batch,
    about_drops,
    about_plan,
    about_rows,
    agreement,
    extent,
    filled,
    totals,
)
from lightning_trainer.diagnose.visible import NEWLINE, parts, visible
from lightning_trainer.types import IGNORE_INDEX

LEGEND = (
    '<div class="legend" aria-label="legend"><span><code class="t">trained</code></span>'
    '<span><code class="x">trained stop token</code></span><span><code class="s">special token, seen only</code></span>'
    '<span>seen, not trained</span><span><code class="e">\\x1b</code> escaped</span>'
    f'<span><code class="n">{NEWLINE}</code> newline</span>'
    '<span class="soft">point at a token for its id and positions</span></div>'
)

BAR_LEGEND = (
    '<p class="soft"><span class="swatch learnt"></span>trained &ensp; <span class="swatch seen"></span>seen only'
    ' &ensp; <span class="swatch free"></span>'
)


def as_html(view: View, title: str) -> str:
    """The view as a page.

    Args:
        view: From `look`.
        title: Of the page.
    """
    body = "\n".join(_body(view, title))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _body(view: View, title: str) -> Iterator[str]:
    yield f"<h1>{_text(title)}</h1>"
    yield f'<p class="lead">What the model will see: {_text(about_rows(view))}</p>'
    yield from (f'<p class="loud" role="alert">{_text(fault)}</p>' for fault in view.faults)
    yield _facts(_settings(view))
    yield from (f'<p class="note" style="margin-top:12px">{_text(note)}</p>' for note in view.notes)
    if view.examples:
        yield LEGEND
    yield from (_example(view, number) for number in range(len(view.examples)))
    yield from _batches(view)
    yield from _drops(view)
    if view.whole is not None:
        yield "<h2>The whole training split, as it was tokenised</h2>"
        yield _facts((name, str(value)) for name, value in totals(view.whole))


def _settings(view: View) -> list[tuple[str, str]]:
    setting = view.setting
    return [
        ("profile", setting.profile),
        ("tokenizer", setting.tokenizer),
        ("system prompt", "yes" if setting.system_prompt else "none configured"),
        ("loss on", setting.loss_on),
        ("max_length", str(setting.max_length)),
        ("min_length", str(setting.min_length)),
        ("batch_size", str(setting.batch_size)),
        ("packing", "yes" if setting.packing else "no"),
    ]


def _facts(pairs: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{cells}</dl>'


def _example(view: View, number: int) -> str:
    example, placed = view.examples[number], _placed(view, number)
    spans = "".join(_span(segment, placed) for segment in example.segments)
    cut = "" if example.cut_from is None else f" &middot; truncated, it had <b>{example.cut_from}</b>"
    figures = f"<b>{example.tokens}</b> tokens &middot; <b>{example.trained}</b> trained{cut}"
    return (
        f'<article class="card"><header><h3>{number + 1} &ensp;<span class="mono">{_text(example.place)}</span></h3>'
        f'<span class="figures">{figures}</span></header><div class="tokens">{spans}</div></article>'
    )


def _placed(view: View, example: int) -> Placed:
    return next(placed for batch in view.batches for placed in batch.placed if placed.example == example)


def _span(segment: Segment, placed: Placed) -> str:
    shown = "".join(_run(escaped, text) for escaped, text in parts(segment.text))
    return f'<span class="{_class(segment)}" title="{_tooltip(segment, placed)}">{shown}</span>'


def _class(segment: Segment) -> str:
    if segment.kind == "stop":
        return "x"
    names = ("t" if segment.trained else "", "s" if segment.kind == "special" else "")
    return " ".join(name for name in names if name)


def _run(escaped: bool, text: str) -> str:
    shown = escape(text).replace("\n", f'<span class="n">{NEWLINE}</span>\n')
    return f'<span class="e">{shown}</span>' if escaped else shown


def _tooltip(segment: Segment, placed: Placed) -> str:
    count, first = len(segment.ids), segment.first
    positions = placed.position_ids[first : first + count]
    trained = {0: "no", count: "yes"}.get(segment.trained, f"{segment.trained} of {count}")
    return (
        f"id {', '.join(map(str, segment.ids))}&#10;place {_range(first, count)} in its row, column "
        f"{_range(placed.first + first, count)} of the batch&#10;position_id {_range(positions[0], count)}&#10;"
        f"trained: {trained}"
    )


def _range(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}-{first + count - 1}"


def _batches(view: View) -> Iterator[str]:
    if not view.batches:
        return
    yield f"<h2>Batches</h2>\n<p>{_sentence(about_plan(view))}</p>"
    yield f"{BAR_LEGEND}{'free; a wider gap: the next pack' if view.setting.packing else 'padding'}</p>"
    for number, batch in enumerate(view.batches, start=1):
        inside = "".join(_inside(view, batch))
        yield (
            f'<section class="card"><header><h3>Micro-batch {number}</h3>'
            f'<span class="figures">{_text(about_batch(view, batch))}</span></header>'
            f'<div class="inside">{inside}</div></section>'
        )


def _inside(view: View, batch: MicroBatch) -> Iterator[str]:
    width = batch.shape[1]
    scale = f'<div class="scale"><span>column 0</span><span>{width - 1}</span></div>'
    if batch.packed:
        yield f'<div class="bar">{"".join(_parts(batch))}</div>{scale}'
        yield from (_pack(view, batch, pack) for pack, _ in groupby(placed.pack for placed in batch.placed))
    else:
        yield from (f'<div class="bar">{_part(placed)}{_free(placed.padding)}</div>' for placed in batch.placed)
        yield scale
    yield _table(view, batch)
    name = "loud" if batch.faults else "ok"
    yield f'<p class="{name}" style="margin:12px 0 0">{_sentence(agreement(batch))}</p>'


def _parts(batch: MicroBatch) -> Iterator[str]:
    """The examples end to end; a wider gap stands where a pack ends."""
    for placed, after in zip(batch.placed, [*batch.placed[1:], None], strict=True):
        yield _part(placed, closes=after is not None and after.pack != placed.pack)


def _part(placed: Placed, closes: bool = False) -> str:
    """One example of a bar, its trained tokens shaded where they are."""
    name = "part closes" if closes else "part"
    about = f"example {placed.example + 1}: {placed.length} tokens, {placed.trained} trained"
    style = f"flex:{placed.length} 1 0;background:linear-gradient(90deg,{','.join(_shades(placed))})"
    return f'<div class="{name}" style="{style}" title="{about}"><b>{placed.example + 1}</b></div>'


def _shades(placed: Placed) -> Iterator[str]:
    at = 0
    for trained, run in groupby(label != IGNORE_INDEX for label in placed.labels):
        end = at + sum(1 for _ in run)
        colour = "var(--learnt)" if trained else "var(--seen)"
        yield f"{colour} {100 * at / placed.length:.2f}% {100 * end / placed.length:.2f}%"
        at = end


def _free(tokens: int) -> str:
    return f'<div class="part free" style="flex:{tokens} 1 0" title="{tokens} tokens"></div>' if tokens else ""


def _pack(view: View, batch: MicroBatch, pack: int) -> str:
    used = filled(batch, pack)
    bar = f'<div class="part" style="flex:{used} 1 0;background:var(--accent)"></div>'
    return (
        f'<div class="pack"><span class="figures">{_text(extent(view, batch, pack))}</span>'
        f'<div class="bar thin">{bar}{_free(view.setting.max_length - used)}</div></div>'
    )


def _table(view: View, batch: MicroBatch) -> str:
    names = ["example", "pack" if batch.packed else "row", "columns", "position_ids", "tokens", "labels"]
    names += [] if batch.packed else ["padding"]
    head = "".join(f'<th class="number">{name}</th>' for name in names)
    rows = "".join(_row(view.examples[placed.example], placed, batch.packed) for placed in batch.placed)
    return f'<div class="scroll"><table><tr>{head}<th>from</th></tr>{rows}</table></div>'


def _row(example: Example, placed: Placed, packed: bool) -> str:
    ids = placed.position_ids
    values = [
        placed.example + 1,
        placed.pack + 1 if packed else placed.line,
        f"{placed.first}-{placed.first + placed.length - 1}",
        f"{ids[0]}-{ids[-1]}",
        placed.length,
        placed.trained,
        *([] if packed else [placed.padding]),
    ]
    cells = "".join(f'<td class="number">{value}</td>' for value in values)
    return f'<tr>{cells}<td class="place short">{_text(example.place)}</td></tr>'


def _drops(view: View) -> Iterator[str]:
    yield f"<h2>Left out</h2>\n<p>{_sentence(about_drops(view))}</p>"
    if not view.drops:
        return
    rows = "".join(
        f'<tr><td class="place">{_text(f"{drop.file}:{drop.line}")}</td><td>{_text(drop.reason)}</td></tr>'
        for drop in view.drops
    )
    more = sum(view.drop_counts.values()) - len(view.drops)
    last = f'<p class="soft" style="margin:10px 0 0">and {more} more</p>' if more else ""
    head = "<tr><th>file and line</th><th>reason</th></tr>"
    yield f'<div class="card"><div class="inside scroll"><table>{head}{rows}</table>{last}</div></div>'


def _sentence(text: str) -> str:
    """The text as a sentence."""
    return _text(f"{text[:1].upper()}{text[1:]}.")


def _text(text: str) -> str:
    return escape(visible(text))
