"""From files to stores, reports and batches, through the data module alone."""

import copy
import json
import multiprocessing
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from lightning_trainer.data import ChatDataModule
from lightning_trainer.data.split import LateRandom
from lightning_trainer.data.store import TokenStore
from lightning_trainer.profiles import EmojiThink, Plain
from lightning_trainer.types import Batch, InputError

Rows = list[dict[str, Any]]
Make = Callable[..., ChatDataModule]
Write = Callable[..., Path]


class Shouting(Plain):
    """A profile with an option."""

    def __init__(self, loudly: bool = True) -> None:
        self.loudly = loudly

    def transform_messages(self, messages: Rows, rng: Any) -> Rows:
        text = str.upper if self.loudly else str
        return [{**message, "content": text(message["content"])} for message in messages]


class ThreeArguments(Plain):
    """A profile as the earlier program had them."""

    def transform_example(self, example: Any, index: int, system_prompt: str | None) -> dict[str, Any]:
        return {"messages": [{"role": "system", "content": f"{system_prompt} {index}"}, *example["messages"]]}


class Drawing(Plain):
    """A profile that draws."""

    def transform_messages(self, messages: Rows, rng: Any) -> Rows:
        return [*messages[:-1], {**messages[-1], "content": f"hello {rng.getrandbits(32)}"}]


def chat(question: str, *answers: str) -> dict[str, Any]:
    """One row; each answer after the first follows the same question again."""
    turns = []
    for answer in answers:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def fake_trainer(directory: Path, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "state": SimpleNamespace(fn=SimpleNamespace(value="fit")),
        "is_global_zero": True,
        "fast_dev_run": False,
        "default_root_dir": str(directory),
        "accumulate_grad_batches": 1,
        "world_size": 1,
        "global_rank": 0,
        "limit_train_batches": 1.0,
        "strategy": SimpleNamespace(root_device=torch.device("cpu")),
    }
    return SimpleNamespace(**{**values, **changes})


@pytest.fixture
def make(tmp_path: Path, tokenizer: Any) -> Make:
    """A data module of a small run, not yet set up. `trainer` changes the trainer, `tokenizer` replaces ours."""

    def build(train_path: Any, **options: Any) -> ChatDataModule:
        trainer, own = options.pop("trainer", {}), options.pop("tokenizer", tokenizer)
        paths = [str(path) for path in train_path] if isinstance(train_path, list) else str(train_path)
        values = {"profile": Plain(), "cache_dir": str(tmp_path / "cache"), "max_length": 128, "batch_size": 2}
        module = ChatDataModule(paths, **{**values, **options})
        module.trainer, module.tokenizer = fake_trainer(tmp_path / "run", **trainer), own
        return module

    return build


def set_up(module: ChatDataModule, stage: str = "fit") -> ChatDataModule:
    module.prepare_data()
    module.setup(stage)
    return module


def texts(module: ChatDataModule, name: str) -> list[str]:
    store, tokenizer = module.stores[name], module.tokenizer
    assert tokenizer is not None
    return [str(tokenizer.decode(store[row][0])) for row in range(len(store))]


def report_of(module: ChatDataModule) -> dict[str, Any]:
    assert module.trainer is not None
    report: dict[str, Any] = json.loads((Path(module.trainer.default_root_dir) / "data_report.json").read_text())
    return report


