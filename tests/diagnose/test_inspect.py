"""What `inspect` shows: compared with text worked out by hand, and with what training itself would take."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.cells import cell_len

from lightning_trainer.data import ChatDataModule
from lightning_trainer.data.collate import Collator
from lightning_trainer.data.packing import best_fit
from lightning_trainer.data.tokenise import tokenise
from lightning_trainer.diagnose import inspect_rows
from lightning_trainer.diagnose.inspect_rows import View, look
from lightning_trainer.diagnose.layout import ShownStore
from lightning_trainer.diagnose.page import as_html
from lightning_trainer.diagnose.segments import HALF, Speller
from lightning_trainer.diagnose.terminal import as_text
from lightning_trainer.profiles import EmojiThink, Plain
from lightning_trainer.types import IGNORE_INDEX, InputError

Make = Callable[..., ChatDataModule]
Write = Callable[..., Path]

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ONLY_THE_LAST = (  # keeps the text of its last turn only, so earlier turns become rows of their own
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content if m.role == 'user' or loop.last else '-' }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_STOP = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
EMOJIS = "🧠👨\u200d👩\u200d👧🛡\ufe0f日本"


def chat(*texts: str) -> dict[str, Any]:
    """One row: user, assistant, user, …"""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


@pytest.fixture
def make(tmp_path: Path, tokenizer: Any) -> Make:
    """A data module as the command line builds it: with a tokenizer, without a trainer."""

    def build(path: Any, **options: Any) -> ChatDataModule:
        own = options.pop("tokenizer", tokenizer)
        values = {"profile": Plain(), "cache_dir": str(tmp_path / "cache"), "val_fraction": 0.0, "batch_size": 2}
        module = ChatDataModule(str(path), **{**values, **options})
        module.tokenizer = own
        return module

    return build


def spelled(view: View, example: int = 0) -> str:
    return "".join(segment.text for segment in view.examples[example].segments)


def trained(view: View, example: int = 0) -> list[str]:
    """Text of each trained stretch."""
    stretches = inspect_rows.stretches(view.examples[example].segments)
    return ["".join(segment.text for segment in run) for is_trained, run in stretches if is_trained]


class Reader(HTMLParser):
    """What a browser makes of a page: its tags, and the text of each box of tokens."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.titles: list[str] = []
        self.boxes: list[str] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.titles.append(values.get("title") or "")
        if values.get("class") == "tokens":
            self._inside = True
            self.boxes.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "div"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.boxes[-1] += data


def test_a_tiny_example_reads_as_worked_out_by_hand(
    make: Make, make_tokenizer: Any, write_rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_rows([chat("a", "b\nc"), chat("d", "e" * 9), chat("d", "e")]).parent)
    tokenizer = make_tokenizer()
    tokenizer.name_or_path = "tiny"
    module = make("rows.jsonl", max_length=24, batch_size=1, tokenizer=tokenizer)
    # <|im_start|> u se r \n a <|im_end|> \n <|im_start|> a s s is t a n t \n: 18, then b \n c <|im_end|>: 4
    assert as_text(look(module, 2), colour=False, width=120) == (
        "profile Plain, no system prompt of the profile or the configuration; tokenizer tiny; loss on assistant; "
        "max_length 24\n"
        "2 usable rows of 3 read\n"
        "⟦trained⟧ ⟪trained stop token⟫ seen, not trained; ↵ newline; \\x1b escaped; ┃ a line with trained text\n"
        "\n"
        "example 1: rows.jsonl:1\n"
        "22 tokens, 4 trained\n"
        "│ <|im_start|>user↵\n"
        "│ a<|im_end|>↵\n"
        "│ <|im_start|>assistant↵\n"
        "┃ ⟦b↵\n"
        "┃ c⟧⟪<|im_end|>⟫\n"
        "\n"
        "example 2: rows.jsonl:3\n"
        "20 tokens, 2 trained\n"
        "│ <|im_start|>user↵\n"
        "│ d<|im_end|>↵\n"
        "│ <|im_start|>assistant↵\n"
        "┃ ⟦e⟧⟪<|im_end|>⟫\n"
        "\n"
        "a micro-batch is one long row of up to 1 pack; packs only decide which examples share it. The run packs a "
        "whole epoch,\n"
        "shuffled; here only the examples above are packed, in their order\n"
        "micro-batch 1: 1 x 22 tokens, 1 example, 4 labels\n"
        "  pack 1: 22 of 24 tokens; the 2 left free are not computed\n"
        "    example 1: columns 0-21, position_ids 0-21, 4 labels  (rows.jsonl:1)\n"
        "  checked: example_lengths 22; positions restart at 0 in each; 4 labels = 4 predict_at and targets, all "
        "within their\n"
        "    example; labels decode to what is shown as trained\n"
        "micro-batch 2: 1 x 20 tokens, 1 example, 2 labels\n"
        "  pack 2: 20 of 24 tokens; the 4 left free are not computed\n"
        "    example 2: columns 0-19, position_ids 0-19, 2 labels  (rows.jsonl:3)\n"
        "  checked: example_lengths 20; positions restart at 0 in each; 2 labels = 2 predict_at and targets, all "
        "within their\n"
        "    example; labels decode to what is shown as trained\n"
        "\n"
        "left out on the way: 1 over max_length\n"
        "  rows.jsonl:2: 28 tokens, more than max_length 24\n"
    )


