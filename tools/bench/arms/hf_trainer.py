"""Arms `hf_padded`, `hf_grouped` and `hf_single`: transformers' Trainer.

A step holds as many chats as hold its tokens on average: in one batch, drawn at random and padded to the longest, or
of about one length; or one after the other, each a micro-batch, which pads nothing and suits a CPU, where small
matrices cost no more than large ones.
"""

from __future__ import annotations

import argparse
from typing import Any

import meter
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from workload import TokenRows


class Counted:
    """Mixed into a Trainer: a meter sees what it trains on.

    Attributes:
        measured: The meter.
    """

    measured: meter.Meter

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """One micro-batch; its loss is divided by the labelled tokens of the whole step, `num_items_in_batch`."""
        tokens = meter.labelled(inputs["labels"])
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        self.measured.saw(tokens, loss * num_items_in_batch)
        return loss


class CountedTrainer(Counted, Trainer):
    """transformers' Trainer, counted."""


class StepClock(TrainerCallback):
    """Tells a meter of each step."""

    def __init__(self, measured: meter.Meter) -> None:
        self.measured = measured

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Everything of the steps before is done."""
        self.measured.passed(state.global_step)


def chats_per_step(rows: TokenRows, single: bool) -> dict[str, int]:
    """As TrainingArguments: in one batch, or one after the other."""
    names = ("gradient_accumulation_steps", "per_device_train_batch_size")
    return dict(zip(names, (rows.per_step, 1) if single else (1, rows.per_step), strict=True))


def common(given: argparse.Namespace, measured: meter.Meter, out: str) -> dict[str, Any]:
    """What the arms have in common, as TrainingArguments; one step more than are counted."""
    return {
        "output_dir": out,
        "max_steps": measured.last + 1,
        "learning_rate": meter.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_beta1": meter.BETAS[0],
        "adam_beta2": meter.BETAS[1],
        "weight_decay": 0.0,
        "max_grad_norm": meter.CLIP,
        "use_cpu": given.device == "cpu",
        "bf16": False,  # no autocast: weights, activations and optimizer are of the dtype the model is loaded in
        "torch_compile": given.compile,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 10,
    }


def dataset(rows: TokenRows) -> Dataset:
    """The rows with the columns that both trainers read."""
    pairs = [(ids.tolist(), labels.tolist()) for ids, labels in rows]
    ids, labels = zip(*pairs, strict=True)
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "length": rows.lengths.tolist()})


def main() -> None:
    """Train and report."""
    given = meter.arguments(__doc__, "hf_padded", "hf_grouped", "hf_single")
    measured = meter.Meter(given)
    rows = TokenRows.load(given.workload)
    folder = str(given.workload / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chosen = common(given, measured, str(given.workload / given.arm)) | {
        **chats_per_step(rows, given.arm == "hf_single"),
        "train_sampling_strategy": "group_by_length" if given.arm == "hf_grouped" else "random",
        "length_column_name": "length",
    }
    trainer = CountedTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=given.dtype),
        args=TrainingArguments(**chosen),
        train_dataset=dataset(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[StepClock(measured)],
    )
    trainer.measured = measured
    trainer.train()
    measured.report("transformers", "accelerate")


if __name__ == "__main__":
    main()
