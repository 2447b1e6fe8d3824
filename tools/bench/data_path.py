"""The data path: tokenising, packing, the second start, memory.

python tools/bench data_path [--quick]

Tokenising is measured against a bare batched `apply_chat_template` of the same rows by the same tokenizer, in processor
seconds of one thread; ours has the profile, the masks and the checks besides.
"""

from __future__ import annotations

import datetime
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import child
import material
import numpy as np
from measure import Row, interleaved, ratios

from lightning_trainer.data.packing import best_fit
from lightning_trainer.data.rows import RawRow, Source
from lightning_trainer.data.split import Recipe, Share, Split
from lightning_trainer.data.tokenise import ENCODE_AT_ONCE, Sieve, batched, tokenise
from lightning_trainer.profiles import Plain

LEAST_RATE = 0.9
MOST_PACKING, LEAST_FILL, PACK_TO = 0.3, 0.999, 2048
MOST_WARM, QWEN_VOCABULARY = 0.3, 151_643
Messages = list[dict[str, str]]


def recipe(tokenizer: Any) -> Recipe:
    """How the rows are made into tokens."""
    return Recipe(tokenizer, Plain(), None, "prepend", 0, PACK_TO, 0, "assistant", "drop")


def transformed(tokenizer: Any, rows: list[dict[str, Any]]) -> int:
    """Rows of tokens that ours makes of rows in memory: profile, template, masks."""
    how = recipe(tokenizer)
    split, sieve, made = Split("train", [], Share(), how), Sieve(how), 0
    for some in batched(iter(rows), ENCODE_AT_ONCE):
        items = [split._transform(RawRow("rows", number, row)) for number, row in enumerate(some)]
        made += sum(len(sifted.kept) for sifted in sieve(items))
    return made


def bare(tokenizer: Any, conversations: list[Messages], **options: Any) -> None:
    """The tokenizer alone, as many at a time as ours."""
    for some in batched(iter(conversations), ENCODE_AT_ONCE):
        tokenizer.apply_chat_template(some, tokenize=True, return_dict=True, **options)


def every_turn(rows: list[dict[str, Any]]) -> list[Messages]:
    """A conversation for each answer: what becomes of rows whose earlier turns the template rewrites."""
    ends = ((row["messages"], end) for row in rows for end in range(2, len(row["messages"]) + 1, 2))
    return [messages[:end] for messages, end in ends]


def tokenising_rows(rounds: int, count: int = 500) -> Iterator[Row]:
    """Ours / bare, rows for the processor's second; few at a time, so that both arms meet the machine at one speed."""
    tokenizer = material.make_tokenizer()
    cases: list[tuple[str, str, int, dict[str, Any]]] = [
        ("single-turn", material.CHATML, 1, {}),
        ("four turns", material.CHATML, 4, {}),
        ("four turns, marks", material.MARKED, 4, {"return_assistant_tokens_mask": True}),
        ("four turns, rewritten", material.THINKING, 4, {}),
    ]
    for name, template, turns, options in cases:
        rows = list(material.chat_rows(count, turns=turns))
        tokenizer.chat_template = template
        whole = [row["messages"] for row in rows]
        same = every_turn(rows) if template == material.THINKING else whole
        arms = {
            "bare": lambda same=same, options=options: bare(tokenizer, same, **options),
            "ours": lambda rows=rows: transformed(tokenizer, rows),
        }
        seconds = interleaved(arms, rounds)
        note = f"{len(same) / min(seconds['ours']):,.0f} rows a second of ours, {len(same):,} rows of tokens"
        yield Row(f"tokenising, {name}", ratios(seconds["bare"], seconds["ours"]), at_least=LEAST_RATE, note=note)


def whole_path_row(count: int, rounds: int) -> Row:
    """From file to store: reading, tokenising and writing."""
    tokenizer, rows = material.make_tokenizer(), list(material.chat_rows(count))
    conversations = [row["messages"] for row in rows]
    with tempfile.TemporaryDirectory() as name:
        file = material.write_rows(Path(name) / "rows.jsonl", iter(rows))
        split = Split("train", [Source(str(file), file)], Share(), recipe(tokenizer))
        folders = (Path(name) / f"store{number}" for number in range(rounds + 1))
        arms: dict[str, Callable[[], Any]] = {
            "bare": lambda: bare(tokenizer, conversations),
            "ours": lambda: tokenise(split, next(folders), "quarantine", False),
        }
        seconds = interleaved(arms, rounds)
    note = "single-turn; ours reads the file and writes the store besides"
    return Row("file to store", ratios(seconds["bare"], seconds["ours"]), note=note)


