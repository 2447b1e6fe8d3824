"""ChatDataModule: the user's rows as batches."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import lightning
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_trainer.data.collate import Collator
from lightning_trainer.data.encode import LossOn
from lightning_trainer.data.loader import ConversationBatches, EvaluationLoader, PlannedLoader
from lightning_trainer.data.render import Conversation
from lightning_trainer.data.rows import BadRow, sources
from lightning_trainer.data.sampler import Layout
from lightning_trainer.data.split import (
    OnBadRow,
    OnLongRow,
    Recipe,
    Share,
    Split,
    SystemPromptMode,
    recipe_hashes,
    remembered_bound,
)
from lightning_trainer.data.store import TokenStore
from lightning_trainer.data.tokenise import tokenise
from lightning_trainer.profiles import DataProfile, EmojiThink
from lightning_trainer.types import Batch, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DROPPED_WARNING = 0.01
"""Share of rows dropped for their length above which a warning is given."""

SplitName = Literal["train", "val", "test", "predict"]


class ChatDataModule(lightning.LightningDataModule):
    """Reads chat rows, lets a profile rewrite them, tokenises them once and lays them out in batches.

    Args:
        train_path: File, list of files, or Hub id (owner/name[:config][/split]). JSONL, JSON array or parquet.
        val_path: The same for validation; null takes a share of the training rows.
        test_path: The same for the `test` command.
        predict_path: The same for the `predict` command; rows may end with the user's turn.
        val_fraction: Share of the training rows held out when there is no val_path. Which rows is a function of
            their content and the seed, not of their order.
        val_max_rows: Most rows held out that way.
        profile: How a row becomes a conversation: Plain, EmojiThink, Regime3 or a class of your own.
        system_prompt: Template of the system prompt, may hold {date}; null: the profile's own.
        system_prompt_mode: prepend puts it in front of a row's own system message, replace drops the row's.
        max_length: Most tokens of a row; with packing the tokens of a pack.
        min_length: Shorter rows are dropped, in tokens.
        on_long_row: drop rows over max_length, truncate them after the last whole assistant turn, or raise.
        batch_size: Rows per device per micro-batch; with packing a row is one pack of max_length tokens.
        shuffle: Draw another order every epoch; false keeps the order of the files.
        packing: Lay several examples in a row, each attending within itself only, instead of padding.
        loss_on: Train on the assistant's turns, or on all tokens.
        on_bad_row: quarantine sets unusable rows aside in quarantine.jsonl, raise stops at the first.
        max_bad_fraction: Share of unusable rows above which the run stops before training.
        num_workers: Processes that make batches ahead.
        pin_memory: Make them in page-locked memory where a GPU takes them: copies overlap with computing.
        seed: Of the split, the order and the profile's draws; null: seed_everything.
        cache_dir: Where tokenised rows are kept between runs; null: beside the cache of `datasets`.
    """

    DEFAULT_PROFILE: ClassVar[type[DataProfile]] = EmojiThink

    def __init__(
        self,
        train_path: str | list[str],
        val_path: str | list[str] | None = None,
        test_path: str | list[str] | None = None,
        predict_path: str | list[str] | None = None,
        val_fraction: float = 0.05,
        val_max_rows: int = 500,
        profile: DataProfile | None = None,
        system_prompt: str | None = None,
        system_prompt_mode: SystemPromptMode = "prepend",
        max_length: int = 2048,
        min_length: int = 0,
        on_long_row: OnLongRow = "drop",
        batch_size: int = 8,
        shuffle: bool = True,
        packing: bool = True,
        loss_on: LossOn = "assistant",
        on_bad_row: OnBadRow = "quarantine",
        max_bad_fraction: float = 0.01,
        num_workers: int = 0,
        pin_memory: bool = True,
        seed: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        _check_range("data.batch_size", batch_size, 1)
        _check_range("data.max_length", max_length, 2)
        _check_range("data.min_length", min_length, 0)
        _check_range("data.num_workers", num_workers, 0)
        _check_range("data.val_max_rows", val_max_rows, 0)
        _check_range("data.val_fraction", val_fraction, 0, 0.9)
        _check_range("data.seed", seed or 0, 0)
        _check_range("data.max_bad_fraction", max_bad_fraction, 0, 1)
        self.paths = {"train": train_path, "val": val_path, "test": test_path, "predict": predict_path}
        self.val_fraction, self.val_max_rows = val_fraction, val_max_rows
        self.profile = self.DEFAULT_PROFILE() if profile is None else profile
        self.system_prompt, self.system_prompt_mode = system_prompt, system_prompt_mode
        self.max_length, self.min_length, self.on_long_row = max_length, min_length, on_long_row
        self.batch_size, self.packing, self.loss_on = batch_size, packing, loss_on
        self.shuffle, self.pin_memory = shuffle, pin_memory
        self.on_bad_row, self.max_bad_fraction = on_bad_row, max_bad_fraction
        self.num_workers, self.seed, self.cache_dir = num_workers, seed, cache_dir
        self.run_date = datetime.date.today().isoformat()
        self.default_seed = 0
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.stores: dict[str, TokenStore] = {}
        self._splits: dict[str, Split] = {}
        self._bound: int | None = None
        self._prepares = False

    def prepare_data(self) -> None:
        """Tokenise what this command needs, once per machine; nothing else writes into the cache."""
        self._prepares = True
        for name in self.needed_splits():
            self._build(name, show_progress=True)

    def setup(self, stage: str) -> None:
        """Open the tokenised splits and say what was left out.

        Raises:
            InputError: Too many bad rows, or none left.
        """
        for name in self.needed_splits():
            self.stores[name] = self._build(name, show_progress=False)
        trainer: Any = self.trainer
        if stage == "fit" and trainer is not None and trainer.is_global_zero and not trainer.fast_dev_run:
            self.write_reports(Path(trainer.default_root_dir))
        self.check()
        if stage == "validate" and not len(self.stores.get("val", ())):
            raise InputError("there are no validation rows: nothing is held out", key="data.val_fraction")
        if stage == "fit" and self.trainer is not None and not len(self.stores.get("val", ())):
            rank_zero_info("nothing is held out: this run has no validation")
            self.trainer.limit_val_batches = 0

    def train_dataloader(self) -> PlannedLoader:
        """The planned training batches of this rank."""
        assert self.trainer is not None
        trainer = self.trainer
        collate = self._collator("train")
        return PlannedLoader(collate, self.layout(trainer), trainer.global_rank, self.num_workers, self._pin_memory)

    def first_batch(self) -> Batch:
        """The first training batch of this rank, wherever the run stands."""
        return self.train_dataloader().first_batch()

    def layout(self, trainer: Any) -> Layout:
        """How a Trainer's training rows are laid out into batches."""
        return Layout(
            batch_size=self.batch_size,
            accumulate=trainer.accumulate_grad_batches,
            world_size=trainer.world_size,
            pack_to=self.max_length if self.packing else None,
            shuffle=self.shuffle,
            seed=self.data_seed,
            limit=trainer.limit_train_batches,
        )

    def val_dataloader(self) -> EvaluationLoader | list[Any]:
        """The validation batches of this rank; an empty list where nothing is held out."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> EvaluationLoader | list[Any]:
        """The batches of `test_path`."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> ConversationBatches:
        """Conversations of `predict_path`, as their profile makes them, each with the `origin` of its row.

        Raises:
            InputError: A row cannot be used: an answer file with holes in it would mislead.
        """
        conversations = []
        for item in self.split("predict").conversations():
            if isinstance(item, BadRow):
                raise InputError(f"{item.file}:{item.line}: {item.reason}", key="data.predict_path")
            row, conversation = item
            conversations.append({**conversation, "origin": f"{row.file}:{row.line}"})
        if not conversations:
            raise InputError("there are no rows", key="data.predict_path")
        assert self.trainer is not None
        return ConversationBatches(conversations, self.batch_size, self.trainer.global_rank, self.trainer.world_size)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch without waiting for the device."""
        return batch.to(device) if isinstance(batch, Batch) else batch

    @property
    def data_seed(self) -> int:
        """`seed`, or the run's."""
        return self.default_seed if self.seed is None else self.seed

    def conversations(self, count: int) -> tuple[list[Conversation], Literal["val", "train"]]:
        """The first conversations to show previews of, and the split they come from: validation, else training.

        Rows that were set aside are not among them.
        """
        names: tuple[Literal["val", "train"], ...] = ("val", "train")
        for name in names:
            if len(self.stores.get(name, ())):
                return list(islice(self._kept(name, count), count)), name
        return [], "train"

    def _kept(self, name: str, count: int) -> Iterator[Conversation]:
        store = self.stores[name]
        wanted: set[tuple[str, int]] = set()
        for row in range(len(store)):
            origin = store.origin(row)
            wanted.add((origin.file, origin.line))
            if len(wanted) == count:
                break
        for item in self.split(name).conversations():
            if not isinstance(item, BadRow) and (item[0].file, item[0].line) in wanted and "messages" in item[1]:
                yield item[1]

    def rendered_system_prompt(self) -> str | None:
        """The system prompt of every conversation of this run."""
        prompt = self.profile.system_prompt_template if self.system_prompt is None else self.system_prompt
        return self.profile.render_system_prompt(prompt, self.run_date) if prompt else None

    def fingerprints(self) -> dict[str, str]:
        """Hashes of what may not change when a run is resumed: data, tokenizer, template, profile."""
        given = [(f"data.{name}_path", self.paths[name]) for name in ("train", "val")]
        digests = [source.digest() for key, path in given if path is not None for source in sources(path, key)]
        plan = [self.data_seed, self.max_length, self.min_length, self.packing, self.batch_size, self.val_fraction]
        prompt = [self.system_prompt, self.system_prompt_mode]
        data = json.dumps([digests, plan, prompt, self.val_max_rows, self.loss_on, self.on_long_row])
        return {"data": hashlib.sha256(data.encode()).hexdigest(), **recipe_hashes(self._tokenizer(), self.profile)}

    def check_files(self) -> None:
        """Refuse files that are not there, before anything is made of those that are.

        Raises:
            InputError: See above.
        """
        for name, paths in self.paths.items():
            if paths is not None:
                sources(paths, f"data.{name}_path")

    def split(self, name: str) -> Split:
        """One split; made when first asked for.

        Raises:
            InputError: The command needs a path that is not given, or a file that is not there.
        """
        if name not in self._splits:
            self._splits[name] = self._make_split(name)
        return self._splits[name]

    def check(self) -> None:
        """Refuse too many bad rows and an empty training split.

        Raises:
            InputError: See above; the message counts the reasons.
        """
        faults = [fault for store in self.stores.values() for fault in store.ledger["faults"] if fault["kind"] == "bad"]
        if faults and self.on_bad_row == "raise":  # tokenised by an earlier run that set them aside
            raise InputError("{file}:{line}: {reason}".format(**faults[0]), key="data.on_bad_row")
        reports = {name: store.ledger["report"] for name, store in self.stores.items()}
        bad, read = (sum(report[kind] for report in reports.values()) for kind in ("bad", "read"))
        if bad > self.max_bad_fraction * read:
            raise InputError(
                f"{bad} of {read} rows cannot be used, more than max_bad_fraction {self.max_bad_fraction:g} allows; "
                f"the first:\n{_first_faults(self.stores.values())}",
                key="data.max_bad_fraction",
            )
        for name, report in reports.items():
            if name in ("train", "test") and not report["rows"]:
                why = _first_faults([self.stores[name]])
                left = f"no {name} row is left of {report['read']}\n{why}" if report["read"] else "there are no rows"
                raise InputError(left, key=f"data.{name}_path")
            self._warn_of_drops(name, report)

    def write_reports(self, directory: Path) -> None:
        """Write `data_report.json` and `quarantine.jsonl`."""
        directory.mkdir(parents=True, exist_ok=True)
        report = {name: store.ledger["report"] for name, store in self.stores.items()}
        (directory / "data_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        lines = [
            json.dumps({"split": name, **fault}, ensure_ascii=False) + "\n"
            for name, store in self.stores.items()
            for fault in store.ledger["faults"]
        ]
        (directory / "quarantine.jsonl").write_text("".join(lines), encoding="utf-8")

    def needed_splits(self) -> list[str]:
        """The splits that the Trainer's command reads; of `fit` where there is no Trainer yet."""
        fn = self.trainer.state.fn.value if self.trainer is not None and self.trainer.state.fn else "fit"
        has_val = self.paths["val"] is not None or (self.val_fraction > 0 and self.val_max_rows > 0)
        val = ["val"] if has_val else []
        return {"fit": ["train", *val], "validate": val, "test": ["test"], "predict": []}[fn]

    def _make_split(self, name: str) -> Split:
        paths = self.paths[name]
        share, counts_unreadable = Share(), True
        carved = name in ("train", "val") and self.paths["val"] is None and self.val_fraction > 0
        if name == "val" and carved:
            paths, counts_unreadable = self.paths["train"], False
        if paths is None:
            raise InputError(f"this command reads data.{name}_path, which is not set", key=f"data.{name}_path")
        files = sources(paths, f"data.{name}_path")
        if carved:
            if self._bound is None:
                limits = (self.data_seed, self.val_fraction, self.val_max_rows)
                self._bound = remembered_bound(self._cache(), files, *limits, keep=self._prepares)
            bound = self._bound
            share = Share(0, bound) if name == "val" else Share(bound, 2**64)
        return Split(name, files, share, self._recipe(), counts_unreadable)

    def _recipe(self) -> Recipe:
        return Recipe(
            tokenizer=self._tokenizer(),
            profile=self.profile,
            system_prompt=self.rendered_system_prompt(),
            system_prompt_mode=self.system_prompt_mode,
            seed=self.data_seed,
            max_length=self.max_length,
            min_length=self.min_length,
            loss_on=self.loss_on,
            on_long_row=self.on_long_row,
        )

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            if self.trainer is None:
                raise RuntimeError("set `tokenizer` on the data module, or hand it to a Trainer with its model")
            module: Any = self.trainer.lightning_module
            self.tokenizer = module.tokenizer
        assert self.tokenizer is not None
        return self.tokenizer

    def _build(self, name: str, show_progress: bool) -> TokenStore:
        split = self.split(name)
        store = tokenise(split, self.store_folder(name), self.on_bad_row, show_progress)
        if show_progress:
            report = store.ledger["report"]
            rank_zero_info(
                f"{name}: {report['kept']} of {report['read']} rows, {report['tokens']} tokens, "
                f"{report['trained_tokens']} of them trained on"
            )
        return store

    def store_folder(self, name: str) -> Path:
        """Where the tokens of a split are kept: a function of everything they depend on."""
        return self._cache() / self.split(name).digest()

    def _cache(self) -> Path:
        if self.cache_dir is not None:
            return Path(self.cache_dir)
        import datasets

        return Path(datasets.config.HF_DATASETS_CACHE) / "lightning_trainer"

    def _collator(self, name: str) -> Collator:
        return Collator(self.stores[name], self.packing, int(self._tokenizer().pad_token_id or 0))

    def _evaluation_loader(self, name: str) -> EvaluationLoader | list[Any]:
        store = self.stores.get(name)
        if store is None or not len(store):
            return []
        assert self.trainer is not None
        pack_to = max(self.max_length, int(store.lengths.max())) if self.packing else None
        layout = Layout(self.batch_size, world_size=self.trainer.world_size, pack_to=pack_to, shuffle=False)
        collate = self._collator(name)
        return EvaluationLoader(collate, layout, self.trainer.global_rank, self.num_workers, self._pin_memory)

    @property
    def _pin_memory(self) -> bool:
        return self.pin_memory and self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _warn_of_drops(self, name: str, report: dict[str, Any]) -> None:
        dropped = report["too_long"] + report["too_short"]
        if dropped > DROPPED_WARNING * report["read"]:
            rank_zero_warn(
                f"{name}: {dropped} of {report['read']} rows dropped: {report['too_long']} over max_length "
                f"{self.max_length}, {report['too_short']} under min_length {self.min_length}"
            )


def _check_range(key: str, value: float, low: float, high: float | None = None) -> None:
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InputError(f"must be {span}, not {value}", key=key)


def _first_faults(stores: Iterable[TokenStore], count: int = 5) -> str:
    faults: list[dict[str, Any]] = [fault for store in stores for fault in store.ledger["faults"]]
    lines = [f"  {fault['file']}:{fault['line']}: {fault['reason']}" for fault in faults[:count]]
    more = [f"  and {len(faults) - count} more"] if len(faults) > count else []
    return "\n".join(lines + more)