def test_the_rows_are_the_first_that_training_keeps(
    make: Make, write_rows: Write, chat_rows: Any, tmp_path: Path
) -> None:
    rows = chat_rows(40)
    rows[3], rows[5] = {"nothing": 1}, {"messages": [{"role": "user", "content": "hi"}]}
    path = write_rows(rows)
    options: dict[str, Any] = {"val_fraction": 0.3, "max_length": 100}
    split = make(path, **options).split("train")
    store = tokenise(split, tmp_path / "cache" / split.digest(), "quarantine", show_progress=False)
    view = look(make(path, **options), 6)
    assert len(view.examples) == 6
    assert [example.origin for example in view.examples] == [store.origin(row) for row in range(6)]
    for row, example in enumerate(view.examples):
        ids, marks = store[row]
        assert [token for segment in example.segments for token in segment.ids] == ids.tolist()
        assert (example.tokens, example.trained) == (len(ids), int(marks.sum()))
    before = [fault for fault in store.ledger["faults"] if fault["line"] < view.examples[-1].origin.line]
    assert [vars(drop) for drop in view.drops] == before
    assert {drop.kind for drop in view.drops} == {"bad", "too_long"}
    assert view.whole == store.ledger["report"]
    text = as_text(view, colour=False, width=400)
    assert "held out for validation, and not shown: 0.3 of the rows" in text
    assert (
        f"whole training split, as it was tokenised: {view.whole['read']} rows read, {view.whole['kept']} kept" in text
    )


def test_a_split_that_was_never_tokenised_stays_so(make: Make, write_rows: Write, tmp_path: Path) -> None:
    view = look(make(write_rows([chat("a", "b")])), 1)
    assert view.whole is None
    assert not (tmp_path / "cache").exists()


