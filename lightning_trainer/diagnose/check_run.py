"""What the trainer will do with the rows: batches, optimizer steps, validations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from torch.optim.lr_scheduler import LRScheduler

from lightning_trainer.callbacks import PreviewCallback, RunCheckpoint, StepValidation, callbacks_of
from lightning_trainer.data import ChatDataModule
from lightning_trainer.data.packing import Ints
from lightning_trainer.data.sampler import EpochPlan, plan_epoch
from lightning_trainer.diagnose.check_data import Rows
from lightning_trainer.model.schedule import DEFAULT_WARMUP, StepSchedule


@dataclass(frozen=True)
class RunFacts:
    """A run of `fit`, from its first step.

    Attributes:
        rows: Of an epoch: packs, or examples where each has its own row.
        fill: Share of the places of those rows that hold a token; the rest is room or padding.
        micro_batches: Of an epoch, on each device, after limit_train_batches.
        max_time: Seconds after which the run ends at the latest, if any.
        steps: Optimizer steps of the whole run; None where nothing ends it but a clock or a callback.
        rows_per_step: Of a whole optimizer step, over its micro-batches and devices.
        examples_per_step: The same, on average.
        tokens_per_step: The same, on average, without padding.
        schedule_steps: Optimizer steps after which the schedule has come to its end; None where it has none.
        validations: None where a clock decides.
        most_tokens: Of a micro-batch on one device, padding included.
        unusable_interval: Why Lightning will refuse val_check_interval, or empty.
        unusable_limit: The same of limit_val_batches.
    """

    exact: bool
    packing: bool
    batch_size: int
    accumulate: int
    devices: int
    rows: int
    fill: float
    micro_batches: int
    steps_per_epoch: int
    epochs: int
    max_steps: int
    max_time: float | None
    steps: int | None
    rows_per_step: int
    examples_per_step: float
    tokens_per_step: float
    schedule: str
    schedule_steps: int | None
    warmup_steps: int
    validations: int | None
    checkpoints: int
    previews: int
    most_tokens: int
    unusable_interval: str
    unusable_limit: str


def run_facts(data: ChatDataModule, trainer: Trainer, train: Rows, held_out: int, scheduler: LRScheduler) -> RunFacts:
    """Plan the first epoch as the loader will; every epoch has as many batches.

    Args:
        held_out: Rows there are to validate on.
        scheduler: Of the run, made for any optimizer.
    """
    layout = data.layout(trainer)
    plan = plan_epoch(train.lengths, train.trained, layout, epoch=0)
    batches = len(plan)
    per_epoch = math.ceil(batches / layout.accumulate)
    steps = _steps(trainer, per_epoch)
    rows_per_step = min(layout.batch_size * layout.accumulate * layout.world_size, len(plan.rows))
    per_row = rows_per_step / max(len(plan.rows), 1)
    places = _places(plan, train.lengths)
    return RunFacts(
        exact=train.facts.exact,
        packing=data.packing,
        batch_size=layout.batch_size,
        accumulate=layout.accumulate,
        devices=layout.world_size,
        rows=len(plan.rows),
        fill=int(train.lengths.sum()) / max(int(places.sum()), 1),
        micro_batches=batches,
        steps_per_epoch=per_epoch,
        epochs=_epochs(trainer),
        max_steps=trainer.max_steps,
        max_time=min(filter(None, (timer.time_remaining() for timer in callbacks_of(trainer, Timer))), default=None),
        steps=steps,
        rows_per_step=rows_per_step,
        examples_per_step=len(train.lengths) * per_row,
        tokens_per_step=int(train.lengths.sum()) * per_row,
        schedule=type(scheduler).__name__,
        **_schedule(scheduler, steps),
        validations=_validations(trainer, batches, steps, held_out),
        checkpoints=_times(steps, (c.every_n_train_steps for c in callbacks_of(trainer, RunCheckpoint))),
        previews=_times(steps, (c.every_n_steps for c in callbacks_of(trainer, PreviewCallback))),
        most_tokens=int(places.max(initial=0)),
        unusable_interval=_unusable_interval(trainer, batches, held_out),
        unusable_limit=_unusable_limit(trainer, -(-held_out // (layout.batch_size * layout.world_size))),
    )


def _epochs(trainer: Trainer) -> int:
    return -1 if trainer.max_epochs is None else trainer.max_epochs


def _steps(trainer: Trainer, per_epoch: int) -> int | None:
    epochs, most = _epochs(trainer), trainer.max_steps
    if per_epoch == 0:
        return 0
    if epochs == -1:
        return None if most == -1 else most
    return per_epoch * epochs if most == -1 else min(per_epoch * epochs, most)


def _places(plan: EpochPlan, lengths: Ints) -> Ints:
    """Places for tokens of each micro-batch: the room of its packs, or its rows padded to its longest."""
    rows, size = plan.rows.sums(lengths), plan.layout.batch_size
    if not len(rows):
        return np.zeros(0, dtype=np.int64)
    starts = np.arange(0, len(rows), size)
    counts = np.minimum(len(rows) - starts, size)
    widest = np.maximum.reduceat(rows, starts) if plan.layout.pack_to is None else plan.layout.pack_to
    return np.asarray(counts * widest, dtype=np.int64)


def _schedule(scheduler: LRScheduler, steps: int | None) -> dict[str, Any]:
    if not isinstance(scheduler, StepSchedule):
        return {"schedule_steps": None, "warmup_steps": 0}
    total = scheduler.total_steps or steps
    warmup = math.ceil(DEFAULT_WARMUP * (total or 0)) if scheduler.warmup_steps is None else scheduler.warmup_steps
    return {"schedule_steps": total, "warmup_steps": warmup}


def _times(steps: int | None, intervals: Iterable[int]) -> int:
    """How often something happens every so many steps, and once more at the end; 0 where there is no end."""
    return sum(math.ceil(steps / every) for every in intervals) if steps else 0


def _validations(trainer: Trainer, batches: int, steps: int | None, held_out: int) -> int | None:
    if not (held_out and trainer.limit_val_batches and batches and steps):
        return 0
    for callback in callbacks_of(trainer, StepValidation):
        if callback.every_n_steps is not None:
            return steps // callback.every_n_steps
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        return None
    interval = trainer.val_check_interval
    check_at = interval if isinstance(interval, int) else max(1, int(batches * interval))
    return _walk(batches, steps, trainer.accumulate_grad_batches, check_at, trainer.check_val_every_n_epoch)


def _walk(batches: int, steps: int, accumulate: int, check_at: int, every: int | None) -> int:
    """Go through the micro-batches of a run and count its validations: those due within a step wait for its end."""
    count = stepped = seen = epoch = 0
    waiting = False
    while stepped < steps:
        for batch in range(1, batches + 1):
            seen += 1
            waiting |= seen % check_at == 0 if every is None else epoch % every == every - 1 and batch % check_at == 0
            if batch % accumulate == 0 or batch == batches:
                stepped += 1
                count += waiting
                waiting = False
                if stepped == steps:
                    break
        epoch += 1
    return count


def _unusable_interval(trainer: Trainer, batches: int, held_out: int) -> str:
    interval = trainer.val_check_interval
    validates = held_out and trainer.limit_val_batches and trainer.check_val_every_n_epoch is not None
    if validates and isinstance(interval, int) and interval > batches > 0:
        return f"{interval} micro-batches, but an epoch has {batches}"
    return ""


def _unusable_limit(trainer: Trainer, batches: int) -> str:
    """A share of the validation batches, of which there are at most so many, that is less than one."""
    limit = trainer.limit_val_batches
    if isinstance(limit, float) and limit > 0 and batches and int(limit * batches) == 0:
        return f"{limit:g} of {batches} batches is none"
    return ""
