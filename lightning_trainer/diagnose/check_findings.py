"""What is doubtful about a run: each rule looks at the facts and says value and way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from lightning_trainer.diagnose.check_data import SplitFacts
from lightning_trainer.diagnose.check_model import ModelFacts
from lightning_trainer.diagnose.check_run import RunFacts
from lightning_trainer.diagnose.memory import GIB, Memory

Severity = Literal["warning", "error"]

FROZEN = "84 % of the weights never move at lr 1e-5, 44 % at 5e-5, 12 % at 1e-4"
"""Share of bf16 weights whose updates all round to nothing, measured."""

FEW_STEPS = 20
LONG_ROWS = 0.01
LEAST_TRAINED = 0.02
DUPLICATES = 0.05
LEAST_FILL = 0.5
HIGH_RATE = 1e-3


@dataclass(frozen=True)
class Finding:
    """One thing to look at.

    Attributes:
        severity: `error` where the run will be refused, or train what nobody wants.
        key: Dotted key of the configuration.
        message: The value and the way out, in one line.
    """

    severity: Severity
    key: str
    message: str


@dataclass(frozen=True)
class Settings:
    """What the user wrote, as far as rules ask for it."""

    max_length: int
    min_length: int
    max_bad_fraction: float
    on_bad_row: str
    on_long_row: str
    packing: bool
    optimizer: str
    loses_nothing: bool
    lr: float


@dataclass(frozen=True)
class Facts:
    """Everything the rules look at; `val` is None where nothing is held out."""

    settings: Settings
    model: ModelFacts
    train: SplitFacts
    val: SplitFacts | None
    run: RunFacts
    memory: Memory


def findings(facts: Facts) -> tuple[Finding, ...]:
    """Errors first."""
    found = [finding for rule in RULES for finding in rule(facts)]
    return tuple(sorted(found, key=lambda finding: finding.severity))


def _model(facts: Facts) -> Iterator[Finding]:
    model, settings = facts.model, facts.settings
    if not (model.has_weights or model.from_scratch):
        way_out = "name a directory that has them, or set model.from_scratch: true"
        yield Finding("error", "model.pretrained", f"the directory holds no weights; {way_out}")
    elif 2 * model.vocabulary < model.embedding_rows:
        yield Finding(
            "warning",
            "model.tokenizer",
            f"{model.vocabulary:,} tokens for an embedding of {model.embedding_rows:,} rows: is it another model's? "
            "leave model.tokenizer out to take the model's own",
        )
    if model.positions is not None and settings.max_length > model.positions:
        yield Finding(
            "warning",
            "data.max_length",
            f"{settings.max_length} is more than the {model.positions} positions the model is made for; set at most "
            "that",
        )


def _optimizer(facts: Facts) -> Iterator[Finding]:
    settings, precision = facts.settings, facts.model.precision
    if not settings.loses_nothing and precision == "bf16-true":
        yield Finding(
            "warning",
            "model.optimizer",
            f"{settings.optimizer} at lr {settings.lr:g} loses updates smaller than half a bf16 step ({FROZEN}); "
            "take CompensatedAdamW",
        )
    if not settings.loses_nothing and precision == "16-true":
        yield Finding(
            "error",
            "model.optimizer",
            f"{settings.optimizer} keeps fp16 moments, which is refused; take CompensatedAdamW or bf16-true",
        )
    if precision == "16-true":
        yield Finding("warning", "trainer.precision", "16-true skips steps that overflow; bf16-true has none of them")
    if settings.lr > HIGH_RATE and not facts.model.from_scratch:
        yield Finding(
            "warning", "model.optimizer", f"lr {settings.lr:g} is high for pretrained weights; 1e-5 to 1e-4 is usual"
        )


def _schedule(facts: Facts) -> Iterator[Finding]:
    run = facts.run
    if run.steps and run.warmup_steps >= run.steps:
        way_out = f"set warmup_steps below {run.steps}, or null for 3 % of the run"
        yield Finding(
            "warning",
            "model.lr_scheduler",
            f"{run.warmup_steps} warm-up steps in a run of {run.steps}: the rate never reaches its peak; {way_out}",
        )
    elif run.steps and (run.schedule_steps or 0) > run.steps and run.schedule != "WarmupConstant":
        yield Finding(
            "warning",
            "model.lr_scheduler",
            f"total_steps {run.schedule_steps} in a run of {run.steps}: the rate does not decay to its end; leave it "
            "null",
        )


def _rows(facts: Facts) -> Iterator[Finding]:
    train, settings = facts.train, facts.settings
    splits = [split for split in (train, facts.val) if split is not None]
    bad, read, too_long = (sum(getattr(split, name) for split in splits) for name in ("bad", "read", "too_long"))
    first = f"; the first: {train.reasons[0]}" if train.reasons else ""
    if bad > settings.max_bad_fraction * read:
        share = f"{bad / read:.1%} of the rows cannot be used, more than {settings.max_bad_fraction:g}"
        yield Finding("error", "data.max_bad_fraction", f"{share}: put them right or raise it{first}")
    elif bad and settings.on_bad_row == "raise":
        yield Finding("error", "data.on_bad_row", f"{bad} rows cannot be used; set it to quarantine{first}")
    if too_long and settings.on_long_row == "raise":
        way_out = "raise data.max_length, or set it to drop or truncate"
        yield Finding("error", "data.on_long_row", f"{too_long} rows are over max_length; {way_out}")
    elif settings.on_long_row == "drop" and train.too_long > LONG_ROWS * train.read:
        yield Finding(
            "warning",
            "data.max_length",
            f"{train.too_long / train.read:.1%} of the rows are longer than {settings.max_length} tokens and are "
            "dropped; raise it, or set data.on_long_row: truncate",
        )
    if train.duplicates > DUPLICATES * train.read:
        way_out = "remove them from the file"
        yield Finding("warning", "data.train_path", f"{train.duplicates / train.read:.1%} are duplicates; {way_out}")
    if not (facts.val and facts.val.examples):
        yield Finding("warning", "data.val_fraction", "nothing is held out: no val/loss; raise it, or set val_path")


def _tokens(facts: Facts) -> Iterator[Finding]:
    train, run = facts.train, facts.run
    if not train.stops:
        yield Finding(
            "error",
            "model.tokenizer",
            "no row trains an end-of-turn token: the model would never learn to stop; see the end of the chat template",
        )
    trained = train.trained_tokens / max(train.tokens, 1)
    if trained < LEAST_TRAINED:
        way_out = "shorten the prompts, or set data.loss_on: all"
        yield Finding("warning", "data.loss_on", f"{trained:.1%} of the tokens are trained on; {way_out}")
    if not run.packing and run.fill < LEAST_FILL:
        yield Finding("warning", "data.packing", f"{1 - run.fill:.0%} of the batches is padding; set it to true")


def _run(facts: Facts) -> Iterator[Finding]:
    run = facts.run
    if run.steps is None and run.schedule_steps is None:
        yield Finding("error", "trainer.max_steps", "the run has no end and so its schedule no length; set max_steps")
    elif run.steps is not None and run.steps < FEW_STEPS:
        yield Finding(
            "warning" if run.steps else "error",
            "trainer.max_epochs",
            f"optimizer steps in the run: only {run.steps}; train more epochs, or lower "
            f"trainer.accumulate_grad_batches ({run.accumulate}) or data.batch_size ({run.batch_size})",
        )
    if run.unusable_interval:
        yield Finding("error", "trainer.val_check_interval", f"{run.unusable_interval}; lower it")
    if run.unusable_limit:
        yield Finding("error", "trainer.limit_val_batches", f"{run.unusable_limit}; raise it, or give a number")


def _memory(facts: Facts) -> Iterator[Finding]:
    memory = facts.memory
    if memory.total is None or memory.fits:
        return
    ways = [] if facts.model.gradient_checkpointing else ["set it to true"]
    yield Finding(
        "warning",
        "model.gradient_checkpointing",
        f"about {memory.total / GIB:.1f} GiB will not fit {memory.card_name} ({memory.card / GIB:.1f} GiB); "
        + ", ".join([*ways, "lower data.batch_size or data.max_length"]),
    )


RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _model,
    _optimizer,
    _schedule,
    _rows,
    _tokens,
    _run,
    _memory,
)