def test_the_layout_is_what_the_collator_gives(make: Make, write_rows: Write, chat_rows: Any) -> None:
    module = make(write_rows(chat_rows(12)), max_length=150)
    module.setup("fit")
    view, store = look(module, 12), module.stores["train"]
    packs = best_fit(store.lengths, 150, np.arange(12))
    assert len(view.batches) == -(-len(packs) // 2) > 1
    for number, shown in enumerate(view.batches):
        rows = range(number * 2, min(number * 2 + 2, len(packs)))
        batch = Collator(store, True, 0)(np.concatenate([packs[row] for row in rows]), 1)
        assert [placed.example for placed in shown.placed] == list(batch.row_ids)
        assert [placed.pack for placed in shown.placed] == [row for row in rows for _ in packs[row]]
        assert shown.example_lengths == batch.example_lengths
        assert shown.shape == tuple(batch.input_ids.shape)
        for values, name in ((batch.input_ids, "input_ids"), (batch.position_ids, "position_ids")):
            assert [token for placed in shown.placed for token in getattr(placed, name)] == values[0].tolist()
        assert shown.labels == shown.targets == int((batch.labels != IGNORE_INDEX).sum())
        firsts = [0, *np.cumsum(batch.example_lengths)[:-1].tolist()]
        assert [placed.first for placed in shown.placed] == firsts
        assert not shown.faults


def test_padding_is_counted(make: Make, write_rows: Write) -> None:
    view = look(make(write_rows([chat("a", "b\nc"), chat("d", "e")]), packing=False), 2)
    [batch] = view.batches
    assert (batch.shape, batch.example_lengths, batch.padding) == ((2, 22), (22, 20), 2)
    text = as_text(view, colour=False, width=200)
    assert "micro-batch 1: 2 x 22 tokens, 2 examples, 6 labels, 2 of 44 tokens padding" in text
    assert "example 2: columns 0-19, position_ids 0-19, 2 labels, padding 2" in text
    assert "the run shuffles, here the rows keep their order" in text


def test_a_run_that_keeps_its_order_is_not_said_to_shuffle(make: Make, write_rows: Write) -> None:
    path = write_rows([chat("a", "b")])
    for packing in (True, False):
        assert "shuffle" not in as_text(look(make(path, packing=packing, shuffle=False), 1), colour=False, width=200)


def test_a_batch_that_is_not_its_examples_is_loud(
    make: Make, write_rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    collate = Collator.__call__

    def shifted(self: Collator, examples: Any, step_tokens: int) -> Any:
        batch = collate(self, examples, step_tokens)
        batch.labels = torch.roll(batch.labels, 1)
        return batch

    monkeypatch.setattr(Collator, "__call__", shifted)
    view = look(make(write_rows([chat("a", "b c"), chat("d", "e")])), 2)
    text = as_text(view, colour=False, width=200)
    assert text.startswith("!! micro-batch 1: example 1: its labels are not its trained tokens\n")
    assert "labels do not decode to the text shown as trained" in text
    assert "checked" not in text
    assert 'class="loud"' in as_html(view, "run")


@pytest.mark.parametrize("template", ["chatml", "marks"])
def test_no_emoji_is_cut(make: Make, make_tokenizer: Any, write_rows: Write, template: str) -> None:
    tokenizer = make_tokenizer(MARKED) if template == "marks" else make_tokenizer()
    path = write_rows([chat(EMOJIS, f"{EMOJIS}\n{EMOJIS}")])
    view = look(make(path, tokenizer=tokenizer, profile=EmojiThink()), 1)
    [example] = view.examples
    assert spelled(view) == tokenizer.decode([token for segment in example.segments for token in segment.ids])
    assert HALF not in spelled(view)
    assert any(len(segment.ids) > 1 for segment in example.segments)
    assert f"{EMOJIS}\n{EMOJIS}" in trained(view)[0]
    assert not view.faults
    assert f"{EMOJIS}↵\n" in as_text(view, colour=False, width=200)


def test_an_emoji_whose_first_token_is_not_trained_stays_whole(make: Make, write_rows: Write) -> None:
    view = look(make(write_rows([{"text": "🧠 hi"}])), 1)
    first = view.examples[0].segments[0]
    assert (first.text, len(first.ids), first.trained) == ("🧠", 4, 3)
    assert not view.faults
    assert "trained: 3 of 4" in as_html(view, "run").replace("&#10;", " ")


def test_a_replacement_character_of_the_row_is_shown(make: Make, write_rows: Write) -> None:
    view = look(make(write_rows([chat("a", f"x{HALF}{HALF}y{HALF}")])), 1)
    assert trained(view) == [f"x{HALF}{HALF}y{HALF}<|im_end|>"]


def test_every_turn_and_its_stop_are_marked(make: Make, make_tokenizer: Any, write_rows: Write) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "sum"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    path = write_rows([{"messages": messages, "tools": tools}])
    view = look(make(path, tokenizer=make_tokenizer(TOOLS)), 1)
    lines = as_text(view, colour=False, width=200).splitlines()
    assert [line for line in lines if line.startswith("┃")] == [
        '┃ ⟦<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>⟧⟪<|im_end|>⟫↵',
        "┃ ⟦It is 3⟧⟪<|im_end|>⟫",
    ]
    assert "│ 3<|im_end|>↵" in lines


def test_the_templates_own_marks_are_shown(make: Make, make_tokenizer: Any, write_rows: Write) -> None:
    view = look(make(write_rows([chat("a", "b", "c", "d")]), tokenizer=make_tokenizer(MARKED)), 1)
    assert trained(view) == ["b<|im_end|>", "d<|im_end|>"]


def test_turns_that_become_rows_are_told_apart(make: Make, make_tokenizer: Any, write_rows: Write) -> None:
    path = write_rows([chat("a", "b", "c", "d"), chat("e", "f")])
    view = look(make(path, tokenizer=make_tokenizer(ONLY_THE_LAST)), 2)
    assert [example.place for example in view.examples] == [f"{path}:1 turn 1", f"{path}:1 turn 2", f"{path}:2"]
    assert [trained(view, number) for number in range(3)] == [["b<|im_end|>"], ["d<|im_end|>"], ["f<|im_end|>"]]


def test_an_answer_without_a_stop_token_is_loud(make: Make, make_tokenizer: Any, write_rows: Write) -> None:
    view = look(make(write_rows([chat("a", "b")]), tokenizer=make_tokenizer(NO_STOP)), 1)
    assert "1 trained stretch(es) without a stop token" in view.faults[0]
    assert as_text(view, colour=False, width=200).startswith("!! example 1 (")


def test_drops_are_counted_and_the_first_are_named(make: Make, write_rows: Write) -> None:
    path = write_rows([*({"nothing": number} for number in range(14)), chat("a", "b"), {"nothing": 15}])
    view = look(make(path), 1)
    assert view.drop_counts == {"bad": 14}
    assert [drop.line for drop in view.drops] == list(range(1, 11))
    text = as_text(view, colour=False, width=200)
    assert text.endswith("\n  and 4 more\n")
    assert "and 4 more" in as_html(view, "run")


def test_a_run_that_would_stop_is_said_so(make: Make, write_rows: Write) -> None:
    path = write_rows([{"nothing": 1}, chat("long " * 50, "b"), chat("a", "b")])
    view = look(make(path, on_bad_row="raise", on_long_row="raise", max_length=60), 1)
    assert [example.origin.line for example in view.examples] == [3]
    assert view.notes == (
        f"data.on_bad_row is raise: the run stops at {path}:1",
        f"data.on_long_row is raise: the run stops at {path}:2",
    )


def test_a_truncated_row_says_what_it_was(make: Make, write_rows: Write) -> None:
    view = look(make(write_rows([chat("a", "b", "c" * 90, "d")]), on_long_row="truncate", max_length=60), 1)
    assert (view.examples[0].tokens, trained(view)) == (20, ["b<|im_end|>"])
    assert "20 tokens, 2 trained; truncated, it had " in as_text(view, colour=False, width=100)


def test_a_file_without_usable_rows(make: Make, write_rows: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_rows, "MOST_SCANNED", 40)
    view = look(make(write_rows([{"nothing": 1}] * 50 + [chat("a", "b")])), 2)
    assert (view.scanned, view.found, view.batches) == (40, 0, ())
    assert "0 usable rows of 40 read, 2 asked for" in as_text(view, colour=False, width=100)
    assert "Left out" in as_html(view, "run")


@pytest.mark.parametrize("rows", [0, -1])
def test_at_least_one_row(make: Make, write_rows: Write, rows: int) -> None:
    with pytest.raises(InputError, match=f"must be at least 1, not {rows}"):
        look(make(write_rows([chat("a", "b")])), rows)


HOSTILE = '<script>alert(1)</script> & \x1b[2J\x07\r\t\u202e \x9b31m " onload=x ⟦⟪'


def test_nothing_of_a_row_reaches_the_terminal(make: Make, write_rows: Write) -> None:
    path = write_rows([chat(HOSTILE, HOSTILE), {"\x1b[31m": 1}], name="\x1b[2Jrows.jsonl")
    view = look(make(path), 2)
    text = as_text(view, colour=False, width=60)
    assert not [character for character in text if character != "\n" and not character.isprintable()]
    assert "\\x1b[2J\\x07\\r\\t\\u202e \\x9b31m" in as_text(view, colour=False, width=300)
    assert text.count("⟦") == 2  # the legend's, and one answer: those of the row are escaped
    coloured = re.sub(r"\x1b\[[0-9;]*m", "", as_text(view, colour=True, width=60))
    assert not [character for character in coloured if character != "\n" and not character.isprintable()]


def test_nothing_of_a_row_reaches_the_page(make: Make, write_rows: Write) -> None:
    path = write_rows([chat(HOSTILE, "b"), {"<img src=x>": 1}], name="<b>rows.jsonl")
    page = as_html(look(make(path), 2), "<i>run</i>")
    reader = Reader(page)
    assert not {"script", "img", "b><", "i", "link", "iframe"} & set(reader.tags)
    assert "http" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in re.sub(r"</?span[^>]*>", "", page)
    assert "<script>alert(1)</script> & \\x1b[2J" in reader.boxes[0]


def test_the_page_shows_all_tokens_with_their_places(make: Make, write_rows: Write) -> None:
    view = look(make(write_rows([chat("a", "b\nc"), chat("d", "e")])), 2)
    reader = Reader(as_html(view, "run.yaml"))
    assert [box.replace("↵", "") for box in reader.boxes] == [spelled(view, 0), spelled(view, 1)]
    stop = view.examples[1].segments[-1].ids[0]
    # The second example lies behind the 22 tokens of the first; its last token is its 20th.
    wanted = f"id {stop}\nplace 19 in its row, column 41 of the batch\nposition_id 19\ntrained: yes"
    assert wanted in reader.titles


def test_colour_only_when_asked_for(make: Make, write_rows: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "CLICOLOR_FORCE"):
        monkeypatch.setenv(name, "1")
    view = look(make(write_rows([chat("a long one", "b c")])), 1)
    assert "\x1b" not in as_text(view, colour=False, width=80)
    monkeypatch.setenv("NO_COLOR", "1")
    coloured = as_text(view, colour=True, width=80)
    assert "⟦" not in coloured
    # Faint (2): special tokens. Green (32): trained. Bold, reverse and green: the stop token.
    assert [line for line in coloured.splitlines() if "│" in line or "┃ \x1b" in line] == [
        "\x1b[2m│ \x1b[0m\x1b[2m<|im_start|>\x1b[0muser↵",
        "\x1b[2m│ \x1b[0ma long one\x1b[2m<|im_end|>\x1b[0m↵",
        "\x1b[2m│ \x1b[0m\x1b[2m<|im_start|>\x1b[0massistant↵",
        "\x1b[32m┃ \x1b[0m\x1b[32mb c\x1b[0m\x1b[1;7;32m<|im_end|>\x1b[0m",
    ]


@pytest.mark.parametrize("width", [1, 24, 61])
def test_lines_wrap_and_nothing_is_lost(make: Make, write_rows: Write, width: int) -> None:
    answer = "word " * 30 + "x" * 100 + " " * 70 + "日本語" * 20
    view = look(make(write_rows([chat("a", answer)])), 1)
    lines = as_text(view, colour=False, width=width).splitlines()
    assert max(cell_len(line) for line in lines) <= max(width, 24)
    assert "".join(line[2:] for line in lines if line.startswith("┃")) == f"⟦{answer}⟧⟪<|im_end|>⟫"


def test_a_sentencepiece_tokenizer_keeps_its_spaces() -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁hi", "▁you", "▁"]
    model = models.BPE({piece: place for place, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    bytes_of_brain = [pieces.index(f"<0x{byte:02X}>") for byte in "🧠".encode()]
    ids = [0, pieces.index("▁hi"), pieces.index("▁you"), *bytes_of_brain, pieces.index("▁you")]
    segments = Speller(tokenizer)(ids, [0, 0, 1, 1, 1, 1, 1, 1])
    assert [segment.text for segment in segments] == ["<s>", " hi", " you", "🧠", " you"]


def test_the_shown_store_is_a_store(make: Make, write_rows: Write) -> None:
    module = make(write_rows([chat("a", "b"), chat("c", "d e")]))
    module.setup("fit")
    real = module.stores["train"]
    kept = list(inspect_rows._scan(module.split("train"), 2).kept)
    shown = ShownStore([one.encoded for _, one in kept], [inspect_rows._origin(*pair) for pair in kept])
    assert len(shown) == len(real)
    assert shown.lengths.tolist() == real.lengths.tolist()
    assert shown.trained.tolist() == real.trained.tolist()
    for row in range(2):
        assert shown.origin(row) == real.origin(row)
        for mine, theirs in zip(shown[row], real[row], strict=True):
            assert mine.dtype == theirs.dtype
            assert mine.tolist() == theirs.tolist()
