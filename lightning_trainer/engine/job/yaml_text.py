"""A job as the YAML that `fit` runs, each value with what it means."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import yaml

from lightning_trainer.engine.job.lowering import lower, remarks
from lightning_trainer.engine.job.trainer_config import TrainerConfig

COMMENTS = {
    "seed_everything": "order of rows, held-out rows, dropout, the profile's draws",
    "model.tokenizer": "null: the one at pretrained",
    "model.gradient_checkpointing": "less memory, about a third more time",
    "model.optimizer": "bf16 weights that lose no update",
    "model.lr_scheduler": "warm-up, then half a cosine to the end of the run",
    "model.locked": "compared with the model, and with the run that is resumed",
    "data.val_path": "null: val_fraction of the training rows, val_max_rows at most",
    "data.system_prompt": "{date} is the date the run began; null: the profile's own",
    "data.max_length": "tokens of a row; with packing of a pack",
    "data.min_length": "tokens; shorter rows are dropped and counted",
    "data.batch_size": "rows, or packs, at once on the device",
    "trainer.precision": "the one dtype of weights, gradients and moments",
    "trainer.max_epochs": "-1: max_steps decides",
    "trainer.max_steps": "optimizer steps; -1: max_epochs decides",
    "trainer.limit_val_batches": "0: no validation",
    "trainer.val_check_interval": "of an epoch, where validation.every_n_steps is null",
    "validation.every_n_steps": "optimizer steps; null: by the Trainer's own keys",
    "trainer.gradient_clip_val": "norm of the gradient; null: not clipped",
    "trainer.log_every_n_steps": "optimizer steps",
    "trainer.logger": "true: TensorBoard in the run directory",
    "checkpoint.every_n_train_steps": "optimizer steps",
    "checkpoint.keep_last": "newest checkpoints kept",
    "overwrite": "true: an old run in the directory is moved aside",
    "ckpt_path": "last, auto or a checkpoint: go on from there",
}
"""Dotted key -> what a reader of the YAML should know."""

INLINE = ("model.optimizer", "model.lr_scheduler", "data.profile", "trainer.logger", "preview_backend")
"""Mappings written on one line."""


def as_yaml(config: TrainerConfig, source: str, target: str = "run.yaml") -> str:
    """The lowered job, with comments; `fit` runs it as it is.

    Args:
        config: The job.
        source: What it was made from, for the reader.
        target: Name of the file this will be.

    Raises:
        InputError: As `lower`.
    """
    values = lower(config)
    size = config.hyperparams.effective_batch_size
    accumulate = f"{config.hyperparams.gradient_accumulation} x {config.hyperparams.batch_size} = {size} rows"
    comments = {**COMMENTS, "trainer.accumulate_grad_batches": f"{accumulate} per device and optimizer step"}
    header = [f"lightning-trainer fit --config {target}", f"Made from {source}.", *remarks(config)]
    lines = [f"# {line}" for line in header]
    for section, value in values.items():
        lines += (
            ["", *_lines(section, value, section, 0, comments)]
            if isinstance(value, dict)
            else _lines(section, value, section, 0, comments)
        )
    return "\n".join(lines) + "\n"


def _lines(name: str, value: Any, dotted: str, depth: int, comments: dict[str, str]) -> Iterator[str]:
    indent, comment = "  " * depth, f"  # {comments[dotted]}" if dotted in comments else ""
    if isinstance(value, dict) and value and dotted not in INLINE:
        yield f"{indent}{name}:{comment}"
        for inner, item in value.items():
            yield from _lines(inner, item, f"{dotted}.{inner}", depth + 1, comments)
    elif dotted == "trainer.callbacks":
        yield f"{indent}{name}:"
        yield from (f"{indent}  - {_inline(item)}" for item in value)
    else:
        yield f"{indent}{name}: {_inline(value)}{comment}"


def _inline(value: Any) -> str:
    """One line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf"))
    text = text.removesuffix("\n").removesuffix("\n...")
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text  # text of several lines, with \\n in it