def quarantine_of(module: ChatDataModule) -> list[dict[str, Any]]:
    assert module.trainer is not None
    lines = (Path(module.trainer.default_root_dir) / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_ten_rows_and_an_empty_validation_split(make: Make, write_rows: Write, chat_rows: Callable[..., Rows]) -> None:
    module = set_up(make(write_rows(chat_rows(10)), val_fraction=0.0, batch_size=3, packing=False))
    loader = module.train_dataloader()
    assert [len(batch.row_ids) for batch in loader] == [3, 3, 3, 1]
    assert module.val_dataloader() == []


def test_a_share_that_catches_no_row_is_an_empty_split(
    make: Make, write_rows: Write, chat_rows: Callable[..., Rows]
) -> None:
    module = set_up(make(write_rows(chat_rows(10)), val_fraction=1e-9))
    assert len(module.stores["val"]) == 0
    assert module.val_dataloader() == []
    assert len(module.stores["train"]) == 10
    assert report_of(module)["val"]["lengths"] == {}
    assert module.conversations(2)[1] == "train"


@pytest.mark.parametrize("packing", [True, False])
def test_rows_of_unequal_length_with_extra_columns(
    make: Make, write_rows: Write, chat_rows: Callable[..., Rows], packing: bool
) -> None:
    rows = [{**row, f"extra{number % 3}": [number]} for number, row in enumerate(chat_rows(40))]
    module = set_up(make(write_rows(rows), packing=packing, val_fraction=0.2))
    for loader, name in ((module.train_dataloader(), "train"), (module.val_dataloader(), "val")):
        batches: list[Batch] = list(loader)
        assert sorted(row for batch in batches for row in batch.row_ids) == list(range(len(module.stores[name])))
        assert sum(batch.step_tokens for batch in batches) == module.stores[name].trained.sum()
    assert len(module.stores["train"]) + len(module.stores["val"]) == 40


def test_the_same_rows_in_jsonl_an_array_and_parquet(
    make: Make, tmp_path: Path, write_rows: Write, chat_rows: Callable[..., Rows]
) -> None:
    rows = chat_rows(12)
    array, parquet = tmp_path / "rows.json", tmp_path / "rows.parquet"
    array.write_text(json.dumps(rows, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    read = [texts(set_up(make(path, val_fraction=0.3)), "train") for path in (write_rows(rows), array, parquet)]
    assert read[0] == read[1] == read[2]
    assert 0 < len(read[0]) < 12


def test_several_files_and_where_each_row_came_from(make: Make, write_rows: Write) -> None:
    first, second = write_rows([chat("hi", "one")], "a.jsonl"), write_rows([chat("hi", "two")] * 2, "b.jsonl")
    module = set_up(make([first, second], val_fraction=0.0))
    origins = [module.stores["train"].origin(row) for row in range(3)]
    assert [(origin.file, origin.line) for origin in origins] == [(str(first), 1), (str(second), 1), (str(second), 2)]


def test_the_steps_of_the_trainer_reach_the_plan(make: Make, write_rows: Write, chat_rows: Callable[..., Rows]) -> None:
    path = write_rows(chat_rows(20))
    options: dict[str, Any] = {"val_fraction": 0.0, "packing": False}
    module = set_up(make(path, trainer={"accumulate_grad_batches": 3, "limit_train_batches": 4}, **options))
    batches = list(module.train_dataloader())
    trained = [sum((batch.labels != -100).sum().item() for batch in part) for part in (batches[:3], batches[3:])]
    assert [batch.step_tokens for batch in batches] == [trained[0]] * 3 + [trained[1]]
    halved = set_up(make(path, trainer={"limit_train_batches": 0.5}, **options))
    assert len(list(halved.train_dataloader())) == 5


def test_two_ranks_share_the_batches_out(make: Make, write_rows: Write, chat_rows: Callable[..., Rows]) -> None:
    path = write_rows(chat_rows(9))
    ranks = [
        set_up(make(path, trainer={"world_size": 2, "global_rank": rank}, val_fraction=0.0, packing=False))
        for rank in (0, 1)
    ]
    pairs = list(zip(*(rank.train_dataloader() for rank in ranks), strict=True))
    assert sorted(row for pair in pairs for batch in pair for row in batch.row_ids) == list(range(9))
    assert all(first.step_tokens == second.step_tokens for first, second in pairs)


def test_prediction_rows_may_end_with_the_user(make: Make, write_rows: Write) -> None:
    path = write_rows([{"prompt": "hi"}, {"prompt": "and"}, {"prompt": "so"}], "ask.jsonl")
    state = SimpleNamespace(fn=SimpleNamespace(value="predict"))
    module = set_up(make(path, predict_path=str(path), trainer={"state": state}), "predict")
    loader = module.predict_dataloader()
    batches = list(loader)
    assert len(loader) == 2
    assert [[row["origin"].rpartition(":")[2] for row in batch] for batch in batches] == [["1", "2"], ["3"]]
    assert batches[0][0]["messages"] == [{"role": "user", "content": "hi"}]


def test_a_bad_prediction_row_is_refused_by_file_and_line(make: Make, write_rows: Write) -> None:
    path = write_rows([{"prompt": "hi"}, {"prompt": 3}], "ask.jsonl")
    with pytest.raises(InputError, match=r"ask\.jsonl:2: 'prompt' is a number"):
        make(path, predict_path=str(path)).predict_dataloader()


def test_a_command_without_its_path_says_which_key(make: Make, write_rows: Write) -> None:
    state = SimpleNamespace(fn=SimpleNamespace(value="test"))
    with pytest.raises(InputError, match="reads data.test_path") as caught:
        set_up(make(write_rows([chat("hi", "hello")]), trainer={"state": state}), "test")
    assert caught.value.key == "data.test_path"


@pytest.mark.parametrize(
    ("option", "value"),
    [("batch_size", 0), ("max_length", 1), ("val_fraction", 1.5), ("max_bad_fraction", -0.1), ("num_workers", -1)],
)
def test_options_out_of_range_are_refused_by_key(option: str, value: float) -> None:
    with pytest.raises(InputError, match="must be") as caught:
        ChatDataModule("rows.jsonl", **{option: value})  # type: ignore[arg-type]
    assert caught.value.key == f"data.{option}"


def bad_rows_file(tmp_path: Path) -> Path:
    """Four rows to use, two of them alike; lines 2, 4, 5 and 7 cannot be used."""
    good = json.dumps(chat("hi", "hello"))
    lines = [
        good,
        '{"messages": [',
        good,
        '{"messages": [{"role": "user", "content": "alone"}]}',
        '{"colour": "red"}',
        json.dumps(chat("and", "what")),
        '{"messages": [{"role": "assistant", "content": "first"}, {"role": "user", "content": "second"}]}',
        json.dumps(chat("so", "world")),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_bad_rows_are_set_aside_with_file_line_and_reason(make: Make, tmp_path: Path) -> None:
    path = bad_rows_file(tmp_path)
    module = set_up(make(path, val_fraction=0.0, max_bad_fraction=0.5))
    faults = quarantine_of(module)
    assert [(fault["split"], fault["file"], fault["line"], fault["kind"]) for fault in faults] == [
        ("train", str(path), line, "bad") for line in (2, 4, 5, 7)
    ]
    reasons = ["not JSON", "there is no assistant turn", "no known form", "starts with the assistant"]
    for fault, reason in zip(faults, reasons, strict=True):
        assert reason in fault["reason"]
    assert [module.stores["train"].origin(row).line for row in range(4)] == [1, 3, 6, 8]


def test_the_report_by_hand(make: Make, tmp_path: Path) -> None:
    module = set_up(make(bad_rows_file(tmp_path), val_fraction=0.0, max_bad_fraction=0.5))
    tokenizer: Any = module.tokenizer
    asked = [("hi", "hello"), ("hi", "hello"), ("and", "what"), ("so", "world")]
    prompts = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question, _ in asked]
    answers = [len(tokenizer(f"{answer}<|im_end|>")["input_ids"]) for _, answer in asked]
    lengths = [len(tokenizer(prompt)["input_ids"]) + answer for prompt, answer in zip(prompts, answers, strict=True)]
    report = report_of(module)["train"]
    assert report.pop("lengths")["p100"] == max(lengths)
    assert report == {
        "read": 8,
        "kept": 4,
        "rows": 4,
        "tokens": sum(lengths),
        "trained_tokens": sum(answers),
        "truncated": 0,
        "too_long": 0,
        "too_short": 0,
        "bad": 4,
        "duplicates": 1,
    }


def test_too_many_bad_rows_stop_the_run_and_are_listed(make: Make, tmp_path: Path) -> None:
    module = make(bad_rows_file(tmp_path), val_fraction=0.0, max_bad_fraction=0.4)
    with pytest.raises(InputError, match=r"(?s)4 of 8 rows cannot be used.*rows\.jsonl:2: not JSON") as caught:
        set_up(module)
    assert caught.value.key == "data.max_bad_fraction"
    assert len(quarantine_of(module)) == 4


def test_unreadable_lines_are_counted_once(make: Make, tmp_path: Path) -> None:
    module = set_up(make(bad_rows_file(tmp_path), val_fraction=0.5, max_bad_fraction=1.0, seed=1))
    assert sorted(fault["line"] for fault in quarantine_of(module)) == [2, 4, 5, 7]
    assert sum(report["read"] for report in report_of(module).values()) == 8


def test_bad_rows_of_files_that_are_split_are_counted_together(
    make: Make, write_rows: Write, chat_rows: Callable[..., Rows]
) -> None:
    path = write_rows([*chat_rows(199), {"colour": "red"}])  # 0.5 %, and 1 % is allowed
    for seed in range(12):  # under some of these the bad row is held out
        set_up(make(path, val_fraction=0.2, seed=seed))


def test_raise_stops_at_the_first_bad_row(make: Make, tmp_path: Path) -> None:
    path = bad_rows_file(tmp_path)
    with pytest.raises(InputError, match=r"rows\.jsonl:2: not JSON") as caught:
        set_up(make(path, val_fraction=0.0, on_bad_row="raise"))
    assert str(path) in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_raise_holds_for_rows_tokenised_earlier_too(make: Make, tmp_path: Path) -> None:
    options: dict[str, Any] = {"val_fraction": 0.0, "max_bad_fraction": 1.0}
    path = bad_rows_file(tmp_path)
    set_up(make(path, **options))
    with pytest.raises(InputError, match=r"rows\.jsonl:2: not JSON"):
        set_up(make(path, **options, on_bad_row="raise"))


def test_no_row_left_stops_the_run(make: Make, write_rows: Write) -> None:
    with pytest.raises(InputError, match="there are no rows"):
        set_up(make(write_rows([])))


def test_half_an_emoji_anywhere_in_a_row_is_a_bad_row(make: Make, make_tokenizer: Any, write_rows: Write) -> None:
    template = "{% for m in messages %}{{ m.name or '' }}{{ m.content }}<|im_end|>{% endfor %}"
    spoilt = {"messages": [{"role": "user", "content": "hi", "name": "\ud83d"}, chat("", "x")["messages"][1]]}
    path = write_rows([chat("hi", "hello")])
    path.write_text(path.read_text() + json.dumps(spoilt) + "\n")
    module = set_up(make(path, tokenizer=make_tokenizer(template), val_fraction=0.0, max_bad_fraction=1.0))
    assert [fault["line"] for fault in quarantine_of(module)] == [2]


LENGTH_OF_ONE_TURN = 21
"""Tokens of chat("hi", "hello"), counted in test_encode."""


@pytest.mark.parametrize("on_long_row", ["drop", "truncate", "raise"])
def test_rows_up_to_max_length_stay_whole(make: Make, write_rows: Write, on_long_row: str) -> None:
    path = write_rows([chat("hi", "hello")])
    module = set_up(make(path, val_fraction=0.0, on_long_row=on_long_row, max_length=LENGTH_OF_ONE_TURN))
    assert module.stores["train"].lengths.tolist() == [LENGTH_OF_ONE_TURN]
    assert len(list(module.train_dataloader())) == 1


def test_long_rows_are_dropped_listed_and_not_bad(make: Make, write_rows: Write) -> None:
    path = write_rows([chat("hi", "hello"), chat("hi", "hello " * 9)])
    module = make(path, val_fraction=0.0, max_length=LENGTH_OF_ONE_TURN, max_bad_fraction=0.0)
    with pytest.warns(UserWarning, match="train: 1 of 2 rows dropped: 1 over max_length 21, 0 under min_length 0"):
        set_up(module)
    assert len(module.stores["train"]) == 1
    [fault] = quarantine_of(module)
    assert (fault["line"], fault["kind"]) == (2, "too_long")
    assert fault["reason"].endswith("tokens, more than max_length 21")
    assert (report_of(module)["train"]["kept"], report_of(module)["train"]["too_long"]) == (1, 1)


def test_long_rows_are_cut_after_the_last_turn_that_fits(make: Make, write_rows: Write) -> None:
    path = write_rows([chat("hi", "hello", "hello", "hello " * 30), chat("hi", "hello " * 60)])
    module = make(path, val_fraction=0.0, max_length=50, on_long_row="truncate")
    with pytest.warns(UserWarning, match="1 over max_length"):  # the one of which no turn fits
        set_up(module)
    [text] = texts(module, "train")
    turn = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>"
    assert text == f"{turn}\n{turn}"
    assert (report_of(module)["train"]["truncated"], report_of(module)["train"]["too_long"]) == (1, 1)
    assert module.stores["train"].trained.tolist() == [4]


def test_long_rows_are_cut_after_a_turn_under_loss_on_all(make: Make, write_rows: Write) -> None:
    path = write_rows([chat("hi", "hello", "hello " * 30)])
    module = set_up(make(path, val_fraction=0.0, max_length=30, on_long_row="truncate", loss_on="all"))
    assert module.stores["train"].lengths.tolist() == [LENGTH_OF_ONE_TURN]


def test_long_rows_raise_with_file_and_line(make: Make, write_rows: Write) -> None:
    path = write_rows([chat("hi", "hello"), chat("hi", "hello " * 9)])
    module = make(path, val_fraction=0.0, max_length=LENGTH_OF_ONE_TURN, on_long_row="raise")
    with pytest.raises(InputError, match=r"rows\.jsonl:2: \d+ tokens, more than max_length 21") as caught:
        set_up(module)
    assert caught.value.key == "data.on_long_row"


def test_texts_are_cut_anywhere(make: Make, write_rows: Write) -> None:
    module = set_up(make(write_rows([{"text": "h" * 50}]), val_fraction=0.0, max_length=7, on_long_row="truncate"))
    assert module.stores["train"].lengths.tolist() == [7]
    assert module.stores["train"].trained.tolist() == [6]


def test_short_rows_are_dropped(make: Make, write_rows: Write) -> None:
    path = write_rows([chat("hi", "hello"), chat("hi", "hello hello")])
    module = make(path, val_fraction=0.0, min_length=LENGTH_OF_ONE_TURN + 1)
    with pytest.warns(UserWarning, match="1 under min_length 22"):
        set_up(module)
    assert [fault["kind"] for fault in quarantine_of(module)] == ["too_short"]


def test_the_split_goes_with_the_rows_not_with_their_order(
    make: Make, write_rows: Write, chat_rows: Callable[..., Rows]
) -> None:
    rows = chat_rows(60)
    before = set_up(make(write_rows(rows), val_fraction=0.3))
    held_out = set(texts(before, "val"))
    assert 5 < len(held_out) < 35
    assert held_out.isdisjoint(texts(before, "train"))
    turned = [dict(reversed(row.items())) for row in reversed(rows)]
    after = set_up(make(write_rows(turned, "turned.jsonl"), val_fraction=0.3))
    assert set(texts(after, "val")) == held_out
    assert sorted(texts(after, "train")) == sorted(texts(before, "train"))
    fewer = set_up(make(write_rows(rows[:40], "fewer.jsonl"), val_fraction=0.3))
    assert set(texts(fewer, "val")) <= held_out
    other = set_up(make(write_rows(rows), val_fraction=0.3, seed=1))
    assert set(texts(other, "val")) != held_out


def test_duplicates_go_to_one_side(make: Make, write_rows: Write, chat_rows: Callable[..., Rows]) -> None:
    rows = chat_rows(30)
    module = set_up(make(write_rows(rows + rows), val_fraction=0.3))
    train, val = texts(module, "train"), texts(module, "val")
    assert set(train).isdisjoint(val)
    assert len(train) + len(val) == 60
    assert sum(report["duplicates"] for report in report_of(module).values()) == 30


def test_at_most_val_max_rows_are_held_out(make: Make, write_rows: Write, chat_rows: Callable[..., Rows]) -> None:
    path = write_rows(chat_rows(60))
    many = set(texts(set_up(make(path, val_fraction=0.5)), "val"))
    capped = set_up(make(path, val_fraction=0.5, val_max_rows=4))
    assert len(capped.stores["val"]) == 4
    assert len(capped.stores["train"]) == 56
    assert set(texts(capped, "val")) < many


@pytest.mark.parametrize("none_held_out", [{"val_max_rows": 0}, {"val_fraction": 0.0}])
def test_nothing_is_held_out_and_nothing_lost(
    make: Make, write_rows: Write, chat_rows: Callable[..., Rows], none_held_out: dict[str, Any]
) -> None:
    module = set_up(make(write_rows(chat_rows(20)), **none_held_out))
    assert list(module.stores) == ["train"]
    assert len(module.stores["train"]) == 20


def test_a_validation_file_takes_nothing_from_training(
    make: Make, write_rows: Write, chat_rows: Callable[..., Rows]
) -> None:
    val = write_rows([chat("hi", "hello")], "val.jsonl")
    module = set_up(make(write_rows(chat_rows(20)), val_path=str(val), val_fraction=0.5))
    assert (len(module.stores["train"]), len(module.stores["val"])) == (20, 1)
    [shown], name = module.conversations(4)
    assert (shown, name) == (chat("hi", "hello"), "val")


def test_the_same_row_draws_otherwise_in_another_split(make: Make, write_rows: Write) -> None:
    rows = [chat("hi", "hello"), chat("and", "what")]
    train, val = write_rows(rows), write_rows(rows[::-1], "val.jsonl")
    module = set_up(make(train, val_path=str(val), profile=Drawing()))
    assert set(texts(module, "train")).isdisjoint(texts(module, "val"))
    turned = set_up(make(val, val_fraction=0.0, profile=Drawing()))
    assert texts(turned, "train") == texts(module, "train")[::-1]


def built(module: ChatDataModule) -> set[str]:
    """Names of the stores a set-up run uses."""
    return {store.folder.name for store in set_up(module).stores.values()}


def test_the_same_run_tokenises_once(make: Make, write_rows: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows([chat("hi", "hello")])
    first = built(make(path, val_fraction=0.0, profile=EmojiThink(), max_length=512))
    monkeypatch.setattr("lightning_trainer.data.tokenise._Tokeniser.run", None)  # calling it would fail
    assert built(make(path, val_fraction=0.0, profile=EmojiThink(), max_length=512)) == first


def test_what_tokens_depend_on_is_in_the_caches_key(make: Make, write_rows: Write, make_tokenizer: Any) -> None:
    path = write_rows([chat("hi", "hello")])
    base: dict[str, Any] = {"val_fraction": 0.0, "profile": Shouting()}
    template = make_tokenizer().chat_template.replace("\n", " ")
    more_tokens = make_tokenizer()
    more_tokens.add_tokens(["hello"])
    changes: list[dict[str, Any]] = [
        {},
        {"tokenizer": make_tokenizer(template)},
        {"tokenizer": more_tokens},
        {"profile": Shouting(loudly=False)},
        {"profile": Plain()},
        {"max_length": 64},
        {"min_length": 3},
        {"on_long_row": "truncate"},
        {"system_prompt": "Be kind."},
        {"system_prompt": "Be kind.", "system_prompt_mode": "replace"},
        {"loss_on": "all"},
        {"seed": 1},
    ]
    names = [built(make(path, **{**base, **change})) for change in changes]
    assert len({name for [name] in names}) == len(changes)
    write_rows([chat("hi", "world")])
    [changed] = built(make(path, **base))
    assert {changed} not in names


def test_what_tokens_do_not_depend_on_is_not(make: Make, write_rows: Write) -> None:
    path = write_rows([chat("hi", "hello")])
    changes: list[dict[str, Any]] = [{}, {"batch_size": 1}, {"packing": False}, {"num_workers": 1}]
    assert len({name for change in changes for name in built(make(path, val_fraction=0.0, **change))}) == 1


def test_a_tokenizer_saved_with_padding_is_the_same_before_and_after_use(
    make: Make, write_rows: Write, make_tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_padding(length=16)
    tokenizer.backend_tokenizer.enable_truncation(16)
    module = make(write_rows([chat("hi", "hello")]), val_fraction=0.0, tokenizer=tokenizer)
    module.split("train")
    before = module.fingerprints()
    set_up(module)
    assert module.fingerprints() == before
    assert len(list((tmp_path / "cache").iterdir())) == 1


def build_at_once(module: ChatDataModule, barrier: Any, results: Any) -> None:
    barrier.wait()
    module.prepare_data()
    results.put(len(module._build("train", show_progress=False)))


def test_two_processes_may_build_the_same_cache(
    make: Make, write_rows: Write, chat_rows: Callable[..., Rows], tmp_path: Path
) -> None:
    path = write_rows(chat_rows(300))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    modules = [make(path, val_fraction=0.0) for _ in range(2)]
    processes = [context.Process(target=build_at_once, args=(module, barrier, results)) for module in modules]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [300, 300]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    [folder] = (tmp_path / "cache").iterdir()
    assert len(TokenStore(folder)) == 300


def test_a_build_that_fails_leaves_nothing_behind(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(f"[{json.dumps(chat('hi', 'hello'))},\n")
    with pytest.raises(InputError, match=r"rows\.json:2: this JSON array breaks"):
        set_up(make(path, val_fraction=0.0))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_profile_written_in_a_notebook_can_be_used(
    make: Make, write_rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", notebook)
    exec("from lightning_trainer.profiles import Plain\nclass Mine(Plain): pass", vars(notebook))
    module = set_up(make(write_rows([chat("hi", "hello")]), val_fraction=0.0, profile=vars(notebook)["Mine"]()))
    assert len(module.stores["train"]) == 1


def test_a_profile_with_the_three_positional_arguments_alone(make: Make, write_rows: Write) -> None:
    path = write_rows([chat("hi", "hello"), chat("and", "what")])
    module = set_up(make(path, val_fraction=0.0, profile=ThreeArguments(), system_prompt="Be kind."))
    first, second = texts(module, "train")
    assert first.startswith("<|im_start|>system\nBe kind. 1<|im_end|>")
    assert second.startswith("<|im_start|>system\nBe kind. 2<|im_end|>")


def test_the_date_of_the_run_stands_in_the_system_prompt(make: Make, write_rows: Write) -> None:
    module = make(write_rows([chat("hi", "hello")]), val_fraction=0.0, system_prompt="It is {date}, {not} later.")
    module.run_date = "2024-05-06"
    set_up(module)
    assert texts(module, "train")[0].startswith("<|im_start|>system\nIt is 2024-05-06, {not} later.<|im_end|>")


def test_texts_under_a_profile_that_wants_turns_are_bad_rows(make: Make, write_rows: Write) -> None:
    path = write_rows([{"text": "Once"}, chat("hi", "hello")])
    module = set_up(make(path, val_fraction=0.0, profile=EmojiThink(), max_length=512, max_bad_fraction=0.5))
    [fault] = quarantine_of(module)
    assert (fault["line"], "has no turns for profile" in fault["reason"]) == (1, True)


def test_a_second_start_reads_no_row(
    make: Make, write_rows: Any, chat_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which rows are held out is a function of all of them; it is remembered with the tokens."""
    from lightning_trainer.data import split

    path = write_rows(chat_rows(60))
    first = set_up(make(path, val_fraction=0.2))
    assert len(first.stores["val"]) > 0
    second = make(path, val_fraction=0.2)

    def no_reading(source: Any) -> Any:
        raise AssertionError("a row was read")

    monkeypatch.setattr(split, "read", no_reading)
    set_up(second)
    assert second.split("train").share == first.split("train").share
    assert [len(store) for store in second.stores.values()] == [len(store) for store in first.stores.values()]


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: [rng.random() for _ in range(5)],
        lambda rng: (rng.choice("abc"), rng.randrange(10**9), rng.getrandbits(70), rng.randbytes(9)),
        lambda rng: (rng.gauss(), rng.gauss(), rng.normalvariate(), rng.triangular(), rng.expovariate(1.0)),
        lambda rng: (
            rng.shuffle(numbers := list(range(9))),
            numbers,
            rng.sample(range(99), 5),
            rng.choices("abc", k=5),
        ),
        lambda rng: (copy.deepcopy(rng).random(), copy.copy(rng).random(), pickle.loads(pickle.dumps(rng)).random()),
        lambda rng: (rng.getstate(), rng.random()),
        lambda rng: (rng.seed(7), rng.random(), rng.setstate(random.Random(3).getstate()), rng.random()),
    ],
)
def test_a_rows_generator_is_pythons_seeded_late(draw: Callable[[random.Random], object]) -> None:
    asked: list[str] = []
    late = LateRandom(lambda: asked.append("") or "0:train:5")  # type: ignore[func-returns-value]
    assert not asked
    assert draw(late) == draw(random.Random("0:train:5"))
    assert len(asked) == 1
    assert type(late) is random.Random
