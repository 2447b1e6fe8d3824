"""Before the first step: are the labels, the batches and the model what they should be?

What this finds would not stop a run: it would train, for hours, towards the wrong thing.
"""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_trainer import template
from lightning_trainer.data.loader import PlannedLoader
from lightning_trainer.generation import uncompiled
from lightning_trainer.model.probe import evaluating, separation
from lightning_trainer.pretrained import embedding_rows
from lightning_trainer.types import IGNORE_INDEX, Batch, InputError

EXAMPLES = 64
"""Examples whose labels are looked at."""

TOGETHER, TOKENS = 2, 16
"""Examples that are computed together, and how many tokens of each: seconds for a 1B model on two CPU cores."""


class SelfCheck(Callback):
    """Looks at real examples of this run, through the collator and the model that will train.

    No random number is drawn and nothing is changed: training is the same with and without.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the first examples, once loaders and weights are as the first step will find them.

        Raises:
            InputError: Something would train towards the wrong thing; the message names it.
        """
        loader = trainer.train_dataloader
        if not isinstance(loader, PlannedLoader):  # a data module that is not ours
            return
        started = time.perf_counter()
        module: Any = pl_module
        store = loader.collate.store
        batch = loader.collate(np.linspace(0, len(store) - 1, min(EXAMPLES, len(store))).astype(np.int64), 1)
        check_tokens(batch, embedding_rows(module.causal_lm))
        all_cut = store.ledger["report"]["truncated"] >= len(store)
        check_labels(of_examples(batch.labels, batch, loader.collate.packed), module.tokenizer, all_cut)
        check_targets(batch)
        checked = ["tokens within the embedding", "labels with their stop token"]
        if isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            # Where nothing is validated, the layers have not been compiled for evaluation, and need not be for this.
            with nullcontext() if trainer.enable_validation else uncompiled():
                check_examples_apart(module, loader)
            checked.append("examples apart")
        rank_zero_info(f"self-check: {', '.join(checked)} ({time.perf_counter() - started:.1f} s)")


def check_tokens(batch: Batch, rows: int) -> None:
    """Refuse token ids outside the embedding.

    Raises:
        InputError: See above.
    """
    largest = int(batch.input_ids.max())
    if largest >= rows:
        raise InputError(
            f"the data holds token id {largest}, the model's embedding has {rows} rows: tokenizer and model do not "
            "belong together",
            key="model.tokenizer",
        )


def check_labels(examples: list[Tensor], tokenizer: Any, all_cut: bool = False) -> None:
    """Refuse labels from which the model would learn nothing, or never learn to stop.

    Args:
        examples: Labels of each example, (tokens,) int64.
        tokenizer: With its chat template; without one, rows are texts that need no end.
        all_cut: Whether every example was cut to max_length, and has lost its end.

    Raises:
        InputError: No token is trained, or in no example the token that ends an answer.
    """
    trained = [labels[labels != IGNORE_INDEX] for labels in examples]
    if not any(len(labels) for labels in trained):
        raise InputError(f"no token of {len(examples)} examples is trained: all labels are masked", "data")
    stops = template.stop_token_ids(tokenizer)
    ends = sum(bool(set(labels.tolist()) & set(stops)) for labels in trained)
    names = ", ".join(repr(tokenizer.decode([stop])) for stop in stops) or "there is none"
    if not ends and tokenizer.chat_template and not all_cut:
        raise InputError(
            f"the token that ends an answer ({names}) is trained in none of {len(examples)} examples: the "
            "model would never learn to stop. Let the chat template put it behind each assistant turn, within its "
            "{% generation %} marks where it has them, or name it as the tokenizer's eos_token",
            key="model.tokenizer",
        )
    if ends < len(examples):
        rank_zero_warn(f"{len(examples) - ends} of {len(examples)} examples do not train a stop token ({names})")


def check_targets(batch: Batch) -> None:
    """Refuse targets that are not the tokens they stand for, each predicted from the token before it.

    Raises:
        InputError: See above.
    """
    labels, ids = batch.labels.flatten(), batch.input_ids.flatten()
    trained = torch.nonzero(labels != IGNORE_INDEX).flatten()
    same = [(trained - 1, batch.predict_at), (labels[trained], batch.targets), (ids[trained], batch.targets)]
    if not all(torch.equal(a, b) for a, b in same):
        raise InputError(
            "labels, targets and tokens of a batch do not belong together: the model would learn other tokens than "
            "those that follow; this is a fault of whoever makes the batches",
            key="data",
        )


def of_examples(values: Tensor, batch: Batch, packed: bool) -> list[Tensor]:
    """What belongs to each example.

    Args:
        values: (B, T, …).
        batch: Says how long each example is.
        packed: Whether they lie end to end in one row, or each in a row of its own.
    """
    if packed:
        return list(values[0].split(list(batch.example_lengths)))
    return [row[:length] for row, length in zip(values, batch.example_lengths, strict=True)]


def check_examples_apart(module: Any, loader: PlannedLoader) -> None:
    """Refuse batches in which examples see each other, or padding.

    The first examples are computed together; then with another example in the first one's place, and the last alone.

    Raises:
        InputError: The last one's logits are not the same.
    """
    store = loader.collate.store
    examples = np.arange(min(TOGETHER, len(store)))
    as_they_are = _Truncated(store)
    changed = _Truncated(store, embedding_rows(module.causal_lm) if len(examples) > 1 else None)
    with evaluating(module.causal_lm), torch.no_grad():
        found = separation(
            _last_logits(module, loader, as_they_are, examples),
            _last_logits(module, loader, changed, examples),
            _last_logits(module, loader, as_they_are, examples[-1:]),
        )
    if not found.holds(module.causal_lm.dtype):
        how = "packed" if loader.collate.packed else "padded"
        raise InputError(
            f"examples of a {how} batch do not stay apart: their {found}. Attention mask, position ids and "
            f"model.attn_implementation ({module.causal_lm.config._attn_implementation}) do not fit each other"
            + ("; data.packing: false pads instead" if loader.collate.packed else ""),
            key="data.packing",
        )


class _Truncated:
    """A store of which only the first tokens of each example are seen.

    Args:
        vocabulary: Where given, the first example has other tokens than it has.
    """

    def __init__(self, store: Any, vocabulary: int | None = None) -> None:
        self.store, self.vocabulary = store, vocabulary

    def __getitem__(self, row: int) -> Any:
        ids, marks = (part[:TOKENS] for part in self.store[row])
        return ((ids + 1) % self.vocabulary if self.vocabulary is not None and row == 0 else ids), marks


def _last_logits(module: Any, loader: PlannedLoader, store: Any, examples: Any) -> Tensor:
    """Logits of the last example, by the collator and the forward pass that train; fp32."""
    collate = copy.copy(loader.collate)
    collate.store = store
    batch = collate(examples, 1)
    return of_examples(module(batch.to(module.device)).float(), batch, collate.packed)[-1]