def packing_rows(count: int, rounds: int) -> Iterator[Row]:
    """Best-fit packing of an epoch."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(195) - 0.8**2 / 2, 0.8, size=count).astype(np.int64).clip(1, PACK_TO)
    examples = rng.permutation(count)
    seconds = interleaved({"pack": lambda: best_fit(lengths, PACK_TO, examples)}, rounds)["pack"]
    rows = best_fit(lengths, PACK_TO, examples)
    yield Row(f"packing {count:,} lengths", tuple(seconds), "s", at_most=MOST_PACKING)
    yield Row("  fill", (float(lengths.sum()) / (len(rows) * PACK_TO),), at_least=LEAST_FILL)


def module_of(folder: str) -> Any:
    """The data module of a prepared folder, as `fit` would set it up; with a Trainer that has a command."""
    import datasets  # noqa: F401  what it takes to import is the start-up table's
    from lightning.pytorch import Trainer
    from lightning.pytorch.trainer.states import TrainerFn
    from transformers import AutoTokenizer

    from lightning_trainer import ChatDataModule

    here = Path(folder)
    data = ChatDataModule(str(here / "rows.jsonl"), profile=Plain(), cache_dir=str(here / "cache"))
    data.run_date = str(datetime.date(2026, 1, 1))
    data.tokenizer = AutoTokenizer.from_pretrained(here / "tokenizer")
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", default_root_dir=str(here / "run"), enable_model_summary=False, **options)
    trainer.state.fn = TrainerFn.FITTING
    data.trainer = trainer
    return data


def first_batch(folder: str) -> tuple[float, float]:
    """Seconds from the data module's set-up to the first batch, in this process: by the wall and the processor."""
    data = module_of(folder)
    gc.collect()  # what reading the tokenizer left behind
    started, busy = time.perf_counter(), time.process_time()
    data.prepare_data()
    data.setup("fit")
    next(iter(data.train_dataloader()))
    return time.perf_counter() - started, time.process_time() - busy


def prepare(folder: Path, count: int, tokens: float, vocabulary: int) -> str:
    """Write rows and a tokenizer where `module_of` looks for them."""
    folder.mkdir()
    material.write_rows(folder / "rows.jsonl", material.chat_rows(count, tokens))
    material.make_tokenizer(vocabulary).save_pretrained(folder / "tokenizer")
    return str(folder)


def warm_row(count: int, rounds: int) -> Row:
    """The second start: everything is in the cache, with a tokenizer as large as Qwen3's."""
    with tempfile.TemporaryDirectory() as name:
        folder = prepare(Path(name) / "job", count, 195, QWEN_VOCABULARY)
        cold, _ = child.call("data_path", "first_batch", folder)
        wall, busy = zip(*(child.call("data_path", "first_batch", folder) for _ in range(rounds)), strict=True)
    note = f"{count:,} rows, a tokenizer of {QWEN_VOCABULARY:,}; {min(wall):.2f} s by the wall, cold {cold:.1f} s"
    return Row("warm cache to the first batch, processor", busy, "s", at_most=MOST_WARM, note=note)


def held(folder: str) -> dict[str, int]:
    """Bytes this process held at most: while it tokenised, and in an epoch of batches; and what its index takes."""
    data = module_of(folder)
    with child.Resident() as tokenising:
        data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    with child.Resident() as epoch:
        for _ in loader:
            pass
    store, plan = data.stores["train"], loader.plan(0)
    arrays = [store.lengths, store.trained, plan.rows.order, plan.rows.starts, plan.row_tokens, plan.trained_tokens]
    return {"tokenising": tokenising.most, "epoch": epoch.most, "index": sum(array.nbytes for array in arrays)}


def memory_rows(few: int, many: int) -> Iterator[Row]:
    """What a row more takes, from few short rows to many."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for count in (few, many):
            folder = prepare(Path(name) / str(count), count, 20, 4096)
            found[count] = child.call("data_path", "held", folder)
    grown = {key: (found[many][key] - found[few][key]) / (many - few) for key in found[many]}
    span = f"from {few:,} to {many:,} rows"
    made_of = "lengths, trained tokens and place of each example, starts of the packs"
    yield Row("memory, index", (grown["index"],), "B/row", note=f"{span}: {made_of}")
    yield Row("memory, tokenising", (grown["tokenising"],), "B/row", note=f"{span}, at the peak; no index yet")
    beyond = grown["epoch"] - grown["index"]
    yield Row("memory, an epoch, beyond the index", (beyond,), "B/row", note=f"{span}, at the peak: as it is planned")


def run(quick: bool) -> list[Row]:
    """The table."""
    rounds = 3 if quick else 7
    count = 2_000 if quick else 10_000
    return [
        *tokenising_rows(15 if quick else 61),
        whole_path_row(count, rounds),
        *packing_rows(1_000_000, rounds),
        warm_row(50_000, rounds),
        *(memory_rows(20_000, 100_000) if quick else memory_rows(100_000, 1_000_000)),
    ]
